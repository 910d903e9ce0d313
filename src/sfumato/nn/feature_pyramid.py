"""Backbones that see a whole frame and give one fine feature map for objects of all sizes: ConvNeXt or ResNet with a pyramid.

    p5 = W5 c5,   p_k = W_k c_k + up(p_{k+1})  (1 x 1 convolutions);     F = concat_k resize( block_k(p_k) )  at the finest size

ConvNeXt is tapped after each of its down-samplings and at its end: strides 8, 16, 32, 32. ResNet after its stages: 4 to 32.

Sources: Lin et al. 2017, "Feature Pyramid Networks"; Liu et al. 2022 (ConvNeXt); the taps and the joined map are those of
Panariello et al. 2024, arXiv 2401.03191. Blocks are a 3 x 3 convolution, group norm and ReLU: our choice.

>>> import torch
>>> from sfumato.nn import FeaturePyramid, PyramidBackbone
>>> pyramid = FeaturePyramid((8, 16, 32, 32), dim=16, out=8)
>>> maps = [torch.rand(1, c, 48 // s, 96 // s) for c, s in ((8, 8), (16, 16), (32, 32), (32, 32))]
>>> pyramid(maps).shape
torch.Size([1, 32, 6, 12])
>>> small = PyramidBackbone("conv", 1)
>>> small(torch.rand(2, 1, 32, 40)).shape, small.stride, small.out_channels
(torch.Size([2, 32, 16, 20]), 2, 32)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadSetting

BACKBONES = {
    "convnext_tiny": ("convnext_tiny", "convnext_tiny.fb_in22k", 8),
    "convnext_small": ("convnext_small", "convnext_small.fb_in22k", 8),
    "convnext_base": ("convnext_base", "convnext_base.fb_in22k", 8),
    "resnet34": ("resnet34", "resnet34.tv_in1k", 4),
    "conv": ("", "", 2),
}
"""By name: timm's model, its weights, and the stride of the finest map in pixels. `conv`: two convolutions, without a pyramid."""


class FeaturePyramid(nn.Module):
    """Four maps, fine to coarse, joined to one.

    Args:
        widths: channels of the maps.
        dim: channels on the way down.
        out: channels that each map adds to the result.
    """

    def __init__(self, widths: Sequence[int], *, dim: int = 256, out: int = 128) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, out, 3, padding=1, bias=False), nn.GroupNorm(min(32, out), out), nn.ReLU())
            for _ in widths
        )
        self.out_channels = out * len(widths)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """`[B, width, h, w]` each, to `[B, out · len(widths), h, w]` at the size of the first."""
        above: Tensor | None = None
        levels: list[Tensor] = []
        for lateral, block, x in zip(reversed(self.laterals), reversed(self.blocks), reversed(maps), strict=True):
            level = lateral(x)
            above = level if above is None else level + _resized(above, level.shape[-2:])
            levels.append(_resized(block(above), maps[0].shape[-2:]))
        return torch.cat(levels[::-1], 1)


class PyramidBackbone(nn.Module):
    """Frames to a feature map.

    Args:
        name: one of `BACKBONES`.
        channels: of the frames; channels after the third start with fresh weights.
        pretrained: download timm's weights (ImageNet-22k; ImageNet-1k for ResNet).

    Raises:
        BadSetting: an unknown name, or `pretrained` for a network that has no weights.
    """

    def __init__(self, name: str, channels: int = 3, *, pretrained: bool = False) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise BadSetting(f"there is no backbone {name!r}: {', '.join(BACKBONES)}")
        model, weights, self.stride = BACKBONES[name]
        if pretrained and (not weights or channels < 3):
            raise BadSetting(f"there are no weights for the backbone {name} on {channels} channels: say pretrained=false")
        self.name = name
        self.trunk: Any
        self.pyramid: FeaturePyramid | None = None
        if name == "conv":
            layers = [nn.Conv2d(channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU()]
            self.trunk, self.out_channels = nn.Sequential(*layers), 32
            return
        import timm

        trunk: Any = timm.create_model(weights if pretrained else model, pretrained=pretrained, num_classes=0)
        if channels != 3:
            _widen(trunk, channels)
        if name == "resnet34":
            widths = [64, 128, 256, 512]
        else:
            widths = [info["num_chs"] for info in trunk.feature_info[1:]] + [trunk.num_features]
            trunk.head, trunk.norm_pre = nn.Identity(), nn.Identity()
        self.trunk, self.pyramid = trunk, FeaturePyramid(widths)
        self.out_channels = self.pyramid.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]`, normalised, to `[B, out_channels, H / stride, W / stride]`."""
        if self.pyramid is None:
            features: Tensor = self.trunk(x)
            return features
        joined: Tensor = self.pyramid(self._stages(x))
        return joined

    def _stages(self, x: Tensor) -> list[Tensor]:
        trunk, maps = self.trunk, []
        if self.name == "resnet34":
            x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))
            for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
                maps.append(x := stage(x))
            return maps
        x = trunk.stages[0].blocks(trunk.stem(x))
        for stage in trunk.stages[1:]:
            maps.append(x := stage.downsample(x))
            x = stage.blocks(x)
        return [*maps, x]


def _widen(trunk: nn.Module, channels: int) -> None:
    """Another number of input channels for the first convolution; what it knows of the first three stays."""
    name, first = next((n, m) for n, m in trunk.named_modules() if isinstance(m, nn.Conv2d))
    alike: dict[str, Any] = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
    fresh = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **alike)
    with torch.no_grad():
        fresh.weight[:, :3] = first.weight[:, :channels]
        if first.bias is not None and fresh.bias is not None:
            fresh.bias.copy_(first.bias)
    parent, _, last = name.rpartition(".")
    setattr(trunk.get_submodule(parent), last, fresh)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
