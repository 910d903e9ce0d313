"""The command line. `main` is the entry point `sfumato`; commands live in the modules beside, imported when they run.

How a command ends: 0 done; 1 it ran and the answer is no; 2 something to mend, said in one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line (default: the arguments of the process) and exit: what a person can mend is one line, no traceback."""
    import typer

    from sfumato.cli.app import app
    from sfumato.errors import Interrupted, SfumatoError

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")  # said by libraries, not of a person's code
    try:
        try:
            typer.main.get_command(app).main(args=None if args is None else list(args), prog_name="sfumato")
        finally:
            sys.stdout.flush()
    except SfumatoError as error:
        print(f"sfumato: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `sfumato papers | head`: nobody reads on; keep the interpreter's last flush quiet too
        sys.stdout = None
        sys.exit(1)
