"""AdaHessian: Adam with curvature in the denominator (Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, AAAI 2021, Algorithm 1).

One random sign vector z a step gives z ⊙ Hz, an unbiased estimate of the Hessian's diagonal; averaged inside blocks it becomes
D, and θ ← θ − lr·( m̂ / (√v̂)ᵏ + wd·θ ) with m the running mean of gradients and v that of D².

The closure returns the loss and does *not* call `backward`: the optimizer differentiates twice by itself.

>>> import torch
>>> from sfumato.optim import AdaHessian
>>> curvature = torch.tensor([1.0, 1e6])  # badly scaled: gradient descent would crawl
>>> theta = torch.nn.Parameter(torch.ones(2))
>>> optimizer = AdaHessian([theta], eps=0.0)
>>> for _ in range(200):
...     loss = optimizer.step(lambda: (curvature * theta.square()).sum() / 2)
>>> bool(theta.abs().max() < 1e-3)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from sfumato.errors import BadData, BadSetting
from sfumato.nn.flat import unflatten_params
from sfumato.optim.foreign_state import refuse_foreign_state

__all__ = ["AdaHessian", "spatial_average"]

Block = Literal["conv"] | int | None


def spatial_average(d: Tensor, shape: Sequence[int], block: Block) -> Tensor:
    """Average the diagonal of a Hessian inside the blocks of one parameter, and give every entry its block's mean.

    Args:
        d: the diagonal (or its absolute value), with `prod(shape)` entries.
        shape: the parameter's shape.
        block: `"conv"`: all dimensions from the third on, so one mean for each kernel of a convolution, nothing for vectors and
            matrices; `n`: runs of `n` entries of the flattened tensor (the last may be shorter), nothing for vectors;
            None: no averaging.

    Returns:
        A tensor like `d`; `d` itself where there is nothing to average.

    Reference: Yao et al. 2021, section 3.2; the official code's rule for convolutions (`"conv"`) and Transformers (`n`).
    """
    if block == "conv":
        if math.prod(shape[2:]) == 1:
            return d
        kernels = d.reshape(tuple(shape))
        means = kernels.mean(tuple(range(2, len(shape))), keepdim=True)
        return torch.empty_like(kernels).copy_(means).reshape(d.shape)
    if block is None or block == 1 or len(shape) < 2:
        return d
    flat = d.reshape(-1)
    whole = len(flat) // block * block
    averaged = torch.empty_like(flat)
    averaged[:whole].view(-1, block).copy_(flat[:whole].view(-1, block).mean(1, keepdim=True))
    if whole < len(flat):
        averaged[whole:] = flat[whole:].mean()
    return averaged.reshape(d.shape)


class AdaHessian(Optimizer):
    """Adaptive steps from a stochastic estimate of the Hessian's diagonal.

    `step` takes the loss in one of three ways, and always leaves plain gradients, without a graph, in `.grad`:

    - `step(closure)` with `closure()` returning the loss, without `backward` (or after `backward(create_graph=True)`);
    - `step(closure)` with a method `closure.hvp(z) -> (loss, [Hz])` that also fills `.grad`, as the training engine gives: right
      for micro-batches and several processes;
    - `loss.backward(create_graph=True)`, then `step()`.

    Inside the first two, attention runs through the kernel that has second derivatives.

    Args:
        params: parameters or parameter groups; `lr`, `betas`, `eps`, `weight_decay`, `hessian_power`, `block` may differ.
        lr: step size, read at every step, so any scheduler works.
        betas: decay of the running means of the gradient and of the squared curvature, in [0, 1).
        eps: added to the denominator. Not only a guard: units with zero curvature (dead ReLUs) move by `lr·m̂/eps`.
        weight_decay: decoupled decay, multiplied by `lr`. (The official script divides its argument by `lr` first.)
        hessian_power: k in [0, 1]: 1 is a diagonal Newton step, 0 gradient descent.
        block: see `spatial_average`.
        samples: sign vectors a curvature step; their estimates are averaged.
        hessian_every: curvature every that many steps; between them only the gradient is computed and v stays as it is. A
            parameter that joins later waits for its first curvature.
        average: `"abs"`: mean of |D| in a block, as the official code; `"signed"`: mean of D, as the paper's formula.
        noise: `[T, d]` of ±1, used row by row instead of random signs (d: all trainable parameters, in the order of the groups).
        generator: seeds the signs, here and now. They depend on nothing but this seed and the number of curvature steps, so they
            are the same in every process and after a resume. None: seed 0.

    Raises:
        BadSetting: on values out of range, complex or sparse parameters, or a gradient without a graph.

    Reference: Yao et al., "AdaHessian: An Adaptive Second Order Optimizer for Machine Learning", 2021.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        block: Block = "conv",
        samples: int = 1,
        hessian_every: int = 1,
        average: Literal["abs", "signed"] = "abs",
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if samples < 1 or hessian_every < 1:
            raise BadSetting(f"samples={samples} and hessian_every={hessian_every} must be at least 1")
        if average not in ("abs", "signed"):
            raise BadSetting(f"average={average!r} must be 'abs' or 'signed'")
        self.samples, self.hessian_every, self.average, self.noise = samples, hessian_every, average, noise
        seed = int(torch.randint(2**31, (), generator=generator)) if generator else 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "hessian_power": hessian_power}
        super().__init__(params, {**defaults, "block": block, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings; checks both."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        ranges = {
            "lr": group["lr"] >= 0,
            "betas": all(0 <= b < 1 for b in group["betas"]),
            "eps": group["eps"] >= 0,
            "weight_decay": group["weight_decay"] >= 0,
            "hessian_power": 0 <= group["hessian_power"] <= 1,
            "block": group["block"] in ("conv", None) or (isinstance(group["block"], int) and group["block"] > 0),
        }
        for name, fits in ranges.items():
            if not fits:
                raise BadSetting(f"AdaHessian: {name}={group[name]!r} is out of range")
        for p in group["params"]:
            if p.is_complex() or p.layout is not torch.strided:
                raise BadSetting("AdaHessian takes real, dense parameters; give complex or sparse ones to another optimizer")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns what the closure returned, or None without a closure."""
        params: list[Tensor] = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise BadSetting("AdaHessian has nothing to train: every parameter has requires_grad=False")
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=0, hessian_step=0, exp_avg=torch.zeros_like(p), exp_hessian_sq=torch.zeros_like(p))
        due = max(self.state[p]["step"] for p in params) % self.hessian_every == 0
        draws = max(self.state[p]["hessian_step"] for p in params) * self.samples
        signs = [self._signs(params, draws + s) for s in range(self.samples)] if due else []
        if hasattr(closure, "hvp"):
            loss, products = _through_hvp(closure, signs)
        else:
            loss, products = _through_graph(closure, params, signs)
        curvature = dict(zip(params, _diagonal(signs, products), strict=True)) if due else {}
        del signs, products  # two copies of the weights less while they are updated
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            self._update(group, [p for p in with_grad if due or self.state[p]["hessian_step"]], curvature)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved optimizer stood.

        Raises:
            BadCheckpoint: it is one of other parameters.
        """
        refuse_foreign_state(self, state_dict)
        super().load_state_dict(state_dict)

    def _signs(self, params: list[Tensor], draw: int) -> list[Tensor]:
        first = params[0]
        if self.noise is not None:
            if draw >= len(self.noise):
                raise BadData(f"noise has {len(self.noise)} rows of signs, and step {draw + 1} needs one more")
            flat = self.noise[draw].to(first.device)
        else:
            seed = self.param_groups[0]["seed"] + draw * 0x9E3779B1  # odd: no two draws share the 32 bits that a CPU seed has
            generator = torch.Generator(first.device).manual_seed(seed % 2**32)
            count = sum(p.numel() for p in params)
            flat = torch.randint(2, (count,), generator=generator, device=first.device, dtype=first.dtype).mul_(2).sub_(1)
        return [z.to(p.device) for z, p in zip(unflatten_params(flat, params), params, strict=True)]

    def _update(self, group: dict[str, Any], params: list[Tensor], curvature: dict[Tensor, Tensor]) -> None:
        """Equations of the module's head for one group, in fused passes over all of its parameters."""
        if not params:
            return
        beta1, beta2 = group["betas"]
        lr, k = group["lr"], group["hessian_power"]
        states = [self.state[p] for p in params]
        m, v = [s["exp_avg"] for s in states], [s["exp_hessian_sq"] for s in states]
        torch._foreach_lerp_(m, [p.grad for p in params if p.grad is not None], 1 - beta1)
        if curvature:
            diagonal = [curvature[p] for p in params]
            diagonal = list(torch._foreach_abs(diagonal)) if self.average == "abs" else diagonal
            diagonal = [spatial_average(d, p.shape, group["block"]) for d, p in zip(diagonal, params, strict=True)]
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, diagonal, diagonal, value=1 - beta2)
        for state in states:
            state["step"] += 1
            state["hessian_step"] += bool(curvature)
        # m̂ / ((√v)ᵏ/c + ε) = c·m̂ / ((√v)ᵏ + c·ε): one pass less over the weights.
        c = [(1 - beta2 ** s["hessian_step"]) ** (k / 2) for s in states]
        denominator = torch._foreach_sqrt(v) if k == 1 else torch._foreach_pow(v, k / 2)
        torch._foreach_add_(denominator, [ci * group["eps"] for ci in c])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        sizes = [-lr * ci / (1 - beta1 ** s["step"]) for ci, s in zip(c, states, strict=True)]
        torch._foreach_addcdiv_(params, m, denominator, sizes)


