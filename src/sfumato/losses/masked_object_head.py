"""Masked object modelling as an auxiliary loss: half of each object's tokens is hidden, and its own pixels are predicted.

    tokens of a box = RoIAlign(F);   loss = `masked_object_mse`( decode( encode( visible tokens ) ), crop, hidden )

Masks lie on tokens of objects, not on pixels of frames: an object of ten pixels is never hidden as a whole. At rest nothing is
hidden, and the decoder is not run.

Source: Panariello et al. 2024, "Monocular Per-Object Distance Estimation with Masked Object Modeling", arXiv 2401.03191.

>>> import torch
>>> from sfumato.losses import MaskedObjectHead
>>> mine = torch.nn.Conv2d(3, 8, 3, 4, 1)
>>> head = MaskedObjectHead(mine, 8, 4, dim=24, grid=4, crop=(16, 16), weighing={"min_box": 2})
>>> objects = head(torch.rand(2, 3, 32, 32), [torch.tensor([[2.0, 3.0, 20.0, 30.0]]), torch.empty(0, 4)])
>>> objects.features.shape, bool(objects.loss > 0)  # add objects.loss to your own
(torch.Size([1, 24]), True)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.losses.masked_object import masked_object_focal, masked_object_mse, object_weights
from sfumato.masks.guided import mask_from_scores
from sfumato.masks.random_masks import Grid, grid_shape
from sfumato.nn.boxes import Boxes, box_rows, resized_crops
from sfumato.nn.object_autoencoder import MaskedObjectAutoencoder
from sfumato.nn.object_tokens import RoITokens

ERRORS = {"mse": masked_object_mse, "focal": masked_object_focal}
"""Of hidden cells."""


class Objects(NamedTuple):
    """What `MaskedObjectHead` knows of the objects of a batch, in the order of `rows`.

    Args:
        features: `[N, dim]`, mean of the encoded tokens.
        loss: that of the hidden cells; 0 where nothing was reconstructed.
        rows: `[N, 5]`, see `sfumato.nn.box_rows`.
        crops: `[N, C, h, w]`, or None where they were not needed.
        hidden: `[N, L]` bool, or None where nothing was hidden.
        predicted: `[N, L, P]`, pixels of every cell, or None.
    """

    features: Tensor
    loss: Tensor
    rows: Tensor
    crops: Tensor | None
    hidden: Tensor | None
    predicted: Tensor | None


class MaskedObjectHead(nn.Module):
    """Masked object modelling for any network: one vector for every box, and the auxiliary loss while training.

    Args:
        backbone: images `[B, C, H, W]` to features `[B, feature_dim, H / stride, W / stride]`; yours. None: features are given.
        feature_dim: channels of the features.
        stride: pixels of the image for one of the features.
        dim: width of the tokens.
        grid: tokens along each side of an object.
        crop: (height, width) in pixels to which objects are resized; multiples of the grid.
        channels: of the images.
        mask_ratio: share of each object's tokens that is hidden while training.
        norm_pix: predict pixels normalised within each cell.
        error: "mse" (`masked_object_mse`) or "focal" (`masked_object_focal`).
        visible_weight: of the same loss on visible cells (the paper's 0.001 on MOTSynth).
        hidden_dim: channels inside the projection of the features.
        aligned: see `sfumato.nn.RoITokens`.
        weighing: arguments of `object_weights`.
        autoencoder: arguments of `sfumato.nn.MaskedObjectAutoencoder`.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        feature_dim: int,
        stride: int,
        *,
        dim: int = 768,
        grid: Grid = 8,
        crop: tuple[int, int] = (120, 120),
        channels: int = 3,
        mask_ratio: float = 0.5,
        norm_pix: bool = False,
        error: str = "mse",
        visible_weight: float = 0.0,
        hidden_dim: int = 256,
        aligned: bool = True,
        weighing: dict[str, float] | None = None,
        autoencoder: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        rows, columns = grid_shape(grid)
        if crop[0] % rows or crop[1] % columns:
            raise BadSetting(f"crop={crop} is no multiple of the grid {rows} x {columns}: every token stands for whole pixels")
        self.backbone, self.stride, self.grid, self.crop = backbone, stride, (rows, columns), crop
        self.mask_ratio, self.norm_pix, self.visible_weight = mask_ratio, norm_pix, visible_weight
        if error not in ERRORS:
            raise BadSetting(f"error {error!r} is not known: {' or '.join(ERRORS)}")
        self.error, self.weighing = error, dict(weighing or {})
        self.tokens = RoITokens(feature_dim, dim, self.grid, hidden=hidden_dim, aligned=aligned)
        cell = (crop[0] // rows, crop[1] // columns)
        self.autoencoder = MaskedObjectAutoencoder(dim, self.grid, cell=cell, channels=channels, **(autoencoder or {}))

    def draw_mask(self, count: int, *, device: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """`[count, L]` bool: of each object the ⌊ratio · L⌋ tokens with the smallest noise."""
        device = generator.device if generator is not None else device
        noise = torch.rand(count, self.grid[0] * self.grid[1], generator=generator, device=device)
        return mask_from_scores(noise, ratio=self.mask_ratio, largest=False, rule="hide_floor")

    def forward(
        self,
        x: Tensor,
        boxes: Boxes,
        *,
        features: Tensor | None = None,
        crops: Tensor | None = None,
        hidden: Tensor | None = None,
        reconstruct: bool = True,
        generator: torch.Generator | None = None,
    ) -> Objects:
        """One vector a box; in training mode, or under a given mask, with the loss.

        Args:
            x: `[B, C, H, W]`; in [0, 1] unless `crops` are given.
            boxes: xyxy in pixels of `x`: padded `[B, n, 4]`, a list of `[n, 4]`, or rows `[N, 5]`.
            features: of `x`, instead of calling the backbone.
            crops: clean ones `[N, C, h, w]`, where `x` is not what is to be predicted.
            hidden: `[N, L]` bool; None: drawn in training mode, else nothing is hidden.
            reconstruct: predict the hidden cells and compute the loss.
            generator: source of the mask.

        Raises:
            BadData: features that do not have the stride.
        """
        rows = box_rows(boxes).to(x)
        if features is None:
            if self.backbone is None:
                raise BadData("this head has no backbone: give features=")
            features = self.backbone(x)
        if any(abs(f * self.stride - s) >= self.stride for f, s in zip(features.shape[-2:], x.shape[-2:])):
            raise BadData(
                f"features are {list(features.shape[-2:])}: stride {self.stride} of {list(x.shape[-2:])} is something else"
            )
        tokens = self.tokens(features, rows, (x.shape[-2], x.shape[-1]))
        if hidden is None and self.training:
            hidden = self.draw_mask(len(rows), device=x.device, generator=generator)
        encoded = self.autoencoder.encode(tokens, hidden)
        loss, predicted = encoded.new_zeros(()), None
        if hidden is not None and reconstruct:
            crops = resized_crops(x, rows, self.crop) if crops is None else crops
            predicted = self.autoencoder.decode(encoded, hidden)
            weights = object_weights(crops, rows, **self.weighing)
            settings: dict[str, Any] = {"weights": weights, "norm_pix": self.norm_pix}
            error = ERRORS[self.error]
            loss = error(predicted, crops, hidden, self.grid, **settings)
            if self.visible_weight:
                loss = loss + self.visible_weight * error(predicted, crops, ~hidden, self.grid, **settings)
        return Objects(encoded.mean(1), loss, rows, crops, hidden, predicted)
