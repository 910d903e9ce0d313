"""Blocks of a plain vision transformer, and a way to look into them while they run.

    z <- z + A(LN z) W_o,   z <- z + MLP(LN z),     A = softmax(q kᵀ / √d + bias) v

The blocks are timm's. `run_blocks` gives what fused attention hides (the maps), and lets a caller change the scores.

Source: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", section 3.1.

>>> import torch
>>> from sfumato.nn import run_blocks, vit_block
>>> blocks = torch.nn.Sequential(vit_block(16, 2), vit_block(16, 2))
>>> z = torch.randn(3, 5, 16)
>>> last, layers, maps = run_blocks(blocks, z, layers=True, attention=True)
>>> torch.allclose(last, blocks(z), atol=1e-5), len(layers), maps[0].shape
(True, 2, torch.Size([3, 2, 5, 5]))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadSetting

Adjust = Callable[[int, Tensor], Tensor]
"""(number of the block, scores `[B, heads, N, N]` before the softmax) -> scores."""


def vit_block(
    dim: int, heads: int, mlp_ratio: float = 4.0, *, drop_path: float = 0.0, init_values: float | None = None
) -> nn.Module:
    """timm's pre-norm block with biases on queries, keys and values, and norms of epsilon 1e-6.

    Args:
        dim: width, a multiple of `heads`.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `dim`.
        drop_path: share of residual branches skipped in training.
        init_values: first value of LayerScale; None: none.

    Raises:
        BadSetting: a width that the heads cannot share.
    """
    from timm.models.vision_transformer import Block

    if dim % heads:
        raise BadSetting(f"a width of {dim} cannot be shared by {heads} attention heads: take a multiple")
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return Block(dim, heads, mlp_ratio, qkv_bias=True, init_values=init_values, drop_path=drop_path, norm_layer=norm)


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for all linear layers of a module."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def run_blocks(
    blocks: nn.Sequential,
    z: Tensor,
    *,
    bias: Tensor | None = None,
    adjust: Adjust | None = None,
    layers: bool = False,
    attention: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run timm's ViT blocks, and keep or change what is inside.

    Args:
        blocks: such as `encoder.blocks`.
        z: `[B, N, D]`.
        bias: added to every block's scores, broadcastable to `[B, heads, N, N]`.
        adjust: changes the scores of each block, the bias included.
        layers: keep the tokens after each block.
        attention: keep each block's attention (not fused: slower).

    Returns:
        The last tokens, and lists of the tokens and of the attention `[B, heads, N, N]` of each block; empty if not asked for.
    """
    kept: list[Tensor] = []
    maps: list[Tensor] = []
    for number, block in enumerate(blocks):
        if attention or bias is not None or adjust is not None:
            change = None if adjust is None else partial(adjust, number)
            z, weights = _run_block(block, z, bias, change, attention)
            if weights is not None:
                maps.append(weights)
        else:
            z = block(z)
        if layers:
            kept.append(z)
    return z, kept, maps


def _run_block(
    block: Any, z: Tensor, bias: Tensor | None, change: Callable[[Tensor], Tensor] | None, want_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """timm's block, with its scores changed or its attention returned."""
    attended, weights = _attend(block.attn, block.norm1(z), bias, change, want_weights)
    z = z + block.drop_path1(block.ls1(attended))
    return z + block.drop_path2(block.ls2(block.mlp(block.norm2(z)))), weights


def _attend(
    attn: Any, z: Tensor, bias: Tensor | None, change: Callable[[Tensor], Tensor] | None, want_weights: bool
) -> tuple[Tensor, Tensor | None]:
    batch, length, _ = z.shape
    q, k, v = attn.qkv(z).reshape(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if want_weights or change is not None:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        weights = (scores if change is None else change(scores)).softmax(-1)
        out = weights @ v
    else:
        weights = None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return attn.proj(out.transpose(1, 2).reshape(batch, length, -1)), weights if want_weights else None
