"""Methods side by side: the same data, the same budget, the same seeds, with paired intervals of what differs.

An arm is a method with settings, written `SLUG`, `SLUG:name=value,name=value`, or with a label of its own in front,
`LABEL=SLUG:...`. Every arm is trained once with every seed; a seed fixes weights, order, augmentation and noise, so arms are
paired. One training is a *trial*; it runs in a fresh process of one thread, and trials of all arms take turns.

>>> from sfumato.engine import compare
>>> tiny = {"image_size": 8, "patch": 2, "dim": 16, "depth": 1, "crop_scale": None}
>>> done = compare(["mae", "mae:mask_ratio=0.5"], "sample:digits", steps=2, seeds=1, settings=tiny, processes=0, device="cpu")
>>> [row["arm"] for row in done.table], done.record["held"]
(['mae', 'mask_ratio=0.5'], 'steps')
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import catalogue
from sfumato.claim import ENOUGH_SEEDS
from sfumato.data.image_set import summary
from sfumato.engine.arms import Arm, built, resolve, same_job, unlike
from sfumato.engine.lab import provenance, threads
from sfumato.engine.outcomes import differences, limits, metrics_of
from sfumato.engine.trial import Job, on_cpu, split
from sfumato.engine.trial_pool import Store, Told, in_turn, run_trials
from sfumato.errors import BadSetting
from sfumato.method import Method, capabilities

EVALUATIONS = 4
"""Evaluations spread over a training."""


@dataclass(frozen=True)
class Comparison:
    """What came out: the table, and everything behind it as plain values (`record`)."""

    record: dict[str, Any]

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row an arm: its costs, and every figure as `(mean, low, high)` over seeds (95 % t interval; None: no limit)."""
        record, rows = self.record, []
        for arm in record["arms"]:
            costs = [seed[arm["label"]] for seed in record["costs"].values()]
            memory = [c["memory"] for c in costs if c["memory"] is not None]
            row: dict[str, Any] = {
                "arm": arm["label"],
                "parameters": arm["trainable"],
                "steps": arm["steps"],
                "seconds": statistics.fmean(c["seconds"] for c in costs) if costs else None,
                "images_per_second": statistics.median(c["images_per_second"] for c in costs) if costs else None,
                "memory": max(memory) if memory else arm["memory"],
            }
            for metric in metrics_of(record):
                values = [seed[arm["label"]].get(metric) for seed in record["figures"].values()]
                if values and None not in values:
                    row[metric] = limits(values)
            rows.append(row)
        return rows

    def __str__(self) -> str:
        """The table as text."""
        figures, fixed = metrics_of(self.record), ("arm", "parameters", "steps", "seconds", "images_per_second", "memory")
        lines = [[name.replace("_", " ") for name in (*fixed, *figures)]]
        for row in self.table:
            memory = "-" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB"
            counts = [f"{row['parameters']:,}", f"{row['steps']:,}"]
            costs = [_number(row["seconds"]), _number(row["images_per_second"]), memory]
            lines.append([row["arm"], *counts, *costs, *(_range(row.get(m)) for m in figures)])
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def compare(
    arms: Sequence[str | Arm],
    data: Any,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seeds: int | Sequence[int] = ENOUGH_SEEDS,
    settings: Mapping[str, Any] | None = None,
    preset: str = "auto",
    device: str = "auto",
    processes: int | None = None,
    out: str | Path | None = None,
    dry_run: bool = False,
    report: Told | None = None,
) -> Comparison:
    """Train every arm with every seed, and say what differs from the first arm.

    Trials run in processes that are started afresh: call it under `if __name__ == "__main__":` in a script of yours.

    Args:
        arms: two or more, see the top of this file.
        data: a place, or what `open_data` takes from Python. A tenth is held out where it has no test part.
        steps: for every arm.
        minutes: for every arm instead: each is timed first, and its number of steps fixed. Neither: one minute.
        seeds: how many (0, 1, ...), or which. Fewer than 5 give no verdict.
        settings: `name` goes to every arm that has it, `SLUG:name` (or `LABEL:name`) to that one; an arm's own come last.
        preset: "paper", "small", or "auto" (small on a CPU).
        device: "auto", "cpu", "cuda", ...
        processes: trials beside each other; 0: here, one after the other, without memory. None: 2 on a CPU, else 1.
        out: a folder for finished trials, so that the same call goes on after a stop, and for pictures.
        dry_run: only time the arms.
        report: told after every trial.

    Raises:
        BadSetting: fewer than two arms, arms that eat unlike batches or do unlike things, unknown settings, a bad budget.
        BadData: data that an arm cannot be trained on.
        UnknownName, NotBuilt, NoMethod: no such method.
        Diverged: a loss is no longer finite; the line says of which arm.
    """
    started = time.monotonic()
    if steps is not None and minutes is not None:
        raise BadSetting("the budget is steps or minutes, not both")
    if (steps is not None and steps < 1) or (minutes is not None and not 0 < minutes < math.inf):
        raise BadSetting("steps and minutes are positive")
    chosen = list(range(seeds) if isinstance(seeds, int) else seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise BadSetting(f"seeds={seeds}: give at least 1, each once ({ENOUGH_SEEDS} for a verdict)")
    here = on_cpu(device)
    processes = (2 if here else 1) if processes is None else processes
    minutes = 1.0 if steps is None and minutes is None else minutes
    parsed, notes = resolve(arms, settings or {})
    train, held_out, how = split(data)
    methods = {arm.label: built(arm, train, preset, device, steps) for arm in parsed}
    same_job(parsed, methods)
    notes += unlike(methods)
    place = data if isinstance(data, str) else None
    store = Store(None if out is None else Path(out), place, f"{summary(train)}, held out: {how}", processes)

    rounds = range(max(1, processes))  # every arm as often, and always as many at once
    timing = [Job(arm, chosen[i % len(chosen)], preset, device, alone=processes > 0) for i in rounds for arm in parsed]
    timed = run_trials(timing, data, processes, store, methods, report)
    costs = {arm.label: _averaged(timed[i :: len(parsed)]) for i, arm in enumerate(parsed)}
    plan = {}
    for arm in parsed:
        cost = costs[arm.label]
        count = steps or max(1, int(60 * float(minutes or 0) / cost["step_seconds"]))
        often = EVALUATIONS if EVALUATIONS * cost["evaluate_seconds"] <= count * cost["step_seconds"] else 1
        plan[arm.label] = count, tuple(sorted({max(1, count * k // often) for k in range(1, often + 1)}))
    record: dict[str, Any] = {
        "arms": [_described(arm, methods[arm.label], costs[arm.label], plan[arm.label][0]) for arm in parsed],
        "data": place or "given from Python", "summary": summary(train, None if held_out is train else held_out),
        "held_out": how, "held": "steps" if steps else "minutes", "budget": steps or minutes, "seeds": chosen,
        "job": next(iter(capabilities(methods[parsed[0].label])), ""), "processes": processes,
        "device": "cpu" if here else device, "notes": notes,
        "estimate": _estimate(costs, plan, len(chosen), processes),
        "figures": {}, "untrained": {}, "costs": {}, "curves": {}, "evaluations": {}, "pictures": {}, "differences": [],
    }  # fmt: skip
    if not dry_run:
        jobs = in_turn(parsed, chosen, plan, preset, device, processes)
        results = run_trials(jobs, data, processes, store, methods, report)
        for job, result in zip(jobs, results):
            label, seed = job.arm.label, str(job.seed)
            for part in ("figures", "untrained", "costs", "curves", "evaluations"):
                record[part].setdefault(seed, {})[label] = result[part]
            if job.seed == chosen[0]:
                record["pictures"][label] = result["pictures"]
        record["differences"] = differences(record)
        notes += _missed(record)
    record |= {
        "kept": store.found, "seconds": round(time.monotonic() - started, 1),
        "machine": f"{platform.machine()}, {threads(processes) if here else device}", **provenance(),
    }  # fmt: skip
    return Comparison(record)


def _averaged(timed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several timings of one arm as one."""
    seconds = {name: statistics.fmean(t[name] for t in timed) for name in timed[0] if name.endswith("_seconds")}
    return {**timed[0], **seconds}


def _missed(record: Mapping[str, Any]) -> list[str]:
    """Arms whose time came out otherwise than the budget said, since steps are fixed beforehand."""
    if record["held"] != "minutes":
        return []
    given = 60 * record["budget"]
    took = {a["label"]: statistics.fmean(s[a["label"]]["seconds"] for s in record["costs"].values()) for a in record["arms"]}
    if all(abs(seconds - given) <= 0.15 * given for seconds in took.values()):
        return []
    told = ", ".join(f"{label} {seconds:.3g} s" for label, seconds in took.items())
    return [f"Of {given:.3g} s that each arm was given, took: {told}. Steps are fixed beforehand; the machine's speed changed."]


def _described(arm: Arm, method: Method, cost: Mapping[str, Any], steps: int) -> dict[str, Any]:
    config = {**method.config.model_dump(mode="json"), "steps": steps}
    return {
        "label": arm.label, "slug": arm.slug, "title": catalogue.find(arm.slug).title, "given": dict(arm.settings),
        "settings": config, "steps": steps, **{k: v for k, v in cost.items() if k != "setup_seconds"},
    }  # fmt: skip


def _estimate(costs: Mapping[str, Any], plan: Mapping[str, Any], seeds: int, processes: int) -> dict[str, Any]:
    """Seconds of everything (without probes of features), and bytes of what runs at once."""
    seconds = sum(
        seeds * (c["setup_seconds"] + plan[label][0] * c["step_seconds"] + (1 + len(plan[label][1])) * c["evaluate_seconds"])
        for label, c in costs.items()
    )
    largest = sorted((c["memory"] for c in costs.values() if c["memory"] is not None), reverse=True)
    return {"seconds": seconds / max(1, processes), "memory": largest[0] * max(1, processes) if largest else None}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _range(limits: Sequence[float | None] | None) -> str:
    if limits is None:
        return "-"
    mean, low, high = limits
    return _number(mean) if low is None else f"{_number(mean)} [{_number(low)}, {_number(high)}]"
