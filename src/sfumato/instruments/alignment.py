"""Lazy or rich: how much a model's kernels point along the targets, and how far they have moved while it was trained.

    alignment ⟨K, yyᵀ⟩ / (‖K‖ ‖yyᵀ‖), centred;    movement ‖K_t − K_0‖ / ‖K_0‖;    similarity: the cosine of both, centred

for the tangent kernel K = Σ_c J_c J_cᵀ of the outputs, and for the features of each layer, K = ΦΦᵀ. In lazy training kernels stay
(Chizat, Oyallon, Bach 2019); where features are learned they move, and turn towards the task (Kumar et al. 2024). A run is
followed over the checkpoints that it kept, and K_0 is that of the first.

>>> import torch, sfumato
>>> x, y = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.tensor([0, 0, 1, 1])
>>> found = sfumato.probe("alignment", torch.nn.Linear(1, 2, bias=False), [(x, y)])  # its tangent kernel is 2 x xᵀ
>>> round(found.numbers["kernels"]["tangent kernel"]["alignment"], 3)
0.9
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting, Diverged, Interrupted
from sfumato.instruments.batching import Pairs
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.followed import MORE, coarse_to_fine, earlier_checkpoints, last_step, spread_evenly, step_of, subject_at
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.layers import Layer, find_layers, read_layers
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, told_cut
from sfumato.nn.at_rest import eval_mode
from sfumato.probes.count_sketch import CountSketch
from sfumato.probes.kernels import kernel_alignment, kernel_similarity, kernel_velocity
from sfumato.probes.per_sample import tangent_features

TANGENT = "tangent kernel"
MOST_OUTPUTS = 16
"""Outputs that are differentiated one by one; of more so many random combinations are."""
EXACT, WIDEST, NARROWEST = 2**26, 16_383, 1_023
"""Numbers of all gradients up to which they are kept as they are; how many of each are kept beyond that, at most and at least."""
FEWEST, USUAL = 32, 256
"""Samples that are kept at least where the time is short, and those that are looked at where none are asked for."""
ENOUGH, AT_ONCE = 64, 64
"""Samples for which outputs are combined where the time is short, and gradients that are made at once."""
SHUFFLES = 50
LAZY, RICH = 0.1, 0.5
"""Movement of the tangent kernel below and above which words are chosen."""
TURNED = 0.95
"""Similarity above which a kernel that moved is said to have grown or shrunk only."""


class Settings(Setup):
    """What the alignment probe can be told."""

    kernels: Literal["all", "tangent", "features"] = Field("all", description="which kernels; tangent costs most")
    layers: str | None = Field(None, description="names of layers, with commas between them; None: at most 16 of the model's")
    checkpoints: int | None = Field(None, ge=0, description="kept checkpoints of a run to follow; None: those that fit the time")


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time the layers and one gradient a sample, and choose kernels, outputs, samples and checkpoints."""
    targets, layers = _targets(subject), _layers(subject, settings)
    limit = None if minutes is None else 60 * minutes
    usual = settings.samples or min(USUAL, subject.count)
    tangent = _tangents(subject, usual) if settings.kernels != "features" else {}
    notes: tuple[str, ...] = ()

    def work(pairs: Pairs, tangent: Mapping[str, Any]) -> None:
        if tangent:
            sketch = CountSketch(tangent["weights"], tangent["width"]) if tangent["width"] else None
            tangent_features(_combined(subject.module, tangent, 0), pairs, sketch=sketch, chunk=tangent["chunk"])
        elif layers:
            read_layers(subject, layers, pairs, lambda layer, values: values[:, :WIDEST])

    def seconds(tangent: Mapping[str, Any]) -> float:
        return seconds_a_sample(partial(work, tangent=tangent), subject.batches[0], limit, subject.device)

    sample = seconds({}) if layers else 0.0
    if tangent:
        once = seconds(_with_outputs(subject, tangent, 1))
        if limit is not None and settings.kernels == "all" and (sample + once) * FEWEST > limit:
            tangent, notes = {}, ("there was no time for the tangent kernel: more minutes make it, or --set kernels=tangent",)
        else:
            fits = tangent["differentiated"] if limit is None else max(1, int(limit / (ENOUGH * once)))
            tangent = _with_outputs(subject, tangent, min(fits, tangent["differentiated"]))
            sample += seconds(tangent) if tangent["differentiated"] > 1 else once
    less = subject.first(settings.samples or samples_that_fit(usual, sample, 1, limit, FEWEST))
    if less.count < 4 or float(_targets(less).std(0).max()) == 0:
        raise BadData(
            f"alignment needs at least 4 samples whose targets differ, not these {less.count}: --set samples=N takes more"
        )
    one, earlier = less.count * sample, len(earlier_checkpoints(subject))
    if settings.checkpoints is not None:
        earlier = min(settings.checkpoints, earlier)
    elif limit is not None:
        earlier = max(0, min(earlier, int(limit / one) - 1))
    told = {"samples": less.count, "layers": len(layers), "checkpoints": earlier, "targets": targets.shape[1]}
    told |= {name: value for name, value in tangent.items() if name not in ("room", "for")}
    ticks = (len(less.batches) if layers else 0) + (math.ceil(less.count / tangent["chunk"]) if tangent else 0)
    return Plan(told, one * (1 + earlier), limit, ticks * (1 + earlier), (*notes, *told_cut(less.count, usual)))


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """The final model, then the first checkpoint and those between."""
    subject, chosen = subject.first(plan.chosen["samples"]), plan.chosen
    layers, y = _layers(subject, settings), _targets(subject)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))  # signs that are the same at every step
    paths = spread_evenly(earlier_checkpoints(subject), chosen["checkpoints"])
    moments: dict[int, dict[str, Any]] = {}
    kernels: dict[str, Tensor] = {}
    first: dict[str, Any] = {}
    late = False
    with progress.until_stopped():
        progress.stage("the model")
        _kernels(subject, layers, chosen, seed, progress, kernels)
        weights = _weights(subject.module)
        for path in coarse_to_fine(paths):
            late = progress.late(1 + len(moments), plan.limit)
            if late:
                break
            progress.stage(path.stem)
            there: dict[str, Tensor] = {}
            then = subject_at(subject, path)
            _kernels(then, layers, chosen, seed, progress, there)
            first = first or {"kernels": there, "weights": _weights(then.module)}
            moments[step_of(path)] = _moment(there, y, first, _weights(then.module))
    if not kernels:
        raise Interrupted("stopped before anything was measured: the first kernel was not finished")
    final = (
        _moment(kernels, y, first, weights)
        if first
        else {"kernels": {n: {"alignment": _aligned(k, y)} for n, k in kernels.items()}}
    )
    shuffled = torch.stack([torch.randperm(len(y), generator=generator, device=generator.device).cpu() for _ in range(SHUFFLES)])
    for name, k in kernels.items():
        final["kernels"][name]["shuffled"] = sum(_aligned(k, y[rows]) for rows in shuffled) / SHUFFLES
    numbers: dict[str, Any] = {"samples": subject.count, **final}
    if moments:
        moments[last_step(subject) or 0] = final
        numbers["checkpoints"] = [{"step": step, **moments[step]} for step in sorted(moments)]
    findings = _findings(subject, plan, numbers)
    if late:
        findings.notes.append(f"it went slower than expected: {len(moments)} checkpoints were measured, to keep to the time")
    return findings


