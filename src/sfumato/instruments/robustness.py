"""How small a change misleads a classifier, and in which direction: its boundary around held-out samples.

    margin = z_y − max_{j≠y} z_j,     distance ≈ margin / ‖∇ margin‖,     deviation angle: between −∇ margin and the line to the
    nearest other class mean (Tanay, Griffin 2016)

The smallest changes come from DeepFool (Moosavi-Dezfooli et al. 2016), the accuracy within a radius from PGD (Madry et al. 2018).
Lengths are in units of the model's inputs, beside half the way to the nearest other class mean: as far as one might have to go.

>>> import torch, sfumato
>>> net = torch.nn.Linear(2, 2, bias=False)
>>> _ = net.weight.data.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
>>> x = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]).repeat(2, 1)
>>> found = sfumato.probe("robustness", net, [(x, torch.tensor([0, 1, 0, 1]))])
>>> [round(v, 4) for v in found.numbers["samples"]["first_order"].tolist()]
[2.0, 2.0, 2.0, 2.0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sfumato.attacks.gradient_attacks import pgd
from sfumato.attacks.minimal import deepfool
from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments.batching import Pairs
from sfumato.instruments.classified import count_outputs
from sfumato.instruments.findings import Findings, Pictures, Plan, Plot, Section, Table
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, told_cut
from sfumato.nn.at_rest import eval_mode, exact_arithmetic
from sfumato.probes.boundary import local_geometry, matched_temperature
from sfumato.probes.collapse import class_stats, pooled_stats
from sfumato.probes.functional_model import as_batches

SHARES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Radii of PGD, by the median first-order distance."""
USUAL_STEPS, LINEARISATIONS = 12, 30
"""Steps that DeepFool takes: of the slowest sample of a batch as a rule, for the plan; and at most."""
FEWEST = 8
PICTURES = 4


