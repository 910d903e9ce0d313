"""What each part of the times costs to learn: a new network for each of them alone, and samples drawn with it in its part.

    l_i(k) = (L_i(k) - L_i(K)) / (L_i(0) - L_i(K)),    d_i = W2²(samples with network i at times of part i, data)

Every network has the same budget. The distance is Fréchet's, of patches and of small versions of whole pictures, as no large
network that knows pictures is at hand; all samples start at the same noise (Kim, Go, Kwon, Kim 2025, the first study).

>>> from sfumato.instruments.expert_training import distances
>>> import torch
>>> x = torch.rand(64, 1, 16, 16)
>>> {name: round(d, 6) for name, d in distances(x, x).items()}
{'whole': 0.0, 'patches': 0.0}
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.diffusion.curriculum import uniform_clusters
from sfumato.diffusion.samplers import SamplerStep
from sfumato.engine.randomness import key, seed_everything
from sfumato.errors import BadSetting
from sfumato.instruments.findings import Pictures, Plot, Section, Table
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import seconds_of
from sfumato.metrics.frechet import GaussianStats, PatchGaussian, frechet_distance
from sfumato.nn.at_rest import eval_mode
from sfumato.probes.task_difficulty import Expert, gathered, train_expert

MEASURES, TIMED, SHOWN = 10, 3, 8
"""Times that a loss is measured in training, steps of a sample that are timed, and samples shown of each part."""
FEWEST, MOST = 64, 512
"""Samples drawn for a distance."""
SMALL = 8
"""Pixels a side of patches, and of the small versions of pictures."""


@runtime_checkable
class ExpertTaker(Protocol):
    """A diffusion model that draws with another network at some times."""

    net: nn.Module
    trajectory_steps: int
    config: Any

    def with_expert(self, net: nn.Module, low: int = 0, high: int | None = None) -> Any:
        """The same, with another network at times `low` to `high - 1`."""
        ...

    def sample(self, n: int, generator: torch.Generator | None = None, *, callback: Any = None) -> Tensor:
        """Draw pictures `[n, C, H, W]` in [0, 1], watched by `callback`."""
        ...


class Cost(NamedTuple):
    """What the study takes: seconds of training and of a sample, how many samples, at most how many at once."""

    training: float
    sample: float
    drawn: int
    at_once: int
    parts: int
    steps: int
    chain: int

    @property
    def seconds(self) -> float:
        """Of all of it: the trained model draws too."""
        return self.parts * self.training + (self.parts + 1) * self.drawn * self.sample

    @property
    def ticks(self) -> int:
        """Training steps, and steps of the samples' chains."""
        return self.parts * self.steps + (self.parts + 1) * math.ceil(self.drawn / self.at_once) * self.chain


class _Enough(Exception):
    """The steps to be timed were taken."""


def cost(subject: Subject, x: Tensor, intervals: int, steps: int, drawn: int | None, limit: float | None) -> Cost:
    """Time a training step and the first steps of a chain; `drawn` None: what the time allows.

    Raises:
        BadSetting: a method that cannot draw with other networks.
    """
    owner = _of_any_class(_taker(subject))
    size = min(len(x), owner.config.batch_size)
    measured = MEASURES * len(x[:MOST]) / size / 3  # a loss without its gradient is a third of a step; one step comes with two
    training = (steps + measured) * 0.6 * seconds_of(lambda: _train(subject, x[:size], (0, 1), 1), subject.device)
    taken = min(TIMED, owner.trajectory_steps)

    def stop(step: SamplerStep) -> None:
        if step.step + 1 == taken:
            raise _Enough

    def draw() -> None:
        with suppress(_Enough), torch.no_grad():
            owner.sample(size, torch.Generator(subject.device).manual_seed(0), callback=stop)

    with eval_mode(subject.module):
        sample = seconds_of(draw, subject.device) * owner.trajectory_steps / taken / size
    if drawn is None:
        left = math.inf if limit is None else limit - intervals * training
        drawn = int(max(FEWEST, min(MOST, left / (sample * (intervals + 1)))))
    return Cost(training, sample, drawn, size, intervals, steps, owner.trajectory_steps)


