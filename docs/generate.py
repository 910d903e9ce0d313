"""Pages that are made from facts when the site is built: one a built paper, a table of all papers, one a room of parts, examples.

The facts are the catalogue, the stored records and the source, read by `ast`: nothing heavy is imported, but by the pages of kept
comparisons. MkDocs calls the two hooks at the end (`hooks:` in mkdocs.yml); the rest is text in, text out.
"""

from __future__ import annotations

import ast
import functools
import html
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sfumato import catalogue
from sfumato.catalogue import FAMILIES, Row

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

SOURCE = Path(catalogue.__file__).parent.parent
ROOT = Path(__file__).resolve().parent.parent
RACES = ROOT / "benchmarks" / "results"
COMPARISONS = ROOT / "docs" / "comparisons"
EXAMPLES = ROOT / "examples"

PARTS = {
    "masks": "What is hidden, and what fills the holes.",
    "physics": "Operators that degrade pictures, and their noise.",
    "nn": "Layers and networks.",
    "losses": "Losses, over all or over what was hidden.",
    "optim": "Optimizers, schedules, averages of weights.",
    "attacks": "Perturbations that a model should resist.",
    "diffusion": "Noise schedules, objectives and samplers.",
    "metrics": "How good a picture, a set of pictures or a prediction is.",
    "sparsity": "Gates, pruning and sparse recovery.",
    "probes": "What a trained model does: curvature, spectra, representations.",
    "data": "Data from wherever it lies, and samples that need no download.",
}
AROUND = {
    "engine": "Training, run folders, checkpoints and the laboratory of the claims.",
    "instruments": "Probes of any model on any data, ready to run.",
    "report": "Self-contained pages, plots and pictures.",
}
ROOMS = PARTS | AROUND
MOODS = {"reproduced": "good", "not reproduced": "bad", "inconclusive": "open"}
COMPARISON_MOODS = {"better": "good", "worse": "bad"}
RACE_MOODS = {"faster": "good", "within the limit": "good", "slower": "bad", "above the limit": "bad", "even": "open"}


def pages() -> dict[str, str]:
    """Every generated file: its place in the site and its text."""
    rows = list(catalogue.load().values())
    rooms = [room for room in ROOMS if public_names(room)]
    return {
        "papers/index.md": table_page(rows),
        **{f"papers/{row.slug}.md": paper_page(row, catalogue.record(row.slug)) for row in rows if row.built},
        "examples.md": examples_page(sorted(EXAMPLES.glob("*.py"))),
        "races.md": races_page(races()),
        "comparisons.md": comparisons_page(comparisons()),
        "reference/index.md": reference_index(rooms),
        **{f"reference/{room}.md": reference_page(room) for room in rooms},
        "assets/colours.css": colours(),
    }


# ---- papers


def paper_page(row: Row, record: Mapping[str, Any] | None) -> str:
    """All that is known of a built paper."""
    module = row.module.partition(":")[0]
    own = "\n".join(f"::: {module}.{name}\n" for name in definitions(module))
    sections = {
        "Claim": plain(row.claim),
        "Verdict": "\n\n".join(outcome(row, record)),
        "How it works": f"::: {module}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}",
        "Run it": "```sh\n" + "\n".join(row.run) + "\n```\n\n`RUN` is the folder that `train` prints." if row.run else "",
        "Settings": settings_table(row),
        "Parts": "\n".join(f"- {part_link(part)}" for part in row.parts),
        "What is reconstruction": "\n".join(f"- {plain(note)}" for note in row.fidelity),
        "At full scale": plain(row.scale),
        "Licence": f"Official code: {plain(row.code_licence)}.",
        "In its own file": f"What only this paper needs, in `{module}`.\n\n{own}" if own else "",
    }
    head = f"# {plain(row.title)}\n\n{origin(row)}\n{{ .origin }}\n\n{plain(row.summary)}\n{{ .lead }}"
    return "\n\n".join([head, *(f"## {title}\n\n{body}" for title, body in sections.items() if body)]) + "\n"


def origin(row: Row) -> str:
    """Who, when and where, and what it is in the catalogue."""
    authors = ", ".join(row.authors) + (f" ({row.authors_note})" if row.authors and row.authors_note else "")
    when = row.venue if str(row.year) in row.venue else " · ".join(filter(None, [str(row.year or ""), row.venue]))
    facts = [plain(authors or row.authors_note), plain(when), arxiv_link(row, f"arXiv {row.arxiv}")]
    return " · ".join([*filter(None, facts), f"{row.kind} in {row.family}", f"`{row.slug}`"])


