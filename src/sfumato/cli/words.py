"""Words that several commands share, and the examples below their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[Path, typer.Option("--runs", help="Root folder of runs.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a script.")]


def examples(*lines: str) -> str:
    """An epilog of commands to copy, each `command  # what it does`."""
    from rich.markup import escape

    return "\n".join(["[bold]Examples[/bold]", *(f"  {escape(line)}" for line in lines)])
