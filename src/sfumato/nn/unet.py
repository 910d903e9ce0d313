"""A small U-Net of diffusers, and any such U-Net cut in two at its middle.

    f(x, t) = decode(h, skips, e),    (h, skips, e) = encode(x, t)

h is what the middle block gives (the "h-space"), skips are the outputs of the way down, e is the embedding of the time.

Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, appendix B; networks: diffusers' UNet2DModel,
and UNet2DConditionModel for one that attends to a text.

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

import torch
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
    null_class: bool = False,
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
        null_class: one more class, which says nothing: a call without `class_labels` is of it (classifier-free guidance).
        norm_groups: groups of the group normalisation.
        dropout: rate inside the residual blocks.

    Returns:
        A module `net(x, t, class_labels=None)` whose result holds `.sample`.

    Raises:
        BadSetting: sides that cannot be halved that often, or a width that the groups do not divide.
    """
    from diffusers import UNet2DModel

    from sfumato.nn.class_unet import ClassUNet2DModel

    if null_class and classes is None:
        raise BadSetting("null_class is one more class, and there are none: give classes=, how many")
    sides = (size, size) if isinstance(size, int) else size
    stride = 2 ** (len(mults) - 1)
    if any(side % stride for side in sides):
        raise BadSetting(f"size={size} cannot be halved {len(mults) - 1} times: give a multiple of {stride}, or fewer mults")
    if width % norm_groups:
        raise BadSetting(f"width={width} is not a multiple of norm_groups={norm_groups}")
    if not set(attn_at) <= set(range(len(mults))):
        raise BadSetting(f"attn_at={tuple(attn_at)} names levels that are not there: allowed are 0 to {len(mults) - 1}")
    kinds = ["Attn" if level in attn_at else "" for level in range(len(mults))]
    net: Any = (ClassUNet2DModel if null_class else UNet2DModel)(
        sample_size=sides,
        in_channels=in_channels,
        out_channels=out_channels or in_channels,
        block_out_channels=tuple(width * m for m in mults),
        layers_per_block=layers,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=norm_groups,
        dropout=dropout,
        num_class_embeds=classes + 1 if null_class and classes else classes,
    )
    return cast(nn.Module, net)


def unet_embed(unet: Any, t: Tensor, *, cond: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The embedding of the time, and of the class where there is one, that both halves take.

    Args:
        unet: diffusers' UNet2DModel or UNet2DConditionModel.
        t: `[B]`, on the network's device.
        cond: as for `unet_encode`.
        dtype: of the pictures, for a UNet2DConditionModel; None: that of its weights.

    Returns:
        `[B, E]`.

    Raises:
        BadSetting: as `unet_encode`.
    """
    _check_halves(unet, cond)
    attends = _attends(unet)
    temb: Tensor = unet.time_embedding(unet.time_proj(t).to((dtype or unet.dtype) if attends else unet.dtype))
    if attends:
        return temb if unet.time_embed_act is None else cast(Tensor, unet.time_embed_act(temb))
    if unet.class_embedding is not None:
        labels = unet.time_proj(cond) if unet.config.class_embed_type == "timestep" else cond
        labels = t.new_full((1,), unet.null_class) if labels is None else labels
        temb = temb + unet.class_embedding(labels).to(unet.dtype)
    return temb


def unet_encode(unet: Any, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The first half of a U-Net: down and through the middle block.

    Args:
        unet: diffusers' UNet2DModel or UNet2DConditionModel.
        x: `[B, C, H, W]`.
        t: `[B]` or a scalar, the time.
        cond: for a UNet2DModel with classes their numbers `[B]`; for a UNet2DConditionModel what it attends to, such as the
            states of a text encoder, `[B, L, D]`.

    Returns:
        The bottleneck `[B, C', h, w]`, the skips from the outermost to the innermost, and the time embedding `[B, E]`.

    Raises:
        BadSetting: a network with inputs or paths besides these (learned skip convolutions, the embeddings of SDXL, ...), or
            one that needs `cond` and has none.
    """
    temb = unet_embed(unet, t.expand(len(x)).to(x.device), cond=cond, dtype=x.dtype)
    h = unet.conv_in(2 * x - 1 if unet.config.center_input_sample else x)
    skips: tuple[Tensor, ...] = (h,)
    for block in unet.down_blocks:
        h, outputs = block(hidden_states=h, temb=temb, **_attended(block, cond))
        skips += outputs
    return (h if unet.mid_block is None else unet.mid_block(h, temb, **_attended(unet.mid_block, cond))), skips, temb


def unet_decode(unet: Any, h: Tensor, skips: tuple[Tensor, ...], temb: Tensor, *, cond: Tensor | None = None) -> Tensor:
    """The second half of a U-Net: up to the output.

    Args:
        unet: the network that `unet_encode` was given.
        h: the bottleneck, `[B, C', h, w]`.
        skips: from the outermost to the innermost.
        temb: time embedding, `[B, E]`.
        cond: for a UNet2DConditionModel as for `unet_encode`; else without effect, the classes are in `temb`.

    Returns:
        `[B, C_out, H, W]`.
    """
    attends = _attends(unet)
    odd = attends and any(side % 2**unet.num_upsamplers for side in skips[0].shape[-2:])
    for i, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        mine, skips = skips[-count:], skips[:-count]
        size = {"upsample_size": skips[-1].shape[-2:]} if odd and i < len(unet.up_blocks) - 1 else {}
        h = block(h, mine, temb, **size, **_attended(block, cond))
    if unet.conv_norm_out is not None:
        h = unet.conv_act(unet.conv_norm_out(h))
    out: Tensor = unet.conv_out(h)
    return out


def _attends(unet: Any) -> bool:
    """Whether it is a UNet2DConditionModel."""
    return "cross_attention_dim" in unet.config


def _attended(block: Any, cond: Tensor | None) -> dict[str, Tensor | None]:
    return {"encoder_hidden_states": cond} if getattr(block, "has_cross_attention", False) else {}


def _check_halves(unet: Any, cond: Tensor | None) -> None:
    extras = ["addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"]
    extras += ["class_embed_type", "num_class_embeds"] if _attends(unet) else []
    found = [name for name in extras if unet.config.get(name) is not None]
    found += ["skip convolutions"] if any(hasattr(block, "skip_conv") for block in unet.down_blocks) else []
    found += ["fourier"] if unet.config.get("time_embedding_type") == "fourier" else []
    if found:
        raise BadSetting(f"this U-Net cannot be cut in two, it has more than x, t and cond: {', '.join(found)}")
    told = unet.class_embedding is not None and not hasattr(unet, "null_class")
    if cond is None and (_attends(unet) or told):
        raise BadSetting("this U-Net needs a condition: give cond, class numbers or the states it attends to")
