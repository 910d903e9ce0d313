"""Plots with one named row per thing: intervals of differences, arms with a dot per seed, and bars. All are a `Figure`.

An interval row shows the mean difference, its 95 % interval, every seed's difference below it, the line at zero (no difference)
and, dashed, the margin that was asked for.

>>> from sfumato.report import intervals
>>> row = {"label": "A above B", "mean": 0.8, "low": 0.2, "high": 1.4, "margin": 0.5, "dots": [0.6, 1.0]}
>>> forest = intervals([row])
>>> "margin 0.5" in forest.svg(width=360), forest.alt
(True, 'mean difference and interval: A above B +0.80 [+0.20, +1.40]')
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.report.plots import as_floats, interval_text, number, ticks
from sfumato.report.style import NARROW, WIDE, Figure

Theme = Mapping[str, str]
LINE, GAP = 17.0, 58.0
"""Pixels of a line of a label, and of the drawing below it."""
VERDICT_COLOURS = {"reproduced": "good", "not reproduced": "bad", "inconclusive": "open"}


def intervals(rows: Sequence[Mapping[str, Any]], *, xlabel: str = "mean difference (right: better)") -> Figure:
    """A forest plot of paired differences.

    Args:
        rows: each `{"label", "mean", "low", "high"}`, and where known `"margin"`, `"dots"` (one difference per seed) and
            `"verdict"` ("reproduced", "not reproduced" or "inconclusive", which sets the colour). Rows whose sizes differ by more
            than a factor of six get an axis each.
        xlabel: what the axis shows.
    """
    shown = [row for row in rows if row.get("mean") is not None and math.isfinite(row["mean"])]
    reach = [max((abs(v) for v in _values(row)), default=0.0) or 1.0 for row in shown]
    together = bool(shown) and max(reach) / min(reach) <= 6
    groups = [list(range(len(shown)))] if together else [[i] for i in range(len(shown))]

    def height(width: float) -> float:
        return sum(sum(_row_height(shown[i]["label"], width) for i in group) + 34 for group in groups) + 24

    def draw(canvas: Any, theme: Theme) -> None:
        width = canvas.get_figwidth() * 72
        sizes = [sum(_row_height(shown[i]["label"], width) for i in group) for group in groups]
        axes = canvas.subplots(len(groups), 1, squeeze=False, height_ratios=sizes).ravel() if groups else []
        for ax, group, size in zip(axes, groups, sizes, strict=True):
            _forest(ax, [shown[i] for i in group], size, width, theme)
        if groups:
            axes[-1].set_xlabel(xlabel)

    told = "; ".join(f"{row['label']} {_told(row)}" for row in shown)
    return Figure(draw, f"mean difference and interval: {told}", height)


def _values(row: Mapping[str, Any]) -> list[float]:
    """Every finite number that the row's axis must reach."""
    found = [row["mean"], row.get("low"), row.get("high"), row.get("margin"), *(row.get("dots") or ())]
    return [float(v) for v in found if v is not None and math.isfinite(v)]


def _limits(row: Mapping[str, Any]) -> tuple[float, float]:
    """Lower and upper limit; NaN where it is missing."""
    low, high = row.get("low"), row.get("high")
    return math.nan if low is None else float(low), math.nan if high is None else float(high)


def _told(row: Mapping[str, Any]) -> str:
    mean, low, high = interval_text(float(row["mean"]), *_limits(row))
    return f"{mean} [{low}, {high}]"


def _lines(label: str, width: float) -> list[str]:
    """A label in lines that leave room for the figures beside it, or on a line of their own where the width is small."""
    beside = 190 if width >= 500 else 0
    return (textwrap.wrap(label, int((width - beside - 12) / 7.6)) or [""]) + ([] if beside else [""])


def _row_height(label: str, width: float) -> float:
    return len(_lines(label, width)) * LINE + GAP


def _forest(ax: Any, rows: Sequence[Mapping[str, Any]], size: float, width: float, theme: Theme) -> None:
    """Rows on one axis; the y axis counts pixels from the top, so that labels and intervals keep their distances."""
    reached = [v for row in rows for v in _values(row)] + [0.0]
    span = (max(reached) - min(reached)) or 1.0
    ax.set_xlim(min(reached) - 0.05 * span, max(reached) + 0.05 * span)
    ax.set_ylim(size, 0)
    ax.set_yticks([])
    ax.grid(False)
    top = 0.0
    for row in rows:
        lines = _lines(row["label"], width)
        level = top + 4 + (LINE * (len(lines) - 1) if width < 500 else 0)
        across = ax.get_yaxis_transform()
        ax.text(0, top + 4, "\n".join(lines).rstrip(), transform=across, va="top", linespacing=1.25)
        aside: dict[str, Any] = {
            "ha": "left" if width < 500 else "right",
            "va": "top",
            "linespacing": 1.25,
            "color": theme["muted"],
        }
        ax.text(0 if width < 500 else 1, level, _told(row), transform=across, **aside)
        _interval(ax, row, top + len(lines) * LINE + 27, theme)
        top += _row_height(row["label"], width)
    ticks(ax.xaxis, 4 if width < 500 else 7)


