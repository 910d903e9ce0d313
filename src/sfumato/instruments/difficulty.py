"""Which times a diffusion model finds hard: its loss on each part of the times, and how fast the noisy marginals change there.

    L_i = mean |f(x_t, t) - y|² over t in part i,      Σ KL(p_{t-1} || p_t) over the same t

Beside the loss stands that of the best linear denoiser: a trained network lies below it where it knows more of the pictures than
mean and covariance, and above it where it has not learned enough. The relative entropy is a property of data and schedule alone
(Kim, Go, Kwon, Kim 2025); it says where neighbouring times differ most, and so where a sampler's steps and a curriculum matter.
On request a new network is trained on each part alone: how fast it learns, and what samples lose by it (`expert_training`).
Of a run with continuous noise levels (EDM's) the times are the levels of its sampler's grid, the quietest first, and signal and
noise are scaled as everywhere else, by 1 / sqrt(1 + sigma²).

>>> import torch, sfumato
>>> from sfumato.papers.diffusion.ddpm import DDPM
>>> method = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8))
>>> found = sfumato.probe("difficulty", method, torch.rand(64, 1, 8, 8), intervals=4, draws=1)
>>> [part["times"] for part in found.numbers["parts"]]
[[0, 249], [250, 499], [500, 749], [750, 999]]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from sfumato.diffusion.curriculum import uniform_clusters
from sfumato.diffusion.schedules import Schedule
from sfumato.diffusion.time_samplers import range_t
from sfumato.errors import BadSetting, Interrupted
from sfumato.instruments import expert_training
from sfumato.instruments.expert_training import Cost, cost, train_experts
from sfumato.instruments.findings import Findings, Plan, Plot, Section, Table
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.own_loss import OwnLoss
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import seconds_of, told_cut
from sfumato.probes.denoising_tasks import linear_denoising_loss, marginal_kl, principal_variances

FEWEST, MOST_DRAWS = 32, 16
"""Samples that are kept at least where the time is short, and noise levels a sample and part beyond which more tell little."""
SURE = 2.0
"""Standard errors by which a loss must differ to be told."""


@runtime_checkable
class Diffusion(Protocol):
    """A method that denoises pictures in [-1, 1] at the times of a `Schedule`."""

    schedule: Schedule

    def losses_at(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of pictures `[B, C, H, W]` in [0, 1] at times `[B]` with this noise: `[B]`."""
        ...


