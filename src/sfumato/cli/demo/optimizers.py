"""Act 3: AdamW and AdaHessian on a badly scaled problem and on digits, with the Hessian spectrum each ends in."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from sfumato.claim import paired_interval
from sfumato.cli.console import hint
from sfumato.data import Batch, digits
from sfumato.engine import Options, Trainer, build
from sfumato.engine.stream import as_data
from sfumato.papers.optimization.adahessian import BEST_LR, scaling_curves
from sfumato.papers.optimization.classifier import Classifier
from sfumato.probes import HessianOperator, spectral_density

STEPS = 150
SEEDS = 5
ARMS = {name: {"optimizer": name.lower(), "lr": BEST_LR[name.lower()]} for name in ("AdamW", "AdaHessian")}


def act(page: Any, pace: float, seed: int) -> None:
    """A quadratic, then digits over a few seeds, then the spectra."""
    from sfumato.report import curves, dots, intervals, spectrum

    page.section(
        "AdamW and AdaHessian, and where they end",
        intro=(
            "AdaHessian (Yao et al. 2021) divides by curvature where Adam divides by the size of gradients. On a quadratic whose "
            "curvatures span six orders of magnitude that is decisive. On digits it has to show."
        ),
    )
    hint("a badly scaled quadratic")
    page.figure(
        curves(
            {n: (range(len(c)), c) for n, c in scaling_curves().items()}, xlabel="step", ylabel="loss / first loss", logy=True
        ),
        caption="Half the sum of a·θ², 13 curvatures a from 1 to a million, in unlike units; AdamW at the best of three rates.",
    )
    steps, train, test = max(10, round(STEPS * pace)), *digits(1000)
    accuracy: dict[str, list[float]] = {name: [] for name in ARMS}
    losses: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    ends: dict[str, Any] = {}
    for s in range(seed, seed + SEEDS):
        hint(f"digits, seed {s - seed + 1} of {SEEDS}")
        for name, settings in ARMS.items():
            method, loss = fit(settings, train, steps, s)
            losses[name].append(loss)
            accuracy[name].append(method.evaluate([test])["accuracy"])
            if s == seed:
                ends[name] = hessian_spectrum(method, train)
    at = list(range(1, steps + 1))
    page.figure(
        curves(
            {name: (at, values) for name, values in losses.items()}, xlabel="step", ylabel="training loss", logy=True, smooth=7
        ),
        caption=f"A small convolutional network on 1000 digits; {SEEDS} seeds, the band from the smallest to the largest.",
    )
    gaps = [a - b for a, b in zip(accuracy["AdaHessian"], accuracy["AdamW"])]
    mean, low, high = paired_interval(gaps)
    difference = {"label": "AdaHessian over AdamW", "mean": mean, "low": low, "high": high, "dots": gaps}
    page.figure(
        [dots(accuracy, xlabel="test accuracy"), intervals([difference], xlabel="difference")],
        caption=f"Test accuracy of each seed, and the paired difference with its 95 % interval: {verdict(low, high)}",
    )
    page.figure(
        spectrum({name: density for name, (density, _) in ends.items()}, xlabel="eigenvalue of the Hessian", logx=False),
        caption="The Hessian's spectrum where the first seed ended (Lanczos quadrature, 60 steps): " + "; ".join(
            f"{name} at largest eigenvalue {top:.3g}" for name, (_, top) in ends.items()
        ) + ". A smaller largest eigenvalue is a flatter place.",
    )  # fmt: skip


def fit(settings: dict[str, Any], train: Batch, steps: int, seed: int) -> tuple[Any, list[float]]:
    """Train the digits network; returns it and its loss at every step."""
    data = as_data(train)
    chosen = {"model": "conv", "image_size": 8, "steps": steps, "batch_size": 64, "classes": 10, **settings}
    method = build(Classifier, data.facts, preset="small", settings=chosen, seed=seed, device="cpu")
    trainer = Trainer(method, data, Options(seed=seed, device="cpu", workers=0))
    losses = []
    for _, batches in zip(range(steps), trainer.batches(0)):
        losses.append(float(trainer.step(batches, check=True).loss))
    return method.eval(), losses


def hessian_spectrum(method: Any, train: Batch) -> tuple[Any, float]:
    """The spectral density of the training loss's Hessian, and its largest eigenvalue."""
    assert train.label is not None
    operator = HessianOperator(method.network, F.cross_entropy, (method.prepare(train.x), train.label))
    density = spectral_density(operator, steps=60, generator=torch.Generator().manual_seed(0))
    return density, float(density.nodes.max())


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says, in words."""
    if low > 0:
        return "AdaHessian is ahead."
    return "AdamW is ahead." if high < 0 else "neither is ahead: the interval holds zero."
