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

import functools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sfumato import catalogue
from sfumato.claim import Better, paired_interval
from sfumato.data import Batch, ImageSet, open_data
from sfumato.data.image_set import as_unit, summary
from sfumato.engine.lab import provenance
from sfumato.engine.loading import build, parse_settings
from sfumato.engine.loop import Options, Trainer, as_data, evaluate, preview
from sfumato.engine.randomness import key
from sfumato.engine.rehearsal import peak_memory, rehearse, resident_memory
from sfumato.errors import BadData, BadSetting, Diverged, SfumatoError, nearest
from sfumato.method import Method, Result, capabilities

ENOUGH_SEEDS = 5
"""With fewer, no verdict is given."""
SIZES = ("dim", "depth", "heads", "width", "image_size", "patch", "batch_size")
"""Settings that make arms unlike in size; where arms share one and differ in it, it is said."""
CURVE_POINTS, EVALUATIONS, SHOWN = 200, 4, 4
"""Points of a loss curve; evaluations spread over a training; pictures that are shown."""
EARLY = 1000
"""Steps before which probes of frozen features are not judged: masked training first makes them worse than a random network's."""
PROBE_TRAIN, PROBE_TEST, FEW = 2000, 1000, 100
"""Samples that probes of features read and are judged on; labels of the few-label fine-tuning."""

Told = Callable[[str, int | None, float], None]
"""Told after every trial: arm, seed (None: timing), seconds."""


@dataclass(frozen=True)
class Arm:
    """A method with settings, and what it is called on the page."""

    slug: str
    settings: Mapping[str, Any]
    label: str


@dataclass(frozen=True)
class Job:
    """What a process is asked to do, for one arm and one seed.

    Args:
        steps: of the training; None: only to time it.
        marks: steps after which the held-out figures are taken.
        pictures: where pictures go, `<pictures>-<row>.png`; None: none are wanted.
        alone: whether a process of its own is spent on it, whose memory can be told.
    """

    arm: Arm
    seed: int
    preset: str
    device: str
    steps: int | None = None
    marks: tuple[int, ...] = ()
    pictures: str | None = None
    alone: bool = True


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
                    row[metric] = _limits(values)
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
    on_cpu = _on_cpu(device)
    processes = (2 if on_cpu else 1) if processes is None else processes
    minutes = 1.0 if steps is None and minutes is None else minutes
    parsed, notes = resolve(arms, settings or {})
    train, held_out, how = split(data)
    methods = {arm.label: _built(arm, train, preset, device, steps) for arm in parsed}
    _same_job(parsed, methods)
    notes += _unlike(methods)
    place = data if isinstance(data, str) else None
    store = Store(None if out is None else Path(out), place, f"{summary(train)}, held out: {how}", processes)

    rounds = range(max(1, processes))  # every arm as often, and always as many at once
    timing = [Job(arm, chosen[i % len(chosen)], preset, device, alone=processes > 0) for i in rounds for arm in parsed]
    timed = _run(timing, data, processes, store, methods, report)
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
        "device": "cpu" if on_cpu else device, "notes": notes,
        "estimate": _estimate(costs, plan, len(chosen), processes),
        "figures": {}, "untrained": {}, "costs": {}, "curves": {}, "evaluations": {}, "pictures": {}, "differences": [],
    }  # fmt: skip
    if not dry_run:
        jobs = _in_turn(parsed, chosen, plan, preset, device, processes)
        results = _run(jobs, data, processes, store, methods, report)
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
        "machine": f"{platform.machine()}, {f'{max(1, processes)} x 1 thread' if on_cpu else device}", **provenance(),
    }  # fmt: skip
    return Comparison(record)


# ---- arms


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


def _built(arm: Arm, data: ImageSet, preset: str, device: str, steps: int | None) -> Method:
    """An arm's method, so that everything that is wrong with it is told before anything runs."""
    settings = {**arm.settings, **({"steps": steps} if steps else {})}
    try:
        return build(catalogue.load_method(arm.slug), data.facts, preset=preset, settings=settings, device=device)
    except SfumatoError as error:
        raise type(error)(f"{arm.label}: {error}") from None


