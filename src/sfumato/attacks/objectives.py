"""What an attack climbs: functions of a model's outputs and labels, one number a sample, larger = worse for the model.

    cross_entropy: −log p_y      margin: max_{j≠y} h_j − h_y (positive = misclassified)      mse: mean (output − y)²
    margin_shift: ‖Δ̄(x′) − Δ̄(x)‖₂      kl_shift: KL(p(x) ‖ p(x′))      (the inner problems of two training losses)

Attacks take any such function, so a new goal is a line of code.

Sources: margin: Carlini and Wagner 2017; margin_shift: Mao, Mohri, Zhong 2023, section 5; kl_shift: Zhang et al. 2019 (TRADES).

>>> import torch
>>> from sfumato.attacks import margin
>>> margin(torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 0]))
tensor([-1.,  3.])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadSetting, nearest
from sfumato.losses.adversarial_training import margin_change, prediction_change
from sfumato.losses.comp_sum_family import margins

Objective = Callable[[Tensor, Any], Tensor]
"""`(output, y) -> [B]`; always ascended."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits `[B, n]` and labels `[B]`, in nats: `[B]`."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """By how much the best wrong class of logits `[B, n]` exceeds the label `[B]`: `[B]`, positive where misclassified."""
    return -margins(logits, y).amin(-1)


def mse(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each sample, for models that predict numbers or pictures `[B, ...]`: `[B]`."""
    return (output - y).square().flatten(1).mean(1)


def margin_shift(logits_clean: Tensor) -> Objective:
    """How far the margins of the label move: ‖Δ̄(x′) − Δ̄(x)‖₂.

    Its gradient at x itself is 0: start an attack elsewhere (`init="tiny"`).

    Args:
        logits_clean: of the samples as they are, `[B, n]`; detach them for an attack.

    Returns:
        An objective `(logits, y) -> [B]`.
    """
    return lambda logits, y: margin_change(logits_clean, logits, y)


def kl_shift(logits_clean: Tensor) -> Objective:
    """How far the predicted probabilities move: KL(p(x) ‖ p(x′)), in nats.

    Its gradient at x itself is 0: start an attack elsewhere (`init="tiny"`).

    Args:
        logits_clean: of the samples as they are, `[B, n]`; detach them for an attack.

    Returns:
        An objective `(logits, y) -> [B]`; labels are not used.
    """
    return lambda logits, y: prediction_change(logits_clean, logits)


NAMED: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "mse": mse}


def as_objective(objective: str | Objective) -> Objective:
    """The function that a name stands for; a function stays as it is.

    Raises:
        BadSetting: an unknown name.
    """
    if callable(objective):
        return objective
    if objective not in NAMED:
        near = nearest(objective, NAMED) or list(NAMED)
        raise BadSetting(
            f"objective {objective!r} is not known; did you mean {', '.join(near)}? A function (output, y) -> [B] works too"
        )
    return NAMED[objective]
