"""What griffe should read otherwise in our docstrings, so that mkdocstrings shows what the author meant.

Doctests become code blocks: in running text Markdown would take `>>>` for three nested quotations. Arguments that share a line
(`width, height: in pixels`) get one each. The `Args:` of a NamedTuple become attributes: it has no `__init__` of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


def fence(text: str) -> str:
    """The text with every doctest, up to the next empty line, as a fenced block."""
    return re.sub(r"^( *)(>>> .*(?:\n.*\S.*)*)", r"\1```pycon\n\1\2\n\1```", text, flags=re.MULTILINE)


def one_each(text: str) -> str:
    """The text with every item of its `Args:` that names several arguments repeated for each."""
    head, heading, tail = text.partition("\nArgs:\n")
    items, blank, rest = tail.partition("\n\n")
    item = re.compile(r"^( +)([*\w]+(?:, [*\w]+)+)(:.*(?:\n\1 +.*)*)", re.MULTILINE)
    return head + heading + item.sub(lambda m: "\n".join(m[1] + name + m[3] for name in m[2].split(", ")), items) + blank + rest


class Docstrings(griffe.Extension):
    """Rewrites docstrings after they are read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for every module, class, function and attribute."""
        if obj.docstring is None:
            return
        text = one_each(fence(obj.docstring.value))
        named_tuple = isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases)
        obj.docstring.value = text.replace("\nArgs:\n", "\nAttributes:\n") if named_tuple else text
