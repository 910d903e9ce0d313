"""Parameters as one vector: θ ∈ ℝᵈ, in the order of `named_parameters`, tied weights once, frozen ones left out.

θ = concat(vec(W_1), vec(b_1), …). Curvature probes, paths between checkpoints and inverse Fishers all speak of this vector.

>>> import torch
>>> from sfumato.nn import flatten_params, layer_slices, unflatten_params
>>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
>>> theta = flatten_params(net)
>>> theta.shape, layer_slices(net)
(torch.Size([13]), {'0': slice(0, 9, None), '2': slice(9, 13, None)})
>>> unflatten_params(theta, net)["2.weight"].equal(net[2].weight)
True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import overload

import torch
from torch import Tensor, nn

from sfumato.errors import BadData

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


def _tensors(params: Parameters) -> tuple[list[str] | None, list[Tensor]]:
    if isinstance(params, nn.Module):
        params = {name: p for name, p in params.named_parameters() if p.requires_grad}
    if isinstance(params, Mapping):
        return list(params.keys()), list(params.values())
    return None, list(params)


def flatten_params(params: Parameters) -> Tensor:
    """All parameters as one vector, with their graph if they have one.

    Args:
        params: a module (its trainable parameters, tied ones once), a dict of tensors, or a sequence of tensors.

    Returns:
        `[d]`, a copy; mixed types are promoted.
    """
    tensors = _tensors(params)[1]
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.empty(0)


@overload
def unflatten_params(vec: Tensor, like: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]: ...
@overload
def unflatten_params(vec: Tensor, like: Iterable[Tensor]) -> list[Tensor]: ...
def unflatten_params(vec: Tensor, like: Parameters) -> dict[str, Tensor] | list[Tensor]:
    """The inverse of `flatten_params`: cut a vector, or a batch of vectors, into tensors shaped like the parameters.

    Args:
        vec: `[..., d]`.
        like: what was flattened: a module, a dict or a sequence.

    Returns:
        Tensors `[..., *shape]` with the type of each parameter (views where the type is the same), as a dict of names for a
        module or a dict, as a list for a sequence.

    Raises:
        BadData: when `vec` has another length than the parameters together.
    """
    names, tensors = _tensors(like)
    sizes = [t.numel() for t in tensors]
    if vec.shape[-1] != sum(sizes):
        raise BadData(f"a vector of length {vec.shape[-1]} does not fit {sum(sizes)} parameters")
    pieces = [
        piece.reshape(*vec.shape[:-1], *t.shape).to(t.dtype)
        for piece, t in zip(torch.split(vec, sizes, -1), tensors, strict=True)
    ]
    return pieces if names is None else dict(zip(names, pieces, strict=True))


def layer_slices(model: nn.Module | Mapping[str, Tensor]) -> dict[str, slice]:
    """Where each layer lies in the flat vector: `{module name: slice}`, for every module that owns trainable parameters.

    Given parameters by name, those that are trainable. The slices follow one another and cover `[0, d)`; a module's own
    parameters are always neighbours.
    """
    slices: dict[str, slice] = {}
    start = 0
    for name, p in model.items() if isinstance(model, Mapping) else model.named_parameters():
        if not p.requires_grad:
            continue
        layer = name.rpartition(".")[0]
        first = slices[layer].start if layer in slices else start
        start += p.numel()
        slices[layer] = slice(first, start)
    return slices
