"""Plots over a continuous axis: curves with bands over seeds, spectra; and pictures side by side. All are a `Figure`.

Lines carry their names at their ends; a legend stands above only where the names would not fit. Inputs are lists, arrays or
tensors; values that are not finite are left out.

>>> from sfumato.report import curves
>>> loss = curves({"Adam": ([1, 2, 3], [[3, 2, 1], [3.2, 2.1, 0.9]])}, xlabel="step", ylabel="loss", logy=True)
>>> "Adam" in loss.alt
True
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.errors import BadData
from sfumato.report.style import SERIES, Figure

MOST_POINTS = 700
Theme = Mapping[str, str]


def as_floats(values: Any) -> np.ndarray:
    """A float64 array of a list, array or tensor."""
    return np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values, dtype=np.float64)


def number(value: float, *, sign: bool = False) -> str:
    """A number as a reader wants it: four significant digits, thousands apart, a true minus.

    >>> number(12345.678), number(0.000123), number(0.8, sign=True), number(-2)
    ('12,346', '1.23e-4', '+0.8', '−2')
    """
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "–")
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        mantissa, exponent = f"{size:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    elif size >= 1000:
        text = f"{size:,.0f}"
    else:
        text = f"{size:.4g}"
    return ("−" if value < 0 else "+" if sign else "") + text


def interval_text(mean: float, low: float, high: float) -> tuple[str, str, str]:
    """A mean and its limits with as many decimals as the width of the interval deserves.

    >>> interval_text(1.0412, 0.3161, 1.7663)
    ('+1.04', '+0.32', '+1.77')
    """
    half = (high - low) / 2
    if not math.isfinite(half) or half <= 0 or half < 1e-4:
        return number(mean, sign=True), number(low, sign=True), number(high, sign=True)
    decimals = max(0, 1 - math.floor(math.log10(half)))
    told = (f"{v:+,.{decimals}f}".replace("-", "−") for v in (mean, low, high))
    return next(told), next(told), next(told)


def curves(
    series: Mapping[str, tuple[Any, Any]], *, xlabel: str = "", ylabel: str = "", logx: bool = False, logy: bool = False,
    band: str | None = "minmax", smooth: int = 0, height: float = 320, zero: str = "",
) -> Figure:  # fmt: skip
    """Lines by name, with a band where there are several seeds.

    Args:
        series: `{arm: (x, y)}`, x `[n]` and y `[n]`, or `[seeds, n]` (the mean is the line).
        logx: whether the x axis is logarithmic; likewise `logy`.
        band: over seeds: `"minmax"`, `"ci"` (95 % interval of the mean, Student's t) or None.
        smooth: width in points of a running mean drawn over the faint raw line; 0: none.
        height: in pixels, without a legend.
        zero: axes that begin at 0: `"y"`, `"xy"`, or none.
    """

    def draw(canvas: Any, theme: Theme) -> None:
        ax = canvas.subplots()
        ends = []
        for i, (name, (xs, ys)) in enumerate(series.items()):
            ends += _curve(ax, name, as_floats(xs), np.atleast_2d(as_floats(ys)), _look(theme, i), band, smooth)
        _axes(ax, xlabel, ylabel, logx, logy)
        ax.margins(x=0.015)
        for axis in zero:
            getattr(ax, f"set_{axis}lim")(0)
        _name_lines(canvas, ax, ends, height)

    names = list(series)
    told = f"{ylabel or 'values'} over {xlabel or 'x'}: {', '.join(names)}"
    return Figure(draw, told, lambda width: height + 19 * _legend_rows(names, width, height))


def _look(theme: Theme, i: int) -> dict[str, Any]:
    """Colour and, after the sixth line, dashes."""
    return {"color": theme[SERIES[i % 6]], "linestyle": ("-", (0, (5, 2)), (0, (1.5, 1.5)))[i // 6 % 3]}


def _curve(ax: Any, name: str, x: np.ndarray, ys: np.ndarray, look: dict[str, Any], band: str | None, smooth: int) -> list[Any]:
    """Draw one arm; `[(name, x, y, look)]` of its end, or nothing where no value is finite."""
    ys = np.where(np.isfinite(ys), ys, np.nan)
    good = np.isfinite(x) & np.isfinite(ys).any(axis=0)
    x, ys = x[good], ys[:, good]
    if not len(x):
        return []
    mean = np.nanmean(ys, axis=0)
    if len(ys) > 1 and band:
        keep = _kept(mean)
        low, high = (np.nanmin(ys, 0), np.nanmax(ys, 0)) if band == "minmax" else _confidence(ys)
        ax.fill_between(x[keep], low[keep], high[keep], color=look["color"], alpha=0.16, linewidth=0)
    if smooth > 1 and len(x) > 2 * smooth:
        keep = _kept(mean)
        ax.plot(x[keep], mean[keep], color=look["color"], alpha=0.3, linewidth=1)
        mean = _running_mean(mean, smooth)
    keep = _kept(mean)
    marker = {"marker": "o", "markersize": 4.5} if len(x) <= 12 else {}
    ax.plot(x[keep], mean[keep], **look, **marker)
    return [(name, x[-1], mean[-1], look)]


def _confidence(ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import t

    n = np.isfinite(ys).sum(0)
    half = t.ppf(0.975, np.maximum(n - 1, 1)) * np.nanstd(ys, 0, ddof=1) / np.sqrt(n)
    return np.nanmean(ys, 0) - half, np.nanmean(ys, 0) + half


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    window = np.hanning(width + 2)[1:-1]
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def _kept(y: np.ndarray) -> np.ndarray:
    """Places of at most about `MOST_POINTS` points that keep the envelope: lowest and highest of each stretch, and the ends."""
    if len(y) <= MOST_POINTS:
        return np.arange(len(y))
    stretches = np.array_split(np.arange(len(y)), MOST_POINTS // 2)
    keep = [s[i] for s in stretches for i in (np.argmin(y[s]), np.argmax(y[s]))]
    return np.unique([0, *keep, len(y) - 1])


def _axes(ax: Any, xlabel: str, ylabel: str, logx: bool = False, logy: bool = False) -> None:
    """Scales, ticks, and the name of the y axis above it, where it reads without turning the head."""
    ticks(ax.xaxis, 4 if ax.get_figure().get_figwidth() * 72 < 500 else 7, log=logx)
    ticks(ax.yaxis, 5, log=logy)
    ax.set_xlabel(xlabel)
    ax.set_title(ylabel)


def ticks(axis: Any, most: int, *, log: bool = False) -> None:
    """At most about `most` plain round numbers on a matplotlib axis; `log` holds where every value is positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_data_interval()
    if log and low > 0:
        axis._set_axes_scale("log")
        wide = high / low >= 30
        axis.set_major_locator(LogLocator(numticks=most + 1) if wide else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))


