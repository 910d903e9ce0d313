"""The catalogue: one row of facts for every paper and base, read from `catalogue.toml` without importing torch.

>>> from sfumato import catalogue
>>> row = catalogue.find("colormae")
>>> row.family, row.year, row.parts[0]
('masking', 2024, 'masks.color_noise_mask')
>>> [r.slug for r in catalogue.search(["hessian", "optimizer"])][:1]
['adahessian']

Listing, searching, the docs and the web page read only this. `python -m sfumato.catalogue --write` copies the settings of
every built method from its `Config` into the file; `--check` says whether that is still to be done.
"""

from __future__ import annotations

import enum
import functools
import importlib
import json
import re
import sys
import types
import typing
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import NotBuilt, SfumatoError, UnknownName, nearest

if TYPE_CHECKING:
    from sfumato.claim import Claim
    from sfumato.method import Method, MethodConfig

HERE = Path(__file__).parent
FILE = HERE / "catalogue.toml"
RECORDS = HERE / "records"

FAMILIES = {
    "masking": "masked pre-training",
    "restoration": "restoring pictures",
    "superresolution": "sharper pictures and video",
    "diffusion": "diffusion models",
    "optimization": "optimizers, losses, bases",
    "dynamics": "why training works",
    "representation": "what representations hold",
    "robustness": "robustness and attacks",
    "sparsity": "gates, pruning, sparse recovery",
    "systems": "attention, operators, codecs",
}
"""The ten families, in the order of the listing, with a word on each."""

KINDS = ("method", "part", "study", "base")


class NoMethod(SfumatoError):
    """A paper that trains nothing by itself: a part or a study; the message says what to run instead."""


@dataclass(frozen=True)
class Setting:
    """One field of a method's `Config`.

    Args:
        default: the paper's value (None: no value, or taken from the data).
        small: the value of the CPU preset where it differs ("none" for no value), else None.
    """

    name: str
    type: str
    help: str
    default: Any = None
    small: Any = None


@dataclass(frozen=True)
class Row:
    """The facts of one paper or base.

    Args:
        authors: as far as our source names them; `authors_note` says what is missing.
        year: when it first appeared; None where there is no paper.
        arxiv: identifier, or "".
        module: `"package.module:Class"` of what trains; without `:Class` the module holds parts, a study or a claim only.
        kind: `method` (trains), `part` (plugs into another run), `study` (an experiment), `base` (what methods start from).
        parts: public names with their room, such as `"masks.color_noise_mask"`.
        batch: what it eats: `images`, `labelled`, `pairs`, `video`, ...
        fidelity: what is reconstruction, our choice or unverified.
        run: commands that put it to use.
        opens: whose trained models its class takes over by `from_pipeline`: `diffusers`.
    """

    slug: str
    title: str
    family: str
    module: str
    built: bool
    kind: str
    summary: str
    claim: str
    batch: str
    scale: str
    code_licence: str
    year: int | None = None
    venue: str = ""
    arxiv: str = ""
    authors: tuple[str, ...] = ()
    authors_note: str = ""
    parts: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    fidelity: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    opens: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether `sfumato train SLUG` is or will be a command for it."""
        return ":" in self.module

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return asdict(self)


@functools.cache
def load() -> dict[str, Row]:
    """All rows by slug, in the order of the file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return {slug: _row(slug, table) for slug, table in tomllib.loads(FILE.read_text(encoding="utf-8")).items()}


