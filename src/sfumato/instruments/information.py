"""The information plane: how much each layer of a classifier tells about its input, and how much about the class.

    I(X;T) against I(Y;T), in bits, for layers T: a point a layer, and for a run a path over the checkpoints that it kept

Two estimators side by side: adaptive bins (Chelombiev, Houghton, O'Donnell 2019), and Gaussian noise added to the activity
(Kolchinsky, Tracey 2017). They are estimates of different things, and neither is the information of a network without bins or
noise, which is infinite. A layer that tells all n samples apart has log2 n bits, whatever it does; wide layers do.

>>> import torch, sfumato
>>> x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
>>> found = sfumato.probe("information", torch.nn.Linear(1, 2), [(x, torch.tensor([0, 0, 1, 1]))])
>>> [found.numbers["layers"][0]["bins"][of] for of in ("input", "label")]
[1.0, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sfumato.errors import BadData, Diverged, Interrupted
from sfumato.instruments.classified import labels_of
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.followed import MORE, coarse_to_fine, earlier_checkpoints, last_step, spread_evenly, step_of, subject_at
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.layers import Layer, find_layers, read_layers
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import seconds_a_sample, seconds_of, told_cut
from sfumato.probes.information import (
    Information,
    adaptive_bin_edges,
    binned_information_bits,
    kde_information,
    pattern_entropy_bits,
)

ESTIMATORS = {"bins": "adaptive bins", "kde": "Gaussian noise"}
SHORT = {"bins": "bins", "kde": "noise"}
FEWEST, TIMED = 64, 128
"""Samples that are kept at least where the time is short, and those on which the estimators are timed."""
BYTES_A_NUMBER = 64
"""Memory of the estimators for every number of a layer: sorting, bins, and rows of bins."""
FULL = 0.995
"""Share of log2 n from which a layer counts as telling all samples apart."""
LOST = 0.1
"""Share of its largest information from which a layer that lost it is said to have compressed."""


class Settings(Setup):
    """What the information probe can be told."""

    layers: str | None = Field(None, description="names of layers, with commas between them; None: at most 16 of the model's")
    checkpoints: int | None = Field(None, ge=0, description="kept checkpoints of a run to follow; None: those that fit the time")
    bins: int = Field(30, gt=0, description="adaptive bins of a layer")
    noise: float | None = Field(
        None, gt=0, description="variance of the Gaussian noise; None: 0.001 times the layer's largest activity"
    )
    units: int = Field(
        1024, gt=0, description="units of a layer that are looked at; a wider one is told by so many, drawn by seed"
    )


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time the reading of layers and both estimators, and choose samples and checkpoints."""
    labels = labels_of(subject, "information")
    if len(labels.unique()) < 2:
        raise BadData("information about the class needs samples of at least two classes, these are of one")
    layers = find_layers(subject, settings.layers)
    limit = None if minutes is None else 60 * minutes
    units = {layer.name: torch.arange(min(layer.size, settings.units)) for layer in layers}

    def work(pairs: Any) -> dict[str, Tensor]:
        return _activity(subject, layers, pairs, units)

    reading = seconds_a_sample(work, subject.batches[0], limit, subject.device)
    some = [(x[:TIMED], y[:TIMED]) for x, y in subject.batches[:1]]
    activity, y = work(some), some[0][1]
    binning, pairing = (
        seconds_of(lambda of=of: [of(a, y, settings) for a in activity.values()], subject.device)  # type: ignore[misc]
        for of in (_binned, _noisy)
    )

    def cost(samples: int) -> float:
        more = samples / len(y)
        return samples * reading + binning * more + pairing * more**2

    room = subject.memory // (BYTES_A_NUMBER * max(len(u) for u in units.values()))
    samples = settings.samples or max(min(FEWEST, subject.count), min(subject.count, room))
    while settings.samples is None and limit is not None and samples > FEWEST and cost(samples) > limit:
        samples = max(FEWEST, int(0.8 * samples))
    less = subject.first(samples)
    one, earlier = cost(less.count), len(earlier_checkpoints(subject))
    if settings.checkpoints is not None:
        earlier = min(settings.checkpoints, earlier)
    elif limit is not None:
        earlier = max(0, min(earlier, int(limit / one) - 1))
    chosen = {"samples": less.count, "layers": len(layers), "checkpoints": earlier}
    ticks = (len(less.batches) + len(layers)) * (1 + earlier)
    return Plan(chosen, one * (1 + earlier), limit, ticks, told_cut(less.count, subject.count))


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """The final model, then the first checkpoint and those between."""
    subject = subject.first(plan.chosen["samples"])
    layers, labels = find_layers(subject, settings.layers), labels_of(subject, "information")
    units = {layer.name: _drawn(layer, settings.units, generator) for layer in layers}
    paths = spread_evenly(earlier_checkpoints(subject), plan.chosen["checkpoints"])
    final: list[dict[str, Any]] = []
    over: dict[int, list[dict[str, Any]]] = {}
    late = False
    with progress.until_stopped():
        progress.stage("the model")
        _measured(subject, layers, units, settings, progress, final)
        for path in coarse_to_fine(paths):
            late = progress.late(1 + len(over), plan.limit)
            if late:
                break
            progress.stage(path.stem)
            rows: list[dict[str, Any]] = []
            _measured(subject_at(subject, path), layers, units, settings, progress, rows)
            over[step_of(path)] = rows
    if not final:
        raise Interrupted("stopped before anything was measured: the layers were not all read")
    numbers: dict[str, Any] = {
        "samples": subject.count,
        "most": math.log2(subject.count),
        "classes": float(pattern_entropy_bits(labels[:, None])),
        "layers": final,
    }
    if over:
        over[last_step(subject) or 0] = final
        numbers["checkpoints"] = [{"step": step, "layers": over[step]} for step in sorted(over)]
        numbers["lost"] = _lost(numbers["checkpoints"])
    findings = _findings(subject, settings, numbers, units)
    if late:
        findings.notes.append(f"it went slower than expected: {len(over)} checkpoints were measured, to keep to the time")
    return findings


