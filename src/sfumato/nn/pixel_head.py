"""The lightest decoder: one linear layer from a token to its pixels, rearranged into an image.

    x̂ = PixelShuffle_s( Conv_1x1(z) ),   Conv: D -> s² C

Source: Xie et al. 2021, "SimMIM", section 3.3 (prediction head): heavier heads reconstruct better and transfer worse.

>>> import torch
>>> from sfumato.nn import PixelShuffleHead
>>> PixelShuffleHead(64, 16, 3)(torch.zeros(2, 64, 4, 5)).shape
torch.Size([2, 3, 64, 80])
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from sfumato.errors import BadData
from sfumato.masks.random_masks import Grid, grid_shape


class PixelShuffleHead(nn.Module):
    """A 1 x 1 convolution and a pixel shuffle.

    Args:
        dim: width D of the features.
        stride: pixels along the side of a feature, s.
        channels: of the image, C.
    """

    def __init__(self, dim: int, stride: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, stride * stride * channels, 1)
        self.shuffle = nn.PixelShuffle(stride)
        nn.init.xavier_uniform_(self.conv.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, z: Tensor, *, grid: Grid | None = None) -> Tensor:
        """Predict pixels.

        Args:
            z: `[B, D, h, w]` features, or `[B, L, D]` tokens with `grid`.
            grid: tokens along each side, for tokens.

        Returns:
            `[B, C, h * s, w * s]`.

        Raises:
            BadData: tokens without a grid that holds them.
        """
        if z.ndim == 3:
            rows, columns = (0, 0) if grid is None else grid_shape(grid)
            if rows * columns != z.shape[1]:
                raise BadData(f"{z.shape[1]} tokens do not stand on the grid {grid}: say grid=(rows, columns)")
            z = z.transpose(1, 2).reshape(len(z), -1, rows, columns)
        pixels: Tensor = self.shuffle(self.conv(z))
        return pixels
