"""How far a classifier's boundary leans from the line that joins the classes, and how much of the lean buys accuracy.

    δ = angle(w, j − i),     mean distance to the boundary = ½ ‖j − i‖ cos δ,     adversarial strength s = 1 / cos δ

i and j are the centroids of the two classes, w the normal of the boundary. s = 1: no classifier of these centroids is harder to
fool; s = 10: its adversarial examples are ten times nearer than need be. Exact for linear classifiers, local for networks
(`local_geometry`). Of two labels the smaller one is class I (negative scores), the larger one class J.

Sources: Tanay, Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016; Tanay, Griffin, "A New
Angle on L2 Regularization", 2018.

>>> import torch
>>> from sfumato.probes import adversarial_strength, deviation_angle, tilt
>>> x, y = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])  # the second number tells nothing
>>> weight, bias = tilt(torch.tensor([1.0, 0.0]), 0.0, torch.tensor([0.0, 1.0]), 1.0)
>>> round(deviation_angle(weight, x, y).item(), 4), round(adversarial_strength(weight, x, y).item(), 4)
(1.0, 1.8508)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting

Pair = tuple[int, int] | None


class TiltingPlane(NamedTuple):
    """The plane in which a boundary leans: `zhat` along the centroids, `nhat` across; `coords` `[N, 2]` of the samples in it."""

    zhat: Tensor
    nhat: Tensor
    coords: Tensor


class FreeTilt(NamedTuple):
    """What of a tilt buys accuracy.

    `type1`: the angle that is left when all that costs nothing is dropped, `type2`: the angle that went (both radians);
    `dropped`: how many directions went; `angles`, `accuracy` `[R]`: after dropping 0, 1, ... of them, in order of their
    variance; `weight`, `bias`: the classifier without them.
    """

    type1: Tensor
    type2: Tensor
    dropped: int
    angles: Tensor
    accuracy: Tensor
    weight: Tensor
    bias: Tensor


class LocalGeometry(NamedTuple):
    """A network around each sample, all `[B]`: margin, length of its gradient, their quotient (the distance to the boundary
    to first order), and the deviation angle in radians."""

    margin: Tensor
    grad_norm: Tensor
    distance: Tensor
    angle: Tensor


def deviation_angle(weight: Tensor, x: Tensor, y: Tensor, *, pair: Pair = None) -> Tensor:
    """The angle between a boundary's normal and the line of the centroids.

    Args:
        weight: `[D]`, or `[K, D]` with `pair`.
        x: samples `[N, ...]`, D numbers each.
        y: labels `[N]`: two kinds, or any with `pair`.
        pair: the two classes (I, J) of a classifier of many.

    Returns:
        Scalar, radians in [0, π]; above π/2 the centroids themselves are ranked the wrong way round.

    Raises:
        BadData: not two classes, or a class without samples.
        BadSetting: `weight` does not fit.
    """
    w, i, j = _setting(weight, x, y, pair)
    return _angle(w, j - i)


def adversarial_distance(weight: Tensor, bias: Tensor | float, x: Tensor, y: Tensor, *, pair: Pair = None) -> Tensor:
    """How far samples lie on the right side of the boundary on average, each class counting one half.

    Args:
        weight, x, y, pair: as for `deviation_angle`.
        bias: scalar, or `[K]` with `pair`; it moves the classes against each other and leaves the result as it is.

    Returns:
        Scalar, in units of x; equal to ½ ‖j − i‖ cos δ.
    """
    w, i, j = _setting(weight, x, y, pair)
    b = torch.as_tensor(bias, dtype=w.dtype, device=w.device)
    b = b[pair[1]] - b[pair[0]] if pair is not None else b
    return ((w @ j + b) - (w @ i + b)) / (2 * w.norm())


def adversarial_strength(weight: Tensor, x: Tensor, y: Tensor, *, pair: Pair = None) -> Tensor:
    """How much nearer adversarial examples are than those of the nearest-centroid classifier: 1 / cos δ.

    Args:
        weight, x, y, pair: as for `deviation_angle`.

    Returns:
        Scalar, at least 1; infinite from δ = π/2 on.
    """
    cosine = deviation_angle(weight, x, y, pair=pair).cos()
    return torch.where(cosine > torch.finfo(cosine.dtype).eps, 1 / cosine, torch.inf)


def tilt(
    weight: Tensor, bias: Tensor | float, direction: Tensor, angle: float | Tensor, *, through: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lean a boundary over.

    Args:
        weight: normal `[D]`.
        bias: scalar; used when `through` is None.
        direction: `[D]`, where to; what it has along `weight` is taken out.
        angle: radians.
        through: a point `[D]` that the new boundary holds; None: the point of the old one that is nearest to the origin.

    Returns:
        A normal of length 1, `[D]`, and a scalar bias.

    Raises:
        BadSetting: `direction` is parallel to `weight`.
    """
    length = weight.norm()
    c = weight / length
    v = direction - (direction @ c) * c
    if v.norm() <= 1e-6 * direction.norm():
        raise BadSetting("direction is parallel to weight: a boundary leans across its normal")
    angle = torch.as_tensor(angle, dtype=c.dtype, device=c.device)
    leaned = angle.cos() * c + angle.sin() * v / v.norm()
    point = -bias / length * c if through is None else through
    return leaned, -leaned @ point


