"""Linear mode connectivity of two trained models: the loss on the straight line between them, and what rises on it.

θ_α = (1 − α) θ_a + α θ_b, barrier = max_α L(θ_α) − (1 − α) L(θ_a) − α L(θ_b) (Frankle et al. 2020). Measured as the models are,
again with the hidden units of b in the order of a's (weight matching: Ainsworth et al. 2023), and for each layer alone
(Adilova et al. 2024). Statistics of batch norm are recomputed on the data at every position.

>>> import torch, sfumato
>>> x = torch.randn(60, 4)
>>> a, b = (torch.nn.Linear(4, 1) for _ in range(2))
>>> found = sfumato.probe("connectivity", a, [(x, x[:, :1])], b)  # a convex loss has no barrier
>>> found.numbers["as they are"]["barrier"]["loss"] < 1e-6
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sfumato.errors import BadSetting, Interrupted
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.model_words import difference
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, told_cut
from sfumato.nn.at_rest import eval_mode
from sfumato.probes.paths import Curve, State, barrier, fork_geometry, layerwise_barrier, path_loss
from sfumato.probes.permutation import match_permutation

PLAIN, MATCHED = "as they are", "units matched"
LAYER_ALPHAS = 5
ENOUGH, FEWEST = 11, 64
"""Positions for which samples are left out where the time is short, and how many samples are kept at least."""
MOST_GROUPS = 30
"""Layers that are shown one by one; deeper models are cut at a shallower part of the name."""


class Settings(Setup):
    """What the connectivity probe can be told."""

    match: bool = Field(True, description="measure again with the hidden units of b in the order of a's")
    alphas: int | None = Field(None, ge=3, description="positions on the line; None: what the time allows, at most 25")
    layers: int | None = Field(
        None, ge=0, description="parts of a layer's name that tell groups apart, 0: no layers; None: what the time allows"
    )
    tolerance: float = Field(
        0.02, gt=0, description="rise that still counts as none: of the error; where there are no classes, of the loss, relative"
    )


def plan(a: Subject, b: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time one batch, and choose positions on the line and how finely layers are told apart."""
    _refuse_unlike(a, b)
    limit = None if minutes is None else 60 * minutes

    def work(pairs: list[tuple[Tensor, Tensor]]) -> None:
        with eval_mode(a.module), torch.no_grad():
            for x, y in pairs:
                a.loss(a.module(x.to(a.device)), y.to(a.device))

    readings = 2 if a.norms else 1  # once more for the statistics of batch norm
    sample = seconds_a_sample(work, a.batches[0], limit, a.device, cut=a.separable) * readings
    lines = 2 if settings.match else 1
    samples = a.first(settings.samples or samples_that_fit(a.count, sample, ENOUGH * lines, limit, FEWEST)).count
    one = samples * sample
    names = list(a.module.state_dict())
    sizes = {
        depth: len(_groups(names, a, depth)) for depth in ([0, 1, 2, 3, 4] if settings.layers is None else [settings.layers])
    }
    alphas, depth = choose(
        limit, one * lines, {d: n for d, n in sizes.items() if n <= MOST_GROUPS or settings.layers is not None}
    )
    alphas = settings.alphas or alphas
    positions = lines * (alphas + LAYER_ALPHAS * sizes[depth])
    chosen = {
        "samples": samples, "positions": alphas, "groups of layers": sizes[depth], "depth": depth, "lines": lines,
        "seconds a position": one,
    }  # fmt: skip
    notes = told_cut(samples, a.count)
    return Plan(chosen, positions * one, limit, positions * readings * len(a.first(samples).batches), notes)


def choose(limit: float | None, seconds: float, groups: Mapping[int, int]) -> tuple[int, int]:
    """Positions, and the depth of layer names, for a time; `groups` says how many layers each depth tells apart.

    >>> groups = {0: 0, 1: 6, 2: 20}
    >>> choose(None, 1, groups), choose(130, 1, groups), choose(60, 1, groups), choose(20, 1, groups), choose(1, 1, groups)
    ((25, 2), (25, 2), (25, 1), (11, 0), (3, 0))
    """
    deep = sorted(groups, reverse=True)
    layered = [d for d in deep if groups[d]]
    bare = min(deep, key=lambda d: groups[d])
    options = [(25, d) for d in layered] + [(11, d) for d in layered[-1:]] + [(n, bare) for n in (25, 11, 5, 3)]
    return next((o for o in options if limit is None or (o[0] + LAYER_ALPHAS * groups[o[1]]) * seconds <= limit), options[-1])


def measure(
    a: Subject, b: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator
) -> Findings:
    """The line, the line to the matched model, and the layers of both."""
    del generator  # nothing is drawn
    a = a.first(plan.chosen["samples"])
    data = progress.over(a.batches)
    first, ends = a.module.state_dict(), {PLAIN: b.module.state_dict()}
    notes: list[str] = []
    if settings.match:
        progress.stage("matching units")
        try:
            ends[MATCHED] = match_permutation(a.module, first, ends[PLAIN])
        except BadSetting as error:
            notes.append(f"the units could not be matched: {error}")
    lines: dict[str, dict[str, Any]] = {}
    groups = _groups(list(first), a, plan.chosen["depth"])
    common: tuple[Any, ...] = (a.loss, data)
    with progress.until_stopped():
        for which, state in ends.items():
            progress.stage(f"line, {which}")
            curve = path_loss(a.module, first, state, *common, alphas=plan.chosen["positions"])
            lines[which] = _line(curve, fork_geometry(_floats(first), _floats(state), _floats(first)).dist)
        for which, state in ends.items() if groups else ():
            progress.stage(f"layers, {which}")
            found = layerwise_barrier(a.module, first, state, *common, groups=groups, alphas=LAYER_ALPHAS)
            lines[which]["layers"] = {name: one.height for name, one in found.items()}
    if not lines:
        raise Interrupted("stopped before anything was measured: the first line was not finished")
    if a.norms:
        notes.append("batch norm: its statistics were recomputed on this data at every position, the ends included")
    return _findings(a, settings, lines, notes)


