"""The error of a denoiser without the clean picture: Stein's unbiased risk estimate.

    E |x - f(y)|² = E [ |y - f(y)|² + 2 σ² div f(y) - n σ² ],      y = x + σ z, z ~ N(0, I) of n numbers

given here a number of the picture. It can be trained on, with noisy pictures alone.

Source: Stein, "Estimation of the Mean of a Multivariate Normal Distribution", Annals of Statistics 1981; the divergence by random
probes: Ramani, Blu, Unser, "Monte-Carlo SURE", 2008.

>>> import torch
>>> from sfumato.losses import sure
>>> y = torch.randn(1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # nothing but noise
>>> abs(sure(lambda y: y / 2, y, 1.0).item() - 0.25) < 0.02  # what is left of it: a half, squared
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.losses.comp_sum_family import reduce
from sfumato.nn.trace_of_jacobian import divergence


def sure(
    denoiser: Callable[[Tensor], Tensor],
    y: Tensor,
    sigma: float | Tensor,
    *,
    probes: int = 1,
    method: str = "jvp",
    noise: Tensor | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate of the mean squared error at noisy pictures.

    Args:
        denoiser: f, `[B, ...]` to the same shape; samples must not look at each other.
        y: `[B, ...]`, noisy.
        sigma: standard deviation of the Gaussian noise, a scalar or `[B]`.
        probes, method, noise: of the divergence, see `sfumato.nn.divergence`.
        reduction: "mean" over the batch, or "none": `[B]`.
        generator: source of the probes.

    Returns:
        A scalar or `[B]`, squared units of y; single estimates can be negative.

    Raises:
        BadSetting: an unknown method or reduction.
    """
    variance = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).square()
    residual = (y - denoiser(y)).flatten(1).square().mean(1)
    trace = divergence(denoiser, y, probes=probes, method=method, noise=noise, generator=generator) / y[0].numel()
    return reduce(residual + variance * (2 * trace - 1), reduction)
