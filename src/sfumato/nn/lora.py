"""Low-rank changes of frozen weights: a large network learns by a few small matrices.

    W' = W + (alpha / r) B A,    A [r, in · k · k] random,  B [out, r] zero at first,  only A and B are trained

The weights stay `module.weight` for whoever looks: torch's parametrisation adds the change to them.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

>>> import torch
>>> from sfumato.nn import add_lora
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv2d(1, 8, 3))
>>> x = torch.ones(1, 8)
>>> before = net[0](x)
>>> trained = add_lora(net, rank=2)
>>> torch.equal(net[0](x), before), sum(p.numel() for p in trained), sum(p.requires_grad for p in net.parameters())
(True, 66, 4)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sfumato.errors import BadSetting


class LowRank(nn.Module):
    """A parametrisation: the weight plus a matrix of low rank, in the weight's shape.

    Args:
        weight: `[out, in, ...]`, what it will be added to.
        rank: r, columns of B.
        alpha: the change is multiplied by alpha / r.
        generator: source of the draws of A.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.scale = alpha / rank
        self.A, self.B = nn.Parameter(weight.new_empty(rank, columns)), nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + self.scale * (self.B @ self.A).view_as(weight)


def add_lora(
    module: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freeze a network and give its layers low-rank changes, in place; at first it computes what it did.

    Args:
        module: changed in place.
        rank: of the changes.
        alpha: they are multiplied by alpha / rank; None: by 1.
        kinds: classes of layers that get one, for their `weight`.
        generator: source of the draws.

    Returns:
        What there is to train. `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` makes a change permanent.

    Raises:
        BadSetting: a rank below 1, or no such layers.
    """
    if rank < 1:
        raise BadSetting(f"rank={rank}: a low-rank change needs 1 at least")
    layers: list[Any] = [m for m in module.modules() if isinstance(m, kinds) and not parametrize.is_parametrized(m)]
    if not layers:
        raise BadSetting(f"{type(module).__name__} has no layers of {', '.join(k.__name__ for k in kinds)} to change")
    module.requires_grad_(False)
    changes = [LowRank(m.weight, rank, rank if alpha is None else alpha, generator=generator) for m in layers]
    for layer, change in zip(layers, changes, strict=True):
        parametrize.register_parametrization(layer, "weight", change)
    return [p for change in changes for p in change.parameters()]
