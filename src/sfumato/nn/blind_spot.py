"""A blind-spot network whose blind spot is a switch: blind, no output pixel sees its own input pixel; else every one does.

    masked convolution:  y = (W · m) * x + b,   m = 0 at the centre when blind, 1 elsewhere and always when not.

Two branches see the picture on two grids. After a centre-masked k x k convolution come only 1 x 1 convolutions and 3 x 3 ones of
dilation d = (k + 1) / 2 (k = 3, d = 2; k = 5, d = 3). They move by multiples of d, and of the masked kernel's offsets only the
centre is such a multiple: no path leads back to where it began. Both modes share all weights; the centre tap learns from the
non-blind mode alone.

Source: Jang et al., "Self-supervised Image Denoising with Downsampled Invariance Loss and Conditional Blind-Spot Network", ICCV
2023, section 3.3; the branches after Lee et al., "AP-BSN", CVPR 2022.

>>> import torch
>>> from sfumato.nn import ConditionalBlindSpotNet
>>> _ = torch.manual_seed(0)  # by other weights so small a network may be dead at this pixel
>>> net, x = ConditionalBlindSpotNet(3, width=8, modules=1), torch.rand(1, 3, 16, 16)
>>> y = x.clone()
>>> y[..., 8, 8] = 0  # change one pixel: its own output does not care when blind
>>> torch.equal(net(x, blind=True)[..., 8, 8], net(y, blind=True)[..., 8, 8]), torch.equal(net(x)[..., 8, 8], net(y)[..., 8, 8])
(True, False)
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TAIL = 64  # channels of the last two hidden layers, whatever the width


class CentreMaskedConv2d(nn.Conv2d):
    """A convolution whose centre tap can be switched off; zero padding keeps the size.

    Args:
        cin, cout: channels.
        k: side of the kernel, odd.
    """

    keep: Tensor

    def __init__(self, cin: int, cout: int, k: int) -> None:
        super().__init__(cin, cout, k, padding=k // 2)
        keep = torch.ones(k, k)
        keep[k // 2, k // 2] = 0
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x: Tensor, *, blind: bool = True) -> Tensor:  # type: ignore[override]
        """`[B, cin, H, W]` to `[B, cout, H, W]`; blind: without the centre tap, which then gets no gradient."""
        weight = self.weight * self.keep if blind else self.weight
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class DilatedModule(nn.Module):
    """`h + relu(conv1(relu(conv3_d(h))))`: looks at pixels `d` away, keeps the size."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor) -> Tensor:
        """`[B, width, H, W]` to the same."""
        return h + F.relu_(self.mix(F.relu_(self.look(h))))


class BlindSpotBranch(nn.Module):
    """A centre-masked convolution, then layers that only move by multiples of its half-side plus one."""

    reach: int

    def __init__(self, width: int, k: int, modules: int) -> None:
        super().__init__()
        dilation = (k + 1) // 2
        self.reach = k // 2 + modules * dilation
        self.masked = CentreMaskedConv2d(width, width, k)
        self.body = nn.Sequential(
            *_pointwise(width, width, width),
            *(DilatedModule(width, dilation) for _ in range(modules)),
            *_pointwise(width, width),
        )

    def forward(self, h: Tensor, *, blind: bool) -> Tensor:
        """`[B, width, H, W]` to the same."""
        return self.body(F.relu_(self.masked(h, blind=blind)))


class ConditionalBlindSpotNet(nn.Module):
    """The network of C-BSN: denoises pixel by pixel, with or without looking at the pixel itself.

    Args:
        channels: of the picture.
        width: C, channels of the hidden layers.
        modules: N, dilated modules a branch.

    Attributes:
        reach: pixels that an output looks at to each side, `2 + 3 N`.
    """

    reach: int

    def __init__(self, channels: int = 3, *, width: int = 128, modules: int = 9) -> None:
        super().__init__()
        self.head = nn.Conv2d(channels, width, 1)
        branches = [BlindSpotBranch(width, k, modules) for k in (3, 5)]
        self.branches, self.reach = nn.ModuleList(branches), max(branch.reach for branch in branches)
        self.tail = nn.Sequential(*_pointwise(2 * width, width, _TAIL, _TAIL), nn.Conv2d(_TAIL, channels, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *, blind: bool = False) -> Tensor:
        """Restore pictures.

        Args:
            x: `[B, channels, H, W]`, mean 0 and standard deviation 1 a picture.
            blind: whether the output at a pixel may not depend on the input at that pixel.

        Returns:
            `[B, channels, H, W]`, in the units of `x`.
        """
        # Thin layers are up to twice as fast on a CPU when the channels of a pixel lie side by side.
        h = F.relu_(self.head(x)).contiguous(memory_format=torch.channels_last)
        return self.tail(torch.cat([branch(h, blind=blind) for branch in self.branches], 1))


def _pointwise(*widths: int) -> list[nn.Module]:
    """1 x 1 convolutions, each with a ReLU."""
    return [m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 1), nn.ReLU(inplace=True))]
