"""A U-Net of plain convolutions: two a level, halved on the way down, joined with the way up by concatenation.

    x -> [conv norm act] x 2 -> skip 0 -> down -> ... -> middle -> up -> [up, skip 0] -> conv norm act, conv

Without norm, or with batch norm, it is the usual one; with "bias_free" no convolution has a bias and normalisation only divides,
so that f(c x) = c f(x) for c > 0.

Sources: Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015; bias-free, with the sizes of the defaults: Kadkhodaie, Guth,
Simoncelli, Mallat, "Generalization in diffusion models arises from geometry-adaptive harmonic representations", ICLR 2024.

>>> import torch
>>> from sfumato.nn import PlainUNet
>>> net = PlainUNet(3, 3, (8, 16, 32), norm="bias_free")
>>> net(torch.rand(2, 3, 16, 24)).shape, list(net.skips)
(torch.Size([2, 3, 16, 24]), ['level0', 'level1'])
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn.bias_free import BiasFreeNorm2d, Gain

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "silu": nn.SiLU}
HOMOGENEOUS = ("relu", "leaky_relu")


class PlainUNet(nn.Module):
    """Pictures to pictures of the same size.

    What a level hands to the way up passes `net.skips["level0"]` (full resolution), `"level1"`, ...: modules that do nothing, to
    be hooked or replaced.

    Args:
        cin: channels of the input.
        cout: channels of the output.
        widths: channels at each resolution, the last being the middle.
        norm: None, "batch", or "bias_free": `BiasFreeNorm2d`, and no bias in the whole network. The very first convolution and
            the last one have none.
        act: "relu", "leaky_relu", "gelu" or "silu"; a bias-free network takes one of the first two.
        down: "avg" or "max", over 2 x 2.
        up: "bilinear" or "nearest" and a 3 x 3 convolution, or "transposed": 2 x 2 with stride 2.
        convs: convolutions a level and way, at least 1.
        gain: how the gains of `BiasFreeNorm2d` start.

    Raises:
        BadSetting: an unknown word, fewer than two resolutions, or an activation that is not homogeneous in a bias-free network.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        norm: Literal["batch", "bias_free"] | None = None,
        act: str = "relu",
        down: Literal["avg", "max"] = "avg",
        up: Literal["bilinear", "nearest", "transposed"] = "bilinear",
        convs: int = 2,
        gain: Gain = "one",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("norm", norm, (None, "batch", "bias_free")), ("act", act, tuple(ACTIVATIONS)), ("down", down, ("avg", "max")),
            ("up", up, ("bilinear", "nearest", "transposed")),
        ):  # fmt: skip
            if value not in allowed:
                raise BadSetting(f"{name}={value!r} is not known: use {', '.join(map(str, allowed))}")
        if len(widths) < 2 or convs < 1:
            raise BadSetting(f"widths={tuple(widths)}, convs={convs}: a U-Net has two resolutions and a convolution at least")
        if norm == "bias_free" and act not in HOMOGENEOUS:
            raise BadSetting(f"act={act!r} is not homogeneous: a bias-free network takes {' or '.join(HOMOGENEOUS)}")
        self.stride = 2 ** (len(widths) - 1)
        self.reach = _reach(len(widths) - 1, convs)
        self._norm, self._act, self._gain, self._bias = norm, act, gain, norm != "bias_free"
        self.down: nn.Module = nn.AvgPool2d(2) if down == "avg" else nn.MaxPool2d(2)
        outer = list(widths[:-1])
        self.encoders = nn.ModuleList(
            self._block([before, *[w] * convs], first=i == 0)
            for i, (before, w) in enumerate(zip([cin, *outer], widths, strict=True))
        )
        self.skips = nn.ModuleDict({f"level{i}": nn.Identity() for i in range(len(outer))})
        self.ups = nn.ModuleList(self._up(below, w, up) for w, below in zip(outer, widths[1:], strict=True))
        ends = [cout, *outer[1:]]  # the last convolution of all gives the result, plainly
        self.decoders = nn.ModuleList(
            self._block([2 * w, *[w] * (convs - 1), end], last=i == 0) for i, (w, end) in enumerate(zip(outer, ends, strict=True))
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, cin, H, W]` to `[B, cout, H, W]`; both sides multiples of `net.stride`.

        Raises:
            BadData: other sides.
        """
        if any(side % self.stride for side in x.shape[-2:]):
            raise BadData(f"sides {tuple(x.shape[-2:])} are no multiples of {self.stride}: pad them (sfumato.nn.pad_to_multiple)")
        skips: list[Tensor] = []
        for block, skip in zip(self.encoders, self.skips.values(), strict=False):
            x = block(x)
            skips.append(skip(x))
            x = self.down(x)
        x = self.encoders[-1](x)
        for up, block in zip(reversed(self.ups), reversed(self.decoders), strict=True):
            x = block(torch.cat([up(x), skips.pop()], 1))
        return x

    def _block(self, channels: Sequence[int], *, first: bool = False, last: bool = False) -> nn.Sequential:
        """The very first convolution is not normalised, the very last one stands alone."""
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(channels):
            layers += [self._conv(a, b), self._normalised(b), ACTIVATIONS[self._act]()]
        if first:
            layers[1] = nn.Identity()
        return nn.Sequential(*(layers[:-2] if last else layers))

    def _conv(self, a: int, b: int) -> nn.Conv2d:
        return nn.Conv2d(a, b, 3, padding=1, bias=self._bias)

    def _normalised(self, channels: int) -> nn.Module:
        if self._norm == "bias_free":
            return BiasFreeNorm2d(channels, gain=self._gain)
        return nn.BatchNorm2d(channels) if self._norm == "batch" else nn.Identity()

    def _up(self, below: int, width: int, up: str) -> nn.Module:
        if up == "transposed":
            return nn.ConvTranspose2d(below, width, 2, stride=2, bias=self._bias)
        return nn.Sequential(_Doubled(up), self._conv(below, width))


class _Doubled(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode=self.mode)


def _reach(levels: int, convs: int) -> int:
    """Pixels to each side, at most, that an output pixel depends on: convolutions of every level, its pooling and its way up."""
    return convs * 2**levels + sum((2 * convs + 3) * 2**level for level in range(levels))
