"""`sfumato compare`: methods side by side on the same data, budget and seeds; one page with intervals, curves and pictures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from sfumato.claim import ENOUGH_SEEDS
from sfumato.cli.console import hint, say, say_json, tell_data
from sfumato.data import open_data
from sfumato.engine.arms import resolve
from sfumato.engine.comparison import Comparison
from sfumato.engine.comparison import compare as run_trials
from sfumato.engine.loading import parse_settings
from sfumato.errors import BadSetting, Interrupted
from sfumato.report.run_report import duration


def compare(
    arms: list[str],
    where: str,
    *,
    steps: int | None,
    minutes: float | None,
    seeds: int,
    settings: list[str],
    preset: str,
    device: str,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
    out: Path | None,
) -> Path | None:
    """Run a comparison; returns its page (None for a dry run)."""
    if (steps is not None and steps < 1) or (minutes is not None and minutes <= 0):
        raise BadSetting("--steps and --minutes are positive")
    chosen = parse_settings(settings)
    folder = out or Path("compared") / _folder([arm.label for arm in resolve(arms, chosen)[0]])
    tell_data(open_data(where, "train"))
    done = [0]

    def tell(arm: str, seed: int | None, seconds: float) -> None:
        done[0] += seed is not None
        if seed is None:
            hint(f"{arm} is timed")
        else:
            hint(f"{arm}, seed {seed} took {seconds:.0f} s ({done[0]} of {len(arms) * seeds} trained)")

    try:
        comparison = run_trials(
            arms, where, steps=steps, minutes=minutes, seeds=seeds, settings=chosen, preset=preset, device=device,
            processes=processes, out=None if dry_run else folder, dry_run=dry_run, report=tell,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; what is finished is kept in {folder}: the same command goes on from there") from None
    record = comparison.record
    record["command"] = _command(arms, where, steps, minutes, seeds, settings, preset, device, processes, out)
    for note in record["notes"]:
        hint(note)
    if dry_run:
        if as_json:
            say_json(record)
        else:
            _tell_cost(record)
        return None
    folder.mkdir(parents=True, exist_ok=True)
    told = {**record, "table": comparison.table}
    (folder / "record.json").write_text(json.dumps(told, indent=1) + "\n")
    from sfumato.report.compare_report import write_compare_report

    page = write_compare_report(record, folder / "report.html", pictures=folder / "pictures")
    if as_json:
        say_json({**told, "report": str(page)})
    else:
        _tell_outcome(comparison, folder, page)
    return page


def _tell_outcome(comparison: Comparison, folder: Path, page: Path) -> None:
    record = comparison.record
    say(str(comparison))
    for d in record["differences"]:
        limits = "" if d["low"] is None else f" [{d['low']:+.4g}, {d['high']:+.4g}]"
        say(f"  {d['arm']} against {d['over']}, {d['metric'].replace('_', ' ')}: {d['mean']:+.4g}{limits}: {d['outcome']}")
    if len(record["seeds"]) < ENOUGH_SEEDS:
        say(f"  no verdict: fewer than {ENOUGH_SEEDS} seeds")
    say(f"record: {folder / 'record.json'}\nreport: {page}")


def _tell_cost(record: dict[str, Any]) -> None:
    """What the whole would cost."""
    for arm in record["arms"]:
        memory = "" if arm["memory"] is None else f", {arm['memory'] / 2**30:.2f} GiB at the peak"
        say(
            f"{arm['label']}: {arm['trainable']:,} parameters, batch {arm['batch']}, {arm['step_seconds']:.3g} s a step, "
            f"{arm['steps']:,} steps, about {duration(arm['step_seconds'] * arm['steps'])} a seed{memory}"
        )
    estimate, seeds = record["estimate"], record["seeds"]
    memory = "" if estimate["memory"] is None else f", {estimate['memory'] / 2**30:.2f} GiB at once"
    count = len(record["arms"]) * len(seeds)
    say(f"in all: {count} trainings, about {duration(estimate['seconds'])}{memory} (probes of features not counted)")


def _folder(labels: list[str]) -> str:
    """A folder's name from what is compared."""
    return "-".join(re.sub(r"[^\w.]+", "-", label).strip("-") for label in labels)[:100]


def _command(
    arms: list[str], where: str, steps: int | None, minutes: float | None, seeds: int, settings: list[str],
    preset: str, device: str, processes: int | None, out: Path | None,
) -> str:  # fmt: skip
    """The line that runs it again."""
    words = ["sfumato", "compare", *arms, "--data", where, "--seeds", str(seeds)]
    given = {"--steps": steps, "--minutes": minutes, "--processes": processes, "-o": out}
    words += [w for name, value in given.items() if value is not None for w in (name, str(value))]
    words += [w for pair in settings for w in ("--set", pair)]
    words += [w for name, value in {"--preset": preset, "--device": device}.items() if value != "auto" for w in (name, value)]
    return shlex.join(words)
