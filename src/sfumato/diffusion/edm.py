"""Diffusion at continuous noise levels (EDM): a network between two scalings, and what it is trained on.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),    L = mean of w(sigma) · mean |D(x_0 + sigma eps, sigma) - x_0|²

The scalings give F inputs and targets of unit variance at every level, for clean data of standard deviation sigma_data, and
w = 1 / c_out² makes the loss the plain error of F. Draw levels by `lognormal_sigma`, samples by `sample_heun` on `edm_sigmas`.

Source: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1
and appendix B.6.

>>> import torch
>>> from sfumato.diffusion import EDMPrecond, edm_loss, edm_sigmas, lognormal_sigma, sample_heun
>>> net, x0 = EDMPrecond(lambda x, c_noise: 0 * x), torch.randn(2000, 3) / 2
>>> loss = edm_loss(net, x0, lognormal_sigma(2000), torch.randn_like(x0))
>>> abs(loss.item() - 1) < 0.1  # a network that answers 0 misses targets of unit variance
True
>>> sample_heun(net, 80 * torch.randn(4, 3), edm_sigmas(18)).shape
torch.Size([4, 3])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sfumato.errors import BadSetting


class EDMPrecond(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): a network between two scalings.

    Args:
        model: F, called as `model(c_in x, c_noise)`; its output is like x. A network of diffusers will do, its `.sample` is
            taken.
        sigma_data: standard deviation of the clean data, positive.

    Raises:
        BadSetting: a deviation that is not positive.
    """

    def __init__(self, model: nn.Module | Callable[[Tensor, Tensor], Any], *, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise BadSetting(f"sigma_data={sigma_data} is no standard deviation: give a positive number")
        self.model, self.sigma_data = model, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise at positive levels of any shape."""
        total = sigma.square() + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of D: 1 / c_out²."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def network(self, x: Tensor, sigma: Tensor) -> Tensor:
        """F(c_in x, c_noise) for `x` `[B, ...]` with noise of deviation `sigma` `[B]` or a scalar, positive."""
        levels = sigma.to(x).expand(len(x))
        _, _, inside, noise = self.coefficients(levels)
        out = self.model(_beside(inside, x) * x, noise)
        answer: Tensor = out if isinstance(out, Tensor) else out.sample
        return answer

    def target(self, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """What F is to answer at `x0 + sigma noise`: (x0 - c_skip (x0 + sigma noise)) / c_out, without cancellation.

        Args:
            x0: `[B, ...]`.
            sigma: `[B]` or a scalar, positive.
            noise: standard normal, like `x0`.

        Returns:
            Like `x0`; of unit variance.
        """
        levels = sigma.to(x0).expand(len(x0))
        inside = self.coefficients(levels)[2]
        return _beside(levels / self.sigma_data * inside, x0) * x0 - _beside(self.sigma_data * inside, x0) * noise

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Clean pictures from `x` `[B, ...]` with noise of deviation `sigma` `[B]` or a scalar, positive."""
        skip, out, _, _ = self.coefficients(sigma.to(x).expand(len(x)))
        return _beside(skip, x) * x + _beside(out, x) * self.network(x, sigma)


def edm_loss(model: EDMPrecond, x0: Tensor, sigma: Tensor, noise: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared error of the denoised, in units of c_out: the plain error of the network inside.

    Args:
        model: the network with its scalings.
        x0: clean data `[B, ...]`, of standard deviation `model.sigma_data`.
        sigma: `[B]` positive levels.
        noise: standard normal, like `x0`.
        reduction: "mean", or "none" for `[B]`.

    Returns:
        A scalar, or `[B]`; about 1 for a network that answers 0.
    """
    x = x0 + _beside(sigma.to(x0), x0) * noise
    errors = (model.network(x, sigma) - model.target(x0, sigma, noise)).square().flatten(1).mean(1)
    return errors.mean() if reduction == "mean" else errors


def _beside(value: Tensor, x: Tensor) -> Tensor:
    """A number a sample, shaped to multiply x."""
    return value.reshape(-1, *[1] * (x.ndim - 1))
