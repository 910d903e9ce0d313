"""Hide whole blocks of tokens: a random mask on a coarser grid, repeated to the tokens that each unit covers.

    units = (rows / unit) x (columns / unit),   hidden units = ceil(units x ratio)

SimMIM hides 32-pixel units of 16-pixel tokens (`unit=2`) at 0.6: a hole must be wider than a patch, or its colour is guessed
from next door.

Source: Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling", section 3.2.

>>> import torch
>>> from sfumato.masks import block_mask
>>> hidden = block_mask(1, (4, 4), 0.5, generator=torch.Generator().manual_seed(1))
>>> hidden.view(4, 4).int()
tensor([[1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1]], dtype=torch.int32)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadSetting
from sfumato.masks.random_masks import Grid, grid_shape, random_mask
from sfumato.masks.token_index import upsample_mask


def block_mask(
    batch: int,
    grid: Grid,
    ratio: float,
    *,
    unit: int = 2,
    rule: str = "hide_ceil",
    noise: Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide square units of tokens, uniformly at random.

    Args:
        batch: number of masks.
        grid: tokens along each side, a multiple of `unit`.
        ratio: hidden share of the units, 0 to 1.
        unit: side of a unit in tokens.
        rule: how the ratio becomes a number of units, see `count_hidden`.
        noise: `[B, units]`; given, nothing is drawn and the largest are hidden.
        device: of the mask; None: the generator's.
        generator: source of the noise.

    Returns:
        `[B, L]` bool, True = hidden.

    Raises:
        BadSetting: units do not fill the grid.
    """
    rows, columns = grid_shape(grid)
    if unit < 1 or rows % unit or columns % unit:
        raise BadSetting(f"units of {unit} tokens do not fill a grid of {rows} x {columns}: take a divisor of both")
    units = (rows // unit, columns // unit)
    coarse = random_mask(batch, units, ratio, rule=rule, noise=noise, device=device, generator=generator)
    return upsample_mask(coarse, units, unit).flatten(1)
