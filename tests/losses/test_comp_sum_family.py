from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadSetting
from sfumato.losses import CompSum, comp_sum, comp_sum_bound, comp_sum_bound_inverse, margins

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "comp-sum.npz").items()}
TAUS = (0.0, 0.5, 1.0, 1.5, 1.8, 2.0, 2.5)


def case(b=6, n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(b, n, generator=g, dtype=torch.float64), torch.randint(n, (b,), generator=g)


def test_reference_values_and_gradients():
    logits, labels = VECTORS["logits"].clone().requires_grad_(), VECTORS["labels"]
    for tau, loss, grad in zip(VECTORS["taus"].tolist(), VECTORS["loss"], VECTORS["grad"], strict=True):
        each = comp_sum(logits, labels, tau=tau, reduction="none")
        torch.testing.assert_close(each, loss, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(each.sum(), logits)[0], grad, atol=1e-10, rtol=1e-10)


def test_members_of_the_family():
    logits, y = case()
    p = logits.softmax(1).gather(1, y[:, None]).squeeze(1)
    exact = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(comp_sum(logits, y), F.cross_entropy(logits, y), **exact)
    torch.testing.assert_close(comp_sum(logits, y, tau=2.0, reduction="none"), 1 - p, **exact)
    torch.testing.assert_close(comp_sum(logits, y, tau=1.7, reduction="none"), (1 - p**0.7) / 0.7, **exact)
    u = (-margins(logits, y)).exp().sum(1)
    torch.testing.assert_close(comp_sum(logits, y, tau=0.0, reduction="none"), u, **exact)
    u = (-margins(logits, y) / 3).exp().sum(1)
    torch.testing.assert_close(comp_sum(logits, y, tau=0.0, rho=3.0, reduction="none"), u, **exact)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), tau=st.floats(0, 3), shift=st.floats(-50, 50))
def test_shift_invariant_and_decreasing_in_tau(seed, tau, shift):
    logits, y = case(seed=seed)
    loss = comp_sum(logits, y, tau=tau, reduction="none")
    torch.testing.assert_close(comp_sum(logits + shift, y, tau=tau, reduction="none"), loss, atol=1e-9, rtol=1e-9)
    assert (comp_sum(logits, y, tau=tau + 0.1, reduction="none") < loss).all()


def test_continuous_at_cross_entropy():
    logits, y = case()
    for tau in (1 - 1e-6, 1 + 1e-6):
        assert (comp_sum(logits, y, tau=tau) - comp_sum(logits, y)).abs() < 1e-4


@pytest.mark.parametrize("tau", TAUS)
def test_gradients(tau):
    logits, y = case()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: comp_sum(h, y, tau=tau, rho=2.0), logits)
    grad = torch.autograd.grad(comp_sum(logits, y, tau=tau, reduction="none").sum(), logits)[0].gather(1, y[:, None])
    p = logits.softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(grad, -(p ** (tau - 1)) * (1 - p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 1.5, 2.0, 3.0])
def test_huge_logits_are_finite(tau, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = comp_sum(logits, torch.tensor([0, 0]), tau=tau, reduction="none")
    assert loss.isfinite().all()
    assert loss[0] == 0 < loss[1]
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_soft_targets_average_over_labels():
    logits, y = case()
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    each = torch.stack([comp_sum(logits, torch.full((6,), j), tau=1.5, reduction="none") for j in range(5)], 1)
    torch.testing.assert_close(comp_sum(logits, soft, tau=1.5), (soft * each).sum(1).mean())
    sharp = F.one_hot(y, 5).double()
    torch.testing.assert_close(comp_sum(logits, sharp, tau=0.5), comp_sum(logits, y, tau=0.5))
    far = torch.tensor([[0.0, -1e4]], dtype=torch.float64, requires_grad=True)
    loss = comp_sum(far, torch.tensor([[1.0, 0.0]], dtype=torch.float64), tau=0.0)  # the other label's loss is infinite
    assert loss == 0
    assert torch.autograd.grad(loss, far)[0].isfinite().all()


def test_module_and_margins():
    logits, y = case()
    criterion = CompSum(tau=1.5, rho=2.0, reduction="none")
    assert torch.equal(criterion(logits, y), comp_sum(logits, y, tau=1.5, rho=2.0, reduction="none"))
    assert "tau=1.5" in repr(criterion)
    found = margins(torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 1.0]]), torch.tensor([1, 2]))
    assert found.tolist() == [[4, 3], [-3, 1]]


def test_reference_bound():
    for tau, bound in zip(VECTORS["taus"].tolist(), VECTORS["T"], strict=True):
        found = comp_sum_bound(VECTORS["beta"], tau=tau, n_classes=int(VECTORS["n_classes"]))
        torch.testing.assert_close(found, bound, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("tau", TAUS)
def test_bound_and_its_inverse(tau, n):
    beta = torch.linspace(0, 1, 101, dtype=torch.float64)
    bound = comp_sum_bound(beta, tau=tau, n_classes=n)
    assert bound[0] == 0
    assert (bound.diff() > 0).all()
    assert (bound.diff().diff() > -1e-12).all(), "convex"
    inverse = comp_sum_bound_inverse(bound, tau=tau, n_classes=n)
    torch.testing.assert_close(inverse, beta, atol=1e-8, rtol=0)
    assert (comp_sum_bound_inverse(bound[-1:] + 1, tau=tau, n_classes=n) == 1).all()
    simple = (2**tau * (2 - tau) * bound).sqrt() if tau < 1 else (2 * n ** (tau - 1) * bound).sqrt()
    simple = (tau - 1) * n ** (tau - 1) * bound if tau >= 2 else simple
    assert (simple >= inverse - 1e-9).all()


def test_small_excesses_keep_their_digits():
    tiny = torch.tensor([1e-7], dtype=torch.float64)
    for tau, factor in ((0.5, 2**-0.5 / (2 * 1.5)), (1.0, 0.5), (1.5, 1 / (2 * 0.5) / 3**0.5)):
        bound = comp_sum_bound(tiny, tau=tau, n_classes=3)  # β² times ½ / (2 - τ), and the constant of the classes
        expected = 2 ** (1 - tau) / (2 * (2 - tau)) if tau < 1 else factor
        torch.testing.assert_close(bound / tiny**2, torch.full_like(tiny, expected), rtol=1e-6, atol=0)


def test_bad_settings_are_told():
    logits, y = case()
    with pytest.raises(BadSetting, match="tau=-1"):
        comp_sum(logits, y, tau=-1)
    with pytest.raises(BadSetting, match="rho=0"):
        CompSum(rho=0)
    with pytest.raises(BadSetting, match="mean or none"):
        comp_sum(logits, y, reduction="sum")
    with pytest.raises(BadSetting, match="at least 2"):
        comp_sum_bound(torch.zeros(1), n_classes=1)
