"""The commands, and how they end. A command here only declares its words; the module that does the work is imported in its body.

So `sfumato --help`, `papers` and `show` start in a fraction of a second: nothing imports torch or pydantic before a command
needs it. To add a command, write a plain function in `sfumato/cli/<name>.py` and a thin one here.

How a command ends: 0 done; 1 it ran and the answer is no; 2 something to mend, said in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sfumato.errors import SfumatoError

app = typer.Typer(
    name="sfumato",
    help="63 published methods that learn by hiding something, or that measure why training works.",
    epilog="Start here: sfumato papers · sfumato show colormae · sfumato train colormae --data sample:photos --minutes 2",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a bug keeps its plain traceback; a SfumatoError is one line (see `main`)
    context_settings={"help_option_names": ["-h", "--help"]},
)

CATALOGUE = "Look around"
"""The panels of `--help`: commands that belong together stand together."""


def examples(*lines: str) -> str:
    """An epilog of commands to copy, each `command  # what it does`."""
    from rich.markup import escape

    return "\n".join(["[bold]Examples[/bold]", *(f"  {escape(line)}" for line in lines)])


def _version(wanted: bool) -> None:
    if wanted:
        import sfumato

        print(sfumato.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(
    rich_help_panel=CATALOGUE,
    epilog=examples(
        "sfumato papers  # all of them, by family",
        "sfumato papers blind noise  # those that mention both words, best first",
        "sfumato papers --family diffusion --json",
    ),
)
def papers(
    words: Annotated[list[str] | None, typer.Argument(help="Words that must all occur (title, tags, parts, authors).")] = None,
    family: Annotated[str | None, typer.Option("--family", "-f", help="One family only, such as masking or diffusion.")] = None,
    built: Annotated[bool, typer.Option("--built", help="Only what can be run today.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """List and search the papers."""
    from sfumato.cli import catalogue

    catalogue.papers(words or [], family=family, built=built, as_json=json)


@app.command(
    rich_help_panel=CATALOGUE,
    epilog=examples(
        "sfumato show colormae  # what it is, its settings, how to run it, how its claim came out",
        "sfumato show adahessian --json",
    ),
)
def show(
    slug: Annotated[str, typer.Argument(help="A paper or base, as `sfumato papers` names it.")],
    json: Annotated[bool, typer.Option("--json", help="Print the row and the stored record as JSON.")] = False,
) -> None:
    """Tell all about one paper."""
    from sfumato.cli import catalogue

    catalogue.show(slug, as_json=json)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line and exit: an error that a person can mend is one line, never a traceback."""
    try:
        try:
            typer.main.get_command(app).main(args=None if args is None else list(args), prog_name="sfumato")
        finally:
            sys.stdout.flush()
    except SfumatoError as error:
        print(f"sfumato: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `sfumato papers | head`: nobody reads on; keep the interpreter's last flush quiet too
        sys.stdout = None
        sys.exit(1)
