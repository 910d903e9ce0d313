"""Where a token stands: fixed sine-cosine codes of its column and row, or a learned bias for each offset between tokens.

    ω_k = 10000^(-k / (D/4)),  e(t) = [sin tω, cos tω],  code(row i, column j) = [e(j), e(i)]      the column first

Sources: He et al. 2021 (official `pos_embed`); relative bias: Liu et al. 2021 (Swin), shared by all layers as in Bao et al.
2021 (BEiT) and Xie et al. 2021 (SimMIM).

>>> from sfumato.nn import sincos_2d
>>> sincos_2d(8, (1, 2))
tensor([[0.0000, 0.0000, 1.0000, 1.0000, 0.0000, 0.0000, 1.0000, 1.0000],
        [0.8415, 0.0100, 0.5403, 0.9999, 0.0000, 0.0000, 1.0000, 1.0000]])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadSetting
from sfumato.masks.random_masks import Grid, grid_shape


def sincos_2d(
    dim: int, grid: Grid, *, cls: bool = False, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Fixed sine-cosine position codes; positions are integers, so any grid has its codes.

    Args:
        dim: width D, a multiple of 4.
        grid: tokens along each side.
        cls: put a row of zeros first, for a class token.
        dtype: of the result (computed in float64); None: the default float type.
        device: of the result.

    Returns:
        `[L, D]`, or `[L + 1, D]` with `cls`; every token's row has squared norm D / 2.

    Raises:
        BadSetting: `dim` is not a multiple of 4.

    Reference:
        He et al. 2021, official code; note the column's half before the row's.
    """
    if dim % 4:
        raise BadSetting(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    rows, columns = grid_shape(grid)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def code(count: int) -> Tensor:  # [count, D / 2]
        angle = torch.arange(count, dtype=torch.float64)[:, None] * omega
        return torch.cat((angle.sin(), angle.cos()), 1)

    column = code(columns).expand(rows, -1, -1)
    row = code(rows)[:, None].expand(-1, columns, -1)
    codes = torch.cat((column, row), -1).reshape(rows * columns, dim)
    if cls:
        codes = torch.cat((codes.new_zeros(1, dim), codes))
    return codes.to(device=device, dtype=dtype or torch.get_default_dtype())


class RelativePositionBias(nn.Module):
    """A learned number for each head and each offset between two tokens, added to the attention scores.

    Args:
        grid: tokens along each side; other grids get the table resampled.
        heads: attention heads.
        cls: a class token stands first; its offsets have three entries of their own.
    """

    index: Tensor

    def __init__(self, grid: Grid, heads: int, *, cls: bool = True) -> None:
        super().__init__()
        self.grid, self.cls = grid_shape(grid), cls
        h, w = self.grid
        self.table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3 * cls, heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", self._offsets(self.grid), persistent=False)

    def forward(self, *, grid: Grid | None = None, ids: Tensor | None = None) -> Tensor:
        """The bias between all tokens, or between those that are kept.

        Args:
            grid: tokens along each side; None: the trained one.
            ids: `[B, n]`, positions of the visible patch tokens; None: all.

        Returns:
            `[1 or B, heads, N, N]`, N counts the class token.
        """
        shape = self.grid if grid is None else grid_shape(grid)
        index = self.index if shape == self.grid else self._offsets(shape).to(self.table.device)
        if ids is None:
            return self._table(shape)[index].permute(2, 0, 1)[None]
        if self.cls:
            ids = F.pad(ids + 1, (1, 0))
        return self._table(shape)[index[ids[:, :, None], ids[:, None, :]]].permute(0, 3, 1, 2)

    def _table(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.table
        (h, w), (rows, columns) = self.grid, grid
        count = (2 * h - 1) * (2 * w - 1)
        image = self.table[:count].T.reshape(1, -1, 2 * h - 1, 2 * w - 1)
        resized = F.interpolate(image, (2 * rows - 1, 2 * columns - 1), mode="bicubic", align_corners=True)
        return torch.cat((resized[0].flatten(1).T, self.table[count:]))

    def _offsets(self, grid: tuple[int, int]) -> Tensor:
        """Row of the table for each pair of tokens, `[N, N]`."""
        rows, columns = grid
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y + rows - 1) * (2 * columns - 1) + (x[:, None] - x + columns - 1)
        if not self.cls:
            return index
        first = (2 * rows - 1) * (2 * columns - 1)
        index = F.pad(index, (1, 0, 1, 0), value=first)  # from the class token
        index[1:, 0] = first + 1  # to it
        index[0, 0] = first + 2
        return index
