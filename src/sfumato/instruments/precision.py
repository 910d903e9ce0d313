"""How near a classifier is to the edge of numerical stability: where rounding ends learning, and whether training goes there.

Softmax collapse: Σ_j exp(z_j − max z) = 1 as computed, so that the loss of a rightly classified sample is exactly 0. It comes
when the winner leads by about log(2 / ε): 5.5 nats in bfloat16, 7.6 in float16, 16.6 in float32. Alignment: cos(−∇L, θ), near 1
where the loss only wants longer weights (Prieto et al. 2025, sections 3 and 4). Scaled logits show what longer weights would do.

>>> import torch, sfumato
>>> net = torch.nn.Linear(2, 2, bias=False)
>>> _ = net.weight.data.copy_(10 * torch.eye(2))  # the winner leads by 10 nats
>>> found = sfumato.probe("precision", net, [(torch.eye(2), torch.tensor([0, 1]))])
>>> [found.numbers["formats"][name]["collapsed"] for name in ("bfloat16", "float16", "float32")]
[1.0, 1.0, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from sfumato.errors import Interrupted
from sfumato.instruments.classified import count_outputs
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.gradient import loss_and_gradient
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, told_cut
from sfumato.losses.stable_softmax import cross_entropy_at
from sfumato.nn.at_rest import eval_mode, exact_arithmetic
from sfumato.probes.numerics import nlm_alignment, softmax_collapse, zero_loss_fraction

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EDGES = {name: math.log(2 / torch.finfo(dtype).eps) for name, dtype in FORMATS.items()}
"""Lead in nats from which a softmax of two classes collapses."""
SCALES = torch.logspace(-2, 5, 29, base=2, dtype=torch.float64)
PASSES, FEWEST = 2, 16
LAYERS_SHOWN = 15


class Settings(Setup):
    """What the precision probe can be told."""

    tolerance: float = Field(0.01, ge=0, lt=1, description="share of samples that may collapse and still counts as none")
    aligned: float = Field(0.3, gt=0, lt=1, description="cosine from which the gradient is said to lengthen the weights")


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time a gradient, and choose samples."""
    count_outputs(subject, "precision")
    limit = None if minutes is None else 60 * minutes
    sample = seconds_a_sample(lambda pairs: loss_and_gradient(subject, pairs), subject.batches[0], limit, subject.device)
    fitting = samples_that_fit(subject.count, sample, PASSES, limit, FEWEST)
    less = subject.first(settings.samples or fitting)
    notes = told_cut(less.count, subject.count)
    return Plan({"samples": less.count}, PASSES * less.count * sample, limit, PASSES * len(less.batches), notes)


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """Logits in every format, then the gradient beside the weights."""
    del generator  # nothing is drawn
    subject = subject.first(plan.chosen["samples"])
    data = progress.over(subject.batches)
    numbers: dict[str, Any] = {}
    with progress.until_stopped():
        progress.stage("logits")
        numbers |= _logits(subject, data)
        progress.stage("gradient")
        numbers |= _gradient(subject, data)
    if not numbers:
        raise Interrupted("stopped before anything was measured: the logits were not all read")
    return _findings(subject, settings, numbers)


def _logits(subject: Subject, data: Any) -> dict[str, Any]:
    """Shares of samples by format, as the logits are and scaled, and by how much the winner leads."""
    shares = {name: torch.zeros(4 + len(SCALES), dtype=torch.float64) for name in FORMATS}
    leads, right = [], 0.0
    with eval_mode(subject.module), exact_arithmetic(subject.device.type), torch.no_grad():
        for x, y in data:
            z = subject.module(x.to(subject.device)).cpu()
            best = z.double().topk(2).values
            leads.append(best[:, 0] - best[:, 1])
            right += float((z.argmax(1) == y).double().mean()) * len(x)
            for name, dtype in FORMATS.items():
                losses = cross_entropy_at(z, y, dtype=dtype, reduction="none")
                found = [softmax_collapse(z, dtype), zero_loss_fraction(losses), (~losses.isfinite()).float().mean()]
                found += [(~z.to(dtype).isfinite()).any(1).float().mean()]
                found += [softmax_collapse(z.double() * s, dtype) for s in SCALES]
                shares[name] += torch.stack(found).double() * len(x)
    lead = torch.cat(leads)
    titles = ("collapsed", "zero_loss", "loss_not_finite", "logits_not_finite")
    formats = {}
    for name, total in shares.items():
        mean = (total / subject.count).tolist()
        formats[name] = {**dict(zip(titles, mean, strict=False)), "edge": EDGES[name], "collapsed_scaled": mean[len(titles) :]}
    return {"accuracy": right / subject.count, "leads": lead, "scales": SCALES, "formats": formats}