# Targets, layers and kernels


def _targets(subject: Subject) -> Tensor:
    """What a kernel may point along, `[n, c]`: a column a class, or the numbers of the target."""
    if not subject.separable:
        raise BadSetting(
            f"alignment compares outputs with targets, and {subject.name} has one loss of its own: probe its network by "
            "module:factory"
        )
    y = torch.cat([y for _, y in subject.batches])
    if y.is_floating_point():
        y = y.reshape(len(y), -1).double()
        if y.shape[1] > len(y):  # n directions hold all that n targets say to each other
            y = torch.linalg.qr((y - y.mean(0)).T).R.T
        return y
    if y.ndim != 1:
        raise BadData(f"alignment takes a class or numbers for every sample; these labels are {list(y.shape[1:])} a sample")
    return F.one_hot(y).double()


def _layers(subject: Subject, settings: Settings) -> list[Layer]:
    return [] if settings.kernels == "tangent" else find_layers(subject, settings.layers)


def _tangents(subject: Subject, samples: int) -> dict[str, Any]:
    """What the memory allows of the tangent kernel: outputs or combinations of them, samples at once, and numbers a gradient."""
    x = subject.batches[0][0][:1]
    with eval_mode(subject.module), torch.no_grad():
        outputs = subject.module(x.to(subject.device)).numel()
    weights = sum(p.numel() for p in subject.module.parameters() if p.requires_grad)
    size = next(p for p in subject.module.parameters() if p.requires_grad).element_size()
    room = subject.memory // 2 // size
    if 2 * weights > room:
        raise BadSetting(
            f"one gradient of {weights:,} weights does not fit the memory twice: --set memory=GB allows more, --set "
            "kernels=features goes without the tangent kernel"
        )
    most = min(outputs, MOST_OUTPUTS, room // (2 * weights))
    return _with_outputs(subject, {"weights": weights, "outputs": outputs, "room": room, "for": samples}, most)


def _with_outputs(subject: Subject, tangent: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The same with so many outputs, and as many samples at once and numbers a gradient as the memory then allows."""
    weights, room, samples = tangent["weights"], tangent["room"], tangent["for"]
    width = None if samples * count * weights <= min(room, EXACT) else max(NARROWEST, min(WIDEST, room // (samples * count)))
    chunk = max(1, min(len(subject.batches[0][0]), room // (2 * count * weights), AT_ONCE // count))
    return {**tangent, "differentiated": count, "chunk": chunk, "width": width}


class _Combined(nn.Module):
    """Random combinations R f of the outputs, with E RᵀR = 1: their tangent kernel is that of f on average."""

    def __init__(self, model: nn.Module, mix: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mix", mix)
        self.mix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(1) @ self.mix  # type: ignore[no-any-return]


def _combined(module: nn.Module, chosen: Mapping[str, Any], seed: int) -> nn.Module:
    if chosen["differentiated"] == chosen["outputs"]:
        return module
    p = next(module.parameters())
    signs = torch.randint(2, (chosen["outputs"], chosen["differentiated"]), generator=torch.Generator().manual_seed(seed))
    return _Combined(module, (2 * signs - 1).to(p) / math.sqrt(chosen["differentiated"]))


def _kernels(
    subject: Subject, layers: Sequence[Layer], chosen: Mapping[str, Any], seed: int, progress: Progress, found: dict[str, Tensor]
) -> None:
    """`[n, n]` in double precision, by name, added as they are ready."""
    if layers:
        data = progress.over(subject.batches)
        short = {
            layer.name: CountSketch(layer.size, WIDEST, generator=torch.Generator().manual_seed(seed))
            for layer in layers
            if layer.size > WIDEST
        }

        def keep(layer: Layer, values: Tensor) -> Tensor:
            return short[layer.name](values) if layer.name in short else values

        for name, features in read_layers(subject, layers, data, keep).items():
            title = next(layer.title for layer in layers if layer.name == name)
            found[title] = _gram(features, title)
    if "weights" in chosen:
        generator = torch.Generator().manual_seed(seed)
        sketch = CountSketch(chosen["weights"], chosen["width"], generator=generator) if chosen["width"] else None
        pieces = [piece for x, _ in subject.batches for piece in x.split(chosen["chunk"])]
        rows = tangent_features(_combined(subject.module, chosen, seed), progress.over(pieces), sketch=sketch)
        found[TANGENT] = _gram(rows, TANGENT)


def _gram(features: Tensor, title: str) -> Tensor:
    k = features @ features.T if features.dtype == torch.float64 else _summed(features)
    if not bool(k.isfinite().all()):
        raise Diverged(f"the kernel of {title} is not finite: check the weights and the data")
    return k.cpu()


def _summed(features: Tensor) -> Tensor:
    """Φ Φᵀ, summed in double precision over pieces of the columns, so that long rows lose nothing."""
    n = len(features)
    total = torch.zeros(n, n, dtype=torch.float64)
    for part in features.split(2**16, 1):
        total += (part @ part.T).cpu().double()
    return total


def _weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in module.parameters() if p.requires_grad])


def _aligned(k: Tensor, y: Tensor) -> float:
    """NaN for a kernel that is the same between all samples."""
    return float(kernel_alignment(k, y))


def _moment(kernels: Mapping[str, Tensor], y: Tensor, first: Mapping[str, Any], weights: Tensor) -> dict[str, Any]:
    """Alignment, and how far kernels and weights are from the first checkpoint's."""
    of = {
        name: {
            "alignment": _aligned(k, y),
            "movement": float(kernel_velocity(k, first["kernels"][name])),
            "similarity": float(kernel_similarity(k, first["kernels"][name])),
        }
        for name, k in kernels.items()
        if name in first["kernels"]
    }
    moved = (weights - first["weights"]).double().norm() / first["weights"].double().norm()
    return {"kernels": of, "weights": {"movement": float(moved), "norm": float(weights.double().norm())}}


# Figures


def _findings(subject: Subject, plan: Plan, numbers: dict[str, Any]) -> Findings:
    kernels, chosen = numbers["kernels"], plan.chosen
    lead = TANGENT if TANGENT in kernels else next(reversed(kernels))
    headline: dict[str, Any] = {
        f"alignment, {lead}": kernels[lead]["alignment"],
        "with shuffled targets": kernels[lead]["shuffled"],
    }
    steps = [c["step"] for c in numbers.get("checkpoints", ())]
    if steps:
        headline |= {
            f"movement since step {steps[0]:,}": kernels[lead]["movement"],
            f"similarity to step {steps[0]:,}": kernels[lead]["similarity"],
            "movement of the weights": numbers["weights"]["movement"],
        }
    rows = [
        {
            "kernel": name, "alignment": one["alignment"], "shuffled": one["shuffled"],
            **({"movement": one["movement"], "similarity": one["similarity"]} if steps else {}),
        }
        for name, one in kernels.items()
    ]  # fmt: skip
    text = (
        "1: samples are as near to each other as their targets are; shuffled: the mean over targets in random order, which is "
        "what a kernel gets that knows nothing of them."
    )
    bars = {name: one["alignment"] for name, one in kernels.items()}
    sections = [Section("Alignment with the targets", text, [Plot("bars", bars, {"xlabel": "alignment"}), Table(rows)])]
    if steps:
        sections.insert(0, _over_steps(numbers["checkpoints"]))
    notes = [*subject.eval_note, *_told(chosen)]
    if numbers["samples"] < 100:
        notes.append("alignment with shuffled targets falls with the samples: compare only probes of equally many")
    if len(kernels) < chosen["layers"] + ("weights" in chosen):
        notes.append("not every kernel was finished")
    if not steps:
        notes.append(MORE)
    elif steps[0] > 0:
        notes.append(f"the run no longer has its first weights: movement is counted from step {steps[0]:,}")
    return Findings(numbers, headline, _words(numbers, lead, steps), sections, notes)


def _told(chosen: Mapping[str, Any]) -> list[str]:
    """What was done to make the tangent kernel fit."""
    notes = []
    if chosen.get("differentiated", 0) < chosen.get("outputs", 0):
        notes.append(
            f"outputs that the tangent kernel is summed over: {chosen['differentiated']} random combinations of the "
            f"{chosen['outputs']:,}, right on average"
        )
    if chosen.get("width"):
        notes.append(
            f"gradients of {chosen['weights']:,} numbers are kept as random sketches of {chosen['width']:,}, so entries of the "
            f"tangent kernel are off by about {100 / math.sqrt(chosen['width']):.1g} % of their diagonal"
        )
    return notes


def _over_steps(checkpoints: Sequence[Mapping[str, Any]]) -> Section:
    steps = [c["step"] for c in checkpoints]
    names = [name for name in checkpoints[-1]["kernels"] if all(name in c["kernels"] for c in checkpoints)]

    def lines(of: str) -> dict[str, Any]:
        return {name: (steps, [c["kernels"][name][of] for c in checkpoints]) for name in names}

    later, axes = steps[1:], {"xlabel": "step", "height": 300}
    moved = {name: (later, [c["kernels"][name]["movement"] for c in checkpoints[1:]]) for name in names}
    moved["weights"] = (later, [c["weights"]["movement"] for c in checkpoints[1:]])
    text = (
        f"At the checkpoints that were measured. Movement and similarity are from step {steps[0]:,}: how far a kernel is from "
        "what it was, by its size then, and the cosine of both, which no change of scale moves."
    )
    beside = [
        Plot("curves", lines("alignment"), {**axes, "ylabel": "alignment with the targets"}),
        Plot("curves", lines("similarity"), {**axes, "ylabel": f"similarity to step {steps[0]:,}"}),
    ]
    return Section("Over training", text, [beside, Plot("curves", moved, {**axes, "ylabel": "movement", "logy": True})])


def _words(numbers: Mapping[str, Any], lead: str, steps: Sequence[int]) -> str:
    """Whether it points at the targets, and whether it moved."""
    one = numbers["kernels"][lead]
    words = [f"The {lead if lead == TANGENT else f'values of {lead}'} point{'s' * (lead == TANGENT)} along the targets"]
    words[0] += f" with {one['alignment']:.2f} (shuffled targets: {one['shuffled']:.2f})."
    if not steps:
        return words[0] + " Whether it moved there, only a run with several checkpoints can tell."
    moved, before = one["movement"], numbers["checkpoints"][0]["kernels"][lead]["alignment"]
    if moved < LAZY:
        state, meaning = "Lazy", "so it learns with features that it had, as kernel regression does"
    elif one["similarity"] > TURNED:
        state, meaning = "Lazy but for its scale", "so it grew or shrank and hardly turned"
    elif moved > RICH:
        state, meaning = "Rich", "so features are learned"
    else:
        state, meaning = "Between lazy and rich", "so features change a little"
    words.append(
        f"{state}: since step {steps[0]:,} it moved by {moved:.2g} times its size, with a similarity of {one['similarity']:.2f} "
        f"to what it was, and its alignment went from {before:.2f} to {one['alignment']:.2f}, {meaning}."
    )
    return " ".join(words)


KIND = Kind(Settings, plan, measure)
