"""Histograms of oriented gradients: in each cell of an image, how strong its edges are in each direction. A target to predict.

    g = x[i + 1] - x[i - 1]  along rows and columns, 0 at the borders, x in 0 ... 255
    histogram[bin] = Σ_cell |g| · [angle(g) mod 180° lies in the bin] / cell²            9 bins of 20°, hard

No normalisation over blocks: for targets each cell's histogram is whitened, mean 0 and variance 1 over its bins.

Sources: Dalal and Triggs 2005; as a target of masked models: Wei et al. 2021 (MaskFeat), whitened in arXiv 2301.00230 (DMJD).

>>> import torch
>>> from sfumato.nn import hog, hog_tokens
>>> x = torch.zeros(1, 1, 8, 8)
>>> x[..., 4:] = 1.0  # a vertical edge: 8 rows x 2 pixels with a gradient of 255 across
>>> hog(x)[0, 0, 0, 0, :3]
tensor([63.7500,  0.0000,  0.0000])
>>> hog_tokens(torch.rand(2, 3, 224, 224), 16).shape
torch.Size([2, 196, 108])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.masks.random_masks import Grid, grid_shape

WHITEN_EPS = 1e-5
"""Added to the variance over the bins; a flat cell becomes 0."""


def hog(x: Tensor, *, bins: int = 9, cell: int = 8, signed: bool = False) -> Tensor:
    """Histograms of the gradients of each channel.

    Args:
        x: `[B, C, H, W]` in [0, 1] (gradients are of 255 x), H and W multiples of `cell`.
        bins: directions told apart, over 180 degrees.
        cell: side of a cell in pixels.
        signed: tell an edge from the opposite one: directions over 360 degrees.

    Returns:
        `[B, C, H / cell, W / cell, bins]`; the sum over the bins is the cell's mean gradient magnitude. Differentiable in the
        magnitudes, not in the choice of the bins.

    Raises:
        BadData: cells do not fill the image.
    """
    batch, channels, height, width = x.shape
    if height % cell or width % cell or min(height, width) < 2:
        raise BadData(f"an image of {height} x {width} pixels cannot be cut into cells of {cell}: both must be multiples of it")
    x = 255 * x
    down = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    right = F.pad(x[..., 2:] - x[..., :-2], (1, 1))
    square = down.square() + right.square()
    flat = square == 0  # where the root has no gradient
    magnitude = square.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
    turn = 360 if signed else 180
    angle = torch.atan2(down.detach(), right.detach()).rad2deg() % turn
    which = (angle * (bins / turn)).long().clamp_(max=bins - 1)  # a remainder may round up to the whole turn

    def cells(t: Tensor) -> Tensor:  # [B, C, rows, columns, pixels]
        return t.view(batch, channels, height // cell, cell, width // cell, cell).transpose(3, 4).flatten(4)

    values = cells(magnitude)
    return values.new_zeros(*values.shape[:-1], bins).scatter_add(-1, cells(which), values) / cell**2


def hog_tokens(x: Tensor, patch: int, *, bins: int = 9, cell: int = 8, signed: bool = False, whiten: bool = True) -> Tensor:
    """The histograms of each patch of an image as one row of numbers, in raster order.

    Args:
        x: `[B, C, H, W]` in [0, 1], H and W multiples of `patch`.
        patch: side of a patch in pixels, a multiple of `cell`.
        bins: as for `hog`.
        cell: as for `hog`.
        signed: as for `hog`.
        whiten: mean 0 and variance 1 over the bins of each cell and channel.

    Returns:
        `[B, L, n]`, n = (patch / cell)² · bins · C, ordered (cell row, cell column, bin, channel).

    Raises:
        BadSetting: cells do not fill a patch.
        BadData: patches do not fill the image.

    Reference:
        arXiv 2301.00230, official `hog_tensor` and `instance_whitening`.
    """
    if patch % cell:
        raise BadSetting(f"cells of {cell} pixels do not fill patches of {patch}: take a divisor")
    if x.shape[-2] % patch or x.shape[-1] % patch:
        raise BadData(f"an image of {x.shape[-2]} x {x.shape[-1]} pixels cannot be cut into patches of {patch}")
    histograms = hog(x, bins=bins, cell=cell, signed=signed)
    if whiten:
        histograms = F.layer_norm(histograms, (bins,), eps=WHITEN_EPS)
    batch, channels, rows, columns, _ = histograms.shape
    k = patch // cell
    split = histograms.view(batch, channels, rows // k, k, columns // k, k, bins)
    return split.permute(0, 2, 4, 3, 5, 6, 1).reshape(batch, -1, k * k * bins * channels)


def hog_image(tokens: Tensor, patch: int, grid: Grid, *, bins: int = 9, cell: int = 8) -> Tensor:
    """Whitened histograms drawn for a person: in each cell, lines along the edges that its gradients belong to.

    Args:
        tokens: `[B, L, n]` as from `hog_tokens` (unsigned), or predicted.
        patch: side of a patch in pixels, a multiple of `cell`.
        grid: patches along each side.
        bins: as for `hog`.
        cell: as for `hog`.

    Returns:
        `[B, C, H, W]` in [0, 1]: the brighter a line, the more the bin is above the cell's mean.

    Raises:
        BadData: tokens that do not fit.
    """
    rows, columns = grid_shape(grid)
    k = patch // cell
    if patch % cell or tokens.shape[1] != rows * columns or tokens.shape[2] % (k * k * bins):
        raise BadData(f"tokens {list(tokens.shape)} are not histograms of {bins} bins on a grid of {rows} x {columns} patches")
    strength = tokens.clamp(min=0) / (bins - 1) ** 0.5  # 1 where all of a cell's gradient is in one bin
    strength = strength.view(len(tokens), rows, columns, k, k, bins, -1)
    angle = (torch.arange(bins, device=tokens.device) + 0.5) * (torch.pi / bins)
    place = torch.arange(cell, device=tokens.device) - (cell - 1) / 2
    across = angle.sin()[:, None, None] * place[:, None] + angle.cos()[:, None, None] * place  # [bins, cell, cell], pixels
    lines = (1 - across.abs()).clamp(min=0).to(tokens)
    drawn = torch.einsum("byxijkc,kuv->bcyiuxjv", strength, lines)
    return drawn.reshape(len(tokens), -1, rows * patch, columns * patch).clamp(0, 1)
