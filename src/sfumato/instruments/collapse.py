"""Neural collapse of a classifier: how far what its last layer reads has shrunk onto one point a class, and where these lie.

    NC1 = tr(Σ_within Σ_between⁺) / K,     NC2: class means and rows of the last layer against a simplex or an orthogonal frame,
    NC3: their product against the same,     self-duality: means against rows

(Papyan, Han, Donoho 2020; `sfumato.probes.nc1` and its neighbours.) 0 is full collapse. Features are read batch by batch, twice:
for the class means, then for the spread around them. A run is followed over the checkpoints that it kept.

>>> import torch, sfumato
>>> found = sfumato.probe("collapse", torch.nn.Linear(3, 3), [(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4))])
>>> found.numbers["nc1"], found.numbers["class means"]["nc2"]["of"] < 1e-7  # inputs that are collapsed already
(0.0, True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments.batching import Pairs
from sfumato.instruments.classified import count_outputs
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.followed import earlier_checkpoints, last_step, step_of, subject_at
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, told_cut
from sfumato.nn.at_rest import eval_mode, exact_arithmetic
from sfumato.probes.collapse import between_whitening, class_stats, nc2, nc3, pooled_stats, self_duality

FRAMES = {"etf": "simplex", "of": "orthogonal frame"}
PASSES, FEWEST_A_CLASS = 2, 4
CLASSES_SHOWN = 20
NEAR, FAR = 0.25, 1.0
"""Spread within classes, as a share of their distance from the middle, below and above which words are chosen."""


class Settings(Setup):
    """What the collapse probe can be told."""

    checkpoints: int | None = Field(None, ge=0, description="kept checkpoints of a run to follow; None: those that fit the time")


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time the reading of features, and choose samples and checkpoints."""
    outputs = count_outputs(subject, "collapse")
    name = _last_linear(subject, outputs)
    limit = None if minutes is None else 60 * minutes

    def work(pairs: Pairs) -> None:
        for _ in _features(subject, name, pairs):
            pass

    sample = seconds_a_sample(work, subject.batches[0], limit, subject.device)
    classes = len(torch.cat([y for _, y in subject.batches]).unique())
    fitting = samples_that_fit(subject.count, sample, PASSES, limit, FEWEST_A_CLASS * classes)
    less = subject.first(settings.samples or fitting)
    _refuse_few(less)
    one = PASSES * less.count * sample
    earlier = len(earlier_checkpoints(subject))
    if settings.checkpoints is not None:
        earlier = min(settings.checkpoints, earlier)
    if settings.checkpoints is None and limit is not None:
        earlier = max(0, min(earlier, int(limit / one) - 1))
    chosen = {"samples": less.count, "layer": name, "checkpoints": earlier}
    notes = told_cut(less.count, subject.count)
    return Plan(chosen, one * (1 + earlier), limit, PASSES * len(less.batches) * (1 + earlier), notes)


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """The final model, then the checkpoints before it, from the newest back."""
    del settings
    subject, name = subject.first(plan.chosen["samples"]), plan.chosen["layer"]
    data, before = progress.over(subject.batches), earlier_checkpoints(subject)
    found: dict[str, Any] = {}
    over: list[dict[str, Any]] = []
    with progress.until_stopped():
        progress.stage("the model")
        found = _measured(subject, name, data)
        for path in before[len(before) - plan.chosen["checkpoints"] :][::-1]:
            progress.stage(path.stem)
            one = _measured(subject_at(subject, path), name, data)
            over.insert(0, {"step": step_of(path), **_short(one)})
    if not found:
        raise Interrupted("stopped before anything was measured: the features were not all read")
    if over:
        found["checkpoints"] = [*over, {"step": last_step(subject), **_short(found)}]
    found["random"] = _random(found, generator)
    return _findings(subject, name, found)


# The layer and what it reads


def _last_linear(subject: Subject, outputs: int) -> str:
    """The linear layer that is called last."""
    called: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: called.append((name, given[0])))
        for name, layer in subject.module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with eval_mode(subject.module), torch.no_grad():
            subject.module(subject.batches[0][0][:1].to(subject.device))
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise BadSetting(f"collapse reads what the last nn.Linear of a model is given, and {subject.name} calls none")
    name, given = called[-1]
    rows = subject.module.get_submodule(name).out_features
    if given.ndim != 2 or rows != outputs:
        raise BadSetting(
            f"the last nn.Linear, {name or 'the model'}, reads {list(given.shape[1:])} and gives {rows} a sample: collapse needs "
            f"one that turns a vector into the {outputs} outputs"
        )
    return name


