from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadSetting
from sfumato.losses import comp_sum, margins, smooth_adversarial_comp_sum, trades

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "comp-sum.npz").items()}


def case(b=7, n=4, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    clean, attacked = (scale * torch.randn(b, n, generator=g, dtype=torch.float64) for _ in range(2))
    return clean, attacked, torch.randint(n, (b,), generator=g)


def test_reference_values():
    settings = {"nu": VECTORS["nu"].item(), "rho": VECTORS["rho"].item(), "reduction": "none"}
    for tau, expected in zip(VECTORS["taus"].tolist(), VECTORS["smooth_adv"], strict=True):
        loss = smooth_adversarial_comp_sum(VECTORS["logits"], VECTORS["logits_adv"], VECTORS["labels"], tau=tau, **settings)
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("loss", [smooth_adversarial_comp_sum, trades])
def test_without_an_attack_they_are_the_plain_loss_with_its_gradient(loss):
    clean, _, y = case()
    clean.requires_grad_()
    value, plain = loss(clean, clean, y), comp_sum(clean, y)
    torch.testing.assert_close(value, plain, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(v, clean)[0] for v in (value, plain)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", [smooth_adversarial_comp_sum, trades])
def test_gradients_flow_through_both(loss):
    clean, attacked, y = (t.requires_grad_() if t.is_floating_point() else t for t in case())
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, y), (clean, attacked))
    assert all((g != 0).any() for g in torch.autograd.grad(loss(clean, attacked, y), (clean, attacked)))
    each = loss(clean, attacked, y, reduction="none")
    torch.testing.assert_close(each.mean(), loss(clean, attacked, y))
    with pytest.raises(BadSetting, match="mean or none"):
        loss(clean, attacked, y, reduction="sum")


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_it_bounds_the_adversarial_margin_loss(tau, rho):
    clean, attacked, y = case(b=2000, scale=2.0)
    loss = smooth_adversarial_comp_sum(clean, attacked, y, nu=3**0.5 / rho, rho=rho, tau=tau, reduction="none")
    u = (1 - margins(attacked, y) / rho).clamp(0, 1).sum(1)
    target = u.log1p() if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
    assert (loss >= target - 1e-12).all()


def test_trades_is_cross_entropy_plus_a_divergence():
    clean, attacked, y = case()
    p, q = clean.softmax(1), attacked.softmax(1)
    expected = F.cross_entropy(clean, y) + 3 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(trades(clean, attacked, y, beta=3.0), expected)
