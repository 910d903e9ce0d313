import pytest
import torch
from torch.distributions import Normal, kl_divergence

from sfumato.errors import BadSetting
from sfumato.losses import gaussian_kl


def test_it_is_what_torch_computes():
    mean, var = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64) + 0.1
    wanted = kl_divergence(Normal(mean, var.sqrt()), Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    assert torch.allclose(gaussian_kl(mean, var, reduction="none"), wanted)
    assert torch.allclose(gaussian_kl(mean, var, dim=1, reduction="none"), wanted.sum(1))
    assert torch.allclose(gaussian_kl(mean, var, dim=1), wanted.sum(1).mean())
    assert torch.allclose(gaussian_kl(mean, var, reduction="sum"), wanted.sum())


def test_the_standard_normal_alone_is_at_zero_and_a_point_infinitely_far():
    found = gaussian_kl(torch.tensor([0.0, 0.0, 0.1]), torch.tensor([1.0, 1.1, 1.0]), reduction="none")
    assert found[0] == 0
    assert (found[1:] > 0).all()
    assert gaussian_kl(torch.zeros(1), torch.zeros(1)).isinf()
    with pytest.raises(BadSetting, match="mean, sum or none"):
        gaussian_kl(torch.zeros(1), torch.ones(1), reduction="max")


def test_its_gradient():
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(gaussian_kl, (mean.requires_grad_(), var.requires_grad_()))
