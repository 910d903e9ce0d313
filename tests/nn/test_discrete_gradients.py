from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.nn import gumbel_sigmoid, straight_through

VECTORS = Path(__file__).parents[1] / "vectors" / "maskunet.npz"


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
def test_one_gumbel_keeps_this_share_at_any_temperature(logit, tau):
    gate = gumbel_sigmoid(torch.full((1_000_000,), logit), tau=tau, generator=_seeded())
    assert set(gate[:1000].unique().tolist()) <= {0.0, 1.0}
    assert abs(float(gate.mean()) - float(1 - torch.tensor(-np.exp(logit)).exp())) < 3e-3


def test_a_logistic_difference_keeps_the_sigmoid():
    gate = gumbel_sigmoid(torch.full((1_000_000,), 0.7), kind="logistic", generator=_seeded())
    assert abs(float(gate.mean()) - float(torch.tensor(0.7).sigmoid())) < 3e-3


def test_the_gradient_is_that_of_the_soft_gate():
    logits = torch.randn(50, dtype=torch.float64, generator=_seeded()).requires_grad_()
    noise = torch.randn(50, dtype=torch.float64, generator=_seeded(1))
    soft = gumbel_sigmoid(logits, tau=0.5, hard=False, noise=noise).detach()
    (gradient,) = torch.autograd.grad(gumbel_sigmoid(logits, tau=0.5, noise=noise).sum(), logits)
    assert torch.allclose(gradient, soft * (1 - soft) / 0.5, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: gumbel_sigmoid(x, tau=0.5, hard=False, noise=noise), logits)


def test_values_are_hard_to_the_last_bit():
    soft = torch.rand(1000, generator=_seeded()).requires_grad_()
    hard = (soft > 0.5).float()
    assert torch.equal(straight_through(hard, soft), hard)
    assert not straight_through(hard, soft.detach()).requires_grad


def test_reference_vectors():
    v = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(VECTORS).items()}
    logits, noise = v["logits"].requires_grad_(), -v["expo"].log()
    how = {"tau": float(v["tau"]), "noise": noise}
    assert torch.allclose(gumbel_sigmoid(logits, hard=False, **how), v["soft"], atol=1e-10, rtol=0)
    hard = gumbel_sigmoid(logits, **how)
    assert torch.equal(hard, v["hard"])
    (gradient,) = torch.autograd.grad((hard * v["grad_weight"]).sum(), logits)
    assert torch.allclose(gradient, v["hard_grad"], atol=1e-10, rtol=0)


def test_the_generator_decides_and_half_precision_stays_finite():
    logits = torch.zeros(10_000, dtype=torch.float16)
    a, b, c = (gumbel_sigmoid(logits, hard=False, generator=_seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.dtype == torch.float16
    assert a.isfinite().all()


def test_words_are_refused_in_one_line():
    with pytest.raises(BadSetting, match="above 0"):
        gumbel_sigmoid(torch.zeros(2), tau=0.0)
    with pytest.raises(BadSetting, match="gumbel or logistic"):
        gumbel_sigmoid(torch.zeros(2), kind="normal")
