"""What a person copies: every Python block of README, CONTRIBUTING and docs runs, every command is one.

Commands are given to the parser that would read them, and their settings to the method's `Config`; nothing is trained. Blocks
that need another library run where it is installed; elsewhere their imports of ours are looked up.
"""

import argparse
import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import typer

from sfumato import catalogue
from sfumato.engine.loading import configure, parse_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "README"))]
BUILT = [row for row in catalogue.load().values() if row.built]
FENCE = re.compile(r"^```(\w*).*\n((?:.*\n)*?)^```$", re.MULTILINE)


def blocks(page, kind):
    return [body for found, body in FENCE.findall(page.read_text()) if found == kind]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_block_is_python_or_shell_or_shows_files(page):
    assert {kind for kind, _ in FENCE.findall(page.read_text())} <= {"python", "sh", ""}
    assert all("──" in body or "/\n" in body for body in blocks(page, "")), "a block without a language is not checked"
    assert page.read_text().count("```") == 2 * len(FENCE.findall(page.read_text())), "indented blocks are not found"


# ---- commands

BEGINS = re.compile(r"(sfumato|make|python|pip|torchrun|source|\.venv/\S+) ")


def commands():
    """`(where, line)` of shell blocks, of text between backticks that begins like a command, and of what is shown by commands."""
    for page in PAGES:
        text = page.read_text()
        for block in blocks(page, "sh"):
            yield from ((page.name, line) for line in block.replace("\\\n", "").splitlines())
        spans = [" ".join(span.split()) for part in FENCE.sub("", text).split("\n\n") for span in re.findall(r"`([^`]+)`", part)]
        yield from ((page.name, span) for span in spans if BEGINS.match(span))
    for row in BUILT:
        yield from ((row.slug, line) for line in row.run)
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield from ((path.name, line) for line in re.findall(r"^    (python .*)$", path.read_text(), re.MULTILINE))
    for line in re.findall(r'^        "(sfumato .*)",$', (ROOT / "src/sfumato/cli/app.py").read_text(), re.MULTILINE):
        yield "help", line


COMMANDS = list(dict.fromkeys(c for c in commands() if c[1].partition("#")[0].strip()))


class Parsed(Exception):
    """The command line was accepted."""


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where}: {line}" for where, line in COMMANDS])
def test_commands_are_commands(where, line, monkeypatch):
    check(shlex.split(line, comments=True), monkeypatch)


def check(words, monkeypatch):
    match words:
        case ["sfumato" | "torchrun", *_]:
            check_sfumato(words[1:] if words[0] == "sfumato" else under_torchrun(words[1:]))
        case ["make", *targets]:
            known = re.findall(r"^([A-Za-z-]+)(?::| \?=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target.partition("=")[0] for target in targets} <= set(known)
        case ["python", "-m", "sfumato.catalogue", option]:
            assert option in ("--write", "--check")
        case ["python", "-m", module, *options]:
            accepted(monkeypatch, [module, *options], lambda: runpy.run_module(module, run_name="__main__"))
        case ["python", script, *options]:
            accepted(monkeypatch, [script, *options], lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))
        case ["pip", "install", *names]:
            extras = (ROOT / "pyproject.toml").read_text()
            assert all(f"\n{extra} = [" in extras for name in names for extra in re.findall(r"^sfumato\[(\w+)\]$", name))
        case ["source", ".venv/bin/activate"] | [".venv/bin/pre-commit", "install"]:
            pass
        case _:
            pytest.fail("nobody checks this line: teach this test its program")


def accepted(monkeypatch, argv, run):
    """Run a script as far as its argument parser, which must take the words."""

    def parse(parser, args=None, namespace=None):
        _, unknown = parser.parse_known_args(args, namespace)
        assert not unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(Parsed):
        run()


def under_torchrun(words):
    from torch.distributed.run import parse_args

    options = parse_args(words)
    assert options.module
    assert options.training_script == "sfumato"
    return options.training_script_args


def check_sfumato(words):
    """The words are parsed as the real ones; papers, settings and places must exist."""
    from sfumato.cli.app import app

    command, context = typer.main.get_command(app), None
    while hasattr(command, "resolve_command"):
        context = command.make_context(command.name, words, parent=context)
        words = [*context._protected_args, *context.args]
        if not words:
            return
        _, command, words = command.resolve_command(context, words)
    context = command.make_context(command.name, words, parent=context)
    name, given = context.command.name, context.params
    slugs = given.get("slugs") or [slug for slug in [given.get("slug")] if slug]
    assert all(slug == "SLUG" or (name, slug) == ("show", "masks") or catalogue.find(slug) for slug in slugs)
    settings = parse_settings([first_choice(pair) for pair in given.get("set_") or []])
    if name == "train" and settings:
        configure(catalogue.load_method(slugs[0]).Config, "small", settings)
    if name == "compare":
        from sfumato.engine.arms import resolve

        for arm in resolve(given["arms"], settings)[0]:
            configure(catalogue.load_method(arm.slug).Config, "small", dict(arm.settings))
    if name == "probe" and given.get("kind") not in (None, "KIND"):
        from sfumato.instruments.kinds import load_kind

        assert set(settings) <= set(load_kind(given["kind"]).settings.model_fields)
    if name == "apply":
        assert given["do"] in (None, "restore", "encode", "predict", "search")
    place = r"sample:(photos|digits|faces|video|scenes)|(arrays|pairs|kitti|hf|wds):\S+|[^:]+"
    assert re.fullmatch(place, given.get("data") or "none"), "a place that `open_data` knows"


