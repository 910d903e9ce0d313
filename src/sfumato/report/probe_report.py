"""The page of a probe: what it says, figures with their errors, plots, what was done to model and data, and how to run it again.

>>> import pathlib, tempfile
>>> from sfumato.instruments import Findings
>>> from sfumato.report import write_probe_report
>>> found = Findings({}, {"trace": (12.3456, 0.2)}, "It is curved.", about={"probe": "curvature"})
>>> write_probe_report(found, pathlib.Path(tempfile.mkdtemp()) / "report.html").name
'report.html'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato import report
from sfumato.instruments.findings import Findings, Pictures, Plot, Table
from sfumato.report.page import Page
from sfumato.report.plots import number
from sfumato.report.run_report import duration
from sfumato.report.style import Figure


def write_probe_report(found: Findings, path: str | Path, *, command: str | None = None) -> Path:
    """Write the page of findings and return its path.

    Args:
        found: as `sfumato.probe` returns them.
        path: where the page goes.
        command: how to run it again, to be shown.
    """
    about, models = found.about, found.about.get("models", [])
    kind = str(about.get("probe", "probe")).replace("-", " ").capitalize()
    page = Page(
        f"{kind} of {' and '.join(dict.fromkeys(str(m.get('model')) for m in models))}",
        subtitle=", ".join(f"on {m['data']}" for m in models[:1]),
        facts={name: with_error(value) for name, value in found.headline.items()},
    )
    if found.verdict:
        page.section("What it says").text(found.verdict)
    for section in found.sections:
        page.section(section.title, intro=section.text)
        for block in section.blocks:
            _show(page, block)
    page.section("How it was measured")
    if found.notes:
        page.text("\n".join(f"- {note[:1].upper()}{note[1:]}." for note in found.notes))
    if command:
        page.code(command, "To run it again.")
    page.table(_rows(about), ["", "value"], folded="Model, data, settings and time")
    return page.write(path)


def with_error(value: Any) -> str:
    """A figure of a headline: a number, or a value and its error with as many digits as the error deserves.

    >>> with_error((123.4567, 0.0312)), with_error((2.0, float("nan"))), with_error(1234.5), with_error((3.123456, 0.0))
    ('123.457 ± 0.031', '2', '1,234', '3.123 ± 0')
    """
    if not isinstance(value, tuple):
        return number(value) if isinstance(value, float) else str(value)
    middle, error = value
    if not math.isfinite(error) or not math.isfinite(middle):
        return number(middle)
    digits = 1 - math.floor(math.log10(error)) if error else 0
    size = abs(middle)
    if error and 1e-3 <= size < 1e7 and 0 <= digits <= 4:
        return f"{middle:,.{digits}f} ± {error:.{digits}f}".replace("-", "−")
    return f"{number(middle)} ± {number(float(f'{error:.2g}'))}"


def _show(page: Page, block: Table | Plot | Pictures | Sequence[Plot]) -> None:
    if isinstance(block, Table):
        page.table(block.rows, caption=block.caption)
    elif isinstance(block, Pictures):
        page.pictures(block.images, block.caption)
    else:
        plots = [block] if isinstance(block, Plot) else list(block)
        page.figure([_figure(plot) for plot in plots], " ".join(filter(None, (plot.caption for plot in plots))) or None)


def _figure(plot: Plot) -> Figure:
    figure: Figure = getattr(report, plot.kind)(plot.data, **plot.options)
    return figure


def _rows(about: Mapping[str, Any]) -> list[list[str]]:
    """Everything that would be needed to compare two pages."""
    found: list[list[str]] = []
    models = about.get("models", [])
    for i, facts in enumerate(models):
        which = f" {'AB'[i]}" if len(models) > 1 else ""
        found += [[f"{name}{which}", _flat(value)] for name, value in facts.items()]
    found += [["seed", _flat(about.get("seed"))], ["minutes allowed", _flat(about.get("minutes"))]]
    for part in ("settings", "plan"):
        found += [[name, _flat(value)] for name, value in about.get(part, {}).items()]
    found += [[f"time, {name}", duration(value)] for name, value in about.get("seconds", {}).items()]
    return [*found, ["version", str(about.get("version", "–"))]]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_flat(v)}" for k, v in value.items())
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
