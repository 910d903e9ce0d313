import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.optim import lr_for_batch, polyak_heavy_ball


def test_the_two_rules_and_the_saturating_one():
    assert lr_for_batch(0.1, 64, 128) == pytest.approx(0.2)
    assert lr_for_batch(0.1, 64, 128, kind="adam") == pytest.approx(0.1 * 2**0.5)
    assert lr_for_batch(0.1, 64, 128, lam1=2.0, v0=0.0) == 0.1
    noisy = lr_for_batch(0.1, 64, 128, lam1=1.0, v0=1000.0)
    assert noisy == pytest.approx(0.2, rel=0.02)
    assert lr_for_batch(0.1, 64, 64 * 10**6, lam1=1.0, v0=3.0) == pytest.approx(0.4, rel=1e-4)  # capped at 2 / λ₁


@pytest.mark.parametrize("wrong", [{"kind": "rms"}, {"lam1": 1.0}, {"kind": "adam", "lam1": 1.0, "v0": 1.0}])
def test_refusals(wrong):
    with pytest.raises(BadSetting):
        lr_for_batch(0.1, 1, 2, **wrong)
    with pytest.raises(BadSetting):
        polyak_heavy_ball(1.0, 2.0)


def test_heavy_ball_converges_at_the_root_of_its_momentum():
    eigenvalues = torch.linspace(1, 50, 20, dtype=torch.float64)
    lr, momentum = polyak_heavy_ball(50.0, 1.0)
    x = torch.ones(20, dtype=torch.float64)
    before, errors = x.clone(), []
    for _ in range(400):
        x, before = x - lr * eigenvalues * x + momentum * (x - before), x
        errors.append(x.norm().log().item())
    rate = torch.tensor((errors[399] - errors[199]) / 200).exp().item()
    assert rate == pytest.approx(momentum**0.5, rel=0.02)