def first_choice(pair):
    """`adversarial=smooth|trades|pgd` tells three; the rest is checked by the text around it."""
    return pair.partition("|")[0]


@pytest.mark.parametrize(
    "line",
    [
        "sfumato trian mae",
        "sfumato train mae --minuets 3",
        "sfumato train maee --data x",
        "sfumato train mae --set colour=red --data x",
        "sfumato train mae --data sample:cats",
        "sfumato compare mae:colour=red simmim --data x",
        "sfumato probe curvature x --set colour=red",
        "torchrun --nproc_per_node 2 -m sfumato trian",
        "make tea",
        "python examples/part_in_own_loop.py --stpes 3",
        "python examples/none.py",
        "python -m benchmarks --slow",
        "pip install 'sfumato[all]'",
        "curl example.org",
    ],
)
def test_a_line_that_is_no_command_is_found(line, monkeypatch):
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        check(shlex.split(line), monkeypatch)


# ---- Python


def absent(block):
    """Packages that a block imports and this machine has not; what it imports of ours must be there."""
    modules = []
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sfumato"):
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return sorted({m.partition(".")[0] for m in modules if importlib.util.find_spec(m.partition(".")[0]) is None})


def together():
    """The blocks of the page on peers, by the heading above them; each stands alone."""
    for part in re.split(r"^###? ", (ROOT / "docs/peers.md").read_text(), flags=re.MULTILINE)[1:]:
        found = [body for kind, body in FENCE.findall(part) if kind == "python"]
        yield from ((f"{part.splitlines()[0]}, {i}" if i else part.splitlines()[0], body) for i, body in enumerate(found))


PEERS = dict(together())
OUTCOMES = {
    "timm, both ways": lambda s: s["tokens"].shape == (2, 50, 192),
    "Our masks in other masked autoencoders": lambda s: s["output"].mask.bool().equal(s["hidden"]),
    "Our masks in other masked autoencoders, 1": lambda s: not s["hidden"].gather(1, s["idx_keep"][:, 1:] - 1).any(),
    "Our probes on their features": lambda s: s["accuracy"] > 0.35 and s["vote"] > 0.35,
    "Physics of deepinv": lambda s: s["picture"].shape == (1, 3, 32, 32) and s["picture"].isfinite().all(),
    "Schedules of diffusers": lambda s: (s["scheduler"].alphas_cumprod - s["schedule"].abar).abs().max() < 1e-6,
    "Samplers of k-diffusion": lambda s: s["pictures"].shape == (1, 3, 8, 8) and s["pictures"].isfinite().all(),
    "Operators of curvlinops": lambda s: s["largest"].allclose(curvature(s)[-3:].flip(0), rtol=1e-3),
    "Attacks of torchattacks": lambda s: 0 < (s["attacked"] - s["x"]).abs().max() < 8.01 / 255,
}


def curvature(space):
    """All eigenvalues of the Hessian, by our operator."""
    import torch

    from sfumato.probes import HessianOperator

    return torch.linalg.eigvalsh(HessianOperator(space["net"], torch.nn.CrossEntropyLoss(), space["data"]).dense())


@pytest.mark.parametrize("title", PEERS)
def test_sfumato_and_a_peer_together(title):
    import torch

    missing = absent(PEERS[title])
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    torch.manual_seed(0)
    space: dict = {}
    exec(PEERS[title], space)
    assert OUTCOMES[title](space)


def test_every_block_of_the_peers_is_judged():
    assert PEERS.keys() == OUTCOMES.keys()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p.name != "peers.md"], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    import numpy as np
    from timm.models.vision_transformer import VisionTransformer

    from sfumato.nn import MaskedViTEncoder

    monkeypatch.chdir(tmp_path)
    np.savez("embeddings.npz", names=np.array(["a", "b", "c"]), features=np.array([[1.0, 0], [0, 1], [2, 1]]))
    export(MaskedViTEncoder(32, 8, 3, dim=16, depth=1, heads=2))
    space: dict = {}
    for block in blocks(page, "python"):
        exec(block, space)
    if page.name == "tasks.md":
        assert space["nearest"].tolist() == ["a", "c", "b"]
        assert isinstance(space["vit"], VisionTransformer)
        assert float(space["loss"]) < float(space["y"].square().mean())
        assert space["sharpest"] > 0
        assert Path("curvature.html").is_file()
        assert [row["arm"] for row in space["done"].table] == ["optimizer=adam", "optimizer=sgd"]
    elif page.name in ("README.md", "index.md"):
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
