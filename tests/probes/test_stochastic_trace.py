from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadData, BadSetting
from sfumato.probes import LinearOperator, hutchinson

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "curvature-base.npz")


def symmetric(d, seed=0):
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a + a.T


@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_reference_vectors(kind):
    h = torch.from_numpy(VECTORS[f"{kind}_hessian"])
    noise = torch.from_numpy(VECTORS[f"{kind}_rademacher"])
    each = torch.from_numpy(VECTORS[f"{kind}_hutch_trace_each"])
    for row, expected in zip(noise, each, strict=True):
        torch.testing.assert_close(hutchinson(h, noise=row[None]).value, expected, atol=1e-9, rtol=0)
    trace = hutchinson(h, noise=noise)
    torch.testing.assert_close(trace.value, each.mean(), atol=1e-9, rtol=0)
    torch.testing.assert_close(trace.stderr, each.std() / 2, atol=1e-9, rtol=0)
    diagonal = hutchinson(h, what="diag", noise=noise)
    torch.testing.assert_close(diagonal.value, torch.from_numpy(VECTORS[f"{kind}_hutch_diag"]), atol=1e-9, rtol=0)


def test_all_sign_vectors_and_scaled_unit_vectors_are_exact():
    h = symmetric(7)
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=7)), dtype=torch.float64)
    units = torch.eye(7, dtype=torch.float64) * 7**0.5
    for noise in (signs, units):
        torch.testing.assert_close(hutchinson(h, noise=noise).value, h.trace())
        torch.testing.assert_close(hutchinson(h, what="diag", noise=noise).value, h.diag())


def test_variance_is_as_told():
    h = symmetric(8)
    squares = h.square().sum()
    expected = {"rademacher": 2 * (squares - h.diag().square().sum()), "gaussian": 2 * squares}
    for probe, variance in expected.items():
        estimate = hutchinson(h, samples=20_000, probe=probe, generator=torch.Generator().manual_seed(0))
        assert estimate.stderr.item() ** 2 * 20_000 == pytest.approx(variance.item(), rel=0.1)
        assert abs(estimate.value - h.trace()) < 4 * estimate.stderr


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_a_diagonal_is_exact_with_any_signs(d, samples, seed):
    a = torch.diag(torch.linspace(-1, 2, d, dtype=torch.float64))
    estimate = hutchinson(a, samples=samples, what="diag", generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(estimate.value, a.diag(), atol=1e-12, rtol=0)
    assert estimate.samples == samples
    if samples > 1:
        assert estimate.stderr.max() < 1e-12
    else:
        assert estimate.stderr.isinf().all()


def test_early_stop_and_generator():
    h = symmetric(50) + 100 * torch.eye(50, dtype=torch.float64)
    first, second = (hutchinson(h, samples=1000, rtol=0.01, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert first.samples < 100
    assert first.stderr < 0.01 * first.value
    assert abs(first.value - h.trace()) < 4 * first.stderr


def test_bad_calls_are_told():
    for bad in ({"what": "norm"}, {"probe": "uniform"}, {"samples": 0}):
        with pytest.raises(BadSetting, match=next(iter(bad))):
            hutchinson(symmetric(3), **bad)
    with pytest.raises(BadData, match="square"):
        hutchinson(torch.zeros(3, 4))
    with pytest.raises(NotImplementedError):
        hutchinson(LinearOperator((2, 2), torch.float32, torch.device("cpu")))
