"""The command line. `main` is the entry point `sfumato`; commands live in the modules beside, imported when they run."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line (default: the arguments of the process) and exit with its code."""
    from sfumato.cli.app import main as run

    run(args)
