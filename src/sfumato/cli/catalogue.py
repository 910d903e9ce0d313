"""`sfumato papers` and `sfumato show`: the catalogue for a person, or as JSON for a script. Imports nothing heavy.

On a terminal, tables in the width of the window; in a pipe, one plain line a paper with the slug first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sfumato.catalogue import FAMILIES, Row, find, record, related, search, verdict

STYLES = {"reproduced": "green", "not reproduced": "red", "inconclusive": "yellow", "not run yet": "cyan", "not yet": "dim"}
FULL_WIDTH = 100
"""Below this many columns the listing leaves out year and kind."""


def papers(words: Sequence[str], *, family: str | None = None, built: bool = False, as_json: bool = False) -> None:
    """List the papers in which all words are found."""
    rows = [row for row in search(words, family) if row.built or not built]
    if as_json:
        return _print_json([{**row.as_dict(), "verdict": verdict(row)} for row in rows])
    if not rows:
        asked = " ".join([*words, *([f"--family {family}"] if family else []), *(["--built"] if built else [])])
        return Console(stderr=True, highlight=False).print(f"No paper matches {asked}: `sfumato papers` lists all.")
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in rows:
            print(f"{row.slug:25}  {row.year or '-':4}  {row.family:15}  {row.kind:6}  {verdict(row):14}  {row.summary}")
        return
    if words:
        console.print(_listing(rows, console.width, with_family=True))
    else:
        for name, group in _by_family(rows):
            console.print(Text.assemble("\n", (name, "bold magenta"), "  ", (FAMILIES[name], "dim")))
            console.print(_listing(group, console.width))
    built_count = sum(row.built for row in rows)
    console.print(f"\n[dim]{len(rows)} rows, {built_count} built.  More on one:[/dim] sfumato show {rows[0].slug}")


def _by_family(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for family in FAMILIES:
        if group := [row for row in rows if row.family == family]:
            yield family, group


def _listing(rows: Sequence[Row], width: int, with_family: bool = False) -> Table:
    full = width >= FULL_WIDTH
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(width=25, no_wrap=True)
    if full:
        table.add_column(width=4)
        table.add_column(width=15 if with_family else 6)
    table.add_column(width=14)
    table.add_column(ratio=1)
    for row in rows:
        cells = [Text(row.slug, "bold" if row.built else "")]
        if full:
            cells += [Text(str(row.year or "")), Text(row.family if with_family else row.kind)]
        table.add_row(*cells, _verdict(verdict(row)), Text(row.summary))
    return table


def _verdict(words: str) -> Text:
    return Text(words, style=STYLES.get(words, "yellow"))


def show(slug: str, *, as_json: bool = False) -> None:
    """Print everything that is known of one paper."""
    row, stored = find(slug), record(slug)
    if as_json:
        return _print_json({**row.as_dict(), "verdict": verdict(row), "record": stored})
    console = Console(highlight=False)
    console.print(Text.assemble((row.slug, "bold magenta"), "  ", (row.title, "bold")))
    console.print(Text(_origin(row), "dim"))
    page = Table.grid(padding=(0, 2), expand=True)
    page.add_column(width=8, style="bold")
    page.add_column(ratio=1)
    for label, content in _sections(row, stored):
        page.add_row(label, content)
    console.print()
    console.print(page)


def _origin(row: Row) -> str:
    """Who, when, where, and where it stands in the house."""
    authors = ", ".join(row.authors) + (f" ({row.authors_note})" if row.authors and row.authors_note else "")
    when = row.venue if str(row.year) in row.venue else f"{row.year} ({row.venue})" if row.venue else str(row.year or "")
    arxiv = f"arXiv {row.arxiv}" if row.arxiv else ""
    return " · ".join(filter(None, [authors or row.authors_note, when, arxiv, f"{row.kind} in {row.family}"]))


def _sections(row: Row, stored: dict[str, Any] | None) -> Iterator[tuple[str, RenderableType]]:
    yield "What", Text(row.summary)
    if row.claim:
        yield "Claim", Text(row.claim)
    yield "Verdict", _outcome(row, stored)
    yield "Run", _how_to_run(row)
    if row.settings:
        yield "Settings", _settings(row)
    if row.parts:
        yield "Parts", Text(", ".join(row.parts))
    yield "Scale", Text(row.scale)
    yield "Licence", Text(f"official code: {row.code_licence}")
    if row.fidelity:
        yield "Fidelity", Text("\n").join(Text(f"- {note}") for note in row.fidelity)


def _outcome(row: Row, stored: dict[str, Any] | None) -> RenderableType:
    """The stored verdict of every claim, with the interval of every condition."""
    if not stored or not stored["claims"]:
        return _verdict(verdict(row))
    lines = []
    for claim in stored["claims"]:
        lines.append(Text.assemble(_verdict(claim["verdict"]), f"  {claim['statement']} ({len(claim['figures'])} seeds)"))
        for finding in claim["findings"]:
            lines.append(Text.assemble("  ", _verdict(finding["verdict"]), f"  {finding['condition']}{_interval(finding)}"))
        if claim.get("note"):
            lines.append(Text(f"  {claim['note']}", "dim"))
    source = f"commit {stored['commit']}, " if stored.get("commit") else ""
    lines.append(Text(f"{stored['date']}, {source}{stored['seconds']:.0f} s", "dim"))
    return Text("\n").join(lines)


def _interval(finding: dict[str, Any]) -> str:
    """`: +0.120, 95 % [+0.080, +0.160], margin 0.05`; nothing for an exact property."""
    if finding.get("mean") is None:
        return ""
    low, high = (f"{finding[end]:+.3g}" if finding.get(end) is not None else "?" for end in ("low", "high"))
    margin = f", margin {finding['margin']:g}" if finding.get("margin") else ""
    return f": {finding['mean']:+.3g}, 95 % [{low}, {high}]{margin}"


def _how_to_run(row: Row) -> RenderableType:
    if row.built:
        return Text("\n").join(Text(line, "cyan") for line in row.run)
    near = [r.slug for r in related(row)][:3]
    lines = [Text("not built yet: this row says what it will be")]
    if near:
        lines.append(Text.assemble("built and nearest: ", (", ".join(near), "cyan")))
    lines += [Text(f"then: {line}", "dim") for line in row.run]
    return Text("\n").join(lines)


def _settings(row: Row) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(2):
        table.add_column(no_wrap=True)
    with_preset = any(s.small is not None for s in row.settings)
    if with_preset:
        table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    heads = ["--set", "paper", *(["on a CPU"] if with_preset else []), ""]
    table.add_row(*(Text(head, "dim") for head in heads))
    for setting in row.settings:
        preset = [Text("" if setting.small is None else _value(setting.small))] if with_preset else []
        table.add_row(Text(setting.name, "cyan"), Text(_value(setting.default)), *preset, Text(setting.help))
    return table


def _value(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