class Settings(Setup):
    """What the robustness probe can be told."""

    split: Literal["train", "test"] = Field("test", description="which part of the data; pairs of your own are taken as they are")
    norm: Literal["l2", "linf"] = Field("l2", description="ball that PGD stays in; everything else is in the Euclidean norm")
    radii: tuple[float, ...] | None = Field(None, description="of PGD; None: from a quarter to three times the median distance")
    steps: int = Field(20, gt=0, description="steps of PGD at each radius")
    candidates: int = Field(5, gt=0, description="likeliest other classes that DeepFool looks at")
    confidence: float = Field(0.95, gt=0, lt=1, description="median confidence at which margins of models compare")


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time a gradient and a step of DeepFool, and choose samples."""
    outputs = count_outputs(subject, "robustness")
    if not subject.batches[0][0].is_floating_point():
        raise BadData(
            "robustness changes the inputs a little, and these are whole numbers: probe the model from its embeddings on"
        )
    if settings.radii is not None and not (settings.radii and all(r > 0 for r in settings.radii)):
        raise BadSetting(f"radii={list(settings.radii)}: give at least one, all above 0")
    if settings.confidence <= 1 / outputs:
        raise BadSetting(f"confidence={settings.confidence:g} is not above 1/{outputs}")
    _refuse_one_class(subject)
    limit = None if minutes is None else 60 * minutes

    def gradient(pairs: Pairs) -> None:
        for x, y in as_batches(pairs, subject.device):
            pgd(subject.module, x, y, eps=0.0, step_size=0.0, steps=1, clip=None)

    def step(pairs: Pairs) -> None:
        for x, _ in as_batches(pairs, subject.device):
            deepfool(subject.module, x, steps=1, candidates=settings.candidates)

    with eval_mode(subject.module), exact_arithmetic(subject.device.type):
        one, linear = (seconds_a_sample(work, subject.batches[0], limit, subject.device) for work in (gradient, step))
    radii = len(settings.radii or SHARES)
    sample = one * (2 + radii * settings.steps) + USUAL_STEPS * linear
    less = subject.first(settings.samples or samples_that_fit(subject.count, sample, 1, limit, FEWEST))
    notes = told_cut(less.count, subject.count)
    return Plan({"samples": less.count, "radii": radii}, less.count * sample, limit, 2 * len(less.batches), notes)


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """The local geometry of every sample, then its smallest misleading change, noise of that length, and PGD."""
    subject = subject.first(plan.chosen["samples"])
    data = progress.over(subject.batches)
    found: dict[str, Any] = {}
    shown: list[_Shown] = []
    parts: list[dict[str, Tensor]] = []
    radii: list[float] = []
    late = False
    with progress.until_stopped(), eval_mode(subject.module), exact_arithmetic(subject.device.type):
        progress.stage("local geometry")
        found = _geometry(subject, data, settings)
        if not found["samples"]["right"].any():
            return _findings(subject, settings, found, shown)
        radii = _radii(subject, settings, found["samples"])
        progress.stage("attacks")
        for done, (x, y) in enumerate(as_batches(data, subject.device)):
            late = progress.late(done, plan.limit)
            if late:
                break
            parts.append(_attacked(subject, settings, x, y, radii, generator, shown))
    if not found:
        raise Interrupted("stopped before anything was measured: the local geometry was not finished")
    if parts:
        joined = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
        found["attacked"] = {"radii": radii, **_summary(joined)}
    findings = _findings(subject, settings, found, shown)
    if late:
        some = len(found["attacked"]["deepfool"])
        findings.notes.append(f"it went slower than expected: {some} samples were attacked, to keep to the time")
    return findings


def _refuse_one_class(subject: Subject) -> None:
    if len(torch.cat([y for _, y in subject.batches]).unique()) < 2:
        raise BadData("robustness needs samples of at least two classes, these are of one")


def _geometry(subject: Subject, data: Any, settings: Settings) -> dict[str, Any]:
    """Figures of every sample, and the temperature at which the model compares with others."""
    labels = torch.cat([y for _, y in subject.batches])
    there = labels.unique()
    outputs = int(subject.module(subject.batches[0][0][:1].to(subject.device)).shape[1])
    rest = torch.arange(outputs)[~torch.isin(torch.arange(outputs), there)]
    order, logits = torch.cat([there, rest]), []  # classes with samples first, so that class means need no gaps

    def model(x: Tensor) -> Tensor:
        z: Tensor = subject.module(x)
        logits.append(z.detach().cpu())
        return z[:, order.to(z.device)]

    pairs = [(x, torch.searchsorted(there, y)) for x, y in subject.batches]
    means = pooled_stats(class_stats(x.flatten(1), k, classes=len(there)) for x, k in pairs).means
    rows: list[Tensor] = []
    for (x, y), (_, k) in zip(data, pairs, strict=True):
        centres = means.to(x).view(len(there), *x.shape[1:])
        local = local_geometry(model, x.to(subject.device), k.to(subject.device), centroids=centres.to(subject.device))
        apart = torch.cdist(x.flatten(1), centres.flatten(1)).scatter(1, k[:, None], torch.inf)
        half = (centres[apart.argmin(1)] - centres[k]).flatten(1).norm(dim=1) / 2
        right = (logits[-1].argmax(1) == y).to(half)
        rows.append(torch.stack([right, *(t.cpu() for t in local), half]))
    names = ("right", "margin", "gradient", "first_order", "angle", "half_way")
    samples = dict(zip(names, torch.cat(rows, 1).double(), strict=True))
    samples["right"] = samples["right"].bool()
    temperature = matched_temperature(torch.cat(logits), settings.confidence)
    return {"samples": samples, "temperature": temperature}


def _radii(subject: Subject, settings: Settings, samples: Mapping[str, Tensor]) -> list[float]:
    if settings.radii is not None:
        return sorted(settings.radii)
    usual = float(samples["first_order"][samples["right"]].median())
    size = subject.batches[0][0][0].numel()
    return [share * usual / (math.sqrt(size) if settings.norm == "linf" else 1.0) for share in SHARES]


class _Shown(NamedTuple):
    """A sample, its smallest misleading change, and the classes before and after."""

    x: Tensor
    change: Tensor
    before: int
    after: int


def _attacked(
    subject: Subject, settings: Settings, x: Tensor, y: Tensor, radii: list[float], generator: torch.Generator,
    shown: list[_Shown],
) -> dict[str, Tensor]:  # fmt: skip
    """Of one batch: DeepFool's distances, whether noise of that length misleads, and what PGD leaves right at each radius."""
    model = subject.module
    moved = deepfool(model, x, y, steps=LINEARISATIONS, candidates=settings.candidates)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    column = (-1, *[1] * (x.ndim - 1))
    length = (moved - x).flatten(1).norm(dim=1)
    noisy = x + noise * (length / noise.flatten(1).norm(dim=1)).view(column)
    with torch.no_grad():
        before, after, beside = (model(t).argmax(1) for t in (x, moved, noisy))
    distance = torch.where(before != y, 0.0, torch.where(after != y, length, torch.inf))
    for i in ((before == y) & (after != y)).nonzero()[: PICTURES - len(shown), 0].tolist():
        shown.append(_Shown(x[i].cpu(), (moved - x)[i].cpu(), int(before[i]), int(after[i])))
    left = []
    for eps in radii:
        changed = pgd(
            model, x, y, eps=eps, steps=settings.steps, norm=settings.norm, objective="margin", clip=None, generator=generator
        )
        with torch.no_grad():
            left.append((model(changed).argmax(1) == y) & (before == y))
    return {"deepfool": distance.cpu().double(), "noise": (beside != y).cpu(), "pgd": torch.stack(left).cpu()}


