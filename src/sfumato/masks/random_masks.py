"""Hide an exact number of tokens: those with the largest scores. With uniform noise for scores, that is MAE's random mask.

    n_hidden = L - floor(L (1 - ratio)),   hidden = the n_hidden tokens with the largest score

Every other mask of this room is the same rule with other scores. All samples of a batch hide equally many tokens, so that the
visible ones stay a rectangular tensor. Bool, True = hidden.

Source: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3 (masking).

>>> import torch
>>> from sfumato.masks import count_hidden, mask_from_scores, random_mask
>>> hidden = random_mask(2, (14, 14), 0.75, generator=torch.Generator().manual_seed(0))
>>> hidden.shape, hidden.sum(1).tolist()
(torch.Size([2, 196]), [147, 147])
>>> mask_from_scores(torch.tensor([[0.1, 0.9, 0.5, 0.2]]), ratio=0.5)
tensor([[False,  True,  True, False]])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.errors import BadSetting

Grid = int | tuple[int, int]
"""Tokens along each side: one number for a square, or (rows, columns)."""


def grid_shape(grid: Grid) -> tuple[int, int]:
    """A grid as (rows, columns)."""
    return (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])


def uniform(
    shape: tuple[int, ...], *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives and then moved to `device`.

    Args:
        shape: of the result.
        device: None: the generator's, or the default device.
        generator: source of the draw.

    Returns:
        A tensor of the default float type.
    """
    drawn = torch.rand(shape, generator=generator, device=generator.device if generator is not None else device)
    return drawn if device is None else drawn.to(device)


def count_hidden(n: int, ratio: float, *, rule: str = "keep_floor") -> int:
    """How many of `n` tokens are hidden at a ratio; papers round differently.

    `keep_floor` is MAE's `n - int(n * (1 - ratio))` in floating point: 100 tokens at 0.9 keep 9, not 10.

    Args:
        n: number of tokens.
        ratio: hidden share, 0 to 1.
        rule: `keep_floor` (MAE), `keep_round` (SparK), `hide_floor` or `hide_ceil` (SimMIM).

    Returns:
        A number from 0 to `n`.

    Raises:
        BadSetting: `ratio` outside [0, 1] or an unknown rule.
    """
    if not 0 <= ratio <= 1:
        raise BadSetting(f"mask ratio {ratio} must lie between 0 (nothing hidden) and 1 (all hidden)")
    counts = {
        "keep_floor": n - int(n * (1 - ratio)),
        "keep_round": n - round(n * (1 - ratio)),
        "hide_floor": int(n * ratio),
        "hide_ceil": math.ceil(n * ratio),
    }
    if rule not in counts:
        raise BadSetting(f"rule {rule!r} is not known: {', '.join(counts)}")
    return counts[rule]


def mask_from_scores(
    scores: Tensor, *, ratio: float | None = None, n_hidden: int | None = None, largest: bool = True, rule: str = "keep_floor"
) -> Tensor:
    """Hide the tokens with the largest scores, exactly as many as asked for.

    Args:
        scores: `[B, L]`, any real numbers; only their order counts. Equal scores are told apart arbitrarily.
        ratio: hidden share; or
        n_hidden: number of hidden tokens a row.
        largest: hide the largest (True) or the smallest.
        rule: how the ratio becomes a number, see `count_hidden`.

    Returns:
        `[B, L]` bool, True = hidden; every row hides equally many.

    Raises:
        BadSetting: neither or both of `ratio` and `n_hidden`, or a number that does not fit.
    """
    if (ratio is None) == (n_hidden is None):
        raise BadSetting("say either ratio= or n_hidden=")
    length = scores.shape[-1]
    k = count_hidden(length, ratio, rule=rule) if ratio is not None else int(n_hidden or 0)
    if not 0 <= k <= length:
        raise BadSetting(f"cannot hide {k} of {length} tokens")
    chosen = scores.detach().topk(k, dim=-1, largest=largest, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def random_mask(
    batch: int,
    grid: Grid,
    ratio: float,
    *,
    rule: str = "keep_floor",
    noise: Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide tokens uniformly at random, without replacement.

    Args:
        batch: number of masks.
        grid: tokens along each side.
        ratio: hidden share, 0 to 1.
        rule: how the ratio becomes a number, see `count_hidden`.
        noise: `[B, L]`; given, nothing is drawn and the largest are hidden.
        device: of the mask; None: the generator's.
        generator: source of the noise.

    Returns:
        `[B, L]` bool, True = hidden.

    Reference:
        He et al. 2021, section 3; official code `random_masking`.
    """
    rows, columns = grid_shape(grid)
    if noise is None:
        noise = uniform((batch, rows * columns), device=device, generator=generator)
    return mask_from_scores(noise, ratio=ratio, rule=rule)
