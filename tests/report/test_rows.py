"""Intervals, seeds and bars stand where their numbers say."""

import math

import numpy as np
import pytest

from sfumato.report.rows import bars, dots, intervals
from sfumato.report.style import LIGHT, use_style

ROW = {"label": "A above B", "mean": 0.8, "low": 0.2, "high": 1.4, "margin": 0.5, "dots": [0.6, 1.0], "verdict": "reproduced"}


def drawn(figure, width=940):
    with use_style("light"):
        canvas = figure._canvas(width, LIGHT)
        canvas.draw_without_rendering()
        return canvas


def lines(ax, colour):
    return [line.get_xdata() for line in ax.lines if line.get_color() == LIGHT[colour]]


@pytest.mark.parametrize("width", [360, 940])
def test_an_interval_row(width):
    (ax,) = drawn(intervals([ROW]), width).axes
    interval, mean = lines(ax, "good")
    assert list(interval) == [0.2, 1.4]
    assert list(mean) == [0.8]
    assert [list(x) for x in lines(ax, "ink")] == [[0.6, 1.0]]
    assert [list(x) for x in lines(ax, "accent")] == [[0.5, 0.5]]
    assert [list(x) for x in lines(ax, "muted")] == [[0, 0]]
    told = [text.get_text() for text in ax.texts]
    assert {"A above B", "+0.80 [+0.20, +1.40]", "margin 0.5"} <= set(told)


def test_the_verdict_sets_the_colour():
    rows = [{**ROW, "verdict": v} for v in ("reproduced", "not reproduced", "inconclusive", None)]
    (ax,) = drawn(intervals(rows)).axes
    assert all(len(lines(ax, colour)) == 2 for colour in ("good", "bad", "open", "s1"))


def test_unlike_sizes_get_an_axis_each():
    assert len(drawn(intervals([ROW, {**ROW, "mean": 2.0}])).axes) == 1
    small = {"label": "accuracy", "mean": 0.02, "low": 0.01, "high": 0.03}
    first, second = drawn(intervals([ROW, small])).axes
    assert second.get_xlim()[1] < 0.05 < first.get_xlim()[1]


def test_an_interval_without_ends_reaches_over_the_axis():
    (ax,) = drawn(intervals([{**ROW, "low": -math.inf, "high": math.inf}])).axes
    assert list(lines(ax, "good")[0]) == list(ax.get_xlim())
    figure = intervals([{"label": "x", "mean": 1.0}, {"label": "left out", "mean": None}])
    assert "left out" not in figure.svg()
    assert intervals([]).svg().startswith("<svg")


@pytest.mark.parametrize("width", [360, 940])
def test_long_labels_wrap_inside_the_figure(width):
    canvas = drawn(intervals([{**ROW, "label": "word " * 40}, ROW]), width)
    for text in canvas.axes[0].texts:
        assert text.get_window_extent().x1 <= width + 1
    boxes = sorted(
        (t.get_window_extent() for t in canvas.axes[0].texts if "word" in t.get_text() or "A above" in t.get_text()),
        key=lambda b: -b.y1,
    )
    assert boxes[0].y0 > boxes[1].y1  # the next label begins below


def test_dots_show_every_seed_and_the_mean():
    seeds = {"A": [1.0, 2.0, 6.0], "B": [0.0, 1.0, 2.0]}
    (ax,) = drawn(dots(seeds, xlabel="score")).axes
    assert [list(x) for x in lines(ax, "s1")] == [[1, 2, 6], [0, 1, 2]]
    assert [x[0] for x in lines(ax, "ink")] == [3.0, 1.0]
    assert np.array_equal(np.stack(lines(ax, "muted")), [[1, 0], [2, 1], [6, 2]])
    assert not lines(drawn(dots(seeds, paired=False)).axes[0], "muted")
    assert not lines(drawn(dots({"A": [1.0], "B": [1.0, math.nan]})).axes[0], "muted")


def test_bars_are_as_long_as_their_means():
    (ax,) = drawn(bars({"A": [1.0, 3.0], "B": 5.0}, highlight="B")).axes
    assert [patch.get_width() for patch in ax.patches] == [2.0, 5.0]
    assert {text.get_text() for text in ax.texts} == {"2", "5"}
    assert ax.yaxis_inverted()
