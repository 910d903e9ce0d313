"""A vision transformer behind two convolutional stages that never look at what is hidden.

    block:    x + W₂ DW( keep · W₁ LN(x) ),  then  x + MLP(LN(x))         DW: a depthwise k x k convolution; keep: 0 where hidden
    encoder:  stages at 4 and 2 places along the side of a token, then visible tokens through transformer blocks;
              the maps of both stages, one linear layer each, are added before the last norm

Everything else acts at one place, so no visible number depends on a hidden pixel. The transformer's cost is that of the visible
tokens; the convolutional stages compute all places.

Sources: Gao et al. 2022, "ConvMAE: Masked Convolution Meets Masked Autoencoders", sections 3.1 to 3.3; sizes as in arXiv
2301.00230 (DMJD).

>>> import torch
>>> from sfumato.masks import random_mask
>>> from sfumato.nn import ConvStemViT
>>> encoder = ConvStemViT(32, 8, 3, dim=64, depth=1, heads=4, stem_dims=(16, 32), stem_blocks=(1, 1))
>>> x, hidden = torch.rand(2, 3, 32, 32), random_mask(2, encoder.grid, 0.75)
>>> encoder(x, hidden).shape, encoder.features(torch.rand(2, 3, 48, 40)).shape
(torch.Size([2, 4, 64]), torch.Size([2, 64]))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.masks.token_index import as_views, to_ids, upsample_mask
from sfumato.nn.masked_vit import PatchEmbed
from sfumato.nn.positions import sincos_2d
from sfumato.nn.vit_blocks import initialise_linear, vit_block

SCALES = (4, 2)
"""Places along the side of a token, in the first and the second stage."""


class MaskedConvBlock(nn.Module):
    """A residual block of a convolution that reads visible places alone, and of an MLP at each place.

    Args:
        dim: channels D.
        kernel: side of the depthwise convolution, odd.
        mlp_ratio: hidden width of the MLP over D.

    Raises:
        BadSetting: an even kernel.
    """

    def __init__(self, dim: int, *, kernel: int = 5, mlp_ratio: float = 4.0) -> None:
        from timm.layers.mlp import Mlp

        super().__init__()
        if kernel % 2 == 0:
            raise BadSetting(f"kernel={kernel}: a convolution that keeps the size has an odd one")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.before = nn.Linear(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.after = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`[B, D, H, W]` to the same.

        Args:
            x: features; fastest in `torch.channels_last`, which the output has.
            hidden: `[B, 1, H, W]` bool, True = hidden: what stands there reaches no other place. None: nothing is.
        """
        z = x.permute(0, 2, 3, 1)
        y = self.before(self.norm1(z))
        if hidden is not None:
            y = y.masked_fill(hidden.permute(0, 2, 3, 1), 0.0)
        y = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        z = z + self.after(y)
        z = z + self.mlp(self.norm2(z))
        return z.permute(0, 3, 1, 2)


