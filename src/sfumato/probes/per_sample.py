"""What each sample says by itself: its gradient, and how much a step on one sample moves the output of another.

gᵢ = ∇ℓᵢ(θ), and the neural tangent kernel K(x, x′) = J(x) J(x′)ᵀ with J = ∂f/∂θ (Jacot, Gabriel, Hongler 2018).

>>> import torch
>>> from sfumato.probes import ntk
>>> x = torch.randn(5, 3)
>>> torch.allclose(ntk(torch.nn.Linear(3, 1), x), x @ x.T + 1, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from sfumato.probes.count_sketch import CountSketch
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

    def kernel(a: Tensor, b: Tensor) -> Tensor:  # [n, c, d] each
        return torch.einsum("icd,jcd->ij", a, b) if trace_outputs else torch.einsum("icd,jed->ijce", a, b)

    def blocks(data: Any) -> Iterator[Tensor]:
        return (_rows(part, 2) for part in _jacobians(function, data, chunk))

    with function.at_rest():
        rows = (torch.cat([kernel(a, b) for b in blocks(x1 if x2 is None else x2)], 1) for a in blocks(x1))
        return torch.cat(list(rows))


def tangent_features(
    model: nn.Module,
    x: Tensor | Iterable[Any],
    *,
    sketch: CountSketch | None = None,
    chunk: int | None = None,
    params: Selection = None,
) -> Tensor:
    """The Jacobian of every sample as a row: the features whose inner products are the neural tangent kernel.

    Each sample is differentiated once, where `ntk` does it again for every block of others: cheaper by far, if all rows fit into
    memory. A sketch makes them short, and the kernel then is right on average.

    Args:
        model, x, chunk, params: as of `ntk`; memory of the work is chunk · c · d.
        sketch: of the d weights; None: all of them.

    Returns:
        `[n, c · d]`, or `[n, c · width]`: `f @ f.T` is `ntk(model, x)`, or an estimate of it.

    Raises:
        BadData: a sketch of another number of weights.
    """
    function = FunctionalModel(model, params=params)
    with function.at_rest():
        parts = _jacobians(function, x, chunk)
        return torch.cat([(_rows(p, 2) if sketch is None else sketch.of_parts(p, lead=2)).flatten(1) for p in parts])


def _jacobians(function: FunctionalModel, data: Any, chunk: int | None) -> Iterator[dict[str, Tensor]]:
    """∂f/∂θ of a few samples at a time, tensors `[n, c, *shape]` by name; the model is at rest."""
    theta = function.theta()
    device = next(iter(theta.values())).device

    def outputs(t: dict[str, Tensor], x: Tensor) -> Tensor:
        return function(t, x[None]).reshape(-1)  # [c]

    mapped = vmap(jacrev(outputs), in_dims=(None, 0))
    for x in as_inputs(data, device):
        for part in torch.split(x, chunk or max(1, len(x))):
            yield mapped(theta, part)


def _rows(tensors: dict[str, Tensor], lead: int) -> Tensor:
    """Join tensors `[*lead, *shape]` of all parameters to `[*lead, d]`."""
    return torch.cat([t.reshape(*t.shape[:lead], -1) for t in tensors.values()], -1)
