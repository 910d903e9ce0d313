"""AdamW on gradients of which each entry is clipped: g ← min(max(g, -c), c).

>>> import torch
>>> from sfumato.optim import ValueClippedAdamW
>>> w = torch.nn.Parameter(torch.zeros(2))
>>> w.grad = torch.tensor([3.0, -0.25])
>>> ValueClippedAdamW([w], clip=0.5).step()
>>> w.grad.tolist()
[0.5, -0.25]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ValueClippedAdamW(torch.optim.AdamW):
    """AdamW on gradients of which each entry is clipped to [-clip, clip], inside the closure.

    Args:
        params: as for AdamW.
        clip: largest absolute entry; None: no clipping.
        settings: further arguments of AdamW.
    """

    def __init__(self, params: Any, *, clip: float | None = None, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.clip = clip

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step."""

        def clipped() -> Any:
            loss = closure() if closure is not None else None
            if self.clip is not None:
                nn.utils.clip_grad_value_([p for group in self.param_groups for p in group["params"]], self.clip)
            return loss

        return super().step(clipped)
