from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel

from sfumato.errors import BadData
from sfumato.losses import median_bandwidth
from sfumato.metrics import mmd2, precision_recall, sliced_wasserstein

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "cs-ib.npz").items()}


def _normal(n, d=2, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_mmd_is_the_textbooks_sum():
    p, q = V["p"], V["q"]
    pp, qq, pq = (rbf_kernel(a, b, gamma=0.5) for a, b in ((p, p), (q, q), (p, q)))
    n, m = len(p), len(q)
    wanted = (pp.sum() - n) / (n * (n - 1)) + (qq.sum() - m) / (m * (m - 1)) - 2 * pq.mean()
    assert mmd2(p, q, sigma=1.0).item() == pytest.approx(wanted, abs=1e-12)
    assert mmd2(p, q, sigma=1.0, chunk=4).item() == pytest.approx(wanted, abs=1e-12)
    # the reference is the biased form: with the diagonals, divided by the squares
    biased = wanted - (pp.sum() - n) / (n * (n - 1)) - (qq.sum() - m) / (m * (m - 1)) + pp.mean() + qq.mean()
    assert biased == pytest.approx(V["mmd2_pq"].item(), abs=1e-10)
    width = median_bandwidth(torch.cat([p, q])).item()
    assert mmd2(p, q).item() == pytest.approx(mmd2(p, q, sigma=width).item())


def test_mmd_is_unbiased():
    draws = torch.stack([mmd2(_normal(20, seed=2 * s), _normal(30, seed=2 * s + 1), sigma=1.0) for s in range(200)])
    assert draws.min() < 0
    assert abs(draws.mean()) < 3 * draws.std() / 200**0.5
    assert mmd2(torch.zeros(3, 2), torch.zeros(3, 2)).item() == 0
    x = _normal(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mmd2(x, _normal(5, seed=1), sigma=1.0), x)


def test_slices_are_exact_in_one_dimension():
    """Unequal sets: as if every row stood there often enough to make them equal."""
    a, b = _normal(6, 1), 2 * _normal(4, 1, seed=1) + 1
    one = torch.ones(1, 1)
    assert sliced_wasserstein(a.sign() * 2, b * 0, directions=one).item() == pytest.approx(2)
    u = torch.rand(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sliced_wasserstein(u, u + 3, directions=one).item() == pytest.approx(3)
    repeated_a, repeated_b = a.repeat_interleave(4, 0), b.repeat_interleave(6, 0)
    assert torch.allclose(sliced_wasserstein(a, b, directions=one), sliced_wasserstein(repeated_a, repeated_b, directions=one))
    squares = (repeated_a.sort(0).values - repeated_b.sort(0).values).square().mean().sqrt()
    assert torch.allclose(sliced_wasserstein(a, b, directions=one), squares)


def test_slices_of_gaussians():
    """N(0, I) against N(0, 4 I) and a shift: (2 - 1)² + |s|² / D along a random direction."""
    a, b = _normal(4000, 3), 2 * _normal(4000, 3, seed=1) + torch.tensor([3.0, 0, 0], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    assert sliced_wasserstein(a, b, projections=1000, generator=g).item() == pytest.approx((1 + 9 / 3) ** 0.5, rel=0.03)
    drawn = [sliced_wasserstein(a[:50], b[:60], generator=torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    x = _normal(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, _normal(4, seed=1), directions=torch.eye(2)), x)


def _brute(x, support, k):
    d = torch.cdist(support, support)
    radius = d.sort(1).values[:, k]
    return (torch.cdist(x, support) <= radius).any(1).double().mean()


def test_precision_and_recall_by_hand():
    a, b = _normal(60), 0.7 * _normal(50, seed=1) + 0.5
    for chunk in (7, 2048):
        both = precision_recall(a, b, k=4, chunk=chunk)
        assert both.precision == _brute(a, b, 4)
        assert both.recall == _brute(b, a, 4)


def test_precision_and_recall_of_two_modes():
    """One of two modes, and some that are nowhere."""
    data = torch.cat([_normal(100), _normal(100, seed=1) + 50])
    samples = torch.cat([_normal(90, seed=2), _normal(10, seed=3) - 200])
    both = precision_recall(samples, data, k=5)
    assert 0.8 < both.precision <= 0.9
    assert 0.4 < both.recall <= 0.5
    with pytest.raises(BadData, match="more than 5"):
        precision_recall(samples[:5], data, k=5)
    with pytest.raises(BadData, match=r"\[100, 2\] and \[200\]"):
        mmd2(samples, data[:, 0])
