"""What a person did wrong, said in one line: what was given, what is allowed, what to do next.

Every error that a user can cause is a `SfumatoError`; the command line prints its message on one line and exits with code 2.
Anything else that escapes is a bug and keeps its traceback.

>>> from sfumato.errors import BadSetting, nearest
>>> nearest("colourmae", ["colormae", "cbsn", "mae"])
['colormae', 'mae']
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SfumatoError(Exception):
    """Root of all errors that a person can cause and mend."""


class UnknownName(SfumatoError):
    """A slug, part or sample that does not exist; the message names the nearest ones."""


class NotBuilt(SfumatoError):
    """A paper that stands in the catalogue but is not built yet."""


class BadSetting(SfumatoError):
    """A setting that is unknown, ill-typed or out of its range."""


class BadData(SfumatoError):
    """Data that is missing, empty, unreadable or not what the method eats."""


class BadCheckpoint(SfumatoError):
    """A checkpoint that is missing, damaged, or of another method or version."""


class Busy(SfumatoError):
    """A run folder that another process is writing to."""


class Diverged(SfumatoError):
    """A loss, weight or sample that is no longer finite; of a training the last good checkpoint is kept."""


class Interrupted(SfumatoError):
    """Training was asked to stop and did so cleanly, with a checkpoint; the command line exits with 130."""


class MissingExtra(SfumatoError):
    """An optional dependency that is not installed; the message says which extra brings it."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first (possibly none)."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
