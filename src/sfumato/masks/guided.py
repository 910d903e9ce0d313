"""Masks that follow a score of each token: the highest ones for certain and the rest by chance, or all by chance with given odds.

    hard_mask:      n = #hidden;  the floor(n · share) tokens with the largest score, the others uniformly from what is left
    weighted_mask:  the #hidden tokens with the largest  log p_i + g_i,  g Gumbel noise

Gumbel top-k is drawing without replacement with odds p: the same law as drawing one token after another.

Sources: Wang et al. 2023, "Hard Patches Mining for Masked Image Modeling", CVPR; Gumbel top-k: Kool, van Hoof and
Welling 2019, "Stochastic Beams and Where to Find Them", ICML.

>>> import torch
>>> from sfumato.masks import hard_mask, weighted_mask
>>> scores = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.8, 0.3, 0.0, 0.4]])
>>> hard_mask(scores, 0.5, 1.0).nonzero()[:, 1].tolist()
[1, 2, 4, 7]
>>> half = hard_mask(scores, 0.5, 0.5, generator=torch.Generator().manual_seed(0))
>>> half[0, [1, 4]].tolist(), half.sum().item()
([True, True], 4)
>>> weighted_mask(torch.tensor([[0.0, 1.0, 0.0, 2.0]]), 0.5)
tensor([[False,  True, False,  True]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.masks.random_masks import count_hidden, mask_from_scores, uniform


def hard_mask(
    scores: Tensor, ratio: float, hard_share: float, *, rule: str = "keep_floor", generator: torch.Generator | None = None
) -> Tensor:
    """Hide the tokens with the largest scores, and fill up with random ones.

    One draw for the whole batch. With `hard_share=0` it is the mask that `random_mask` draws from the same generator.

    Args:
        scores: `[B, L]`, how hard each token is expected to be; only their order counts.
        ratio: hidden share of the tokens, 0 to 1.
        hard_share: share of the hidden tokens that is taken by score (rounded down), 0 to 1.
        rule: how the ratio becomes a number, see `count_hidden`.
        generator: source of the rest.

    Returns:
        `[B, L]` bool, True = hidden; every row hides equally many.

    Raises:
        BadSetting: a share outside [0, 1].
        BadData: a score that is not a number.

    Reference:
        Wang et al. 2023; official sampler, which loops over the samples.
    """
    if not 0 <= hard_share <= 1:
        raise BadSetting(f"hard_share={hard_share} must lie between 0 (all at random) and 1 (all by score)")
    if scores.isnan().any():  # an accelerator is waited for here, as in `to_ids` a moment later
        raise BadData("a score is not a number: the tokens cannot be ordered by it")
    n_hidden = count_hidden(scores.shape[1], ratio, rule=rule)
    rest = uniform(tuple(scores.shape), device=scores.device, generator=generator)
    forced = mask_from_scores(scores, n_hidden=int(n_hidden * hard_share))
    return mask_from_scores(rest.masked_fill(forced, 2.0), n_hidden=n_hidden)  # above every uniform number


def weighted_mask(prob: Tensor, ratio: float, rule: str = "hide_floor", *, generator: torch.Generator | None = None) -> Tensor:
    """Hide tokens at random without replacement, with given odds.

    Args:
        prob: `[B, L]`, not negative; need not sum to 1. Zeros are hidden only where the others do not suffice.
        ratio: hidden share of the tokens, 0 to 1.
        rule: how the ratio becomes a number, see `count_hidden`.
        generator: source of the draw.

    Returns:
        `[B, L]` bool, True = hidden; every row hides equally many.

    Raises:
        BadData: odds that are negative or not finite.

    Reference:
        Kool et al. 2019; the law of `torch.multinomial(..., replacement=False)`.
    """
    if not ((prob >= 0) & prob.isfinite()).all():
        raise BadData("odds of hiding a token must be finite and not negative")
    where = generator.device if generator is not None else prob.device
    waiting = torch.empty(prob.shape, device=where).exponential_(generator=generator).to(prob.device)
    return mask_from_scores(prob.log() - waiting.log(), ratio=ratio, rule=rule)  # -log of an exponential time is Gumbel noise
