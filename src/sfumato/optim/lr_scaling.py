"""Move a tuned learning rate to another batch size, and take one from the curvature.

    SGD   η ∝ B   while gradient noise dominates,  capped by 2/λ₁ with λ₁(B) = λ₁ + v/λ₁,  v = v₀ B₀/B
    Adam  η ∝ √B
    heavy ball:  η = 4 / (√λ_max + √λ_min)²,   momentum = ((√λ_max - √λ_min) / (√λ_max + √λ_min))²

Sources: Granziol et al. 2022, "Learning Rates as a Function of Batch Size", JMLR 23(173); Polyak 1964 (heavy ball).

>>> from sfumato.optim import lr_for_batch, polyak_heavy_ball
>>> lr_for_batch(1.5e-4, 256, 4096), round(lr_for_batch(1e-3, 64, 256, kind="adam"), 6)
(0.0024, 0.002)
>>> polyak_heavy_ball(9.0, 1.0)
(0.25, 0.25)
"""

from __future__ import annotations

import math

from sfumato.errors import BadSetting


def lr_for_batch(
    lr0: float, batch0: int, batch: int, *, kind: str = "sgd", lam1: float | None = None, v0: float | None = None
) -> float:
    """The learning rate for another batch size.

    Args:
        lr0: tuned rate, at
        batch0: samples a step.
        batch: new samples a step.
        kind: "sgd" (in proportion to the batch) or "adam" (to its root).
        lam1: largest eigenvalue of the full Hessian; with `v0` the SGD rule saturates:
            `lr0 (λ₁ + v₀/λ₁) / (λ₁ + v₀ B₀ / (B λ₁))`.
        v0: variance of the Hessian along a direction at `batch0`; 0: the rate does not change.

    Returns:
        The new rate.

    Raises:
        BadSetting: an unknown kind, only one of `lam1` and `v0`, or either with "adam".
    """
    if kind not in ("sgd", "adam"):
        raise BadSetting(f"kind {kind!r} is not known: sgd or adam")
    if (lam1 is None) != (v0 is None) or (lam1 is not None and kind == "adam"):
        raise BadSetting("lam1= and v0= go together, with kind='sgd' only")
    if lam1 is not None and v0 is not None:
        return lr0 * (lam1 + v0 / lam1) / (lam1 + v0 * batch0 / (batch * lam1))
    return lr0 * (batch / batch0 if kind == "sgd" else math.sqrt(batch / batch0))


def polyak_heavy_ball(lam_max: float, lam_min: float) -> tuple[float, float]:
    """The fastest rate and momentum on a quadratic with eigenvalues in [lam_min, lam_max].

    Args:
        lam_max: largest eigenvalue, positive.
        lam_min: smallest one that matters, positive.

    Returns:
        Learning rate and momentum; the error then falls by the root of the momentum a step.

    Raises:
        BadSetting: not `0 < lam_min <= lam_max`.
    """
    if not 0 < lam_min <= lam_max:
        raise BadSetting(f"eigenvalues must satisfy 0 < lam_min <= lam_max, not {lam_min} and {lam_max}")
    high, low = math.sqrt(lam_max), math.sqrt(lam_min)
    return 4 / (high + low) ** 2, ((high - low) / (high + low)) ** 2
