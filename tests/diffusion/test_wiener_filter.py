import pytest
import torch

from sfumato.diffusion import wiener_filter
from sfumato.errors import BadData


def _g(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", [3, 40])
def test_it_is_the_matrix_of_the_covariance(count):
    """With fewer pictures than numbers, too: what they do not span is all noise."""
    x = torch.rand(count, 1, 3, 3, dtype=torch.float64, generator=_g())
    y, sigma = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=_g(1)), torch.tensor([0.1, 0.7], dtype=torch.float64)
    covariance, mean = x.flatten(1).T.cov(), x.flatten(1).mean(0)
    found = wiener_filter(x)(y, sigma)
    for i, s in enumerate(sigma):
        matrix = covariance @ torch.linalg.inv(covariance + s.square() * torch.eye(9, dtype=torch.float64))
        assert torch.allclose(found[i].flatten(), mean + matrix @ (y[i].flatten() - mean), rtol=0, atol=1e-10)


def test_no_linear_denoiser_does_better():
    x = torch.randn(4000, 6, generator=_g(), dtype=torch.float64) @ torch.randn(6, 6, generator=_g(1), dtype=torch.float64)
    y = x + 0.8 * torch.randn(4000, 6, generator=_g(2), dtype=torch.float64)
    fitted = torch.linalg.lstsq(y - y.mean(0), x - x.mean(0)).solution
    best = ((y - y.mean(0)) @ fitted + x.mean(0) - x).square().mean()
    assert best.item() == pytest.approx((wiener_filter(x)(y, 0.8) - x).square().mean().item(), rel=0.01)


def test_limits():
    x = torch.rand(200, 1, 3, 3, generator=_g())
    assert torch.allclose(wiener_filter(x)(x[:4], 1e-4), x[:4], atol=1e-3)
    assert torch.allclose(wiener_filter(x)(x[:4], 1e4), x.mean(0).expand(4, -1, -1, -1), atol=1e-3)
    with pytest.raises(BadData, match="1 pictures have no covariance"):
        wiener_filter(x[:1])
