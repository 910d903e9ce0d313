"""What a diffusion network is trained on.

    L = mean over samples of w(t) · mean |f(x_t, t) - y|²,    y = eps, x_0 or v,    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

For eps, w is 1, min(SNR, 5) / SNR (min-SNR), 1 / (1 + SNR) (P2) or 1 + 4 / SNR (EDM, for data of standard deviation 1/2).
At noise levels instead of times, with scaled networks: `sfumato.diffusion.edm`.

Sources: Ho, Jain, Abbeel 2020, equation 14; Hang et al., "Efficient Diffusion Training via Min-SNR Weighting", ICCV 2023; Choi
et al., "Perception Prioritized Training of Diffusion Models", CVPR 2022, equation 8 (P2); Karras et al. 2022, table 1.

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, denoising_loss
>>> schedule, x0 = Schedule(beta_schedule("linear")), torch.zeros(2, 1, 4, 4)
>>> denoising_loss(lambda x, t: 0 * x, x0, torch.tensor([3, 700]), torch.ones_like(x0), schedule)
tensor(1.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.diffusion.predictions import convert
from sfumato.diffusion.schedules import Schedule, expand
from sfumato.errors import BadSetting

WEIGHTS = ("min_snr", "p2", "edm")


def denoising_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    *,
    predict: str = "eps",
    weight: str | None = None,
    gamma: float | None = None,
    sigma_data: float = 0.5,
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
        weight: None: the plain error of what is predicted. Else the error counts as one of x0, whatever is predicted, times
            min(SNR, gamma) ("min_snr"), SNR / (1 + SNR)^gamma ("p2") or SNR + 1 / sigma_data² ("edm").
        gamma: ceiling of min-SNR (None: 5), or power of P2 (None: 1).
        sigma_data: standard deviation of the clean pictures, for "edm".
        reduction: "mean", or "none" for `[B]`.

    Returns:
        A scalar, or `[B]`.

    Raises:
        BadSetting: an unknown weight or prediction.
    """
    if weight not in (None, *WEIGHTS):
        raise BadSetting(f"there is no weight {weight!r}: use {', '.join(WEIGHTS)}, or None")
    if predict not in ("eps", "x0", "v"):
        raise BadSetting(f"a network cannot be trained on {predict!r}: use eps, x0 or v")
    x_t = schedule.q_sample(x0, t, noise)
    target = (
        convert(noise, x_t, t, schedule, source="eps", target=predict) if predict == "v" else {"eps": noise, "x0": x0}[predict]
    )
    errors = (model(x_t, t) - target).square().flatten(1).mean(1)
    if weight is not None:
        snr = schedule.snr
        if weight == "min_snr":
            of_x0 = snr.clamp(max=5.0 if gamma is None else gamma)
        else:
            of_x0 = snr / (1 + snr) ** (1.0 if gamma is None else gamma) if weight == "p2" else snr + sigma_data**-2
        per_unit = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[predict]
        errors = errors * expand(of_x0 / per_unit, t, errors)
    return errors.mean() if reduction == "mean" else errors
