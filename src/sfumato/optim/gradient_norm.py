"""Keep the gradient of some function of the network short while training on another: two more passes, no second derivative.

    ∇‖g(w)‖ ≈ (g(w + r g/‖g‖) − g(w)) / r,     step along  ∇L + λ ρ ∇‖g‖,     λ ← λ + η (ρ ‖g‖ − ε)

With g the gradient of the mean output it is IGNITE: the output moves little when weights do. With g = ∇L it is a penalty on the
norm of the loss's gradient.

Sources: Dao, Nguyen, Truong, Hoang, "Incorporating Surrogate Gradient Norm to Improve Offline Optimization Techniques",
NeurIPS 2024, section 3; Zhao, Zhang, Hu, "Penalizing Gradient Norm for Efficiently Improving Generalization", ICML 2022.

>>> import torch
>>> from sfumato.optim import SurrogateSharpness
>>> w = torch.nn.Parameter(torch.tensor([1.0]))
>>> optimizer = SurrogateSharpness(torch.optim.SGD([w], lr=0.1), rho=0.5, lam=1.0, lam_lr=1.0, eps=0.1)
>>> def closure(fn):
...     def call():
...         optimizer.zero_grad()
...         value = fn(w).sum()
...         value.backward()
...         return value
...     return call
>>> loss = optimizer.step(closure(torch.sin), closure(torch.square))  # cos 1 + 0.5 · (2w)′ = 1.54, times 0.1
>>> round(w.item(), 3), round(optimizer.lam.item(), 3)
(0.846, 1.9)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato.errors import BadSetting
from sfumato.optim.foreign_state import refuse_foreign_state


@torch.no_grad()
def gradient_norm_penalty(closure: Callable[[], Any], params: Iterable[Tensor], r: float) -> tuple[Tensor, list[Tensor]]:
    """The norm of a function's gradient, and the gradient of that norm by a finite difference along itself.

    Batch statistics must not be updated by the closure: put such layers into eval mode inside it.

    Args:
        closure: clears gradients, calls `backward` and so fills `.grad`; called twice, at `params` and a step of length r away.
        params: what to differentiate by; afterwards they are bit for bit as before. Those without a gradient are left out.
        r: length of the step, positive.

    Returns:
        The norm over all parameters (scalar), and one tensor a parameter; exactly 0 where the gradient is 0 or constant.

    Raises:
        BadSetting: r is not positive.
    """
    if r <= 0:
        raise BadSetting(f"r={r:g} is the length of a step and must be positive")
    params, call = list(params), torch.enable_grad()(closure)
    call()
    moved = [p for p in params if p.grad is not None]
    gradient = [p.grad.clone() for p in moved if p.grad is not None]
    if not moved:
        return torch.zeros(()), [torch.zeros_like(p) for p in params]
    norm = torch.stack(torch._foreach_norm(gradient)).norm()
    before = [p.clone() for p in moved]
    torch._foreach_add_(moved, torch._foreach_mul(gradient, torch.where(norm > 0, r / norm, 0.0)))
    call()
    torch._foreach_copy_(moved, before)
    there = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
    slope = dict(zip(moved, torch._foreach_div(torch._foreach_sub(there, gradient), r)))
    return norm, [slope.get(p, torch.zeros_like(p)) for p in params]


class SurrogateSharpness(Optimizer):
    """Any optimizer, with a bound on the gradient norm of a second function.

    It shares parameter groups and state with the optimizer that it wraps: schedulers, checkpoints and added groups work as if it
    were that one. The multiplier λ is in its first group, under `"lam"`.

    Args:
        base_optimizer: takes the step.
        rho: radius of the weight perturbation, ρ.
        r: length of the finite difference.
        lam: first value of the multiplier λ.
        eps: ε, what ρ‖g‖ is to stay below.
        lam_lr: step size η of the multiplier; 0 keeps it constant (IGNITE-2).
        clip: keep λ at 0 or above (our choice; the official code lets it become negative).

    Raises:
        BadSetting: rho, lam_lr negative or r not positive.

    Reference: Dao et al. 2024; defaults are those of the official scripts.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        r: float = 0.05,
        lam: float = 1e-3,
        eps: float = 0.1,
        lam_lr: float = 1e-3,
        clip: bool = True,
    ) -> None:
        if rho < 0 or lam_lr < 0 or r <= 0:
            raise BadSetting(f"rho={rho:g} and lam_lr={lam_lr:g} are at least 0, r={r:g} is positive")
        self.base, self.rho, self.r, self.eps, self.lam_lr, self.clip = base_optimizer, rho, r, eps, lam_lr, clip
        self.norm: Tensor | None = None
        """‖g‖ at the last step, before it."""
        super().__init__(base_optimizer.param_groups, dict(base_optimizer.defaults))
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state
        first = self.param_groups[0]["params"][0]
        dtype = torch.promote_types(first.dtype, torch.float32)  # in bfloat16 its small steps would be lost
        self.param_groups[0]["lam"] = torch.tensor(lam, dtype=dtype, device=first.device)

    @property
    def lam(self) -> Tensor:
        """The multiplier λ, a scalar."""
        lam: Tensor = self.param_groups[0]["lam"]
        return lam

    @torch.no_grad()
    def step(self, loss: Callable[[], Any], output: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            loss: clears gradients, calls `backward` on the loss and returns it.
            output: the same for the function whose gradient is to stay short; None: the loss itself.

        Returns:
            What `loss` returned.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        value = torch.enable_grad()(loss)()
        held = {p: p.grad.clone() for p in params if p.grad is not None}
        self.norm, penalty = gradient_norm_penalty(output or loss, params, self.r)
        moved = [p for p in params if p in held or p.grad is not None]
        if not moved:
            raise BadSetting("the closures given to SurrogateSharpness.step must call backward(): there is no gradient")
        slopes = dict(zip(params, penalty))
        total = [held.get(p, torch.zeros_like(p)) for p in moved]
        torch._foreach_add_(total, torch._foreach_mul([slopes[p] for p in moved], self.lam * self.rho))
        for p, g in zip(moved, total):
            p.grad = g
        self.base.step()
        if self.lam_lr:
            self.lam.add_(self.lam_lr * (self.rho * self.norm - self.eps))
            if self.clip:
                self.lam.clamp_(min=0)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{k: v for k, v in vars(self).items() if k not in ("state", "param_groups")}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved optimizer stood.

        Raises:
            BadCheckpoint: it is one of other parameters.
        """
        refuse_foreign_state(self, state_dict)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = [group["lam"] for group in vars(self).get("param_groups", [])[:1]]
        super().__setstate__(state)
        first = self.param_groups[0]
        (lam,) = [first["lam"]] if "lam" in first else before  # the state of the base optimizer alone has none
        first["lam"] = lam.to(first["params"][0].device)  # torch moves state, not settings
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
