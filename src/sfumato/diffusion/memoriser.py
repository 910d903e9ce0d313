"""The denoiser that knows its training pictures and nothing else: their mean, weighted by how likely each was the clean one.

    D(y, σ) = Σ_i w_i x_i,      w = softmax(-|y - x_i|² / (2 σ²))

It has the least error on the training set, and what a diffusion draws from it are training pictures: a network that comes near it
has memorised.

Source: Vincent, "A Connection Between Score Matching and Denoising Autoencoders", 2011 (the score of a Parzen density); as the
limit of memorisation: Kadkhodaie, Guth, Simoncelli, Mallat, ICLR 2024.

>>> import torch
>>> from sfumato.diffusion import memoriser
>>> x = torch.rand(5, 1, 4, 4)
>>> torch.allclose(memoriser(x)(x + 0.01 * torch.randn_like(x), 0.01), x, atol=1e-3)
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.errors import BadData
from sfumato.losses.gram import squared_distances


def memoriser(train: Tensor) -> Callable[[Tensor, float | Tensor], Tensor]:
    """The optimal denoiser of a finite set.

    Args:
        train: `[N, ...]`, N at least 1.

    Returns:
        `D(y, sigma)`: y `[B, ...]`, noise of deviation sigma > 0 (a scalar or `[B]`); gives the clean pictures, `[B, ...]`.

    Raises:
        BadData: no pictures.
    """
    if not len(train):
        raise BadData("there are no pictures to know: give at least one")
    rows = train.flatten(1)

    def denoise(y: Tensor, sigma: float | Tensor) -> Tensor:
        variance = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).square().reshape(-1, 1)
        exponent = squared_distances(y.flatten(1), rows.to(y)) / (-2 * variance)
        return (exponent.softmax(1) @ rows.to(y)).view_as(y)

    return denoise
