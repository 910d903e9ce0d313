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
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting

LARGEST_RIM = 4.0
"""Grouped convolutions whose tiles with their rim are more than this times larger run over the dense map: less to fetch."""


# ---- functions


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


# ---- where the holes are


class Holes:
    """Which cells of a grid are hidden, at the resolution of any feature map; `set_hidden` makes one.

    Args:
        hidden: `[B, rows, columns]` bool, True = hidden.
        packed: feature maps are visible tiles, `[n, C, u, u]`, and not whole maps.
    """

    def __init__(self, hidden: Tensor, *, packed: bool = False) -> None:
        if hidden.ndim != 3 or hidden.dtype != torch.bool:
            raise BadData(f"hidden must be bool of shape [B, rows, columns], not {hidden.dtype} of {list(hidden.shape)}")
        self.hidden, self.packed = hidden, packed
        self.grid = hidden.shape[1], hidden.shape[2]
        self._at: dict[Any, Tensor] = {}
        self._rims: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def at(self, height: int, width: int) -> Tensor:
        """The mask of a feature map, `[B, 1, h, w]` bool."""
        if (height, width) not in self._at:
            up, across = self._cell(height, width)
            self._at[height, width] = self.hidden.repeat_interleave(up, 1).repeat_interleave(across, 2)[:, None]
        return self._at[height, width]

    def blank(self, x: Tensor, *, channels_last: bool = False, inplace: bool = False) -> Tensor:
        """A map with zeros in its holes: `[B, C, h, w]`, or `[B, h, w, C]` with `channels_last`."""
        height, width = x.shape[1:3] if channels_last else x.shape[2:]
        key = height, width, x.dtype, channels_last
        if key not in self._at:
            visible = (~self.at(height, width)).to(x.dtype)
            self._at[key] = visible.permute(0, 2, 3, 1) if channels_last else visible
        return x.mul_(self._at[key]) if inplace else x * self._at[key]

    def pooled(self, x: Tensor) -> bool:
        """Whether it is one vector a picture, `[B, C, 1, 1]`, which has no positions left to hide."""
        return not self.packed and self.grid != (1, 1) and x.shape[2:] == (1, 1)

    @functools.cached_property
    def cells(self) -> Tensor:
        """Numbers of the visible cells, `[n]`, pictures and rasters in order."""
        return (~self.hidden).flatten().nonzero().squeeze(1)

    @functools.cached_property
    def owners(self) -> Tensor:
        """Which picture each visible tile is from, `[n]`."""
        return self.cells // (self.grid[0] * self.grid[1])

    def enter(self, x: Tensor) -> Tensor:
        """What a network is given for the pictures `[B, C, H, W]`: tiles when packed, else pictures with zeros in their holes."""
        return self.pack(x) if self.packed else self.blank(x)

    def leave(self, y: Tensor) -> Tensor:
        """What a network gives, as maps `[B, C, h, w]`."""
        return self.unpack(y) if self.packed else y

    def pack(self, x: Tensor) -> Tensor:
        """The visible tiles of a map: `[B, C, h, w]` to `[n, C, h / rows, w / columns]`, channels last in memory."""
        (rows, columns), (up, across) = self.grid, self._cell(*x.shape[2:])
        tiles = x.permute(0, 2, 3, 1).reshape(len(x), rows, up, columns, across, x.shape[1])
        tiles = tiles.transpose(2, 3).flatten(0, 2).index_select(0, self.cells)
        return tiles.permute(0, 3, 1, 2)

    def unpack(self, t: Tensor) -> Tensor:
        """The map that tiles are from, zeros in its holes: the inverse of `pack`."""
        (rows, columns), (channels, up, across), batch = self.grid, t.shape[1:], len(self.hidden)
        tiles = t.new_zeros(self.hidden.numel(), up, across, channels).index_copy(0, self.cells, t.permute(0, 2, 3, 1))
        x = tiles.view(batch, rows, columns, up, across, channels).transpose(2, 3)
        return x.reshape(batch, rows * up, columns * across, channels).permute(0, 3, 1, 2)

    def with_rim(self, t: Tensor, pad: tuple[int, int], *, beyond: float = 0.0) -> Tensor:
        """Tiles with the positions around them.

        Args:
            t: `[n, C, u, u']`.
            pad: width of the rim above and below, and on both sides.
            beyond: the value outside of the picture; in holes it is 0.

        Returns:
            `[n, C, u + 2 pad, u' + 2 pad']`, channels last in memory.
        """
        n, channels, up, across = t.shape
        key = up, across, *pad
        if key not in self._rims:
            self._rims[key] = self._rim(up, across, pad)
        source, hole, outside = self._rims[key]
        rows = t.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, source).index_fill_(0, hole, 0.0)
        rows = rows.index_fill_(0, outside, beyond)
        return rows.view(n, up + 2 * pad[0], across + 2 * pad[1], channels).permute(0, 3, 1, 2)

    def _rim(self, up: int, across: int, pad: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """For each position of the tiles with their rim: where it is found, and which are in holes or outside."""
        device, (rows, columns), batch = self.hidden.device, self.grid, len(self.hidden)
        reach = -(-pad[0] // up), -(-pad[1] // across)  # cells that a rim looks into
        number = torch.full((self.hidden.numel(),), -1, device=device)
        number[self.cells] = torch.arange(len(self.cells), device=device)
        around = (reach[1], reach[1], reach[0], reach[0])
        number = F.pad(number.view(batch, rows, columns), around, value=-2)
        y, x = (torch.arange(-p, u + p, device=device) for p, u in zip(pad, (up, across)))
        i = self.cells % (rows * columns) // columns
        i, j = (
            i[:, None] + y.div(up, rounding_mode="floor"),
            (self.cells % columns)[:, None] + x.div(across, rounding_mode="floor"),
        )
        tile = number[self.owners[:, None, None], i[:, :, None] + reach[0], j[:, None, :] + reach[1]]
        place = (y % up)[:, None] * across + x % across
        source = (tile.clamp(min=0) * (up * across) + place).flatten()
        return source, (tile == -1).flatten().nonzero().squeeze(1), (tile == -2).flatten().nonzero().squeeze(1)

    def _cell(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.grid
        if height % rows or width % columns:
            raise BadData(
                f"a map of {height} x {width} does not divide into the mask's {rows} x {columns} cells: "
                "the picture's sides must be multiples of the network's stride, and the mask no finer than its last map"
            )
        return height // rows, width // columns


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
        if whole and sync is None:
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
    """A norm over all positions, to which zeros add nothing."""

    def forward(self, x: Tensor) -> Tensor:
        holes, m = self.holes, self
        if holes is None or not holes.packed:
            return self._dense(x)
        last = m.channel_dim == -1
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
"""Layers that mix positions and have no sparse form here."""


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
        BadSetting: a layer that mixes positions and has no sparse form (group norm, transposed convolution, attention).

    Reference:
        Tian et al. 2023, official `dense_model_to_sparse`.
    """
    for name, m in module.named_modules():
        if isinstance(m, MIXING):
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