def _features(subject: Subject, name: str, data: Any) -> Any:
    """What the layer reads, labels, and the classes that the model says; one batch at a time, on the CPU."""
    seen: list[Tensor] = []
    handle = subject.module.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with eval_mode(subject.module), exact_arithmetic(subject.device.type), torch.no_grad():
            for x, y in data:
                said = subject.module(x.to(subject.device)).argmax(1).cpu()
                yield seen.pop().cpu().double(), y, said
                seen.clear()
    finally:
        handle.remove()


def _refuse_few(subject: Subject) -> None:
    classes = len(torch.cat([y for _, y in subject.batches]).unique())
    if classes < 2 or subject.count < 2 * classes:
        raise BadData(
            f"collapse compares at least two classes of at least two samples each on average: these are {subject.count} samples "
            f"of {classes}; --set samples=N takes more"
        )


# Figures


def _measured(subject: Subject, name: str, data: Any) -> dict[str, Any]:
    """Everything of one model, in two readings of the data."""
    weight = subject.module.get_parameter(f"{name}.weight".lstrip(".")).detach().cpu().double()
    stats = pooled_stats(class_stats(f, y, classes=len(weight)) for f, y, _ in _features(subject, name, data))
    there = stats.counts > 0
    centred = stats.means - stats.mean
    axes = between_whitening(stats)
    spread, sums = torch.zeros(len(weight), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for f, y, said in _features(subject, name, data):
        spread.index_add_(0, y, (f - stats.means[y]).square().sum(1))
        nearest = there.nonzero()[:, 0][torch.cdist(f, stats.means[there]).argmin(1)]
        shares = torch.stack([(said == y).double().mean(), (said == nearest).double().mean()])
        within = ((f - stats.means[y]) @ axes).square().sum(1).mean()  # `nc1`, whose directions are the same for all batches
        sums += len(f) * torch.cat([within[None], shares])
    value, accuracy, agreement = (sums / subject.count).tolist()
    value = value if axes.numel() else math.inf
    lengths = centred.norm(dim=1)
    directions = (centred / lengths[:, None])[there]
    cosines = directions @ directions.T
    return {
        "nc1": value,
        "spread": float(spread.sum() / (stats.counts * lengths.square()).sum()),
        "accuracy": accuracy,
        "nearest_mean_agreement": agreement,
        **_frames(weight[there], stats.means[there], stats.mean),
        "cosines": cosines[tuple(torch.triu_indices(len(cosines), len(cosines), 1))],
        "by class": {
            "class": there.nonzero()[:, 0],
            "samples": stats.counts[there],
            "spread": (spread / stats.counts / lengths.square())[there],
            "mean": lengths[there],
            "row": weight.norm(dim=1)[there],
        },
        "dimension": weight.shape[1],
        "outputs": len(weight),
    }


def _frames(rows: Tensor, means: Tensor, middle: Tensor) -> dict[str, Any]:
    """Distances from both frames; the simplex has its middle at 0, so it is compared with centred means."""
    against = {"etf": means - middle, "of": means}
    return {
        "class means": {"nc2": {frame: float(nc2(m, target=frame)) for frame, m in against.items()}},  # type: ignore[arg-type]
        "classifier": {"nc2": {frame: float(nc2(rows, target=frame)) for frame in against}},  # type: ignore[arg-type]
        "nc3": {frame: float(nc3(rows, m, target=frame)) for frame, m in against.items()},  # type: ignore[arg-type]
        "self_duality": {frame: float(self_duality(rows, m)) for frame, m in against.items()},
    }


def _random(found: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """The same of rows and means in random directions."""
    shape = (2, len(found["by class"]["class"]), found["dimension"])
    rows, means = torch.randn(shape, generator=generator, device=generator.device).cpu().double()
    return _frames(rows, means, means.mean(0))


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is followed over checkpoints."""
    return {
        "nc1": found["nc1"], "nc2": found["class means"]["nc2"], "nc3": found["nc3"], "self_duality": found["self_duality"],
        "accuracy": found["accuracy"],
    }  # fmt: skip


def _findings(subject: Subject, name: str, found: dict[str, Any]) -> Findings:
    means, random = found["class means"]["nc2"], found["random"]
    headline = {
        "accuracy": found["accuracy"], "NC1": found["nc1"], "spread within / between classes": found["spread"],
        "NC2 of class means, simplex": means["etf"], "NC3, simplex": found["nc3"]["etf"],
        "self-duality": found["self_duality"]["etf"],
    }  # fmt: skip
    told = {
        "NC2, class means": (found["class means"]["nc2"], random["class means"]["nc2"]),
        "NC2, rows of the last layer": (found["classifier"]["nc2"], random["classifier"]["nc2"]),
        "NC3, rows times means": (found["nc3"], random["nc3"]),
        "self-duality, rows against means": (found["self_duality"], random["self_duality"]),
    }
    rows = [
        {"": title, **{FRAMES[f]: one[f] for f in FRAMES}, **{f"{FRAMES[f]}, random": other[f] for f in FRAMES}}
        for title, (one, other) in told.items()
    ]
    text = (
        "Distances from 0 to 2, where 0 is the frame itself. In a simplex all classes point away from each other as far as they "
        "can, in an orthogonal frame they stand at right angles; against the simplex, means are counted from the mean of all "
        "samples. Random: rows and means of as many numbers in random directions."
    )
    sections = [Section("Where the classes lie", text, [Table(rows)])]
    if len(found["cosines"]) >= 10:
        ideal = -1 / (len(found["by class"]["class"]) - 1)
        axes = {"xlabel": "cosine between two class means", "logy": False, "height": 240}
        sections[0] = replace(
            sections[0],
            blocks=[
                Table(rows),
                Plot("spectrum", found["cosines"], axes, f"In a simplex all are {ideal:.3f}.".replace("-", "−")),
            ],
        )
    sections.append(_by_class(subject, found))
    if "checkpoints" in found:
        sections.insert(0, _over_steps(found["checkpoints"]))
    notes = [*subject.eval_note, f"features are what the layer {name or 'of the model'} reads: {found['dimension']:,} numbers"]
    counts = found["by class"]["samples"]
    if len(counts) < found["outputs"]:
        notes.append(f"only the {len(counts)} classes that have samples are compared")
    if counts.min() < counts.max():
        notes.append(
            f"classes are unequal ({counts.min()} to {counts.max()} samples): the lengths that theory then predicts depend on "
            "the weight decay of the training and are not given (sfumato.probes.gof_spectrum computes them)"
        )
    notes.append("a class mean of few samples lies too near to them: NC1 of a few samples a class is too small")
    return Findings(found, headline, _words(found), sections, notes)


def _by_class(subject: Subject, found: Mapping[str, Any]) -> Section:
    table = found["by class"]
    order = table["spread"].argsort(descending=True)[:CLASSES_SHOWN]
    names = [subject.classes[k] if subject.classes else str(k) for k in table["class"].tolist()]
    rows = [
        {
            "class": names[i], "samples": int(table["samples"][i]), "spread": float(table["spread"][i]),
            "length of its mean": float(table["mean"][i]), "length of its row": float(table["row"][i]),
        }
        for i in order.tolist()
    ]  # fmt: skip
    more = f" The {CLASSES_SHOWN} widest of {len(names)} are shown." if len(names) > len(rows) else ""
    text = "Spread: the mean squared distance of a class's samples from its mean, by the squared length of that mean." + more
    return Section("Class by class", text, [Table(rows)])


def _over_steps(table: list[dict[str, Any]]) -> Section:
    steps = [row["step"] for row in table]
    spread = {"NC1": (steps, [row["nc1"] for row in table])}
    rest = {
        title: (steps, [row[name]["etf"] for row in table])
        for title, name in (("NC2, class means", "nc2"), ("NC3", "nc3"), ("self-duality", "self_duality"))
    }
    axes = {"xlabel": "step", "height": 240}
    plots = [
        Plot("curves", spread, {**axes, "ylabel": "NC1", "logy": True}),
        Plot("curves", rest, {**axes, "ylabel": "distance"}),
    ]
    return Section("Over training", "At the checkpoints that the run kept; distances from a simplex.", [plots])


def _words(found: Mapping[str, Any]) -> str:
    """How far the collapse has gone, and which frame the classes come near."""
    spread, means, random = found["spread"], found["class means"]["nc2"], found["random"]["class means"]["nc2"]
    state = "Collapsed" if spread < NEAR else "Partly collapsed" if spread < FAR else "Not collapsed"
    words = [f"{state}: samples of a class spread {spread:.2g} times as much as the class means do (NC1 = {found['nc1']:.3g})."]
    frame = min(FRAMES, key=lambda f: means[f])
    near, chance = means[frame], random[frame]
    if near < chance / 2:
        words.append(f"The class means come near to {'a simplex' if frame == 'etf' else 'an orthogonal frame'} ({near:.2g}).")
    else:
        words.append(f"The class means form neither frame: {near:.2g} from the nearer one, random directions {chance:.2g}.")
    dual, chance = found["self_duality"]["etf"], found["random"]["self_duality"]["etf"]
    words.append(
        f"The rows of the last layer {'point' if dual < chance / 2 else 'do not point'} to the class means ({dual:.2g}; random "
        f"ones {chance:.2g})."
    )
    return " ".join(words)


KIND = Kind(Settings, plan, measure)