def _same_job(arms: Sequence[Arm], methods: Mapping[str, Method]) -> None:
    jobs = {arm.label: next(iter(capabilities(methods[arm.label])), "nothing") for arm in arms}
    if len(set(jobs.values())) > 1:
        told = ", ".join(f"{label} is there to {job}" for label, job in jobs.items())
        raise BadSetting(f"arms must do the same thing, or their figures say nothing: {told}")


def _unlike(methods: Mapping[str, Method]) -> list[str]:
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


# ---- data


def split(data: Any) -> tuple[ImageSet, ImageSet, str]:
    """What is trained on, what is held out, and how: the data's own test part, else a tenth, else (of one) the same."""
    train = open_data(data) if isinstance(data, (str, os.PathLike)) else as_data(data)
    if not isinstance(train, ImageSet):
        raise BadData("a comparison needs data that can be indexed: a place, tensors or a data set, not a loader")
    test = open_data(data, "test")
    if test is not None:
        return train, test, "the test part of the data"
    if len(train) == 1:
        return train, train, "nothing: the one sample is trained on and judged on"
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(key("held out"))).tolist()
    count = -(-len(train) // 10)
    kept, given = sorted(order[count:]), sorted(order[:count])
    return train.select(kept), train.select(given), f"{count} of {len(train)}, drawn once for all"


def _few(data: ImageSet, count: int, side: int, seed: int) -> Batch:
    """Some samples of a set, chosen by the seed, as one batch; images of unlike sizes are cut to squares of `side` pixels."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(key(seed, "probe samples")))[:count]
    return _squares(data, rows.tolist(), None if data.facts.size else side)


def _squares(data: ImageSet, rows: Sequence[int], resize: int | None) -> Batch:
    """Samples as one batch: as they are where sizes are equal, else their middles; resized first if asked."""
    from torchvision.transforms import v2

    samples = [data[i] for i in rows]
    side = min(min(s.x.shape[-2:]) for s in samples)
    steps = [v2.Resize(resize, antialias=True), v2.CenterCrop(resize)] if resize else [v2.CenterCrop(min(side, 256))]
    to_square: Any = v2.Compose(steps)

    def cut(image: Any) -> Any:
        return to_square(image) if (resize or not data.facts.size) and image.ndim > 2 else image  # a target may be numbers

    x = torch.stack([as_unit(cut(s.x)) for s in samples])
    target = torch.stack([as_unit(cut(s.target)) for s in samples]) if data.items.paired else None  # type: ignore[arg-type]
    label = torch.tensor([s.label for s in samples]) if data.items.labelled else None
    return Batch(x, torch.tensor(rows), label, target)


# ---- one trial


class Watched(Trainer):
    """A trainer that keeps its losses, its clock without the evaluations, and held-out figures at the marks."""

    def __init__(self, method: Method, data: Any, options: Options, held_out: ImageSet, marks: Sequence[int], steps: int) -> None:
        super().__init__(method, data, options, steps=steps)
        self.held_out, self.marks = held_out, set(marks)
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}
        self.evaluations: list[dict[str, float]] = []
        self.memory = 0
        self._sum_of_losses, self._since = torch.zeros((), device=self.device), 0

    def batches(self, start: int) -> Any:
        """The micro-batches; the clock starts here."""
        self.clock = time.perf_counter()
        return super().batches(start)

    def step(self, batches: list[Batch], *, check: bool) -> Result:
        """One step; the mean loss since the last point is kept, and figures are taken where it is time."""
        result = super().step(batches, check=check)
        self._sum_of_losses += result.loss.detach()
        self._since += 1
        done = self.ctx.step
        if done % self.log_every and done not in self.marks and done != self.ctx.total:
            return result
        loss = float(self._sum_of_losses) / self._since  # waits for a GPU
        now = time.perf_counter()
        for name, value in (("step", done), ("seconds", now - self.clock), ("loss", loss)):
            self.curve[name].append(value)
        self._sum_of_losses.zero_()
        self._since = 0
        if done in self.marks:
            self.memory = self.memory or peak_memory(self.device)  # of training alone: before anything was evaluated
            figures = evaluate(self.method, self.held_out)
            self.evaluations.append({"step": done, "seconds": now - self.clock, **figures})
            self.method.train()
        self.clock += time.perf_counter() - now
        return result


def run_trial(job: Job, data: Any) -> dict[str, Any]:
    """Time one arm, or train it with one seed and take its figures; what comes back is plain.

    Raises:
        Diverged: a loss is no longer finite; the line says of which arm.
    """
    try:
        return _timed(job, data) if job.steps is None else _trained(job, data, job.steps)
    except Diverged as error:
        when = "while it was timed" if job.steps is None else f"seed {job.seed}"
        raise Diverged(f"{job.arm.label}, {when}: {error}") from None


class Desk:
    """What a trial works with: its data, options, and methods as they start.

    Args:
        resting: bytes of this process before a method was made: Python and the libraries.
    """

    def __init__(self, job: Job, data: Any) -> None:
        on_cpu = _on_cpu(job.device)
        if job.alone and on_cpu:
            torch.set_num_threads(1)
        self.job, self.kind = job, catalogue.load_method(job.arm.slug)
        self.resting = resident_memory() if on_cpu else 0
        self.train, self.held_out, _ = split(data)
        self.options = Options(seed=job.seed, device=job.device, workers=0 if on_cpu else None)

    def method(self) -> Method:
        """The method at its first weights."""
        job, settings = self.job, dict(self.job.arm.settings)
        if job.steps:
            settings["steps"] = job.steps
        return build(self.kind, self.train.facts, preset=job.preset, settings=settings, seed=job.seed, device=job.device)


def _timed(job: Job, data: Any) -> dict[str, Any]:
    """What a step, an evaluation and the way to them take."""
    began = time.perf_counter()
    desk = Desk(job, data)
    trainer = Trainer(desk.method(), desk.train, desk.options)
    cost = rehearse(trainer, at_least=2.0 if job.alone else 0.0)
    ready = time.perf_counter()
    evaluate(trainer.method, desk.held_out)
    seconds = {"evaluate_seconds": time.perf_counter() - ready, "setup_seconds": ready - began}
    return {**cost._asdict(), "memory": cost.memory if job.alone else None, **seconds}


def _trained(job: Job, data: Any, steps: int) -> dict[str, Any]:
    """Figures, curves, costs and pictures of one training."""
    desk = Desk(job, data)
    method, train, held_out = desk.method(), desk.train, desk.held_out
    options = replace(desk.options, log_every=max(1, steps // CURVE_POINTS))
    trainer = Watched(method, train, options, held_out, job.marks, steps)
    trainer.train(show=False)
    seconds = trainer.curve["seconds"][-1]
    figures = {k: v for k, v in trainer.evaluations[-1].items() if k not in ("step", "seconds")}
    pictures = _save_pictures(job, method, held_out)
    before = desk.method().to(trainer.device)
    untrained = evaluate(before, held_out)
    if train.items.labelled and next(iter(capabilities(method)), "") == "encode":
        figures |= probe(method, train, held_out, job.seed)
        untrained |= probe(before, train, held_out, job.seed)
    memory = {"memory": trainer.memory, "resting_memory": desk.resting} if job.alone else {"memory": None, "resting_memory": None}
    return {
        "figures": figures, "untrained": untrained, "curves": trainer.curve, "evaluations": trainer.evaluations,
        "costs": {"seconds": seconds, "images_per_second": steps * method.config.batch_size / seconds, **memory},
        "pictures": pictures,
    }  # fmt: skip


def _on_cpu(device: str) -> bool:
    return device == "cpu" or not torch.accelerator.is_available()


def probe(method: Any, train: ImageSet, held_out: ImageSet, seed: int) -> dict[str, float]:
    """What the features are worth: fine-tuned on a few labels, and read as they are by a line and by neighbours."""
    from sfumato.probes import extract_features, finetune_probe, knn_probe, linear_probe

    side = getattr(method.config, "image_size", None) or 64
    known, unknown = _few(train, PROBE_TRAIN, side, seed), _few(held_out, PROBE_TEST, side, seed)
    assert known.label is not None and unknown.label is not None  # noqa: PT018
    z, test = extract_features(method, known), (extract_features(method, unknown), unknown.label)
    generator = torch.Generator().manual_seed(key(seed, "probe"))
    return {
        "few_label_accuracy": finetune_probe(method, known, test=unknown, labels=FEW, generator=generator),
        "linear_probe": linear_probe(z, known.label, test=test, scaler="standard"),
        "knn_probe": knn_probe(z, known.label, test=test),
    }


def _save_pictures(job: Job, method: Method, held_out: ImageSet) -> dict[str, str]:
    """The method's pictures of a few held-out samples; the names of their files by row."""
    if job.pictures is None:
        return {}
    from torchvision.utils import make_grid, save_image

    batch, files = _squares(held_out, range(min(SHOWN, len(held_out))), None), {}
    Path(job.pictures).parent.mkdir(parents=True, exist_ok=True)
    rows = preview(method, batch, 0)
    if batch.target is not None and batch.target.ndim == 4:
        rows.setdefault("target", batch.target)
    for row, images in rows.items():
        path = Path(f"{job.pictures}-{re.sub(r'[^a-z0-9]+', '-', row.lower())}.png")
        strip = make_grid(images, nrow=len(images), padding=2, pad_value=1)
        save_image(strip[:, 2:-2, 2:-2] if len(images) > 1 else strip, path)
        files[row] = path.name
    return files


# ---- all trials


def _in_turn(
    arms: Sequence[Arm], seeds: Sequence[int], plan: Mapping[str, Any], preset: str, device: str, processes: int
) -> list[Job]:
    """Seed by seed, each beginning with another arm, so that no arm always has the same neighbour."""
    jobs = []
    for turn, seed in enumerate(seeds):
        for i in range(len(arms)):
            arm = arms[(i + turn) % len(arms)]
            steps, marks = plan[arm.label]
            jobs.append(Job(arm, seed, preset, device, steps, marks, "" if turn == 0 else None, processes > 0))
    return jobs


class Store:
    """Finished trials as files in a folder, found again by everything that they depend on; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, place: str | None, facts: str, processes: int) -> None:
        self.folder, self.found = folder, 0
        self.keeps = folder is not None and place is not None
        code = {name: value for name, value in provenance().items() if name != "date"}
        self.common = {"data": place, "facts": facts, "processes": processes, **code}

    def prepared(self, job: Job, config: Mapping[str, Any]) -> tuple[Job, Path | None]:
        """The job with the place of its pictures, and the file of its result."""
        if self.folder is None:
            return replace(job, pictures=None), None
        arm = {"slug": job.arm.slug, "config": {k: v for k, v in config.items() if k != "steps"}}
        told = {**self.common, **asdict(replace(job, arm=Arm("", {}, ""))), **arm}
        name = f"{job.arm.slug}-{'timing' if job.steps is None else job.seed}-{key(json.dumps(told, sort_keys=True)):014x}"
        job = job if job.pictures is None else replace(job, pictures=str(self.folder / "pictures" / name))
        return job, self.folder / "trials" / f"{name}.json" if self.keeps else None

    def read(self, path: Path | None, job: Job) -> dict[str, Any] | None:
        """A result that is there already, whole and with its pictures."""
        try:
            result: dict[str, Any] = json.loads(path.read_text()) if path else {}
        except (OSError, ValueError):
            return None
        pictures = [Path(job.pictures or "").parent / name for name in result.get("pictures", {}).values()]
        if not result or not all(picture.exists() for picture in pictures):
            return None
        self.found += job.steps is not None
        return result

    def write(self, path: Path | None, result: dict[str, Any]) -> None:
        """Keep a result, whole or not at all."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(result))
        os.replace(aside, path)


def _run(
    jobs: Sequence[Job], data: Any, processes: int, store: Store, methods: Mapping[str, Method], report: Told | None
) -> list[dict[str, Any]]:
    """The results of all jobs, in their order: kept ones, and new ones that run `processes` at a time."""
    tell = report or (lambda *_: None)
    results: dict[int, dict[str, Any]] = {}
    waiting: dict[int, tuple[Job, Path | None]] = {}
    for i, job in enumerate(jobs):
        job, path = store.prepared(job, methods[job.arm.label].config.model_dump(mode="json"))
        found = store.read(path, job)
        if found is None:
            waiting[i] = job, path
        else:
            results[i] = found

    def finish(i: int, result: dict[str, Any], seconds: float) -> None:
        job, path = waiting[i]
        store.write(path, result)
        results[i] = result
        tell(job.arm.label, None if job.steps is None else job.seed, seconds)

    def timed(job: Job) -> tuple[dict[str, Any], float]:
        began = time.monotonic()
        result = run_trial(job, data) if processes == 0 else _in_a_process(job, data)
        return result, time.monotonic() - began

    if processes == 0:
        for i, (job, _) in waiting.items():
            finish(i, *timed(job))
        return [results[i] for i in range(len(jobs))]
    with ThreadPoolExecutor(processes) as threads:
        running: dict[Future[Any], int] = {threads.submit(timed, job): i for i, (job, _) in waiting.items()}
        try:
            for future in as_completed(running):
                finish(running[future], *future.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[i] for i in range(len(jobs))]


def _in_a_process(job: Job, data: Any) -> dict[str, Any]:
    """One trial in a fresh process, so that its memory is its own and a crash is told."""
    with ProcessPoolExecutor(1, mp_context=_processes()) as one:
        try:
            return one.submit(run_trial, job, data).result()
        except BrokenProcessPool:
            raise SfumatoError(
                f"the process of {job.arm.label}, seed {job.seed} was killed, perhaps for want of memory: "
                "try fewer processes or a smaller batch_size. (A script calls compare under if __name__ == '__main__'.)"
            ) from None


@functools.cache
def _processes() -> Any:
    """How fresh processes are made: on Linux each is a copy of one that has only imported what trials need."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "accelerate", "torchvision.transforms.v2", "timm.optim", "sklearn.linear_model"])
    return context


def _estimate(costs: Mapping[str, Any], plan: Mapping[str, Any], seeds: int, processes: int) -> dict[str, Any]:
    """Seconds of everything (without probes of features), and bytes of what runs at once."""
    seconds = sum(
        seeds * (c["setup_seconds"] + plan[label][0] * c["step_seconds"] + (1 + len(plan[label][1])) * c["evaluate_seconds"])
        for label, c in costs.items()
    )
    largest = sorted((c["memory"] for c in costs.values() if c["memory"] is not None), reverse=True)
    return {"seconds": seconds / max(1, processes), "memory": largest[0] * max(1, processes) if largest else None}


# ---- what differs


def metrics_of(record: Mapping[str, Any]) -> list[str]:
    """All held-out figures, in the order in which they were met."""
    return list(dict.fromkeys(m for seed in record["figures"].values() for arm in seed.values() for m in arm))


def higher_is_better(metric: str) -> bool:
    """By the words in its name: losses, errors and distances should be low."""
    return not {"loss", "mse", "mae", "rmse", "error", "distance", "fid", "lpips", "nll", "seconds"} & set(metric.split("_"))


def is_own_loss(metric: str) -> bool:
    """Whether a figure is a method's own loss, which other methods measure otherwise."""
    return "loss" in metric.split("_")


def differences(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every arm against the first, over paired seeds: figures that both have, and images a second.

    A method's own loss is left out between different methods: they measure it with losses and masks of their own.
    """
    first, *others = record["arms"]
    early = {"linear_probe", "knn_probe"} if min(arm["steps"] for arm in record["arms"]) < EARLY else set()
    seeds = list(record["figures"])
    both = {
        s: {a: {**record["figures"][s][a], "images_per_second": record["costs"][s][a]["images_per_second"]} for a in arms}
        for s, arms in record["figures"].items()
    }
    found = []
    for metric in [*metrics_of(record), "images_per_second"]:
        for arm in others:
            better = Better(metric, arm["label"], over=first["label"], higher=higher_is_better(metric))
            if is_own_loss(metric) and arm["slug"] != first["slug"]:
                continue
            if any(metric not in both[s][a] for s in seeds for a in (arm["label"], first["label"])):
                continue
            gaps = [better.difference(both[s]) for s in seeds]
            if not all(map(math.isfinite, gaps)):
                continue
            mean, low, high = _limits(gaps)
            outcome = "too early" if metric in early else _outcome(low, high, len(seeds))
            found.append({
                "metric": metric, "arm": arm["label"], "over": first["label"], "higher": better.higher,
                "mean": mean, "low": low, "high": high, "dots": gaps, "outcome": outcome,
            })  # fmt: skip
    return found


def _outcome(low: float | None, high: float | None, seeds: int) -> str:
    if seeds < ENOUGH_SEEDS or low is None or high is None:
        return "no verdict"
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def _limits(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % limits; None where one value gives none."""
    mean, low, high = paired_interval(values)
    return mean, low if math.isfinite(low) else None, high if math.isfinite(high) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _range(limits: Sequence[float | None] | None) -> str:
    if limits is None:
        return "-"
    mean, low, high = limits
    return _number(mean) if low is None else f"{_number(mean)} [{_number(low)}, {_number(high)}]"
