"""The one house style: colours for light and dark, matplotlib settings, and figures that follow the page they stand on.

A `Figure` is a recipe, not a bitmap: a function that draws on a matplotlib figure of a given width. The page asks for a wide and
a narrow SVG, so that letters keep their size on a phone, and every colour in the SVG is a CSS variable (`var(--ink, #1c1e22)`),
so that one drawing serves light and dark. Nothing touches pyplot.

The six series colours keep a distance of at least 10 (OKLab x 100) from each other, as seen with normal vision, protanopia and
deuteranopia (Machado, Oliveira and Fernandes, 2009), and a contrast of at least 3:1 with the paper.

>>> from sfumato.report import figure
>>> parabola = figure(lambda canvas, theme: canvas.subplots().plot([0, 1, 2], [0, 1, 4]), alt="a parabola")
>>> svg = parabola.svg(width=360)
>>> svg.startswith("<svg"), "var(--s1" in svg, "a parabola" in svg
(True, True, True)
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIGHT: Mapping[str, str] = {
    "paper": "#fbfbfb", "surface": "#ffffff", "sunk": "#f1f2f3", "ink": "#1c1e22", "muted": "#5b616b", "line": "#dfe1e5",
    "accent": "#1557a4", "good": "#0b6e5b", "bad": "#a8420c", "open": "#5a5f6c",
    "s1": "#1658a6", "s2": "#dd6a1d", "s3": "#19a28d", "s4": "#6c2653", "s5": "#6b581e", "s6": "#8d79dc",
}  # fmt: skip
DARK: Mapping[str, str] = {
    "paper": "#16181b", "surface": "#1d2024", "sunk": "#121416", "ink": "#e7e8ea", "muted": "#a3a9b3", "line": "#31353c",
    "accent": "#8fb4f2", "good": "#7fd6bd", "bad": "#f2a26b", "open": "#b4bac6",
    "s1": "#4a79d1", "s2": "#cd5709", "s3": "#a4e5cf", "s4": "#d4879a", "s5": "#fdd355", "s6": "#c8a9fd",
}  # fmt: skip
THEMES: Mapping[str, Mapping[str, str]] = {"light": LIGHT, "dark": DARK}
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")
WIDE, NARROW = 940, 360
"""Widths in pixels of a drawing over a whole page, and on a phone."""

Draw = Callable[[Any, Mapping[str, str]], Any]


def css_variables(theme: str) -> str:
    """The colours of a theme as CSS declarations."""
    return "".join(f"--{name}:{colour};" for name, colour in THEMES[theme].items())


@contextmanager
def use_style(theme: str = "light") -> Iterator[Mapping[str, str]]:
    """Matplotlib's settings in the house style inside a `with`, and the theme's colours by role; restored on leaving."""
    import matplotlib

    colours = THEMES[theme]
    with matplotlib.rc_context():
        settings: Any = _settings(colours)
        matplotlib.rcParams.update(settings)
        yield colours


def _settings(colours: Mapping[str, str]) -> dict[str, Any]:
    from cycler import cycler

    line, muted, ink = colours["line"], colours["muted"], colours["ink"]
    return {
        "figure.dpi": 72, "figure.facecolor": "none", "savefig.facecolor": "none", "savefig.edgecolor": "none",
        "font.family": "sans-serif", "font.size": 12.5, "text.color": ink, "text.parse_math": False,
        "axes.facecolor": "none", "axes.edgecolor": line, "axes.linewidth": 1, "axes.labelcolor": muted, "axes.labelsize": 12.5,
        "axes.titlesize": 12.5, "axes.titlecolor": muted, "axes.titlelocation": "left", "axes.titlepad": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
        "axes.axisbelow": True, "axes.grid.axis": "y", "grid.color": line, "grid.linewidth": 1,
        "axes.prop_cycle": cycler(color=[colours[s] for s in SERIES]),
        "xtick.color": line, "ytick.color": line, "xtick.labelcolor": muted, "ytick.labelcolor": muted,
        "xtick.major.size": 4, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
        "xtick.labelsize": 12, "ytick.labelsize": 12, "lines.linewidth": 2, "lines.solid_capstyle": "round",
        "lines.dash_capstyle": "butt", "lines.scale_dashes": True, "legend.frameon": False, "legend.fontsize": 12.5,
        "legend.handlelength": 1.4, "legend.handletextpad": 0.5, "legend.columnspacing": 1.4, "legend.borderaxespad": 0,
        "svg.fonttype": "none", "svg.hashsalt": "sfumato", "svg.image_inline": True, "image.interpolation": "nearest",
        "path.simplify_threshold": 0.25,
    }  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A drawing that can be made at any width, in either theme.

    Args:
        draw: `draw(canvas, theme)`: draws on a `matplotlib.figure.Figure` with the colours of a theme, by role.
        alt: what it shows, for those who cannot see it.
        height: in pixels, or a function of the width in pixels.
    """

    draw: Draw
    alt: str
    height: float | Callable[[float], float] = 320

    def svg(self, width: float = WIDE, *, prefix: str = "f") -> str:
        """One `<svg>` element whose colours are CSS variables with the light theme as fallback.

        Args:
            width: in pixels.
            prefix: what its ids begin with; unique among the drawings of a page.
        """
        buffer = io.StringIO()
        with use_style("light") as theme:
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self._canvas(width, theme).savefig(buffer, format="svg", metadata=nothing)
        return _adapt(buffer.getvalue(), self.alt, prefix)

    def png(self, path: str | Path, *, width: float = WIDE, theme: str = "light", scale: float = 2) -> Path:
        """Write it as a PNG of `width * scale` pixels, on the theme's paper."""
        with use_style(theme) as colours:
            self._canvas(width, colours).savefig(path, format="png", dpi=72 * scale, facecolor=colours["paper"])
        return Path(path)

    def _canvas(self, width: float, theme: Mapping[str, str]) -> Any:
        from matplotlib.figure import Figure as Canvas
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        height = self.height(width) if callable(self.height) else self.height
        # Points are pixels here: at 72 dpi a 12-point letter is 12 CSS pixels high.
        layout = ConstrainedLayoutEngine(w_pad=1 / 72, h_pad=3 / 72)
        canvas = Canvas(figsize=(width / 72, height / 72), dpi=72, layout=layout)
        self.draw(canvas, theme)
        return canvas


