"""What a diffusion network is trained on.

    L = mean over samples of w(t) · mean |f(x_t, t) - y|²,    y = eps, x_0 or v,    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

w = 1, or min(SNR, 5) / SNR for eps (min-SNR). `EDMPrecond` scales a network's input and output to unit variance at every level.

Sources: Ho, Jain, Abbeel 2020, equation 14; Hang et al., "Efficient Diffusion Training via Min-SNR Weighting", ICCV 2023;
Karras et al. 2022, table 1.

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, denoising_loss
>>> schedule, x0 = Schedule(beta_schedule("linear")), torch.zeros(2, 1, 4, 4)
>>> denoising_loss(lambda x, t: 0 * x, x0, torch.tensor([3, 700]), torch.ones_like(x0), schedule)
tensor(1.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfumato.diffusion.predictions import convert
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadSetting


def denoising_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    *,
    predict: str = "eps",
    weight: str | None = None,
    gamma: float = 5.0,
    reduction: str = "mean",
) -> Tensor:
    """Squared error of a prediction made from noisy pictures.

    Args:
        model: `model(x_t, t)`, like `x0`.
        x0: clean pictures `[B, ...]`, customarily in [-1, 1].
        t: `[B]` int64.
        noise: standard normal, like `x0`.
        schedule: its tables.
        predict: "eps", "x0" or "v".
        weight: None, or "min_snr" (the error counts as one of x0 with weight min(SNR, gamma)).
        gamma: ceiling of min-SNR.
        reduction: "mean", or "none" for `[B]`.

    Returns:
        A scalar, or `[B]`.

    Raises:
        BadSetting: an unknown weight or prediction.
    """
    if weight not in (None, "min_snr"):
        raise BadSetting(f"there is no weight {weight!r}: use min_snr, or None")
    if predict not in ("eps", "x0", "v"):
        raise BadSetting(f"a network cannot be trained on {predict!r}: use eps, x0 or v")
    x_t = schedule.q_sample(x0, t, noise)
    target = (
        convert(noise, x_t, t, schedule, source="eps", target=predict) if predict == "v" else {"eps": noise, "x0": x0}[predict]
    )
    errors = (model(x_t, t) - target).square().flatten(1).mean(1)
    if weight == "min_snr":
        snr = schedule.snr.to(x0.device)[t]
        per_unit = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[predict]
        errors = errors * (snr.clamp(max=gamma) / per_unit).to(errors.dtype)
    return errors.mean() if reduction == "mean" else errors


class EDMPrecond(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): a network between two scalings.

    Args:
        model: F, called as `model(c_in x, c_noise)`; its output is like x.
        sigma_data: standard deviation of the clean data.
    """

    def __init__(self, model: nn.Module, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise at positive levels of any shape."""
        total = sigma.square() + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of D: 1 / c_out²."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Clean pictures from `x` `[B, ...]` with noise of deviation `sigma` `[B]` or a scalar, positive."""
        levels = sigma.to(x).expand(len(x))
        skip, out, inside, noise = self.coefficients(levels)
        skip, out, inside = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in (skip, out, inside))
        return skip * x + out * self.model(inside * x, noise)
