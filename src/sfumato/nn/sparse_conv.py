"""Convolutions that never see a hole: after every layer only visible positions carry values and statistics.

    conv, pool, linear, layer norm:   y = layer(x) · visible
    batch norm:                       y = γ (x - mean) / sqrt(var + ε) + β at visible positions, mean and var over them alone

A dense convolution over holes smears the mask away within a few layers, and zeros in the holes shift every statistic. `sparsify`
gives a network's layers sparse classes that share its weights; outside of `set_hidden` they compute what they did before.

Two ways to the same numbers. *Masked*: the dense layers, then zeros. *Packed*: all visible tiles of a picture stand side by side
in the batch, `[n, C, u, u]`, so that pointwise layers and batch norm run as they are on what is visible and nothing else; a
convolution first fetches the rim of its tiles from their neighbours (0 where these are hidden).

Source: Tian et al. 2023, "Designing BERT for Convolutional Networks" (SparK), section 3.1, where the masked way stands; the
packed way is ours, as is that masks reach the layers of one model through `set_hidden` and not through a global.

>>> import torch
>>> from sfumato.nn import sparsify, visible_forward
>>> net = sparsify(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()))
>>> hidden = torch.tensor([[[True, False], [True, True]]])            # one picture, a grid of 2 x 2
>>> y = visible_forward(net, torch.rand(1, 3, 16, 16), hidden)        # packed; packed=False: masked
>>> y.shape, y[..., 8:, :].count_nonzero().item(), y[..., :8, :8].count_nonzero().item()
(torch.Size([1, 8, 16, 16]), 0, 0)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadSetting
from sfumato.nn.holes import Holes
from sfumato.nn.masked_norms import masked_batch_norm

LARGEST_RIM = 4.0
"""Grouped convolutions whose tiles with their rim are more than this times larger run over the dense map: less to fetch."""


# ---- layers


class _SparseLayer(nn.Module):
    """What sparse classes share; each is made by `_sparse_class` from one of these and the layer's own class."""

    holes: Holes | None = None
    dense: type[nn.Module]

    def _dense(self, x: Tensor) -> Tensor:
        """What the layer's own class computes."""
        y: Tensor = self.dense.forward(self, x)
        return y

    def _whole(self, x: Tensor, holes: Holes) -> Tensor:
        """The dense layer on the whole map, for packed tiles."""
        return holes.pack(self._dense(holes.unpack(x)))


class _Conv(_SparseLayer):
    def forward(self, x: Tensor) -> Tensor:
        holes = self.holes
        if holes is None or holes.pooled(x):
            return self._dense(x)
        if not holes.packed:
            return holes.blank(self._dense(x), inplace=True)
        if not self._fits(x):
            return self._whole(x, holes)
        m: Any = self
        if not any(m.padding):
            return self._dense(x)
        return F.conv2d(holes.with_rim(x, m.padding), m.weight, m.bias, m.stride, 0, m.dilation, m.groups)

    def _fits(self, x: Tensor) -> bool:
        """Whether the windows of a tile (with its rim) give the tile of the output, and that is worth it."""
        m: Any = self
        if m.dense is not nn.Conv2d or m.padding_mode != "zeros" or isinstance(m.padding, str):
            return False
        sides = [(u + 2 * p) / u for u, p in zip(x.shape[2:], m.padding)]
        worth = m.groups == 1 or sides[0] * sides[1] <= LARGEST_RIM
        return worth and _windows_fit(x, m.kernel_size, m.stride, m.padding, m.dilation)


class _MaxPool(_SparseLayer):
    def forward(self, x: Tensor) -> Tensor:
        holes, m = self.holes, self._settings()
        if holes is None or holes.pooled(x):
            return self._dense(x)
        if not holes.packed:
            return holes.blank(self._dense(x), inplace=True)
        if m is None or not _windows_fit(x, **m):
            return self._whole(x, holes)
        rim = holes.with_rim(x, m["padding"], beyond=-torch.inf)
        return F.max_pool2d(rim, m["kernel"], m["stride"], 0, m["dilation"])

    def _settings(self) -> dict[str, tuple[int, int]] | None:
        m: Any = self
        if m.dense is not nn.MaxPool2d or m.ceil_mode or m.return_indices:
            return None
        names = {"kernel": "kernel_size", "stride": "stride", "padding": "padding", "dilation": "dilation"}
        return {name: _pair(getattr(m, theirs)) for name, theirs in names.items()}


class _AvgPool(_SparseLayer):
    def forward(self, x: Tensor) -> Tensor:
        holes, m = self.holes, self
        if holes is None or holes.pooled(x):
            return self._dense(x)
        if not holes.packed:
            return holes.blank(self._dense(x), inplace=True)
        kernel, stride, padding = (_pair(getattr(m, name)) for name in ("kernel_size", "stride", "padding"))
        apart = m.dense is nn.AvgPool2d and kernel == stride and not any(padding) and _windows_fit(x, kernel, stride, padding)
        return self._dense(x) if apart else self._whole(x, holes)


