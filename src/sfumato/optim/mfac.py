"""M-FAC: natural gradient steps from the last m gradients (Frantar, Kurtic, Alistarh, NeurIPS 2021, Section 3.2).

    θ ← θ − lr · F⁻¹g,    F = λI + (1/m) Σ gᵢ gᵢᵀ over the last m mini-batch gradients, the newest g among them.

With λ = 1e-5 the first step is about m/‖g‖² times g, not g: learning rates are those of a second-order method. Memory: m times
that of the weights; a step costs two passes over it.

>>> import torch
>>> from sfumato.optim import MFAC
>>> theta = torch.nn.Parameter(torch.ones(2))
>>> optimizer = MFAC([theta], lr=1.0, ngrads=4)
>>> theta.grad = torch.tensor([100.0, 0.0])
>>> optimizer.step()
>>> theta.data  # F⁻¹g = g / (λ + ‖g‖² / m)
tensor([0.9600, 1.0000])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato.errors import BadCheckpoint, BadData, BadSetting, Diverged
from sfumato.nn.flat import unflatten_params
from sfumato.optim.foreign_state import refuse_foreign_state
from sfumato.optim.inverse_fisher import SlidingInverseFisher

__all__ = ["MFAC"]

SHARED = ("ngrads", "damp", "sparse", "grad_dtype")
"""Settings of the one window that serves all parameter groups."""

WINDOW = ("grads", "gram")
"""Tensors of the window, in the state of its first parameter."""


class MFAC(Optimizer):
    """The gradient times an inverse empirical Fisher matrix over all parameters together.

    Parameters may join, freeze and thaw: their part of earlier gradients counts as zero, and that of frozen ones is dropped.

    Args:
        params: parameters or parameter groups; `lr`, `momentum`, `weight_decay` may differ between groups, the others not.
        lr: step size, read at every step, so any scheduler works. The default goes with `damp=1e-5`.
        momentum: μ in [0, 1): v ← μ v + (1 − μ) F⁻¹g is subtracted in place of F⁻¹g.
        weight_decay: added to the gradient as `weight_decay·θ`, before it enters the window.
        ngrads: m, gradients kept. Also the divisor, from the first step on.
        damp: λ, positive. May change while training, in all groups alike.
        sparse: weights that are exactly 0 now stay 0, and take no place in the window.
        grad_dtype: what gradients are stored in: "bfloat16", "float32" or "float64" (or the torch type); None: that of the
            parameters, at least float32.

    Raises:
        BadSetting: on values out of range, groups that disagree about the window, complex or sparse parameters or gradients, or
            a window that does not fit into memory (at the first step).
        Diverged: a gradient is not finite; weights and window are left as they were.

    Reference: Frantar et al., "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", 2021.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        ngrads: int = 1024,
        damp: float = 1e-5,
        sparse: bool = False,
        grad_dtype: str | torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ngrads": ngrads, "damp": damp}
        kept = None if grad_dtype is None else str(grad_dtype).removeprefix("torch.")  # a state holds no torch types
        super().__init__(params, {**defaults, "sparse": sparse, "grad_dtype": kept})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings; checks both."""
        super().add_param_group(param_group)
        first, group = self.param_groups[0], self.param_groups[-1]
        ranges = {
            "lr": group["lr"] >= 0,
            "momentum": 0 <= group["momentum"] < 1,
            "weight_decay": group["weight_decay"] >= 0,
            "ngrads": group["ngrads"] >= 1,
            "damp": group["damp"] > 0,
            "grad_dtype": group["grad_dtype"] in (None, "bfloat16", "float32", "float64"),
        }
        for name, fits in ranges.items():
            if not fits:
                raise BadSetting(f"MFAC: {name}={group[name]!r} is out of range")
        for name in SHARED:
            if group[name] != first[name]:
                raise BadSetting(f"MFAC keeps one window for all groups: {name}={group[name]!r} must be {first[name]!r}")
        for p in group["params"]:
            if p.is_complex() or p.layout is not torch.strided:
                raise BadSetting("MFAC takes real, dense parameters; give complex or sparse ones to another optimizer")
            if group["sparse"]:
                self.state[p]["removed"] = p.detach() == 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, on the gradients in `.grad` or on those that the closure leaves there. Returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[Tensor] = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise BadSetting("MFAC has nothing to train: every parameter has requires_grad=False")
        grads = self._gradients()
        if not grads:
            return loss
        window = self._window(params)
        pieces = [grads[p] if p in grads else torch.zeros_like(p) for p in params]
        flat = torch.cat([piece.reshape(-1).to(window.grads.device) for piece in pieces])
        kept = self._kept(params)
        try:
            update = window.update_mul(flat if kept is None else flat[kept])
        except BadData as error:
            raise self._diverged(window.count + 1, error) from None
        self.state[params[0]]["step"] = window.count
        if kept is not None:
            update = torch.zeros_like(flat, dtype=update.dtype).masked_scatter_(kept, update)
        self._apply(dict(zip(params, unflatten_params(update, params), strict=True)))
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        """The gradients that are there, decayed."""
        found: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            grads = [p.grad for p in params]
            if any(g.layout is not torch.strided for g in grads):
                raise BadSetting("MFAC cannot use sparse gradients: build the embedding with sparse=False")
            if group["weight_decay"] and params:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            found.update(zip(params, grads, strict=True))
        return found

    def _kept(self, params: list[Tensor]) -> Tensor | None:
        """Which entries of the flat gradient are in the window `[d]`; None: all."""
        if not self.param_groups[0]["sparse"]:
            return None
        return torch.cat([~self.state[p]["removed"].reshape(-1).to(params[0].device) for p in params])

    def _window(self, params: list[Tensor]) -> SlidingInverseFisher:
        """The window, laid out for these parameters."""
        damp = self.param_groups[0]["damp"]
        laid_out = {p for p, state in self.state.items() if "span" in state}
        state = self.state[params[0]]
        if "grads" not in state or laid_out != set(params):
            self._lay_out(params)
        return SlidingInverseFisher.over(state["grads"], state["gram"], state["step"], damp=damp)

    def _lay_out(self, params: list[Tensor]) -> None:
        """Give every parameter its columns of a new window, and move there what earlier gradients said of it."""
        settings, spans, end, widest = self.param_groups[0], {}, 0, torch.float32
        for p in params:
            start, end = end, end + (int((~self.state[p]["removed"]).sum()) if settings["sparse"] else p.numel())
            spans[p], widest = [start, end], torch.promote_types(widest, p.dtype)
        if end == 0:
            raise BadSetting("MFAC(sparse=True) has nothing to train: every weight is zero")
        dtype = getattr(torch, settings["grad_dtype"]) if settings["grad_dtype"] else widest
        window = SlidingInverseFisher(settings["ngrads"], end, damp=settings["damp"], dtype=dtype, device=params[0].device)
        before = {p: state.pop("span") for p, state in self.state.items() if "span" in state}
        old = next((state for state in self.state.values() if "grads" in state), None)
        if old is not None:
            for p in spans.keys() & before.keys():
                window.grads[:, slice(*spans[p])] = old["grads"][:, slice(*before[p])]
            window.refresh(old["step"])
            for key in (*WINDOW, "step"):
                del old[key]
        for p, span in spans.items():
            self.state[p]["span"] = span
        self.state[params[0]].update(grads=window.grads, gram=window.gram, step=window.count)

    def _apply(self, updates: dict[Tensor, Tensor]) -> None:
        """θ ← θ − lr·u, or − lr·v, for every parameter with a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            if not params:
                continue
            chosen = [updates[p].to(p.device) for p in params]
            if group["momentum"]:
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, chosen, 1 - group["momentum"])
                chosen = buffers
            torch._foreach_add_(params, chosen, alpha=-group["lr"])

    def _diverged(self, step: int, error: BadData) -> Diverged:
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.requires_grad and p.grad is not None and not bool(p.grad.isfinite().all()):
                    named = "param_names" in group
                    name = group["param_names"][i] if named else f"parameter {i} of group {number}, shape {tuple(p.shape)},"
                    return Diverged(f"the gradient of {name} is not finite at step {step}; lower the learning rate or clip it")
        return Diverged(f"{error}, at step {step}; lower the learning rate or clip gradients")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved optimizer stood, with its settings and its window.

        The window's types are its own: torch would cast them to those of the parameters.

        Raises:
            BadCheckpoint: it is one of other parameters.
        """
        refuse_foreign_state(self, state_dict)
        saved = state_dict["state"]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            state = saved.get(i, {})
            start, end = state.get("span", (0, 0))
            if "span" in state and end - start != int((~state["removed"]).sum() if "removed" in state else p.numel()):
                raise BadCheckpoint(f"the saved window is of other parameters: {end - start} columns for one of {list(p.shape)}")
        light = {i: {k: v for k, v in state.items() if k not in WINDOW} for i, state in saved.items()}
        super().load_state_dict({**state_dict, "state": light})
        for i, p in zip(numbers, params, strict=True):
            for key in WINDOW:
                if key in saved.get(i, {}):
                    self.state[p][key] = saved[i][key].to(p.device, copy=True)
            if "removed" in self.state[p]:
                self.state[p]["removed"] = self.state[p]["removed"].bool()