class Settings(Setup):
    """What the difficulty probe can be told."""

    intervals: int = Field(10, gt=0, description="parts that the times are cut into")
    draws: int | None = Field(
        None, gt=0, description="noise levels of each sample in each part; None: what the time allows, at most 16"
    )
    estimator: Literal["gaussian", "exact"] = Field(
        "gaussian", description="what the data is taken for: a Gaussian of its moments, or its samples and nothing between them"
    )
    train_steps: int = Field(
        0, ge=0, description="also train a new network on each part alone, for so many steps, and draw samples with it; 0: do not"
    )
    drawn: int | None = Field(
        None, gt=1, description="samples drawn with each of these networks; None: what the time allows, 64 to 512"
    )


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time one batch and the relative entropy of a pair of times, and choose samples and draws."""
    method = _diffusion(subject)
    times = len(method.schedule)
    uniform_clusters(times, settings.intervals)  # refuses more parts than times
    limit, wanted = None if minutes is None else 60 * minutes, settings.samples or subject.count
    parts = _batches(subject, wanted)
    whole, study = limit, None
    if settings.train_steps:
        study = cost(subject, torch.cat(parts), settings.intervals, settings.train_steps, settings.drawn, limit)
        limit = None if limit is None else max(limit - study.seconds, limit / 4)
    seconds = seconds_of(lambda: _losses(method, parts[0], 0, times, None), subject.device) / len(parts[0])
    if settings.estimator == "exact":
        pairs: Sequence[int] = (times // 2,)
        entropy = seconds_of(lambda: _entropy(parts, method.schedule, settings, None, pairs), subject.device) * times
    else:
        entropy = seconds_of(lambda: _entropy(parts, method.schedule, settings, None, None), subject.device)
    samples = min(wanted, subject.count)
    while settings.samples is None and limit is not None and samples > FEWEST:
        share = samples / min(wanted, subject.count)
        if share**2 * entropy + settings.intervals * (settings.draws or 1) * samples * seconds <= limit:
            break
        samples = max(FEWEST, int(0.8 * samples))
    entropy *= (samples / min(wanted, subject.count)) ** 2
    one = settings.intervals * samples * seconds
    fits = MOST_DRAWS if limit is None else max(1, min(MOST_DRAWS, int((limit - entropy) / one)))
    draws = settings.draws or fits
    chosen: dict[str, Any] = {"samples": samples, "intervals": settings.intervals, "draws": draws}
    ticks, seconds = settings.intervals * draws * len(_batches(subject, samples)), entropy + draws * one
    if study is not None:
        chosen |= {"train_steps": settings.train_steps, "drawn": study.drawn, "study": study._asdict()}
        ticks, seconds = ticks + study.ticks, seconds + study.seconds
    return Plan(chosen, seconds, whole, ticks, told_cut(samples, subject.count))


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """What the data says; then a draw of every part, and another."""
    method, batches = _diffusion(subject), _batches(subject, plan.chosen["samples"])
    schedule = method.schedule
    progress.stage("relative entropy")
    variances, _ = principal_variances(_clean(batches))
    entropy = torch.cat([torch.full((1,), math.nan, dtype=torch.float64), _entropy(batches, schedule, settings, generator, None)])
    edges = uniform_clusters(len(schedule), settings.intervals).tolist()
    spans = list(pairwise(edges))
    seen: list[list[Tensor]] = [[] for _ in spans]
    with progress.until_stopped():
        for draw in range(plan.chosen["draws"]):
            progress.stage(f"losses, draw {draw + 1}")
            for (low, high), losses in zip(spans, seen):
                found = [_losses(method, x, low, high, generator) for x in progress.over(batches)]
                losses.append(torch.cat(found).double())
    if not all(seen):
        raise Interrupted("stopped before anything was measured: some part of the times had no loss yet")
    predict, sigma_data = _predicted(method)
    linear = linear_denoising_loss(variances, schedule, predict=predict, sigma_data=sigma_data)
    parts = [
        _part((low, high), torch.stack(losses), entropy[low:high], linear[low:high])
        for (low, high), losses in zip(spans, seen)
    ]  # fmt: skip
    numbers = {"parts": parts, "relative_entropy": entropy, "linear_loss": linear, "sigma": schedule.sigma, "predict": predict}
    findings = _findings(subject, settings, numbers, sum(map(len, batches)))
    if settings.train_steps and not progress.stopped:
        study = Cost(**plan.chosen["study"])
        experts = train_experts(subject, torch.cat(batches), study, progress=progress, generator=generator)
        conditional = getattr(subject.owner.config, "conditional", False)
        _add_study(findings, experts, study, sum(map(len, batches)), conditional)
    return findings


def _add_study(findings: Findings, found: dict[str, Any], study: Cost, samples: int, conditional: bool) -> None:
    """What the networks of one part tell, after the losses; nothing where it was stopped before."""
    if not found:
        return
    findings.numbers["trained alone"] = {name: value for name, value in found.items() if name != "pictures"}
    findings.sections[1:1] = expert_training.sections(found, study)
    findings.verdict = f"{findings.verdict} {expert_training.words(found, study)}".strip()
    findings.notes += expert_training.notes(samples, conditional=conditional)


def _diffusion(subject: Subject) -> Diffusion:
    owner = subject.owner
    if not isinstance(owner, Diffusion) or not isinstance(owner.schedule, Schedule):
        raise BadSetting(
            f"difficulty takes a run of a diffusion model whose loss stands at times of a noise schedule, such as ddpm; "
            f"{subject.name} is a {type(owner).__name__}"
        )
    return owner


def _predicted(method: Diffusion) -> tuple[str, float]:
    """What the loss is of, and for EDM the deviation of the data that it reckons with."""
    config: Any = getattr(method, "config", None)
    if getattr(config, "formulation", "ddpm") == "edm":
        return "edm", config.sigma_data
    return getattr(config, "predict", "eps"), 0.5


def _batches(subject: Subject, samples: int) -> list[Tensor]:
    """The first pictures, as the method trains on them."""
    assert isinstance(subject.module, OwnLoss)
    batches = subject.module.batches
    return list(torch.cat([b.x for b in batches])[:samples].split(len(batches[0])))


def _clean(batches: Sequence[Tensor]) -> Tensor:
    return 2 * torch.cat(list(batches)) - 1


def _entropy(
    batches: Sequence[Tensor], schedule: Schedule, settings: Settings, generator: torch.Generator | None, times: Any
) -> Tensor:
    x = _clean(batches)
    noise = None
    if settings.estimator == "exact" and generator is not None:
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    return marginal_kl(x, schedule, estimator=settings.estimator, times=times, noise=noise)


@torch.no_grad()
def _losses(method: Diffusion, x: Tensor, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    """`[B]` on the CPU."""
    device = next(method.parameters()).device  # type: ignore[attr-defined]
    t = range_t(len(x), low, high, generator=generator).to(device)
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    return method.losses_at(x.to(device), t, noise).cpu()


def _part(span: tuple[int, int], losses: Tensor, entropy: Tensor, linear: Tensor) -> dict[str, Any]:
    """One part; the error is that of a mean over samples, each a mean over its draws."""
    each = losses.mean(0)
    return {
        "times": [span[0], span[1] - 1], "loss": float(each.mean()), "error": float(each.std() / len(each) ** 0.5),
        "linear": float(linear.mean()), "relative_entropy": float(entropy.nansum()),
    }  # fmt: skip


def _findings(subject: Subject, settings: Settings, numbers: dict[str, Any], samples: int) -> Findings:
    parts = numbers["parts"]
    hardest = max(parts, key=lambda p: p["loss"])
    total = sum(p["relative_entropy"] for p in parts)
    headline = {
        "loss, all times": sum(p["loss"] * (p["times"][1] + 1 - p["times"][0]) for p in parts) / len(numbers["sigma"]),
        "largest loss": f"{hardest['loss']:.4g} at times {_span(hardest)}",
        "relative entropy in the first part": f"{parts[0]['relative_entropy'] / total:.1%}" if total else "none",
    }
    middles = [sum(p["times"]) / 2 for p in parts]
    losses = {
        "this model": (middles, [p["loss"] for p in parts]),
        "best linear denoiser": (middles, [p["linear"] for p in parts]),
    }
    axes = {"xlabel": "time (0: least noise)", "height": 260}
    steps = {"KL of a time and the next": (range(1, len(numbers["sigma"])), numbers["relative_entropy"][1:])}
    rows = [
        {
            "times": _span(p), "noise over signal": f"{numbers['sigma'][sum(p['times']) // 2]:.3g}", "loss": p["loss"],
            "± its error": p["error"], "best linear": p["linear"], "relative entropy": p["relative_entropy"],
            "share": f"{p['relative_entropy'] / total:.1%}" if total else "–",
        }
        for p in parts
    ]  # fmt: skip
    told = (
        f"Squared error of {_PREDICTED[numbers['predict']]}, by the weights that samples are drawn with, over {samples} samples."
    )
    sections = [
        Section("Loss", told, [Plot("curves", losses, {**axes, "ylabel": "loss"})]),
        Section(
            "Relative entropy",
            "How much neighbouring noisy marginals differ, in nats: where it is large, a step of a sampler has most to do.",
            [Plot("curves", steps, {**axes, "ylabel": "nats", "logy": True})],
        ),
        Section("Figures", None, [Table(rows, "Relative entropy: the sum over the pairs of times in the part.")]),
    ]
    notes = _notes(settings, subject, samples)
    if not settings.train_steps and isinstance(subject.owner, expert_training.ExpertTaker):
        notes.append("how fast each part is learned from the start, and what samples lose by it: --set train_steps=300")
    return Findings(numbers, headline, _words(parts), sections, notes)


_PREDICTED = {
    "eps": "the predicted noise",
    "x0": "the predicted clean picture",
    "v": "the predicted velocity",
    "edm": "the network's answer",
}


def _notes(settings: Settings, subject: Subject, samples: int) -> list[str]:
    pixels = math.prod(_batches(subject, 1)[0].shape[1:])
    notes = []
    if settings.estimator == "exact":
        notes.append(
            "the samples are taken for the whole distribution: at little noise they stand apart, and so do the marginals"
        )
    if samples <= pixels:
        notes.append(
            f"{samples} samples span fewer directions than a picture has numbers ({pixels}): the Gaussian and the linear "
            "denoiser know them too well, and the relative entropy at little noise is too large; --set samples=N takes more"
        )
    return notes


def _words(parts: Sequence[Mapping[str, Any]]) -> str:
    """Where the loss and the divergence are large, and where the network is behind a line."""
    losses, entropies = [p["loss"] for p in parts], [p["relative_entropy"] for p in parts]
    words = []
    if all(a > b for a, b in pairwise(losses)):
        words.append(f"The less noise, the harder: the loss falls from {losses[0]:.3g} to {losses[-1]:.3g} over the times.")
    elif all(a < b for a, b in pairwise(losses)):
        words.append(f"The more noise, the harder: the loss rises from {losses[0]:.3g} to {losses[-1]:.3g} over the times.")
    else:
        worst = max(parts, key=lambda p: p["loss"])
        words.append(f"The loss is largest at times {_span(worst)} ({worst['loss']:.3g}).")
    if all(a > b for a, b in pairwise(entropies)):
        words.append(
            f"The data has its largest steps at low times: {entropies[0] / sum(entropies):.0%} of the "
            "relative entropy lies in the first part, and it falls from each part to the next."
        )
    else:
        most = max(parts, key=lambda p: p["relative_entropy"])
        words.append(f"Neighbouring times differ most at {_span(most)}.")
    behind = [p for p in parts if p["loss"] - SURE * p["error"] > p["linear"]]
    if behind:
        words.append(
            f"The network is behind the best linear denoiser at times {', '.join(map(_span, behind))}: more training, or a "
            "weight on these times, would help."
        )
    else:
        words.append("At no times is it behind the best linear denoiser.")
    return " ".join(words)


def _span(part: Mapping[str, Any]) -> str:
    low, high = part["times"]
    return f"{low}–{high}"


KIND = Kind(Settings, plan, measure)
