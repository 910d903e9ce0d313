"""How many operations a call takes: counted from what it computes, not timed.

>>> import torch
>>> from sfumato.probes import multiply_adds
>>> multiply_adds(lambda: torch.nn.Linear(20, 30)(torch.rand(4, 20)))  # 4 rows of 20 x 30
2400
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def multiply_adds(fn: Callable[[], Any]) -> int:
    """Multiplications with their additions in products, convolutions and attention.

    Args:
        fn: called once, without gradients. On the meta device nothing is computed, and the count is the same.

    Returns:
        Pairs of one multiplication and one addition.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # fused attention on a CPU is not counted
        fn()
    return counter.get_total_flops() // 2
