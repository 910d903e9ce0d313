import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadSetting
from sfumato.losses import cross_entropy_at, log_stablemax, stablemax, stablemax_cross_entropy, symlog

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "stablemax-perpgrad.npz").items()}
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def case(b=6, k=5, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(b, k, generator=g, dtype=torch.float64), torch.randint(k, (b,), generator=g)


@pytest.mark.parametrize("prefix", ["a", "b"])
def test_reference_values_and_gradients(prefix):
    logits, y = VECTORS[f"{prefix}_logits"].clone().requires_grad_(), VECTORS[f"{prefix}_y"]
    close = {"atol": 1e-12, "rtol": 1e-10}
    s = VECTORS[f"{prefix}_s"]
    torch.testing.assert_close(symlog(logits).exp(), s, **close)
    torch.testing.assert_close(stablemax(logits), s / s.sum(1, keepdim=True), **close)
    torch.testing.assert_close(log_stablemax(logits), VECTORS[f"{prefix}_log_stablemax"], **close)
    each = stablemax_cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(each, VECTORS[f"{prefix}_loss_none"].squeeze(1), **close)
    loss = stablemax_cross_entropy(logits, y)
    torch.testing.assert_close(loss, VECTORS[f"{prefix}_loss"], **close)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], VECTORS[f"{prefix}_grad"], **close)


def test_growth_function():
    z = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    s = symlog(z).exp()
    assert s.item() == 1
    assert torch.autograd.grad(s, z)[0].item() == 1
    for side in (-1e-9, 1e-9):
        near = torch.tensor([side], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(symlog(near).exp(), near)[0].item() == pytest.approx(1, abs=1e-8)
    x = torch.cat([torch.linspace(-5, 5, 101), torch.tensor([1e4, 1e8])]).double()
    torch.testing.assert_close(symlog(x).exp(), torch.where(x >= 0, 1 + x, 1 / (1 - x)), **EXACT)
    torch.testing.assert_close(symlog(x) + symlog(-x), torch.zeros_like(x))  # s(x) s(-x) = 1
    assert torch.equal(symlog(torch.tensor([-math.inf])), torch.tensor([-math.inf]))  # a class that is ruled out


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 1e4))
def test_probabilities(seed, scale):
    z, _ = case(seed=seed, scale=scale)
    p = stablemax(z)
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.float64), **EXACT)
    assert torch.equal(p.argsort(1), z.argsort(1)), "monotone"
    torch.testing.assert_close(log_stablemax(z), F.log_softmax(z.sign() * z.abs().log1p(), 1), **EXACT)
    torch.testing.assert_close(stablemax(z.T, dim=0), p.T, **EXACT)


def test_equal_logits_are_uniform_but_shifts_matter():
    torch.testing.assert_close(stablemax(torch.zeros(2, 4)), torch.full((2, 4), 0.25))
    z, _ = case()
    assert not torch.allclose(stablemax(z + 5), stablemax(z))


def test_gradients():
    z, y = case()
    z[0, 0] = 0
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: stablemax_cross_entropy(t, y), z)
    assert torch.autograd.gradgradcheck(lambda t: stablemax_cross_entropy(t[1:], y[1:]), z)
    grad = torch.autograd.grad(stablemax_cross_entropy(z, y, reduction="none").sum(), z)[0]
    torch.testing.assert_close(grad, (stablemax(z) - F.one_hot(y, 5)) / (1 + z.abs()))


def test_large_logits_still_teach():
    logits = torch.zeros(1, 5)
    logits[0, 2] = 1e4
    logits.requires_grad_()
    y = torch.tensor([2])
    assert cross_entropy_at(logits, y, torch.float32) == 0
    loss = stablemax_cross_entropy(logits, y)
    assert loss.item() == pytest.approx(math.log((1e4 + 5) / (1e4 + 1)), rel=1e-10)
    grad = torch.autograd.grad(loss, logits)[0]
    assert grad.dtype == torch.float32
    assert (grad != 0).all()


def test_type_of_the_arithmetic():
    z, y = case()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        narrow = z.to(dtype)
        assert stablemax_cross_entropy(narrow, y).dtype == torch.float64
        assert log_stablemax(narrow, dtype=torch.float32).dtype == torch.float32
        assert stablemax(narrow).dtype == dtype
    large = torch.zeros(1, dtype=torch.bfloat16).expand(2, 5_000_001)
    assert log_stablemax(large).dtype == torch.float32
    torch.testing.assert_close(log_stablemax(z.float(), dtype=torch.float32).double(), log_stablemax(z), atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(log_stablemax(z), F.log_softmax(symlog(z), 1), **EXACT)


def test_soft_targets_and_smoothing():
    z, y = case()
    soft = F.one_hot(y, 5) * 0.9 + 0.1 / 5
    expected = -(soft * log_stablemax(z)).sum(1)
    torch.testing.assert_close(stablemax_cross_entropy(z, soft, reduction="none"), expected)
    torch.testing.assert_close(stablemax_cross_entropy(z, y, label_smoothing=0.1), expected.mean())
    torch.testing.assert_close(stablemax_cross_entropy(z.float(), soft.float()), expected.mean(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float16, 8), (torch.float32, 17), (torch.float64, 37)])
def test_cross_entropy_is_zero_where_its_type_says(dtype, gap):
    y = torch.tensor([0, 0])
    logits = torch.tensor([[0.0, -gap], [0.0, -gap + 2.0]], dtype=torch.float64)
    for region in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=region):
            each = cross_entropy_at(logits, y, dtype, reduction="none")
        assert each.dtype == dtype
        assert each[0] == 0 < each[1]
    z, y = case()
    torch.testing.assert_close(cross_entropy_at(z, y, torch.float64), F.cross_entropy(z, y))


def test_bad_reduction_is_told():
    z, y = case()
    for call in (
        lambda: stablemax_cross_entropy(z, y, reduction="sum"),
        lambda: cross_entropy_at(z, y, torch.half, reduction="x"),
    ):
        with pytest.raises(BadSetting, match="mean or none"):
            call()
