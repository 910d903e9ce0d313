"""What a layer tells: the estimators of mutual information, against loops over pairs of samples and the usual array libraries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from sfumato.probes import binned_information_bits, kde_information

VARIANCE = 0.1


def layer(count: int, units: int) -> tuple[Tensor, Tensor]:
    """Activity in [-1, 1] `[count, units]` that follows one of ten classes, and the classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (count,), generator=generator)
    centres = torch.randn(10, units, generator=generator, dtype=torch.float64)
    return torch.tanh(centres[y] + 0.5 * torch.randn(count, units, generator=generator, dtype=torch.float64)), y


def edges(bins: int = 8) -> Tensor:
    return torch.linspace(-1, 1, bins + 1, dtype=torch.float64)


# Gaussian noise


def kde(count: int, units: int) -> Run:
    t, y = layer(count, units)
    return lambda: list(kde_information(t, y, variance=VARIANCE))


def kde_loop(count: int, units: int) -> Run:
    """As the formula reads: for every sample, for every other one."""
    t, y = layer(count, units)
    rows, labels = t.tolist(), y.tolist()

    def run() -> list[float]:
        about_input = about_label = 0.0
        for a, label in zip(rows, labels, strict=True):
            to_all = to_same = 0.0
            same = 0
            for b, other in zip(rows, labels, strict=True):
                close = math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * VARIANCE))
                to_all += close
                if label == other:
                    to_same += close
                    same += 1
            about_input -= math.log(to_all / count) / count
            about_label += (math.log(to_same / same) - math.log(to_all / count)) / count
        return [about_input, about_label]

    return run


def kde_scipy(count: int, units: int) -> Run:
    """All pairs at once, and each class again by itself."""
    from scipy.spatial.distance import cdist
    from scipy.special import logsumexp

    t, y = (v.numpy() for v in layer(count, units))

    def mean_log(x: Any) -> float:
        return float((logsumexp(-cdist(x, x, "sqeuclidean") / (2 * VARIANCE), axis=1) - math.log(len(x))).mean())

    def run() -> list[float]:
        whole = mean_log(t)
        within = sum(float((y == k).mean()) * mean_log(t[y == k]) for k in set(y.tolist()))
        return [-whole, within - whole]

    return run


@race(
    "Mutual information with Gaussian noise",
    "Pairs of samples are compared in blocks, in one compiled pass for both informations, where a loop in Python pays for every "
    "pair. scipy compares them in one pass too, but holds all pairs at once, and each class is compared again.",
)
def information_kde(quick: bool) -> Iterator[Heat]:
    """I(X;T) and I(Y;T) of a layer."""
    for count, units, slow in ((60, 4, True),) if quick else ((400, 10, True), (4096, 10, False)):
        lanes = {"sfumato": kde, **({"loop": kde_loop} if slow else {}), "scipy": kde_scipy}
        runs = {name: partial(lane, count, units) for name, lane in lanes.items()}
        yield Heat(f"{count:,} samples, {units} units", runs, tolerance=1e-6)


# Bins


def bins(count: int, units: int) -> Run:
    (t, y), at = layer(count, units), edges()
    return lambda: list(binned_information_bits(t, y, at))


def bins_loop(count: int, units: int) -> Run:
    """How many samples share each sample's bins, and how many of its class do."""
    (t, y), at = layer(count, units), edges()

    def run() -> list[float]:
        codes, labels = torch.bucketize(t, at, right=True).tolist(), y.tolist()
        h = both = classes = 0.0
        for a, label in zip(codes, labels, strict=True):
            alike = together = of_class = 0
            for b, other in zip(codes, labels, strict=True):
                alike += a == b
                of_class += label == other
                together += a == b and label == other
            h -= math.log2(alike / count) / count
            classes -= math.log2(of_class / count) / count
            both -= math.log2(together / count) / count
        return [h, h + classes - both]

    return run


def bins_numpy(count: int, units: int) -> Run:
    """Rows told apart by sorting them."""
    import numpy as np

    t, y, at = (v.numpy() for v in (*layer(count, units), edges()))

    def entropy(table: Any) -> float:
        share = np.unique(table, axis=0, return_counts=True)[1] / len(table)
        return float(-(share * np.log2(share)).sum())

    def run() -> list[float]:
        codes, label = np.digitize(t, at), y[:, None]
        h = entropy(codes)
        return [h, h + entropy(label) - entropy(np.concatenate([codes, label], 1))]

    return run


@race(
    "Mutual information with bins",
    "The bins of a row are digits of one whole number, so that telling rows apart is sorting numbers; numpy sorts rows as they "
    "are, and a loop over pairs compares each with all others.",
)
def information_bins(quick: bool) -> Iterator[Heat]:
    """I(X;T) and I(Y;T) of a layer with given bins."""
    for count, units, slow in ((60, 4, True),) if quick else ((1024, 10, True), (4096, 10, False)):
        lanes = {"sfumato": bins, **({"loop": bins_loop} if slow else {}), "numpy": bins_numpy}
        runs = {name: partial(lane, count, units) for name, lane in lanes.items()}
        yield Heat(f"{count:,} samples, {units} units", runs, tolerance=1e-6)
