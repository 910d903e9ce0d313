"""`sfumato papers` and `sfumato show`, as a person and as a script meet them."""

import dataclasses
import json
import subprocess
import sys

import pytest

from sfumato import catalogue
from sfumato.cli import main

LIGHT = """
import sys
from sfumato.cli import main
import sfumato
for args in (["--help"], ["papers"], ["papers", "blind", "--json"], ["show", "cbsn"], ["show", "--help"]):
    try:
        main(args)
    except SystemExit as end:
        assert end.code == 0, (args, end.code)
heavy = {"torch", "numpy", "timm", "scipy", "matplotlib", "sfumato.method", "sfumato.claim"} & set(sys.modules)
assert not heavy, heavy
"""


def run(capsys, *args):
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as end:
        main(args)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_looking_around_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_papers_in_a_pipe_is_one_line_each(capsys):
    code, out, err = run(capsys, "papers")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in lines] == list(catalogue.load())
    assert any("not run yet" in line or "reproduced" in line for line in lines)


def test_papers_filters(capsys):
    _, out, _ = run(capsys, "papers", "--built", "--json")
    assert {row["slug"] for row in json.loads(out)} == {row.slug for row in catalogue.load().values() if row.built}
    _, out, _ = run(capsys, "papers", "grokking", "-f", "dynamics")
    assert {line.split()[0] for line in out.splitlines()} == {"stablemax-perpgrad", "lazy-to-rich"}
    code, out, err = run(capsys, "papers", "qqqq", "--family", "diffusion")
    assert (code, out) == (0, "")
    assert "qqqq" in err
    code, out, _ = run(capsys, "papers", "qqqq", "--json")
    assert (code, json.loads(out)) == (0, [])


@pytest.mark.parametrize("width", ["80", "120"])
def test_papers_on_a_terminal_fits(capsys, monkeypatch, width):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    _, out, _ = run(capsys, "papers")
    plain = [line for line in _plain(out).splitlines() if line.strip()]
    assert max(map(len, plain)) <= int(width)
    headings = [line.split()[0] for line in plain if not line.startswith(" ")]
    assert [word for word in headings if word in catalogue.FAMILIES] == list(catalogue.FAMILIES)


def _plain(text):
    from rich.text import Text

    return Text.from_ansi(text).plain


def test_papers_json_has_all_facts(capsys):
    _, out, _ = run(capsys, "papers", "--json")
    rows = json.loads(out)
    assert len(rows) == len(catalogue.load())
    assert {"slug", "title", "claim", "settings", "parts", "verdict", "built"} <= rows[0].keys()


def test_show_tells_everything(capsys):
    code, out, _ = run(capsys, "show", "cbsn")
    row = catalogue.find("cbsn")
    told = " ".join(out.split())
    assert code == 0
    for words in (row.title, row.claim, row.scale, row.arxiv, row.code_licence, *row.run, *row.fidelity, "Kim"):
        assert " ".join(words.split()) in told
    assert all(setting.name in told for setting in row.settings)


def test_show_of_a_paper_that_is_not_built_is_kind(capsys, monkeypatch):
    rows = catalogue.load()
    rows = {**rows, "hpm": dataclasses.replace(rows["hpm"], built=False)}
    monkeypatch.setattr(catalogue, "load", lambda: rows)
    code, out, _ = run(capsys, "show", "hpm")
    assert code == 0
    assert "not built yet" in out
    assert "mae" in out


def test_show_json(capsys):
    _, out, _ = run(capsys, "show", "adahessian", "--json")
    told = json.loads(out)
    assert told["slug"] == "adahessian"
    assert "record" in told
    assert told["run"][0] == "sfumato train classifier --data WHERE --set optimizer=adahessian"


def test_show_prints_the_stored_outcome(capsys, monkeypatch, tmp_path):
    finding = {
        "condition": "C-BSN above BSN in psnr",
        "verdict": "reproduced",
        "mean": 2.5,
        "low": 1.75,
        "high": 3.25,
        "margin": 1.5,
    }
    exact = {"condition": "blind", "verdict": "reproduced", "mean": None, "low": None, "high": None, "margin": None}
    claim = {"name": "denoises", "statement": "it denoises", "verdict": "reproduced", "note": "a note"}
    claim |= {"findings": [finding, exact], "figures": {str(seed): {} for seed in range(5)}}
    record = {
        "slug": "cbsn",
        "claims": [claim],
        "commit": "0123456-dirty",
        "versions": {},
        "seconds": 61.4,
        "date": "2026-01-02",
    }
    (tmp_path / "cbsn.json").write_text(json.dumps(record))
    monkeypatch.setattr(catalogue, "RECORDS", tmp_path)
    _, out, _ = run(capsys, "show", "cbsn")
    told = " ".join(out.split())
    assert "reproduced it denoises (5 seeds)" in told
    assert "C-BSN above BSN in psnr: +2.5, 95 % [+1.75, +3.25], margin 1.5" in told
    assert "a note" in told
    assert "2026-01-02, commit 0123456-dirty, 61 s" in told
    _, out, _ = run(capsys, "show", "cbsn", "--json")
    assert json.loads(out)["record"] == record
    (tmp_path / "cbsn.json").write_text(json.dumps(record | {"commit": None}))  # an installed wheel knows no commit
    _, out, _ = run(capsys, "show", "cbsn")
    assert "2026-01-02, 61 s" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["show", "colourmae"], "colormae"),
        (["papers", "--family", "maskin"], "masking"),
    ],
)
def test_a_mistake_is_one_line(capsys, args, words):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("sfumato: ")
    assert err.count("\n") == 1
    assert words in err


def test_unknown_commands_and_options_name_the_nearest(capsys):
    code, _, err = run(capsys, "paper")
    assert code == 2
    assert "papers" in err
    code, _, err = run(capsys, "papers", "--famly", "masking")
    assert code == 2
    assert "--family" in err


def test_version(capsys):
    import sfumato

    assert run(capsys, "--version")[:2] == (0, sfumato.__version__ + "\n")


def test_interrupt_is_130(capsys, monkeypatch):
    import sfumato.cli.catalogue as commands

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "papers", interrupt)
    assert run(capsys, "papers")[0] == 130


def test_a_closed_pipe_is_quiet():
    code = "from sfumato.cli import main; main(['papers'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)