def train_experts(subject: Subject, x: Tensor, plan: Cost, *, progress: Progress, generator: torch.Generator) -> dict[str, Any]:
    """Train the networks one after the other, and draw with each; what is finished when it is stopped stays.

    Args:
        x: pictures `[n, C, H, W]` in [0, 1], on the CPU.

    Returns:
        "trained", the distances of the trained model alone, and "pictures"; "edges", "steps", "losses", "normalised", "steps_to"
        and "distances" of the parts that were finished, unless it was stopped before the first was. Nothing where it was stopped
        before all of that.
    """
    owner, found = _of_any_class(_taker(subject)), _Found()
    edges = uniform_clusters(len(owner.schedule), plan.parts)  # type: ignore[attr-defined]
    start = key(generator.initial_seed(), "experts")
    with progress.until_stopped():
        progress.stage("samples of the trained model")
        found.add("trained", _draw(subject, owner, plan, start, progress), x)
        for low, high in pairwise(edges.tolist()):
            name = f"times {low} to {high - 1}"
            progress.stage(f"training on {name}")
            expert = _train(subject, x, (low, high), plan.steps, start, progress)
            progress.stage(f"samples with {name}")
            found.add(name, _draw(subject, owner.with_expert(expert.net, low, high), plan, start, progress), x)
            found.experts.append(expert._replace(net=nn.Identity()))  # its weights are not needed any more
    if not found.distances:
        return {}
    numbers: dict[str, Any] = {"trained": found.distances.pop("trained"), "pictures": found.pictures}
    if found.experts:
        told = gathered(edges, found.experts, steps=plan.steps, measure=MEASURES)
        numbers |= {
            "edges": told.edges, "steps": told.steps, "losses": told.losses, "normalised": told.normalised,
            "steps_to": told.steps_to(), "distances": list(found.distances.values()),
        }  # fmt: skip
    return numbers


class _Found:
    def __init__(self) -> None:
        self.experts: list[Expert] = []
        self.distances: dict[str, dict[str, float]] = {}
        self.pictures: dict[str, Tensor] = {}

    def add(self, name: str, drawn: Tensor, data: Tensor) -> None:
        """Samples of a part; a few are kept, side by side."""
        self.distances[name] = distances(drawn, data)
        self.pictures[name] = torch.cat(list(drawn[:SHOWN]), -1)


def distances(a: Tensor, b: Tensor) -> dict[str, float]:
    """Fréchet distance of pictures `[N, C, H, W]`: of them as a whole, 8 pixels a side, and of patches where they are larger."""
    side = min(a.shape[-2:])
    found = {"whole": _distance(*(_stats(GaussianStats(), _thumbnails(x)) for x in (a, b)))}
    if side > SMALL:
        found["patches"] = _distance(*(_stats(PatchGaussian(SMALL), x) for x in (a, b)))
    return found


def _thumbnails(x: Tensor) -> Tensor:
    return F.interpolate(x, (SMALL, SMALL), mode="area") if max(x.shape[-2:]) > SMALL else x


def _stats(stats: GaussianStats, x: Tensor) -> GaussianStats:
    stats.update(x)
    return stats


def _distance(a: GaussianStats, b: GaussianStats) -> float:
    return float(frechet_distance(*a.compute()[:2], *b.compute()[:2]))


def _taker(subject: Subject) -> ExpertTaker:
    owner = subject.owner
    if not isinstance(owner, ExpertTaker):
        raise BadSetting(f"{subject.name} cannot draw with another network at some times: leave out train_steps")
    return owner


def _of_any_class(owner: ExpertTaker) -> ExpertTaker:
    """Where a run knows classes: the same, drawing without; the networks of one part are trained without, too."""
    if not getattr(owner.config, "conditional", False):
        return owner
    other = copy.copy(owner)
    other.config = owner.config.model_copy(update={"guidance": 0.0, "label": None})
    return other