def _summary(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    misled = (parts["deepfool"] > 0) & parts["deepfool"].isfinite()
    return {
        "deepfool": parts["deepfool"],
        "noise_misleads": float(parts["noise"][misled].double().mean()),
        "accuracy": parts["pgd"].double().mean(1).tolist(),
        "clean_accuracy": float((parts["deepfool"] > 0).double().mean()),
    }


# Figures


def _findings(subject: Subject, settings: Settings, found: dict[str, Any], shown: list[_Shown]) -> Findings:
    samples = found["samples"]
    right = samples["right"]
    found["accuracy"] = float(right.double().mean())
    notes = [
        *subject.eval_note,
        "lengths are Euclidean, in units of the inputs as the model takes them, and changes may leave the range of pixels",
    ]
    if not right.any():
        return Findings(found, {"accuracy": 0.0}, "No sample is classified rightly: there is nothing to mislead.", [], notes)
    middle = {name: float(samples[name][right].median()) for name in ("margin", "first_order", "angle", "half_way")}
    headline: dict[str, Any] = {"accuracy": found["accuracy"], "distance to first order, median": middle["first_order"]}
    if "attacked" in found:
        distance = found["attacked"]["deepfool"]
        middle["deepfool"] = float(distance[distance > 0].median()) if (distance > 0).any() else math.nan
        headline["smallest misleading change, median"] = middle["deepfool"]
    headline |= {
        "half the way to the next class mean": middle["half_way"],
        "deviation angle, median": f"{math.degrees(middle['angle']):.1f}°",
    }
    found["medians"] = middle
    sections = [*_within(settings, found), _around(found), _compared(settings, found)]
    if pictures := _pictures(subject, shown):
        sections.append(pictures)
    return Findings(found, headline, _words(found), sections, notes)


def _within(settings: Settings, found: Mapping[str, Any]) -> list[Section]:
    """Accuracy by radius."""
    if "attacked" not in found:
        return []
    attacked, samples = found["attacked"], found["samples"]
    radii = [0.0, *attacked["radii"]]
    lines: dict[str, Any] = {"PGD": (radii, [attacked["clean_accuracy"], *attacked["accuracy"]])}
    if settings.norm == "l2":
        grid = torch.linspace(0, radii[-1], 60, dtype=torch.float64)
        lines["DeepFool"] = (grid, (attacked["deepfool"][:, None] > grid).double().mean(0))
        first = torch.where(samples["right"], samples["first_order"], 0.0)
        lines["first order"] = (grid, (first[:, None] > grid).double().mean(0))
    text = (
        f"The share of all samples that stays right, whatever the change within a radius ({settings.norm}), as far as "
        f"{settings.steps} steps of PGD find one that misleads. The lower curve of an attack counts; first order is an estimate."
    )
    axes = {"xlabel": f"radius, {settings.norm}", "ylabel": "accuracy", "height": 280}
    return [Section("Accuracy within a radius", text, [Plot("curves", lines, axes)])]


def _around(found: Mapping[str, Any]) -> Section:
    """Distances and angles of the samples that are right."""
    samples = found["samples"]
    drawn = {
        "distance, first order": samples["first_order"][samples["right"]],
        "deviation angle, degrees": samples["angle"][samples["right"]].rad2deg(),
    }
    if "attacked" in found:
        there = found["attacked"]["deepfool"]
        drawn = {"smallest misleading change": there[(there > 0) & there.isfinite()], **drawn}
    plots = [
        Plot("spectrum", values, {"xlabel": name, "logy": False, "height": 220})
        for name, values in drawn.items()
        if len(values) > 1 and values.min() < values.max()
    ]
    text = (
        "How the samples that are right are spread. The angle is between the way in which a sample most quickly leaves its class "
        "and the line from its class mean to the nearest other one: at 0° the boundary is as far away as it can be, near 90° it "
        "leans along that line, and changes that mislead say next to nothing of the classes."
    )
    return Section("Around the samples", text, [plots] if plots else [])


def _compared(settings: Settings, found: Mapping[str, Any]) -> Section:
    middle, temperature = found["medians"], found["temperature"]
    margin = middle["margin"]
    rows = [
        {
            "margin, median": margin, "temperature": temperature, "margin at that temperature": margin / temperature,
            "adversarial strength": _strength(middle["angle"]),
        }
    ]  # fmt: skip
    text = (
        f"Logits can be scaled freely, so margins of two models compare once both are divided by the temperature at which the "
        f"median confidence is {settings.confidence:.0%}. Adversarial strength, 1 / cos of the median angle, says how much "
        "nearer the boundary is than that of the nearest class mean (inf: the angle is 90° or more)."
    )
    return Section("To compare with other models", text, [Table(rows)])


def _strength(angle: float) -> float:
    return 1 / math.cos(angle) if angle < math.pi / 2 else math.inf


def _pictures(subject: Subject, shown: list[_Shown]) -> Section | None:
    """Samples that are pictures, what is added to them, and what comes out."""
    if not shown or shown[0].x.ndim != 3 or len(shown[0].x) not in (1, 3):
        return None
    low = min(float(x.min()) for x, _ in subject.batches)
    span = max(float(x.max()) for x, _ in subject.batches) - low or 1.0
    name = lambda k: subject.classes[k] if subject.classes and k < len(subject.classes) else str(k)  # noqa: E731
    blocks = []
    for one in shown:
        largest = float(one.change.abs().max())
        views = {
            f"as it is: {name(one.before)}": (one.x - low) / span,
            f"the change, {span / (2 * largest):.3g} times": 0.5 + one.change / (2 * largest),
            f"changed: {name(one.after)}": (one.x + one.change - low) / span,
        }
        blocks.append(Pictures({title: view.clamp(0, 1).float() for title, view in views.items()}))
    return Section("Smallest changes that mislead", "By DeepFool; grey is no change.", blocks)


def _words(found: Mapping[str, Any]) -> str:
    """How far the boundary is, beside noise, and which way it leans."""
    middle, words = found["medians"], []
    if "attacked" in found and math.isfinite(middle["deepfool"]):
        share = middle["deepfool"] / middle["half_way"]
        words.append(
            f"A change of length {middle['deepfool']:.3g} misleads half of the samples that are right: {share:.0%} of half the "
            f"way to the next class mean. Noise of the same length misleads {found['attacked']['noise_misleads']:.0%}."
        )
    else:
        words.append(f"To first order the boundary is {middle['first_order']:.3g} away in the median.")
    degrees = math.degrees(middle["angle"])
    if degrees < 45:
        lean = "the boundary stands across the line between the class means: what misleads has to look like the other class"
    elif degrees < 75:
        lean = "the boundary leans, and so lies nearer than it need"
    else:
        lean = "the boundary leans along the line between the class means, so changes that mislead say little of the classes"
    words.append(f"The median deviation angle is {degrees:.0f}°: {lean}.")
    return " ".join(words)


KIND = Kind(Settings, plan, measure)
