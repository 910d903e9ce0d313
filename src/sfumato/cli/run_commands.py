"""The commands below `sfumato runs`, declared as those of `sfumato.cli.app` are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.words import AsJson, Runs, examples

runs_app = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="List, show or remove runs.")


@runs_app.callback()
def runs(context: typer.Context, root: Runs = Path("runs"), json: AsJson = False) -> None:
    """List, show or remove runs."""
    if context.invoked_subcommand is None:
        runs_ls(root, json)


@runs_app.command("ls", epilog=examples("sfumato runs ls --runs elsewhere/runs --json"))
def runs_ls(root: Runs = Path("runs"), json: AsJson = False) -> None:
    """List the runs, newest last."""
    from sfumato.cli import runs as work

    work.listing(root, json)


@runs_app.command("show", epilog=examples("sfumato runs show runs/cbsn/STAMP"))
def runs_show(run: Annotated[Path, typer.Argument(help="A run folder.")], json: AsJson = False) -> None:
    """Tell where a run stands."""
    from sfumato.cli import runs as work

    work.show(run, json)


@runs_app.command("rm", epilog=examples("sfumato runs rm runs/cbsn/STAMP --yes"))
def runs_rm(
    paths: Annotated[list[Path], typer.Argument(help="Run folders.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove runs."""
    from sfumato.cli import runs as work

    work.remove(paths, yes)
