"""Small changes of a picture that mislead a model, found by following its gradient: PGD, FGSM and Carlini-Wagner.

    PGD:  x′ ← Π( x′ + α · sign ∇_x′ J(f(x′), y) ),     Π: onto the ball of radius ε around x, then into the range of pixels

The model is any callable from a batch of inputs to outputs; put a module into eval mode yourself. The objective J is a name or
any function `(output, y) -> [B]` (`sfumato.attacks.objectives`). No parameter's `.grad` is touched: only the path back to x is
differentiated.

Sources: FGSM: Goodfellow, Shlens, Szegedy, ICLR 2015; PGD: Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018; CW: Carlini and
Wagner, S&P 2017.

>>> import torch
>>> from sfumato.attacks import pgd
>>> model = lambda x: x @ torch.tensor([[1.0, -1.0], [2.0, 0.0]])
>>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
>>> pgd(model, x, y, eps=0.1, objective="margin")  # both pixels speak for class 0
tensor([[0.4000, 0.4000]])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.attacks.objectives import Objective, as_objective, margin
from sfumato.errors import BadSetting

Model = Callable[[Tensor], Tensor]
Norm = Literal["linf", "l2"]
Range = tuple[float, float] | None

TINY = 1e-3  # a start close to x, where a shift objective has a gradient


def pgd(
    model: Model,
    x: Tensor,
    y: Any = None,
    *,
    eps: float,
    step_size: float | None = None,
    steps: int = 10,
    norm: Norm = "linf",
    objective: str | Objective = "ce",
    init: Literal["uniform", "zero", "tiny"] = "uniform",
    restarts: int = 1,
    clip: Range = (0.0, 1.0),
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on an objective within a ball around each sample.

    Args:
        model: inputs `[B, ...]` to outputs, samples separately (eval mode).
        x: inputs `[B, ...]`, float.
        y: what the objective compares with, such as labels `[B]`.
        eps: radius of the ball, in units of x; at least 0.
        step_size: length of a step; None: eps / 4.
        steps: gradients a restart.
        norm: "linf" (steps along the sign) or "l2" (along the normalised gradient).
        objective: "ce", "margin", "mse", or a function `(output, y) -> [B]`; ascended.
        init: "uniform": anywhere in the ball; "zero": x; "tiny": uniform in a ball of radius 0.001 (at most eps).
        restarts: how often; each sample keeps the end at which its objective is largest.
        clip: range of the inputs, or None.
        noise: the draw for the start, `[restarts, *x.shape]` (or like x, shared), in the unit ball of the norm; None: drawn.
        generator: of the start.

    Returns:
        Attacked inputs like `x`, without a graph.

    Raises:
        BadSetting: an unknown norm, start or objective, or numbers out of their range.

    Reference:
        Madry et al. 2018, section 2.1.
    """
    _check(eps, steps, norm, init, restarts)
    goal, step = as_objective(objective), eps / 4 if step_size is None else step_size
    radius = {"uniform": eps, "zero": 0.0, "tiny": min(TINY, eps)}[init]
    x = x.detach()
    best, highest = x, None
    for restart in range(restarts):
        start = _start(x, norm, radius, noise, restart, generator)
        attacked = _clipped(x + radius * start, clip)
        for _ in range(steps):
            move = step * _direction(_gradient(model, attacked, y, goal), norm)
            attacked = _clipped(x + _projected(attacked + move - x, eps, norm), clip)
        if restarts == 1:
            return attacked
        with torch.no_grad():
            reached = goal(model(attacked), y)
        better = torch.ones_like(reached, dtype=torch.bool) if highest is None else reached > highest
        best = torch.where(_per_sample(better, x), attacked, best)
        highest = reached if highest is None else torch.maximum(reached, highest)
    return best