def figure(draw: Draw, *, alt: str, height: float | Callable[[float], float] = 320) -> Figure:
    """A `Figure` of one's own: `draw(canvas, theme)` draws on a `matplotlib.figure.Figure` in the house style."""
    return Figure(draw, alt, height)


def _adapt(svg: str, alt: str, prefix: str) -> str:
    """Matplotlib's file as an element of a page: CSS colours, the page's letters, no global style, no foreign ids."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', body)
    inner = body[body.index(">") + 1 :]
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inner, flags=re.S)
    inner = re.sub(r"<!--.*?-->", "", inner, flags=re.S)
    inner = re.sub(r'style="[^"]*"', lambda m: _restyle(m[0]), inner)
    inner = re.sub(r'\s(?:d|x|y|transform)="[^"]*"', lambda m: _short(m[0]), inner)
    inner = _own_ids(inner, prefix)
    inner = re.sub(r">\s*\n\s*<", "><", inner)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0] if view else ""} '
        f'class="plot" role="img" aria-label="{html.escape(alt)}" font-family="system-ui, sans-serif" stroke-linejoin="round">'
    )
    return head + inner.strip()


def _restyle(style: str) -> str:
    """Colours by role, and no font family: letters are the page's."""
    roles = {colour: role for role, colour in LIGHT.items()}
    style = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{roles[m[0]]}, {m[0]})" if m[0] in roles else m[0], style)
    style = re.sub(r"font-family:[^;\"]*;?\s*", "", style)
    return re.sub(r"font:\s*([\d.]+px)[^;\"]*", r"font-size: \1", style)


def _short(numbers: str) -> str:
    """Two decimals of a pixel are enough, and a line break is a space."""
    rounded = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), numbers)
    rounded = re.sub(r' transform="rotate\(-?0 [^"]*', ' transform="rotate(0)', rounded)
    return re.sub(r"\s*\n", " ", rounded).replace(' transform="rotate(0)"', "")


def _own_ids(svg: str, prefix: str) -> str:
    """Ids that are referred to get a prefix; the others go."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", svg)