def arxiv_link(row: Row, text: str) -> str:
    """A link to the paper's abstract; nothing where there is no paper."""
    return f"[{text}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else ""


def outcome(row: Row, record: Mapping[str, Any] | None) -> Iterator[str]:
    """The stored verdict of every claim, with a table and a plot of its conditions."""
    if not record or not record["claims"]:
        yield f"{badge(catalogue.verdict(row))} No record is stored. [How verdicts are made](../verdicts.md)."
        return
    for claim in record["claims"]:
        yield f"{badge(claim['verdict'])} {plain(claim['statement'])} ({len(claim['figures'])} seeds)"
        lines = [
            [plain(f["condition"]), signed(f.get("mean")), interval(f), number(f.get("margin")), badge(f["verdict"])]
            for f in claim["findings"]
        ]
        yield table(["condition", "mean difference", "95 % interval", "margin", "came out"], lines)
        yield forest(claim["findings"], prefix=claim.get("name", "claim"))
        if claim.get("note"):
            yield f"!!! note\n    {plain(claim['note'])}"
    told = [record.get("date"), record.get("commit") and f"commit {record['commit']}", record.get("machine")]
    told += [f"{record['seconds']:.0f} s in all"] if record.get("seconds") else []
    yield f"{plain(', '.join(filter(None, told)))}. [How verdicts are made](../verdicts.md).\n{{ .origin }}"


def forest(findings: Sequence[Mapping[str, Any]], prefix: str) -> str:
    """The intervals as a drawing in the page's colours; nothing where all conditions are exact."""
    from sfumato.report import intervals

    rows = [{**f, "label": f["condition"]} for f in findings if f.get("mean") is not None]
    return f"<figure>{intervals(rows).svg(760, prefix=prefix)}</figure>" if rows else ""


def interval(finding: Mapping[str, Any]) -> str:
    """`+0.08 to +0.16`; a dash for an exact property."""
    low, high = signed(finding.get("low")), signed(finding.get("high"))
    return "–" if finding.get("mean") is None else f'<span class="unbroken">{low} to {high}</span>'


def signed(value: float | None) -> str:
    """A difference to three digits, or a dash."""
    return "–" if value is None else f"{value:+.3g}".replace("-", "−")


def number(value: float | None) -> str:
    """A number as it is, or a dash."""
    return "–" if value is None else f"{value:g}"


def settings_table(row: Row) -> str:
    """What `--set` takes, with the paper's values and those of the preset for a CPU."""
    if not row.settings:
        return ""
    lines = [
        [code(s.name), code(s.type), setting(s.default), setting(s.small) if s.small is not None else "", plain(s.help)]
        for s in row.settings
    ]
    told = "`--set NAME=VALUE`. On a CPU the small preset is taken, unless `--preset paper` is given."
    return f"{told}\n\n{table(['name', 'type', 'paper', 'on a CPU', 'what'], lines)}"


def setting(value: Any) -> str:
    """A default; a dash where the value is left to the data or there is none."""
    return "–" if value is None else code(str(list(value) if isinstance(value, tuple) else value))


def part_link(part: str) -> str:
    """A part with a link to its reference, or without one while it is not built."""
    room, _, name = part.partition(".")
    return f"[`{part}`][sfumato.{part}]" if name in public_names(room) else f"`{part}` (not built yet)"


def table_page(rows: Sequence[Row]) -> str:
    """All papers and bases by family, built or not."""
    papers = [row for row in rows if row.kind != "base"]
    built = sum(row.built for row in rows)
    head = (
        "---\nhide: [navigation]\n---\n\n# Papers\n\n"
        f"{len(papers)} papers and {len(rows) - len(papers)} bases that they start from; {built} of these {len(rows)} are "
        "built. `sfumato papers WORDS` searches the same table, `sfumato show SLUG` tells all of one."
    )
    return "\n\n".join([head, *(family_table(name, [r for r in rows if r.family == name]) for name in FAMILIES)]) + "\n"


def family_table(family: str, rows: Iterable[Row]) -> str:
    """One family's rows; the year leads to the paper."""
    lines = [
        [
            f"[`{row.slug}`]({row.slug}.md)" if row.built else f"`{row.slug}`",
            plain(row.summary),
            arxiv_link(row, str(row.year)),
            row.kind,
            badge(catalogue.verdict(row)),
        ]
        for row in rows
    ]
    return f"## {family}\n\n{FAMILIES[family].capitalize()}.\n\n" + table(["slug", "what", "year", "kind", "verdict"], lines)


