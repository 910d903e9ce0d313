"""Gaussian noise with correlations between neighbours, as cameras have it after demosaicking.

White noise w is filtered, periodically, by a kernel of unit energy, so every pixel keeps the standard deviation sigma:

    n = sigma · (k / |k|_2) * w,      cov(n_p, n_q) = sigma² · sum_t k_t k_{t + p - q} / |k|_2².

Source: the model behind pixel-shuffle decorrelation, as used by Jang et al., "Self-supervised Image Denoising with Downsampled
Invariance Loss and Conditional Blind-Spot Network", ICCV 2023.

>>> import torch
>>> from sfumato.physics import correlated_noise
>>> line = torch.tensor([1.0, 2.0, 1.0])
>>> noise = correlated_noise((1, 3, 256, 256), 0.15, torch.outer(line, line), generator=torch.Generator().manual_seed(0))
>>> round(noise.std().item(), 2), round((noise * noise.roll(1, -1)).mean().item() / 0.15**2, 1)  # the neighbour: 2/3
(0.15, 0.7)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadSetting


def correlated_noise(
    shape: Sequence[int],
    sigma: float | Tensor,
    kernel: Tensor,
    *,
    white: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Stationary Gaussian noise whose autocorrelation is that of `kernel`; independent over the leading dimensions.

    Args:
        shape: `(..., H, W)`.
        sigma: standard deviation of every pixel; a tensor is broadcast to `shape`.
        kernel: `[h, w]`, not zero, no larger than the picture; its dtype and device are those of the result.
        white: standard normal numbers of `shape` to filter instead of drawing them.
        generator: source of the draws, on the kernel's device.

    Returns:
        `shape`, mean 0, standard deviation `sigma`, periodic.

    Raises:
        BadSetting: the kernel is larger than the picture, or zero.
    """
    h, w = shape[-2:]
    kh, kw = kernel.shape
    if kh > h or kw > w:
        raise BadSetting(f"a kernel of {kh} x {kw} does not fit into pictures of {h} x {w} pixels")
    energy = kernel.square().sum().sqrt()
    if energy == 0:
        raise BadSetting("the kernel of correlated noise is zero: nothing would be left of the noise")
    if white is None:
        white = torch.randn(tuple(shape), generator=generator, dtype=kernel.dtype, device=kernel.device)
    pad = ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2)
    padded = F.pad(white.reshape(-1, 1, h, w), pad, mode="circular")
    return sigma * F.conv2d(padded, (kernel / energy)[None, None]).reshape(tuple(shape))