# Activity and its information


def _drawn(layer: Layer, most: int, generator: torch.Generator) -> Tensor:
    """Which units of a layer are looked at, in rising order."""
    if layer.size <= most:
        return torch.arange(layer.size)
    return torch.randperm(layer.size, generator=generator, device=generator.device)[:most].sort().values.cpu()


def _activity(subject: Subject, layers: Sequence[Layer], data: Any, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What layers give, `[n, units]`; what a classifier gives in the end, as probabilities."""

    def keep(layer: Layer, values: Tensor) -> Tensor:
        if not layer.name and subject.loss_name == "cross_entropy" and layer.size > 1:
            values = values.softmax(1)
        return values[:, units[layer.name].to(values.device)]

    found = read_layers(subject, layers, data, keep)
    for layer in layers:
        if not bool(found[layer.name].isfinite().all()):
            raise Diverged(f"layer {layer.title} gives numbers that are not finite: check the weights and the data")
    return found


def _binned(activity: Tensor, y: Tensor, settings: Settings) -> Information:
    low = 0.0 if activity.min() == 0 else None  # units that are silent have a bin of their own, as ReLU's
    return binned_information_bits(activity, y, adaptive_bin_edges(activity, bins=settings.bins, low=low))


def _noisy(activity: Tensor, y: Tensor, settings: Settings) -> Information:
    found = kde_information(activity, y, variance=settings.noise or "adaptive")
    return Information(*(value / math.log(2) for value in found))


def _measured(
    subject: Subject, layers: Sequence[Layer], units: Mapping[str, Tensor], settings: Settings, progress: Progress,
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """A row for each layer, added one by one."""
    activity, y = _activity(subject, layers, progress.over(subject.batches), units), labels_of(subject, "information")
    for layer in layers:
        progress.advance()
        t = activity.pop(layer.name)
        row: dict[str, Any] = {"layer": layer.title, "size": layer.size, "units": t.shape[1]}
        for name, of in (("bins", _binned), ("kde", _noisy)):
            about = of(t, y, settings)
            row[name] = {"input": float(about.input), "label": float(about.label)}
        rows.append(row)


def _lost(checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By estimator and layer, the share of its largest I(X;T) that is lost by the last checkpoint."""
    lost: dict[str, dict[str, float]] = {}
    for of in ESTIMATORS:
        lost[of] = {}
        for i, last in enumerate(checkpoints[-1]["layers"]):
            top = max(c["layers"][i][of]["input"] for c in checkpoints)
            lost[of][last["layer"]] = 1 - last[of]["input"] / top if top > 0 else 0.0
    return lost


# Figures


def _full(row: Mapping[str, Any], numbers: Mapping[str, Any], of: str = "bins") -> bool:
    return bool(row[of]["input"] >= FULL * numbers["most"])


def _findings(subject: Subject, settings: Settings, numbers: dict[str, Any], units: Mapping[str, Tensor]) -> Findings:
    rows = numbers["layers"]
    headline = {
        "log2 of the samples": f"{numbers['most']:.2f} bits",
        "entropy of the classes": f"{numbers['classes']:.2f} bits",
        "layers at that limit": f"{sum(_full(row, numbers) for row in rows)} of {len(rows)}",
    }
    told = (
        f"T is a layer, X the sample, Y its class. I(X;T) is at most log2 {numbers['samples']:,} = {numbers['most']:.2f} bits, "
        f"and I(Y;T) at most the entropy of the classes, {numbers['classes']:.2f} bits. A layer at the first limit tells every "
        "sample apart, whether it has learned anything or not: its place says nothing, and every wide layer stands there."
    )
    if "checkpoints" in numbers:
        told += " A path goes from the first checkpoint to the last, where its name stands."
    table = Table([_row(row, numbers) for row in rows], "Lost: the share of its largest I(X;T) that a layer has lost since.")
    if "lost" not in numbers:
        table = Table(table.rows)
    sections = [Section("Information plane", told, [_planes(numbers)]), Section("Layer by layer", None, [_profiles(rows), table])]
    if "checkpoints" in numbers:
        sections.insert(1, _over_steps(numbers["checkpoints"]))
    wide = [row["layer"] for row in rows if row["units"] < row["size"]]
    notes = [
        *subject.eval_note,
        f"adaptive bins: {settings.bins} a layer, with equally many of its distinct values at that moment, so what only "
        "stretches activity changes nothing; they compare over layers and steps of one probe with as many samples",
        "Gaussian noise: the upper bound of I(X;T), "
        + (f"with variance {settings.noise:g}" if settings.noise else "with variance 0.001 times the layer's largest activity"),
    ]
    if subject.loss_name == "cross_entropy":
        notes.append("the output is turned into probabilities first")
    if wide:
        notes.append(
            f"of {', '.join(wide)} only {settings.units:,} units are looked at, drawn by the seed: a lower bound by bins"
        )
    if len(numbers["layers"]) < len(units):
        notes.append(f"{len(numbers['layers'])} of {len(units)} layers were measured")
    if "checkpoints" not in numbers:
        notes.append(MORE)
    return Findings(numbers, headline, _words(numbers), sections, notes)


def _row(row: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": row["layer"], "units": row["size"]}
    for of, title in SHORT.items():
        found |= {f"I(X;T), {title}": round(row[of]["input"], 3), f"I(Y;T), {title}": round(row[of]["label"], 3)}
        if "lost" in numbers:
            found[f"lost, {title}"] = f"{numbers['lost'][of][row['layer']]:.0%}"
    return {**found, "": "at the limit" if _full(row, numbers) else ""}


def _planes(numbers: Mapping[str, Any]) -> list[Plot]:
    """I(Y;T) over I(X;T): a path a layer over checkpoints, or a point."""
    checkpoints = numbers.get("checkpoints") or [{"layers": numbers["layers"]}]
    plots = []
    for of, title in ESTIMATORS.items():
        series = {
            row["layer"]: tuple([c["layers"][i][of][about] for c in checkpoints] for about in ("input", "label"))
            for i, row in enumerate(numbers["layers"])
        }
        axes = {"xlabel": f"I(X;T) in bits, {title}", "ylabel": "I(Y;T) in bits", "height": 320, "zero": "xy"}
        plots.append(Plot("curves", series, axes))
    return plots


def _profiles(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Both informations from layer to layer."""
    places = list(range(1, len(rows) + 1))
    return [
        Plot(
            "curves",
            {title: (places, [row[of][about] for row in rows]) for of, title in ESTIMATORS.items()},
            {"xlabel": "layer", "ylabel": f"{name} in bits", "height": 220, "zero": "y"},
        )
        for about, name in (("input", "I(X;T)"), ("label", "I(Y;T)"))
    ]


def _over_steps(checkpoints: Sequence[Mapping[str, Any]]) -> Section:
    steps = [c["step"] for c in checkpoints]
    plots = [
        Plot(
            "curves",
            {
                row["layer"]: (steps, [c["layers"][i]["bins"][about] for c in checkpoints])
                for i, row in enumerate(checkpoints[-1]["layers"])
            },
            {"xlabel": "step", "ylabel": f"{name} in bits, adaptive bins", "height": 300, "zero": "y"},
        )
        for about, name in (("input", "I(X;T)"), ("label", "I(Y;T)"))
    ]
    return Section("Over training", "At the checkpoints that were measured.", [plots])


def _words(numbers: Mapping[str, Any]) -> str:
    """Which layers say something, what they say, and whether they lost information."""
    rows = numbers["layers"]
    by = next((of for of in ESTIMATORS if not all(_full(row, numbers, of) for row in rows)), None)
    if by is None:
        return (
            f"Every layer tells all {numbers['samples']:,} samples apart, so this plane says nothing of the model: wide layers "
            "always do. Layers of a few units, or more samples, would."
        )
    told = [row for row in rows if not _full(row, numbers, by)]
    last, words = told[-1], []
    if len(told) < len(rows):
        full = len(rows) - len(told)
        words.append(
            f"{full} of {len(rows)} layers tell{'s' * (full == 1)} all samples apart, or nearly, and their place says nothing."
        )
    words.append(
        f"By {ESTIMATORS[by]} {last['layer']} keeps {last[by]['input']:.2f} of {numbers['most']:.2f} bits about the sample and "
        f"{last[by]['label']:.2f} of {numbers['classes']:.2f} about its class."
    )
    if "lost" in numbers:
        lost = {row["layer"]: numbers["lost"][by][row["layer"]] for row in told}
        name = max(lost, key=lambda n: lost[n])
        steps = f"between steps {numbers['checkpoints'][0]['step']:,} and {numbers['checkpoints'][-1]['step']:,}"
        if lost[name] >= LOST:
            words.append(f"{name} compressed most {steps}: it lost {lost[name]:.0%} of the most that it told about the sample.")
        else:
            words.append(f"No layer compressed {steps}: none lost more than {lost[name]:.0%} of what it told about the sample.")
    return " ".join(words)


KIND = Kind(Settings, plan, measure)
