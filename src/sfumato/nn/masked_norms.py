"""Normalisation over visible positions: holes lend no statistics, and stay 0.

    batch norm:  y = γ (x - mean) / sqrt(var + ε) + β, mean and var over visible positions alone     layer norm:  over channels

Source: Tian et al. 2023, "Designing BERT for Convolutional Networks" (SparK), section 3.1.

>>> import torch
>>> from sfumato.nn import masked_batch_norm
>>> x, hidden = torch.randn(2, 3, 4, 4), torch.rand(2, 1, 4, 4) < 0.5
>>> y = masked_batch_norm(x, hidden, training=True)
>>> y.movedim(1, -1)[~hidden[:, 0]].mean(0).abs().max().item() < 1e-5, y.masked_select(hidden).count_nonzero().item()
(True, 0)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_batch_norm(
    x: Tensor,
    hidden: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    sync: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Batch normalisation over visible positions.

    On a CPU they are gathered for torch's own kernel; elsewhere, and with `sync`, moments are weighted by the mask, which never
    waits for the device. Equal but for rounding.

    Args:
        x: `[B, C, h, w]`; hidden positions are not looked at.
        hidden: `[B, 1, h, w]` bool, True = hidden; None: nothing is.
        running_mean: `[C]`, updated in place when training; None: none is kept.
        running_var: `[C]`, likewise, by the unbiased variance of the visible positions.
        weight: `[C]`, γ; None: 1.
        bias: `[C]`, β; None: 0.
        training: use the statistics of `x`, as is also done where none are kept.
        momentum: share of the new statistics in the running ones.
        eps: inside the root.
        sync: sums a tensor over processes, with gradient; None: this process alone.

    Returns:
        Like `x`, 0 at hidden positions.

    Reference:
        Tian et al. 2023, section 3.1.
    """
    own = training or running_mean is None
    if sync is None and hidden is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, own, momentum, eps)
    if sync is None and hidden is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _gathered_batch_norm(x, hidden, running_mean, running_var, weight, bias, own, momentum, eps)
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    visible = torch.ones_like(z[:, :1]) if hidden is None else (~hidden).to(z.dtype).expand(len(z), 1, *z.shape[2:])
    if not own:
        assert running_mean is not None
        assert running_var is not None
        mean, var = _channels(running_mean), _channels(running_var)
        centred = (z - mean) * visible
    else:
        add = sync or (lambda t: t)
        count = add(visible.sum())
        mean = add((z * visible).sum((0, 2, 3), keepdim=True)) / count.clamp(min=1)
        centred = (z - mean) * visible
        var = add(centred.square().sum((0, 2, 3), keepdim=True)) / count.clamp(min=1)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
                running_var.lerp_((var.flatten() * count / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt()
    y = centred * (scale if weight is None else scale * _channels(weight))
    return (y if bias is None else y + _channels(bias) * visible).to(x.dtype)


def _channels(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _gathered_batch_norm(x: Tensor, hidden: Tensor, *arguments: Any) -> Tensor:
    batch, channels, height, width = x.shape
    visible = (~hidden).expand(batch, 1, height, width).flatten().nonzero().squeeze(1)
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    y = F.batch_norm(rows.index_select(0, visible), *arguments)
    return y.new_zeros(rows.shape).index_copy(0, visible, y).view(batch, height, width, channels).permute(0, 3, 1, 2)


def masked_layer_norm(
    x: Tensor, hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Layer normalisation of the channels of every visible position.

    Args:
        x: `[B, C, h, w]`.
        hidden: `[B, 1, h, w]` bool, True = hidden.
        weight: `[C]`; None: 1.
        bias: `[C]`; None: 0.
        eps: inside the root.

    Returns:
        Like `x`, 0 at hidden positions.

    Reference:
        Tian et al. 2023, official `SparseConvNeXtLayerNorm`.
    """
    y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weight, bias, eps).permute(0, 3, 1, 2)
    return torch.where(hidden, 0.0, y)
