"""What a probe planned and what it found: plain numbers, and what a page shows of them.

An instrument knows no page: it names plots of `sfumato.report` and gives their data; `report.write_probe_report` draws them.

>>> from sfumato.instruments import Findings, Plan
>>> found = Findings(numbers={"trace": float("nan"), "top": [2.0]}, headline={"largest eigenvalue": "2"})
>>> found.as_json()["numbers"]
{'trace': None, 'top': [2.0]}
>>> Plan({"steps": 10}, seconds=2.5).chosen["steps"]
10
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Plan:
    """What fits into the time, found out before anything is measured.

    Args:
        chosen: the numbers that were chosen, by name.
        seconds: what it will take.
        limit: seconds that were allowed; None: as long as it takes.
        ticks: batches that will be read: what the progress bar counts.
        notes: how the choice was made, a sentence each.
    """

    chosen: Mapping[str, Any]
    seconds: float
    limit: float | None = None
    ticks: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows by column."""

    rows: Sequence[Mapping[str, Any]]
    caption: str | None = None


@dataclass(frozen=True)
class Plot:
    """A figure of `sfumato.report`: which function, its data and its further arguments."""

    kind: Literal["curves", "spectrum", "bars", "dots", "intervals"]
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    caption: str | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures `[C, H, W]` in [0, 1] by name."""

    images: Mapping[str, torch.Tensor]
    caption: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then blocks; several plots in a list stand side by side."""

    title: str
    text: str | None = None
    blocks: Sequence[Table | Plot | Pictures | Sequence[Plot]] = ()


@dataclass
class Findings:
    """What a probe found.

    Args:
        numbers: everything that was measured, complete enough to draw every plot oneself.
        headline: the few figures a reader wants first: a number, a number and its error, or words.
        verdict: what they say, in a sentence or two.
        sections: what the page shows.
        notes: what a reader must know to trust the numbers, a sentence each.
        interrupted: stopped before the plan was carried out.
        about: kind, model, data, settings, plan and time; filled in by `probe`.
    """

    numbers: dict[str, Any]
    headline: dict[str, Any]
    verdict: str = ""
    sections: list[Section] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All of it but the page, of JSON's types; what is not finite is None."""
        rest = {name: getattr(self, name) for name in ("headline", "verdict", "notes", "interrupted", "numbers")}
        plain: dict[str, Any] = _plain({**self.about, **rest})
        return plain


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor or an array
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