def _tick(value: float) -> str:
    if abs(value) >= 1e4:
        for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return number(round(value / size, 3)) + unit
    return number(float(f"{value:.6g}"))


def _name_lines(canvas: Any, ax: Any, ends: Sequence[Any], height: float) -> None:
    """Names at the right ends, moved apart where they would touch; a legend above where they do not fit; none for one line."""
    if len(ends) < 2:
        return
    if _legend_rows([name for name, *_ in ends], canvas.get_figwidth() * 72, height):
        _legend(canvas, ends)
        return
    spot: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "annotation_clip": False,
    }  # fmt: skip
    labels = [
        (ax.annotate("●", (1, y), (9, 0), color=look["color"], fontsize=9, **spot), ax.annotate(name, (1, y), (21, 0), **spot))
        for name, _, y, look in ends
    ]
    canvas.draw_without_rendering()  # the layout, and with it the places of the ends, is known only now
    here = [ax.transData.transform((x, y)) for _, x, y, _ in ends]
    right = ax.get_window_extent().x1
    moved = _apart([float(y) for _, y in here], 17)
    for (_, _, _, look), label, (x, y), level in zip(ends, labels, here, moved, strict=True):
        for text, offset in zip(label, (9, 21), strict=True):
            text.set_position((offset, level - y))
        leader = ax.transAxes.inverted().transform([(x + 2, y), (right + 8, level)]).T
        style = {"color": look["color"], "linewidth": 1, "alpha": 0.45, "clip_on": False}
        ax.plot(*leader, transform=ax.transAxes, scalex=False, scaley=False, **style)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """The nearest places (least squares) that keep their order and a distance of at least `gap`.

    >>> _apart([0.0, 0.0, 50.0], 10)
    [-5.0, 5.0, 50.0]
    """
    order = np.argsort(places, kind="stable")
    blocks: list[list[float]] = []  # of (sum of place - offset, count): pool adjacent violators
    for rank, i in enumerate(order):
        blocks.append([places[i] - gap * rank, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    level = [total / count for total, count in blocks for _ in range(int(count))]
    moved = np.empty(len(places))
    moved[order] = np.array(level) + gap * np.arange(len(places))
    return [float(m) for m in moved]


def _legend_cols(names: Sequence[str], width: float) -> int:
    return max(1, min(len(names), int(width / (max(map(len, names)) * 7 + 42))))


def _legend_rows(names: Sequence[str], width: float, height: float) -> int:
    """Rows of the legend of these lines; 0 where their names fit at the ends."""
    if len(names) < 2 or (max(map(len, names)) * 7 <= 0.3 * width and len(names) * 17 <= height - 70):
        return 0
    return -(-len(names) // _legend_cols(names, width))


def _legend(canvas: Any, ends: Sequence[Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2.5, label=name, **look) for name, _, _, look in ends]
    cols = _legend_cols([name for name, *_ in ends], canvas.get_figwidth() * 72)
    canvas.legend(handles=handles, loc="outside upper left", ncols=cols)


def spectrum(data: Any, *, xlabel: str = "eigenvalue", logx: bool = False, logy: bool = True, height: float = 300) -> Figure:
    """The density of eigenvalues.

    Args:
        data: eigenvalues `[n]` (their histogram); a density `(t, phi)`, or anything with `t` and `phi`; or several, by name. Of
            phi `[starts, n]` the mean is the line, with the 95 % interval of that mean as a band.
        logx: a logarithmic axis; symmetric-logarithmic where values are not positive.
        logy: a logarithmic density, over six decades at most.

    Raises:
        BadData: (when drawn) no finite eigenvalue.
    """
    named = data if isinstance(data, Mapping) else {"": data}

    def draw(canvas: Any, theme: Theme) -> None:
        ax = canvas.subplots()
        ends = []
        drawn = {name: _density(item, logx) for name, item in named.items()}
        means = {name: np.atleast_2d(phi).mean(0) for name, (_, phi) in drawn.items()}
        seen = np.concatenate([phi[phi > 0] for phi in means.values()] + [np.zeros(0)])
        floor = float(max(seen.min() / 2, seen.max() * 1e-6)) if logy and len(seen) else 0.0
        for i, (name, (t, phis)) in enumerate(drawn.items()):
            look, phi = _look(theme, i), means[name]
            keep = _kept(phi)
            if phis.ndim > 1 and len(phis) > 1:
                low, high = (np.maximum(limit, floor)[keep] for limit in _confidence(phis))
                ax.fill_between(t[keep], low, high, color=look["color"], alpha=0.28, linewidth=0)
            t, phi = t[keep], np.maximum(phi, floor)[keep]
            ax.fill_between(t, phi, floor, color=look["color"], alpha=0.14, linewidth=0)
            ax.plot(t, phi, **look, linewidth=1.5)
            ends.append((name, t[-1], phi[-1], look))
        _axes(ax, xlabel, "density", logx, logy)
        if logx and ax.get_xscale() == "linear":
            ax.set_xscale("symlog", linthresh=max(1e-3 * float(np.abs(ax.get_xlim()).max()), 1e-12))
        ax.margins(x=0)
        ax.set_ylim(bottom=floor)
        if len(ends) > 1:
            _legend(canvas, ends)

    return Figure(draw, " ".join(["density of", xlabel, *map(str, named)]).strip(), height)


def _density(item: Any, logx: bool) -> tuple[np.ndarray, np.ndarray]:
    """`(t, phi)` as given, or the outline of a histogram."""
    if hasattr(item, "phi"):
        item = (item.t, item.phi)
    if isinstance(item, tuple) and len(item) == 2:
        return as_floats(item[0]), as_floats(item[1])
    values = as_floats(item).ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        raise BadData("a spectrum needs at least one finite eigenvalue")
    count = int(np.clip(2 * np.sqrt(len(values)), 8, 80))
    edges = (
        np.geomspace(values.min(), values.max() * (1 + 1e-9), count + 1)
        if logx and values.min() > 0
        else np.histogram_bin_edges(values, count)
    )
    phi, edges = np.histogram(values, edges, density=True)
    return np.repeat(edges, 2)[1:-1], np.repeat(phi, 2)


def picture_grid(images: Mapping[str, Any], *, cols: int | None = None) -> Figure:
    """Pictures by name, side by side, each with its name above it (for a file; on a page use `Page.pictures`)."""
    from sfumato.report.pictures import as_array

    arrays = {name: as_array(image) for name, image in images.items()}
    columns = min(cols or 4, len(arrays))
    rows = -(-len(arrays) // columns)
    tallest = max(a.shape[0] / a.shape[1] for a in arrays.values())

    def draw(canvas: Any, theme: Theme) -> None:
        del theme
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for ax in axes:
            ax.axis("off")
        for ax, (name, array) in zip(axes, arrays.items(), strict=False):
            ax.imshow(array, cmap="gray", vmin=0, vmax=255)
            ax.set_title(textwrap.shorten(name, 40, placeholder="…"), pad=5)

    return Figure(draw, "pictures: " + ", ".join(arrays), lambda width: rows * (width / columns * tallest + 26))