def _interval(ax: Any, row: Mapping[str, Any], y: float, theme: Theme) -> None:
    """Zero, margin, interval, seeds and mean of one row around the height `y`."""
    colour = theme[VERDICT_COLOURS.get(str(row.get("verdict")), "s1")]
    low, high = _limits(row)
    left, right = ax.get_xlim()
    ax.plot([0, 0], [y - 17, y + 17], color=theme["muted"], linewidth=1)
    margin = row.get("margin")
    if margin:
        ax.plot([margin, margin], [y - 17, y + 17], color=theme["accent"], linewidth=1.2, linestyle=(0, (3, 2)))
        near = margin > left + 0.75 * (right - left)
        ax.annotate(
            f"margin {number(margin)}", (margin, y - 18), (-5 if near else 5, 0), textcoords="offset points", fontsize=11,
            va="top", ha="right" if near else "left", color=theme["accent"],
        )  # fmt: skip
    if not math.isnan(low) and not math.isnan(high):
        ax.plot([max(low, left), min(high, right)], [y, y], color=colour, linewidth=4, solid_capstyle="round", alpha=0.55)
    dots = [d for d in row.get("dots") or () if math.isfinite(d)]
    ax.plot(dots, [y + 11] * len(dots), "o", color=theme["ink"], markersize=5, alpha=0.5, markeredgewidth=0)
    ax.plot([row["mean"]], [y], "o", color=colour, markersize=10, markeredgecolor=theme["paper"], markeredgewidth=1.5)


def dots(figures: Mapping[str, Any], *, xlabel: str = "", paired: bool = True, log: bool = False) -> Figure:
    """One row per arm: a dot per seed, the mean as a bar across and as a number; seeds joined by thin lines.

    Args:
        figures: `{arm: [value per seed]}`.
        xlabel: the metric.
        paired: whether the same place in each list is the same seed.
        log: a logarithmic axis.
    """
    values = {name: np.atleast_1d(as_floats(v)) for name, v in figures.items()}

    def draw(canvas: Any, theme: Theme) -> None:
        ax, rows = _named_rows(canvas, list(values), theme)
        if paired and len({len(v) for v in values.values()}) == 1:
            ax.plot(np.stack(list(values.values())), rows, color=theme["muted"], linewidth=0.8, alpha=0.35)
        for y, seeds in zip(rows, values.values(), strict=True):
            finite = seeds[np.isfinite(seeds)]
            if len(finite):
                ax.plot(finite, [y] * len(finite), "o", color=theme["s1"], markersize=8, alpha=0.85, markeredgewidth=0)
                ax.plot([_mean(seeds)] * 2, [y - 0.3, y + 0.3], color=theme["ink"], linewidth=2, zorder=4)
                _beside(ax, number(_mean(seeds)), float(finite.max()), y, theme)
        _value_axis(ax, xlabel, log, canvas)

    told = "; ".join(f"{name} {number(_mean(v))}" for name, v in values.items())
    return Figure(draw, f"{xlabel or 'value'} per seed, and its mean: {told}", lambda width: 38 * len(values) + 56)


def bars(figures: Mapping[str, Any], *, xlabel: str = "", highlight: str | None = None, log: bool = False) -> Figure:
    """Horizontal bars with their numbers; several values per name give the mean and a dot each.

    Args:
        figures: `{name: value}` or `{name: [value per seed]}`.
        xlabel: what is measured.
        highlight: the name that stands out; the others turn grey.
        log: a logarithmic axis.
    """
    values = {name: np.atleast_1d(as_floats(v)) for name, v in figures.items()}

    def draw(canvas: Any, theme: Theme) -> None:
        ax, rows = _named_rows(canvas, list(values), theme)
        for y, (name, seeds) in zip(rows, values.items(), strict=True):
            colour = theme["s1"] if highlight in (None, name) else theme["muted"]
            ax.barh(y, _mean(seeds), height=0.5, color=colour, alpha=0.85 if highlight in (None, name) else 0.45)
            if len(seeds) > 1:
                ax.plot(seeds, [y] * len(seeds), "o", color=theme["ink"], markersize=4.5, alpha=0.55, markeredgewidth=0)
            _beside(ax, number(_mean(seeds)), max(float(np.nanmax(seeds, initial=0)), 0), y, theme)
        _value_axis(ax, xlabel, log, canvas)

    told = "; ".join(f"{name} {number(_mean(v))}" for name, v in values.items())
    return Figure(draw, f"{xlabel or 'value'}: {told}", lambda width: 34 * len(values) + 56)


def _mean(values: np.ndarray) -> float:
    """The mean of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _named_rows(canvas: Any, names: list[str], theme: Theme) -> tuple[Any, np.ndarray]:
    """An axes with one named row each, the first at the top."""
    ax = canvas.subplots()
    room = NARROW if canvas.get_figwidth() * 72 < 500 else WIDE
    rows = np.arange(len(names))
    ax.set_yticks(rows, [textwrap.fill(n, 16 if room == NARROW else 34) for n in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", labelcolor=theme["ink"], labelsize=12.5, pad=8)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    return ax, rows


def _beside(ax: Any, text: str, x: float, y: float, theme: Theme) -> None:
    style = {"va": "center", "fontsize": 12, "color": theme["muted"], "annotation_clip": False}
    ax.annotate(text, (x, y), (10, 0), textcoords="offset points", **style)


def _value_axis(ax: Any, xlabel: str, log: bool, canvas: Any) -> None:
    ticks(ax.xaxis, 4 if canvas.get_figwidth() * 72 < 500 else 7, log=log)
    ax.set_xlabel(xlabel)