def _train(
    subject: Subject, x: Tensor, span: tuple[int, int], steps: int, start: int = 0, progress: Progress | None = None
) -> Expert:
    """A network of the run's kind, new, trained at times `span[0]` to `span[1] - 1`; alike for every part but for these."""
    owner: Any = _taker(subject)
    device, size = subject.device, min(len(x), owner.config.batch_size)

    def loss(net: nn.Module, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        other, parts = owner.with_expert(net), (part.split(size) for part in (x, t, noise))
        return torch.cat([other.losses_at(*some) for some in zip(*parts)]).mean()

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_everything(start, device)  # first weights, and dropout
        net = type(owner)(owner.config).net.to(device)
        return train_expert(
            net, x.to(device), *span, loss, steps=steps, batch_size=size, lr=owner.config.lr, measure=MEASURES,
            watch=None if progress is None else progress.advance, generator=torch.Generator(device).manual_seed(start),
        )  # fmt: skip


@torch.no_grad()
def _draw(subject: Subject, method: Any, plan: Cost, start: int, progress: Progress) -> Tensor:
    """The same noise for every method: `[drawn, C, H, W]` on the CPU."""
    generator, parts = torch.Generator(subject.device).manual_seed(start), []
    with eval_mode(subject.module):
        for first in range(0, plan.drawn, plan.at_once):
            size = min(plan.at_once, plan.drawn - first)
            parts.append(method.sample(size, generator, callback=lambda step: progress.advance()).float().cpu())
    return torch.cat(parts)


# Figures

_SCALES = {"whole": f"whole pictures, {SMALL} pixels a side", "patches": f"patches of {SMALL} pixels"}


def sections(numbers: dict[str, Any], plan: Cost) -> list[Section]:
    """Curves, distances, samples and a table."""
    shown = Section(
        "Samples with one part's network",
        "From the same noise: by the trained model alone, then with the network that was trained on one part of the times in "
        "that part. Where little changes, that part is learned by then.",
        [Pictures(numbers["pictures"])] if next(iter(numbers["pictures"].values())).shape[0] in (1, 3) else [],
    )
    if "edges" not in numbers:
        return [shown]
    spans = [f"{low}–{high - 1}" for low, high in pairwise(numbers["edges"].tolist())]
    steps = numbers["steps"].tolist()
    curves = {span: (steps, row.tolist()) for span, row in zip(spans, numbers["normalised"])}
    middles = [(low + high - 1) / 2 for low, high in pairwise(numbers["edges"].tolist())]
    plots = []
    for name in numbers["trained"]:
        lines = {
            "this part's own network": (middles, [d[name] for d in numbers["distances"]]),
            "the trained model alone": (middles, [numbers["trained"][name]] * len(middles)),
        }
        plots.append(Plot("curves", lines, {"xlabel": "time (0: least noise)", "ylabel": _SCALES[name], "height": 260}))
    rows = [
        {
            "times": span, f"steps of {plan.steps} for 9/10 of the fall": int(slow),
            "loss at the end": float(losses[-1]), **{f"Fréchet distance, {k}": v for k, v in far.items()},
        }
        for span, slow, losses, far in zip(spans, numbers["steps_to"], numbers["losses"], numbers["distances"])
    ]  # fmt: skip
    return [
        Section(
            "Each part learned alone",
            f"A new network for each part of the times, trained on it alone for {plan.steps} steps: its loss, from the first "
            "value (1) to the last (0). What falls late is hard.",
            [Plot("curves", curves, {"xlabel": "training step", "ylabel": "loss, from 1 to 0", "height": 280})],
        ),
        Section(
            "Samples with one part's network: distance from the data",
            f"Fréchet distance of {plan.drawn} samples, smaller is better. It compares the parts with each other; it is no FID.",
            [plots, Table(rows)],
        ),
        shown,
    ]


def words(numbers: dict[str, Any], plan: Cost) -> str:
    """Which part is slow, and where samples suffer."""
    if "edges" not in numbers:
        return ""
    spans = [f"{low}–{high - 1}" for low, high in pairwise(numbers["edges"].tolist())]
    slow = numbers["steps_to"].tolist()
    far = [_excess(d, numbers["trained"]) for d in numbers["distances"]]
    slowest, worst = max(range(len(slow)), key=slow.__getitem__), max(range(len(far)), key=far.__getitem__)
    first = (
        f"Alone, times {spans[slowest]} take longest to learn ({slow[slowest]} of {plan.steps} steps, the quickest {min(slow)})."
        if min(slow) < max(slow) else f"Alone, all parts take {slow[0]} of {plan.steps} steps to learn."
    )  # fmt: skip
    return f"{first} Samples suffer most from a network of {plan.steps} steps at times {spans[worst]}."


def _excess(far: dict[str, float], trained: dict[str, float]) -> float:
    """How much farther than the trained model's, over both scales alike."""
    return sum(far[name] / max(trained[name], 1e-12) for name in trained)


def notes(samples: int, *, conditional: bool) -> list[str]:
    """What to know of the study."""
    told = [
        f"the networks of one part are trained on the {samples} samples that are looked at, with a constant rate and no average"
    ]
    return told + ["they are told no classes, and all samples are drawn without" for _ in range(conditional)]
