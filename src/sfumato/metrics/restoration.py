"""How near restored pictures come to the clean ones.

    PSNR = −10 log₁₀ mean (x − clean)²      in dB, for pictures in [0, 1]

>>> import torch
>>> from sfumato.metrics import psnr
>>> clean = torch.zeros(2, 3, 8, 8)
>>> psnr(clean + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1), clean)
tensor([20., 40.])
"""

from __future__ import annotations

from torch import Tensor


def psnr(x: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, peak 1: torchmetrics', one value a picture.

    Args:
        x, clean: `[B, C, H, W]` in [0, 1].

    Returns:
        `[B]`, dB; infinite where both are equal.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values: Tensor = peak_signal_noise_ratio(x, clean, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return values