class _BatchNorm(_SparseLayer):
    def forward(self, x: Tensor) -> Tensor:
        holes, sync, m = self.holes, self._sync(), self
        whole = holes is None or holes.packed or holes.pooled(x)
        if whole and sync is None and not isinstance(self, nn.SyncBatchNorm):  # torch's own asks for a GPU, alone on a CPU too
            return self._dense(x)
        y = self._normalise(x, None if whole or holes is None else holes.at(*x.shape[2:]), sync)
        for name in ("drop", "act"):  # of timm's norms with an activation
            y = getattr(m, name)(y) if hasattr(m, name) else y
        return y

    def _normalise(self, x: Tensor, hidden: Tensor | None, sync: Callable[[Tensor], Tensor] | None) -> Tensor:
        m: Any = self
        momentum, kept = m.momentum or 0.0, m.track_running_stats or not m.training
        if m.training and m.track_running_stats and m.num_batches_tracked is not None:
            m.num_batches_tracked.add_(1)
            if m.momentum is None:
                momentum = 1.0 / float(m.num_batches_tracked)
        mean, var = (m.running_mean, m.running_var) if kept else (None, None)
        return masked_batch_norm(
            x, hidden, mean, var, m.weight, m.bias, training=m.training, momentum=momentum, eps=m.eps, sync=sync
        )

    def _sync(self) -> Callable[[Tensor], Tensor] | None:
        """The sum over processes, for a SyncBatchNorm that trains in several."""
        if not (isinstance(self, nn.SyncBatchNorm) and self.training) or not torch.distributed.is_available():
            return None
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size(self.process_group) == 1:
            return None
        from torch.distributed.nn.functional import all_reduce

        group = self.process_group or torch.distributed.group.WORLD
        return lambda t: all_reduce(t.contiguous(), group=group)


