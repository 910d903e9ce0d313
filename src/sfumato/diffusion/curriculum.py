"""Training on some noise levels first: clusters of levels that come one after the other, and when the next one comes.

    stage s draws from C_π(1) ∪ ... ∪ C_π(s),    s → s + 1 once the loss has not improved for more than τ updates

Clusters cut the times 0 to T - 1 into runs of equal length, or the log-normal noise levels of EDM into parts of equal
probability. Low times have little noise and are the hard ones, so "easy_to_hard" begins with the highest. At the last stage all
levels are drawn as in ordinary training.

Source: Kim, Go, Kwon, Kim, "Denoising Task Difficulty-based Curriculum for Training Diffusion Models", ICLR 2025. Ours: the
running mean of the loss begins anew at every stage; an optional longest stage, since a loss that always falls never moves on.

>>> import torch
>>> from sfumato.diffusion import CurriculumTimesteps, PatiencePacer, uniform_clusters
>>> pacer = PatiencePacer(4, patience=1, smoothing=0.0)
>>> draw = CurriculumTimesteps(uniform_clusters(1000, 4), pacer)
>>> bool((draw(100) >= 750).all())
True
>>> [int(pacer.update(loss)) for loss in (1.0, 0.5, 0.6, 0.6, 3.0)]  # the loss did not improve twice
[1, 1, 1, 2, 2]
>>> bool((draw(100) >= 500).all())
True
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.errors import BadSetting

Order = Literal["easy_to_hard", "hard_to_easy", "random"]

_MANY = 1 << 62  # the remainder of a draw below it is uniform to 1 in 10^15


def uniform_clusters(T: int, n: int) -> Tensor:
    """Cut T times into n clusters whose lengths differ by one at most.

    Args:
        T: number of times.
        n: number of clusters, 1 to T.

    Returns:
        `[n + 1]` int64, rising from 0 to T; cluster i holds `edges[i]` to `edges[i + 1] - 1`.

    Raises:
        BadSetting: more clusters than times, or none.

    Example:
        >>> uniform_clusters(10, 4)
        tensor([ 0,  2,  5,  7, 10])
    """
    if not 1 <= n <= T:
        raise BadSetting(f"{n} clusters of {T} times: use 1 to {T}")
    return torch.arange(n + 1) * T // n


def lognormal_clusters(n: int, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Cut noise levels whose logarithm is normal into n clusters of equal probability.

    Args:
        n: number of clusters.
        mean, std: of the logarithm of the level.

    Returns:
        `[n + 1]` float64: logarithms of levels, rising from -inf to inf.

    Raises:
        BadSetting: no cluster.

    Example:
        >>> lognormal_clusters(2)
        tensor([   -inf, -1.2000,     inf], dtype=torch.float64)
    """
    if n < 1:
        raise BadSetting(f"{n} clusters: use 1 or more")
    return mean + std * torch.special.ndtri(torch.arange(n + 1, dtype=torch.float64) / n)


def linear_stage(progress: float, n_stages: int, *, share: float = 0.2) -> int:
    """The stage of a fixed pace: all stages take equal parts of the first `share` of a training.

    Args:
        progress: share of the training that is done, 0 to 1.
        n_stages: number of stages; the last one has come when `share (n - 1) / n` of the training is done.
        share: above 0 to 1.

    Returns:
        1 to `n_stages`.

    Raises:
        BadSetting: a share outside (0, 1].

    Example:
        >>> [linear_stage(p, 4, share=0.5) for p in (0, 0.1, 0.2, 0.3, 0.4, 1)]
        [1, 1, 2, 3, 4, 4]
    """
    if not 0 < share <= 1:
        raise BadSetting(f"share={share} is not a share of the training above 0 up to 1")
    return min(n_stages, 1 + int(progress * n_stages / share + 1e-9))  # 0.12 * 5 / 0.2 is 3, not 2.9999999999999996


