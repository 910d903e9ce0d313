from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sfumato.errors import BadData
from sfumato.metrics import GaussianStats, PatchGaussian, frechet_distance, frechet_features

PATH = Path(__file__).parents[1] / "vectors" / "deep-optimal-transport.npz"
V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(PATH).items()}


def test_distance_of_the_reference():
    ends = V["mean_source"], V["cov_source"], V["mean_target"], V["cov_target"]
    assert torch.allclose(frechet_distance(*ends), V["w2_squared"], rtol=0, atol=1e-6)
    back = frechet_distance(*ends[2:], *ends[:2])
    assert torch.allclose(back, V["w2_squared"], rtol=0, atol=1e-6)
    assert frechet_distance(*ends[:2], *ends[:2]).item() == pytest.approx(0, abs=1e-12)


def test_singular_covariances():
    """Gaussians on two lines: tr C1 + tr C2 - 2 |<u, v>| for unit u, v."""
    u, v = torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.tensor([0.6, 0.8, 0], dtype=torch.float64)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    lines = torch.stack([torch.outer(u, u), torch.outer(v, v)])
    assert torch.allclose(frechet_distance(zero, lines, zero, lines.flip(0)), torch.tensor(2 - 2 * 0.6).double())


def test_moments_are_numpys_however_they_come():
    x = 50 + torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6)
    whole, first, second = GaussianStats(), GaussianStats(), GaussianStats()
    whole.update(x)
    for part in x[:130].split(17):
        first.update(part)
    second.update(x[130:])
    first.merge(second)
    first.merge(GaussianStats())
    for stats in (whole, first):
        mean, cov, count = stats.compute()
        assert count == 200
        assert np.allclose(mean, x.double().mean(0), rtol=1e-12)
        assert np.allclose(cov, np.cov(x.double().T), rtol=1e-8)
    with pytest.raises(BadData, match="0 came"):
        GaussianStats().compute()
    with pytest.raises(BadData, match="rows of 3"):
        whole.update(x[:, :3])


def test_patches_of_the_reference():
    stats = PatchGaussian(3)
    for image in 2 * V["img_source"] - 1:  # the reference works on [-1, 1]
        stats.update(image[None])
    target = PatchGaussian(3)
    target.update(2 * V["img_target"] - 1)
    mean, cov, count = stats.compute()
    assert count == 3 * 14 * 14
    assert torch.allclose(mean, V["img_mean_source"], rtol=0, atol=1e-6)
    assert torch.allclose(cov, V["img_cov_source"], rtol=0, atol=1e-6)
    distance = frechet_distance(mean, cov, *target.compute()[:2])
    assert torch.allclose(distance, V["img_w2"], rtol=1e-5, atol=0)  # the reference lifts small eigenvalues a little
    root = np.real(sqrtm(cov.numpy() @ target.compute().cov.numpy()))
    exact = (mean - target.compute().mean).square().sum() + (cov + target.compute().cov).trace() - 2 * np.trace(root)
    assert distance.item() == pytest.approx(exact.item(), rel=1e-12)


def test_strips_cut_no_patch(monkeypatch):
    x = torch.rand(3, 2, 9, 11)
    whole, strips = PatchGaussian(4), PatchGaussian(4)
    whole.update(x)
    monkeypatch.setattr("sfumato.metrics.frechet._PATCHES", 22)
    strips.update(x)
    for a, b in zip(whole.compute(), strips.compute()):
        assert a == b if isinstance(a, int) else torch.allclose(a, b, atol=1e-12)
    with pytest.raises(BadData, match="4 pixels"):
        PatchGaussian(4).update(torch.rand(1, 1, 3, 8))


def test_features():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 3, generator=g), 2 * torch.randn(4000, 3, generator=g) + 1
    assert frechet_features(a, b).item() == pytest.approx(3 + 3, rel=0.05)
    assert frechet_features(a, a).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(BadData, match=r"\[3\] and \[2\]"):
        frechet_features(a, b[:, :2])
