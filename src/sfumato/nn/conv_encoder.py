"""A convolutional network as an encoder: its last feature map, or the mean of it.

"small" has three stages of residual blocks, a quarter, a half and all of `dim` wide, each but the first halving the picture; it
normalises over groups of channels, so a sample's features do not depend on its batch. Any convolutional network of timm goes by
its name. Blocks are timm's.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", CVPR; group normalisation: Wu and He 2018.

>>> import torch
>>> from sfumato.nn import ConvEncoder
>>> encoder = ConvEncoder("small", 1, dim=64)
>>> x = torch.rand(2, 1, 8, 8)
>>> encoder(x).shape, encoder.features(x).shape, encoder.stride
(torch.Size([2, 64, 2, 2]), torch.Size([2, 64]), 4)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting, nearest
from sfumato.nn.at_rest import eval_mode

GROUPS = 4
"""Groups of channels that are normalised together in the small network."""
TRIED = 128
"""Side of the picture that tells a network's stride, in pixels."""


class ConvEncoder(nn.Module):
    """A convolutional trunk without its classifier.

    Args:
        name: "small", or a network of timm with a feature map at its end, such as "resnet50" (without pretrained weights).
        channels: of the image.
        dim: width D of the small network's last stage, a multiple of 16; timm's networks have a width of their own.
        depth: blocks in each stage of the small network.

    Raises:
        BadSetting: an unknown name, or a width that cannot be divided.
    """

    def __init__(self, name: str = "small", channels: int = 3, *, dim: int = 64, depth: int = 1) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"name": name, "channels": channels, "dim": dim, "depth": depth}
        self.name, self.channels = name, channels
        self.trunk: nn.Module
        self.dim: int
        self.stride: int
        if name == "small":
            self.trunk, self.dim, self.stride = _small(channels, dim, depth), dim, 4
        else:
            self.trunk, self.dim, self.stride = _from_timm(name, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, D, H / stride, W / stride]`.

        Raises:
            BadData: an image whose sides are no multiples of the stride, or another number of channels.
        """
        channels, height, width = x.shape[1:]
        if channels != self.channels:
            raise BadData(f"images of {channels} channels were given, this encoder takes {self.channels}")
        if height % self.stride or width % self.stride:
            raise BadData(
                f"an image of {height} x {width} pixels has no feature map of stride {self.stride}: take multiples of it"
            )
        features: Tensor = self.trunk(x)
        return features

    def features(self, x: Tensor) -> Tensor:
        """One vector an image, the mean of its feature map: `[B, C, H, W]` to `[B, D]`."""
        pooled: Tensor = self(x).mean((2, 3))
        return pooled


def _small(channels: int, dim: int, depth: int) -> nn.Sequential:
    from timm.models.resnet import BasicBlock, downsample_conv

    if dim % (4 * GROUPS):
        raise BadSetting(
            f"the small network's stages are {dim} / 4 and / 2 wide, in {GROUPS} groups: dim must be a multiple of {4 * GROUPS}"
        )
    norm: Any = partial(nn.GroupNorm, GROUPS)
    widths = (dim // 4, dim // 2, dim)
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), norm(widths[0]), nn.ReLU()]
    before = widths[0]
    for width in widths:
        for block in range(depth):
            stride = 2 if block == 0 and width != widths[0] else 1
            shortcut = None if before == width else downsample_conv(before, width, 1, stride, norm_layer=norm)
            layers.append(BasicBlock(before, width, stride, shortcut, norm_layer=norm))
            before = width
    return nn.Sequential(*layers)


def _from_timm(name: str, channels: int) -> tuple[nn.Module, int, int]:
    import timm

    if not timm.is_model(name):
        near = nearest(name, ("small", *timm.list_models())) or ["small", "resnet50"]
        raise BadSetting(f"there is no network {name!r}; did you mean {', '.join(near)}?")
    try:
        trunk: Any = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=0, global_pool="")
        dim, rows, columns = _tried(trunk, channels)
    except (AssertionError, RuntimeError, TypeError, ValueError):
        rows = columns = 0
    if not rows or rows != columns or TRIED % rows:
        raise BadSetting(f"{name} makes no feature map of a picture of any size: take a convolutional network, such as resnet50")
    return trunk, dim, TRIED // rows


@torch.no_grad()
def _tried(trunk: nn.Module, channels: int) -> tuple[int, int, int]:
    """Width, rows and columns of what a network makes of a picture; it is left as it was."""
    like = next(trunk.parameters())
    with eval_mode(trunk):
        _, dim, rows, columns = trunk(like.new_zeros(1, channels, TRIED, TRIED)).shape
    return dim, rows, columns