def tilting_plane(weight: Tensor, x: Tensor, y: Tensor, *, pair: Pair = None) -> TiltingPlane:
    """The plane of the centroid line and the normal, to draw a boundary as the line that it is there.

    Args:
        weight, x, y, pair: as for `deviation_angle`.

    Returns:
        Two unit vectors `[D]` at right angles, and the samples' coordinates `[N, 2]`. `nhat` is 0 for a boundary without tilt.
    """
    w, i, j = _setting(weight, x, y, pair)
    z = (j - i) / (j - i).norm()
    n = w - (w @ z) * z
    length = n.norm()
    n = torch.where(length > 10 * torch.finfo(n.dtype).eps * w.norm(), n / length, 0.0)
    return TiltingPlane(z, n, x.flatten(1) @ torch.stack([z, n], 1))


def free_tilt(weight: Tensor, bias: Tensor | float, x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> FreeTilt:
    """Split a tilt into what buys accuracy (type 1) and what does not (type 2).

    The normal is taken apart into its share along the centroids and shares along the principal directions of the within-class
    scatter; these are dropped from the lowest variance up, each score replaced by its value at the centroids' midpoint. As many
    go as leave balanced held-out accuracy within one standard error of the best that is reached. The rule is our choice.

    Args:
        weight: `[D]`.
        bias: scalar.
        x, y: samples `[N, ...]` and labels `[N]` of two classes: centroids and scatter.
        x_val, y_val: held-out ones of the same two classes: accuracy.

    Returns:
        The two angles, and the way there.
    """
    w, i, j = _setting(weight, x, y, None)
    high = y == y.max()
    z = (j - i) / (j - i).norm()
    scatter = x.flatten(1) - torch.where(high[:, None], j, i)
    _, spread, axes = torch.linalg.svd(scatter - (scatter @ z)[:, None] * z, full_matrices=False)
    axes = axes[spread > spread[0] * 1e-10].flip(0)  # the quietest first; z itself is none of them
    along = (w @ z) * z
    shares = (axes @ w)[:, None] * axes
    silent = w - along - shares.sum(0)  # samples never vary there
    parts = torch.cat([silent[None], shares, along[None]])  # [R, D], in the order of dropping, the last one never

    kept = parts.flip(0).cumsum(0).flip(0)  # what is left after dropping 0, 1, ...
    angles = torch.atan2((kept - along).norm(dim=-1), w @ z)
    middle = (i + j) / 2
    scores = (x_val.flatten(1) - middle) @ kept.T + (w @ middle + bias)
    truth = (y_val == y.max())[:, None]
    right = ((scores > 0) == truth).to(w)
    by_class = torch.stack([right[truth[:, 0]].mean(0), right[~truth[:, 0]].mean(0)])
    counts = torch.stack([truth.sum(), (~truth).sum()]).to(w)
    accuracy = by_class.mean(0)
    best = accuracy.argmax()
    error = (by_class[:, best] * (1 - by_class[:, best]) / counts).sum().sqrt() / 2
    dropped = int((accuracy >= accuracy[best] - error).nonzero()[-1])
    left = kept[dropped]
    return FreeTilt(
        angles[dropped], angles[0] - angles[dropped], dropped, angles, accuracy, left, w @ middle + bias - left @ middle
    )


def local_geometry(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, centroids: Tensor | None = None) -> LocalGeometry:
    """A classifier's boundary around each sample, to first order: one forward and one backward pass.

    The angle is between the direction in which the margin falls and the line from the label's centroid to the nearest other
    one; it is δ for a linear classifier of two classes.

    Args:
        model: inputs `[B, ...]` to logits `[B, K]`, samples separately (eval mode).
        x: `[B, ...]`, float.
        y: labels `[B]`.
        centroids: mean input of each class, `[K, ...]`; None: of these samples.

    Returns:
        Margin (label's logit minus the best other one), gradient norm, distance in units of x, angle in radians; `[B]` each.

    Raises:
        BadData: fewer than two centroids.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = model(point)
        own = logits.gather(-1, y[:, None])[:, 0]
        margin = own - logits.scatter(-1, y[:, None], -torch.inf).amax(-1)
        (slope,) = torch.autograd.grad(margin.sum(), point)
    if centroids is None:
        classes, position = y.unique(return_inverse=True)
        sums = torch.zeros(len(classes), x[0].numel(), dtype=x.dtype, device=x.device).index_add(0, position, x.flatten(1))
        centres = sums / position.bincount()[:, None]
    else:
        centres, position = centroids.flatten(1), y
    if len(centres) < 2:
        raise BadData("all samples are of one class: an angle needs the centroids of at least two")
    apart = torch.cdist(x.flatten(1), centres).scatter(1, position[:, None], torch.inf)
    line = centres[apart.argmin(1)] - centres[position]
    norm = slope.flatten(1).norm(dim=-1)
    distance = margin.detach() / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return LocalGeometry(margin.detach(), norm, distance, _angle(-slope.flatten(1), line))


def matched_temperature(logits: Tensor, confidence: float = 0.95) -> float:
    """The temperature at which the median confidence of a classifier is as wished, so that models compare at equal confidence.

    Args:
        logits: `[N, K]`, of a test set.
        confidence: median of the largest probability, between 1 / K and 1.

    Returns:
        What to divide logits by.

    Raises:
        BadSetting: no temperature gives that confidence.
    """
    low, high = 1e-6, 1e6
    if not 1 / logits.shape[-1] < confidence < 1:
        raise BadSetting(f"confidence={confidence:g} is not between 1/{logits.shape[-1]} and 1")
    for _ in range(100):
        middle = math.sqrt(low * high)
        if (logits.double() / middle).softmax(-1).amax(-1).median() > confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _setting(weight: Tensor, x: Tensor, y: Tensor, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The normal and both centroids, `[D]` each."""
    flat = x.flatten(1)
    if pair is None:
        found = y.unique().tolist()
        if len(found) != 2:
            raise BadData(f"a boundary is between two classes, these labels are of {len(found)}: give pair=(I, J)")
        first, second = found
    else:
        first, second = pair
        if weight.ndim != 2:
            raise BadSetting("pair is for the weights [K, D] of many classes; this weight has one row")
        weight = weight[second] - weight[first]
        for label in pair:
            if not (y == label).any():
                raise BadData(f"there is no sample of class {label}: its centroid is not known")
    if weight.shape != flat.shape[1:]:
        raise BadSetting(f"weight of shape {tuple(weight.shape)} does not fit samples of {flat.shape[1]} numbers")
    return weight, flat[y == first].mean(0), flat[y == second].mean(0)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Between vectors `[..., D]`, in radians; exact for small angles too (the arc cosine is not)."""
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