def _through_hvp(closure: Any, signs: list[list[Tensor]]) -> tuple[Any, list[list[Tensor]]]:
    """Loss and products from a closure that makes them itself."""
    if not signs:
        return closure(), []
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        results = [closure.hvp(z) for z in signs]
    return results[-1][0], [list(products) for _, products in results]


def _through_graph(
    closure: Callable[[], Any] | None, params: list[Tensor], signs: list[list[Tensor]]
) -> tuple[Any, list[list[Tensor]]]:
    """Loss and products by differentiating twice; leaves plain gradients in `.grad`."""
    loss, ours = None, False
    if closure is not None:
        for p in params:
            p.grad = None
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if signs else nullcontext():
            loss = closure()
            ours = all(p.grad is None for p in params)
            if ours:
                _backward(loss, params, create_graph=bool(signs))
    try:
        return loss, _products(params, signs, may_be_constant=ours)
    finally:
        for p in params:
            p.grad = None if p.grad is None else p.grad.detach()  # a graph in .grad holds its parameter: never freed


def _backward(loss: Any, params: list[Tensor], create_graph: bool) -> None:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise BadSetting("the closure given to AdaHessian.step must return the loss, a scalar tensor with its graph")
    grads = grad(loss, params, create_graph=create_graph, materialize_grads=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def _products(params: list[Tensor], signs: list[list[Tensor]], may_be_constant: bool) -> list[list[Tensor]]:
    """Hz for every z: one backward pass each through the graph of the gradients. A constant gradient has Hz = 0."""
    grads = [p.grad for p in params]
    if any(g is not None and g.is_sparse for g in grads):
        raise BadSetting("AdaHessian cannot use sparse gradients: build the embedding with sparse=False")
    active = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
    if signs and not active and not may_be_constant and any(g is not None for g in grads):
        raise BadSetting(
            "AdaHessian needs second derivatives: call loss.backward(create_graph=True) before step(), "
            "or step(closure) with a closure that only returns the loss"
        )
    if not active:
        return [[torch.zeros_like(p) for p in params] for _ in signs]
    outputs: list[Tensor] = [grads[i] for i in active]  # type: ignore[misc]
    products = []
    for z in signs:
        along = [z[i] for i in active]
        try:
            hz = grad(outputs, params, along, retain_graph=z is not signs[-1], materialize_grads=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise BadSetting(
                f"a layer has no second derivative ({error}); where that is fused attention, call step(closure) "
                "or run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            ) from error
        products.append(list(hz))
    return products


def _diagonal(signs: list[list[Tensor]], products: list[list[Tensor]]) -> list[Tensor]:
    """The mean of z ⊙ Hz over the sign vectors."""
    total = torch._foreach_mul(products[0], signs[0])
    for z, hz in zip(signs[1:], products[1:], strict=True):
        torch._foreach_addcmul_(total, hz, z)
    if len(signs) > 1:
        torch._foreach_div_(total, len(signs))
    return list(total)
