"""SimMIM: hide blocks, send mask tokens through the whole encoder, read the pixels off with one linear layer.

    L = Σ_hidden |x̂ - x| / #hidden pixels,     x normalised, L1, no patch normalisation

The encoder is a ViT with relative positions shared by all layers, or with sine-cosine ones; Swin encoders are not offered.

Source: Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886.

>>> import torch
>>> from sfumato.papers.masking.simmim import SimMIM
>>> model = SimMIM(SimMIM.Config.small())
>>> x = torch.zeros(2, 3, 32, 32)
>>> hidden = model.mask(x, torch.Generator().manual_seed(0))
>>> hidden.sum(1).tolist(), model.predict_image(x, hidden).shape
([40, 40], torch.Size([2, 3, 32, 32]))
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.errors import BadSetting
from sfumato.losses import masked_l1
from sfumato.masks import block_mask, upsample_mask
from sfumato.nn import MaskedViTEncoder, PixelShuffleHead
from sfumato.optim import linear_ramp
from sfumato.papers.masking.mae import SMALL_ENCODER, MaskedConfig, MaskedImageModel


class SimMIM(MaskedImageModel):
    """Mask tokens through the whole encoder, one linear layer to pixels, absolute error."""

    class Config(MaskedConfig):
        """ViT-B, 800 epochs of ImageNet-1k."""

        steps: int = Field(500_000, gt=0, description="optimizer steps; 800 epochs of ImageNet-1k")
        batch_size: int = Field(2048, gt=0, description="samples a step, over all micro-batches and processes")
        clip_norm: float | None = Field(5.0, gt=0, description="largest gradient norm; None: no clipping")
        mask_ratio: float = Field(0.6, ge=0, le=1, description="share of the mask units that is hidden")
        mask_unit: int = Field(32, gt=0, description="side of a mask unit, pixels; a multiple of patch")
        positions: str = Field("relative", pattern="^(relative|sincos|learned)$", description="how tokens know their place")
        drop_path: float = Field(0.1, ge=0, lt=1, description="share of residual branches skipped at the last block")
        base_lr: float = Field(5e-5, gt=0, description="peak learning rate for 256 samples a step; scaled to batch_size")
        betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's")
        warmup: float = Field(0.0125, ge=0, lt=1, description="share of the steps over which the learning rate rises")
        drop_at: float = Field(0.875, ge=0, le=1, description="share of the steps after which the rate is a tenth")
        crop_scale: tuple[float, float] | None = Field(
            (0.67, 1.0), description="area of a random crop over the image's, from and to; None: images are taken whole"
        )

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Minutes on a CPU: 32-pixel crops, 64 patches."""
            return cls(**{**SMALL_ENCODER, "mask_unit": 8, "drop_path": 0.0, "warmup": 0.05, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        if c.mask_unit % c.patch:
            raise BadSetting(f"mask_unit={c.mask_unit} must be a multiple of patch={c.patch}")
        self.encoder = MaskedViTEncoder(
            c.image_size, c.patch, self.channels, c.dim, c.depth, c.heads, mlp_ratio=c.mlp_ratio, positions=c.positions,
            drop_path=c.drop_path,
        )  # fmt: skip
        self.mask_token = nn.Parameter(0.02 * torch.randn(c.dim))
        self.head = PixelShuffleHead(c.dim, c.patch, self.channels)

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Units of patches, the ceiling of their share."""
        c = self.config
        return block_mask(len(x), self.encoder.grid, c.mask_ratio, unit=c.mask_unit // c.patch, generator=generator)

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Absolute error of the hidden pixels."""
        return self.loss_of_prediction(self.predict_image(x, hidden), x, hidden)

    def loss_of_prediction(self, predicted: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
        """The same of an image."""
        return masked_l1(predicted, x, upsample_mask(hidden, self.encoder.grid, self.config.patch))

    def image_of_prediction(self, predicted: Tensor, x: Tensor) -> Tensor:
        """It is one."""
        del x
        return predicted

    def predict_image(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Pixels from every token."""
        tokens = self.encoder(x, hidden, mask_token=self.mask_token)
        return self.head(tokens[:, self.encoder.prefix :], grid=self.encoder.grid)  # type: ignore[no-any-return]

    def lr_factor(self, progress: float) -> float:
        """A straight rise, then constant, then a tenth."""
        return linear_ramp(progress, end=self.config.warmup) * (0.1 if progress >= self.config.drop_at else 1.0)
