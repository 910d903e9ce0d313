"""The smallest change of a picture that changes its class, found by stepping to the nearest boundary of a linearised model.

    r ← r + |f_j − f_y| / ‖∇(f_j − f_y)‖² · ∇(f_j − f_y),     j: the class whose linearised boundary is nearest

Exact in one step for a linear model.

Source: Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool", CVPR 2016, algorithm 2.

>>> import torch
>>> from sfumato.attacks import deepfool
>>> model = lambda x: x @ torch.tensor([[1.0, -1.0], [0.0, 0.0]])  # class 0 where the first number is positive
>>> deepfool(model, torch.tensor([[0.5, 0.2]]), torch.tensor([0]), overshoot=0.0)
tensor([[0.0000, 0.2000]])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.errors import BadSetting


def deepfool(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """The nearest point of another class, by DeepFool in the Euclidean norm.

    Args:
        model: inputs `[B, ...]` to logits `[B, K]`, samples separately (eval mode).
        x: inputs `[B, ...]`, float.
        y: classes to leave, `[B]`; None: those that the model finds. Samples that are elsewhere already stay as they are.
        steps: most linearisations of a sample.
        overshoot: how much farther than the boundary, as a share of the way; 0 ends on the boundary.
        candidates: how many of the likeliest other classes are looked at; costs one backward pass each.
        clip: smallest and largest value of an input; None: no limit.

    Returns:
        Like `x`.

    Raises:
        BadSetting: no step, or no other class.
    """
    if steps < 1 or candidates < 1:
        raise BadSetting(f"steps={steps} and candidates={candidates} must be at least 1")
    x = x.detach()
    moved, way = x.clone(), torch.zeros_like(x)
    with torch.enable_grad():
        for _ in range(steps):
            point = moved.detach().requires_grad_()
            logits = model(point)
            if logits.shape[-1] < 2:
                raise BadSetting(f"the model gives {logits.shape[-1]} output: deepfool needs the logits of at least two classes")
            if y is None:
                y = logits.argmax(-1)
            stays = logits.argmax(-1) == y
            if not stays.any():
                break
            others = logits.detach().scatter(-1, y[:, None], -torch.inf).topk(min(candidates, logits.shape[-1] - 1)).indices
            gaps = logits.gather(-1, others) - logits.gather(-1, y[:, None])  # negative while the sample stays
            each = torch.eye(gaps.shape[1], dtype=gaps.dtype, device=gaps.device)[:, None].expand(-1, *gaps.shape)
            (slopes,) = torch.autograd.grad(gaps, point, each, is_grads_batched=True)  # [J, B, ...]
            slopes, lengths = slopes.transpose(0, 1), slopes.flatten(2).norm(dim=-1).T  # [B, J, ...], [B, J]
            distances = gaps.detach().abs() / lengths.clamp(min=torch.finfo(x.dtype).tiny)
            nearest = distances.argmin(-1)
            rows = torch.arange(len(x), device=x.device)
            step = distances[rows, nearest] / lengths[rows, nearest].clamp(min=torch.finfo(x.dtype).tiny)
            step = torch.where(stays & step.isfinite(), step, 0.0).view(-1, *[1] * (x.ndim - 1))
            way = way + step * slopes[rows, nearest]
            moved = x + (1 + overshoot) * way
            if clip is not None:
                moved = moved.clamp(*clip)
    return moved.detach()
