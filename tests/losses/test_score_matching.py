import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.losses import sure


def _g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_unbiased_for_a_linear_denoiser():
    """Within three standard errors of the true error, at two noise levels in one batch."""
    k = 0.3 * torch.randn(16, 16, dtype=torch.float64, generator=_g()) / 4 + 0.5 * torch.eye(16, dtype=torch.float64)
    x = torch.rand(4000, 1, 4, 4, dtype=torch.float64, generator=_g(1))
    sigma = torch.where(torch.arange(4000) % 2 == 0, 0.1, 0.7).double()
    y = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, dtype=torch.float64, generator=_g(2))

    def f(y):
        return (y.flatten(1) @ k.T).view_as(y)

    gap = sure(f, y, sigma, reduction="none", generator=_g(3)) - (f(y) - x).square().flatten(1).mean(1)
    for part in (gap[::2], gap[1::2]):
        assert abs(part.mean()) < 3 * part.std() / len(part) ** 0.5
        assert part.std() > 0


@pytest.mark.parametrize("method", ["jvp", "vjp", "fd"])
def test_exact_where_the_jacobian_is_diagonal(method):
    y, sigma = torch.randn(3, 1, 2, 5, dtype=torch.float64, generator=_g()), 0.4
    trace = (1 - y.tanh().square()).flatten(1).sum(1)
    expected = ((y - y.tanh()).square().flatten(1).sum(1) + 2 * sigma**2 * trace) / 10 - sigma**2
    found = sure(torch.tanh, y, sigma, method=method, reduction="none", generator=_g())
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(sure(torch.tanh, y, sigma, method=method, generator=_g()), expected.mean(), atol=1e-6)


def test_agrees_with_deepinv():
    from deepinv.loss import SureGaussianLoss
    from deepinv.physics import Denoising

    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    f = lambda y: torch.tanh(conv(y))  # noqa: E731
    y = torch.randn(200, 1, 6, 6, generator=_g())
    with torch.no_grad():
        ours = sure(f, y, 0.3, probes=20, reduction="none", generator=_g(1))
        peer = torch.stack(
            [SureGaussianLoss(0.3, rng=_g(i), tau=1e-3)(y, f(y), Denoising(), lambda y, physics: f(y)) for i in range(20)]
        )
    assert torch.allclose(ours.mean(), peer.mean(), atol=4 * peer.std().item() / 20)


def test_trained_on_noise_alone_it_finds_the_best_shrinkage():
    """x ~ N(0, 0.5²), sigma = 1: the best factor is 0.2."""
    y = 1.25**0.5 * torch.randn(20000, 1, 1, 2, generator=_g())
    factor = torch.ones((), requires_grad=True)
    for _ in range(30):
        (grad,) = torch.autograd.grad(sure(lambda y, factor=factor: factor * y, y, 1.0, method="vjp", generator=_g()), factor)
        factor = (factor - 0.3 * grad).detach().requires_grad_()
    assert factor.item() == pytest.approx(0.2, abs=0.03)


def test_bad_words_are_refused():
    with pytest.raises(BadSetting, match="method"):
        sure(torch.tanh, torch.rand(1, 3), 1.0, method="exact")
    with pytest.raises(BadSetting, match="reduction"):
        sure(torch.tanh, torch.rand(1, 3), 1.0, reduction="max")
