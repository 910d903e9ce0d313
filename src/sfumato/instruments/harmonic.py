"""The patterns in which a denoiser shrinks a picture: eigenvectors of its Jacobian at that picture with noise.

    y = x + σ z,    J = ∇f(y),    (J + Jᵀ) / 2 = Σ λ_k e_k e_kᵀ

λ near 1: the pattern is kept, near 0: taken for noise; Σ λ = tr J is the effective rank. A denoiser that has learned what
pictures are alike in shrinks in few patterns, which oscillate along the contours of the picture; its J is nearly symmetric,
as that of every best denoiser is. Small pictures: all of J, else block Lanczos on products with it
(Kadkhodaie, Guth, Simoncelli, Mallat 2024; Mohan et al. 2020).

>>> import torch, sfumato
>>> blur = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
>>> _ = torch.nn.init.constant_(blur.weight, 1 / 9)  # symmetric, and shrinks waves: the constant one not at all
>>> found = sfumato.probe("harmonic", blur, torch.rand(3, 1, 8, 8))
>>> round(found.numbers["pictures"][0]["values"][0], 4), found.numbers["asymmetry"] < 1e-5
(1.0, True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sfumato.errors import BadData, BadSetting, Diverged, Interrupted
from sfumato.instruments.findings import Findings, Pictures, Plan, Plot, Section, Table
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.progress import Progress
from sfumato.instruments.samples import crop_to
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import seconds_of, told_cut
from sfumato.method import Denoiser, Method
from sfumato.nn.at_rest import eval_mode
from sfumato.probes.denoisers import DenoiserBasis, denoiser_basis
from sfumato.probes.linear_operator import DENSE_LIMIT
from sfumato.probes.operators import InputJacobianOperator

VECTORS = (16, 8, 4)
"""Eigenvectors where none were asked for: as many as the time allows."""
WRITTEN_OUT = 1024
"""Numbers of a picture up to which all of J is computed."""
SIDE = 64
"""Pixels a side that larger pictures are brought to, where neither the model nor the person says."""
BLOCK, PROBES, LONGEST = 4, 32, 2000
"""Products at once, random signs for trace and asymmetry, and the most products of a picture."""
SHOWN, PATTERNS = 3, 12
"""Pictures and patterns that the page shows."""
SYMMETRIC, EXACT = 0.9, 0.02
"""Share of J from which it counts as a shrinkage in a basis; share of f(y) that J y may be off to say all."""


class Settings(Setup):
    """What the harmonic probe can be told."""

    samples: int | None = Field(4, gt=0, description="pictures, drawn by the seed, or fewer where the time is short")
    sigma: float = Field(0.1, gt=0, description="standard deviation of the noise that is added, of pixels in [0, 1]")
    vectors: int | None = Field(None, gt=0, description="eigenvectors of a picture; None: 16, or fewer where the time is short")
    method: Literal["auto", "dense", "lanczos"] = Field(
        "auto", description="all of the Jacobian, or products with it; auto: by the size of a picture"
    )


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time products with the Jacobian, and choose how it is taken apart, how many patterns, and how many pictures."""
    limit = None if minutes is None else 60 * minutes
    x, notes = _clean(subject, settings)
    one = x[:1].to(subject.device)
    n = one.numel()
    if settings.vectors is not None and settings.vectors > n:
        raise BadSetting(f"vectors={settings.vectors}: a picture of {n} numbers has no more than {n}")
    if settings.method == "dense" and n > DENSE_LIMIT:
        raise BadSetting(f"method=dense: a {n} x {n} Jacobian is too large to write out (limit {DENSE_LIMIT}): use lanczos")
    with eval_mode(subject.owner):
        jacobian = InputJacobianOperator(_denoiser(subject, settings), one)
        v = torch.ones(n, min(BLOCK, n), dtype=one.dtype, device=one.device)
        forward, back = (seconds_of(lambda a=a: a @ v, subject.device) for a in (jacobian, jacobian.T))  # type: ignore[misc]
    written = n * back / v.shape[1]
    product = (forward + back) / v.shape[1]
    dense = settings.method == "dense" or (settings.method == "auto" and n <= WRITTEN_OUT)
    vectors, usual = choose(limit, product, n)
    if settings.vectors is not None:
        vectors, usual = settings.vectors, _usual_products(settings.vectors)
    room = subject.memory // 2 // (n * one.element_size())
    if not dense and 2 * vectors + 4 * BLOCK > room:
        vectors = max(1, room // 2 - 2 * BLOCK)
        notes.append(f"memory holds {vectors} eigenvectors of {n:,} numbers; --set memory=GB allows more")
    seconds = written if dense else usual * product
    count = len(x) if limit is None else max(1, min(len(x), int(limit / seconds)))
    chosen = {
        "pictures": count, "numbers": n, "Jacobian": "written out" if dense else "by products",
        "eigenvectors": n if dense else vectors,
        "products": n if dense else min(LONGEST, LONGEST if limit is None else max(usual, int(limit / count / product))),
    }  # fmt: skip
    return Plan(chosen, count * seconds, limit, count, (*notes, *told_cut(count, len(x))))


def _usual_products(vectors: int) -> int:
    return 6 * vectors + 4 * BLOCK + PROBES


def choose(limit: float | None, product: float, n: int) -> tuple[int, int]:
    """How many eigenvectors for a time, and the products with J and Jᵀ that they take as a rule.

    >>> choose(None, 1, 5000), choose(600, 1, 5000), choose(120, 1, 5000), choose(1, 1, 5000), choose(None, 1, 9)
    ((16, 144), (16, 144), (8, 96), (4, 72), (9, 102))
    """
    options = [(min(k, n), _usual_products(min(k, n))) for k in VECTORS]
    return next((o for o in options if limit is None or o[1] * product <= limit), options[-1])


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """The basis at every picture, and what it keeps of it."""
    clean, _ = _clean(subject, settings)
    clean, f = clean[: plan.chosen["pictures"]], _denoiser(subject, settings)
    found: list[dict[str, Any]] = []
    shown: list[Mapping[str, Tensor]] = []
    late = False
    with progress.until_stopped(), eval_mode(subject.owner):
        for i, x in enumerate(progress.over(clean.split(1))):
            late = progress.late(i, plan.limit)
            if late:
                break
            progress.stage(f"picture {i + 1} of {len(clean)}")
            x = x.to(subject.device)
            y = x + settings.sigma * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            basis = _basis(f, y, plan, generator)
            found.append(_figures(f, x, y, basis, settings.sigma))
            if len(shown) < SHOWN:
                shown.append(_views(f, x, y, basis))
    if not found:
        raise Interrupted("stopped before anything was measured: the first picture was not finished")
    findings = _findings(subject, settings, plan, found, shown)
    if late:
        findings.notes.append("it went slower than expected: fewer pictures were taken than planned, to keep to the time")
    return findings


# The denoiser and its pictures


def _denoiser(subject: Subject, settings: Settings) -> Callable[[Tensor], Tensor]:
    owner = subject.owner
    if isinstance(owner, Method):
        if not isinstance(owner, Denoiser):
            raise BadSetting(
                f"{subject.name} is a {type(owner).__name__}, which has no denoiser: give a run of one, such as harmonic-bases, "
                "ddpm or cbsn, or a module whose outputs are pictures like its inputs"
            )
        return partial(owner.denoise, sigma=settings.sigma)
    module: Callable[[Tensor], Tensor] = subject.module
    return module


def _clean(subject: Subject, settings: Settings) -> tuple[Tensor, list[str]]:
    """Pictures `[B, C, H, W]` of the model's size, and what was done to them."""
    _denoiser(subject, settings)  # refused before anything is read
    owner = subject.owner
    x = subject.pictures().x if subject.pictures is not None else torch.cat([x for x, _ in subject.batches])
    if x.ndim != 4 or not x.is_floating_point():
        raise BadData(f"harmonic takes pictures [C, H, W] of numbers, and this data has {list(x.shape[1:])}, {x.dtype}")
    side = settings.image_size or getattr(getattr(owner, "config", None), "image_size", None)
    if side is None and max(x.shape[-2:]) > SIDE:
        side = SIDE
    if side is None or x.shape[-2:] == (side, side):
        return x, []
    note = f"pictures are resized and cut to {side} x {side} pixels: --set image_size=N makes it another size"
    return crop_to((side, side))(x), [note]


def _basis(f: Callable[[Tensor], Tensor], y: Tensor, plan: Plan, generator: torch.Generator) -> DenoiserBasis:
    if plan.chosen["Jacobian"] == "written out":
        return denoiser_basis(f, y)
    return denoiser_basis(
        f, y, plan.chosen["eigenvectors"], method="lanczos", block=BLOCK, probes=PROBES, tol=1e-4,
        max_iter=plan.chosen["products"], generator=generator,
    )  # fmt: skip


@torch.no_grad()
def _figures(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, basis: DenoiserBasis, sigma: float) -> dict[str, Any]:
    """The numbers of one picture."""
    clean = f(y)
    jy = (InputJacobianOperator(f, y) @ y.flatten()).view_as(y)
    trace, n = float(basis.trace), y.numel()
    if not math.isfinite(trace):
        raise Diverged("the Jacobian is not finite: check the weights and the data")
    kept = basis.coefficients(x)[0].square().cumsum(0) / x.square().sum()
    residual = (y - clean).square().mean()
    return {
        "values": basis.values.tolist(),
        "residuals": basis.residuals.tolist(),
        "energy": kept.tolist(),
        "effective_rank": trace,
        "effective_share": trace / n,
        "asymmetry": float(basis.asymmetry),
        "symmetric_share": float(basis.symmetric_share),
        "off_linear": float((jy - clean).norm() / clean.norm()),
        "error": float((clean - x).square().mean()),
        "stein_error": float(residual) + sigma**2 * (2 * trace / n - 1),
    }


@torch.no_grad()
def _views(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, basis: DenoiserBasis) -> Mapping[str, Tensor]:
    """The picture three times, then its patterns around mid grey."""
    views = {"clean": x[0], "noisy": y[0], "denoised": f(y)[0]}
    for i, (value, pattern) in enumerate(zip(basis.values[:PATTERNS].tolist(), basis.vectors, strict=False)):
        views[f"{i + 1}: λ = {value:.3f}"] = 0.5 + pattern / (2 * pattern.abs().max())
    return {name: view.clamp(0, 1).float().cpu() for name, view in views.items()}


# Figures


def _findings(
    subject: Subject, settings: Settings, plan: Plan, found: Sequence[dict[str, Any]], shown: Sequence[Mapping[str, Tensor]]
) -> Findings:
    names = ("effective_rank", "effective_share", "asymmetry", "symmetric_share", "off_linear", "error", "stein_error")
    means = {name: math.fsum(one[name] for one in found) / len(found) for name in names}
    headline: dict[str, Any] = {
        "effective rank": means["effective_rank"],
        "of": plan.chosen["numbers"],
        "symmetric part of the Jacobian": f"{means['symmetric_share']:.1%}",
        "J y off f(y)": f"{means['off_linear']:.2%}",
        "noise left, standard deviation": math.sqrt(means["error"]),
    }
    sections = _pages(shown) if shown and shown[0]["clean"].shape[0] in (1, 3) else []
    sections += [_decay(found), _table(found)]
    notes = [*subject.eval_note, f"noise of standard deviation {settings.sigma:g} was added, drawn by the seed"]
    if plan.chosen["Jacobian"] != "written out":
        notes.append(f"trace and asymmetry are estimates from {PROBES} random signs a picture")
        worst = max(max(one["residuals"]) / max(1e-12, abs(one["values"][0])) for one in found)
        if worst > 1e-2:
            notes.append(f"the last eigenvalues are known to {worst:.1g} of the largest only: more minutes, or fewer vectors")
    words = _words(means, plan.chosen["numbers"], settings.sigma)
    return Findings({"pictures": list(found), **means}, headline, words, sections, notes)


def _pages(shown: Sequence[Mapping[str, Tensor]]) -> list[Section]:
    text = (
        "The picture, with noise, and denoised; then the patterns that are shrunk least, in the order of their eigenvalues, "
        "around mid grey. λ = 1: all of the pattern is kept, 0: nothing."
    )
    sections = []
    for i, views in enumerate(shown):
        first = {name: views[name] for name in ("clean", "noisy", "denoised")}
        patterns = {name: view for name, view in views.items() if name not in first}
        sections.append(Section(f"Picture {i + 1}", text if i == 0 else None, [Pictures(first), Pictures(patterns)]))
    return sections


def _decay(found: Sequence[Mapping[str, Any]]) -> Section:
    def lines(of: str) -> dict[str, Any]:
        return {f"picture {i + 1}": (range(1, len(one[of]) + 1), one[of]) for i, one in enumerate(found[:6])}

    text = (
        "How fast the eigenvalues fall, and how much of the clean picture's power lies in the first of the patterns: a good "
        "basis holds it in few, and keeps those."
    )
    plots = [
        Plot("curves", lines("values"), {"xlabel": "rank", "ylabel": "eigenvalue", "height": 280}),
        Plot("curves", lines("energy"), {"xlabel": "patterns", "ylabel": "share of the clean picture", "height": 280}),
    ]
    return Section("Eigenvalues", text, [plots])


def _table(found: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        {
            "picture": str(i + 1), "effective rank": one["effective_rank"], "largest λ": one["values"][0],
            "asymmetry": one["asymmetry"], "symmetric part": one["symmetric_share"], "J y off f(y)": one["off_linear"],
            "squared error": one["error"], "Stein's estimate": one["stein_error"],
        }
        for i, one in enumerate(found)
    ]  # fmt: skip
    text = (
        "Effective rank: the trace of J. Asymmetry: ‖J − Jᵀ‖ / ‖J‖. J y off f(y): 0 for a network without biases. Squared error: "
        "of a pixel, against the clean picture, and as Stein's formula has it from J and the noisy picture alone."
    )
    return Section("Figures", text, [Table(rows)])


def _words(means: Mapping[str, float], n: int, sigma: float) -> str:
    """Whether it is a shrinkage in a basis, how few patterns it keeps, and whether that is all."""
    rank, share, left = means["effective_rank"], means["symmetric_share"], math.sqrt(means["error"])
    words = [f"Of the {n:,} dimensions of a picture about {rank:,.4g} are kept ({means['effective_share']:.1%})."]
    if left >= sigma:
        words.append(
            f"It is no denoiser here: it leaves {left:.3g} where noise of {sigma:g} was added, as is found where it was trained "
            "little, or on other pictures."
        )
    if share >= SYMMETRIC:
        words.append(f"It shrinks in a basis of its own at every picture: {share:.0%} of its Jacobian is symmetric.")
    else:
        words.append(
            f"It is no mere shrinkage: only {share:.0%} of its Jacobian is symmetric, as is found where training pictures are "
            "remembered, or where it was trained little."
        )
    if means["off_linear"] <= EXACT:
        words.append("The Jacobian says all that it does to the picture: J y = f(y).")
    else:
        words.append(f"J y is {means['off_linear']:.0%} off f(y): constants add what no pattern shows.")
    return " ".join(words)


KIND = Kind(Settings, plan, measure, loss="reconstruction")
