"""Colours keep apart for all eyes and stand out from the paper; a figure follows the page's theme."""

from itertools import combinations

import numpy as np
import pytest

from sfumato.report.style import SERIES, THEMES, figure, use_style

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("sight", SIGHT)
def test_series_colours_are_told_apart(theme, sight):
    seen = [oklab(np.array(SIGHT[sight]) @ linear(THEMES[theme][s])) for s in SERIES]
    assert min(100 * np.linalg.norm(a - b) for a, b in combinations(seen, 2)) >= 10


@pytest.mark.parametrize("theme", THEMES)
def test_contrast_is_enough(theme):
    colours = THEMES[theme]
    assert min(contrast(colours[s], colours["paper"]) for s in SERIES) >= 3
    for ground in ("paper", "surface", "sunk"):
        assert min(contrast(colours[text], colours[ground]) for text in ("ink", "muted", "accent", "good", "bad", "open")) >= 4.5


def test_style_is_left_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with use_style("dark") as theme:
        assert matplotlib.rcParams["text.color"] == theme["ink"] == THEMES["dark"]["ink"]
    assert dict(matplotlib.rcParams) == before


def line(canvas, theme):
    canvas.subplots().plot([0, 1], [0, 1], color=theme["s2"], label="<script>alert(1)</script>")
    canvas.axes[0].legend()


def test_svg_has_no_ground_and_no_fixed_colours():
    svg = figure(line, alt='a "line" <b>').svg(width=400, prefix="x7")
    assert "background" not in svg
    assert "#ffffff" not in svg
    assert "fill: white" not in svg
    assert "<style" not in svg  # a style element would hold for the whole page
    colours = {c for theme in (THEMES["light"],) for c in theme.values()}
    bare = svg
    for colour in colours:
        bare = bare.replace(f", {colour})", ")")
    assert "#" not in bare.replace('href="#', "").replace("url(#", "").replace("&#", "")
    assert "var(--s2, #dd6a1d)" in svg
    assert "var(--ink" in svg


def test_svg_escapes_and_owns_its_ids():
    svg = figure(line, alt='a "line" <b>').svg(width=400, prefix="x7")
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg
    assert 'aria-label="a &quot;line&quot; &lt;b&gt;"' in svg
    ids = [part.split('"')[0] for part in svg.split(' id="')[1:]]
    assert ids
    assert all(i.startswith("x7-") for i in ids)
    assert len(ids) == len(set(ids))
    assert {part.split(")")[0] for part in svg.split("url(#")[1:]} <= set(ids)


def test_svg_is_well_formed_and_repeatable():
    from xml.etree import ElementTree

    drawn = figure(line, alt="line", height=lambda width: width / 2)
    svg = drawn.svg(width=500)
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") == "0 0 500 250"
    assert drawn.svg(width=500) == svg


def test_dollar_signs_are_no_mathematics():
    svg = figure(lambda canvas, theme: canvas.text(0, 0, "a_$run$_^{"), alt="").svg()
    assert "a_$run$_^{" in svg


@pytest.mark.parametrize("theme", THEMES)
def test_png_stands_on_the_paper(tmp_path, theme):
    from PIL import Image

    with Image.open(figure(line, alt="", height=100).png(tmp_path / "a.png", width=200, theme=theme, scale=2)) as image:
        assert image.size == (400, 200)
        assert image.convert("RGB").getpixel((0, 0)) == tuple(int(THEMES[theme]["paper"][i : i + 2], 16) for i in (1, 3, 5))