def _row(slug: str, table: dict[str, Any]) -> Row:
    unknown = table.keys() - {f.name for f in fields(Row)}
    if unknown:
        raise ValueError(f"{FILE.name}: [{slug}] has unknown fields {sorted(unknown)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    values["settings"] = tuple(Setting(**setting) for setting in table.get("settings", ()))
    return Row(slug=slug, **values)


def find(slug: str) -> Row:
    """The row of a slug.

    Raises:
        UnknownName: no such paper; the message names the nearest ones.
    """
    rows = load()
    if slug in rows:
        return rows[slug]
    close = nearest(slug.lower(), rows) or [row.slug for row in search(re.split(r"[\W_]+", slug))[:3]]
    hint = f"did you mean {' or '.join(close)}?" if close else "`sfumato papers` lists all"
    raise UnknownName(f"no paper called {slug!r}; {hint}")


def search(words: Sequence[str] = (), family: str | None = None) -> list[Row]:
    """Rows in which every word is found (slug, title, tags, parts, authors, summary), best first; no words: all, in order.

    Raises:
        UnknownName: no such family.
    """
    if family is not None and family not in FAMILIES:
        close = nearest(family.lower(), FAMILIES)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(FAMILIES)}"
        raise UnknownName(f"no family called {family!r}; {hint}")
    wanted = [_fold(word) for word in words if word.strip()]
    scored = []
    for row in load().values():
        scores = [_score(row, word) for word in wanted]
        if all(scores) and family in (None, row.family):
            scored.append((-sum(scores), row))
    return [row for _, row in sorted(scored, key=lambda pair: pair[0])]


def _score(row: Row, word: str) -> int:
    """How well a word fits a row; 0: not at all. A whole word in a field counts double."""
    places = [
        (6, row.slug),
        (5, row.title),
        (4, " ".join(row.tags)),
        (3, " ".join(row.parts)),
        (2, " ".join(row.authors)),
        (1, row.summary),
    ]
    score = 0
    for weight, text in places:
        text = _fold(text)
        if word in text:
            score += weight * (2 if word in re.split(r"[^\w-]+", text) else 1)
    return score


def _fold(text: str) -> str:
    """Lower case without accents: `Fréchet` is found by `frechet`."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()


def record(slug: str) -> dict[str, Any] | None:
    """The stored outcome of a paper's claims, or None when they have not been run."""
    path = RECORDS / f"{slug}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def verdict(row: Row) -> str:
    """One phrase: how the claims came out, `not run yet`, or `not yet` for a paper that is not built."""
    stored = record(row.slug)
    verdicts = [c["verdict"] for c in stored["claims"]] if stored else []
    if not verdicts:
        return "not run yet" if row.built else "not yet"
    if len(set(verdicts)) == 1:
        return str(verdicts[0])
    return f"{verdicts.count('reproduced')} of {len(verdicts)} reproduced"


def related(row: Row, built: bool = True) -> list[Row]:
    """Other papers, nearest first: those that share parts, then tags, of the same family first."""

    def closeness(other: Row) -> tuple[bool, int, int]:
        shared_parts = len(set(row.parts) & set(other.parts))
        return other.family == row.family, shared_parts, len(set(row.tags) & set(other.tags))

    others = [r for r in load().values() if r.slug != row.slug and (r.built or not built)]
    others = [r for r in others if any(closeness(r))]
    return sorted(others, key=closeness, reverse=True)


def load_method(slug: str) -> type[Method]:
    """The method class of a paper; imports its module.

    Raises:
        UnknownName: no such paper.
        NotBuilt: it stands in the catalogue only; the message says what stands nearest.
        NoMethod: it is a part or a study; the message says what to run instead.
    """
    row = find(slug)
    if not row.built:
        near = [r.slug for r in related(row) if r.trains][:3]
        hint = f"; built and nearest: {', '.join(near)}" if near else ""
        raise NotBuilt(f"{slug} is not built yet ({row.kind}: {row.summary.rstrip('.')}){hint}. See: sfumato show {slug}")
    if not row.trains:
        what = "a part that plugs into another run" if row.kind == "part" else "a study"
        instead = f"run instead: {row.run[0]}" if row.run else f"see: sfumato show {slug}"
        raise NoMethod(f"{slug} is {what}, not something to train by itself; {instead}")
    module, _, name = row.module.partition(":")
    return typing.cast("type[Method]", getattr(importlib.import_module(module), name))


