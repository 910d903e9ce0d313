"""Does a sampler know what it is drawing? The variance of its guess of the clean picture over the last steps.

    Hal(x) = mean over coordinates of Var_{i in W} [x̂_0^(i)],      W a window of sampling steps

Samples that belong to no mode of the data keep changing; those with the largest variance are dropped.

Source: Aithal, Maini, Lipton, Kolter, "Understanding Hallucinations in Diffusion Models through Mode Interpolation", NeurIPS
2024, section 5.

>>> import torch
>>> from sfumato.diffusion import Schedule, X0Variance, beta_schedule, filter_by_variance, sample_ddim
>>> schedule, steady = Schedule(beta_schedule("linear")), X0Variance((15, 20))
>>> x = sample_ddim(lambda x, t: 0 * x + 1, torch.randn(8, 2), schedule, steps=20, predict="x0", callback=steady)
>>> steady.variance.max()  # a guess that never changes
tensor(0.)
>>> filter_by_variance(x, steady.variance, keep=0.5).shape
torch.Size([4, 2])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.diffusion.samplers import SamplerStep
from sfumato.errors import BadData, BadSetting


class X0Variance:
    """A callback of the samplers that keeps a running variance of x̂_0, in the memory of two pictures a sample.

    It begins anew at the first step of the window, so one serves batch after batch.

    Args:
        window: first step and the one after the last, counted from 0 in the order of sampling: `(990, 1000)` for the last ten
            of 1000.

    Raises:
        BadSetting: an empty window.
    """

    def __init__(self, window: tuple[int, int]) -> None:
        low, high = window
        if not 0 <= low < high:
            raise BadSetting(f"window={window} holds no step: use 0 <= first < end")
        self.window, self.count = (low, high), 0
        self._mean = self._squares = torch.zeros(())

    @torch.no_grad()
    def __call__(self, step: SamplerStep) -> None:
        """See one step."""
        low, high = self.window
        if not low <= step.step < high:
            return
        if step.step == low:
            self.count, self._mean, self._squares = 0, torch.zeros_like(step.x0), torch.zeros_like(step.x0)
        self.count += 1
        change = step.x0 - self._mean  # Welford's update: no difference of large sums
        self._mean = self._mean + change / self.count
        self._squares = self._squares + change * (step.x0 - self._mean)

    @property
    def variance(self) -> Tensor:
        """`[B]`: population variance over the steps seen, mean over the coordinates.

        Raises:
            BadData: the sampler took no step in the window.
        """
        if not self.count:
            raise BadData(f"no step fell into the window {self.window}: it must lie within the sampler's steps")
        return (self._squares / self.count).flatten(1).mean(1)


def filter_by_variance(samples: Tensor, var: Tensor, *, keep: float = 0.96) -> Tensor:
    """Drop the samples whose trajectories varied most.

    Args:
        samples: `[B, ...]`; `torch.arange(B)` gives the numbers of those kept.
        var: `[B]`, as from `X0Variance`.
        keep: share to keep, above 0 to 1; rounded up to whole samples.

    Returns:
        The `ceil(keep * B)` steadiest ones, in their order.

    Raises:
        BadSetting: a share outside (0, 1].
        BadData: another number of variances than of samples.
    """
    if not 0 < keep <= 1:
        raise BadSetting(f"keep={keep} is not a share above 0 up to 1")
    if var.shape != samples.shape[:1]:
        raise BadData(f"{len(samples)} samples need a variance each, not {list(var.shape)}")
    count = math.ceil(round(keep * len(samples), 6))  # 0.07 * 100 is 7, not 7.000000000000001
    return samples[var.argsort(stable=True)[:count].sort().values]
