"""What each sample says by itself: its gradient, and how much a step on one sample moves the output of another.

gᵢ = ∇ℓᵢ(θ), and the neural tangent kernel K(x, x′) = J(x) J(x′)ᵀ with J = ∂f/∂θ (Jacot, Gabriel, Hongler 2018).

>>> import torch
>>> from sfumato.probes import ntk
>>> x = torch.randn(5, 3)
>>> torch.allclose(ntk(torch.nn.Linear(3, 1), x), x @ x.T + 1, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from sfumato.probes.functional_model import Data, FunctionalModel, Selection, as_batches, as_inputs
from sfumato.probes.operators import LossFunction


def per_sample_grads(
    model: nn.Module, loss: LossFunction, data: Data, *, chunk: int | None = None, params: Selection = None
) -> Tensor:
    """The gradient of every sample's own loss, never of a batch mean.

    Args:
        model: any module, in eval mode here.
        loss: `(outputs, targets) -> scalar`, called with batches of one.
        data: a pair (inputs, targets), a list of pairs, or a DataLoader.
        chunk: samples worked on at once; None: a batch of the data.
        params: names of parameters, or a predicate on names; None: all trainable ones.

    Returns:
        `[n, d]`, samples in the order of the data.
    """
    function = FunctionalModel(model, params=params)

    def one(t: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(function(t, x[None]), y[None])

    with function.at_rest():
        theta = function.theta()
        device = next(iter(theta.values())).device
        mapped = vmap(grad(one), in_dims=(None, 0, 0), chunk_size=chunk)
        return torch.cat([_rows(mapped(theta, x, y), 1) for x, y in as_batches(data, device)])


def ntk(
    model: nn.Module,
    x1: Tensor | Iterable[Any],
    x2: Tensor | Iterable[Any] | None = None,
    *,
    trace_outputs: bool = True,
    chunk: int | None = None,
    params: Selection = None,
) -> Tensor:
    """The empirical neural tangent kernel of a module at its present weights.

    Args:
        model: gives `[n, c]` (or `[n]`) from `[n, ...]`; in eval mode here.
        x1: inputs `[n1, ...]`, or a list of batches of them.
        x2: inputs `[n2, ...]`; None: `x1`.
        trace_outputs: sum over outputs, K = Σ_c J_c(x) J_c(x′)ᵀ; else all pairs of outputs.
        chunk: samples worked on at once; memory 2 · chunk · c · d. None: a batch of the data.
        params: names of parameters, or a predicate on names; None: all trainable ones.

    Returns:
        `[n1, n2]`, or `[n1, n2, c, c]`.
    """
    function = FunctionalModel(model, params=params)

    def outputs(t: dict[str, Tensor], x: Tensor) -> Tensor:
        return function(t, x[None]).reshape(-1)  # [c]

    def kernel(a: Tensor, b: Tensor) -> Tensor:  # [n, c, d] each
        return torch.einsum("icd,jcd->ij", a, b) if trace_outputs else torch.einsum("icd,jed->ijce", a, b)

    with function.at_rest():
        theta = function.theta()
        device = next(iter(theta.values())).device
        mapped = vmap(jacrev(outputs), in_dims=(None, 0))

        def blocks(data: Any) -> Iterable[Tensor]:
            for x in as_inputs(data, device):
                for part in torch.split(x, chunk or max(1, len(x))):
                    yield _rows(mapped(theta, part), 2)

        rows = (torch.cat([kernel(a, b) for b in blocks(x1 if x2 is None else x2)], 1) for a in blocks(x1))
        return torch.cat(list(rows))


def _rows(tensors: dict[str, Tensor], lead: int) -> Tensor:
    """Join tensors `[*lead, *shape]` of all parameters to `[*lead, d]`."""
    return torch.cat([t.reshape(*t.shape[:lead], -1) for t in tensors.values()], -1)
