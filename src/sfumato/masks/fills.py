"""Put something where pixels are hidden, and measure how hard a mask makes it to guess them.

    normalised convolution:  x̂ = (G_σ * (x · visible)) / (G_σ * visible)        hidden pixels only
    difficulty of a mask:    Σ_hidden (x̂ - x)² / Σ_hidden (x - x̄)²

The difficulty needs no network: 0 is a perfect guess, 1 as bad as the mean colour. It tells masks apart before any training.

Sources: Knutsson and Westin 1993, "Normalized and differential convolution"; mosaic: Park et al., EAR, 2023.

>>> import torch
>>> from sfumato.masks import fill, mosaic, normalized_convolution, random_mask, upsample_mask
>>> x = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
>>> hidden = upsample_mask(random_mask(1, 4, 0.5, generator=torch.Generator().manual_seed(0)), 4, 4)
>>> fill(x, hidden, how="mean").shape
torch.Size([1, 1, 16, 16])
>>> mosaic(x, 4)[0, 0, 0, ::4]
tensor([0.1000, 0.3667, 0.6333, 0.9000])
>>> bool((normalized_convolution(x, hidden, 4.0) - x).abs().max() < 0.5)
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadSetting
from sfumato.masks.random_masks import uniform

FILLS = ("zero", "mean", "color", "noise", "blur_rim")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)


def fill(
    x: Tensor,
    hidden: Tensor,
    *,
    how: str = "zero",
    value: float | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace the hidden pixels.

    Args:
        x: `[B, C, H, W]` in [0, 1].
        hidden: `[B, 1, H, W]` bool (or broadcastable), True = replaced.
        how: "zero"; "mean" (of each image's visible pixels, per channel); "color" (`value`); "noise" (uniform in [0, 1]);
            "blur_rim" (`value`, with an edge that fades into the visible pixels: 5 x 5 Gaussian of one pixel).
        value: one number, or one a channel; None: ImageNet's mean colour (its average where there are not three channels).
        generator: for "noise".

    Returns:
        `[B, C, H, W]`; visible pixels are untouched to the bit, the rim of "blur_rim" aside.

    Raises:
        BadSetting: an unknown way.
    """
    if how not in FILLS:
        raise BadSetting(f"fill {how!r} is not known: {', '.join(FILLS)}")
    if how == "zero":
        return torch.where(hidden, 0.0, x)
    if how == "noise":
        return torch.where(hidden, uniform(tuple(x.shape), device=x.device, generator=generator).to(x.dtype), x)
    if how == "mean":
        visible = (~hidden).to(x.dtype).expand(len(x), 1, *x.shape[-2:])
        return torch.where(hidden, _visible_mean(x, visible), x)
    color = _color(value, x)
    if how == "color":
        return torch.where(hidden, color, x)
    rim = _gaussian(hidden.to(x.dtype).expand(len(x), 1, *x.shape[-2:]), 1.0, radius=2)
    return torch.where(hidden, color, x + rim * (color - x))


def _color(value: float | Sequence[float] | Tensor | None, x: Tensor) -> Tensor:
    """`[1, C or 1, 1, 1]`."""
    if value is None:
        value = _IMAGENET_MEAN if x.shape[1] == 3 else sum(_IMAGENET_MEAN) / 3
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)


def _visible_mean(x: Tensor, visible: Tensor) -> Tensor:
    """Mean of each channel over the visible pixels, `[B, C, 1, 1]`; 0 where nothing is visible."""
    return (x * visible).sum((-2, -1), keepdim=True) / visible.sum((-2, -1), keepdim=True).clamp(min=1)


def mosaic(x: Tensor, block: int) -> Tensor:
    """The mean of each block of pixels, in place of its pixels.

    Args:
        x: `[B, C, H, W]`, H and W multiples of `block`.
        block: side in pixels.

    Returns:
        `[B, C, H, W]`; doing it twice changes nothing.

    Raises:
        BadSetting: blocks do not fill the image.
    """
    if block < 1 or x.shape[-2] % block or x.shape[-1] % block:
        raise BadSetting(f"blocks of {block} pixels do not fill an image of {x.shape[-2]} x {x.shape[-1]}")
    means = F.avg_pool2d(x, block)
    return means.repeat_interleave(block, -2).repeat_interleave(block, -1)


def normalized_convolution(x: Tensor, hidden: Tensor, sigma: float) -> Tensor:
    """Guess hidden pixels as the Gaussian-weighted mean of the visible ones around them.

    `(G_σ * (x · visible)) / (G_σ * visible)`. Where no visible pixel is within reach (4σ), the mean of all visible ones.

    Args:
        x: `[B, C, H, W]`.
        hidden: `[B, 1, H, W]` bool, True = unknown; its pixels of `x` are not looked at.
        sigma: width of the Gaussian in pixels.

    Returns:
        `[B, C, H, W]`; visible pixels are untouched.

    Raises:
        BadSetting: `sigma` is not positive.
    """
    if sigma <= 0:
        raise BadSetting(f"sigma={sigma} must be positive (pixels)")
    known = torch.where(hidden, 0.0, x)
    visible = (~hidden).to(x.dtype).expand(len(x), 1, *x.shape[-2:])
    channels = x.shape[1]
    blurred = _gaussian(torch.cat((known, visible), 1), sigma, radius=math.ceil(4 * sigma))
    mass = blurred[:, channels:]
    floor = torch.finfo(x.dtype).eps
    guess = torch.where(mass > floor, blurred[:, :channels] / mass.clamp(min=floor), _visible_mean(known, visible))
    return torch.where(hidden, guess, x)


def mask_difficulty(x: Tensor, mask: Tensor, *, sigma: float = 1.0) -> Tensor:
    """How badly hidden tokens are guessed from the visible ones around them, relative to guessing the mean.

    `Σ_hidden (x̂ - x)² / Σ_hidden (x - x̄)²` with x̂ by `normalized_convolution`, x̄ the image's mean colour.

    Args:
        x: `[B, C, H, W]`.
        mask: `[B, h, w]` bool, True = hidden; h and w divide H and W.
        sigma: width of the Gaussian in tokens.

    Returns:
        `[B]`: 0 perfect, 1 like the mean; 0 for a flat image.
    """
    patch = x.shape[-1] // mask.shape[-1]
    hidden = mask[:, None].repeat_interleave(x.shape[-2] // mask.shape[-2], -2).repeat_interleave(patch, -1)
    error = (normalized_convolution(x, hidden, sigma * patch) - x).square()  # 0 where visible
    spread = torch.where(hidden, (x - x.mean((-2, -1), keepdim=True)).square(), 0.0)
    return error.sum((1, 2, 3)) / spread.sum((1, 2, 3)).clamp(min=torch.finfo(x.dtype).tiny)


def _gaussian(x: Tensor, sigma: float, *, radius: int) -> Tensor:
    """Gaussian of unit sum, cut at `radius`; nothing lies outside the image.

    Two matrix products: on a CPU an order of magnitude faster than depthwise convolutions with long kernels.
    """

    def weights(n: int) -> Tensor:  # [n, n], symmetric
        offset = torch.arange(n, dtype=x.dtype, device=x.device)
        offset = (offset[:, None] - offset).abs()
        line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / sigma).square())
        return torch.exp(-0.5 * (offset / sigma).square()) * (offset <= radius) / line.sum()

    return weights(x.shape[-2]) @ x @ weights(x.shape[-1])
