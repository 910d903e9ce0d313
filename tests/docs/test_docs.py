"""The documentation site: pages made from facts, and a build without a warning."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sfumato import catalogue
from sfumato.catalogue import Setting

ROOT = Path(__file__).resolve().parents[2]
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


def test_a_comparison_is_shown_with_costs_and_differences(generate, monkeypatch, tmp_path):
    from sfumato.cli.compare import compare

    arms = ["mae", "half=mae:mask_ratio=0.5"]
    settings = ["image_size=8", "patch=2", "dim=16", "depth=1"]
    budget = {"steps": 2, "minutes": None, "seeds": 2, "preset": "small", "device": "cpu", "processes": 0}
    compare(arms, "sample:photos", **budget, settings=settings, dry_run=False, as_json=False, out=tmp_path / "kept")
    monkeypatch.setattr(generate, "COMPARISONS", tmp_path)
    page = generate.pages()["comparisons.md"]
    assert "## mae, half: equal steps" in page
    assert "2 steps each, 2 seeds" in page
    assert "(comparisons/kept/report.html)" in page
    assert "| method | weights | steps | time | images/s | memory |" in page
    assert "| half | " in page


def test_every_kept_comparison_has_its_page(generate):
    kept = generate.comparisons()
    page = generate.comparisons_page(kept)
    for name, record in kept.items():
        pictures = generate.COMPARISONS / name / "pictures"
        assert all((pictures / file).is_file() for arm in record["pictures"].values() for file in arm.values())
        assert "<svg" in generate.comparison_report(name, record)
        assert record["command"] in page


def test_examples_are_shown_with_purpose_command_and_code(generate, tmp_path):
    (tmp_path / "two_words.py").write_text(
        '"""It shows *this*.\n\n    python examples/two_words.py\n\nMore.\n"""\n\nimport torch\n'
    )
    page = generate.examples_page([tmp_path / "two_words.py"])
    assert "| [Two words](#two-words) | It shows &#42;this&#42;. |" in page
    section = page[page.index("## Two words") :]
    assert section == (
        "## Two words\n\nIt shows &#42;this&#42;.\n\n```sh\npython examples/two_words.py\n```\n\nMore.\n\n"
        '```python title="examples/two_words.py"\nimport torch\n```\n'
    )


def test_every_example_is_on_the_page(generate):
    page = generate.pages()["examples.md"]
    for path in (ROOT / "examples").glob("*.py"):
        assert path.read_text().split('"""', 2)[2].strip() in page, "the whole code below the docstring"


def test_generator_needs_no_torch():
    code = f"import sys, runpy; runpy.run_path({str(ROOT / 'docs/generate.py')!r})['pages'](); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_verdicts_in_the_readme_are_those_of_the_records():
    told = set(re.findall(r"^\| `([\w-]+)`: (.*) \| ([a-z ]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    stored = {row.slug: catalogue.record(row.slug) for row in BUILT}
    assert told == {(slug, c["statement"], c["verdict"]) for slug, r in stored.items() if r for c in r["claims"]}


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