# ---- examples


def examples_page(scripts: Sequence[Path]) -> str:
    """What every script shows, how to run it, and its source."""
    told = [example(path) for path in scripts]
    head = (
        "# Examples\n\nShort scripts to copy and change. They use the public interface alone, need no download and take seconds "
        "on a CPU; run them in a checkout, where they lie in `examples/`. Every one is a test of ours, too."
    )
    index = table(["script", "what it shows"], [[f"[{title}](#{slug(title)})", plain(first)] for title, first, _ in told])
    return "\n\n".join([head, index, *(section for _, _, section in told)]) + "\n"


def example(path: Path) -> tuple[str, str, str]:
    """A script's title, the first line of its docstring, and its section: what it says of itself, then its code."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    first, run, *rest = (ast.get_docstring(tree) or "").split("\n\n")
    body = "".join(source.splitlines(keepends=True)[tree.body[0].end_lineno :]).strip()  # the docstring is above it
    title = path.stem.replace("_", " ").capitalize()
    pieces = [f"## {title}", plain(first), f"```sh\n{textwrap.dedent(run)}\n```", *map(plain, rest)]
    return title, first, "\n\n".join([*pieces, f'```python title="examples/{path.name}"\n{body}\n```'])


def slug(title: str) -> str:
    """The anchor of a heading of plain words."""
    return title.lower().replace(" ", "-")


# ---- races


def races() -> list[dict[str, Any]]:
    """The stored results of `python -m benchmarks`."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RACES.glob("*.json"))]


def races_page(results: Sequence[Mapping[str, Any]]) -> str:
    """All races: what was won and lost, and why."""
    head = (
        "# Races\n\nOurs against the libraries people would use instead: the same inputs in one process, results compared before "
        "the clock starts, then rounds in which every lane runs once. The ratio is our time over theirs, median [quartiles] over "
        "the rounds: below 1 we are faster. Memory is the most that torch held at once, from building a lane to the end of its "
        "second run. `make bench` runs them again."
    )
    return "\n\n".join([head, *map(race_section, results), *machines(results)]) + "\n"


def race_section(race: Mapping[str, Any]) -> str:
    """One race: how it came out, why, and a row for every lane of a peer."""
    rows = [
        [
            plain(heat["name"]) if i == 0 else "",
            plain(name),
            milliseconds(heat["lanes"][ours]["ms"]),
            milliseconds(lane["ms"]),
            f'{lane["ratio"]:.3g} <span class="unbroken">[{lane["low"]:.3g}, {lane["high"]:.3g}]</span>',
            memory(heat["lanes"][ours], lane),
            race_badge(lane["outcome"]),
        ]
        for heat in race["heats"]
        for ours, *peers in [list(heat["lanes"])]
        for i, (name, lane) in enumerate((peer, heat["lanes"][peer]) for peer in peers)
    ]
    parts = [f"## {plain(race['title'])}", f"{score(race)} {plain(race['why'])}"]
    parts += [table(["what", "against", "ours", "theirs", "ratio", "memory, ours / theirs", "ours is"], rows)]
    parts += [f"Not raced: {plain(line)}." for line in race["skipped"].values()]
    return "\n\n".join(parts)


def score(race: Mapping[str, Any]) -> str:
    """How often each outcome came: `Faster 3 times, even once.`"""
    outcomes = [lane["outcome"] for heat in race["heats"] for lane in heat["lanes"].values() if "outcome" in lane]
    counts = {word: outcomes.count(word) for word in RACE_MOODS if word in outcomes}
    told = ", ".join(f"{word} {'once' if n == 1 else f'{n} times'}" for word, n in counts.items())
    return f"{told.capitalize()}."


def milliseconds(value: float) -> str:
    """A time to three digits."""
    return f'<span class="unbroken">{value:.3g} ms</span>' if value < 1000 else f'<span class="unbroken">{value:.0f} ms</span>'


