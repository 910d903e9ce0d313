"""One report, one file: a page of blocks (text, tables, figures, pictures, before/after sliders, verdicts) as HTML.

Everything stands inside the file: pictures are data URIs, figures are SVG, style and script are inline, and a content security
policy forbids any request. Whatever a caller passes is escaped.

>>> from sfumato.report import Page
>>> page = Page("Denoising", subtitle="photos, sigma 25", facts={"seed": 0})
>>> _ = page.section("Figures").table([{"arm": "C-BSN", "PSNR": 31.2}, {"arm": "<b>", "PSNR": 28.0}], highlight={"PSNR": "max"})
>>> html = page.html()
>>> "&lt;b&gt;" in html, "<b>" in html, "http://" in html.replace("http://www.w3.org/", "")
(True, False, False)
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from typing_extensions import Self

from sfumato.errors import BadData
from sfumato.report.pictures import ImageLike, encode
from sfumato.report.plots import interval_text, number
from sfumato.report.style import NARROW, WIDE, Figure, css_variables


class Page:
    """A report under construction; every method but `html` and `write` gives the page back.

    Args:
        title: the heading.
        subtitle: one line below it.
        facts: what a reader wants to know first, by name: shown as a row of small figures.
    """

    def __init__(self, title: str, *, subtitle: str | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.title, self.subtitle = title, subtitle
        self.facts = {name: _shown(value) for name, value in (facts or {}).items()}
        self.sections: list[dict[str, Any]] = []
        self._drawings = 0

    def section(self, title: str, *, intro: str | None = None) -> Self:
        """Begin a section; the blocks that follow stand in it."""
        self.sections.append({"title": title, "id": f"section-{len(self.sections) + 1}", "intro": prose(intro), "blocks": []})
        return self

    def text(self, text: str) -> Self:
        """Paragraphs. Blank lines part them; `**bold**`, `*italic*`, `` `code` ``, `- lists` and `[text](https://…)` work.

        Args:
            text: escaped, unless it is a `markupsafe.Markup`.
        """
        return self._add("text", body=prose(text))

    def table(
        self, rows: Iterable[Mapping[str, Any] | Sequence[Any]], columns: Sequence[str] | None = None, caption: str | None = None,
        *, highlight: Mapping[str, str] | None = None, folded: str | None = None,
    ) -> Self:  # fmt: skip
        """A table; columns of numbers share their decimals and stand right.

        Args:
            rows: mappings by column, or sequences.
            columns: their names and order; default: the keys of the first row.
            caption: what it shows.
            highlight: `{column: "max" | "min"}`: the best value of these columns is marked.
            folded: a line to click that opens the table.
        """
        rows = list(rows)
        if columns is None:
            columns = list(rows[0]) if rows and isinstance(rows[0], Mapping) else []
        cells = [[row.get(c) for c in columns] if isinstance(row, Mapping) else list(row) for row in rows]
        width = max([len(columns), *map(len, cells)]) if cells else len(columns)
        turned = [[row[i] if i < len(row) else None for row in cells] for i in range(width)]
        best = [_best(column, (highlight or {}).get(name)) for name, column in zip(columns, turned, strict=False)]
        return self._add(
            "table", columns=columns, caption=caption, folded=folded, numeric=[_numeric(c) for c in turned],
            best=best + [set()] * (width - len(best)), rows=list(zip(*map(_formatted, turned), strict=True)),
        )  # fmt: skip

    def figure(self, figures: Figure | Sequence[Figure], caption: str | None = None) -> Self:
        """A figure over the whole width, or several small ones side by side."""
        several = [figures] if isinstance(figures, Figure) else list(figures)
        if len(several) == 1:
            drawn = {"narrow": self._svg(several[0], NARROW), "wide": self._svg(several[0], WIDE)}
            return self._add("figure", drawn=drawn, caption=caption)
        cols = 2 if len(several) in (2, 4) else 3
        small = [self._svg(f, {2: 400, 3: 310}[cols]) for f in several]
        return self._add("figure", small=small, cols=cols, caption=caption) if small else self

    def pictures(
        self, images: Mapping[str, ImageLike], caption: str | None = None, *, zoom: bool = True, cols: int | None = None
    ) -> Self:
        """Pictures by name; a click opens them all, zoomed and moved in step.

        Args:
            images: `{label: [C, H, W] in [0, 1]}`, PIL images or paths.
            caption: what they show.
            zoom: whether they open.
            cols: pictures a row on a wide screen.
        """
        shown = {label: encode(image) for label, image in images.items()}
        if not shown:
            return self
        cols = cols or {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 6: 3, 9: 3}.get(len(shown), 4)
        return self._add("pictures", images=shown, caption=caption, zoom=zoom, cols=cols)

    def slider(
        self, before: ImageLike, after: ImageLike | Mapping[str, ImageLike], labels: tuple[str, str] = ("before", "after"),
        caption: str | None = None, *, reference: ImageLike | None = None, reference_label: str = "reference",
    ) -> Self:  # fmt: skip
        """Two pictures under a divider that a finger, a mouse or the arrow keys move; several candidates become tabs.

        Args:
            before: the picture on the left.
            after: the picture on the right, or `{label: picture}` of several candidates.
            labels: names of the left and (where `after` is one picture) the right one.
            caption: what they show.
            reference: what it should be; one more tab.
            reference_label: its name.
        """
        named = dict(after) if isinstance(after, Mapping) else {labels[1]: after}
        if not named:
            raise BadData("a slider needs at least one picture to compare with")
        right = {label: encode(image) for label, image in named.items()}
        if reference is not None:
            right[reference_label] = encode(reference)
        left = encode(before)
        largest = max([left, *right.values()], key=lambda p: p.width * p.height)
        display = max(largest.width * max(1, 720 // largest.width), 640)
        return self._add(
            "slider", before=left, before_label=labels[0], after=right, caption=caption, size=largest, display=display,
        )  # fmt: skip

    def code(self, text: str, caption: str | None = None) -> Self:
        """Text as it is, in letters of one width."""
        return self._add("code", code=text, caption=caption)

    def verdict(
        self, verdict: str, statement: str = "", *, interval: tuple[float, float, float] | None = None,
        margin: float | None = None, note: str = "",
    ) -> Self:  # fmt: skip
        """A badge that says how a claim came out.

        Args:
            verdict: "reproduced", "not reproduced" or "inconclusive" (or the `Verdict` of that value).
            statement: what was claimed.
            interval: mean difference, lower and upper limit.
            margin: what was asked of the mean.
            note: why it came out so.
        """
        told = str(getattr(verdict, "value", verdict))
        kind = {"reproduced": "good", "not reproduced": "bad"}.get(told, "open")
        figures = None
        if interval is not None:
            mean, low, high = interval_text(*interval)
            figures = f"mean difference {mean}, 95 % interval {low} to {high}" + (f", margin {number(margin)}" if margin else "")
        return self._add("verdict", verdict=told, mood=kind, statement=statement, figures=figures, note=prose(note))

    def html(self) -> str:
        """The whole page."""
        script = _file("page.js")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        themes = {name: Markup(css_variables(name)) for name in ("light", "dark")}
        return str(_template().render(page=self, css=Markup(_file("page.css")), script=Markup(script), digest=digest, **themes))

    def write(self, path: str | Path) -> Path:
        """Write it as one file, whole or not at all, and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(self.html(), encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    def _add(self, kind: str, **block: Any) -> Self:
        if not self.sections:
            self.sections.append({"title": None, "id": "section-0", "intro": None, "blocks": []})
        self.sections[-1]["blocks"].append({"kind": kind, **block})
        return self

    def _svg(self, figure: Figure, width: int) -> Markup:
        self._drawings += 1
        return Markup(figure.svg(width, prefix=f"f{self._drawings}"))


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("sfumato.report", "templates")
    house = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return house.get_template("page.html.j2")


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def prose(text: str | None) -> Markup | None:
    """Paragraphs, lists, bold, italic, code and links as HTML; everything else is escaped.

    >>> prose("**So** it is: `a < b`")
    Markup('<p><strong>So</strong> it is: <code>a &lt; b</code></p>')
    """
    if not text or isinstance(text, Markup):
        return text or None
    parts = []
    for part in re.split(r"\n\s*\n", str(text).strip()):
        lines = part.strip().splitlines()
        if all(re.match(r"\s*[-*] ", line) for line in lines):
            items = "".join(f"<li>{_inline(re.sub(r'^[ ]*[-*] ', '', line))}</li>" for line in lines)
            parts.append(f"<ul>{items}</ul>")
        else:
            parts.append(f"<p>{_inline(part.strip())}</p>")
    return Markup("".join(parts))


def _inline(text: str) -> str:
    """Every second part is code, in which nothing is marked up."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"<code>{escape(part)}</code>" if i % 2 else _marked(str(escape(part))) for i, part in enumerate(parts))


def _marked(safe: str) -> str:
    """Bold, italic and links in text that is escaped already."""
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", safe)
    safe = re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?!\w)", r"<em>\1</em>", safe)
    return re.sub(r"\[([^\]]+)\]\((https?://[^\s)]+)\)", r'<a href="\2" rel="noopener noreferrer">\1</a>', safe)


def _shown(value: Any) -> str:
    """A single value for a reader."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return number(value) if isinstance(value, float) else str(value)


def _numbers(column: Sequence[Any]) -> list[float]:
    return [float(v) for v in column if isinstance(v, (int, float)) and not isinstance(v, bool) and v == v]


def _numeric(column: Sequence[Any]) -> bool:
    return bool(_numbers(column)) and all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in column)


def _formatted(column: Sequence[Any]) -> list[str]:
    """Decimals are shared where the sizes in a column are alike (within a factor of 1000)."""
    values = [abs(v) for v in _numbers(column) if v and abs(v) != float("inf")]
    if not _numeric(column) or not values or all(isinstance(v, int) for v in column) or max(values) / min(values) > 1000:
        return [_shown(v) for v in column]
    if min(values) < 1e-3 or max(values) >= 1e6:
        return [_shown(v) for v in column]
    most = 0 if max(values) >= 1000 else next(d for d in (4, 3, 2, 1) if max(values) < 10 ** (4 - d) or d == 1)
    decimals = next(d for d in range(most + 1) if d == most or all(round(v, d) == round(v, most) for v in values))
    return ["–" if v is None or v != v else f"{v:,.{decimals}f}".replace("-", "−").replace("inf", "∞") for v in column]


def _best(column: Sequence[Any], how: str | None) -> set[int]:
    """Rows of the best value."""
    values = _numbers(column)
    if how not in ("max", "min") or not values:
        return set()
    top = max(values) if how == "max" else min(values)
    return {i for i, v in enumerate(column) if isinstance(v, (int, float)) and v == top}
