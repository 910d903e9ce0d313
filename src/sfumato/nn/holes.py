"""Which cells of a grid are hidden, at the resolution of any feature map, and the visible tiles of a map without its holes.

    pack:      [B, C, h, w] -> [n, C, h / rows, w / columns], the visible cells of all pictures side by side
    with_rim:  each tile with the positions around it, fetched from its neighbours: 0 where these are hidden

>>> import torch
>>> from sfumato.nn import Holes
>>> holes = Holes(torch.tensor([[[True, False], [True, True]]]))  # one picture, a grid of 2 x 2
>>> x = torch.rand(1, 3, 8, 8)
>>> tiles = holes.pack(x)
>>> tiles.shape, torch.equal(holes.unpack(tiles), holes.blank(x)), holes.with_rim(tiles, (1, 1)).shape
(torch.Size([1, 3, 4, 4]), True, torch.Size([1, 3, 6, 6]))
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData


class Holes:
    """The holes of a batch of pictures; `set_hidden` makes one.

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
