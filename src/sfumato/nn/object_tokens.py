"""A grid of tokens for every boxed object, cut out of a network's feature map: far objects get as many as near ones.

    tokens = project( RoIAlign( F, box · (width of F / width of the image), grid ) ),     project = 1 x 1 conv, ELU, 1 x 1 conv

Sources: He et al. 2017, "Mask R-CNN" (RoIAlign); the projection is that of Panariello et al. 2024, arXiv 2401.03191.

>>> import torch
>>> from sfumato.nn import RoITokens
>>> cut = RoITokens(16, 32, grid=(4, 4), hidden=8)
>>> boxes = [torch.tensor([[0.0, 0.0, 20.0, 30.0]]), torch.empty(0, 4), torch.tensor([[4.0, 4.0, 9.0, 9.0]])]
>>> cut(torch.rand(3, 16, 8, 12), boxes, (32, 48)).shape
torch.Size([2, 16, 32])
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sfumato.errors import BadData
from sfumato.masks.random_masks import Grid, grid_shape


class RoITokens(nn.Module):
    """Feature maps and boxes to tokens.

    Args:
        in_channels: of the feature map.
        dim: width of a token.
        grid: tokens along each side of a box.
        hidden: channels between the two projections.
        aligned: shift by half a pixel, so that a token stands for the middle of its cell; False: as older weights expect.
    """

    def __init__(self, in_channels: int, dim: int, grid: Grid = (8, 8), *, hidden: int = 256, aligned: bool = True) -> None:
        super().__init__()
        self.grid, self.aligned = grid_shape(grid), aligned
        self.project = nn.Sequential(nn.Conv2d(in_channels, hidden, 1), nn.ELU(), nn.Conv2d(hidden, dim, 1))

    def sample(self, features: Tensor, boxes: Tensor | Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The feature map inside the boxes, `[N, in_channels, rows, columns]`; arguments as for `forward`.

        Raises:
            BadData: a feature map whose sides are not in the proportion of the image's.
        """
        from torchvision.ops import roi_align

        (height, width), (h, w) = size, features.shape[-2:]
        scale = w / width
        if abs(h - scale * height) > 1:
            raise BadData(
                f"features of {h} x {w} do not come from an image of {height} x {width}: boxes are in pixels of the image"
            )
        rows = boxes.to(features) if isinstance(boxes, Tensor) else [b.to(features) for b in boxes]
        cut: Tensor = roi_align(features, rows, self.grid, spatial_scale=scale, aligned=self.aligned)
        return cut

    def forward(self, features: Tensor, boxes: Tensor | Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Tokens of every object.

        Args:
            features: `[B, in_channels, h, w]`.
            boxes: `[n, 4]` for each image, xyxy in pixels of the image; or rows `[N, 5]` (number of the image first).
            size: (H, W) of the image.

        Returns:
            `[N, L, dim]`, objects in the order of images, tokens in raster order.
        """
        projected: Tensor = self.project(self.sample(features, boxes, size))
        return projected.flatten(2).transpose(1, 2)
