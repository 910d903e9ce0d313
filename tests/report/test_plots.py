"""Lines keep their envelope and their names; numbers read well."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadData
from sfumato.report.plots import _apart, _kept, curves, interval_text, number, picture_grid, spectrum


def drawn(figure, width=940):
    from sfumato.report.style import LIGHT, use_style

    with use_style("light"):
        canvas = figure._canvas(width, LIGHT)
        canvas.draw_without_rendering()
        return canvas


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (31.176, "31.18"),
        (-3.0, "−3"),
        (4000, "4,000"),
        (3e-4, "3e-4"),
        (float("nan"), "–"),
        (-np.inf, "−∞"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_interval_has_the_decimals_of_its_width():
    assert interval_text(0.02, 0.01, 0.03) == ("+0.020", "+0.010", "+0.030")
    assert interval_text(-120.3, -150.2, -90.4) == ("−120", "−150", "−90")
    assert interval_text(1.0, -np.inf, np.inf) == ("+1", "−∞", "∞")
    assert interval_text(2.0, 2.0, 2.0) == ("+2", "+2", "+2")


def test_the_mean_and_the_band_over_seeds():
    from scipy.stats import t

    ys = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 8.0]])
    ax = drawn(curves({"a": ([0, 1, 2], torch.tensor(ys))})).axes[0]
    assert np.allclose(ax.lines[0].get_ydata(), ys.mean(0))
    edge = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (edge.min(), edge.max()) == (1.0, 8.0)
    ax = drawn(curves({"a": ([0, 1, 2], ys)}, band="ci")).axes[0]
    half = t.ppf(0.975, 1) * ys.std(0, ddof=1) / np.sqrt(2)
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx((ys.mean(0) + half).max())
    assert not drawn(curves({"a": ([0, 1, 2], ys)}, band=None)).axes[0].collections


def test_values_that_are_not_finite_are_left_out():
    ax = drawn(curves({"a": ([1, 2, 3, 4], [1.0, float("nan"), float("inf"), 2.0]), "b": ([1], [float("nan")])})).axes[0]
    assert ax.lines[0].get_xdata().tolist() == [1, 4]


def test_a_long_line_is_thinned_but_keeps_its_peaks():
    x, y = np.arange(50_000.0), np.sin(np.arange(50_000) / 900)
    y[31_234], y[40_001] = 9, -9
    keep = _kept(y)
    assert len(keep) <= 702
    assert {9, -9} <= set(y[keep])
    assert (keep[0], keep[-1]) == (0, 49_999)
    assert (np.diff(keep) > 0).all()
    assert len(curves({"loss": (x, y)}, smooth=900).svg()) < 60_000
    assert len(curves({"loss": (x, np.stack([y, y + 1]))}).svg()) < 60_000


def test_an_infinite_seed_does_not_widen_the_band():
    ys = [[1.0, 2.0], [1.0, float("inf")]]
    ax = drawn(curves({"a": ([0, 1], ys)})).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [1, 2]
    assert np.isfinite(ax.collections[0].get_paths()[0].vertices).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-500, 500), min_size=1, max_size=12), st.floats(1, 40))
def test_names_move_apart_and_keep_their_order(places, gap):
    moved = np.array(_apart(places, gap))
    order = np.argsort(places, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-6).all()
    assert np.mean(moved) == pytest.approx(np.mean(places), abs=1e-6)
    if (np.diff(np.sort(places)) >= gap).all():
        assert np.allclose(moved, places)


@pytest.mark.parametrize("width", [360, 940])
def test_every_name_is_on_the_figure_once(width):
    names = ["blind spot", "wavelet", "a name that is rather long for a phone"]
    series = {name: ([0, 1, 2], [0, 1, 1 + i / 100]) for i, name in enumerate(names)}
    svg = curves(series, xlabel="step", ylabel="PSNR").svg(width)
    for name in [*names, "step", "PSNR"]:
        assert svg.count(f">{name}<") == 1
    alone = curves({"only": ([0, 1], [0, 1])}).svg(width)
    assert ">only<" not in alone


def test_names_stay_inside_the_figure():
    canvas = drawn(curves({f"arm {i}": ([0, 1], [0, i / 10]) for i in range(6)}), 940)
    ends = [text.get_window_extent() for text in canvas.axes[0].texts]
    assert max(e.x1 for e in ends) <= 940
    assert min(e.y0 for e in ends) >= 0


def test_logarithmic_axes_where_values_allow():
    positive = curves({"a": ([1, 10, 100], [1e-3, 1, 10])}, logx=True, logy=True)
    ax = drawn(positive).axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert drawn(curves({"a": ([0, 1], [-1, 1])}, logx=True, logy=True)).axes[0].get_yscale() == "linear"


def test_axes_may_begin_at_zero():
    line = {"a": ([3, 4], [5.0, 6.0])}
    ax = drawn(curves(line, zero="xy")).axes[0]
    assert (ax.get_xlim()[0], ax.get_ylim()[0]) == (0, 0)
    ax = drawn(curves(line, zero="y")).axes[0]
    assert ax.get_xlim()[0] > 2
    assert ax.get_ylim()[0] == 0
    assert drawn(curves(line)).axes[0].get_ylim()[0] > 4


def test_the_area_of_a_histogram_is_one():
    from scipy.integrate import trapezoid

    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    ax = drawn(spectrum(values, logy=False)).axes[0]
    x, y = ax.lines[0].get_xdata(), ax.lines[0].get_ydata()
    assert trapezoid(y, x) == pytest.approx(1, abs=0.01)


def test_a_density_with_t_and_phi():
    density = type("Density", (), {"t": np.linspace(0, 1, 9), "phi": np.linspace(1, 2, 9)})()
    ax = drawn(spectrum({"early": density, "late": (density.t, density.phi * 2)})).axes[0]
    assert np.allclose(ax.lines[1].get_ydata(), density.phi * 2)
    assert ">late<" in spectrum({"early": density, "late": density}).svg()


def test_negative_eigenvalues_on_a_logarithmic_axis():
    assert drawn(spectrum([-1.0, 0.0, 1.0, 100.0] * 10, logx=True)).axes[0].get_xscale() == "symlog"


def test_a_spectrum_of_several_starts_has_a_band():
    t, phi = np.linspace(0, 1, 30), 1 + np.random.default_rng(0).random((4, 30))
    ax = drawn(spectrum((t, phi), logy=False)).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), phi.mean(0))
    assert len(ax.collections) == 2
    assert len(drawn(spectrum((t, phi.mean(0)), logy=False)).axes[0].collections) == 1


def test_an_empty_spectrum_is_refused():
    with pytest.raises(BadData, match="eigenvalue"):
        spectrum([float("nan")]).svg()


def test_picture_grid():
    svg = picture_grid({"clean": torch.rand(3, 8, 8), "grey": torch.rand(8, 8)}).svg()
    assert svg.count("data:image/png") == 2
    assert ">grey<" in svg
