"""A model that learns from what the model before it drew, generation after generation: it drifts, unless the draws are filtered.

    D_1 = data,      f_g trained from scratch on D_g,      D_{g+1} = filter(samples of f_g)

Sources: Shumailov et al., "AI models collapse when trained on recursively generated data", Nature 2024 (the loop); Aithal, Maini,
Lipton, Kolter, "Understanding Hallucinations in Diffusion Models through Mode Interpolation", NeurIPS 2024, section 6 (filters).

>>> import torch
>>> from sfumato.diffusion import recursive_training
>>> class Normal:  # a model: the mean and the deviation of what it saw
...     def __init__(self, x):
...         self.mean, self.std = x.mean(), x.std()
...     def sample(self, n, generator=None):
...         return self.mean + self.std * torch.randn(n, 1, generator=generator)
>>> g = torch.Generator().manual_seed(0)
>>> drawn = recursive_training(lambda x, number: Normal(x), torch.randn(20, 1, generator=g), generations=400, generator=g)
>>> bool(drawn[-1].kept.std() < 0.1)  # it has collapsed
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.diffusion.trajectory import last_steps, sample_filtered
from sfumato.errors import BadSetting


class Drawn(NamedTuple):
    """What a generation drew: the samples that the next one learns from, `[n, ...]`, and those that a filter took out."""

    kept: Tensor
    dropped: Tensor

    @property
    def all(self) -> Tensor:
        """Both: what the model of this generation is worth without a filter."""
        return torch.cat([self.kept, self.dropped])


Draw = Callable[[Any, int, torch.Generator | None], Drawn]
"""`(trained, n, generator)`: draws samples, of which n are kept."""


def keep_all(trained: Any, n: int, generator: torch.Generator | None) -> Drawn:
    """No filter: `n` samples as they come."""
    drawn = trained.sample(n, generator)
    return Drawn(drawn, drawn[:0])


def keep_random(trained: Any, n: int, generator: torch.Generator | None, *, keep: float = 0.96) -> Drawn:
    """`n / keep` samples, of which chance keeps `n`: what a filter of this size does without knowing anything.

    Raises:
        BadSetting: a share outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise BadSetting(f"keep={keep} is not a share above 0 up to 1")
    drawn = trained.sample(math.ceil(round(n / keep, 6)), generator)
    order = torch.randperm(len(drawn), generator=generator).to(drawn.device)
    return Drawn(drawn[order[:n]], drawn[order[n:]])


def keep_steady(
    trained: Any, n: int, generator: torch.Generator | None, *, keep: float = 0.96, share: float = 0.02, batch: int = 20_000
) -> Drawn:
    """The steadiest `n` of `n / keep` samples, by the variance over the last `share` of the steps, drawn `batch` at once."""
    window = last_steps(trained.trajectory_steps, share)
    found = sample_filtered(trained.sample, n, window=window, keep=keep, batch=batch, generator=generator)
    return Drawn(found.samples, found.dropped)


def recursive_training(
    train: Callable[[Tensor, int], Any],
    data: Tensor,
    *,
    generations: int = 5,
    draw: Draw = keep_all,
    generator: torch.Generator | None = None,
) -> list[Drawn]:
    """Train on data, draw as many samples, train from scratch on these, and so on.

    Args:
        train: `(samples [N, ...], number of the generation from 0) -> trained`, which has `sample(n, generator)`, and for
            `keep_steady` a callback and `trajectory_steps`, as methods that draw in steps have them.
        data: `[N, ...]`, what the first generation learns from.
        generations: trainings.
        draw: filter of the samples: `keep_all`, `keep_random`, `keep_steady` (`functools.partial` sets their shares).
        generator: source of the draws.

    Returns:
        One entry a generation: what its model drew. The next learns from the samples kept.

    Raises:
        BadSetting: no generation.
    """
    if generations < 1:
        raise BadSetting(f"generations={generations}: train at least one")
    found, samples = [], data
    for number in range(generations):
        found.append(draw(train(samples, number), len(data), generator))
        samples = found[-1].kept
    return found