class PatiencePacer(nn.Module):
    """Moves on to the next stage when the loss has stopped improving.

    All of its state are buffers: `state_dict()` holds it, and on a GPU nothing waits for the loss. Several processes stay at the
    same stage when each is given the loss of all.

    Args:
        n_stages: number of stages.
        patience: updates without improvement that are borne; one more ends the stage.
        smoothing: share of its old value that the running mean of the loss keeps; 0: the loss as it comes.
        min_delta: by how much the loss must fall to count as improved.
        longest: updates after which a stage ends anyway; None: a loss that keeps falling keeps its stage.

    Attributes:
        stage: int64 scalar, 1 to `n_stages`.

    Raises:
        BadSetting: numbers out of range.
    """

    stage: Tensor
    best: Tensor
    mean: Tensor
    waited: Tensor
    age: Tensor

    def __init__(
        self, n_stages: int = 20, *, patience: int = 200, smoothing: float = 0.99, min_delta: float = 1e-4,
        longest: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if n_stages < 1 or patience < 0 or not 0 <= smoothing < 1 or min_delta < 0 or (longest is not None and longest < 1):
            raise BadSetting(
                f"n_stages={n_stages}, patience={patience}, smoothing={smoothing}, min_delta={min_delta}, longest={longest}: "
                "a pacer takes 1 stage or more, smoothing below 1, a positive longest and nothing negative"
            )
        self.n_stages, self.patience, self.smoothing, self.min_delta, self.longest = (
            n_stages,
            patience,
            smoothing,
            min_delta,
            longest,
        )
        self.register_buffer("stage", torch.tensor(1))
        for name in ("best", "mean"):  # read only where the age is above 0: a checkpoint holds no infinity
            self.register_buffer(name, torch.tensor(0.0))
        for name in ("waited", "age"):
            self.register_buffer(name, torch.tensor(0))

    @torch.no_grad()
    def update(self, loss: Tensor | float, *, at_least: int = 1) -> Tensor:
        """Take in the loss of a step; call once after each.

        Args:
            loss: a finite scalar, on the device of the pacer.
            at_least: the stage that must have come by now, whatever the loss, such as `linear_stage` gives.

        Returns:
            The stage from now on, an int64 scalar.
        """
        loss = torch.as_tensor(loss).detach().to(self.best)
        first = self.age == 0
        self.mean = torch.where(first, loss, torch.lerp(loss, self.mean, self.smoothing))
        better = first | (self.mean < self.best - self.min_delta)
        self.best = torch.where(better, self.mean, self.best)
        waited, age = torch.where(better, 0, self.waited + 1), self.age + 1
        over = waited > self.patience
        if self.longest is not None:
            over = over | (age >= self.longest)
        stage = (self.stage + over).clamp(min=at_least).clamp(max=self.n_stages)
        same = stage == self.stage
        self.stage, self.waited, self.age = stage, waited * same, age * same  # losses of different stages are not compared
        return self.stage


class CurriculumTimesteps(nn.Module):
    """Draws times, or noise levels, from the clusters that have come so far: in place of `uniform_t` or `lognormal_sigma`.

    Args:
        edges: `[n + 1]`, rising: int64 edges of times (`uniform_clusters`), or float logarithms of noise levels
            (`lognormal_clusters`).
        pacer: knows the stage. None: it is given with every draw.
        order: "easy_to_hard" (from high to low), "hard_to_easy" or "random" (drawn once).
        mean, std: of the logarithm of noise levels, as the edges were made with; not used by times.
        generator: source of a random order, which is part of the state.

    Raises:
        BadSetting: edges that do not rise, another number of stages than of clusters, or an unknown order.
    """

    low: Tensor
    total: Tensor

    def __init__(
        self, edges: Tensor, pacer: PatiencePacer | None = None, *, order: Order = "easy_to_hard", mean: float = -1.2,
        std: float = 1.2, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        n = len(edges) - 1
        if edges.ndim != 1 or n < 1 or not (edges[1:] > edges[:-1]).all():
            raise BadSetting("edges must be a vector of at least two rising numbers")
        if pacer is not None and pacer.n_stages != n:
            raise BadSetting(f"{n} clusters need a pacer of {n} stages, this one has {pacer.n_stages}")
        orders = {
            "easy_to_hard": lambda: torch.arange(n).flip(0), "hard_to_easy": lambda: torch.arange(n),
            "random": lambda: torch.randperm(n, generator=generator).to(edges.device),
        }  # fmt: skip
        if order not in orders:
            raise BadSetting(f"there is no order {order!r}: use {', '.join(orders)}")
        self.n, self.pacer, self.mean, self.std = n, pacer, mean, std
        # Clusters lie end to end in the order in which they come; a level is probability until it is drawn.
        bounds = torch.special.ndtr((edges.double() - mean) / std) if edges.is_floating_point() else edges
        which = orders[order]()
        self.register_buffer("low", bounds[which])
        self.register_buffer("total", torch.cat([bounds.new_zeros(1), (bounds[1:] - bounds[:-1])[which].cumsum(0)]))

    def forward(self, batch: int, *, stage: Tensor | int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw.

        Args:
            batch: how many.
            stage: 1 to n; None: the pacer's.
            generator: source of the draws.

        Returns:
            `[batch]` on the device of the edges: int64 times, or float noise levels.

        Raises:
            BadSetting: no pacer and no stage, or a stage (as a number) that is not there.
        """
        if stage is None:
            if self.pacer is None:
                raise BadSetting("a curriculum without a pacer needs the stage of every draw: give stage")
            stage = self.pacer.stage
        elif isinstance(stage, int) and not 1 <= stage <= self.n:
            raise BadSetting(f"stage={stage}: there are 1 to {self.n}")
        stage = torch.as_tensor(stage, device=self.low.device)
        room, place = torch.take(self.total, stage), generator.device if generator is not None else self.low.device
        if self.low.is_floating_point():
            u = torch.rand(batch, dtype=torch.float64, generator=generator, device=place).to(room.device) * room
        else:
            u = torch.randint(_MANY, (batch,), generator=generator, device=place).to(room.device) % room
        cluster = (torch.bucketize(u, self.total, right=True) - 1).minimum(stage - 1)  # rounding may reach the upper end
        value = torch.take(self.low, cluster) + u - torch.take(self.total, cluster)
        if not self.low.is_floating_point():
            return value
        tiny = torch.finfo(self.low.dtype).eps
        level = self.mean + self.std * torch.special.ndtri(value.clamp(tiny, 1 - tiny))
        return level.exp().to(torch.get_default_dtype())
