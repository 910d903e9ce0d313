"""Gradients at right angles to the weights, for any optimizer: perpGrad (Prieto, Barsbey, Mediano, Birdal, ICLR 2025).

    g⊥ = g − (⟨w, g⟩ / ⟨w, w⟩) w,      g ← g⊥ ‖g‖ / ‖g⊥‖

Once a network fits its data, most of the gradient only makes the weights, and with them the logits, longer. Without that part
the network has to change what it computes. The length of the gradient is kept; without that almost nothing would be left.

>>> import torch
>>> from sfumato.optim import PerpGrad
>>> w = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
>>> optimizer = PerpGrad(torch.optim.SGD([w], lr=0.1))
>>> w.grad = torch.tensor([-4.0, 3.0])  # mostly along w
>>> optimizer.step()
>>> w.grad, w.data
(tensor([0., 5.]), tensor([ 2.0000, -0.5000]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato.errors import BadSetting
from sfumato.optim.foreign_state import refuse_foreign_state

__all__ = ["PerpGrad", "project_out_weights_"]

Per = Literal["tensor", "row", "global"]

TINY = 1e-30
"""Added to both divisors, as in the official code: weights that are all zero leave the gradient as it is."""


@torch.no_grad()
def project_out_weights_(params: Iterable[Tensor], per: Per = "tensor") -> None:
    """Take from every `.grad`, in place, its part along the weights, and bring it back to its length.

    Where nothing but rounding is left (a gradient along the weights, a parameter of a single number) the gradient becomes 0.

    Args:
        params: parameters, biases too; those without a gradient are left out.
        per: what counts as one vector: every `"tensor"` (the paper), every `"row"` (the weights of one output unit; a parameter
            of one dimension is one vector), or all parameters together (`"global"`).

    Raises:
        BadSetting: an unknown `per`, complex parameters or sparse gradients.

    Reference: Prieto et al. 2025. What to do with rounding, and the two other kinds, are ours.
    """
    _check(per)
    pairs = [(p.detach(), p.grad) for p in params if p.grad is not None]
    if not pairs:
        return
    if any(p.is_complex() or grad.layout != torch.strided for p, grad in pairs):
        raise BadSetting("PerpGrad takes real parameters with dense gradients: build an embedding with sparse=False")
    w, g = ([_at_least_float32(t) for t in tensors] for tensors in zip(*pairs, strict=True))
    before = _inner(g, g, per)
    along = torch._foreach_div(_inner(w, g, per), torch._foreach_add(_inner(w, w, per), TINY))
    torch._foreach_addcmul_(g, w, along, value=-1)
    after = _inner(g, g, per)
    growth = torch._foreach_div(torch._foreach_sqrt(before), torch._foreach_add(torch._foreach_sqrt(after), TINY))
    # Below a few roundings of the old gradient, what is left has no direction: it must not be blown up to full length.
    torch._foreach_mul_(g, [torch.where(f * (8 * torch.finfo(f.dtype).eps) < 1, f, 0.0) for f in growth])
    for (_, grad), wide in zip(pairs, g, strict=True):
        if grad.dtype != wide.dtype:
            grad.copy_(wide)


class PerpGrad(Optimizer):
    """Any optimizer, fed with gradients at right angles to the weights: PerpGrad(AdamW(...)) is the paper's ⊥AdamW.

    It shares parameter groups and state with the optimizer that it wraps: schedulers, checkpoints and added groups work as if it
    were that one. A closure's gradients are projected inside the closure, every time it is called. Decoupled weight decay stays.

    Args:
        base_optimizer: takes the step. Its own closure, if it needs one, must call `backward`.
        per: see `project_out_weights_`; a parameter group may have its own `"per"`, or None to keep its gradients as they are.

    Raises:
        BadSetting: an unknown `per`, complex parameters, sparse gradients, or a closure that does not call `backward`.

    Reference: Prieto et al., "Grokking at the Edge of Numerical Stability", 2025.
    """

    def __init__(self, base_optimizer: Optimizer, per: Per = "tensor") -> None:
        self.base = base_optimizer
        super().__init__(base_optimizer.param_groups, {**base_optimizer.defaults, "per": per})
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings; checks `per`."""
        if (per := param_group.get("per", self.defaults["per"])) is not None:
            _check(per)
        super().add_param_group(param_group)

    def step(self, *closures: Callable[[], Any]) -> Any:  # type: ignore[override]
        """One step of the wrapped optimizer with projected gradients.

        Args:
            closures: what that optimizer takes, mostly nothing or one closure.

        Returns:
            What that optimizer returns.
        """
        if not closures:
            self.project()
        return self.base.step(*(_Projecting(closure, self) for closure in closures))  # type: ignore[arg-type]

    def project(self) -> None:
        """Project the gradients now, as `step` does."""
        groups: dict[Any, list[Tensor]] = {}
        for group in self.param_groups:
            groups.setdefault(group["per"], []).extend(group["params"])
        for per, params in groups.items():
            if per is not None:
                project_out_weights_(params, per)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved optimizer stood.

        Raises:
            BadCheckpoint: it is one of other parameters.
        """
        refuse_foreign_state(self, state_dict)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("per", self.defaults["per"])  # the state of the base optimizer alone has none
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})


class _Projecting:
    """A closure, also the engine's with `hvp`, that leaves projected gradients."""

    def __init__(self, closure: Any, optimizer: PerpGrad) -> None:
        self.closure, self.optimizer = closure, optimizer
        if hasattr(closure, "hvp"):
            self.hvp = self._hvp

    def __call__(self) -> Any:
        loss = self.closure()
        params = (p for group in self.optimizer.param_groups for p in group["params"])
        if isinstance(loss, Tensor) and loss.requires_grad and all(p.grad is None for p in params):
            raise BadSetting("the closure given to PerpGrad.step must call loss.backward(): there is no gradient to project")
        self.optimizer.project()
        return loss

    def _hvp(self, z: Any) -> Any:
        result = self.closure.hvp(z)
        self.optimizer.project()
        return result


def _check(per: str) -> None:
    if per not in ("tensor", "row", "global"):
        raise BadSetting(f"per={per!r} must be 'tensor', 'row' or 'global'")


def _at_least_float32(t: Tensor) -> Tensor:
    """The tensor itself, or a wider copy."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _inner(a: list[Tensor], b: list[Tensor], per: Per) -> list[Tensor]:
    """⟨a, b⟩ of every tensor, row, or of all together: one a tensor, shaped to multiply it."""
    if per == "row":
        return [(x * y).sum(tuple(range(x.ndim > 1, x.ndim)), keepdim=True) for x, y in zip(a, b, strict=True)]
    dots = [x.reshape(-1).dot(y.reshape(-1)) for x, y in zip(a, b, strict=True)]
    if per == "global":
        total = torch.stack([d.to(dots[0]) for d in dots]).sum()
        return [total.to(d) for d in dots]
    return dots
