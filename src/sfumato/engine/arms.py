"""Arms of a comparison: what a person wrote, made whole and checked.

>>> from sfumato.engine.arms import parse_arm
>>> parse_arm("fast=classifier:lr=0.1,optimizer=sgd")
Arm(slug='classifier', settings={'lr': 0.1, 'optimizer': 'sgd'}, label='fast')
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfumato import catalogue
from sfumato.data import ImageSet
from sfumato.engine.loading import build, parse_settings
from sfumato.errors import BadSetting, SfumatoError, nearest
from sfumato.method import Method, capabilities

SIZES = ("dim", "depth", "heads", "width", "image_size", "patch", "batch_size")
"""Settings that make arms unlike in size; where arms share one and differ in it, it is said."""


@dataclass(frozen=True)
class Arm:
    """A method with settings, and what it is called on the page."""

    slug: str
    settings: Mapping[str, Any]
    label: str


def parse_arm(text: str) -> Arm:
    """`SLUG`, `SLUG:name=value,...` or `LABEL=SLUG:...`; without a label it is "" until all arms are known."""
    found = re.fullmatch(r"(?:(?P<label>[^:=]+)=)?(?P<slug>[^:=]+)(?::(?P<settings>.*))?", text.strip(), re.DOTALL)
    if found is None:
        raise BadSetting(f"{text!r} is no arm: write SLUG, SLUG:name=value,name=value or LABEL=SLUG:name=value")
    pairs = re.split(r",(?=\s*\w+\s*=)", found["settings"]) if found["settings"] else []
    return Arm(found["slug"].strip(), parse_settings(pairs), (found["label"] or "").strip())


def resolve(arms: Sequence[str | Arm], settings: Mapping[str, Any]) -> tuple[list[Arm], list[str]]:
    """Arms with labels and all their settings, and remarks on settings that not every arm has.

    Raises:
        BadSetting: one arm only, two of one name, unlike batch types, a setting that no arm has or that breaks the budget.
    """
    parsed = [arm if isinstance(arm, Arm) else parse_arm(arm) for arm in arms]
    rows = {arm.slug: catalogue.find(arm.slug) for arm in parsed}
    if len(parsed) < 2:
        raise BadSetting("a comparison needs two arms or more, such as mae simmim, or classifier:lr=0.1 classifier:lr=0.01")
    kinds = {slug: catalogue.load_method(slug) for slug in rows}
    if len({row.batch for row in rows.values()}) > 1:
        eaten = ", ".join(f"{slug} eats {row.batch}" for slug, row in rows.items())
        raise BadSetting(f"arms must eat the same kind of batch: {eaten}")
    slugs = [arm.slug for arm in parsed]
    named = [replace(arm, label=arm.label or _label(arm, slugs)) for arm in parsed]
    labels = [arm.label for arm in named]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise BadSetting(f"two arms are called {twice!r}: give them names, such as first={slugs[labels.index(twice)]}:...")
    notes = []
    for name in settings:
        target, colon, field = name.rpartition(":")
        if colon and target not in {*slugs, *labels}:
            raise BadSetting(f"{name}: no arm is called {target!r}; there are {', '.join(dict.fromkeys([*slugs, *labels]))}")
        have = [arm.label for arm in named if field in kinds[arm.slug].Config.model_fields]
        if not colon and not have:
            near = nearest(name, {f for kind in kinds.values() for f in kind.Config.model_fields})
            raise BadSetting(f"no arm has a setting {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        if not colon and len(have) < len(named):
            notes.append(f"The setting {name} went to {', '.join(have)}; the others have none of that name.")
    full = [_with_settings(arm, settings, kinds[arm.slug]) for arm in named]
    if arm := next((arm for arm in full if "steps" in arm.settings), None):
        raise BadSetting(f"{arm.label}: steps are the budget, the same for all: give --steps N (or --minutes M) instead")
    return full, notes


def _label(arm: Arm, slugs: list[str]) -> str:
    """A slug that occurs once is a name; else the settings are, where all arms have one slug."""
    told = ", ".join(f"{name}={value}" for name, value in arm.settings.items())
    if slugs.count(arm.slug) == 1 or not told:
        return arm.slug
    return told if len(set(slugs)) == 1 else f"{arm.slug} {told}"


def _with_settings(arm: Arm, settings: Mapping[str, Any], kind: type[Method]) -> Arm:
    """Settings for all arms that have them, then those for this one, then its own."""
    fields = kind.Config.model_fields
    shared = {name: value for name, value in settings.items() if name in fields}
    aimed = {n.rpartition(":")[2]: v for n, v in settings.items() if n.rpartition(":")[0] in (arm.slug, arm.label)}
    return replace(arm, settings={**shared, **aimed, **arm.settings})


def built(arm: Arm, data: ImageSet, preset: str, device: str, steps: int | None) -> Method:
    """An arm's method, so that everything that is wrong with it is told before anything runs."""
    settings = {**arm.settings, **({"steps": steps} if steps else {})}
    try:
        return build(catalogue.load_method(arm.slug), data.facts, preset=preset, settings=settings, device=device)
    except SfumatoError as error:
        raise type(error)(f"{arm.label}: {error}") from None


def same_job(arms: Sequence[Arm], methods: Mapping[str, Method]) -> None:
    """Refuse arms that are there for unlike things."""
    jobs = {arm.label: next(iter(capabilities(methods[arm.label])), "nothing") for arm in arms}
    if len(set(jobs.values())) > 1:
        told = ", ".join(f"{label} is there to {job}" for label, job in jobs.items())
        raise BadSetting(f"arms must do the same thing, or their figures say nothing: {told}")


def unlike(methods: Mapping[str, Method]) -> list[str]:
    """In what arms are unlike in size."""
    notes = []
    for name in SIZES:
        values = {label: getattr(m.config, name) for label, m in methods.items() if hasattr(m.config, name)}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{label} {value}" for label, value in values.items())
            notes.append(f"Arms are unlike in {name} ({told}): --set {name}=VALUE makes it equal.")
    counts = {label: sum(p.numel() for p in m.parameters() if p.requires_grad) for label, m in methods.items()}
    if max(counts.values()) > 1.25 * min(counts.values()):
        notes.append("Arms are unlike in parameters: " + ", ".join(f"{label} {n:,}" for label, n in counts.items()) + ".")
    return notes
