import pytest
import torch

from sfumato.diffusion import memoriser
from sfumato.errors import BadData


def test_one_picture_is_all_it_knows():
    x = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    for sigma in (1e-3, 1.0, 50.0):
        assert torch.allclose(memoriser(x)(torch.randn(4, 2, 3, 3, dtype=torch.float64), sigma), x.expand(4, -1, -1, -1))


def test_it_is_the_posterior_mean():
    """By Tweedie's formula, from the density of the noisy pictures."""
    train = torch.rand(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.rand(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sigma = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    distance = (y[:, None] - train).square().flatten(2).sum(2)
    density = torch.logsumexp(-distance / (2 * sigma[:, None] ** 2), 1)
    (score,) = torch.autograd.grad(density.sum(), y)
    assert torch.allclose(memoriser(train)(y, sigma), y + sigma.view(-1, 1, 1, 1) ** 2 * score)


def test_limits():
    train = torch.rand(6, 1, 4, 4)
    far = memoriser(train)(torch.rand(2, 1, 4, 4), 1e4)
    assert torch.allclose(far, train.mean(0).expand(2, -1, -1, -1), atol=1e-5)
    assert torch.allclose(memoriser(train)(train + 1e-4, 1e-3), train, atol=1e-6)
    with pytest.raises(BadData, match="at least one"):
        memoriser(train[:0])
