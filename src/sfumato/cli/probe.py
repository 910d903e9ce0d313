"""`sfumato probe`: measure any torch or timm model, or a run, on any data; numbers, a page, or JSON."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from sfumato.cli.console import hint, say, say_json
from sfumato.errors import BadSetting, Interrupted
from sfumato.instruments.kinds import KINDS, load_kind


def listing(as_json: bool) -> None:
    """The kinds, and what each tells."""
    if as_json:
        return say_json(KINDS)
    for name, told in KINDS.items():
        say(f"{name:<14}{told}")
    hint("sfumato probe KIND tells its settings; sfumato probe KIND MODEL --data WHERE measures")


def explain(name: str, as_json: bool) -> None:
    """What a kind measures, and its settings."""
    kind = load_kind(name)
    fields = {n: {"default": f.default, "help": f.description} for n, f in kind.settings.model_fields.items()}
    if as_json:
        return say_json({"probe": name, "tells": KINDS[name], "models": kind.models, "settings": fields})
    say(f"{name}: {KINDS[name]}\n")
    for field, told in fields.items():
        say(f"  --set {field + '=' + str(told['default']):<20}{told['help']}")
    hint(f"\nnext: sfumato probe {name} {'MODEL MODEL_B' if kind.models == 2 else 'MODEL'}{' --data WHERE' * kind.data}")


def probe(
    name: str, model: str, other: str | None, where: str | None, *, minutes: float, settings: list[str], dry_run: bool,
    out: Path, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Prepare, measure, and write the page and the numbers into a new folder."""
    from sfumato.engine.loading import parse_settings
    from sfumato.instruments import Probe
    from sfumato.report.probe_report import with_error, write_probe_report
    from sfumato.report.run_report import duration

    chosen = parse_settings(settings)
    for taken in chosen.keys() & {"kind", "model", "data", "other", "loss", "minutes", "weights", "device", "seed"}:
        raise BadSetting(f"{taken} is no setting: give it as --{taken}")
    ready = Probe(name, model, where, other, minutes=minutes, **options, **chosen)
    plan = ready.plan
    said = ", ".join(f"{name}: {_told(value)}" for name, value in plan.chosen.items() if not isinstance(value, dict))
    (say if dry_run and not as_json else hint)(f"{said}; about {duration(plan.seconds)}")
    if dry_run:
        return tell_cost(ready, as_json)
    found = ready.run()
    command = shlex.join(_command(name, model, other, where, minutes, settings, options))
    folder = _folder(out, name)
    page = write_probe_report(found, folder / "report.html", command=command)
    (folder / "findings.json").write_text(json.dumps({**found.as_json(), "command": command}, indent=1, allow_nan=False) + "\n")
    if as_json:
        say_json({**found.as_json(), "command": command, "report": str(page)})
    else:
        for title, value in found.headline.items():
            say(f"{title}: {with_error(value)}")
        say(found.verdict)
        for note in found.notes:
            hint(f"- {note}")
        say(f"report: {page}\nnumbers: {folder / 'findings.json'}")
    if found.interrupted:
        raise Interrupted(f"stopped early; what was measured by then is in {folder}")


def tell_cost(ready: Any, as_json: bool) -> None:
    """What the probe would cost; nothing is written."""
    facts = {"models": [s.facts for s in ready.subjects], "plan": dict(ready.plan.chosen), "seconds": ready.plan.seconds}
    notes = [n for s in ready.subjects for n in s.notes] + list(ready.plan.notes)
    if as_json:
        return say_json({"probe": ready.name, **facts, "notes": notes})
    for subject in ready.subjects:
        say(", ".join(f"{name}: {_told(value)}" for name, value in subject.facts.items()))
    for note in dict.fromkeys(notes):
        hint(f"- {note}")


def _told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _folder(root: Path, name: str) -> Path:
    """A new folder, named by the time."""
    from sfumato.engine.run_folder import fresh_folder

    return fresh_folder(root / name)


def _command(
    name: str, model: str, other: str | None, where: str | None, minutes: float, settings: list[str], options: dict[str, Any]
) -> list[str]:
    words = ["sfumato", "probe", name, model, *([other] if other else [])]
    words += [*(["--data", where] if where else []), "--minutes", f"{minutes:g}"]
    for pair in settings:
        words += ["--set", pair]
    for file in options["weights"]:
        words += ["--weights", str(file)]
    if options["loss"]:
        words += ["--loss", options["loss"]]
    defaults = {"seed": 0, "device": "auto"}
    return words + [w for n, v in defaults.items() if options[n] != v for w in (f"--{n}", str(options[n]))]
