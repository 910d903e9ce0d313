from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.probes import spike_overlap, spiked_wigner, spiked_wishart

STORED = np.load(Path(__file__).parents[1] / "vectors" / "batch-size-scaling.npz")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_reference_vectors():
    v = {k: torch.from_numpy(np.asarray(STORED[k])).double() for k in STORED.files}
    q = (v["P"] / v["B"])[:, None]
    wigner = spiked_wigner(v["spikes"].expand(5, 3), v["sigma"] ** 2 * q)
    torch.testing.assert_close(wigner, v["wigner_pred"], rtol=1e-12, atol=0)
    torch.testing.assert_close(2 / wigner[:, 0], v["lr_sgd_max"], rtol=1e-12, atol=0)
    wishart = spiked_wishart(v["spikes"].expand(5, 3), v["sigma"] ** 2, q)
    torch.testing.assert_close(wishart, v["wishart_pred"], rtol=1e-12, atol=0)
    torch.testing.assert_close(wigner, v["wigner_empirical"], rtol=0.05, atol=0)


def test_without_noise_nothing_moves():
    lam = f64(-3, 0, 1e-3, 5)
    assert torch.equal(spiked_wigner(lam, 0.0), lam)
    assert torch.equal(spike_overlap(f64(-3, 5), 0.0), f64(1, 1))
    torch.testing.assert_close(spiked_wishart(f64(2, 5), 0.3, 0.0), f64(2.3, 5.3))


@pytest.mark.parametrize("v", [0.04, 1.0, 9.0])
def test_continuous_at_the_threshold_and_mirrored(v):
    root = v**0.5
    near = spiked_wigner(f64(root, root * (1 + 1e-9), -root * (1 + 1e-9), 0), v)
    torch.testing.assert_close(near, 2 * root * f64(1, 1, -1, 1))
    assert spike_overlap(f64(root * (1 + 1e-9)), v) < 1e-8
    lam = torch.linspace(-9, 9, 50, dtype=torch.float64)
    torch.testing.assert_close(spiked_wigner(-lam, v), -spiked_wigner(lam, v))
    for q in (0.25, 4.0):
        threshold = v * q**0.5
        there = spiked_wishart(f64(threshold / 2, threshold, threshold * (1 + 1e-9)), v, q)
        torch.testing.assert_close(there, f64(1, 1, 1) * v * (1 + q**0.5) ** 2)


def test_outliers_fall_as_batches_grow():
    noise = 100 / 2.0 ** torch.arange(30, dtype=torch.float64)
    moved = spiked_wigner(torch.full((30,), 8.0, dtype=torch.float64), noise)
    assert (moved.diff() < 0).all()
    torch.testing.assert_close(moved[-1], f64(8)[0], rtol=1e-6, atol=0)


def test_covariance_of_a_sample():
    generator, p, sigma2 = torch.Generator().manual_seed(0), 200, 0.5
    spikes = f64(8, 2)
    for n in (100, 400):
        scale = torch.full((p,), sigma2, dtype=torch.float64)
        scale[:2] += spikes
        draws = torch.randn(40, n, p, dtype=torch.float64, generator=generator) * scale.sqrt()
        top = torch.linalg.svdvals(draws)[:, :2].square().mean(0) / n
        torch.testing.assert_close(top, spiked_wishart(spikes, sigma2, p / n), rtol=0.05, atol=0)


def test_refusals():
    for fn, wrong in ((spiked_wigner, (-1.0,)), (spike_overlap, (-1.0,)), (spiked_wishart, (1.0, -1.0))):
        with pytest.raises(BadSetting, match="at least 0"):
            fn(f64(1), *wrong)
