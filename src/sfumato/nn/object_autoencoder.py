"""A masked autoencoder on the tokens of one object: the encoder sees those that are left, a small decoder predicts the pixels.

    z = LN( blocks( visible( LN W LN t + p ) ) );   x̂ = W' LN( blocks( z + q at visible places, m + q at hidden ones ) )

p, q: learned positions; m: a learned token. Unlike MAE's, tokens come from a feature map, positions are learned, and the decoder
may have the width of the encoder.

Source: Panariello et al. 2024, arXiv 2401.03191, section 3.

>>> import torch
>>> from sfumato.masks import random_mask
>>> from sfumato.nn import MaskedObjectAutoencoder
>>> model = MaskedObjectAutoencoder(32, (4, 4), cell=(5, 5), encoder_depth=2, encoder_heads=4, decoder_depth=1, decoder_heads=4)
>>> tokens, hidden = torch.rand(3, 16, 32), random_mask(3, 4, 0.5)
>>> encoded = model.encode(tokens, hidden)
>>> encoded.shape, model.decode(encoded, hidden).shape
(torch.Size([3, 8, 32]), torch.Size([3, 16, 75]))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.errors import BadCheckpoint
from sfumato.masks.random_masks import Grid, grid_shape
from sfumato.masks.token_index import take_tokens, to_ids
from sfumato.nn.vit_blocks import vit_block


class MaskedObjectAutoencoder(nn.Module):
    """Tokens of objects to an encoding of them, and to the pixels of their cells.

    Args:
        dim: width of the tokens and of the encoder.
        grid: tokens along each side of an object.
        cell: (height, width) in pixels of what a token stands for.
        channels: of the pixels.
        encoder_depth: blocks of the encoder.
        encoder_heads: its attention heads.
        decoder_dim: width of the decoder; None: `dim`, and no projection between the two.
        decoder_depth: blocks of the decoder.
        decoder_heads: its attention heads.
        mlp_ratio: hidden width of the MLPs over the block's width.
        token_std: deviation of the first positions and mask token. At 1 the mean of few visible tokens is mostly that of their
            positions, which a small network unlearns slowly.
    """

    def __init__(
        self,
        dim: int,
        grid: Grid = (8, 8),
        *,
        cell: tuple[int, int] = (15, 15),
        channels: int = 3,
        encoder_depth: int = 6,
        encoder_heads: int = 12,
        decoder_dim: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int = 8,
        mlp_ratio: float = 4.0,
        token_std: float = 1.0,
    ) -> None:
        super().__init__()
        rows, columns = grid_shape(grid)
        length, inner = rows * columns, decoder_dim or dim
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.positions = nn.Parameter(token_std * torch.randn(1, length, dim))
        self.encoder = nn.Sequential(*(vit_block(dim, encoder_heads, mlp_ratio) for _ in range(encoder_depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.bridge = nn.Identity() if inner == dim else nn.Linear(dim, inner)
        self.mask_token = nn.Parameter(token_std * torch.randn(1, 1, inner))
        self.decoder_positions = nn.Parameter(token_std * torch.randn(1, length, inner))
        self.decoder = nn.Sequential(*(vit_block(inner, decoder_heads, mlp_ratio) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(inner, eps=1e-6)
        self.head = nn.Linear(inner, channels * cell[0] * cell[1])

    def encode(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """What is visible, encoded.

        Args:
            tokens: `[N, L, dim]`.
            hidden: `[N, L]` bool, True = hidden, equally many in each row; None: nothing is.

        Returns:
            `[N, n, dim]`, visible tokens in raster order.
        """
        z = self.embed(tokens) + self.positions
        if hidden is not None and len(hidden):
            z = take_tokens(z, to_ids(hidden)[0])
        encoded: Tensor = self.norm(self.encoder(z))
        return encoded

    def decode(self, encoded: Tensor, hidden: Tensor) -> Tensor:
        """Pixels of every cell, `[N, L, channels · cell]` (channel first), from what `encode` gave under the same mask."""
        z = self.bridge(encoded)
        _, restore = to_ids(hidden, n_keep=z.shape[1])
        holes = self.mask_token.to(z.dtype).expand(len(z), hidden.shape[1] - z.shape[1], -1)
        placed = take_tokens(torch.cat((z, holes), 1), restore) + self.decoder_positions
        decoded: Tensor = self.head(self.decoder_norm(self.decoder(placed)))
        return decoded

    def forward(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` and `decode`."""
        encoded = self.encode(tokens, hidden)
        return encoded, self.decode(encoded, hidden)

    def load_vit(self, vit: nn.Module) -> None:
        """Start from the last blocks of a plain timm ViT: the encoder from those before, the decoder from the very last ones.

        A decoder of another width keeps its own weights, and the encoder takes the very last blocks.

        Raises:
            BadCheckpoint: the ViT has too few blocks, or blocks of another shape.
        """
        theirs = list(vit.blocks)  # type: ignore[arg-type]
        alike = self.decoder_norm.normalized_shape == self.norm.normalized_shape and _heads(self.decoder) == _heads(self.encoder)
        ours = [*self.encoder, *(self.decoder if alike else ())]
        if len(theirs) < len(ours):
            raise BadCheckpoint(f"the ViT has {len(theirs)} blocks, {len(ours)} are needed")
        try:
            for block, source in zip(ours, theirs[len(theirs) - len(ours) :], strict=True):
                block.load_state_dict(source.state_dict())
        except RuntimeError:
            raise BadCheckpoint("the blocks of the ViT have another shape: it must be plain and as wide as the tokens") from None


def _heads(blocks: nn.Sequential) -> int | None:
    return blocks[0].attn.num_heads if len(blocks) else None  # type: ignore[union-attr, return-value]