def memory(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """Two peaks in MB, where they were measured."""
    return "–" if "peak_mb" not in theirs else f"{ours['peak_mb']:.3g} / {theirs['peak_mb']:.3g} MB"


def race_badge(outcome: str) -> str:
    """An outcome in its colour."""
    return f'<span class="verdict {RACE_MOODS[outcome]}">{outcome}</span>'


def machines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where the races were run, and with what."""
    if not results:
        yield "No results are stored."
        return
    yield "## Machine"
    groups: dict[str, list[str]] = {}
    for race in results:
        m = race["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in {"Python": m["python"], **m["versions"]}.items())
        told = f"{m['cpu']}, {m['cores']} cores, {m['threads']} thread(s); {versions}; {race['clock']} time, {race['date']}"
        groups.setdefault(told, []).append(f"{race['race']} ({m['load']:g})")
    for told, names in groups.items():
        yield plain(f"{told}. Mean load of the machine at the end of each race: {', '.join(names)}") + "."


# ---- comparisons of methods


def comparisons() -> dict[str, dict[str, Any]]:
    """The kept records of `sfumato compare` (losses thinned to 60 points), by the folder that each lies in with its pictures."""
    found = sorted(COMPARISONS.glob("*/record.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def comparisons_page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Methods side by side: what each cost, what came out, and whether it differs from the first."""
    head = (
        "# Comparisons\n\nMethods of this library on the same data, each trained with every seed: a seed fixes weights, order, "
        "augmentation and noise, so that methods are paired. Figures are means over seeds with 95 % intervals, taken on held-out "
        "data; losses, which are each method's own, are on the full page. `few label accuracy` is what fine-tuning on 100 labels "
        "reaches; probes of frozen features say little after trainings as short as these. `frechet distance`, of generators, is "
        "that of 400 new pictures to held-out ones in the features of a small classifier of the data: lower is better; no FID. "
        "Where it is known, that of as many training pictures stands below."
    )
    return "\n\n".join([head, *(comparison_section(name, record) for name, record in records.items())]) + "\n"


def comparison_report(name: str, record: Mapping[str, Any]) -> str:
    """The full page of a comparison, as `sfumato compare` writes it; the one page whose making imports torch."""
    from sfumato.report import write_compare_report

    with TemporaryDirectory() as folder:
        page = write_compare_report(record, Path(folder) / "report.html", pictures=COMPARISONS / name / "pictures")
        return page.read_text(encoding="utf-8")


def comparison_section(name: str, record: Mapping[str, Any]) -> str:
    """One comparison: what was held equal, the table, what differs from the first arm, and the way to all of it."""
    first, by_steps = record["arms"][0]["label"], record["held"] == "steps"
    budget = f"{record['budget']:,} steps" if by_steps else f"{60 * record['budget']:g} seconds"
    compared = [d for d in record["differences"] if d["metric"] != "images_per_second"]
    metrics = list(dict.fromkeys(d["metric"] for d in compared))  # each method's own losses stand on the full page
    heads = ["method", "weights", "steps", "time", "images/s", "memory", *(m.replace("_", " ") for m in metrics)]
    rows = [
        [
            plain(row["arm"]), f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['seconds']:.0f} s",
            f"{row['images_per_second']:,.0f}", "–" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB",
            *(spread(row.get(m)) for m in metrics),
        ]
        for row in record["table"]
    ]  # fmt: skip
    before = [seed[first] for seed in record["untrained"].values()]
    fresh = {m: sum(b[m] for b in before) / len(before) for m in metrics if before and all(m in b for b in before)}
    rows += [[f"{plain(first)}, untrained", *["–"] * 5, *(f"{fresh[m]:.3g}" for m in metrics)]] if fresh else []
    given = record["table"][0].get("frechet_of_training_pictures")
    if given:
        rows.append(["training pictures", *["–"] * 5, *(spread(given if m == "frechet_distance" else None) for m in metrics)])
    differences = [
        [
            plain(f"{d['arm']}: {d['metric'].replace('_', ' ')}"),
            f'{signed(d["mean"])} <span class="unbroken">[{signed(d["low"])}, {signed(d["high"])}]</span>',
            f'<span class="verdict {COMPARISON_MOODS.get(d["outcome"], "open")}">{d["outcome"]}</span>',
        ]
        for d in compared
    ]
    parts = [
        f"## {plain(', '.join(arm['label'] for arm in record['arms']))}: equal {'steps' if by_steps else 'time'}",
        f"{plain(record['summary'])}. {budget} each, {len(record['seeds'])} seeds, {plain(record['machine'])}, {record['date']}. "
        f"[Curves, pictures, costs and settings](comparisons/{name}/report.html).",
        f"```sh\n{record['command']}\n```",
        table(heads, rows),
        *([f"Against {plain(first)}, seed by seed:", table(["", "difference", "verdict"], differences)] if differences else []),
        *(plain(note) for note in record["notes"]),
    ]
    return "\n\n".join(parts)


def spread(limits: Sequence[float | None] | None) -> str:
    """A mean and its interval."""
    if limits is None:
        return "–"
    mean, low, high = ("–" if v is None else f"{v:.3g}".replace("-", "−") for v in limits)
    return mean if limits[1] is None else f'{mean} <span class="unbroken">[{low}, {high}]</span>'


