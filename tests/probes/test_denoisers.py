import pytest
import torch
import torch.nn.functional as F

from sfumato.diffusion import memoriser
from sfumato.errors import BadData, BadSetting
from sfumato.metrics import correlation
from sfumato.nn import PlainUNet
from sfumato.physics import correlated_noise
from sfumato.probes import agreement, blindness, denoiser_basis, noise_autocorrelation


def _g(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_blindness_is_the_largest_entry_of_the_own_pixel_blocks(chunk):
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    x = torch.rand(2, 2, 5, 4, dtype=torch.float64)

    def net(t):
        return F.conv2d(t.square(), weight, padding=1)

    jacobian = torch.autograd.functional.jacobian(lambda t: net(t[None])[0], x[0]).flatten(1, 2).flatten(2)
    own = [
        torch.autograd.functional.jacobian(lambda t: net(t[None])[0], s).view(3, 20, 2, 20).diagonal(dim1=1, dim2=3) for s in x
    ]
    assert jacobian.numel() == 3 * 20 * 2 * 20
    assert blindness(net, x, chunk=chunk).item() == pytest.approx(torch.stack(own).abs().max().item())


def test_a_pixel_that_sees_itself_through_another_channel_is_not_blind():
    x = torch.rand(1, 2, 4, 4)
    assert blindness(lambda t: t.flip(1), x).item() == 1
    assert blindness(lambda t: t.roll(1, -1), x).item() == 0


def test_blindness_leaves_no_gradient_behind():
    layer = torch.nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        assert not blindness(layer, torch.rand(1, 1, 4, 4)).requires_grad
    assert layer.weight.grad is None


def test_autocorrelation_of_filtered_noise_is_that_of_the_filter():
    line = torch.tensor([1.0, 2.0, 1.0])
    noise = correlated_noise((4, 1, 512, 512), 0.1, torch.outer(line, line), generator=torch.Generator().manual_seed(0))
    r = noise_autocorrelation(noise + 0.5)  # the mean does not count
    assert r.shape == (512, 512)
    assert r[0, 0] == 1
    assert r[0, :4].tolist() == pytest.approx([1, 2 / 3, 1 / 6, 0], abs=0.01)
    assert r[-1, 1].item() == pytest.approx(4 / 9, abs=0.01)


@pytest.mark.parametrize("size", [(6, 5), (5, 8)])
def test_autocorrelation_is_a_sum_over_periodic_shifts(size):
    n = torch.randn(1, 1, *size, dtype=torch.float64)
    n = n - n.mean()
    expected = (n * n.roll((-2, -1), (-2, -1))).sum() / n.square().sum()
    assert noise_autocorrelation(n)[2, 1].item() == pytest.approx(expected.item())


# Bases


def _net(seed=0, channels=1):
    torch.manual_seed(seed)
    net = PlainUNet(channels, channels, (4, 8), norm="bias_free", up="transposed").double()
    net(torch.randn(4, channels, 8, 8, dtype=torch.float64))
    return net.eval()


@pytest.mark.parametrize("block", [1, 8])
def test_products_alone_find_the_basis_of_the_matrix(block):
    net, y = _net(), torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=_g())
    j = torch.autograd.functional.jacobian(net, y).view(64, 64)
    dense, few = (
        denoiser_basis(net, y, 6, method=method, block=block, tol=1e-9, probes=1000, generator=_g())
        for method in ("dense", "lanczos")
    )
    true = torch.linalg.eigvalsh((j + j.T) / 2).flip(0)
    whole = denoiser_basis(net, y)
    assert torch.allclose(whole.values, true, atol=1e-10)
    assert torch.allclose(dense.values, true[:6], atol=1e-10)
    assert torch.allclose(few.values, true[:6], atol=1e-8)
    assert few.vectors.shape == (6, 1, 8, 8)
    same = (few.vectors.flatten(1) @ dense.vectors.flatten(1).T).abs()
    assert torch.allclose(same, torch.eye(6, dtype=torch.float64), atol=1e-5)
    assert dense.residuals.max() < 1e-10
    assert few.residuals.max() < 1e-8
    assert whole.trace.item() == pytest.approx(j.trace().item())
    assert whole.values.sum().item() == pytest.approx(j.trace().item())
    assert whole.asymmetry.item() == pytest.approx(((j - j.T).norm() / j.norm()).item())
    assert few.trace.item() == pytest.approx(j.trace().item(), abs=0.1 * j.norm().item())
    assert few.asymmetry.item() == pytest.approx(whole.asymmetry.item(), rel=0.1)
    skew = (j - j.T).norm().square() / 4
    assert whole.symmetric_share.item() == pytest.approx((1 - skew / j.norm().square()).item())


