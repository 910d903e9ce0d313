"""Which of its own samples a diffusion run was undecided about: the variance of its expected end over a window of steps.

Hal(x) = mean over coordinates of Var_{i in W} [x̂_0^(i)] (Aithal et al. 2024, section 5). Large for samples that belong to no mode
of the data; measured over the window and over every part of the chain, on samples that the run draws. No data is looked at.

>>> import sfumato
>>> from sfumato.papers.diffusion.ddpm import DDPM
>>> run = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, sample_steps=10))
>>> found = sfumato.probe("hallucination", run, samples=6, window="5:10", slices=2)
>>> found.numbers["variance"].shape, [one["steps"] for one in found.numbers["slices"]]
(torch.Size([6]), [[0, 5], [5, 10]])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sfumato.diffusion import SamplerStep, X0Variance, default_window, parse_window
from sfumato.errors import BadSetting, Interrupted
from sfumato.instruments.findings import Findings, Pictures, Plan, Plot, Section, Table
from sfumato.instruments.kinds import BareSetup, Kind
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample
from sfumato.method import TrajectorySampler, draws_points
from sfumato.nn.at_rest import eval_mode

MOST, FEWEST, AT_ONCE = 256, 16, 64
POINTS = 10_000
"""Samples at most, at least and at once; of points, which cost little, as many as this at most and at once."""
TIMED = 3
"""Steps that are timed to learn what a chain costs."""


class Settings(BareSetup):
    """What the hallucination probe can be told."""

    samples: int | None = Field(
        None, gt=1, description="samples to draw; None: what the time allows, at most 256 (points: 10,000)"
    )
    batch_size: int | None = Field(None, gt=0, description="samples drawn at once; None: 64 (points: 10,000)")
    window: str | None = Field(
        None, description="FIRST:END, steps of the variance, counted from 0; None: 50 to 70 % of them (points: the last 2 %)"
    )
    slices: int | None = Field(
        None, gt=0, description="equal parts of the chain that are looked at besides; None: 10, or fewer of two steps each"
    )
    shown: int = Field(8, gt=0, description="most and least suspicious samples that are shown")
    deviations: float = Field(
        3.0, gt=0, description="a sample stands out whose log variance is so many robust deviations above the median"
    )


class _Enough(Exception):
    """The steps to be timed were taken."""


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time a few steps, and choose how many samples to draw."""
    owner, name = subject.owner, subject.name
    if not isinstance(owner, TrajectorySampler):
        raise BadSetting(f"{name} does not draw samples in steps that can be watched: give a diffusion run, such as one of ddpm")
    steps, limit = owner.trajectory_steps, None if minutes is None else 60 * minutes
    points = draws_points(owner)
    low, high = default_window(steps, points=points) if settings.window is None else parse_window(settings.window, steps)
    slices = settings.slices or min(10, steps // 2)
    if steps < 2 * slices:
        raise BadSetting(f"a chain of {steps} steps has no {slices} slices of two or more: say slices={steps // 2}")
    most = settings.samples or (POINTS if points else MOST)
    size = min(settings.batch_size or (POINTS if points else AT_ONCE), most)
    taken = min(TIMED, steps)

    def stop(step: SamplerStep) -> None:
        if step.step + 1 == taken:
            raise _Enough

    def work(pairs: list[tuple[Tensor, Tensor]]) -> None:
        with suppress(_Enough):
            owner.sample(len(pairs[0][0]), torch.Generator(subject.device).manual_seed(0), callback=stop)

    with eval_mode(subject.module):
        blank = torch.zeros(size)
        sample = seconds_a_sample(work, (blank, blank), limit, subject.device) * steps / taken
    count = settings.samples or samples_that_fit(most, sample, 1, limit, FEWEST)
    notes = (f"only {count} samples were drawn, to fit the time: more minutes draw more",) if count < most else ()
    chosen = {"samples": count, "at once": min(size, count), "steps": steps, "first step": low, "end": high, "slices": slices}
    return Plan(chosen, count * sample, limit, math.ceil(count / min(size, count)) * steps, notes)


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """Draw batch after batch, each watched over all windows."""
    owner: Any = subject.owner
    count, size, steps, slices = (plan.chosen[name] for name in ("samples", "at once", "steps", "slices"))
    window = (plan.chosen["first step"], plan.chosen["end"])
    edges = [round(i * steps / slices) for i in range(slices + 1)]
    windows = [window, *pairwise(edges)]
    watches = [X0Variance(w) for w in windows]
    seen: list[Tensor] = []  # [windows, B] each
    extremes = _Extremes(settings.shown)

    def watch(step: SamplerStep) -> None:
        progress.advance()
        for one in watches:
            one(step)

    progress.stage("drawing")
    with progress.until_stopped(), eval_mode(subject.module):
        for first in range(0, count, size):
            drawn = owner.sample(min(size, count - first), generator, callback=watch)
            seen.append(torch.stack([one.variance for one in watches]).double().cpu())
            extremes.add(drawn, seen[-1][0])
    if not seen:
        raise Interrupted("stopped before anything was measured: the first samples were not finished")
    own, *parts = torch.cat(seen, 1)
    numbers = {
        "samples": len(own),
        "steps": steps,
        "window": list(window),
        "variance": own,
        "slices": [_slice(part, own, list(w)) for part, w in zip(parts, windows[1:])],
        "most suspicious": extremes.most.numbers,
        "least suspicious": extremes.least.numbers,
    }
    return _findings(subject, settings, numbers, extremes)


def _slice(part: Tensor, own: Tensor, steps: list[int]) -> dict[str, Any]:
    """What one part of the chain says of all samples, and whether it agrees with the window on which are suspicious."""
    levels = torch.quantile(part, torch.tensor([0.5, 0.95], dtype=part.dtype)).tolist()
    return {
        "steps": steps, "median": levels[0], "95th percentile": levels[1], "largest": float(part.max()),
        "rank correlation": _rank_correlation(part, own),
    }  # fmt: skip


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; NaN where one of them is constant."""
    from scipy.stats import spearmanr

    if a.min() == a.max() or b.min() == b.max():
        return math.nan
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


class _Ends:
    """Samples at one end of the order, with their numbers and variances."""

    def __init__(self, count: int, sign: int) -> None:
        self.count, self.sign = count, sign
        self.samples: Tensor | None = None
        self.variance, self.rows = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.long)

    def add(self, samples: Tensor, variance: Tensor, rows: Tensor) -> None:
        samples = samples if self.samples is None else torch.cat([self.samples, samples])
        variance, rows = torch.cat([self.variance, variance]), torch.cat([self.rows, rows])
        kept = (self.sign * variance).argsort(stable=True)[: self.count]
        self.samples, self.variance, self.rows = samples[kept], variance[kept], rows[kept]

    @property
    def numbers(self) -> dict[str, list[Any]]:
        return {"sample": self.rows.tolist(), "variance": self.variance.tolist()}


class _Extremes:
    """The most and the least suspicious samples so far; the others are not kept."""

    def __init__(self, count: int) -> None:
        self.most, self.least, self.seen = _Ends(count, -1), _Ends(count, 1), 0

    def add(self, samples: Tensor, variance: Tensor) -> None:
        """More samples, in the order in which they were drawn."""
        rows = self.seen + torch.arange(len(samples))
        self.seen += len(samples)
        for ends in (self.most, self.least):
            ends.add(samples.detach().float().cpu(), variance, rows)


def outstanding(variance: Tensor, deviations: float) -> tuple[Tensor, float]:
    """Which variances stand out, `[n]` bool, and from which value on: of the logarithms, by median and median deviation."""
    logs = variance.clamp(min=torch.finfo(variance.dtype).tiny).log()
    spread = 1.4826 * (logs - logs.median()).abs().median()  # the deviation, for a normal distribution
    edge = float((logs.median() + deviations * spread).exp())
    return variance > edge, edge


def _findings(subject: Subject, settings: Settings, numbers: dict[str, Any], extremes: _Extremes) -> Findings:
    own, (low, high), steps = numbers["variance"], numbers["window"], numbers["steps"]
    out, edge = outstanding(own, settings.deviations)
    numbers |= {"stand out": out.nonzero()[:, 0].tolist(), "edge": edge}
    count, median = int(out.sum()), float(own.median())
    spread = float(torch.quantile(own, 0.95)) / median if median else math.nan
    headline = {
        "samples": len(own), "window": f"steps {low} to {high} of {steps}", "median variance": median,
        "95th percentile over the median": spread, "stand out": f"{count} of {len(own)}",
    }  # fmt: skip
    text = (
        f"Mean over the coordinates of the variance of the expected end over steps {low} to {high} of {steps}. From {edge:.3g} "
        f"on a sample stands out: its logarithm is {settings.deviations:g} robust deviations above the median."
    )
    histogram = Plot("spectrum", own, {"xlabel": "variance", "logx": bool((own > 0).all()), "logy": False})
    middle = [sum(one["steps"]) / 2 for one in numbers["slices"]]
    lines = {name: (middle, [one[name] for one in numbers["slices"]]) for name in ("median", "95th percentile", "largest")}
    along = Plot("curves", lines, {"xlabel": "step", "ylabel": "variance within a slice", "logy": True, "height": 260})
    rows = [
        {"steps": f"{one['steps'][0]} to {one['steps'][1]}", **{k: v for k, v in one.items() if k != "steps"}}
        for one in numbers["slices"]
    ]
    told = "rank correlation: whether a slice finds the same samples suspicious as the window does"
    sections = [
        Section("How undecided it was", text, [histogram]),
        Section("Along the chain", None, [along, Table(rows, told)]),
        _shown(subject, extremes),
    ]
    notes = [
        "a large variance tells that the run was undecided about a sample, not that the sample is wrong: look at the pictures",
        "which window tells most depends on the data: for points the last steps; for your own pictures judge some samples, and "
        "ask sfumato.diffusion.scan_windows",
    ]
    return Findings(numbers, headline, _words(numbers, count, spread), sections, notes)


def _shown(subject: Subject, extremes: _Extremes) -> Section:
    title = "Most and least suspicious"
    blocks: list[Any] = []
    for name, ends in (("most suspicious first", extremes.most), ("steadiest first", extremes.least)):
        assert ends.samples is not None
        if draws_points(subject.owner):
            blocks.append(Table(_rows(ends), name))
        else:
            images = {f"{row}: {v:.3g}": x for row, v, x in zip(ends.rows.tolist(), ends.variance.tolist(), ends.samples)}
            blocks.append(Pictures(images, f"{name}: number of the sample, variance"))
    return Section(title, None, blocks)


def _rows(ends: _Ends) -> Sequence[dict[str, Any]]:
    assert ends.samples is not None
    points = [", ".join(f"{v:.3g}" for v in x.tolist()) for x in ends.samples]
    return [{"sample": r, "point": p, "variance": v} for r, p, v in zip(ends.rows.tolist(), points, ends.variance.tolist())]


def _words(numbers: dict[str, Any], count: int, spread: float) -> str:
    total = numbers["samples"]
    if not count:
        return f"No sample stands out: the 95th percentile of the variance is {spread:.2g} times the median, without a tail."
    low, high = numbers["window"]
    keep = math.floor(1000 * (1 - count / total)) / 1000
    words = f"{count} of {total} samples stand out: the run was undecided about them until the end of the window."
    if keep < 0.5:
        return words
    return f"{words} Drop as many by: sfumato sample RUN --keep {keep:g} --window {low}:{high}."


KIND = Kind(Settings, plan, measure, data=False)
