"""A small U-Net of diffusers, and any such U-Net cut in two at its middle.

    f(x, t) = decode(h, skips, e),    (h, skips, e) = encode(x, t)

h is what the middle block gives (the "h-space"), skips are the outputs of the way down, e is the embedding of the time.

Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, appendix B; network: diffusers' UNet2DModel.

>>> import torch
>>> from sfumato.nn import small_unet, unet_decode, unet_encode
>>> net = small_unet(8, 1, width=8, mults=(1, 2))
>>> x, t = torch.rand(2, 1, 8, 8), torch.tensor([3, 500])
>>> h, skips, e = unet_encode(net, x, t)
>>> torch.allclose(unet_decode(net, h, skips, e), net(x, t).sample, atol=1e-6)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from sfumato.errors import BadSetting


def small_unet(
    size: int | tuple[int, int],
    in_channels: int,
    out_channels: int | None = None,
    *,
    width: int = 32,
    mults: Sequence[int] = (1, 2, 2),
    attn_at: Sequence[int] = (),
    layers: int = 1,
    classes: int | None = None,
    norm_groups: int = 8,
    dropout: float = 0.0,
) -> nn.Module:
    """diffusers' UNet2DModel with one resolution a multiplier.

    Args:
        size: side of the pictures in pixels (or height and width), divisible by `2 ** (len(mults) - 1)`.
        in_channels: channels of the input.
        out_channels: channels of the output; None: as the input.
        width: channels at full resolution; a multiple of `norm_groups`.
        mults: channels at each resolution, in multiples of `width`.
        attn_at: levels with self-attention, 0 = full resolution.
        layers: residual blocks a level.
        classes: number of classes to condition on; None: unconditional.
        norm_groups: groups of the group normalisation.
        dropout: rate inside the residual blocks.

    Returns:
        A module `net(x, t, class_labels=None)` whose result holds `.sample`.

    Raises:
        BadSetting: sides that cannot be halved that often, or a width that the groups do not divide.
    """
    from diffusers import UNet2DModel

    sides = (size, size) if isinstance(size, int) else size
    stride = 2 ** (len(mults) - 1)
    if any(side % stride for side in sides):
        raise BadSetting(f"size={size} cannot be halved {len(mults) - 1} times: give a multiple of {stride}, or fewer mults")
    if width % norm_groups:
        raise BadSetting(f"width={width} is not a multiple of norm_groups={norm_groups}")
    if not set(attn_at) <= set(range(len(mults))):
        raise BadSetting(f"attn_at={tuple(attn_at)} names levels that are not there: allowed are 0 to {len(mults) - 1}")
    kinds = ["Attn" if level in attn_at else "" for level in range(len(mults))]
    net = UNet2DModel(
        sample_size=sides,
        in_channels=in_channels,
        out_channels=out_channels or in_channels,
        block_out_channels=tuple(width * m for m in mults),
        layers_per_block=layers,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=norm_groups,
        dropout=dropout,
        num_class_embeds=classes,
    )
    return cast(nn.Module, net)


def unet_encode(unet: Any, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The first half of a UNet2DModel: down and through the middle block.

    Args:
        unet: diffusers' UNet2DModel without learned skip convolutions.
        x: `[B, C, H, W]`.
        t: `[B]` or a scalar, the time.
        cond: `[B]`, class numbers, when the network takes classes.

    Returns:
        The bottleneck `[B, C', h, w]`, the skips from the outermost to the innermost, and the time embedding `[B, E]`.
    """
    times = t.expand(len(x)).to(x.device)
    temb = unet.time_embedding(unet.time_proj(times).to(unet.dtype))
    if unet.class_embedding is not None:
        temb = temb + unet.class_embedding(cond).to(unet.dtype)
    h = unet.conv_in(2 * x - 1 if unet.config.center_input_sample else x)
    skips: tuple[Tensor, ...] = (h,)
    for block in unet.down_blocks:
        h, outputs = block(hidden_states=h, temb=temb)
        skips += outputs
    return (h if unet.mid_block is None else unet.mid_block(h, temb)), skips, temb


def unet_decode(unet: Any, h: Tensor, skips: tuple[Tensor, ...], temb: Tensor) -> Tensor:
    """The second half of a UNet2DModel: up to the output.

    Args:
        unet: the network that `unet_encode` was given.
        h: the bottleneck, `[B, C', h, w]`.
        skips: from the outermost to the innermost.
        temb: time embedding, `[B, E]`.

    Returns:
        `[B, C_out, H, W]`.
    """
    for block in unet.up_blocks:
        count = len(block.resnets)
        h, skips = block(h, skips[-count:], temb), skips[:-count]
    out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
    return out
