"""Every mask of tokens by name, with one call: `named_mask(name, batch, grid, ratio, ...)`.

    random  uniform (MAE)                        block        units of two tokens a side (SimMIM)
    white red blue green purple  filtered noise (ColorMAE)
    disjoint  two views, hardly overlapping (DMJD)           progressive  random, the ratio grows with training (LMD)
    hard  more and more of what is hard to predict (HPM)     semantic     what the network attends to, at random by its weight

Source of each: its own file here. A mask of frequencies hides parts of the spectrum, not tokens: see `random_frequency_mask`.

>>> import torch
>>> from sfumato.masks import named_mask
>>> hidden = named_mask("green", 2, (14, 14), 0.75, generator=torch.Generator().manual_seed(0))
>>> hidden.shape, hidden.sum(1).tolist()
(torch.Size([2, 196]), [147, 147])
>>> named_mask("disjoint", 2, 4, 0.5).view(2, 2, 16).any(0).all().item()
True
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadSetting, nearest
from sfumato.masks.block_masks import block_mask
from sfumato.masks.color_noise import COLORS, color_noise_mask
from sfumato.masks.disjoint import disjoint_masks
from sfumato.masks.guided import hard_mask, weighted_mask
from sfumato.masks.random_masks import Grid, grid_shape, random_mask
from sfumato.masks.ratio_schedules import ratio_schedule

NAMED_MASKS = {
    "random": "single tokens, uniformly",
    "block": "squares of two tokens a side",
    "white": "filtered noise of no colour: like random",
    "red": "low-pass noise: large clusters",
    "blue": "high-pass noise: evenly spread",
    "green": "band-pass noise: evenly spread clusters",
    "purple": "noise without its middle band",
    "disjoint": "two views of each picture that overlap as little as can be",
    "progressive": "random, at a ratio that grows from a fifth with the training",
    "hard": "more and more of what is hardest to predict",
    "semantic": "at random, what the network attends to first",
}
"""Names, and what they hide."""
SCORED = ("hard", "semantic")
"""Masks that need a score of every token."""
HARD_SHARE = 0.5
"""Of the hidden tokens, at the end of the training."""


def named_mask(
    name: str,
    batch: int,
    grid: Grid,
    ratio: float,
    *,
    scores: Tensor | None = None,
    progress: float = 1.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw masks of a kind.

    Args:
        name: a key of `NAMED_MASKS`.
        batch: number of pictures B.
        grid: tokens along each side.
        ratio: hidden share, 0 to 1.
        scores: `[B, L]`, for `hard`: how hard each token is to predict, any real numbers; for `semantic`: weights, not negative.
        progress: share of the training that is done, in [0, 1]: `progressive` and `hard` grow with it.
        device: of the mask; None: the generator's, or that of the scores.
        generator: source of the draw.

    Returns:
        `[B, L]` bool, True = hidden, each row equally many; of `disjoint` `[2 B, L]`, all first views first.

    Raises:
        BadSetting: an unknown name, no scores where they are needed, or a grid that blocks do not fill.
    """
    if name not in NAMED_MASKS:
        if name == "frequency":
            raise BadSetting("a frequency mask hides parts of the spectrum, not tokens: `random_frequency_mask`, `train mfm`")
        raise BadSetting(f"there is no mask {name!r}; did you mean {' or '.join(nearest(name, NAMED_MASKS) or NAMED_MASKS)}?")
    where: dict[str, Any] = {"device": device, "generator": generator}
    if name in SCORED:
        length = math.prod(grid_shape(grid))
        if scores is None or tuple(scores.shape) != (batch, length):
            given = "none" if scores is None else list(scores.shape)
            raise BadSetting(f"a {name} mask needs scores [{batch}, {length}] of the tokens, given: {given}")
        if name == "hard":
            return hard_mask(scores, ratio, HARD_SHARE * progress, generator=generator)
        return weighted_mask(scores, ratio, "keep_floor", generator=generator)
    if name in COLORS:
        return color_noise_mask(batch, grid, ratio, color=name, **where)
    if name == "block":
        return block_mask(batch, grid, ratio, **where)
    if name == "disjoint":
        return disjoint_masks(batch, grid, ratio, **where).flatten(0, 1)
    if name == "progressive":
        ratio = ratio_schedule(progress, low=ratio / 5, high=ratio)
    return random_mask(batch, grid, ratio, **where)
