"""What an optimizer's `step` is handed: torch's closure, callable again with the same noise, extended by `hvp(z)`.

A call leaves in every `.grad` the gradient of the weighted mean over micro-batches and processes,

    g = sum_m w_m grad l_m / sum_m w_m,

and returns that mean loss. Each micro-batch draws from generators keyed by (seed, step, phase, global micro-batch), so calling
twice gives the same bits: what SAM, L-BFGS and AdaHessian need, and what makes 2 processes equal 1 process that accumulates 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.engine.randomness import key, seed_everything
from sfumato.errors import Diverged
from sfumato.method import Batch, Context, Loss, LossFunction


class Objective:
    """A loss over the micro-batches of one step, as a closure.

    Args:
        loss: the method's loss function.
        batches: this process's micro-batches.
        params: the parameters that the optimizer holds; only their `.grad` is touched (a GAN's G step leaves D's alone).
        accelerator: accelerate's `Accelerator`: precision, world size, reduction.
        phase: number of the `yield` within the step.
        clip_norm: largest gradient norm, or None.
        check: refuse a loss that is not finite (costs a synchronisation on a GPU).
    """

    def __init__(
        self,
        loss: LossFunction,
        batches: Sequence[Batch],
        ctx: Context,
        params: list[nn.Parameter],
        accelerator: Any,
        *,
        phase: int = 0,
        clip_norm: float | None = None,
        check: bool = True,
    ) -> None:
        self.loss, self.batches, self.ctx, self.params = loss, batches, ctx, params
        self.accelerator, self.phase, self.clip_norm, self.check = accelerator, phase, clip_norm, check
        self.logs: dict[str, Tensor] = {}

    def __call__(self) -> Tensor:
        """The mean loss; its gradient is in `.grad`."""
        return self._run(self._gradient)[0]

    def hvp(self, z: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The mean loss and its Hessian times `z` (one tensor a parameter); its gradient is in `.grad`."""
        products = [torch.zeros_like(p) for p in self.params]

        def gradient_and_product(value: Tensor) -> None:
            grads = torch.autograd.grad(value, self.params, create_graph=True, materialize_grads=True)
            torch._foreach_add_(products, torch.autograd.grad(grads, self.params, z, materialize_grads=True))
            for p, g in zip(self.params, grads):
                p.grad = g.detach() if p.grad is None else p.grad.add_(g.detach())

        return self._run(gradient_and_product, products)

    def _gradient(self, value: Tensor) -> None:
        value.backward(inputs=self.params)

    @torch.enable_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def _run(self, differentiate: Callable[[Tensor], None], products: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        world, ctx = self.accelerator.num_processes, self.ctx
        alone = world * len(self.batches) == 1
        for p in self.params:
            p.grad = None
        total: Any = 0.0
        weights: Any = 0.0
        logs: dict[str, Any] = {}
        for i, batch in enumerate(self.batches):  # one micro-batch's graph is alive at a time
            seed = key(ctx.seed, ctx.step, self.phase, i * world + self.accelerator.process_index)
            seed_everything(seed, ctx.generator.device)
            ctx.generator.manual_seed(seed)
            with self.accelerator.autocast():
                loss = Loss(*self.loss(batch, ctx))
            weight = 1.0 if alone else loss.weight
            differentiate(loss.value if alone else loss.value * weight)
            total, weights = total + loss.value.detach() * weight, weights + weight
            for name, value in loss.logs.items():
                logs[name] = logs.get(name, 0.0) + value.detach() * weight
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        values = [total, *logs.values()]
        if not alone:
            grads = [p.grad for p in self.params if p.grad is not None]
            weight = torch.as_tensor(weights, dtype=torch.float32, device=total.device)
            weight, *sums = self._sum_over_processes([weight, *values, *grads, *products])
            torch._foreach_div_(sums, weight)
            values, sums = sums[: len(values)], sums[len(values) :]
            products = sums[len(grads) :]
            for p, g in zip(self.params, sums):
                p.grad = g
        self.logs = dict(zip(logs, values[1:]))
        if self.check and not torch.isfinite(values[0]):
            rows = [int(i) for b in self.batches for i in b.index[:8]]
            raise Diverged(f"the loss is {float(values[0])} at step {ctx.step} (samples {rows} ...); lower the learning rate")
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.params, self.clip_norm)
        return values[0], list(products)

    def _sum_over_processes(self, tensors: list[Tensor]) -> list[Tensor]:
        """One reduction for all of them."""
        if self.accelerator.num_processes == 1:
            return tensors
        wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = self.accelerator.reduce(torch.cat([t.reshape(-1).to(wide) for t in tensors]), "sum")
        parts = flat.split([t.numel() for t in tensors])
        return [p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors)]
