"""How good estimated distances are: relative errors, accuracy under a threshold, errors by distance and by occlusion.

    AbsRel = mean |ŷ - y| / y      SqRel = mean (ŷ - y)² / y      RMSElog = √ mean (ln ŷ - ln y)²
    δ_k = share with max(ŷ / y, y / ŷ) < 1.25^k      RDE_p = share with |ŷ - y| / y < p      ALP_m = share with |ŷ - y| < m metres
    ALE, ALOE = mean |ŷ - y| in a range of distances, of occlusion

Sources: Eigen et al. 2014 (relative errors, δ); Zhu and Fang 2019, "Learning Object-Specific Distance From a Monocular Image";
Mancusi et al. 2023 (ALP, ALE, ALOE), as in Panariello et al. 2024, arXiv 2401.03191.

>>> import torch
>>> from sfumato.metrics import distance_metrics
>>> m = distance_metrics(torch.tensor([9.0, 22.0]), torch.tensor([10.0, 20.0]))
>>> round(m["abs_rel"], 3), m["delta_1"], m["ale"], m["alp_1"]
(0.1, 1.0, 1.5, 0.0)
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.errors import BadData

DISTANCE_BINS = (0, 10, 20, 30, 100)
"""Edges of the ranges of ALE, metres."""
OCCLUSION_BINS = (0.0, 0.3, 0.5, 0.75, 1.0)
"""Edges of the ranges of ALOE, hidden share of an object."""


def distance_metrics(pred: Tensor, true: Tensor, visibility: Tensor | None = None) -> dict[str, float]:
    """Figures of a set of objects.

    Args:
        pred: `[N]` estimated distances, metres; for logarithm and ratio they are taken as at least 1 mm.
        true: `[N]` true distances, metres, above 0.
        visibility: `[N]` visible share of each object, 0 to 1 (NaN: not known); given, errors by occlusion are added.

    Returns:
        `abs_rel`, `sq_rel`, `rmse` (m), `rmse_log`, `delta_1` to `delta_3`, `rde_5`, `rde_10`, `rde_15` (shares within 5, 10,
        15 %), `alp_0.5`, `alp_1`, `alp_2` (shares within so many metres), `ale` and `ale_0-10` ... `ale_30-100` (m), and
        `aloe_0-30` ... `aloe_75-100` (m, by the hidden share in per cent). A range without objects is NaN.

    Raises:
        BadData: unlike shapes, no objects, or a distance that is not above 0.
    """
    if pred.shape != true.shape or pred.ndim != 1 or not len(true):
        raise BadData(f"distances are {list(pred.shape)} and {list(true.shape)}: give one estimate for each object, [N] both")
    y, estimate = true.double(), pred.double()
    if not bool((y > 0).all()):
        raise BadData("a true distance is not above 0: drop objects whose distance is not known")
    error = (estimate - y).abs()
    positive = estimate.clamp(min=1e-3)
    relative, ratio = error / y, torch.maximum(positive / y, y / positive)
    figures = {
        "abs_rel": relative.mean(),
        "sq_rel": (error.square() / y).mean(),
        "rmse": error.square().mean().sqrt(),
        "rmse_log": (positive.log() - y.log()).square().mean().sqrt(),
        **{f"delta_{k}": (ratio < 1.25**k).double().mean() for k in (1, 2, 3)},
        **{f"rde_{p}": (relative < p / 100).double().mean() for p in (5, 10, 15)},
        **{f"alp_{m:g}": (error < m).double().mean() for m in (0.5, 1.0, 2.0)},
        "ale": error.mean(),
        **_binned("ale", error, y, DISTANCE_BINS),
    }
    if visibility is not None:
        hidden = 1 - visibility.double()
        figures |= _binned("aloe", error, hidden, OCCLUSION_BINS, 100)
    return {name: float(value) for name, value in figures.items()}


def _binned(name: str, error: Tensor, by: Tensor, edges: tuple[float, ...], unit: float = 1) -> dict[str, Tensor]:
    """Mean error where `by` lies in [low, high) of each range; NaN for an empty one."""
    found = {}
    for low, high in pairwise(edges):
        inside = (by >= low) & (by < high)
        mean = torch.where(inside, error, 0.0).sum() / inside.sum()
        found[f"{name}_{math.floor(low * unit + 0.5)}-{math.floor(high * unit + 0.5)}"] = mean
    return found
