"""Curvature of a loss at a model's weights: largest and smallest eigenvalues, trace, spectral density, trace by layer.

For every operator A (Hessian ∇²L; Gauss-Newton (1/n) Σ Jᵢᵀ ∇²ℓᵢ Jᵢ; empirical Fisher (1/n) Σ gᵢ gᵢᵀ) and random sign vectors z,
m Lanczos steps from z / ‖z‖ give T = QᵀAQ, and from T all of it: zᵀAz = d T₀₀ (trace, Hutchinson 1990), z ⊙ Az (its share by
layer), the ends of the spectrum (Ritz values: each bounds its eigenvalue from inside), and the quadrature of the density
(Ubaru, Chen, Saad 2017). Only products A v are taken, chunked over the data; memory is m vectors and one batch.

>>> import torch, sfumato
>>> x, net = torch.randn(40, 3), torch.nn.Linear(3, 1, bias=False)
>>> found = sfumato.probe("curvature", net, [(x, x.sum(1, keepdim=True))], operator="hessian")
>>> exact = torch.linalg.eigvalsh(2 * x.T @ x / 40)
>>> abs(found.numbers["hessian"]["largest"]["values"][0] / float(exact[-1]) - 1) < 1e-4
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sfumato.errors import BadSetting, Diverged, Interrupted
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.gradient import loss_and_gradient
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, seconds_of, told_cut
from sfumato.nn.flat import layer_slices
from sfumato.probes.krylov import Lanczos, lanczos, smoothed_spectrum
from sfumato.probes.linear_operator import LinearOperator
from sfumato.probes.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator

OPERATORS: Mapping[str, type[LinearOperator]] = {
    "hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator,
}  # fmt: skip
NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton", "fisher": "empirical Fisher"}
MOST_STEPS, MOST_STARTS = 100, 16
GRID = 512
ENOUGH, FEWEST = 40, 16
"""Products for which samples are left out where the time is short, and how many samples are kept at least."""
NEGATIVE = 1e-4
"""Share of the largest size below which an eigenvalue counts as zero."""
UNSURE = 0.5
"""Share of its size up to which an eigenvalue may be off and is still shown."""
FLAT = 0.01
"""Share of the largest eigenvalue down to which a negative one is called flat."""
LAYERS_SHOWN = 15


class Settings(Setup):
    """What the curvature probe can be told."""

    operator: Literal["all", "hessian", "ggn", "fisher"] = Field("all", description="which matrices")
    top: int = Field(10, gt=0, le=50, description="eigenvalues shown at each end")
    steps: int | None = Field(
        None, gt=0, description="Lanczos steps a start; None: what the time and the memory allow, at most 100"
    )
    starts: int | None = Field(None, gt=0, description="random starts, for error bars; None: what the time allows, at most 16")
    layers: str | None = Field(None, description="only parameters whose name begins so, such as head; None: all")


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time one product with every operator on one batch, and choose samples, Lanczos steps and starts."""
    limit = None if minutes is None else 60 * minutes
    names = _names(subject, settings)
    probe = torch.cat([torch.ones_like(subject.module.get_parameter(name)).flatten() for name in names]).detach()
    size, sample = len(probe), {}
    for name in _chosen(subject, settings):
        product = partial(_product, name, subject, settings, probe)
        sample[name] = seconds_a_sample(product, subject.batches[0], limit, subject.device, cut=subject.separable)
    fitting = samples_that_fit(subject.count, sum(sample.values()), ENOUGH, limit, FEWEST)
    samples = subject.first(settings.samples or fitting).count
    seconds = {name: samples * one for name, one in sample.items()}
    room = max(1, subject.memory // 2 // (size * probe.element_size()) - 4)  # the basis; a few vectors more are in use
    longest = min(MOST_STEPS, size, room)
    dot = seconds_of(lambda: probe @ probe, subject.device)
    cost = sum(seconds.values())
    for _ in range(2):  # keeping a basis of m vectors orthogonal costs about 2 m scalar products a step more
        steps, starts = choose(limit, cost, longest)
        steps, starts = min(settings.steps or steps, size), settings.starts or starts
        cost = sum(seconds.values()) + len(seconds) * 2 * steps * dot
    notes = [*told_cut(samples, subject.count)]
    if settings.steps is None and steps == room < min(MOST_STEPS, size):
        notes.append(f"memory holds {room} Lanczos vectors of {size:,} numbers; --set memory=GB allows more")
    products = steps * starts
    told = {
        "samples": samples, "steps": steps, "starts": starts, "products": products, "dimension": size,
        "seconds a product": seconds, "GB of vectors": steps * size * probe.element_size() / 1e9,
    }  # fmt: skip
    ticks = (products * len(seconds) + 1) * len(subject.first(samples).batches)
    return Plan(told, products * cost, limit, ticks, tuple(notes))


def choose(limit: float | None, seconds: float, longest: int) -> tuple[int, int]:
    """Lanczos steps and starts for a time: about six times as many steps as starts, never less than one product.

    >>> choose(60, 1, 100), choose(600, 1, 100), choose(0.5, 1, 100), choose(600, 1, 10), choose(None, 1, 57)
    ((20, 3), (60, 10), (1, 1), (10, 16), (57, 16))
    """
    if limit is None:
        return longest, MOST_STARTS
    products = max(1, int(limit / seconds))
    steps = min(longest, products, max(1, math.isqrt(6 * products)))
    starts = max(1, min(MOST_STARTS, products // steps))
    return max(1, min(longest, products // starts)), starts


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """Lanczos from every start with every operator, then all that follows from it."""
    subject = subject.first(plan.chosen["samples"])
    data = progress.over(subject.batches)
    operators = {name: _operator(name, subject, settings, data) for name in _chosen(subject, settings)}
    slices = _slices(subject, settings)
    runs: dict[str, list[_Run]] = {name: [] for name in operators}
    starts, steps, at, late = plan.chosen["starts"], plan.chosen["steps"], {}, False
    with progress.until_stopped():
        progress.stage("gradient")
        at = _gradient(subject, settings, data)
        for start in range(starts):
            late = progress.late(start, plan.limit)
            if late:
                break
            z = torch.randint(2, (plan.chosen["dimension"],), generator=generator, device=generator.device, dtype=torch.int8)
            for name, operator in operators.items():
                progress.stage(f"{NAMES[name]}, start {start + 1} of {starts}")
                runs[name].append(_run(lanczos(operator, steps, start=2 * z - 1), steps, slices))
    runs = {name: done for name, done in runs.items() if done}
    if not runs:
        raise Interrupted("stopped before anything was measured: the first start was not finished")
    findings = _findings({name: _summary(done, settings.top) for name, done in runs.items()}, runs, at)
    findings.notes += subject.eval_note
    findings.notes.append("every number is an estimate from random starts; ± at a mean is its standard error over starts")
    if all(len(done) == 1 for done in runs.values()):
        findings.notes.append("there was time for one start only, so means have no ±: more minutes or fewer samples give more")
    if late:
        findings.notes.append("it went slower than expected: fewer starts were made than planned, to keep to the time")
    if not subject.separable:
        findings.notes.append("Gauss-Newton and Fisher need outputs and targets apart; this loss is one number: Hessian only")
    return findings


# One Lanczos run


@dataclass(frozen=True)
class _Run:
    """What is kept of a run: nodes, weights and error bounds `[m]`, whether the nodes are the eigenvalues themselves, the trace
    that it estimates, and the part of each layer.
    """

    nodes: Tensor
    weights: Tensor
    bounds: Tensor
    exact: bool
    trace: float
    layers: dict[str, float] = field(default_factory=dict)


def _run(found: Lanczos, steps: int, slices: Mapping[str, slice]) -> _Run:
    nodes, weights = (t.double().cpu() for t in found.quadrature())
    d, alpha, q = len(found.basis), found.alpha, found.basis
    product = q[:, 0] * alpha[0] + (q[:, 1] * found.beta[0] if len(alpha) > 1 else 0)  # A q₁, by the recurrence
    diagonal = d * q[:, 0] * product  # z ⊙ A z
    exact = len(alpha) < steps or len(alpha) == d
    rounding = 10 * torch.finfo(alpha.dtype).eps * nodes.abs().max()
    bounds = (torch.zeros_like(nodes) if exact else _bounds(found)) + rounding
    if len(alpha) == 1 and not exact:  # the rest of A q₁ lies outside the basis and was not kept
        return _Run(nodes, weights, bounds, exact, float(d * alpha[0]))
    layers = {name: float(diagonal[part].double().sum()) for name, part in slices.items()}
    return _Run(nodes, weights, bounds, exact, float(d * alpha[0]), layers)


def _bounds(found: Lanczos) -> Tensor:
    """How far from each node an eigenvalue is at most: residual of the step before, and what the last step moved.

    Both ends of T (m × m) lie beyond those of T (m − 1 × m − 1), whose Ritz pairs have the known residual β s.
    """
    m = len(found.alpha)
    if m == 1:
        return torch.full((1,), torch.inf, dtype=torch.float64)
    before, vectors = torch.linalg.eigh(Lanczos(found.alpha[:-1], found.beta[:-1], found.basis).matrix())
    residual = (found.beta[-1] * vectors[-1]).abs()
    nodes = found.quadrature()[0]
    low = residual + (nodes[:-1] - before).abs()  # counted from the smallest
    high = residual + (nodes[1:] - before).abs()  # counted from the largest
    half = m // 2
    return torch.cat([low[:half], high[half - 1 :]]).double().cpu()


def _chosen(subject: Subject, settings: Settings) -> list[str]:
    if settings.operator in ("ggn", "fisher") and not subject.separable:
        raise BadSetting(
            f"operator={settings.operator} needs outputs and targets apart, and {subject.name} has one loss: hessian"
        )
    if settings.operator != "all":
        return [settings.operator]
    return list(OPERATORS) if subject.separable else ["hessian"]


def _product(name: str, subject: Subject, settings: Settings, v: Tensor, data: Any) -> Tensor:
    return _operator(name, subject, settings, data) @ v


def _names(subject: Subject, settings: Settings) -> list[str]:
    """The parameters that are looked at."""
    trainable = [name for name, p in subject.module.named_parameters() if p.requires_grad]
    names = [n for n in trainable if settings.layers is None or subject.layer(n).startswith(settings.layers)]
    if not names:
        some = ", ".join(dict.fromkeys(subject.layer(n).split(".")[0] for n in trainable))
        raise BadSetting(f"layers={settings.layers!r}: no trainable parameter begins so; they begin with {some}")
    return names


def _operator(name: str, subject: Subject, settings: Settings, data: Any) -> LinearOperator:
    kind: Any = OPERATORS[name]
    operator: LinearOperator = kind(subject.module, subject.loss, data, params=_names(subject, settings))
    return operator


def _slices(subject: Subject, settings: Settings) -> dict[str, slice]:
    """Where each layer lies in the vector of the parameters that are looked at."""
    chosen = {name: subject.module.get_parameter(name) for name in _names(subject, settings)}
    return {subject.layer(name) or "model": part for name, part in layer_slices(chosen).items()}


# From runs to figures


def _summary(runs: Sequence[_Run], top: int) -> dict[str, Any]:
    """The numbers of one operator."""
    if not all(math.isfinite(run.trace) for run in runs):
        raise Diverged("the curvature is not finite: check the weights and the data")
    nodes, weights = _stacked(runs)
    used = nodes[weights > 0]
    low, high = float(used.min()), float(used.max())
    sigma = (high - low or abs(high) or 1.0) * max(0.005, 0.2 / nodes.shape[1])
    t = torch.linspace(low - 8 * sigma, high + 8 * sigma, GRID, dtype=torch.float64)
    phi = smoothed_spectrum(nodes, weights, t, sigma**2)
    clearly = nodes < -NEGATIVE * max(abs(low), abs(high))
    return {
        "trace": _mean(_column([run.trace for run in runs])),
        "negative_share": _mean((weights * clearly).sum(1)),
        "largest": _end(runs, top, -1),
        "smallest": _end(runs, top, 1),
        "layers": {name: _mean(_column([run.layers[name] for run in runs])) for name in runs[0].layers},
        "density": {"t": t, "sigma": sigma, **{"phi" if n == "value" else n: v for n, v in _mean(phi).items()}},
        "starts": [{"nodes": run.nodes, "weights": run.weights, "bounds": run.bounds, "trace": run.trace} for run in runs],
    }


def _stacked(runs: Sequence[_Run]) -> tuple[Tensor, Tensor]:
    """Nodes and weights `[starts, m]`; a run that ended early has places of weight 0."""
    nodes, weights = (torch.nn.utils.rnn.pad_sequence([getattr(r, of) for r in runs], True) for of in ("nodes", "weights"))
    return nodes, weights


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _mean(values: Tensor) -> dict[str, Any]:
    """Mean over starts and its standard error (NaN for a single start), of `[starts]` or `[starts, n]`."""
    spread = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], math.nan)
    return {"value": values.mean(0).tolist(), "stderr": spread.tolist()}


def _end(runs: Sequence[_Run], top: int, step: int) -> dict[str, list[float]]:
    """Eigenvalues of one end, the outermost first, each from the run that came farthest, and how far off it can be."""
    count = min(top, *(len(run.nodes) if run.exact else max(1, len(run.nodes) // 2) for run in runs))
    values = torch.stack([run.nodes[::step][:count] if step > 0 else run.nodes.flip(0)[:count] for run in runs])
    bounds = torch.stack([run.bounds[:count] if step > 0 else run.bounds.flip(0)[:count] for run in runs])
    best = (values if step < 0 else -values).argmax(0, keepdim=True)
    return {"values": values.gather(0, best)[0].tolist(), "bounds": bounds.gather(0, best)[0].tolist()}


def _gradient(subject: Subject, settings: Settings, data: Any) -> dict[str, float]:
    """The loss and the length of its gradient at the weights."""
    loss, theta = loss_and_gradient(subject, data, _names(subject, settings))
    squares = [t.grad.double().square().sum() for t in theta.values() if t.grad is not None]
    return {"loss": loss, "gradient_norm": float(torch.stack(squares).sum().sqrt())}


def _findings(found: dict[str, dict[str, Any]], runs: Mapping[str, list[_Run]], at: dict[str, float]) -> Findings:
    """Numbers, words, tables and plots."""
    lead = next(iter(found))
    largest, smallest, trace = (found[lead][name] for name in ("largest", "smallest", "trace"))
    headline = {
        "loss": at["loss"],
        "gradient norm": at["gradient_norm"],
        f"largest eigenvalue ({NAMES[lead]})": _outermost(largest),
        f"smallest eigenvalue ({NAMES[lead]})": _outermost(smallest),
        f"trace ({NAMES[lead]})": (trace["value"], trace["stderr"]),
    }
    density = {NAMES[name]: (one["density"]["t"], _phi(runs[name], one["density"])) for name, one in found.items()}
    sections = [
        Section(
            "Eigenvalues",
            "Outermost first. Each is a bound from inside: the true one is at least as far out. ± says how far off it can be, "
            "where that would change the digits shown; what is less certain than half its size is left out.",
            [Table(_rows(found))],
        )
    ]
    if len(runs[lead][0].nodes) > 1:
        text = (
            "How many eigenvalues have which size: the mean over starts, and the 95 % interval of that mean. "
            f"Every eigenvalue is drawn as a bell of width {found[lead]['density']['sigma']:.2g}."
        )
        plots = [Plot("spectrum", {name: curve}, {"xlabel": f"eigenvalue, {name}"}) for name, curve in density.items()]
        sections.append(Section("Spectral density", text, plots))
    if layers := _layer_bars(lead, found[lead], runs[lead]):
        sections.append(
            Section("Trace by layer", "Where the curvature sits: the part of the trace on each layer's weights.", [layers])
        )
    return Findings({**at, **found}, headline, _words(lead, found[lead]), sections)


def _outermost(end: Mapping[str, Sequence[float]]) -> tuple[float, float] | str:
    """The first eigenvalue of an end and its error; one product alone says nothing of it."""
    value, bound = end["values"][0], end["bounds"][0]
    return (value, bound) if math.isfinite(bound) else "not found yet"


def _phi(runs: Sequence[_Run], density: Mapping[str, Any]) -> Tensor:
    nodes, weights = _stacked(runs)
    return smoothed_spectrum(nodes, weights, density["t"], density["sigma"] ** 2)


def _rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank by operator; the smallest ones only of the Hessian, since the others have none below zero."""
    columns = {f"{NAMES[name]}, largest": one["largest"] for name, one in found.items()}
    if "hessian" in found:
        columns["Hessian, smallest"] = found["hessian"]["smallest"]
    told = {
        title: [_told(v, b) for v, b in zip(end["values"], end["bounds"]) if b <= UNSURE * abs(v)] or ["not found yet"]
        for title, end in columns.items()
    }
    length = max(map(len, told.values()))
    return [{"": str(i + 1), **{t: v[i] if i < len(v) else "" for t, v in told.items()}} for i in range(length)]


def _told(value: float, bound: float) -> str:
    """Four digits, and how far off they can be, where that would show in them."""
    text = f"{value:.4g}" + (f" ± {bound:.1g}" if bound > 5e-5 * abs(value) else "")
    return text.replace("e-0", "e-").replace("-", "−").replace(" ", "\u00a0")


def _layer_bars(name: str, one: Mapping[str, Any], runs: Sequence[_Run]) -> Plot | None:
    """The layers with the largest part of the trace, one value a start."""
    parts = sorted(one["layers"], key=lambda layer: -abs(one["layers"][layer]["value"]))[:LAYERS_SHOWN]
    if len(parts) < 2:
        return None
    shown = {layer: [run.layers[layer] for run in runs] for layer in one["layers"] if layer in parts}
    more = f"the {LAYERS_SHOWN} layers that have most of it; " if len(one["layers"]) > LAYERS_SHOWN else ""
    return Plot("bars", shown, {"xlabel": f"trace of the {NAMES[name]}"}, f"In the order of the model; {more}a dot is one start.")


def _words(name: str, one: Mapping[str, Any]) -> str:
    """What the figures say, and no more than their errors allow."""
    (largest, reach), (smallest, depth) = ((one[end]["values"][0], one[end]["bounds"][0]) for end in ("largest", "smallest"))
    trace, spread = one["trace"]["value"], one["trace"]["stderr"]
    if reach > UNSURE * abs(largest):
        return "The largest eigenvalue was not found: more Lanczos steps are needed, so more minutes or fewer samples."
    if largest <= 0:
        return "No direction curves upwards: the largest eigenvalue is not above zero."
    words = [f"Gradient descent on this loss is stable up to a learning rate of 2 / {largest:.3g} = {2 / largest:.2g}."]
    if name == "hessian" and smallest < -FLAT * largest:
        words.append(f"The most negative eigenvalue is {smallest:.3g}: these weights are not at a minimum.")
    elif name == "hessian" and depth <= FLAT * largest:
        words.append("No eigenvalue is clearly negative: these weights lie in a valley or on its floor.")
    elif name == "hessian":
        words.append("Whether an eigenvalue is clearly negative, more Lanczos steps would tell.")
    if spread <= UNSURE * trace:
        words.append(f"The largest eigenvalue is {largest / trace:.0%} of the trace.")
    return " ".join(words).replace(" -", " −")


KIND = Kind(Settings, plan, measure)
