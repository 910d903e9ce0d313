"""Queries, keys and values of a vision transformer while it runs, fused attention or not.

They are read where the block computes them, at the output of its `qkv` layer, so nothing is computed twice and gradients pass.
Works on any timm ViT whose blocks hold timm's `Attention`, and on `MaskedViTEncoder`, which is built of them.

>>> import torch
>>> from sfumato.nn import MaskedViTEncoder, capture_qkv
>>> vit = MaskedViTEncoder(32, 8, 3, dim=64, depth=4, heads=2)
>>> with capture_qkv(vit, [0, 3]) as seen:
...     tokens = vit(torch.rand(5, 3, 32, 32))
>>> seen[3].q.shape, seen[3].attention().sum(-1).allclose(torch.ones(()))
(torch.Size([5, 2, 17, 32]), True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from sfumato.errors import BadSetting


class QKV(NamedTuple):
    """Queries, keys and values of one layer, each `[B, heads, n, d]`, class and register tokens first."""

    q: Tensor
    k: Tensor
    v: Tensor

    def attention(self) -> Tensor:
        """`[B, heads, n, n]`: softmax(q kᵀ / √d), rows sum to 1. A bias on the scores (relative positions) is not in it."""
        return (self.q @ self.k.mT * self.q.shape[-1] ** -0.5).softmax(-1)


class _Enough(Exception):
    """All that was wanted has been seen."""


@contextmanager
def capture_qkv(vit: nn.Module, layers: Sequence[int] | None = None, *, stop: bool = False) -> Iterator[dict[int, QKV]]:
    """What each pass through the transformer within leaves behind, of some of its layers.

    Args:
        vit: a timm ViT, or any module whose `blocks` hold timm's `Attention` as `attn`.
        layers: which blocks, 0 is the first; None: all.
        stop: end the `with` block as soon as the last of these layers was seen; what would come after it is not computed.

    Yields:
        `{layer: QKV}`, empty before the first pass; of several passes the last counts. Norms of queries and keys
        are done.

    Raises:
        BadSetting: a module without such blocks, or whose blocks are compiled, or a layer that it has not.
    """
    blocks: Any = getattr(vit, "blocks", ())
    wanted = range(len(blocks)) if layers is None else layers
    if missing := [i for i in wanted if not 0 <= i < len(blocks)]:
        raise BadSetting(f"{type(vit).__name__} has no layer {missing[0]}: it has {len(blocks)} blocks, counted from 0")
    attentions = {i: _attention(vit, blocks[i]) for i in wanted}
    seen: dict[int, QKV] = {}
    last = max(attentions, default=-1) if stop else -1

    def see(i: int, attn: Any, out: Tensor) -> None:
        seen[i] = _split(attn, out)
        if i == last:
            raise _Enough

    hooks = [
        attn.qkv.register_forward_hook(lambda _m, _i, out, i=i, attn=attn: see(i, attn, out)) for i, attn in attentions.items()
    ]
    try:
        with suppress(_Enough):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _attention(vit: nn.Module, block: nn.Module) -> Any:
    from timm.models.vision_transformer import Attention

    attn = getattr(block, "attn", None)
    if not isinstance(attn, Attention):
        raise BadSetting(f"the blocks of {type(vit).__name__} hold no timm Attention: queries and keys cannot be read from them")
    if any(m._compiled_call_impl is not None for m in (block, attn)):  # compiled code does not call hooks that come later
        raise BadSetting("queries and keys cannot be read from a compiled block: compile its mlp instead")
    return attn


def _split(attn: Any, out: Tensor) -> QKV:
    batch, length, _ = out.shape
    q, k, v = out.reshape(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return QKV(attn.q_norm(q), attn.k_norm(k), v)


def regroup_heads(t: Tensor, heads: int) -> Tensor:
    """The same channels in another number of heads: `[B, h, n, d]` to `[B, heads, n, h d / heads]`."""
    return t if t.shape[1] == heads else t.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
