from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadSetting
from sfumato.losses import balanced_l1, distance_loss, laplace_relative_nll

V = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "masked-object-modeling.npz").items()}


def test_official_losses():
    y, mean, spread = V["y"], V["mu"], V["logvar"]
    assert laplace_relative_nll(mean, y, spread).item() == pytest.approx(V["lnll"].item(), rel=1e-5)
    assert balanced_l1(mean, y).item() == pytest.approx(V["balanced_l1"].item(), rel=1e-5)
    assert F.gaussian_nll_loss(mean, y, spread.exp()).item() == pytest.approx(V["gnll"].item(), rel=1e-5)
    assert F.smooth_l1_loss(mean, y).item() == pytest.approx(V["smooth_l1"].item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("smooth_l1", "smooth_l1"), ("gaussian", "gnll"), ("laplace", "lnll")])
def test_distances_that_are_not_known_do_not_count(kind, name):
    output = torch.stack((V["mu"], V["logvar"]), 1).requires_grad_()
    assert distance_loss(output, V["y"], kind=kind).item() == pytest.approx(V[name].item(), rel=1e-5)
    holes = torch.where(torch.arange(len(V["y"])) % 2 == 0, torch.nan, V["y"])
    value = distance_loss(output, holes, kind=kind)
    torch.testing.assert_close(value, distance_loss(output[1::2], V["y"][1::2], kind=kind))
    (grad,) = torch.autograd.grad(value, output)
    assert grad.isfinite().all()
    assert (grad[::2] == 0).all()
    assert distance_loss(output, torch.full_like(holes, torch.nan), kind=kind) == 0


def test_a_gaussian_is_best_at_the_squared_error():
    y, s = torch.tensor([10.0]), torch.linspace(0, 4, 4001)
    values = torch.stack([distance_loss(torch.tensor([[7.0, v]]), y, kind="gaussian") for v in s])
    assert s[values.argmin()].exp().item() == pytest.approx(9, rel=5e-3)
    assert distance_loss(torch.tensor([[7.0, 1e4]]), y, kind="gaussian").isfinite()  # the log-variance is clamped
    with pytest.raises(BadSetting, match="kind='gaussian' of 1 outputs"):
        distance_loss(torch.zeros(3, 1), torch.ones(3), kind="gaussian")
    with pytest.raises(BadSetting, match="kind='l2'"):
        distance_loss(torch.zeros(3, 2), torch.ones(3), kind="l2")


def test_gradients():
    g = torch.Generator().manual_seed(0)
    mean, spread = (torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.rand(6, generator=g, dtype=torch.float64) + 1
    assert torch.autograd.gradcheck(lambda m, s: laplace_relative_nll(m, y, s), (mean, spread))
    assert torch.autograd.gradcheck(lambda m: balanced_l1(m, y), (mean,))


def test_the_best_spread_is_the_relative_error():
    y, mean = torch.tensor([10.0]), torch.tensor([7.0])
    s = torch.linspace(-3, 1, 4001)
    values = laplace_relative_nll(mean, y, s, reduction="none")
    assert s[values.argmin()].exp().item() == pytest.approx(0.3, rel=2e-3)


def test_balanced_l1_is_smooth_at_beta():
    d = torch.tensor([1 - 1e-4, 1 + 1e-4], dtype=torch.float64, requires_grad=True)
    values = balanced_l1(d, torch.zeros_like(d), reduction="none")
    (slope,) = torch.autograd.grad(values.sum(), d)
    assert abs(values[1] - values[0]) < 1e-3
    assert slope.tolist() == pytest.approx([1.5, 1.5], abs=1e-3)
    assert balanced_l1(d, d).item() == 0


def test_refusals():
    with pytest.raises(BadSetting, match="reduction"):
        balanced_l1(torch.ones(1), torch.ones(1), reduction="sum")
    with pytest.raises(BadSetting, match="alpha"):
        balanced_l1(torch.ones(1), torch.ones(1), alpha=0)