def load_claim(slug: str) -> dict[str, Claim]:
    """The claims of a paper by name, in the order of its file; imports its module. Empty: a base that claims nothing.

    Raises:
        UnknownName: no such paper.
        NotBuilt: it stands in the catalogue only.
    """
    from sfumato.claim import Claim

    row = find(slug)
    if not row.built:
        raise NotBuilt(f"{slug} is not built yet, so its claim cannot be run. See: sfumato show {slug}")
    module = importlib.import_module(row.module.partition(":")[0])
    found = {name: value for name, value in vars(module).items() if isinstance(value, Claim)}
    return {name: value for name, value in found.items() if value.run.__module__ == module.__name__}


# The settings in the file are copies of the Config classes: made here, never typed.


def settings_of(config: type[MethodConfig]) -> list[Setting]:
    """The fields of a `Config` class: the paper's default, and the CPU preset's value where it differs."""
    paper, small = config(), config.small()
    rows = []
    for name, info in config.model_fields.items():
        default, preset = _plain(getattr(paper, name)), _plain(getattr(small, name))
        other = None if preset == default else "none" if preset is None else preset
        rows.append(Setting(name, _type_name(info.annotation), info.description or "", default, other))
    return rows


def _plain(value: Any) -> Any:
    """A value that TOML can hold (None aside)."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _type_name(annotation: Any) -> str:
    """A type as a person would write it: `float | None`, `"green" | "red"`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in args)
    if origin is typing.Literal:
        return " | ".join(json.dumps(a) if isinstance(a, str) else str(a) for a in args)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if a is ... else _type_name(a) for a in args)}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def refresh_settings(write: bool = True) -> list[str]:
    """Copy the settings of every built method from its `Config` into `catalogue.toml`, and say which slugs had changed.

    The rest of the file stays as it is, byte for byte. With `write=False` nothing is written.
    """
    before = FILE.read_bytes().decode("utf-8")
    after, changed = before, []
    for slug, row in load().items():
        if row.built and row.trains:
            text = _with_settings(after, slug, settings_of(load_method(slug).Config))
            if text != after:
                after = text
                changed.append(slug)
    if write and changed:
        FILE.write_bytes(after.encode("utf-8"))
        load.cache_clear()
    return changed


def _with_settings(text: str, slug: str, settings: Iterable[Setting]) -> str:
    """The file's text with the `settings` of one table replaced."""
    lines = [f"  {_inline(setting)},\n" for setting in settings]
    block = f"settings = [\n{''.join(lines)}]" if lines else "settings = []"
    table = re.compile(rf"^\[{re.escape(slug)}\]\n.*?(?=^\[|\Z)", re.MULTILINE | re.DOTALL)
    field = re.compile(r"^settings = \[(?:\]|\n(?:  .*\n)*\])$", re.MULTILINE)
    found = table.search(text)
    if found is None or len(field.findall(found[0])) != 1:
        raise ValueError(f"{FILE.name}: the table [{slug}] needs exactly one `settings = []`")
    return text[: found.start()] + field.sub(lambda _: block, found[0]) + text[found.end() :]


def _inline(setting: Setting) -> str:
    """One setting as a TOML inline table; values of None are left out."""
    pairs = [f"{name} = {_toml(value)}" for name, value in asdict(setting).items() if value is not None]
    return f"{{ {', '.join(pairs)} }}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    if sys.argv[1:] not in (["--write"], ["--check"]):
        sys.exit("usage: python -m sfumato.catalogue --write | --check")
    stale = refresh_settings(write=sys.argv[1] == "--write")
    print(f"{FILE.name}: settings changed: {', '.join(stale)}" if stale else f"{FILE.name}: settings are up to date")
    sys.exit(1 if stale and sys.argv[1] == "--check" else 0)