class _LayerNorm(_SparseLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self._dense(x)
        channels_first = "2d" in self.dense.__name__  # timm's and torchvision's LayerNorm2d
        if self.holes is None or self.holes.packed or x.ndim != 4 or (channels_first and self.holes.pooled(x)):
            return y
        return self.holes.blank(y, channels_last=not channels_first)


class _Linear(_SparseLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self._dense(x)
        if self.holes is None or self.holes.packed or x.ndim != 4:
            return y
        return self.holes.blank(y, channels_last=True, inplace=True)


class _Squeeze(_SparseLayer):
    """Squeeze and excitation, x · g(mean x): a mean over visible positions is the whole mean of a larger x."""

    def forward(self, x: Tensor) -> Tensor:
        holes = self.holes
        if holes is None:
            return self._dense(x)
        whole = holes.unpack(x) if holes.packed else x
        larger = 1 / (~holes.hidden).to(x.dtype).mean((1, 2)).clamp(min=1e-8).view(-1, 1, 1, 1)
        y = self._dense(holes.blank(whole) * larger) / larger
        return holes.pack(y) if holes.packed else y


class _ResponseNorm(_SparseLayer):
    """A norm over all positions, to which zeros add nothing; its bias would fill the holes."""

    def forward(self, x: Tensor) -> Tensor:
        holes = self.holes
        if holes is None:
            return self._dense(x)
        last = bool(self.channel_dim == -1)
        if not holes.packed:
            return holes.blank(self._dense(x), channels_last=last)
        y = self._dense(holes.unpack(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if last else holes.unpack(x))
        return holes.pack(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if last else holes.pack(y)


class _DropPath(_SparseLayer):
    """Stochastic depth: all tiles of a picture share its draw."""

    def forward(self, x: Tensor) -> Tensor:
        holes = self.holes
        if holes is None or not holes.packed or not self.training:
            return self._dense(x)
        kept = self._dense(x.new_ones(len(holes.hidden), 1, 1, 1))
        return x * kept.index_select(0, holes.owners)


SPARSE: tuple[tuple[type[nn.Module], type[_SparseLayer]], ...] = (
    (nn.Conv2d, _Conv), (nn.MaxPool2d, _MaxPool), (nn.AvgPool2d, _AvgPool), (nn.BatchNorm2d, _BatchNorm),
    (nn.SyncBatchNorm, _BatchNorm), (nn.LayerNorm, _LayerNorm), (nn.Linear, _Linear),
)  # fmt: skip
NAMED: dict[str, type[_SparseLayer]] = {
    "SEModule": _Squeeze, "EffectiveSEModule": _Squeeze, "SqueezeExcite": _Squeeze, "SqueezeExcitation": _Squeeze,
    "GlobalResponseNorm": _ResponseNorm, "DropPath": _DropPath, "StochasticDepth": _DropPath,
}  # fmt: skip
"""Layers of timm and torchvision, by the name of their class: neither is imported for it."""
MIXING = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.ConvTranspose2d, nn.MultiheadAttention)
MIXING_NAMED = ("Attention", "Attn", "Cbam", "EcaModule", "GatherExcite", "GlobalContext", "Lambda")
"""Layers that mix positions and have no sparse form here: by class, and those of timm by what their names hold."""


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _windows_fit(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> bool:
    """Whether tiles map onto tiles: `u` positions with their rim to `u / stride`."""
    return all(
        u % s == 0 and (u + 2 * p - d * (k - 1) - 1) // s + 1 == u // s
        for u, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation)
    )


_MADE: dict[Any, type[nn.Module]] = {}


def _sparse_class(layer: type[nn.Module]) -> type[nn.Module] | None:
    """The sparse form of a class of layers; None: it needs none."""
    kind = NAMED.get(layer.__name__) or next((sparse for dense, sparse in SPARSE if issubclass(layer, dense)), None)
    if kind is not None and layer not in _MADE:
        _MADE[layer] = type(f"Sparse{layer.__name__}", (kind, layer), {"dense": layer, "__doc__": kind.__doc__})
    return None if kind is None else _MADE[layer]


# ---- networks


def sparsify(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A network whose convolutions, pools, norms and linear layers respect holes, see `set_hidden`.

    Works on convnets as they are: those of timm (`timm.create_model(..., features_only=True)`), of torchvision, or one's own.
    Names and values of the state stay, so checkpoints go both ways.

    Args:
        module: the network.
        inplace: change its layers and return it; else a copy is returned that shares parameters and buffers.

    Returns:
        The sparse network, which computes like the dense one outside of `set_hidden`.

    Raises:
        BadSetting: a layer that mixes positions and has no sparse form (group norm, transposed convolution, attention, and what
            gates by a mean over positions, except squeeze and excitation).

    Reference:
        Tian et al. 2023, official `dense_model_to_sparse`.
    """
    for name, m in module.named_modules():
        if isinstance(m, MIXING) or any(word in type(m).__name__ for word in MIXING_NAMED):
            raise BadSetting(
                f"{name or 'the module'} is a {type(m).__name__}, which has no sparse form: take a network without it"
            )
    return _converted(module, lambda m: None if isinstance(m, _SparseLayer) else _sparse_class(type(m)), inplace)


def densify(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The network that `sparsify` was given: the same weights in layers of their own classes."""
    return _converted(module, lambda m: m.dense if isinstance(m, _SparseLayer) else None, inplace)


def _converted(module: nn.Module, new: Callable[[nn.Module], type[nn.Module] | None], inplace: bool) -> nn.Module:
    if not inplace:
        shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
        module = copy.deepcopy(module, shared)  # type: ignore[arg-type]
    for m in module.modules():
        if (kind := new(m)) is not None:
            m.__class__ = kind
    return module


@contextmanager
def set_hidden(module: nn.Module, hidden: Tensor, *, packed: bool = False) -> Iterator[Holes]:
    """Within the block, the sparse layers of a module know what is hidden.

    The mask lies in the layers of this module, so other models, nested ones and replicas are not touched; one module serves one
    thread at a time. A backward pass that recomputes activations (checkpointing) belongs into the block.

    Args:
        module: anything with sparse layers in it.
        hidden: `[B, rows, columns]` bool, True = hidden; the grid is that of the coarsest feature map, or coarser.
        packed: compute on visible tiles alone.

    Yields:
        The `Holes`: the module is given `holes.enter(x)`, and `holes.leave(y)` are the maps.

    Raises:
        BadSetting: there are no sparse layers.
        BadData: a mask of another shape or type; within the block, a map that the grid does not divide.
    """
    layers = [m for m in module.modules() if isinstance(m, _SparseLayer)]
    if not layers:
        raise BadSetting(f"{type(module).__name__} has no sparse layers: call sparsify on it first")
    holes, before = Holes(hidden, packed=packed), [m.holes for m in layers]
    try:
        for m in layers:
            m.holes = holes
        yield holes
    finally:
        for m, earlier in zip(layers, before):
            m.holes = earlier


def visible_forward(module: nn.Module, x: Tensor, hidden: Tensor, *, packed: bool = True) -> Any:
    """Feature maps of the visible part of pictures.

    Args:
        module: sparse, from pictures to a map or a list of maps.
        x: `[B, C, H, W]`.
        hidden: `[B, rows, columns]` bool, True = hidden.
        packed: compute at visible positions alone; else everywhere, with zeros put into the holes after each layer.

    Returns:
        What the module gives, maps `[B, C', h, w]` with zeros in their holes; the same either way, but for rounding.
    """
    with set_hidden(module, hidden, packed=packed) as holes:
        y = module(holes.enter(x))
        return holes.leave(y) if isinstance(y, Tensor) else [holes.leave(t) for t in y]
