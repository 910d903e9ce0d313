"""One family of losses from sum-exponential to cross-entropy to mean absolute error, and how much error each of them can hide.

    ℓ_τ = Φ_τ(u) = ((1 + u)^(1−τ) − 1) / (1 − τ),     u = Σ_{j≠y} exp((h_j − h_y) / ρ),     log(1 + u) at τ = 1

With p the softmax of h / ρ it is (p_y^(τ−1) − 1) / (1 − τ). τ = 0: sum-exponential u; 1: cross-entropy; between 1 and 2:
generalised cross-entropy (1 − p^q) / q with q = τ − 1; 2: MAE, 1 − p_y. A small excess of the loss bounds that of the errors.

Source: Mao, Mohri, Zhong, ICML 2023, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", sections 2 to 4.

>>> import torch
>>> from sfumato.losses import comp_sum, comp_sum_bound_inverse
>>> logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
>>> [round(comp_sum(logits, target, tau=tau).item(), 3) for tau in (0.0, 1.0, 2.0)]
[0.271, 0.24, 0.213]
>>> round(comp_sum_bound_inverse(torch.tensor(0.01), tau=1.0).item(), 2)  # 0.01 nats too many: at most 14 % too many errors
0.14
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.errors import BadSetting


def comp_sum(logits: Tensor, target: Tensor, *, tau: float = 1.0, rho: float = 1.0, reduction: str = "mean") -> Tensor:
    """The comp-sum loss of logits against labels; at tau = 1 it is cross-entropy.

    Args:
        logits: h, `[B, n]`, any real numbers; a common shift of a row changes nothing.
        target: labels `[B]`, integers from 0 to n - 1; or probabilities `[B, n]`, over which the loss is averaged.
        tau: τ, at least 0: 0 sum-exponential, 1 cross-entropy, 2 mean absolute error.
        rho: ρ, positive: the scale of a margin that counts as large.
        reduction: "mean" over the batch, or "none".

    Returns:
        A scalar; with "none" `[B]`. Below tau = 1 it grows like a power of e^(h_j - h_y) and may overflow to infinity (clamp the
        logits to avoid it); from 1 on it is finite for every finite input.

    Raises:
        BadSetting: tau below 0, rho not positive, or another reduction.

    Reference:
        Mao, Mohri, Zhong 2023, section 2 and (for rho) section 5.
    """
    _check(tau, rho)
    surprise = -(logits / rho).log_softmax(-1)  # log(1 + u), the stable number that the whole family is a function of
    if target.is_floating_point():
        surprise = surprise.where(target > 0, 0.0)  # what has no weight may be infinite
        loss = (target * _family(surprise, tau)).sum(-1)
    else:
        loss = _family(surprise.gather(-1, target[..., None]).squeeze(-1), tau)
    return reduce(loss, reduction)


class CompSum(nn.Module):
    """`comp_sum` with its settings kept, for loops that hold a criterion.

    Args:
        tau: see `comp_sum`.
        rho: see `comp_sum`.
        reduction: see `comp_sum`.
    """

    def __init__(self, *, tau: float = 1.0, rho: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        _check(tau, rho)
        self.tau, self.rho, self.reduction = tau, rho, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits `[B, n]` and labels `[B]` (or probabilities `[B, n]`) to a scalar, or `[B]`."""
        return comp_sum(logits, target, tau=self.tau, rho=self.rho, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The settings."""
        return f"tau={self.tau}, rho={self.rho}, reduction={self.reduction!r}"


def margins(logits: Tensor, target: Tensor) -> Tensor:
    """By how much the logit of the label exceeds each of the others: Δ_j = h_y − h_j for all j ≠ y.

    Args:
        logits: h, `[B, n]`.
        target: labels `[B]`, integers from 0 to n - 1.

    Returns:
        `[B, n - 1]`, the other classes in their order; negative where another class wins.
    """
    others = torch.arange(logits.shape[-1] - 1, device=logits.device)
    others = others + (others >= target[..., None])  # all classes but the label: no boolean index, so no wait for a GPU
    return logits.gather(-1, target[..., None]) - logits.gather(-1, others)


def comp_sum_bound(beta: Tensor, *, tau: float = 1.0, n_classes: int = 2) -> Tensor:
    """The least excess of the loss that an excess β of the zero-one error implies: 𝒯_τ(β).

    With a = [((1+β)^s + (1−β)^s) / 2]^(1/s), s = 1/(2−τ): 𝒯 = (a − 1) / ((τ−1) k^(τ−1)), k = n above τ = 1 and else 2.

    Args:
        beta: β, excess errors, 0 to 1, any shape, float.
        tau: τ, at least 0.
        n_classes: n, at least 2; it matters above tau = 1 only.

    Returns:
        Like `beta`, in the unit of the loss: 0 at 0, increasing and convex (linear from tau = 2 on).

    Raises:
        BadSetting: tau below 0 or fewer than two classes.

    Reference:
        Mao, Mohri, Zhong 2023, theorem 3.1; exact for two classes.
    """
    _check(tau, 1.0)
    if n_classes < 2:
        raise BadSetting(f"n_classes={n_classes} must be at least 2")
    if tau == 1:
        return (torch.special.xlog1py(1 + beta, beta) + torch.special.xlog1py(1 - beta, -beta)) / 2
    scale = (tau - 1) * (n_classes if tau > 1 else 2) ** (tau - 1)
    if tau >= 2:
        return beta / scale
    s = 1 / (2 - tau)
    # a - 1 without forming a, which is 1 + O(β²): small β keep all their digits
    power_mean = (torch.expm1(s * beta.log1p()) + torch.expm1(s * (-beta).log1p())) / 2
    return torch.expm1(power_mean.log1p() / s) / scale


def comp_sum_bound_inverse(excess: Tensor, *, tau: float = 1.0, n_classes: int = 2) -> Tensor:
    """The largest excess of the zero-one error that an excess of the loss can hide: Γ_τ = 𝒯_τ⁻¹.

    It is at most √(2^τ (2−τ) t) for τ < 1, √(2 n^(τ−1) t) for 1 ≤ τ < 2 and (τ−1) n^(τ−1) t from τ = 2 on.

    Args:
        excess: t, mean loss above the least possible, at least 0, any shape, float.
        tau: τ, at least 0.
        n_classes: n, at least 2.

    Returns:
        Like `excess`, from 0 to 1, to the precision of its type (by bisection, without a gradient).

    Raises:
        BadSetting: tau below 0 or fewer than two classes.

    Reference:
        Mao, Mohri, Zhong 2023, theorem 3.1.
    """
    excess = excess.detach()
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    for _ in range(60):
        middle = (low + high) / 2
        below = comp_sum_bound(middle, tau=tau, n_classes=n_classes) < excess
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.where(excess > 0, 0.0)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The mean of a loss, or the loss of each sample ("none")."""
    if reduction not in ("mean", "none"):
        raise BadSetting(f"reduction {reduction!r} is not known: mean or none")
    return loss.mean() if reduction == "mean" else loss


def _family(surprise: Tensor, tau: float) -> Tensor:
    return surprise if tau == 1 else torch.expm1((1 - tau) * surprise) / (1 - tau)


def _check(tau: float, rho: float) -> None:
    if tau < 0:
        raise BadSetting(f"tau={tau} must be at least 0: 0 sum-exponential, 1 cross-entropy, 2 mean absolute error")
    if rho <= 0:
        raise BadSetting(f"rho={rho} must be positive: the size of a margin that counts as large")
