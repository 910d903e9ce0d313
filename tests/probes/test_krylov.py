from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.probes import LinearOperator, eigs, hutchinson, lanczos, smoothed_spectrum, spectral_density, svds

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "curvature-base.npz")


def with_spectrum(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(
        torch.randn(len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )[0]
    return q * values @ q.T


@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_reference_quadrature(kind):
    h = torch.from_numpy(VECTORS[f"{kind}_hessian"])
    density = spectral_density(h, steps=8, noise=torch.from_numpy(VECTORS[f"{kind}_rademacher"]))
    torch.testing.assert_close(density.nodes, torch.from_numpy(VECTORS[f"{kind}_slq_nodes"]), atol=1e-9, rtol=0)
    torch.testing.assert_close(density.weights, torch.from_numpy(VECTORS[f"{kind}_slq_weights"]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_extreme_eigenpairs_of_the_reference_hessian(kind):
    h = torch.from_numpy(VECTORS[f"{kind}_hessian"])
    true = torch.from_numpy(VECTORS[f"{kind}_eigs_H"]).sort().values
    expected = {"LA": true.flip(0)[:5], "SA": true[:5], "LM": true[true.abs().argsort(descending=True)][:5]}
    for which, values in expected.items():
        found = eigs(h, 5, which=which, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.values, values, atol=1e-8, rtol=0)
        torch.testing.assert_close(h @ found.vectors, found.vectors * found.values, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(5, dtype=torch.float64), atol=1e-10, rtol=0)
        assert found.residuals.max() < 1e-5


def test_lanczos_is_exact_at_full_length():
    a = with_spectrum(torch.linspace(-2, 5, 30))
    alpha, beta, q = result = lanczos(a, 100, generator=torch.Generator().manual_seed(1))
    assert (alpha.shape, beta.shape, q.shape) == ((30,), (29,), (30, 30))
    torch.testing.assert_close(q.T @ q, torch.eye(30, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(q.T @ a @ q, result.matrix(), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.linalg.eigvalsh(result.matrix()), torch.linalg.eigvalsh(a), atol=1e-8, rtol=0)


def test_gauss_quadrature_is_exact_up_to_degree_2m_minus_1():
    a = with_spectrum(torch.linspace(-1, 1.5, 40))
    start = torch.randint(2, (1, 40), generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    density = spectral_density(a, steps=5, noise=start)
    assert density.weights.sum().item() == pytest.approx(1)
    power = start[0] / 40**0.5
    for p in range(10):
        moment = (power @ start[0] / 40**0.5).item()
        assert density.expect(lambda t, p=p: t**p).item() == pytest.approx(moment, abs=1e-12)
        power = a @ power
    wrong = density.expect(lambda t: t**10).item() - (power @ start[0] / 40**0.5).item()
    assert abs(wrong) > 1e-9


def test_each_start_has_its_own_smoothed_spectrum():
    a = with_spectrum(torch.linspace(-1, 3, 40))
    density = spectral_density(a, steps=12, starts=3, sigma2=1e-3, generator=torch.Generator().manual_seed(0))
    reach = density.nodes.max() - density.nodes.min()
    t = torch.linspace(-3, 5, 4000, dtype=torch.float64)
    each = smoothed_spectrum(density.nodes, density.weights, t, 1e-3 * reach)
    assert each.shape == (3, 4000)
    torch.testing.assert_close(torch.trapezoid(each, t), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(torch.trapezoid(each * t, t), (density.nodes * density.weights).sum(1))
    start = torch.ones(40, dtype=torch.float64)
    nodes, weights = lanczos(a, 5, start=start).quadrature()
    assert (weights @ nodes**3).item() == pytest.approx((start @ a @ a @ a @ start / 40).item())


def test_an_invariant_subspace_ends_lanczos():
    a = with_spectrum([3.0] * 10 + [1.0] * 20 + [0.0] * 5)
    result = lanczos(a, 20, generator=torch.Generator().manual_seed(0))
    assert len(result.alpha) == 3
    torch.testing.assert_close(torch.linalg.eigvalsh(result.matrix()), torch.tensor([0.0, 1, 3]).double(), atol=1e-8, rtol=0)
    start = torch.zeros(35, dtype=torch.float64)
    start[0] = 1
    assert len(lanczos(torch.eye(35, dtype=torch.float64), 7, start=start).alpha) == 1
    density = spectral_density(a, steps=20, starts=3)
    assert density.weights.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert density.phi.isfinite().all()


def test_density_integrates_to_one_and_its_cdf_is_that_of_the_spectrum():
    values = torch.cat([torch.linspace(0, 1, 300), torch.linspace(4, 5, 100)]).double()
    a = with_spectrum(values)
    density = spectral_density(a, steps=60, starts=20, generator=torch.Generator().manual_seed(0))
    assert torch.trapezoid(density.phi, density.t).item() == pytest.approx(1)
    at = torch.tensor([-0.5, 0.25, 0.5, 2.0, 4.5, 6.0]).double()
    exact = (values[None] <= at[:, None]).double().mean(1)
    torch.testing.assert_close(density.cdf(at), exact, atol=0.02, rtol=0)
    assert density.expect(torch.exp).item() == pytest.approx(values.exp().mean().item(), rel=0.02)
    again = spectral_density(a, steps=60, starts=20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.nodes, density.nodes)


def test_starts_in_parts_equal_starts_together():
    a = with_spectrum(torch.linspace(0, 3, 20))
    starts = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = spectral_density(a, steps=6, noise=starts)
    apart = [spectral_density(a, steps=6, noise=row[None]).nodes for row in starts]
    torch.testing.assert_close(together.nodes, torch.cat(apart), atol=1e-10, rtol=0)


def test_restarts_find_pairs_that_one_basis_cannot():
    values = torch.linspace(0, 1, 400).double() ** 2
    a = with_spectrum(values)
    for which, expected in (("LA", values.flip(0)[:4]), ("LM", values.flip(0)[:4])):
        found = eigs(a, 4, which=which, tol=1e-8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.values, expected, atol=1e-10, rtol=0)
    short = eigs(a, 4, max_iter=20, generator=torch.Generator().manual_seed(0))
    assert short.residuals.max() > 1e-4


def test_repeated_eigenvalues_and_tiny_operators():
    identity = torch.eye(40, dtype=torch.float64)
    assert eigs(identity, 6).values.tolist() == pytest.approx([1] * 6)
    a = torch.kron(torch.eye(3, dtype=torch.float64), with_spectrum([5.0, 2.0, 1.0, 0.0]))
    assert eigs(a, 7).values.tolist() == pytest.approx([5, 5, 5, 2, 2, 2, 1])
    assert eigs(torch.zeros(25, 25), 2).values.tolist() == [0, 0]
    assert eigs(torch.tensor([[3.0]]), 1).values.tolist() == [3.0]
    assert eigs(with_spectrum([3.0, -4.0]), 2, which="LM").values.tolist() == pytest.approx([-4, 3])


@pytest.mark.parametrize("block", [2, 3, 8])
def test_blocks_find_the_same(block):
    values = torch.linspace(0, 1, 300).double() ** 2
    a = with_spectrum(values)
    for which, expected in (("LA", values.flip(0)[:5]), ("SA", values[:5]), ("LM", values.flip(0)[:5])):
        found = eigs(a, 5, which=which, tol=1e-8, block=block, max_iter=5000, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found.values, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(5, dtype=torch.float64), atol=1e-10, rtol=0)
        assert found.residuals.max() < 2e-8
    again = eigs(a, 5, tol=1e-8, block=block, max_iter=5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(eigs(a, 5, tol=1e-8, block=block, max_iter=5000, generator=torch.Generator().manual_seed(0))[0], again[0])


@pytest.mark.parametrize("block", [1, 2, 4, 7])
def test_blocks_on_repeated_eigenvalues_and_tiny_operators(block):
    a = with_spectrum([5.0] * 4 + [3.0] * 3 + list(torch.linspace(0, 1, 193).tolist()))
    found = eigs(a, 8, block=block, generator=torch.Generator().manual_seed(0))
    if block >= 4:  # as often as they occur
        assert found.values.tolist() == pytest.approx([5] * 4 + [3] * 3 + [1])
    assert eigs(torch.eye(40, dtype=torch.float64), 6, block=block).values.tolist() == pytest.approx([1] * 6)
    tiny = with_spectrum([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -6.0])
    assert eigs(tiny, 8, block=block).values.tolist() == pytest.approx([5, 4, 3, 2, 1, 0, -1, -6])
    assert eigs(tiny, 2, which="LM", block=block).values.tolist() == pytest.approx([-6, 5])
    assert eigs(torch.zeros(25, 25), 2, block=block).values.tolist() == [0, 0]


def test_a_block_is_multiplied_at_once():
    widths = []

    class Counted(LinearOperator):
        def __init__(self, a):
            super().__init__(tuple(a.shape), a.dtype, a.device)
            self.a = a

        def _product(self, v):
            widths.append(v.shape[1])
            return self.a @ v

    eigs(Counted(with_spectrum(torch.linspace(0, 1, 90))), 3, block=4, generator=torch.Generator().manual_seed(0))
    assert max(widths) == 4
    assert widths.count(4) > 0.7 * len(widths)


def test_svds():
    for shape in ((30, 50), (50, 30)):
        a = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        u, s, v = svds(a, 3, generator=torch.Generator().manual_seed(0))
        assert (u.shape, s.shape, v.shape) == ((shape[0], 3), (3,), (shape[1], 3))
        torch.testing.assert_close(s, torch.linalg.svdvals(a)[:3])
        torch.testing.assert_close(a @ v, u * s, atol=1e-6, rtol=0)
        torch.testing.assert_close(a.T @ u, v * s, atol=1e-6, rtol=0)


def test_bad_calls_are_told():
    with pytest.raises(BadSetting, match="which='XX'"):
        eigs(torch.eye(3), 1, which="XX")
    with pytest.raises(BadSetting, match="k=4"):
        eigs(torch.eye(3), 4)
    with pytest.raises(BadSetting, match="block=0"):
        eigs(torch.eye(3), 1, block=0)
    with pytest.raises(BadData, match="square"):
        lanczos(torch.zeros(3, 4), 2)


@pytest.mark.slow
def test_dense_truth_on_a_digits_network():
    """The part's own claim: trace within 3 standard errors, top 5 to 1e-4, distribution within 0.02."""
    from sklearn.datasets import load_digits
    from torch import nn

    from sfumato.probes import HessianOperator

    x, y = (torch.from_numpy(t) for t in load_digits(return_X_y=True))
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
        op = HessianOperator(net, nn.functional.cross_entropy, (x[:500] / 16, y[:500]), chunk=64)
        dense = op.dense()
        true = torch.linalg.eigvalsh(dense)
        generator = torch.Generator().manual_seed(seed)
        trace = hutchinson(op, generator=generator)
        assert (trace.value - dense.trace()).abs() < 3 * trace.stderr
        torch.testing.assert_close(eigs(op, 5, generator=generator).values, true.flip(0)[:5], rtol=1e-4, atol=0)
        density = spectral_density(op, steps=60, starts=20, generator=generator)
        at = torch.linspace(float(true[0]), float(true[-1]), 1000).double()
        # 2/3 of the eigenvalues crowd within 1e-3 of 0, where one node stands for them: sideways tolerance = the density's own σ
        low, high = ((true[None] <= (at + shift)[:, None]).double().mean(1) for shift in (-3.2e-3, 3.2e-3))
        found = density.cdf(at)
        assert (low - 0.02 <= found).all()
        assert (found <= high + 0.02).all()
