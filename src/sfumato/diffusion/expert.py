"""An expert for some noise levels: one network takes over from another within an interval of times.

    f(x, t) = expert(x, t) if low <= t < high else base(x, t)

Experts beside each other, each trained on its part of the times alone, make one denoiser of several networks; a single one in a
trained model shows how well that part of the times is learned.

Sources: Balaji et al., "eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers", 2022; Kim, Go, Kwon, Kim,
"Denoising Task Difficulty-based Curriculum for Training Diffusion Models", ICLR 2025 (one expert in a trained model).

>>> import torch
>>> from sfumato.diffusion import ExpertDenoiser
>>> net = ExpertDenoiser(lambda x, t: x, lambda x, t: 0 * x, low=10, high=20)
>>> x = torch.ones(2)
>>> [net(x, torch.tensor([t, t])).tolist() for t in (9, 10, 19, 20)]
[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sfumato.errors import BadSetting


class ExpertDenoiser(nn.Module):
    """`net(x, t, ...)`: the expert's answer within an interval, the other network's elsewhere.

    All samples of a call must be on the same side, as they are in samplers, where they share one time; that it is looked at makes
    the CPU wait for a GPU once a call.

    Args:
        base: `base(x, t, ...)`, outside of the interval.
        expert: called alike, within.
        low, high: the interval `[low, high)`, in what the networks are told: times, or for EDM ln(sigma) / 4.

    Raises:
        BadSetting: an empty interval; when called, times on both sides.
    """

    def __init__(
        self, base: Callable[..., Any], expert: Callable[..., Any], *, low: float = -math.inf, high: float = math.inf
    ) -> None:
        super().__init__()
        if not low < high:
            raise BadSetting(f"low={low} and high={high} hold no time: high must be larger")
        self.base, self.expert, self.low, self.high = base, expert, low, high

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the class; `t` `[B]` or a scalar."""
        within = ((t >= self.low) & (t < self.high)).double().mean().item()
        if within not in (0, 1):
            raise BadSetting(
                f"some of these times are in [{self.low:g}, {self.high:g}), some are not: call with one time for all"
            )
        return (self.expert if within else self.base)(x, t, *args, **kwargs)
