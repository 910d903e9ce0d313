"""How far a classifier has collapsed onto its class means, and where deep linear networks must end.

    NC1 = tr(Σ_within Σ_between⁺) / K,     NC2 = ‖ WWᵀ/‖WWᵀ‖ − T/‖T‖ ‖,     NC3 = ‖ WH̄ᵀ/‖WH̄ᵀ‖ − T/‖T‖ ‖

W are the rows of the last layer, H̄ the class means of what it reads. T is the identity (an orthogonal frame), I − 11ᵀ/K (a
simplex) or, for unequal classes, a diagonal of lengths that are known in closed form (`gof_spectrum`). 0 is full collapse.

Sources: Papyan, Han, Donoho, "Prevalence of neural collapse", PNAS 2020; Dang et al., "Neural Collapse in Deep Linear Networks",
ICML 2023, theorems 3.1, 3.2 and 4.1.

>>> import torch
>>> from sfumato.probes import gof_spectrum, nc1, nc2
>>> features, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
>>> nc1(features, labels).item(), nc2(torch.eye(3), target="of").item()
(0.0, 0.0)
>>> gof_spectrum([20, 10, 2], depth=1, weight_decay=0.05, feature_decay=0.05).layer.round(decimals=2)  # the third is gone
tensor([1.6900, 1.2500, 0.0000], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting

Target = Literal["etf", "of"] | Tensor
"""What a Gram matrix is compared with: a simplex, an orthogonal frame, or a diagonal of lengths `[K]`."""


class ClassStats(NamedTuple):
    """Samples a class `[K]`, class means `[K, D]`, and the mean of all samples `[D]` (not of the class means)."""

    counts: Tensor
    means: Tensor
    mean: Tensor


class GOF(NamedTuple):
    """Where a deep linear network with unequal classes ends, `[K]` each, float64.

    `layer`: singular value of every layer in the direction of a class; `classifier`: squared length of its row in the product
    of all layers; `features`: squared length of its mean; `product`: its row times its mean.
    """

    layer: Tensor
    classifier: Tensor
    features: Tensor
    product: Tensor


def class_stats(features: Tensor, labels: Tensor, *, classes: int | None = None) -> ClassStats:
    """Counts and means.

    Args:
        features: `[N, D]`.
        labels: `[N]`, 0 to K - 1.
        classes: K; None: the largest label and one.

    Returns:
        Statistics in the type of `features`; the mean of a class without samples is 0.

    Raises:
        BadData: shapes that do not belong together.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise BadData(f"features are [N, D] and labels [N]; these are {list(features.shape)} and {list(labels.shape)}")
    counts = labels.bincount(minlength=classes or 0)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    return ClassStats(counts, sums / counts.clamp(min=1)[:, None], features.mean(0))


def pooled_stats(parts: Iterable[ClassStats]) -> ClassStats:
    """The statistics of data from those of its parts, which all count the same classes.

    Args:
        parts: of disjoint samples; read one after the other, so that a generator keeps one batch in memory.

    Returns:
        Statistics of all samples.

    Raises:
        BadData: no part.
    """
    counts, sums, total = None, torch.zeros(()), torch.zeros(())
    for part in parts:
        if counts is None:
            counts, sums, total = torch.zeros_like(part.counts), torch.zeros_like(part.means), torch.zeros_like(part.mean)
        counts = counts + part.counts
        sums = sums + part.counts[:, None] * part.means
        total = total + part.counts.sum() * part.mean
    if counts is None:
        raise BadData("there is no part: give the statistics of at least one batch")
    return ClassStats(counts, sums / counts.clamp(min=1)[:, None], total / counts.sum())


def nc1(features: Tensor, labels: Tensor, *, stats: ClassStats | None = None) -> Tensor:
    """Spread within classes, measured where class means differ: tr(Σ_W Σ_B⁺) / K.

    No D × D matrix is made: the means span at most K - 1 directions.

    Args:
        features: `[N, D]`; a part of the data when `stats` are given (the results of parts average by their sizes).
        labels: `[N]`.
        stats: of the whole data; None: of these features.

    Returns:
        Scalar, at least 0; infinite when all class means are equal.
    """
    stats = stats or class_stats(features, labels)
    axes = between_whitening(stats)
    if not axes.numel():
        return features.new_tensor(torch.inf)
    return ((features - stats.means[labels]) @ axes).square().sum(1).mean()


def between_whitening(stats: ClassStats) -> Tensor:
    """The directions in which class means differ, each divided by how much: what `nc1` measures the spread in.

    Args:
        stats: of the whole data.

    Returns:
        `[D, R]`, R at most K - 1; 0 when all class means are equal.
    """
    there = stats.means[stats.counts > 0]
    _, s, axes = torch.linalg.svd(there - stats.mean, full_matrices=False)
    kept = s > s[0] * len(s) * torch.finfo(s.dtype).eps
    kept[len(there) - 1 :] = False  # centred means of K classes span K - 1 directions: the rest is rounding
    return axes[kept].T / s[kept]


