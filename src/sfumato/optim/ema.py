"""A running average of a module that can itself be run: a teacher, or the weights that samples are drawn with.

    θ̄ ← d θ̄ + (1 - d) θ,   with warm-up d_n = min(d, (1 + n) / (10 + n))

Sources: Polyak and Juditsky 1992; as a teacher: Tarvainen and Valpola 2017.

>>> import torch
>>> from sfumato.optim import EMA
>>> net = torch.nn.Linear(1, 1, bias=False)
>>> ema = EMA(net, decay=0.5)
>>> before = net.weight.item()
>>> with torch.no_grad():
...     _ = net.weight.add_(1.0)
>>> ema.update(net)
>>> round(ema.module.weight.item() - before, 4)
0.5
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class EMA(nn.Module):
    """An exponential moving average of a module's parameters; its buffers follow as they are.

    `ema(x)` runs the average. It has no gradient, stays in eval mode, and its whole state, the number of updates too, is in
    `state_dict()`.

    Args:
        module: what to average; copied.
        decay: d, from 0 (follow at once) to 1 (never move); or a function of the number of updates done.
        every: calls of `update` that share one update (the others do nothing).
        warmup: follow fast at first: at most `(1 + n) / (10 + n)` at update n.
    """

    def __init__(
        self, module: nn.Module, *, decay: float | Callable[[int], float] = 0.999, every: int = 1, warmup: bool = False
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.every, self.warmup = decay, every, warmup
        self._calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's output."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> EMA:
        """Stay in eval mode: an average has no dropout."""
        return super().train(False)

    @property
    def updates(self) -> int:
        """Updates done."""
        return self._calls // self.every

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards `module`; call once after each optimizer step.

        Args:
            module: of the same structure as the averaged one.
        """
        self._calls += 1
        if self._calls % self.every:
            return
        n = self.updates - 1
        decay = self.decay(n) if callable(self.decay) else self.decay
        if self.warmup:
            decay = min(decay, (1 + n) / (10 + n))
        mine = [p.data for p in self.module.parameters()]
        theirs = [p.data for p in module.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)

    def get_extra_state(self) -> dict[str, int]:
        """Calls of `update` so far."""
        return {"calls": self._calls}

    def set_extra_state(self, state: Any) -> None:
        """Continue counting from there."""
        self._calls = int(state["calls"])
