"""How much a layer tells about its input and about the class, with bins that follow the activity.

    I(X;T) = H(T),     I(Y;T) = H(T) − H(T|Y),     T: the bins of all units of a layer, one pattern an input

Bins of equal width on a fixed range show how far activity spreads, not only what it tells. Adaptive bins hold equally many of the
distinct values of the layer at this moment (entropy-based adaptive binning), so a strictly increasing map of the activity
changes nothing. The kernel estimator adds Gaussian noise of variance v to the activity instead of binning it:

    I(X;T) = −mean_i ln mean_j exp(−‖t_i − t_j‖² / 2v)     (upper bound; 8v for the lower bound)

A layer that tells all N inputs apart has log2 N bits, whatever it does: wide layers always do, and only narrow ones are worth
measuring.

Sources: Chelombiev, Houghton, O'Donnell, "Adaptive Estimators Show Information Compression in Deep Neural Networks", ICLR 2019;
kernel bounds: Kolchinsky, Tracey, "Estimating Mixture Entropy with Pairwise Distances", Entropy 2017.

>>> import torch
>>> from sfumato.probes import adaptive_bin_edges, binned_information_bits
>>> activity = torch.tensor([[0.0], [0.0], [1.0], [9.0]])
>>> edges = adaptive_bin_edges(activity, low=0.0)
>>> binned_information_bits(activity, torch.tensor([0, 0, 1, 1]), edges)
Information(input=tensor(1.5000, dtype=torch.float64), label=tensor(1., dtype=torch.float64))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.probes.evaluation import extract_features

_PAIRS = 2**22
"""Distances held at once."""


class Information(NamedTuple):
    """What a layer tells about the input, I(X;T), and about the class, I(Y;T); scalars."""

    input: Tensor
    label: Tensor


def adaptive_bin_edges(activity: Tensor, *, bins: int = 30, low: float | None = None) -> Tensor:
    """Edges of bins with equally many distinct values of a layer, all units pooled.

    Values equal to `low` and the largest value have bins of their own. Values are distinct in the type that is given.

    Args:
        activity: `[N, ...]`, of one layer on all inputs.
        bins: inner bins, n.
        low: lower end of the unit's range: 0 for ReLU, a little less than -1 for tanh and ELU. None: just below the smallest
            value.

    Returns:
        `[n + 2]`, ascending: `low`, the values number ⌊k m / n⌋ of the m distinct ones for k below n, and the largest; `[1]`
        when there are no values besides `low`. Fewer than n distinct values repeat edges, and bins between those stay empty.

    Raises:
        BadSetting: fewer than one bin, or values below `low`.
        BadData: activity that is empty or not finite.
    """
    if bins < 1:
        raise BadSetting(f"bins={bins} must be at least 1")
    if activity.numel() == 0 or not activity.isfinite().all():
        raise BadData(f"activity {list(activity.shape)} is empty or not finite: there is nothing to bin")
    values = activity.detach().unique()
    first = torch.nextafter(values[0], values[0] - 1) if low is None else values.new_tensor(low)
    if values[0] < first:
        raise BadSetting(f"low={low} is above the smallest value, {float(values[0]):g}: give the lower end of the unit's range")
    values = values[values != first]
    if not len(values):
        return first[None]
    inner = values[torch.arange(bins, device=values.device) * len(values) // bins]
    return torch.cat([first[None], inner, values[-1:]])


def pattern_entropy_bits(codes: Tensor) -> Tensor:
    """Entropy of the rows of a table of whole numbers, in bits.

    Args:
        codes: `[N, d]`; each row is one outcome.

    Returns:
        Scalar, float64, between 0 and log2 N.

    Raises:
        BadData: another shape, no rows, or numbers that are not whole.
    """
    if codes.ndim != 2 or not len(codes) or codes.is_floating_point():
        raise BadData(f"codes are whole numbers [N, d], not {codes.dtype} {list(codes.shape)}")
    counts = _row_numbers(codes).bincount().double()
    return math.log2(len(codes)) - torch.special.xlogy(counts, counts).sum() / (math.log(2) * len(codes))


def binned_information_bits(activity: Tensor, labels: Tensor, edges: Tensor) -> Information:
    """What the bins of a layer tell, in bits. Every input counts once, so I(X;T) is the entropy of the patterns.

    Args:
        activity: `[N, ...]`.
        labels: `[N]`, whole numbers.
        edges: of the bins, ascending, such as `adaptive_bin_edges(activity)` or, on a fixed range, `torch.linspace`; a bin
            includes its lower edge, and values beyond the ends have bins of their own.

    Returns:
        Scalars, float64.

    Raises:
        BadData: shapes that do not belong together.
    """
    flat = _flat(activity, labels)
    codes = torch.bucketize(flat, edges.to(flat), right=True)
    pattern = _row_numbers(codes)[:, None]
    h, classes = pattern_entropy_bits(pattern), labels.long()[:, None]
    both = pattern_entropy_bits(torch.cat([pattern, classes], 1))
    return Information(h, (h + pattern_entropy_bits(classes) - both).clamp(min=0))


def kde_information(
    activity: Tensor,
    labels: Tensor,
    *,
    variance: float | Literal["adaptive"] = "adaptive",
    bound: Literal["upper", "lower"] = "upper",
) -> Information:
    """What a layer with a little Gaussian noise tells, in nats (divide by ln 2 for bits).

    Args:
        activity: `[N, ...]`.
        labels: `[N]`, whole numbers.
        variance: of the noise, positive. "adaptive": 0.001 times the largest size of the activity.
        bound: "upper" or "lower" of I(X;T). I(Y;T) is a difference of two such bounds, and itself neither.

    Returns:
        0 to ln N.

    Raises:
        BadSetting: another bound, or a variance that is not positive.
        BadData: shapes that do not belong together.
    """
    flat = _flat(activity, labels)
    flat = flat.float() if flat.dtype in (torch.half, torch.bfloat16) else flat
    if bound not in ("upper", "lower"):
        raise BadSetting(f"bound={bound!r} must be 'upper' or 'lower'")
    v = 1e-3 * flat.abs().max() if variance == "adaptive" else flat.new_tensor(variance)
    if variance == "adaptive" and v == 0:  # a layer that is silent
        return Information(v, v)
    if not v > 0:
        raise BadSetting(f"variance={variance} must be positive")
    scale, n = (2 if bound == "upper" else 8) * v, len(flat)
    about_input, about_label = flat.new_zeros(()), flat.new_zeros(())
    for rows in torch.arange(n, device=flat.device).split(max(1, _PAIRS // n)):
        close = -torch.cdist(flat[rows], flat, compute_mode="donot_use_mm_for_euclid_dist").square() / scale
        same = labels[rows, None] == labels
        to_all = close.logsumexp(1) - math.log(n)
        to_same = close.masked_fill(~same, -math.inf).logsumexp(1) - same.sum(1).to(flat).log()
        about_input -= to_all.sum() / n
        about_label += (to_same - to_all).sum() / n
    return Information(about_input, about_label)


class InformationPlane:
    """The course of I(X;T) and I(Y;T) of layers during training.

    Call `record` now and then; edges are those of the moment, one set a layer.

    Args:
        model: any module; its mode is left as it was.
        layers: names of submodules, as in `named_modules()`; their outputs are measured.
        data: a labelled `Batch`, or inputs `[N, ...]` and labels `[N]`; all inputs, each of them once.
        bins: as of `adaptive_bin_edges`.
        low: as of `adaptive_bin_edges`; one for all layers, or by name (others: None).
        softmax: layers whose outputs are turned into probabilities first.
        estimator: of activity and labels, instead of adaptive bins; such as `kde_information`, then in nats.

    Attributes:
        epochs: where records were made.
        points: by layer, an `Information` for each of `epochs`.

    Raises:
        BadData: data without labels.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], data: Any, *, bins: int = 30,
        low: float | Mapping[str, float | None] | None = None, softmax: Collection[str] = (),
        estimator: Callable[[Tensor, Tensor], Information] | None = None,
    ) -> None:  # fmt: skip
        inputs, labels = data if isinstance(data, tuple) else (data.x, data.label)
        if labels is None:
            raise BadData("an information plane needs the classes of its inputs: give a labelled batch, or inputs and labels")
        self.model, self.layers, self.inputs, self.labels = model, list(layers), inputs, labels.cpu()
        self.bins, self.low, self.softmax, self.estimator = bins, low, softmax, estimator
        self.epochs: list[float] = []
        self.points: dict[str, list[Information]] = {name: [] for name in self.layers}

    def record(self, epoch: float) -> None:
        """Measure all layers now.

        Raises:
            BadSetting: a layer that the model has not.
        """
        for name, activity in extract_features(self.model, self.inputs, layers=self.layers).items():
            activity = activity.softmax(-1) if name in self.softmax else activity
            self.points[name].append(self._measure(name, activity))
        self.epochs.append(epoch)

    def rows(self) -> list[dict[str, Any]]:
        """One row for every layer and record, with `epoch`, `layer`, `input` and `label`: a table for pandas, or to plot."""
        return [
            {"epoch": epoch, "layer": name, "input": float(point.input), "label": float(point.label)}
            for name, points in self.points.items()
            for epoch, point in zip(self.epochs, points, strict=True)
        ]

    def compression_score(self) -> dict[str, float]:
        """By layer, the share of its largest I(X;T) that is lost by the last record, 0 to 1; 0 for a layer that never told any.

        Raises:
            BadData: nothing is recorded.
        """
        if not self.epochs:
            raise BadData("nothing is recorded: call record(epoch) during training")
        scores = {}
        for name, points in self.points.items():
            course = torch.stack([point.input for point in points])
            scores[name] = float(1 - course[-1] / course.max()) if course.max() > 0 else 0.0
        return scores

    def _measure(self, name: str, activity: Tensor) -> Information:
        if self.estimator is not None:
            return self.estimator(activity, self.labels)
        low = self.low.get(name) if isinstance(self.low, Mapping) else self.low
        edges = adaptive_bin_edges(activity, bins=self.bins, low=low)
        return binned_information_bits(activity, self.labels, edges)


def _flat(activity: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != activity.shape[:1] or not len(labels):
        raise BadData(f"activity is [N, ...] and labels [N]; these are {list(activity.shape)} and {list(labels.shape)}")
    return activity.detach().reshape(len(activity), -1)


def _row_numbers(codes: Tensor) -> Tensor:
    """Equal rows get equal numbers from 0, `[N]`: columns are digits of one number, renumbered before it would overflow."""
    numbers, base = codes.new_zeros(len(codes), dtype=torch.long), 1
    if codes.shape[1]:
        starts, ends = codes.amin(0).tolist(), codes.amax(0).tolist()
        for column, start, end in zip(codes.T, starts, ends, strict=True):
            size = end - start + 1
            if base * size < 2**62:
                digit = column.long() - start
            else:
                (numbers, base), (digit, size) = _renumbered(numbers), _renumbered(column)
            numbers, base = numbers * size + digit, base * size
    return _renumbered(numbers)[0]


def _renumbered(values: Tensor) -> tuple[Tensor, int]:
    distinct, numbers = values.unique(return_inverse=True)
    return numbers, len(distinct)
