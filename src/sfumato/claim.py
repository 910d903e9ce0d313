"""A paper's central claim as a small experiment, judged by paired statistics over seeds.

A claim is a function of a `Lab` that runs every arm once with `lab.seed` and returns `{arm: {metric: value}}`. What must come
out is declared beside it: `Better` (paired over seeds, 95 % t interval of the mean difference) and `Holds` (an exact property).

>>> from sfumato.claim import Better, Verdict, claim, judge
>>> @claim("red beats blue", Better("score", "red", over="blue", by=0.5))
... def colours(lab):
...     return {"red": {"score": 2.0 + 0.01 * lab.seed}, "blue": {"score": 1.0}}
>>> figures = [colours.run(type("Lab", (), {"seed": s})) for s in range(5)]
>>> judge(colours, figures).verdict is Verdict.REPRODUCED
True

The rule: *reproduced* when the interval's lower end is above 0 and the mean difference is at least the margin; *not reproduced*
when its upper end is below the margin (or an exact property fails); else, and always with fewer than 5 seeds, *inconclusive*.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

ENOUGH_SEEDS = 5
"""With fewer, no verdict is given."""

Figures = dict[str, dict[str, float]]
"""One seed's outcome: `{arm: {metric: value}}`."""


class Verdict(str, enum.Enum):
    """What came out."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"


class Lab(Protocol):
    """What a claim is handed: its seed, its budget, data and training. The engine implements it.

    `budget` is 1 for a verdict run and smaller in tests; a claim multiplies its step counts by it (`lab.steps(700)`).
    """

    seed: int
    budget: float

    @property
    def generator(self) -> torch.Generator: ...
    def steps(self, count: int) -> int: ...
    def data(self, where: Any, split: str = "train") -> Any: ...
    def fit(self, method: Any, data: Any, *, steps: int | None = None) -> Any: ...
    def picture(self, name: str, images: torch.Tensor) -> None: ...
    def curve(self, arm: str, x: Sequence[float], y: Sequence[float], *, xlabel: str, ylabel: str) -> None: ...


@dataclass(frozen=True)
class Better:
    """`arm` beats the arm `over` in `metric` by a margin, on average over paired seeds."""

    metric: str
    arm: str
    over: str
    by: float = 0.0
    higher: bool = True

    def __str__(self) -> str:
        margin = f" by at least {self.by:g}" if self.by else ""
        return f"{self.arm} {'above' if self.higher else 'below'} {self.over} in {self.metric}{margin}"

    def difference(self, figures: Figures) -> float:
        """How much better the arm was with one seed (positive: better)."""
        gap = figures[self.arm][self.metric] - figures[self.over][self.metric]
        return gap if self.higher else -gap


@dataclass(frozen=True)
class Holds:
    """An exact property of one seed's figures that must hold with every seed; no statistics."""

    text: str
    fn: Callable[[Figures], bool]

    def __str__(self) -> str:
        return self.text


Condition = Better | Holds


@dataclass(frozen=True)
class Claim:
    """A statement, the function that tests it, and what must come out."""

    statement: str
    run: Callable[[Any], Figures]
    conditions: tuple[Condition, ...]
    seeds: tuple[int, ...]
    note: str = ""

    def __call__(self, lab: Any) -> Figures:
        """Run every arm once, with the lab's seed."""
        return self.run(lab)


def claim(statement: str, *conditions: Condition, seeds: Sequence[int] = range(5), note: str = "") -> Callable[..., Claim]:
    """Declare a claim. `seeds` are those of the verdict run: not used while developing. `note` explains a verdict to a reader."""

    def wrap(fn: Callable[[Any], Figures]) -> Claim:
        return Claim(statement, fn, conditions, tuple(seeds), note)

    return wrap


class Interval(NamedTuple):
    """A mean and its two-sided confidence limits."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of paired differences; infinite for a single one.

    >>> paired_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    from scipy.stats import t as student

    n = len(differences)
    mean = math.fsum(differences) / n
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    half = float(student.ppf(0.5 + level / 2, n - 1)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Finding:
    """How one condition came out."""

    condition: str
    verdict: Verdict
    interval: Interval | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Judgement:
    """How a claim came out: the worst of its conditions."""

    verdict: Verdict
    findings: list[Finding] = field(default_factory=list)


def judge(claim: Claim, figures: Sequence[Figures]) -> Judgement:
    """Judge a claim from the figures of several seeds."""
    findings = [_find(c, figures) for c in claim.conditions]
    for verdict in (Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE):
        if any(f.verdict is verdict for f in findings):
            return Judgement(verdict, findings)
    return Judgement(Verdict.REPRODUCED if findings else Verdict.INCONCLUSIVE, findings)


def _find(condition: Condition, figures: Sequence[Figures]) -> Finding:
    if isinstance(condition, Holds):
        held = bool(figures) and all(condition.fn(f) for f in figures)
        return Finding(str(condition), Verdict.REPRODUCED if held else Verdict.NOT_REPRODUCED)
    interval = paired_interval([condition.difference(f) for f in figures])
    if len(figures) < ENOUGH_SEEDS:
        verdict = Verdict.INCONCLUSIVE
    elif interval.low > 0 and interval.mean >= condition.by:
        verdict = Verdict.REPRODUCED
    elif interval.high < condition.by:
        verdict = Verdict.NOT_REPRODUCED
    else:
        verdict = Verdict.INCONCLUSIVE
    return Finding(str(condition), verdict, interval, condition.by)
