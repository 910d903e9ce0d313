"""The documentation site: pages made from facts, commands that exist, snippets that run, and a build without a warning."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from sfumato import catalogue
from sfumato.catalogue import Setting
from sfumato.engine.loading import parse_settings

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
BUILT = [row for row in catalogue.load().values() if row.built]
TOOLS = ("mkdocs", "material", "mkdocstrings_handlers.python")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_records(monkeypatch, tmp_path):
    """A house in which no claim was run yet."""
    monkeypatch.setattr(catalogue, "RECORDS", tmp_path)


def record(**finding):
    figures = {str(seed): {"a": {"score": 1.0}, "b": {"score": 0.0}} for seed in range(5)}
    claim = {"name": "it_works", "statement": "a*b wins", "verdict": "inconclusive", "note": "It is small.", "figures": figures}
    exact = {"condition": "counts are exact", "verdict": "reproduced"}
    return {"claims": [{**claim, "findings": [finding, exact]}], "date": "2025-01-31", "commit": "abc1234", "seconds": 61.0}


def test_built_paper_has_a_page_of_its_facts(generate, no_records):
    settings = (Setting("color", '"a" | "b"', "which | one", "a", "b"), Setting("n", "int", "count"))
    row = dataclasses.replace(catalogue.find("adahessian"), settings=settings)
    page = generate.paper_page(row, None)
    assert page.startswith("# AdaHessian: An Adaptive Second Order Optimizer for Machine Learning\n")
    assert "[arXiv 2006.00719](https://arxiv.org/abs/2006.00719)" in page
    assert "not run yet" in page
    assert "::: sfumato.papers.optimization.adahessian\n" in page
    assert "[`optim.AdaHessian`][sfumato.optim.AdaHessian]" in page
    assert all(line in page for line in row.run)
    assert all(generate.plain(note) in page for note in row.fidelity)
    assert generate.plain(row.scale) in page
    lines = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    assert lines["| <code>color</code>"].count("|") == 6, "a bar inside a cell ends it"
    assert lines["| <code>color</code>"].endswith("| <code>a</code> | <code>b</code> | which &#124; one |")
    assert lines["| <code>n</code>"].endswith("| – |  | count |")


def test_record_is_shown_with_intervals_and_note(generate):
    finding = {"condition": "a above b", "verdict": "inconclusive", "mean": 0.12, "low": -0.05, "high": 0.29, "margin": 0.1}
    page = generate.paper_page(catalogue.find("adahessian"), record(**finding))
    assert "a&#42;b wins (5 seeds)" in page
    assert '| a above b | +0.12 | <span class="unbroken">−0.05 to +0.29</span> | 0.1 |' in page
    assert "| counts are exact | – | – | – |" in page
    assert '<span class="verdict good">reproduced</span>' in page
    assert "!!! note\n    It is small." in page
    assert "2025-01-31, commit abc1234, 61 s in all" in page
    assert page.count("<svg") == 1
    assert "\n\n" not in page[page.index("<svg") : page.index("</svg>")], "an empty line would end the drawing"


def test_part_that_is_not_built_is_named_without_a_link(generate):
    assert generate.part_link("optim.AdaHessian") == "[`optim.AdaHessian`][sfumato.optim.AdaHessian]"
    assert generate.part_link("optim.NoSuchThing") == "`optim.NoSuchThing` (not built yet)"


def test_table_holds_every_paper_and_links_the_built_ones(generate, no_records):
    rows = list(catalogue.load().values())
    half = [dataclasses.replace(row, built=i % 2 == 0) for i, row in enumerate(rows)]
    table = generate.table_page(half)
    assert "63 papers and 5 bases" in table
    for row in half:
        start = f"| [`{row.slug}`]({row.slug}.md) |" if row.built else f"| `{row.slug}` |"
        (line,) = [line for line in table.splitlines() if line.startswith(start)]
        assert generate.plain(row.summary) in line
        assert ("not yet" in line) != row.built


def test_every_room_with_names_has_a_page(generate):
    pages = generate.pages()
    for stub in (ROOT / "src/sfumato").glob("*/__init__.pyi"):
        names = re.findall(r"^from \.\w+ import \w+ as (\w+)$", stub.read_text(), re.MULTILINE)
        page = pages.get(f"reference/{stub.parent.name}.md", "")
        assert bool(page) == bool(names)
        assert all(f"::: sfumato.{stub.parent.name}.{name}\n" in page for name in names)
    assert set(pages) >= {f"papers/{row.slug}.md" for row in BUILT}


def test_first_sentence_is_one_line(generate):
    assert generate.first_sentence("sfumato.errors", "NotBuilt") == "A paper that stands in the catalogue but is not built yet."
    for room in generate.ROOMS:
        for name, module in generate.public_names(room).items():
            assert "\n" not in generate.first_sentence(module, name)


def test_races_are_shown_with_what_was_won_and_lost(generate, monkeypatch, tmp_path):
    quartiles = {"ratio": 0.5, "low": 0.4, "high": 0.6, "outcome": "faster", "difference": 0.0, "peak_mb": 20.0}
    lost = {"ratio": 1.5, "low": 1.4, "high": 1.6, "outcome": "slower", "difference": None}
    lanes = {"sfumato": {"ms": 1.0, "peak_mb": 10.0}, "a_peer": {"ms": 2.0, **quartiles}, "b": {"ms": 2000.0, **lost}}
    heat = {"name": "a step | small", "limit": None, "tolerance": 1e-5, "lanes": lanes}
    machine = {"cpu": "Toaster", "cores": 2, "threads": 1, "load": 0, "python": "3.11", "versions": {"torch": "2.9"}}
    race = {"race": "x", "title": "A step", "why": "It is less work.", "date": "2025-01-31", "heats": [heat]}
    (tmp_path / "x.json").write_text(
        json.dumps({**race, "clock": "wall", "machine": machine, "skipped": {"c": "c: no module; pip install c"}})
    )
    monkeypatch.setattr(generate, "RACES", tmp_path)
    page = generate.pages()["races.md"]
    assert "Faster once, slower once. It is less work." in page
    row = '| a step &#124; small | a&#95;peer | <span class="unbroken">1 ms</span> | <span class="unbroken">2 ms</span> '
    row += '| 0.5 <span class="unbroken">[0.4, 0.6]</span> | 10 / 20 MB | <span class="verdict good">faster</span> |'
    assert row in page
    assert '| – | <span class="verdict bad">slower</span> |' in page
    assert "Not raced: c: no module; pip install c." in page
    assert "Toaster, 2 cores, 1 thread(s); Python 3.11, torch 2.9; wall time, 2025-01-31." in page


def test_every_stored_race_is_on_the_page(generate):
    page = generate.races_page(generate.races())
    assert all(f"## {generate.plain(race['title'])}" in page for race in generate.races())
    assert "No results are stored." in generate.races_page([])


def test_generator_needs_no_torch():
    code = f"import sys, runpy; runpy.run_path({str(ROOT / 'docs/generate.py')!r})['pages'](); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def commands():
    for page in WRITTEN:
        for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield from ((page.name, line) for line in block.replace("\\\n", "").splitlines())
    for row in BUILT:
        yield from ((row.slug, line) for line in row.run)


COMMANDS = [(where, line) for where, line in commands() if re.match(r"(torchrun .* -m )?sfumato ", line)]


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where}: {line}" for where, line in COMMANDS])
def test_commands_in_the_docs_are_commands(where, line):
    """Every word and option is known: the command line is parsed as the real one, but not run."""
    from sfumato.cli.app import app

    words = shlex.split(line, comments=True)
    words, command, context = words[words.index("sfumato") + 1 :], typer.main.get_command(app), None
    while hasattr(command, "resolve_command"):
        context = command.make_context(command.name, words, parent=context)
        words = [*context._protected_args, *context.args]
        if not words:
            return
        _, command, words = command.resolve_command(context, words)
    context = command.make_context(command.name, words, parent=context)
    if context.command.name in ("show", "train", "reproduce"):
        for slug in [context.params.get("slug") or context.params.get("slugs") or []]:
            for name in [slug] if isinstance(slug, str) else slug:
                assert name == "SLUG" or catalogue.find(name)
    if context.command.name == "compare":
        from sfumato.engine.comparison import resolve

        assert resolve(context.params["arms"], parse_settings(context.params["set_"] or []))


def test_the_verdicts_in_the_readme_are_those_of_the_records():
    told = set(re.findall(r"^\| `([\w-]+)`: (.*) \| ([a-z ]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    stored = {row.slug: catalogue.record(row.slug) for row in BUILT}
    assert told == {(slug, c["statement"], c["verdict"]) for slug, r in stored.items() if r for c in r["claims"]}


@pytest.mark.parametrize("page", ["docs/index.md", "docs/tasks.md", "README.md"])
def test_python_in_the_docs_runs(page, tmp_path, monkeypatch):
    import numpy as np
    from timm.models.vision_transformer import VisionTransformer

    from sfumato.nn import MaskedViTEncoder

    monkeypatch.chdir(tmp_path)
    np.savez("embeddings.npz", names=np.array(["a", "b", "c"]), features=np.array([[1.0, 0], [0, 1], [2, 1]]))
    export(MaskedViTEncoder(32, 8, 3, dim=16, depth=1, heads=2))
    space: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        exec(block, space)
    if page == "docs/tasks.md":
        assert space["nearest"].tolist() == ["a", "c", "b"]
        assert isinstance(space["vit"], VisionTransformer)
        assert float(space["loss"]) < float(space["y"].square().mean())
        assert space["sharpest"] > 0
        assert Path("curvature.html").is_file()
        assert [row["arm"] for row in space["done"].table] == ["optimizer=adam", "optimizer=sgd"]
    else:
        assert space["hidden"].sum(1).tolist() == [147] * 8


def export(encoder) -> None:
    """What `sfumato export --timm` writes, from the command itself."""
    import torch

    from sfumato.cli import export as work

    class Exportable(torch.nn.Module):
        def timm_weights(self):
            return encoder.timm_weights()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "load", lambda run: Exportable())
        work.export(Path("RUN"), timm=Path("vit.safetensors"), weights=None, hub=None)


@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(tool.split(".")[0]) is None for tool in TOOLS), reason="needs the extra [docs]")
def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in BUILT:
        assert generated_heading(tmp_path / "papers" / f"{row.slug}.html") == row.title
    foreign = [
        (page.name, address)
        for page in tmp_path.rglob("*.html")
        for address in re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(https?:[^\" >]*)", page.read_text())
    ]
    assert not foreign, "the site fetches nothing from elsewhere"


def generated_heading(page: Path) -> str:
    import html

    (heading,) = re.findall(r"<h1[^>]*>(.*?)<a", page.read_text(), re.DOTALL)
    return html.unescape(heading).strip()