def fgsm(model: Model, x: Tensor, y: Any, *, eps: float, objective: str | Objective = "ce", clip: Range = (0.0, 1.0)) -> Tensor:
    """One step of length eps along the sign of the gradient at x.

    Args:
        model: inputs `[B, ...]` to outputs.
        x: inputs `[B, ...]`, float.
        y: what the objective compares with, such as labels `[B]`.
        eps: change of each number, in units of x; at least 0.
        objective: see `pgd`.
        clip: range of the inputs, or None.

    Returns:
        Attacked inputs like `x`, without a graph.

    Raises:
        BadSetting: see `pgd`.

    Reference:
        Goodfellow et al. 2015, section 4.
    """
    return pgd(model, x, y, eps=eps, step_size=eps, steps=1, objective=objective, init="zero", clip=clip)


def cw_l2(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    c: float = 1.0,
    steps: int = 100,
    lr: float = 0.01,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """A misclassified input as near as possible: Adam on ‖x′ − x‖² + c · max(0, h_y − max_{j≠y} h_j).

    x′ is a tanh of free variables, so it stays within the range of the inputs by itself.

    Args:
        model: inputs `[B, ...]` to logits `[B, n]`.
        x: inputs `[B, ...]`, float, within `clip`.
        y: labels `[B]`.
        c: weight of being misclassified, positive; larger: more successes, farther away.
        steps: of Adam.
        lr: its rate, on the free variables.
        clip: range of the inputs.

    Returns:
        The nearest misclassified input that was seen, like `x`; x itself where none was.

    Reference:
        Carlini and Wagner 2017, section 6 (one c, no search over it).
    """
    low, high = clip
    x = x.detach()
    inside = ((x - low) / (high - low) * 2 - 1).clamp(-1 + 1e-6, 1 - 1e-6)  # the edges are infinitely far in free variables
    free = inside.atanh().requires_grad_()
    adam = torch.optim.Adam([free], lr)
    best, nearest = x, torch.full_like(x.flatten(1)[:, 0], torch.inf)
    for _ in range(steps):
        with torch.enable_grad():
            attacked = (free.tanh() + 1) / 2 * (high - low) + low
            distance = (attacked - x).square().flatten(1).sum(1)
            success = margin(model(attacked), y)
            loss = (distance + c * (-success).relu()).sum()
        (free.grad,) = torch.autograd.grad(loss, free)
        better = (success > 0) & (distance < nearest)
        best = torch.where(_per_sample(better, x), attacked, best).detach()
        nearest = torch.where(better, distance, nearest).detach()
        adam.step()
    return best


def _gradient(model: Model, x: Tensor, y: Any, goal: Objective) -> Tensor:
    """∇_x of the objective; also where gradients are switched off outside."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(goal(model(x), y).sum(), x)[0]


def _start(x: Tensor, norm: Norm, radius: float, noise: Tensor | None, restart: int, generator: torch.Generator | None) -> Tensor:
    """A point of the unit ball, uniform: `noise` if given."""
    if noise is not None:
        return noise[restart] if noise.ndim > x.ndim else noise
    if radius == 0:
        return torch.zeros_like(x)
    if norm == "linf":
        return torch.empty_like(x).uniform_(-1, 1, generator=generator)
    direction = torch.empty_like(x).normal_(generator=generator)
    share = torch.empty_like(x.flatten(1)[:, 0]).uniform_(generator=generator) ** (1 / max(1, x[0].numel()))
    return _direction(direction, norm) * _per_sample(share, x)


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    length = _per_sample(gradient.flatten(1).norm(dim=1), gradient)
    return torch.where(length > 0, gradient / length, 0.0)


def _projected(change: Tensor, eps: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return change.clamp(-eps, eps)
    length = _per_sample(change.flatten(1).norm(dim=1), change)
    return torch.where(length > eps, change * (eps / length), change)


def _clipped(x: Tensor, clip: Range) -> Tensor:
    return x if clip is None else x.clamp(*clip)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`[B]` as `[B, 1, ...]`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _check(eps: float, steps: int, norm: str, init: str, restarts: int) -> None:
    if norm not in ("linf", "l2"):
        raise BadSetting(f"norm {norm!r} is not known: linf or l2")
    if init not in ("uniform", "zero", "tiny"):
        raise BadSetting(f"init {init!r} is not known: uniform, zero or tiny")
    if eps < 0 or steps < 0 or restarts < 1:
        raise BadSetting(f"eps={eps} and steps={steps} must be at least 0, restarts={restarts} at least 1")