def nc2(rows: Tensor, *, target: Target = "etf") -> Tensor:
    """Distance of a frame from its target, both scaled to length 1.

    Args:
        rows: one vector a class, `[K, D]`: rows of a classifier, or class means.
        target: "etf", "of", or squared lengths `[K]` (`GOF.classifier` for rows, `GOF.features` for means).

    Returns:
        Scalar, 0 to 2.
    """
    return _distance(rows @ rows.T, target)


def nc3(weight: Tensor, means: Tensor, *, target: Target = "etf") -> Tensor:
    """Distance of the classifier's answers to the class means from their target, both scaled to length 1.

    Args:
        weight: `[K, D]`.
        means: `[K, D]`; subtract the mean of all samples for "etf".
        target: "etf", "of", or a diagonal `[K]` (`GOF.product`).

    Returns:
        Scalar, 0 to 2.
    """
    return _distance(weight @ means.T, target)


def self_duality(weight: Tensor, means: Tensor) -> Tensor:
    """Distance of classifier and class means `[K, D]`, both scaled to length 1; 0 when they are one up to a factor."""
    return (weight / weight.norm() - means / means.norm()).norm()


def gof_spectrum(counts: Sequence[int] | Tensor, *, depth: int, weight_decay: float, feature_decay: float) -> GOF:
    """The lengths of the general orthogonal frame: all global minimisers of a deep linear network without bias.

    The network is M layers on free features, trained on squared errors, ‖W_M⋯W_1 H − Y‖²/(2N), with ½λ_W‖W_j‖² for every layer
    and ½λ_H‖H‖² for the features; it is at least as wide as there are classes.

    Args:
        counts: samples of each class, `[K]`.
        depth: M, at least 1.
        weight_decay: λ_W, the same for every layer, positive.
        feature_decay: λ_H, positive.

    Returns:
        Lengths by class; 0 for classes that vanish (`minority_threshold`).

    Raises:
        BadSetting: values out of range.

    Reference: Dang et al. 2023, theorem 4.1; that a class of a deep network vanishes before its stationary point does is ours.
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    total = n.sum()
    b = _decay_ratio(n, total, depth, weight_decay, feature_decay)
    low = b.new_full(b.shape, ((depth - 1) / (depth + 1)) ** (1 / depth))  # the steepest point; the larger root is beyond
    high = torch.maximum((depth / b) ** (1 / (depth + 1)), low)
    for _ in range(200):
        middle = (low + high) / 2
        below = depth * middle ** (depth - 1) / (middle**depth + 1) ** 2 > b
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = torch.where(b <= _largest_ratio(depth), (low + high) / 2, 0.0)
    x = torch.where((depth == 1) & (b >= 1), 0.0, x)
    squared = total * feature_decay * x**depth
    rest = squared + total * feature_decay
    return GOF(squared ** (1 / (2 * depth)), squared, squared / rest**2, squared / rest)


def minority_threshold(total: int, *, depth: int, weight_decay: float, feature_decay: float) -> float:
    """The number of samples up to which a class vanishes: its weights and features are 0 at every global minimum.

    Args:
        total: samples of all classes.
        depth, weight_decay, feature_decay: as for `gof_spectrum`.

    Returns:
        A number of samples, not rounded.
    """
    one = torch.ones((), dtype=torch.float64)
    return float(_decay_ratio(one, one * total, depth, weight_decay, feature_decay)) / _largest_ratio(depth)


def _decay_ratio(n: Tensor, total: Tensor, depth: int, weight_decay: float, feature_decay: float) -> Tensor:
    """b_k of the theorem."""
    if depth < 1 or weight_decay <= 0 or feature_decay <= 0 or not (n > 0).all():
        raise BadSetting(
            f"depth={depth} is at least 1, weight_decay={weight_decay:g}, feature_decay={feature_decay:g} and all counts positive"
        )
    return depth * total * (total * weight_decay**depth * feature_decay) ** (1 / depth) / n


def _largest_ratio(depth: int) -> float:
    """Up to this b_k it is better to keep a class."""
    return float((depth - 1) ** ((depth - 1) / depth) / depth)


def _distance(gram: Tensor, target: Target) -> Tensor:
    k = len(gram)
    if isinstance(target, Tensor):
        wanted = torch.diag(target.to(gram))
    elif target in ("etf", "of"):
        wanted = torch.eye(k, dtype=gram.dtype, device=gram.device) - (1 / k if target == "etf" else 0.0)
    else:
        raise BadSetting(f"target={target!r} must be 'etf', 'of' or a tensor of {k} lengths")
    if wanted.shape != gram.shape:
        raise BadSetting(f"{len(wanted)} lengths are given for {k} classes")
    return (gram / gram.norm() - wanted / wanted.norm()).norm()
