"""Losses of a clean and an attacked prediction, for training classifiers that keep their answer when pixels change a little.

    smooth adversarial comp-sum:  ℓ_τ(h(x), y; ρ) + ν ‖Δ̄(x′) − Δ̄(x)‖₂       Δ̄: margins of the label over all other classes
    TRADES:                       cross-entropy(h(x), y) + β KL(p(x) ‖ p(x′))

x′ is the picture near x where the second term is largest; `sfumato.attacks.pgd` finds it with the objectives `margin_shift` and
`kl_shift`. With ν ≥ √(n−1) / ρ the first loss is an upper bound of the adversarial ρ-margin loss. Its norm is not squared, so its
gradient does not fade near 0: where ν times the reach of an attack is large, a constant classifier is the best.

Sources: Mao, Mohri, Zhong, ICML 2023, section 5; TRADES: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, ICML 2019, equation 5.

>>> import torch
>>> from sfumato.losses import comp_sum, smooth_adversarial_comp_sum
>>> logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
>>> attacked = torch.tensor([[1.0, 3.0, 0.0]])  # both margins shrink, by 4 and by 1
>>> round((smooth_adversarial_comp_sum(logits, attacked, target, nu=0.5) - comp_sum(logits, target)).item(), 4)  # 0.5 · √17
2.0616
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.losses.comp_sum_family import comp_sum, margins, reduce


def smooth_adversarial_comp_sum(
    logits: Tensor,
    logits_adv: Tensor,
    target: Tensor,
    *,
    nu: float = 1.0,
    rho: float = 1.0,
    tau: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """The comp-sum loss on clean samples plus ν times how far an attack moves the margins.

    Args:
        logits: of clean samples, `[B, n]`.
        logits_adv: of attacked samples, `[B, n]`; gradients flow through both.
        target: labels `[B]`, integers from 0 to n - 1.
        nu: ν, at least 0; 1 in the paper (from memory), smaller where the attack is strong.
        rho: ρ, positive.
        tau: τ, at least 0; 1: cross-entropy.
        reduction: "mean" over the batch, or "none".

    Returns:
        A scalar; with "none" `[B]`. Where both logits are equal it is `comp_sum`, with that gradient.

    Raises:
        BadSetting: see `comp_sum`.

    Reference:
        Mao, Mohri, Zhong 2023, section 5.
    """
    clean = comp_sum(logits, target, tau=tau, rho=rho, reduction="none")
    return reduce(clean + nu * margin_change(logits, logits_adv, target), reduction)


def trades(logits: Tensor, logits_adv: Tensor, target: Tensor, *, beta: float = 6.0, reduction: str = "mean") -> Tensor:
    """Cross-entropy on clean samples plus β times the divergence of the attacked prediction from the clean one.

    Args:
        logits: of clean samples, `[B, n]`.
        logits_adv: of attacked samples, `[B, n]`; gradients flow through both.
        target: labels `[B]`, integers from 0 to n - 1.
        beta: β, at least 0; the authors' 1/λ.
        reduction: "mean" over the batch, or "none".

    Returns:
        A scalar; with "none" `[B]`.

    Raises:
        BadSetting: another reduction.

    Reference:
        Zhang et al. 2019, equation 5.
    """
    clean = F.cross_entropy(logits, target, reduction="none")
    return reduce(clean + beta * prediction_change(logits, logits_adv), reduction)


def margin_change(logits: Tensor, logits_adv: Tensor, target: Tensor) -> Tensor:
    """‖Δ̄(x′) − Δ̄(x)‖₂ of logits `[B, n]` and labels `[B]`: `[B]`; the gradient where nothing changed is 0."""
    return torch.linalg.vector_norm(margins(logits_adv - logits, target), dim=-1)  # margins are linear


def prediction_change(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """KL(p(x) ‖ p(x′)) of logits `[B, n]`, in nats: `[B]`."""
    return F.kl_div(logits_adv.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
