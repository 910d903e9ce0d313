"""Run the real command line in this process."""

from typing import NamedTuple

import pytest


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def sfumato(capfd, tmp_path, monkeypatch):
    """Call the command line with words; gives exit code, stdout and stderr. Runs in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> Done:
        from sfumato.cli import main

        capfd.readouterr()
        try:
            main([str(w) for w in words])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run
