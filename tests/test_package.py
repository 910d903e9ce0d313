"""The package itself: instant to import, everything by its name when first used."""

import subprocess
import sys

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
