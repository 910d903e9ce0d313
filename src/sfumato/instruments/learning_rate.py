"""The largest stable learning rate as a function of the batch size, from a model's own Hessian and gradient noise.

    SGD   η ≤ 2 (1 + μ) / λ₁(B),    λ₁(B) = λ₁ + v / (B λ₁): proportional to B for small batches, constant for large ones
    Adam  η ∝ 1 / √(1 + B_noise / B): to √B for small batches,    B_noise = tr Σ / ‖∇L‖²

(Granziol, Zohren, Roberts 2022; noise scale: McCandlish et al. 2018.) Random-matrix theory takes v from random directions, where
the noise of a small network is not. So λ₁(B) is measured too, on random batches, and where time allows short trainings from these
weights find the largest rate that they stand (`max_stable_lr`). Theory and measurement are shown side by side.

>>> import torch, sfumato
>>> x = torch.cat([torch.eye(2)] * 8) * torch.tensor([2.0, 1.0])  # squared errors: the Hessian is diag(4, 1)
>>> found = sfumato.probe("learning-rate", torch.nn.Linear(2, 1, bias=False), [(x, torch.zeros(16, 1))], steps=0)
>>> round(found.numbers["largest"]["value"], 4), round(2 / found.numbers["largest"]["value"], 4)
(4.0, 0.5)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from sfumato import catalogue
from sfumato.errors import BadData, BadSetting, Diverged, Interrupted
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.followed import spread_evenly
from sfumato.instruments.gradient import loss_and_gradient
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.own_loss import OwnLoss
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, seconds_of, told_cut
from sfumato.nn.at_rest import eval_mode, exact_arithmetic
from sfumato.optim.lr_scaling import lr_for_batch
from sfumato.probes.batch_spectrum import deviation_along, effective_batch, max_stable_lr
from sfumato.probes.krylov import lanczos
from sfumato.probes.operators import HessianOperator

FEWEST = 32
DIRECTIONS = 4
"""Random directions along which the noise is measured."""
MOST_DRAWS, FEWEST_DRAWS = 16, 4
"""Batches of one size."""
TRIAL_STEPS, FACTOR = 100, 1.2
"""Steps of a trial training, and how finely the largest rate is found."""
AROUND, ADAM = 32.0, (1e-5, 1.0)
"""Where it is looked for: of SGD around what the curvature says, by this factor; of Adam between these rates."""
RUNS = 7
"""Trainings that a search takes at most."""
LEARNS, HOLDS = 0.9, 1.1
"""Share of the first loss below which a trial must end: where the loss can still fall, and at a minimum."""
REACHES = {4**k for k in range(7)}
"""Batch sizes that rates are moved to."""


class Settings(Setup):
    """What the learning-rate probe can be told."""

    batches: str | None = Field(
        None, description="batch sizes that are measured, with commas between them; None: up to a quarter"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD, μ")
    tuned_lr: float | None = Field(None, gt=0, description="a rate that works, to be moved to other batches")
    tuned_batch: int = Field(
        64, gt=0, description="the batch size of tuned_lr; without one, of the rates that others are told by"
    )
    steps: int | None = Field(
        None, ge=0, description="of a trial training; 0: no trials; None: 100, where the time allows trials"
    )
    lanczos: int = Field(15, gt=1, description="products with a Hessian for its largest eigenvalue")


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time a product with the Hessian and a gradient, and choose samples, batch sizes, draws and trials."""
    limit = None if minutes is None else 60 * minutes
    ones = torch.ones_like(_vector(subject.module))
    room = subject.memory // 2 // (len(ones) * ones.element_size()) - DIRECTIONS - 4
    if room < 2:
        raise BadSetting(f"vectors of {len(ones):,} numbers do not fit the memory: --set memory=GB allows more")
    lanczos_steps = min(settings.lanczos, room, len(ones))

    def product(pairs: Any, of: Subject = subject) -> Tensor:
        return HessianOperator(of.module, of.loss, pairs) @ ones

    sample = seconds_a_sample(product, subject.batches[0], limit, subject.device, cut=subject.separable)
    alone = _Samples(subject).batch(torch.zeros(1, dtype=torch.long), 0)
    call = max(0.0, seconds_of(lambda: product(alone.batches, alone), subject.device) - sample)
    products = lanczos_steps + DIRECTIONS
    share = None if limit is None else limit / (1 if settings.steps == 0 else 2)
    samples = settings.samples or samples_that_fit(subject.count, sample, 4 * products, share, FEWEST)
    less = subject.first(samples)
    sizes = _sizes(settings, less.count)
    at_once = len(less.batches[0][0])
    most = MOST_DRAWS

    def spectrum(most: int) -> float:
        found = products * (call * len(less.batches) + less.count * sample)
        for size, draws in _draws(sizes, less.count, most).items():
            found += draws * (products + 1) * (call * math.ceil(size / at_once) + size * sample)
        return found

    while share is not None and most > FEWEST_DRAWS and spectrum(most) > share:
        most = max(FEWEST_DRAWS, most // 2)
    steps = TRIAL_STEPS if settings.steps is None else settings.steps
    seconds = spectrum(most)
    left = None if limit is None else limit - seconds

    def trials(chosen: Sequence[int]) -> float:  # a gradient is about a third of a product
        each = sum(steps * (call * math.ceil(size / at_once) + size * sample) / 3 + less.count * sample / 6 for size in chosen)
        return 2 * RUNS * each

    options = [sizes, spread_evenly(sizes, 3), spread_evenly(sizes, 2), []] if steps else [[]]
    tried = next(o for o in options if not o or settings.steps or left is None or trials(o) <= left)
    notes = told_cut(less.count, subject.count)
    if steps and not tried:
        notes += ("there was no time for trial trainings: more minutes make them, or --set steps=N",)
    draws = _draws(sizes, less.count, most)
    ticks = (products + 1) * len(less.batches)
    ticks += sum(k * (products + 1) * math.ceil(size / at_once) for size, k in draws.items())
    ticks += sum(2 * RUNS * (steps + len(less.batches)) for _ in tried)
    told = {
        "samples": less.count, "batch sizes": sizes, "draws": draws, "Lanczos steps": lanczos_steps,
        "trials for batches of": tried, "steps of a trial": steps if tried else 0, "seconds a product": less.count * sample,
    }  # fmt: skip
    return Plan(told, seconds + trials(tried), limit, ticks, notes)


def _sizes(settings: Settings, count: int) -> list[int]:
    """Batch sizes to measure: four times each other, up to a quarter of the samples; or as asked for."""
    if settings.batches is None:
        if count < 8:
            raise BadData(f"learning-rate draws batches from at least 8 samples, these are {count}; --set samples=N takes more")
        return [2 * 4**k for k in range(10) if 2 * 4**k <= max(2, count // 4)]
    try:
        sizes = sorted({int(word) for word in settings.batches.split(",")})
    except ValueError:
        raise BadSetting(f"batches={settings.batches!r}: give whole numbers with commas between them, such as 2,8,32") from None
    if not sizes or sizes[0] < 1 or sizes[-1] > count // 2:
        raise BadSetting(f"batches={settings.batches}: of {count} samples batches of 1 to {count // 2} can be compared")
    return sizes


def _draws(sizes: Sequence[int], count: int, most: int) -> dict[int, int]:
    """How many batches of each size: as many as the samples make, within limits."""
    return {size: max(FEWEST_DRAWS, min(most, count // size)) for size in sizes}


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """The Hessian on all samples, that of batches of every size, then trials."""
    subject, chosen = subject.first(plan.chosen["samples"]), plan.chosen
    numbers: dict[str, Any] = {"samples": subject.count, "batches": []}
    late = False
    with progress.until_stopped():
        progress.stage("all samples")
        samples, whole = _Samples(subject), _Whole(subject, chosen["Lanczos steps"], progress, generator)
        numbers |= whole.numbers()
        noise: list[Tensor] = []
        for size, draws in chosen["draws"].items():
            late = late or _over(progress, plan)
            if late:
                break
            progress.stage(f"batches of {size}")
            numbers["batches"].append(_batches(samples, whole, size, draws, noise))
            numbers["gradient_noise"] = _gradient_noise(torch.stack(noise), whole.gradient, subject.count)
        numbers |= _laws(numbers, settings)
        if chosen["trials for batches of"]:
            numbers["trials"] = {"steps": chosen["steps of a trial"], "sgd": [], "adam": []}
            late = _trials(subject, settings, plan, numbers, progress, generator) or late
    if "largest" not in numbers:
        raise Interrupted("stopped before anything was measured: the Hessian on all samples was not finished")
    numbers |= _laws(numbers, settings)
    findings = _findings(subject, settings, numbers)
    if late:
        findings.notes.append("it went slower than expected: less was measured than planned, to keep to the time")
    return findings


def _over(progress: Progress, plan: Plan) -> bool:
    return plan.limit is not None and progress.seconds > plan.limit


# The spectrum


class _Samples:
    """Batches of chosen samples, as subjects of their own."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.at_once = subject, len(subject.batches[0][0])
        if subject.separable:
            self.x, self.y = (torch.cat(parts) for parts in zip(*subject.batches, strict=True))

    def batch(self, rows: Tensor, number: int) -> Subject:
        """These samples in pieces as large as the memory allows; the noise of a method's own loss goes by the number."""
        module = self.subject.module
        if isinstance(module, OwnLoss):
            own = module.drawn(rows.split(self.at_once), number)
            return replace(self.subject, module=own, batches=own.pairs())
        pairs = list(zip(self.x[rows].split(self.at_once), self.y[rows].split(self.at_once), strict=True))
        return replace(self.subject, batches=pairs)


class _Whole:
    """What is known of all samples: largest eigenvalue, gradient, and products with random directions."""

    def __init__(self, subject: Subject, steps: int, progress: Progress, generator: torch.Generator) -> None:
        self.subject, self.steps, self.progress, self.generator = subject, steps, progress, generator
        operator = self.operator(subject)
        self.loss, self.gradient = self.slope(subject)
        self.largest, self.error = self.top(operator)
        if not math.isfinite(self.largest):
            raise Diverged("the curvature is not finite: check the weights and the data")
        z = torch.randn(DIRECTIONS, operator.shape[0], generator=generator, device=generator.device).to(operator.device)
        self.z = (z / z.norm(dim=1, keepdim=True)).to(operator.dtype)
        self.products = self.along(operator)

    def operator(self, subject: Subject) -> HessianOperator:
        """The Hessian on the samples of a subject, read under the bar."""
        return HessianOperator(subject.module, subject.loss, self.progress.over(subject.batches))

    def slope(self, subject: Subject) -> tuple[float, Tensor]:
        """Loss and gradient `[d]`."""
        loss, theta = loss_and_gradient(subject, self.progress.over(subject.batches))
        return loss, torch.cat([t.grad.flatten() for t in theta.values() if t.grad is not None])

    def top(self, operator: HessianOperator) -> tuple[float, float]:
        """The largest Ritz value, and how much the last step moved it."""
        found = lanczos(operator, self.steps, generator=self.generator)
        values = torch.linalg.eigvalsh(found.matrix().double())
        before = torch.linalg.eigvalsh(found.matrix()[:-1, :-1].double())
        return float(values[-1]), float(values[-1] - before[-1]) if len(before) else math.inf

    def along(self, operator: HessianOperator) -> Tensor:
        """H z, `[d, directions]`."""
        return torch.stack([operator @ z for z in self.z], 1)

    def numbers(self) -> dict[str, Any]:
        """What a reader gets of it."""
        return {
            "loss": self.loss,
            "gradient_norm": float(self.gradient.double().norm()),
            "largest": {"value": self.largest, "moved": self.error},
        }


def _batches(samples: _Samples, whole: _Whole, size: int, draws: int, noise: list[Tensor]) -> dict[str, Any]:
    """Largest eigenvalues, noise of the Hessian along random directions, and noise of the gradient, which is added to `noise`."""
    generator, count = whole.generator, samples.subject.count
    effective = effective_batch(size, count)
    tops, products = [], []
    for i in range(draws):
        rows = torch.randperm(count, generator=generator, device=generator.device)[:size].cpu()
        one = samples.batch(rows, 1000 * size + i)
        operator = whole.operator(one)
        tops.append(whole.top(operator)[0])
        products.append(whole.along(operator))
        noise.append((whole.slope(one)[1] - whole.gradient).double().square().sum().cpu() * effective)
    found, v = torch.tensor(tops, dtype=torch.float64), deviation_along(whole.products, products)
    return {
        "batch": size, "effective": effective, "draws": draws, "values": tops,
        "largest": {"value": float(found.mean()), "stderr": float(found.std() / math.sqrt(draws))},
        "noise": {"value": float(v.value), "stderr": float(v.stderr)},
    }  # fmt: skip


def _gradient_noise(values: Tensor, gradient: Tensor, count: int) -> dict[str, float]:
    """tr Σ of one sample's gradient, and how many samples make a batch whose noise is as large as the gradient.

    ‖∇L‖² of n samples is too large by tr Σ / n on average, which is taken off; where nothing is left the scale is infinite.
    """
    trace = float(values.mean())
    square = float(gradient.double().square().sum()) - trace / count
    spread = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {"trace": trace, "stderr": spread, "gradient_squared": square, "scale": trace / square if square > 0 else math.inf}


def _laws(numbers: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What follows from the spectrum: the noise by both ways, the curves, and the powers of the batch."""
    top, rows = numbers["largest"]["value"], numbers["batches"]
    if top <= 0 or not rows:
        return {}
    ceiling = 2 * (1 + settings.momentum) / top
    random = sum(row["noise"]["value"] * row["effective"] for row in rows) / len(rows)
    rises = sorted(max(0.0, top * (row["largest"]["value"] - top)) * row["effective"] for row in rows)
    risen = (rises[len(rises) // 2] + rises[(len(rises) - 1) // 2]) / 2  # the median: small batches follow no law
    for row in rows:
        row["sgd"] = 2 * (1 + settings.momentum) / row["largest"]["value"]
        row["theory"] = _sgd(row["effective"], ceiling, top, random)
    sizes = [row["effective"] for row in rows]
    power = {"sgd, by curvature": _power(sizes, [row["sgd"] for row in rows])}
    for name, found in numbers.get("trials", {}).items():
        inside = [t for t in found if t["bound"] == ""] if isinstance(found, list) else []
        power[f"{name}, by trials"] = _power([t["batch"] for t in inside], [t["rate"] for t in inside])
    return {
        "ceiling": ceiling,
        "noise": {"along_random_directions": random, "by_the_rise": risen},
        "explained": random / risen if risen > 0 else math.nan,
        "turning_batch": risen / top**2,
        "power": {name: value for name, value in power.items() if math.isfinite(value)},
    }


def _sgd(batch: float, ceiling: float, top: float, noise: float) -> float:
    """2 (1 + μ) / (λ₁ + v / (B λ₁))."""
    return ceiling / (1 + noise / (batch * top**2))


def _power(batches: Sequence[float], rates: Sequence[float]) -> float:
    """The power of the batch with which rates grow, by least squares of logarithms; NaN of fewer than two."""
    if len(batches) < 2:
        return math.nan
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (batches, rates))
    return float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())


# Trials


def _trials(
    subject: Subject, settings: Settings, plan: Plan, numbers: dict[str, Any], progress: Progress, generator: torch.Generator
) -> bool:
    """The largest rate that short trainings stand, added one by one; returns whether the time ran out before the end."""
    found, steps, sizes = numbers["trials"], plan.chosen["steps of a trial"], plan.chosen["trials for batches of"]
    trainer = _Trainer(replace(subject, module=copy.deepcopy(subject.module)), steps, progress)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    rates = {row["batch"]: row["sgd"] for row in numbers["batches"]}
    kinds: dict[str, Any] = {"sgd": partial(SGD, momentum=settings.momentum), "adam": Adam}
    progress.stage("a trial that must go well")
    careful = min(rates.values(), default=0.01) / 8
    found["first"] = trainer.loss()
    found["share"] = LEARNS if trainer(kinds["sgd"], careful, sizes[-1], seed) < 0.8 * found["first"] else HOLDS
    for size in [*sizes[-1:], *sizes[:-1]]:
        for name, kind in kinds.items():
            if _over(progress, plan):
                return True
            progress.stage(f"trials of {name}, batches of {size}")
            around = rates.get(size, 0.1)
            bracket = ADAM if name == "adam" else (around / AROUND, around * AROUND)
            outcomes: list[bool] = []

            def trains(rate: float, kind: Any = kind, size: int = size, outcomes: list[bool] = outcomes) -> bool:
                outcomes.append(trainer(kind, rate, size, seed) < found["share"] * found["first"])
                return outcomes[-1]

            try:
                rate, bound = max_stable_lr(trains, bracket, factor=FACTOR), ""
            except BadSetting:  # both ends of the bracket go the same way
                rate, bound = (bracket[1], "at least") if all(outcomes) else (bracket[0], "below")
            found[name].append({"batch": size, "rate": rate, "bound": bound})
            found[name].sort(key=lambda one: one["batch"])
    return False


class _Trainer:
    """Trains a copy of the model from the same weights in the same order of samples; gives the loss on all of them in the end."""

    def __init__(self, subject: Subject, steps: int, progress: Progress) -> None:
        self.subject, self.steps, self.progress = subject, steps, progress
        self.params: list[Tensor] = [p for p in subject.module.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.params]
        self.samples = _Samples(subject)

    def __call__(self, kind: Any, rate: float, size: int, seed: int) -> float:
        """The loss after all steps; infinite where it ceased to be finite on the way."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.start)
        generator, optimizer = torch.Generator().manual_seed(seed), kind(self.params, lr=rate)
        device = self.subject.device
        with eval_mode(self.subject.module), exact_arithmetic(device.type), torch.enable_grad():
            for step in range(self.steps):
                self.progress.advance()
                rows = torch.randperm(self.subject.count, generator=generator)[:size]
                if not self._step(self.samples.batch(rows, step), optimizer, size):
                    return math.inf
        return self.loss()

    def _step(self, batch: Subject, optimizer: Optimizer, size: int) -> bool:
        optimizer.zero_grad()
        total = 0.0
        for x, y in batch.batches:
            value = batch.loss(batch.module(x.to(batch.device)), y.to(batch.device)) * (len(x) / size)
            value.backward()  # type: ignore[no-untyped-call]
            total += float(value.detach())
        optimizer.step()
        return math.isfinite(total)

    def loss(self) -> float:
        """On all samples; infinite where it is not finite."""
        module, total = self.subject.module, 0.0
        with eval_mode(module), exact_arithmetic(self.subject.device.type), torch.no_grad():
            for x, y in self.progress.over(self.subject.batches):
                value = self.subject.loss(module(x.to(self.subject.device)), y.to(self.subject.device))
                total += float(value) * len(x) / self.subject.count
        return total if math.isfinite(total) else math.inf


def _vector(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


# Figures


def _findings(subject: Subject, settings: Settings, numbers: dict[str, Any]) -> Findings:
    top = numbers["largest"]["value"]
    headline: dict[str, Any] = {"largest eigenvalue, all samples": top}
    notes = [
        *subject.eval_note,
        "these are the weights as they are: curvature changes while a model trains, and often rises until 2 / λ₁ meets the rate",
        "batches are drawn without replacement from these samples; the axis counts a batch as one of an endless data set",
        *_record(),
    ]
    if "trials" in numbers:
        notes.append(
            "a trial can stand more than 2 / λ₁, since a step that overshoots may end where weights are flatter, and less, since "
            "small steps too far add up"
        )
    if subject.norms:
        notes.append("a training that normalises each batch by its own statistics has another curvature than is measured here")
    if "ceiling" not in numbers:
        why = "no batch was measured" if top > 0 else "the largest eigenvalue is not above zero"
        return Findings(numbers, headline, f"No direction that limits the rate was found: {why}.", [], notes)
    numbers["moved"] = _moved(settings, numbers)
    scale = numbers["gradient_noise"]["scale"]
    headline |= {
        f"largest rate of SGD{_with(settings)}, all samples": numbers["ceiling"],
        "half of it is left at a batch of": f"{max(1.0, numbers['turning_batch']):,.0f}",
        "gradient noise scale": f"{scale:,.0f} samples" if math.isfinite(scale) else "above what can be seen",
        "share of the rise of λ₁ that random directions explain": f"{numbers['explained']:.2g}",
    }
    sections = [_curves(settings, numbers), _measured(numbers), _table(settings, numbers)]
    return Findings(numbers, headline, _words(settings, numbers), sections, notes)


def _with(settings: Settings) -> str:
    return f" with momentum {settings.momentum:g}" if settings.momentum else ""


def _record() -> list[str]:
    """How the theory came out where its claims were run."""
    stored = catalogue.record("batch-size-scaling") or {"claims": []}
    told = [f"“{c['statement']}”: {c['verdict']}" for c in stored["claims"] if c["name"] in ("magnitude", "laws")]
    where = "how the theory came out in the claims of this package, on a small network (sfumato show batch-size-scaling)"
    return [f"{where}: {'; '.join(told)}"] if told else []


def _moved(settings: Settings, numbers: Mapping[str, Any]) -> list[dict[str, float]]:
    """Rates at many batch sizes: the limit by curvature, and a rate moved there from the tuned batch by each rule."""
    ceiling, top = numbers["ceiling"], numbers["largest"]["value"]
    risen, start = numbers["noise"]["by_the_rise"], settings.tuned_batch
    sgd = settings.tuned_lr or _sgd(start, ceiling, top, risen)
    adam = settings.tuned_lr or _adam(numbers, start) or 1.0
    rows = []
    for batch in sorted(REACHES | {start}):
        rows.append(
            {
                "batch": batch,
                "limit": _sgd(batch, ceiling, top, risen),
                "sgd": lr_for_batch(sgd, start, batch, lam1=top, v0=risen / start),
                "sgd_linear": lr_for_batch(sgd, start, batch),
                "adam": adam * _saturation(numbers, batch) / _saturation(numbers, start),
                "adam_root": lr_for_batch(adam, start, batch, kind="adam"),
            }
        )
    return rows


def _saturation(numbers: Mapping[str, Any], batch: float) -> float:
    """1 / √(1 + B_noise / B), or √B where the scale is infinite."""
    scale = numbers["gradient_noise"]["scale"]
    return 1 / math.sqrt(1 + scale / batch) if math.isfinite(scale) else math.sqrt(batch)


def _adam(numbers: Mapping[str, Any], batch: float) -> float | None:
    """Adam's law through the middle of the trials; None without trials."""
    trials = [t for t in numbers.get("trials", {}).get("adam", []) if not t["bound"]]
    if not trials:
        return None
    logs = [math.log(t["rate"] / _saturation(numbers, t["batch"])) for t in trials]
    return math.exp(sum(logs) / len(logs)) * _saturation(numbers, batch)


def _curves(settings: Settings, numbers: Mapping[str, Any]) -> Section:
    """Rates over batches: measured, by the theory, and by the simple rule."""
    rows, moved, trials = numbers["batches"], numbers["moved"], numbers.get("trials", {})
    top, ceiling, start = numbers["largest"]["value"], numbers["ceiling"], settings.tuned_batch
    grid = [2 ** (k / 2) for k in range(25)]
    anchor = _sgd(start, ceiling, top, numbers["noise"]["by_the_rise"])
    sgd: dict[str, Any] = {
        "curvature of batches": ([r["effective"] for r in rows], [r["sgd"] for r in rows]),
        "formula, noise from the rise": (grid, [_sgd(b, ceiling, top, numbers["noise"]["by_the_rise"]) for b in grid]),
        "theory, random directions": (grid, [_sgd(b, ceiling, top, numbers["noise"]["along_random_directions"]) for b in grid]),
        "linear rule": (grid, [lr_for_batch(anchor, start, b) for b in grid if b]),  # type: ignore[arg-type]
    }
    adam: dict[str, Any] = {
        "root rule": ([m["batch"] for m in moved], [m["adam_root"] for m in moved]),
    }
    if math.isfinite(numbers["gradient_noise"]["scale"]):
        adam = {"root until the noise scale": ([m["batch"] for m in moved], [m["adam"] for m in moved]), **adam}
    for name, lines in (("sgd", sgd), ("adam", adam)):
        if trials.get(name):
            lines["trials"] = ([t["batch"] for t in trials[name]], [t["rate"] for t in trials[name]])
    relative = settings.tuned_lr is None and not any(not t["bound"] for t in trials.get("adam", []))
    axes = {"xlabel": "batch size", "logx": True, "logy": True, "height": 320}
    plots = [
        Plot("curves", sgd, {**axes, "ylabel": f"largest learning rate of SGD{_with(settings)}"}),
        Plot("curves", adam, {**axes, "ylabel": f"learning rate of Adam{f', times that at {start:,}' if relative else ''}"}),
    ]
    text = (
        "Where the linear rule and the curve part, a larger batch no longer bears a larger rate. The theory takes noise that is "
        "alike in all directions; where its line is flat and that of the measured batches is not, the noise sits in few "
        "directions, and the measured curve is the one to trust."
    )
    return Section("Rate by batch size", text, [plots])


def _measured(numbers: Mapping[str, Any]) -> Section:
    trials = numbers.get("trials", {})
    rows = []
    for row in numbers["batches"]:
        told = {
            "batch": row["batch"], "batches": row["draws"],
            "λ₁": f"{row['largest']['value']:.3g} ± {float(format(row['largest']['stderr'], '.1g')):g}",
            "SGD, by curvature": row["sgd"], "SGD, theory": row["theory"],
        }  # fmt: skip
        for name, title in (("sgd", "SGD, trials"), ("adam", "Adam, trials")):
            if trials.get(name):
                found = next((t for t in trials[name] if t["batch"] == row["batch"]), None)
                told[title] = f"{found['bound']} {found['rate']:.3g}".strip() if found else "–"
        rows.append(told)
    text = (
        f"λ₁ is the largest eigenvalue of a batch's Hessian, the mean over batches ± its standard error; on all samples it is "
        f"{numbers['largest']['value']:.3g}. SGD is then stable up to 2 (1 + momentum) / λ₁."
    )
    if "share" in trials:
        text += (
            f" Trials: {trials['steps']} steps from these weights, in eval mode; a rate is stable where the loss on all samples "
            f"then is below {trials['share']:g} times the first, {trials['first']:.4g}."
        )
    return Section("What was measured", text, [Table(rows)])


def _table(settings: Settings, numbers: Mapping[str, Any]) -> Section:
    start, tuned = settings.tuned_batch, settings.tuned_lr
    rows = [
        {
            "batch": f"{m['batch']:,}", "SGD, limit": m["limit"],
            **({"SGD, moved": m["sgd"]} if tuned else {}),
            "SGD, linear rule": m["sgd_linear"], "Adam, moved": m["adam"], "Adam, root rule": m["adam_root"],
        }
        for m in numbers["moved"]
    ]  # fmt: skip
    if tuned:
        told = f"From {tuned:g} at a batch of {start:,}."
    else:
        through = "through the trials" if _adam(numbers, start) else f"as a factor to the rate at {start:,}"
        told = (
            f"The linear rule from the limit at a batch of {start:,}; Adam {through}. --set tuned_lr=RATE --set "
            "tuned_batch=N moves a rate of yours."
        )
    text = (
        f"{told} Moved: in proportion to the batch (SGD) or its root (Adam) while noise rules, and no longer where it does not, "
        "by the measured curve and by the gradient noise scale. A limit is no advice: good rates are a few times smaller."
    )
    return Section("From batch to batch", text, [Table(rows)])


def _words(settings: Settings, numbers: Mapping[str, Any]) -> str:
    """The limit, where it stops growing, and what the theory is worth here."""
    rows, turning, scale = numbers["batches"], numbers["turning_batch"], numbers["gradient_noise"]["scale"]
    words = [
        f"At these weights SGD{_with(settings)} is stable up to a rate of about {rows[0]['sgd']:.2g} with batches of "
        f"{rows[0]['batch']} and {numbers['ceiling']:.2g} with large ones"
    ]
    words[0] += f"; the limit grows up to batches of about {turning:,.0f}." if turning >= 1 else "; the batch hardly matters."
    power = numbers["power"].get("sgd, by curvature", math.nan)
    if len(rows) > 1:
        words.append(
            f"From {rows[0]['batch']} to {rows[-1]['batch']} it grows with the power {power:.2f} of the batch, where the "
            "linear rule says 1."
        )
    explained = numbers["explained"]
    if math.isfinite(explained) and explained < 0.5:
        words.append(
            f"The theory does not hold here: noise along random directions explains {100 * explained:.2g} % of the rise of the "
            "largest eigenvalue, so rely on what was measured."
        )
    elif explained > 2:
        words.append(
            f"Noise along random directions would raise the largest eigenvalue {explained:.2g} times as much as was seen."
        )
    elif math.isfinite(explained):
        words.append(
            f"Noise along random directions explains {explained:.0%} of the rise of the largest eigenvalue, as theory has it."
        )
    if math.isfinite(scale):
        words.append(
            f"Gradient noise is as large as the gradient at a batch of {scale:,.0f}: Adam's law follows the root up to there."
        )
    else:
        words.append(
            "The gradient is lost in its noise with these samples, so Adam's law follows the root as far as can be seen."
        )
    if trials := [t for t in numbers.get("trials", {}).get("sgd", []) if not t["bound"]]:
        one = trials[-1]
        near = min(rows, key=lambda row: abs(math.log(row["batch"] / one["batch"])))
        words.append(
            f"In trials with batches of {one['batch']} SGD stood {one['rate']:.2g}, "
            f"{one['rate'] / near['sgd']:.2g} times what curvature says."
        )
    return " ".join(words)


KIND = Kind(Settings, plan, measure)
