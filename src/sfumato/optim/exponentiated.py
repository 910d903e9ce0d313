"""Descent that multiplies: every weight keeps its sign, as a synapse does (Dale's law).

    w <- w exp(-lr sign(w) g)

Steps are relative, so large weights move far and small ones hardly: what can be left out becomes small, and trained weights tend
to a log-normal law. On positive weights it is mirror descent with the entropy. A weight of 0 stays 0.

Sources: Kivinen, Warmuth, "Exponentiated Gradient versus Gradient Descent for Linear Predictors", Information and Computation
1997; with signs: Cornford et al., "Brain-like learning with exponentiated gradients", 2024; as the idea behind multiplicative
diffusion: Shetty, Prasath, Seelamantula 2025 (arXiv 2510.02730).

>>> import torch
>>> from sfumato.optim import ExponentiatedGradient
>>> w = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))
>>> optimizer = ExponentiatedGradient([w], lr=1.0)
>>> (2 * w).sum().backward()
>>> optimizer.step()
>>> w.data  # both move down: the first shrinks, the second grows
tensor([ 0.1353, -7.3891,  0.0000])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from sfumato.errors import BadSetting
from sfumato.optim.foreign_state import refuse_foreign_state

LIMIT = 20.0
"""Largest exponent of one step, up or down."""


class ExponentiatedGradient(Optimizer):
    """Exponentiated gradient descent with signs.

    Exponents are held within ±20 and weights within what their type can hold: no step changes a sign or makes a weight 0.

    Args:
        params: parameters or groups; real, with dense gradients.
        lr: step size, above 0. Weights move by this times the gradient, in relative terms.

    Raises:
        BadSetting: a step size that is not positive, complex parameters, or sparse gradients.
    """

    def __init__(self, params: ParamsT, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own step size."""
        lr = param_group.get("lr", self.defaults["lr"])
        if not lr > 0:
            raise BadSetting(f"lr={lr} must be above 0")
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            raise BadSetting("ExponentiatedGradient takes real parameters: complex ones have no sign to keep")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override, unused-ignore]
        """One step.

        Args:
            closure: evaluates the loss again; None: gradients are there.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = [(p.detach(), p.grad) for p in group["params"] if p.grad is not None]
            if not pairs:
                continue
            if any(grad.layout != torch.strided for _, grad in pairs):
                raise BadSetting("ExponentiatedGradient takes dense gradients: build an embedding with sparse=False")
            weights, grads = map(list, zip(*pairs))
            signs = torch._foreach_sign(weights)
            exponents = torch._foreach_mul(signs, grads)
            torch._foreach_mul_(exponents, -group["lr"])
            torch._foreach_clamp_min_(exponents, -LIMIT)
            torch._foreach_clamp_max_(exponents, LIMIT)
            sizes = torch._foreach_abs(weights)
            torch._foreach_mul_(sizes, torch._foreach_exp(exponents))
            spans = [torch.finfo(w.dtype) for w in weights]
            torch._foreach_clamp_min_(sizes, [span.tiny for span in spans])
            torch._foreach_clamp_max_(sizes, [span.max for span in spans])
            torch._foreach_copy_(weights, torch._foreach_mul(signs, sizes))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved optimizer stood.

        Raises:
            BadCheckpoint: it is one of other parameters.
        """
        refuse_foreign_state(self, state_dict)
        super().load_state_dict(state_dict)
