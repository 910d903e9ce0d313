"""Every window of a chain at once: against one running variance a window, and against scikit-learn's AUC."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from sfumato.diffusion import SamplerStep, WindowScan, X0Variance, scan_windows
from sfumato.errors import BadData, BadSetting


def _feed(callbacks, guesses):
    for i, x0 in enumerate(guesses):
        for callback in callbacks:
            callback(SamplerStep(i, x0, x0, torch.ones(())))


def test_every_window_has_the_variance_that_is_taken_over_it_alone():
    g = torch.Generator().manual_seed(0)
    guesses = 1000 + torch.randn(20, 5, 2, 3, generator=g, dtype=torch.float64).cumsum(0)
    scan = WindowScan([2, 3, 7, 12, 20])  # slices of unequal length, one of a single step
    _feed([scan], torch.randn(20, 9, 2, 3))  # an earlier batch leaves nothing behind
    alone = [X0Variance(window) for window in scan.windows]
    _feed([scan, *alone], guesses)
    assert len(scan.windows) == 10
    assert torch.allclose(scan.variance, torch.stack([one.variance for one in alone]), rtol=1e-10, atol=0)
    assert np.allclose(scan.variance[scan.windows.index((3, 12))], guesses[3:12].numpy().var(0).mean((1, 2)), rtol=1e-10)
    assert (scan.variance[0] == 0).all()


def test_small_variances_beside_a_large_mean_survive_float32():
    guesses = 1 + 1e-4 * torch.randn(40, 6, 50, generator=torch.Generator().manual_seed(0))
    scan = WindowScan(range(0, 41, 10))
    _feed([scan], guesses)
    exact = guesses.double().var(0, correction=0).mean(1)
    assert torch.allclose(scan.variance[scan.windows.index((0, 40))].double(), exact, rtol=1e-3)
    _feed([scan], guesses.bfloat16())
    assert scan.variance.dtype == torch.float32


def test_it_keeps_a_mean_a_slice_and_not_the_steps():
    scan = WindowScan([0, 500, 1000])
    _feed([scan], torch.rand(1000, 4, 8, 8))
    assert sum(m.numel() for m in scan._means) == 2 * 4 * 64
    assert all(q.shape == (4,) for q in scan._squares)


def _restless(n, generator=None, *, callback=None):
    """Samples of which the ones above 0.7 swing in steps 6 to 9 of 12; all swing a little, and more before and after."""
    x = torch.rand(n, 2, generator=generator)
    for i in range(12):
        size = 0.2 if 6 <= i < 9 else 3.0
        noise = size * torch.randn(n, 2, generator=generator)
        callback(SamplerStep(i, x, noise + (-1) ** i * (x[:, :1] > 0.7) * (6 <= i < 9), torch.ones(())))
    return x


def test_the_window_that_tells_is_found_and_reruns():
    scan = scan_windows(_restless, 300, steps=12, slices=4, batch=128, generator=torch.Generator().manual_seed(0))
    bad = scan.samples[:, 0] > 0.7
    auc = scan.auc(bad)
    assert auc.shape == (10,)
    assert scan.best(bad) == (6, 9)
    for row in (0, 4, 9):
        assert auc[row].item() == pytest.approx(roc_auc_score(bad.numpy(), scan.variance[row].numpy()), abs=1e-12)
    assert auc[scan.windows.index((6, 9))] > 0.95
    assert auc[scan.windows.index((0, 3))] < 0.7
    assert scan_windows(_restless, 4, steps=12, slices=1, generator=torch.Generator()).windows == [(0, 12)]
    again = scan_windows(_restless, 300, steps=12, slices=4, batch=128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.variance, scan.variance)


def test_what_cannot_be_told_is_said():
    with pytest.raises(BadSetting, match="rising steps"):
        WindowScan([0, 5, 5])
    with pytest.raises(BadSetting, match="rising steps"):
        WindowScan([3])
    with pytest.raises(BadSetting, match="1 to 12 slices"):
        scan_windows(_restless, 4, steps=12, slices=13)
    with pytest.raises(BadData, match="must lie within its steps"):
        scan_windows(_restless, 4, steps=20, slices=5)
    scan = scan_windows(_restless, 4, steps=12, slices=2)
    with pytest.raises(BadData, match="4 samples were drawn"):
        scan.auc(torch.ones(3, dtype=torch.bool))
    assert all(math.isnan(v) for v in scan.auc(torch.ones(4, dtype=torch.bool)).tolist())
    with pytest.raises(BadData, match="draw more"):
        scan.best(torch.zeros(4, dtype=torch.bool))