def test_a_bias_free_denoiser_is_its_basis_and_what_is_skew():
    net, y = _net(), torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=_g())
    basis = denoiser_basis(net, y)
    shrunk = (basis.values * basis.coefficients(y)) @ basis.vectors.flatten(1)
    skew = net(y) - shrunk.view_as(y)  # (J - Jᵀ) y / 2
    assert torch.allclose((skew * y).sum(), torch.zeros((), dtype=torch.float64), atol=1e-9)
    assert torch.allclose((net(y) * y).sum(), (basis.values * basis.coefficients(y).square()).sum())


def test_a_shrinkage_in_a_known_basis():
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=_g()))[0]
    values = torch.linspace(1, 0, 16, dtype=torch.float64)
    matrix = q * values @ q.T
    basis = denoiser_basis(lambda y: (y.flatten(1) @ matrix).view_as(y), torch.rand(1, 1, 4, 4, dtype=torch.float64), 3)
    assert torch.allclose(basis.values, values[:3], atol=1e-6)
    assert torch.allclose((basis.vectors.flatten(1) @ q[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=1e-4)
    assert basis.asymmetry < 1e-12
    rotation = denoiser_basis(lambda y: y.flip(-1) * torch.tensor([1.0, -1.0]), torch.rand(1, 1, 1, 2))
    assert rotation.asymmetry.item() == pytest.approx(2)
    assert rotation.symmetric_share.item() == pytest.approx(0, abs=1e-6)


def test_bases_by_a_generator_and_no_mode_left_behind():
    net, y = _net().float().train(), torch.randn(1, 1, 8, 8, generator=_g())
    state = {name: t.clone() for name, t in net.state_dict().items()}
    a, b = (denoiser_basis(net, y, 4, method="lanczos", generator=_g(5)) for _ in range(2))
    assert all(torch.equal(s, t) for s, t in zip(a, b))
    assert net.training
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def test_what_has_no_basis_is_refused():
    y = torch.rand(1, 1, 4, 4)
    with pytest.raises(BadData, match="one picture"):
        denoiser_basis(torch.tanh, torch.rand(2, 1, 4, 4))
    with pytest.raises(BadData, match="8 numbers of 16"):
        denoiser_basis(lambda y: y[..., :2], y)
    for wrong in ({"method": "exact"}, {"k": 17}, {"k": 0}, {"method": "lanczos"}):
        with pytest.raises(BadSetting, match="number of vectors up to 16"):
            denoiser_basis(torch.tanh, y, **wrong)


# Agreement


def test_one_function_agrees_with_itself_and_two_constants_do_not():
    x = torch.rand(300, 1, 4, 4, generator=_g())
    draw = lambda f, start, g: f(start + torch.randn(start.shape, generator=g))  # noqa: E731
    same = agreement(torch.tanh, torch.tanh, x, 0.3, samples=5, draw=draw, generator=_g())
    assert same.variance == 0
    assert same.disagreement == 0
    assert torch.allclose(same.pairs, torch.ones(5))
    assert same.closest.shape == (2, 0)
    a, b = torch.rand(2, 1, 1, 4, 4, generator=_g(1))
    one, two = (lambda y: a.expand_as(y)), (lambda y: b.expand_as(y))
    apart = agreement(one, two, x, 0.3, samples=3, train=(a, b), draw=draw, generator=_g())
    assert apart.variance.item() == pytest.approx((a - b).square().mean().item())
    assert apart.error.item() == pytest.approx(((a - x).square().mean() + (b - x).square().mean()).item() / 2)
    assert torch.allclose(apart.pairs, correlation(a, b)[0].expand(3))
    assert torch.allclose(apart.closest, torch.ones(2, 3))
    assert torch.equal(apart.drawn[1, 2], b[0])


def test_both_start_alike_and_get_the_same_noise():
    starts, noise = [], []

    def draw(f, start, g):
        starts.append(start)
        noise.append(torch.randn(4, generator=g))
        return f(start)

    found = agreement(lambda y: y, lambda y: 2 * y, torch.rand(2, 1, 4, 4), 1.0, samples=6, mean=0.25, draw=draw, generator=_g())
    assert torch.equal(*starts)
    assert torch.equal(*noise)
    assert starts[0].mean().item() == pytest.approx(0.25, abs=0.3)
    assert torch.allclose(found.pairs, torch.ones(6))


def test_memorisers_draw_what_they_know():
    """Through the sampler itself: each draw is the training picture, and pairs correlate as these do."""
    a, b = torch.rand(2, 1, 1, 4, 4, generator=_g(1))
    one, two = (lambda y: memoriser(a)(y, 1.0)), (lambda y: memoriser(b)(y, 1.0))
    found = agreement(one, two, torch.rand(9, 1, 4, 4, generator=_g()), 0.5, samples=4, train=(a, b))
    assert torch.allclose(found.closest, torch.ones(2, 4), atol=1e-5)
    assert torch.allclose(found.pairs, correlation(a, b)[0].expand(4), atol=1e-5)
    again = agreement(one, two, torch.rand(9, 1, 4, 4, generator=_g()), 0.5, samples=4, train=(a, b))
    assert torch.equal(found.drawn, again.drawn)
