"""The package itself: instant to import, everything by its name when first used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sfumato


def test_import_is_light():
    code = (
        "import sys, sfumato; heavy = {'torch', 'numpy', 'pydantic', 'typer', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_names_lead_to_the_engine_and_the_rooms():
    assert sfumato.fit is sfumato.engine.fit
    assert sfumato.load is sfumato.engine.load
    assert sfumato.errors.nearest("cbns", ["cbsn"]) == ["cbsn"]
    assert {"optim", "masks", "nn", "losses", "probes", "data", "fit", "load"} <= set(dir(sfumato))
    with pytest.raises(AttributeError):
        sfumato.no_such_name  # noqa: B018


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert sfumato.__version__ == version("sfumato")


ROOMS = ["masks", "physics", "nn", "losses", "optim", "attacks", "diffusion", "metrics", "sparsity", "probes", "data"]


def test_imports_among_parts_go_down_only():
    source, wrong = Path(sfumato.__file__).parent, []
    for height, room in enumerate(ROOMS):
        for file in (source / room).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sfumato."):
                    other = str(node.module).split(".")[1]
                    if other != "errors" and other not in ROOMS[: height + 1]:
                        wrong.append(f"{room}/{file.name} imports {node.module}")
    assert not wrong