def _refuse_unlike(a: Subject, b: Subject) -> None:
    told = difference(a.module.state_dict(), b.module.state_dict())
    if told is not None:
        told = told.format(a=f"A ({a.name})", b=f"B ({b.name})")
        raise BadSetting(f"the models differ: {told}; connectivity takes two trainings of one architecture")


def _floats(state: State) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}


def _groups(names: list[str], subject: Subject, depth: int) -> dict[str, list[str]]:
    """State entries by the first `depth` parts of their layer's name; none for depth 0."""
    groups: dict[str, list[str]] = {}
    for name in names if depth else ():
        layer = subject.layer(name).rpartition(".")[0].split(".")[:depth]
        groups.setdefault(".".join(layer) or "model", []).append(name)
    return groups


def _line(curve: Curve, distance: float) -> dict[str, Any]:
    """The numbers of one line."""
    heights = {of: barrier(curve, of=of) for of in ("loss", "error")}  # type: ignore[arg-type]
    return {
        **curve._asdict(),
        "barrier": {of: one.height for of, one in heights.items()},
        "at": {of: one.alpha if math.isfinite(one.height) else math.nan for of, one in heights.items()},
        "distance": distance,
        "layers": {},
    }


def _findings(a: Subject, settings: Settings, lines: dict[str, dict[str, Any]], notes: list[str]) -> Findings:
    plain, classes = lines[PLAIN], bool(torch.isfinite(lines[PLAIN]["error"]).all())
    headline: dict[str, Any] = {"loss of A": float(plain["loss"][0]), "loss of B": float(plain["loss"][-1])}
    for which, line in lines.items():
        headline[f"barrier of the loss, {which}"] = line["barrier"]["loss"]
        if classes:
            headline[f"rise of the error, {which}"] = line["barrier"]["error"]
    plots = [Plot("curves", {w: (line["alphas"], line["loss"]) for w, line in lines.items()}, _axes("loss"))]
    if classes:
        plots.append(Plot("curves", {w: (line["alphas"], line["error"]) for w, line in lines.items()}, _axes("share of errors")))
    sections = [Section("On the line", "A stands at 0, B at 1.", [plots])]
    if plain["layers"]:
        text = "Only this layer goes from A to B, all others stay those of A; the rise above the line between its own two ends."
        layers = {which: line["layers"] for which, line in lines.items() if line["layers"]}
        tall = [Plot("bars", one, {"xlabel": f"barrier of the loss, {which}"}) for which, one in layers.items()]
        flat = max(height for one in layers.values() for height in one.values()) <= 0
        told = f"{text} No layer alone gives a barrier." if flat else text
        sections.append(Section("Layer by layer", told, [] if flat else [tall]))
    rows = [
        {"": w, "barrier": line["barrier"]["loss"], "at": line["at"]["loss"], "distance": line["distance"]}
        | ({"rise of the error": line["barrier"]["error"]} if classes else {})
        for w, line in lines.items()
    ]
    sections.append(Section("Figures", None, [Table(rows, "Distance: length of the difference of all weights.")]))
    verdict = _words(lines, settings.tolerance, classes)
    if classes and a.classes and float(plain["error"][[0, -1]].min()) > 0.9 * (1 - 1 / len(a.classes)):
        verdict = f"Neither model does much better than guessing, so the line says little. {verdict}"
    return Findings(dict(lines), headline, verdict, sections, notes)


def _axes(ylabel: str) -> dict[str, Any]:
    return {"xlabel": "position between A and B", "ylabel": ylabel, "height": 260}


def _words(lines: Mapping[str, Mapping[str, Any]], tolerance: float, classes: bool) -> str:
    """Connected or not, and what matching changed."""
    plain, matched = lines[PLAIN], lines.get(MATCHED)

    def connected(line: Mapping[str, Any]) -> bool:
        scale = 1.0 if classes else float(abs(line["loss"][[0, -1]]).mean())
        return bool(line["barrier"]["error" if classes else "loss"] <= tolerance * scale)

    def told(line: Mapping[str, Any]) -> str:
        height, at = line["barrier"], line["at"]
        if classes:
            return f"the error rises by at most {100 * height['error']:.2g} points and the loss by {height['loss']:.3g}"
        return f"the loss rises by at most {height['loss']:.3g}, at {at['loss']:.2g}"

    if connected(plain):
        return f"Linearly connected: {told(plain)} above the line between the ends."
    words = f"Not linearly connected: {told(plain)} above the line between the ends."
    if matched is None:
        return words
    if connected(matched):
        return f"{words} With the units of B in the order of A's they are: then {told(matched)}."
    before, after = plain["barrier"]["loss"], matched["barrier"]["loss"]
    change = f"{1 - after / before:.0%} less of the loss" if after < before else "which is no less"
    return f"{words} With the units of B in the order of A's {told(matched)}, {change}."


KIND = Kind(Settings, plan, measure, models=2)