class ConvStemViT(nn.Module):
    """Convolutional stages with masked convolutions, then a pre-norm transformer on the visible tokens; no class token.

    Args:
        size: image side in pixels, or (height, width), that it is trained on; any other multiple of `patch` works too.
        patch: side of a token in pixels, a multiple of 4.
        channels: of the image.
        dim: width D of the transformer, a multiple of 4 and of `heads`.
        depth: transformer blocks.
        heads: attention heads.
        stem_dims: channels of the two stages.
        stem_blocks: blocks of the two stages.
        mlp_ratio: hidden width of the transformer's MLPs over D.
        stem_mlp_ratio: that of the stages' MLPs over their channels.
        kernel: side of the depthwise convolutions, odd.

    Raises:
        BadSetting: sizes that do not fit each other.
    """

    positions: Tensor
    prefix = 0
    """Tokens that stand before the patches: there is no class token."""

    def __init__(
        self,
        size: int | tuple[int, int],
        patch: int,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        stem_dims: tuple[int, int] = (256, 384),
        stem_blocks: tuple[int, int] = (2, 2),
        mlp_ratio: float = 4.0,
        stem_mlp_ratio: float = 8.0,
        kernel: int = 5,
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        if patch % 4 or height % patch or width % patch:
            raise BadSetting(f"patch={patch} must be a multiple of 4 here and a divisor of the size, {height} x {width}")
        self.settings: dict[str, Any] = {
            "size": size, "patch": patch, "channels": channels, "dim": dim, "depth": depth, "heads": heads,
            "stem_dims": stem_dims, "stem_blocks": stem_blocks, "mlp_ratio": mlp_ratio, "stem_mlp_ratio": stem_mlp_ratio,
            "kernel": kernel,
        }  # fmt: skip
        self.patch, self.channels, self.dim, self.grid = patch, channels, dim, (height // patch, width // patch)
        first, second = stem_dims
        self.embeds = nn.ModuleList((_Embed(channels, first, patch // 4), _Embed(first, second, 2)))
        self.stages = nn.ModuleList(
            nn.ModuleList(MaskedConvBlock(d, kernel=kernel, mlp_ratio=stem_mlp_ratio) for _ in range(count))
            for d, count in zip(stem_dims, stem_blocks, strict=True)
        )
        self.fusions = nn.ModuleList(PatchEmbed(scale, d, dim) for scale, d in zip(SCALES, stem_dims, strict=True))
        self.patch_embed = PatchEmbed(2, second, dim)
        self.project = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.GELU(), nn.Linear(dim, dim))
        self.register_buffer("positions", sincos_2d(dim, self.grid), persistent=False)
        self.blocks = nn.Sequential(*(vit_block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        initialise_linear(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:  # of patches: linear maps
                nn.init.xavier_uniform_(module.weight.flatten(1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode the visible patches.

        Args:
            x: `[B, C, H, W]`, H and W multiples of the patch.
            mask: `[B, L]` bool, True = hidden, equally many in each row; or `[V B, L]`, V views of each image, all first views
                first: they share the first embedding. None: nothing is hidden.

        Returns:
            `[B, n, D]` (of views `[V B, n, D]`), visible tokens in raster order.

        Raises:
            BadData: an image that cannot be cut into patches, or another number of channels.
        """
        grid = self._grid(x)
        ids = None if mask is None else to_ids(mask)[0]
        fused: list[Tensor] = []
        for scale, embed, stage, fusion in zip(SCALES, self.embeds, self.stages, self.fusions, strict=True):
            hidden = None if mask is None else upsample_mask(mask, grid, scale)
            x = embed(x) if mask is None else as_views(embed(x), mask)
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, hidden)
            fused.append(fusion(x, ids))
        places = self.positions if grid == self.grid else sincos_2d(self.dim, grid).to(self.positions)
        z = self.project(self.patch_embed(x, ids)) + (places if ids is None else F.embedding(ids, places))
        tokens: Tensor = self.norm(self.blocks(z) + fused[0] + fused[1])
        return tokens

    def features(self, x: Tensor) -> Tensor:
        """The mean of the tokens of images `[B, C, H, W]`, H and W multiples of the patch: `[B, D]`."""
        return self(x).mean(1)  # type: ignore[no-any-return]

    def _grid(self, x: Tensor) -> tuple[int, int]:
        channels, height, width = x.shape[1:]
        if channels != self.channels:
            raise BadData(f"images of {channels} channels were given, this encoder takes {self.channels}")
        if height % self.patch or width % self.patch:
            raise BadData(f"an image of {height} x {width} pixels cannot be cut into patches of {self.patch}")
        return height // self.patch, width // self.patch


class _Embed(nn.Module):
    """Patches of a map to places of the next one: a strided convolution, LayerNorm over the channels, GELU; channels last."""

    def __init__(self, channels: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, stride, stride)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return F.gelu(z).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
