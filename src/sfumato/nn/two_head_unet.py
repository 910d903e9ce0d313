"""Two predictions from one input, by diffusers U-Nets that share nothing, the way down, or everything.

Source: Liu et al., "Residual Denoising Diffusion Models", CVPR 2024, and the settings of the released code; networks: diffusers'
UNet2DModel.

>>> import torch
>>> from sfumato.nn import TwoHeadUNet, small_unet
>>> net = TwoHeadUNet(lambda channels: small_unet(8, 1, channels, width=8, mults=(1, 2)), 1, sharing="encoder")
>>> net(torch.rand(2, 1, 8, 8), torch.tensor([3, 500])).shape
torch.Size([2, 2, 8, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.errors import BadSetting
from sfumato.nn.unet import unet_decode, unet_encode

Sharing = Literal["none", "encoder", "all"]


class TwoHeadUNet(nn.Module):
    """Two predictions of one input, by diffusers U-Nets that share nothing, the way down, or everything.

    Args:
        make: `make(out_channels)`, a fresh UNet2DModel.
        channels: of each prediction.
        sharing: "none": two U-Nets; "encoder": one way down and middle, two ways up, the first of them without skips;
            "all": one U-Net with twice the outputs.

    Raises:
        BadSetting: an unknown kind of sharing.
    """

    def __init__(self, make: Callable[[int], nn.Module], channels: int, *, sharing: Sharing = "none") -> None:
        super().__init__()
        if sharing not in ("none", "encoder", "all"):
            raise BadSetting(f"sharing={sharing!r} is not known: use none, encoder or all")
        self.body = make(2 * channels if sharing == "all" else channels)
        self.other: nn.Module | None = None
        if sharing != "all":
            self.other = make(channels) if sharing == "none" else SkiplessDecoder(self.body)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Both predictions, one after the other in the channels.

        Args:
            x: `[B, C_in, H, W]`.
            t: `[B]` or a scalar, the time.

        Returns:
            `[B, 2 channels, H, W]`.
        """
        h, skips, temb = unet_encode(self.body, x, t)
        second = unet_decode(self.body, h, skips, temb)
        if self.other is None:
            return second
        shared = isinstance(self.other, SkiplessDecoder)
        first = self.other(h, temb) if shared else unet_decode(self.other, *unet_encode(self.other, x, t))
        return torch.cat([first, second], 1)


class SkiplessDecoder(nn.Module):
    """The way up of a diffusers UNet2DModel without its skips (and without its self-attention): freshly initialised.

    Args:
        unet: whose bottleneck it starts from, and whose sizes it takes.
    """

    def __init__(self, unet: Any) -> None:
        from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D

        super().__init__()
        c = unet.config
        widths = list(reversed(c.block_out_channels))
        self.blocks = nn.ModuleList(
            UpDecoderBlock2D(
                before, width, num_layers=c.layers_per_block + 1, dropout=c.dropout, resnet_eps=c.norm_eps,
                resnet_groups=c.norm_num_groups, add_upsample=i < len(widths) - 1,
                temb_channels=unet.time_embedding.linear_2.out_features,
            )
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths))
        )  # fmt: skip
        norm = nn.GroupNorm(c.norm_num_groups, widths[-1], eps=c.norm_eps)
        self.out = nn.Sequential(norm, nn.SiLU(), nn.Conv2d(widths[-1], c.out_channels, 3, padding=1))

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        """From the bottleneck `[B, C', h, w]` and the time embedding `[B, E]` to `[B, C_out, H, W]`."""
        for block in self.blocks:
            h = block(h, temb)
        out: Tensor = self.out(h)
        return out