def _gradient(subject: Subject, data: Any) -> dict[str, Any]:
    """The loss, cosines of the negative gradient and the weights, and how much of the gradient float16 can hold."""
    loss, theta = loss_and_gradient(subject, data)
    gradients = [t.grad for t in theta.values() if t.grad is not None]
    there = sum(int((g != 0).sum()) for g in gradients)
    lost = sum(int(((g.half() == 0) & (g != 0)).sum()) for g in gradients)
    cosines = nlm_alignment(theta)
    squares = [g.double().square().sum() for g in gradients]
    return {
        "loss": loss,
        "gradient_norm": float(torch.stack(squares).sum().sqrt()),
        "gradient_lost_in_float16": lost / there if there else math.nan,
        "alignment": {"all": cosines.pop("all"), "parameters": cosines},
    }


def _findings(subject: Subject, settings: Settings, numbers: dict[str, Any]) -> Findings:
    formats, lead = numbers["formats"], float(numbers["leads"].median())
    headline: dict[str, Any] = {"accuracy": numbers["accuracy"]}
    if "alignment" in numbers:
        headline |= {"loss": numbers["loss"], "cos(−gradient, weights)": numbers["alignment"]["all"]}
    headline |= {f"collapsed in {name}": f"{one['collapsed']:.1%}" for name, one in formats.items()}
    rows = [
        {
            "format": name, "collapses from (nats)": round(one["edge"], 1), "collapsed": f"{one['collapsed']:.1%}",
            "loss exactly 0": f"{one['zero_loss']:.1%}", "loss not finite": f"{one['loss_not_finite']:.1%}",
            "logits too large": f"{one['logits_not_finite']:.1%}",
        }
        for name, one in formats.items()
    ]  # fmt: skip
    told = (
        f"Shares of samples. The winner leads the second class by {lead:.3g} nats in the median. The softmax and the "
        "cross-entropy are computed in each format from the model's own logits; the format of the model's layers is not changed."
    )
    scaled = {name: (numbers["scales"], one["collapsed_scaled"]) for name, one in formats.items()}
    axes = {"xlabel": "all logits times", "ylabel": "share of samples that collapse", "logx": True, "height": 260}
    sections = [
        Section("Softmax", told, [Table(rows)]),
        Section("How near the edge is", "What longer weights would do: 1 is the model as it is.", [Plot("curves", scaled, axes)]),
    ]
    notes = [*subject.eval_note, "the gradient is the mean over these samples, not that of one training batch"]
    if "alignment" in numbers:
        sections.append(_alignment(subject, numbers))
    return Findings(numbers, headline, _words(numbers, settings, lead), sections, notes)


def _alignment(subject: Subject, numbers: Mapping[str, Any]) -> Section:
    cosines = {subject.layer(name): value for name, value in numbers["alignment"]["parameters"].items()}
    largest = sorted(cosines, key=lambda name: -abs(cosines[name]))[:LAYERS_SHOWN]
    shown = {name: value for name, value in cosines.items() if name in largest}
    more = f" The {LAYERS_SHOWN} with the largest are shown." if len(cosines) > len(shown) else ""
    text = (
        "The cosine of the negative gradient and the weights: 1 means that a step only makes them longer, −1 shorter, 0 that it "
        f"turns them. Of all parameters together it is {numbers['alignment']['all']:.3f}.{more} Of the entries of the gradient "
        f"that are not 0, float16 rounds {numbers['gradient_lost_in_float16']:.1%} to 0 unless the loss is scaled."
    )
    return Section("Layer by layer", text, [Plot("bars", shown, {"xlabel": "cos(−gradient, weights)"})])


def _words(numbers: Mapping[str, Any], settings: Settings, lead: float) -> str:
    """On which side of the edge, and which way training goes."""
    formats = numbers["formats"]
    over = [name for name, one in formats.items() if one["collapsed"] > settings.tolerance]
    if "float32" in over:
        one = formats["float32"]
        words = [
            f"Over the edge: even in float32 {one['collapsed']:.0%} of the softmaxes collapse, and {one['zero_loss']:.0%} of the "
            "samples have a loss of exactly 0, so their labels no longer pull. StableMax or a loss in float64 keeps them."
        ]
    elif over:
        parts = " and ".join(f"{formats[name]['collapsed']:.0%} in {name}" for name in over)
        words = [
            f"Safe in float32, and over the edge in half precision: {parts} of the softmaxes collapse. Keep the loss in float32."
        ]
    else:
        words = ["Far from the edge: no softmax collapses in any of these formats."]
    if "float32" not in over and 0 < lead < EDGES["float32"]:
        times = EDGES["float32"] / lead
        words.append(f"In float32 half of the samples collapse once logits are {times:,.{int(times < 10)}f} times as large.")
    if "alignment" in numbers:
        cosine = numbers["alignment"]["all"]
        if not numbers["gradient_norm"]:
            words.append("The gradient is exactly 0: learning has ended.")
        elif cosine >= settings.aligned:
            words.append(f"Training goes towards it: the gradient mostly makes weights longer (cosine {cosine:.2f}).")
        else:
            words.append(
                f"Training does not head there now: lengthening the weights is little of the gradient (cosine {cosine:.2f})."
            )
    return " ".join(words).replace(" -", " −")


KIND = Kind(Settings, plan, measure)
