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
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from sfumato.errors import BadData, BadSetting, Diverged, Interrupted
from sfumato.instruments.findings import Findings, Plan
from sfumato.instruments.followed import spread_evenly
from sfumato.instruments.gradient import loss_and_gradient
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.own_loss import OwnLoss
from sfumato.instruments.progress import Progress
from sfumato.instruments.rate_findings import laws, rate_findings
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, seconds_of, told_cut
from sfumato.nn.at_rest import eval_mode, exact_arithmetic
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
        numbers |= laws(numbers, settings)
        if chosen["trials for batches of"]:
            numbers["trials"] = {"steps": chosen["steps of a trial"], "sgd": [], "adam": []}
            late = _trials(subject, settings, plan, numbers, progress, generator) or late
    if "largest" not in numbers:
        raise Interrupted("stopped before anything was measured: the Hessian on all samples was not finished")
    numbers |= laws(numbers, settings)
    findings = rate_findings(subject, settings, numbers)
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


KIND = Kind(Settings, plan, measure)
