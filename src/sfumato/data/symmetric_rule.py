"""A rule on 12 bits that does not change when a sphere is turned, on all 4,096 patterns: small enough to know every entropy.

The bits are the corners of an icosahedron. With k ones, e pairs of neighbours and a pairs of opposite corners among them

    y = 1   ⇔   k ≥ 8,  or k = 7 but not (e, a) = (8, 2),  or k = 6 and (e ≥ 7 or (e, a) = (6, 0)),  or k = 5 and e = 7

(k, e, a) takes 64 values. Sources: the task of Shwartz-Ziv, Tishby, "Opening the Black Box of Deep Neural Networks via
Information", 2017; this form of its rule was read off its 4,096 published labels, which it gives exactly.

>>> from sfumato.data import symmetric_rule_12bit
>>> task = symmetric_rule_12bit()
>>> task.x.shape, task.label.sum().item()
(torch.Size([4096, 12]), 2118)
"""

from __future__ import annotations

import torch

from sfumato.data.batch import Batch

_OPPOSITE = (9, 7, 5, 6, 10, 2, 3, 1, 11, 0, 4, 8)
_NEIGHBOURS = (
    (1, 3, 5, 10, 11), (0, 2, 3, 4, 11), (1, 3, 4, 8, 9), (0, 1, 2, 8, 10), (1, 2, 6, 9, 11), (0, 6, 7, 10, 11),
    (4, 5, 7, 9, 11), (5, 6, 8, 9, 10), (2, 3, 7, 9, 10), (2, 4, 6, 7, 8), (0, 3, 5, 7, 8), (0, 1, 4, 5, 6),
)  # fmt: skip
"""Of each bit, the most significant first."""


def symmetric_rule_12bit() -> Batch:
    """All patterns of 12 bits with their class.

    Returns:
        `x` `[4096, 12]` of 0 and 1, where row i holds the bits of i, the most significant first; `label` `[4096]`, 0 or 1
        (P(1) = 0.517, an entropy of 0.999 bits); `index` `[4096]`.
    """
    index = torch.arange(4096)
    bits = index[:, None] >> torch.arange(11, -1, -1) & 1
    ones = bits.sum(1)
    near = (bits[:, :, None] * bits[:, torch.tensor(_NEIGHBOURS)]).sum((1, 2)) // 2
    opposite = (bits * bits[:, torch.tensor(_OPPOSITE)]).sum(1) // 2
    seven = (ones == 7) & ~((near == 8) & (opposite == 2))
    six = (ones == 6) & ((near >= 7) | ((near == 6) & (opposite == 0)))
    five = (ones == 5) & (near == 7)
    return Batch(bits.float(), index, ((ones >= 8) | seven | six | five).long())
