"""A sampler that ends in NaN says so: at which step the model's answer stopped being a number, and in which samples.

Every sampler of this room shows its answers to a `FiniteTrajectory`, which keeps one number a sample and waits for no device
until the end. A NaN is saved as a black picture, and a clipped infinity as a black or white one: neither leaves without a word.

>>> import torch
>>> from sfumato.diffusion import FiniteTrajectory
>>> watch, x = FiniteTrajectory(torch.zeros(3, 2), 10), torch.ones(3, 2)
>>> _ = watch(0, x)
>>> x[1] = torch.inf
>>> _ = watch(1, x)
>>> watch.end(x.clamp(-1, 1))
Traceback (most recent call last):
sfumato.errors.Diverged: 1 of 3 samples broke off: from step 2 of 10 on the model's answer is NaN or infinite (sample 1); ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import Diverged

NAMED = 5
"""Samples that the message names."""


class FiniteTrajectory:
    """Looks at every answer of a model while a sampler runs.

    Args:
        x: `[B, ...]`, where the sampler begins.
        steps: how many it takes.
        what: is seen at the steps, as the message says it.
        advice: what a person may do.
    """

    def __init__(
        self,
        x: Tensor,
        steps: int,
        *,
        what: str = "the model's answer",
        advice: str = "check the weights and the input, or use fp32",
    ) -> None:
        self.steps, self.what, self.advice = steps, what, advice
        self._first = torch.full((len(x),), steps + 1, device=x.device)

    def __call__(self, step: int, answer: Tensor) -> Tensor:
        """See what the model gave at a step (counted from 0), `[B, ...]`, and give it back."""
        seen = answer.detach().reshape(len(answer), -1)
        total = seen.sum(1, dtype=torch.promote_types(seen.dtype, torch.float32))  # NaN and infinity survive a sum
        broken = total * 0 != 0
        self._first = self._first.clamp(max=step).where(broken, self._first)
        return answer

    def end(self, x: Tensor) -> Tensor:
        """The samples at the end, `[B, ...]`, given back as they are.

        Raises:
            Diverged: not all of them went through numbers only; the line says from which step on and which.
        """
        self(self.steps, x)
        first = self._first.cpu()
        which = (first <= self.steps).nonzero()[:, 0].tolist()
        if not which:
            return x
        step = int(first.min())
        what = f"{self.what} is" if step < self.steps else "the samples themselves are"
        named = ", ".join(map(str, which[:NAMED])) + (", ..." if len(which) > NAMED else "")
        at = f"step {min(step + 1, self.steps)} of {self.steps}"
        raise Diverged(
            f"{len(which)} of {len(first)} samples broke off: from {at} on {what} NaN or infinite "
            f"(sample{'s' * (len(which) > 1)} {named}); {self.advice}"
        )
