"""Sparse convolutional networks: visible tiles alone against the dense network with zeros put into the holes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Heat, Run, race
from sfumato.masks import random_mask
from sfumato.nn import sparsify, visible_forward


def stage(kind: str, channels: int) -> nn.Module:
    """Two blocks of a timm network at one resolution, with the same weights every time."""
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.resnet import Bottleneck

    torch.manual_seed(0)
    blocks = [
        Bottleneck(channels, channels // 4) if kind == "ResNet" else ConvNeXtBlock(channels, ls_init_value=1.0) for _ in range(2)
    ]
    return sparsify(nn.Sequential(*blocks).train(), inplace=True)


def step(net: nn.Module, x: Tensor, hidden: Tensor, packed: bool, memory_format: torch.memory_format) -> Run:
    """Forward and backward; gives the map and the gradient of the input."""
    x = x.to(memory_format=memory_format)

    def run() -> list[Any]:
        leaf = x.detach().requires_grad_()
        y = visible_forward(net, leaf, hidden, packed=packed)
        params = list(net.parameters())
        slope, *_ = torch.autograd.grad(y.square().mean(), [leaf, *params])
        return [y.detach(), slope]

    return run


def lane(kind: str, channels: int, x: Tensor, hidden: Tensor, packed: bool, memory_format: torch.memory_format) -> Run:
    return step(stage(kind, channels), x, hidden, packed, memory_format)


@race(
    "Sparse convolutions at 0.6: visible tiles alone, against the masked dense network",
    "The same layers on two fifths of the positions. What is saved is less than three fifths: 3 x 3 convolutions also fetch "
    "the rim of their tiles, large depthwise ones on small cells run over the whole map, and input and output are moved.",
)
def sparse_conv(quick: bool) -> Iterator[Heat]:
    """Stages at 56 x 56 and 28 x 28, 7 x 7 cells of which 20 are visible; the masked lane in both memory layouts."""
    batch = 2 if quick else 8
    hidden = random_mask(batch, 7, 0.6, rule="keep_round", generator=torch.Generator().manual_seed(0)).view(batch, 7, 7)
    sizes = [(14, 16)] if quick else [(56, 256), (28, 512)]
    for kind in ("ResNet", "ConvNeXt"):
        for side, wide in sizes:
            channels = wide if kind == "ResNet" else wide * 3 // 8
            x = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))
            build = partial(lane, kind, channels, x, hidden)
            yield Heat(
                f"two {kind} blocks of {channels} channels at {side} x {side}, {batch} pictures, forward and backward",
                {
                    "sfumato": partial(build, True, torch.contiguous_format),
                    "masked": partial(build, False, torch.contiguous_format),
                    "masked, channels last": partial(build, False, torch.channels_last),
                },
                tolerance=1e-4,
            )