# ---- parts


def reference_index(rooms: Iterable[str]) -> str:
    """The rooms, with what lives in them."""

    def lines(kind: Mapping[str, str]) -> str:
        names = [room for room in rooms if room in kind]
        return table(["room", "what", "names"], [[f"[{r}]({r}.md)", kind[r], str(len(public_names(r)))] for r in names])

    return (
        "# Parts\n\nEvery part is usable alone: a pure function, an `nn.Module` or an `Optimizer`, tensors in and out. "
        "Images are `[B, C, H, W]` in [0, 1]; masks are bool, True = hidden; randomness comes from `generator=` alone.\n\n"
        f"{lines(PARTS)}\n\n## Around them\n\n{lines(AROUND)}\n"
    )


def reference_page(room: str) -> str:
    """A table of a room's names, then all of them, file by file."""
    names = public_names(room)
    rows = [[f"[`{name}`][sfumato.{room}.{name}]", plain(first_sentence(file, name))] for name, file in names.items()]
    text = [f"# {room}", f"{ROOMS[room]} `from sfumato.{room} import ...`", table(["name", "what"], rows)]
    for file in dict.fromkeys(names.values()):
        text.append(f"## {file.rpartition('.')[2].replace('_', ' ')}")
        text.append(f"::: {file}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}")
        text += [f"::: sfumato.{room}.{name}" for name, where in names.items() if where == file]
    return "\n\n".join(text) + "\n"


@functools.cache
def public_names(room: str) -> dict[str, str]:
    """The public names of a room and the module of each, as `__init__.pyi` says."""
    stub = SOURCE / "sfumato" / room / "__init__.pyi"
    body = ast.parse(stub.read_text(encoding="utf-8")).body if stub.is_file() else []
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.asname or alias.name: f"sfumato.{room}.{node.module}" for node in imports for alias in node.names}


@functools.cache
def definitions(module: str) -> dict[str, str]:
    """The public classes and functions that a module defines, with their docstrings."""
    path = (SOURCE / module.replace(".", "/")).with_suffix(".py")
    nodes = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return {node.name: ast.get_docstring(node) or "" for node in nodes if not node.name.startswith("_")}


def first_sentence(module: str, name: str) -> str:
    """The first sentence of a definition's docstring."""
    paragraph = " ".join(definitions(module).get(name, "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


# ---- pieces of text


def plain(text: str) -> str:
    """Text in which no letter means anything to Markdown; `code` stays code."""
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(code(p[1:-1]) if i % 2 else re.sub(r"[&<>\\`*_\[\]{}|~^#]", _entity, p) for i, p in enumerate(pieces))


def code(text: str) -> str:
    """Code that may stand in a table."""
    return f"<code>{re.sub(r'[&<>|*_`]', _entity, text)}</code>"


def _entity(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"


def badge(verdict: str) -> str:
    """A verdict in its colour."""
    return f'<span class="verdict {MOODS.get(verdict, "none")}">{html.escape(verdict)}</span>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def colours() -> str:
    """The report's colours, light and dark, as variables: one palette for pages, plots and this site."""
    from sfumato.report.style import css_variables

    schemes = {"light": "default", "dark": "slate"}
    return "\n".join(f'[data-md-color-scheme="{name}"] {{ {css_variables(theme)} }}' for theme, name in schemes.items())


# ---- what MkDocs calls


def on_config(config: MkDocsConfig) -> None:
    """Put the generated pages into the navigation."""
    rows = [row for row in catalogue.load().values() if row.built]
    families = {name: [{row.slug: f"papers/{row.slug}.md"} for row in rows if row.family == name] for name in FAMILIES}
    more = {
        "Papers": [{name: entries} for name, entries in families.items() if entries],
        "Parts": [{room: f"reference/{room}.md"} for room in ROOMS if public_names(room)],
    }
    for entry in config.nav or []:
        for title, entries in entry.items():
            if title in more:
                entries.extend(more[title])


def on_page_content(html: str, **kwargs: Any) -> str:
    """Keep source code out of the search: every result would be buried under it."""
    return html.replace('<details class="mkdocstrings-source"', '<details class="mkdocstrings-source" data-search-exclude')


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages to those that lie in `docs/`."""
    from mkdocs.structure.files import File

    reports = {f"comparisons/{name}/report.html": comparison_report(name, record) for name, record in comparisons().items()}
    for path, text in {**pages(), **reports}.items():
        files.append(File.generated(config, path, content=text))
