"""A vision transformer that sees only the tokens that are not hidden, and a small decoder that fills the holes.

    z = Encoder( cls, visible patches + positions );   x̂ = Decoder( z and one learned token for each hole, + positions )

The parameters have timm's names: `timm_weights` is a copy, not a conversion. Blocks are timm's.

Sources: Dosovitskiy et al. 2020 (ViT); He et al. 2021 (MAE), section 3. With `mask_token` nothing is dropped and hidden
patches are replaced before the encoder: Xie et al. 2021 (SimMIM).

Attention is fused (`scaled_dot_product_attention`), which has no second derivative on a CPU: Hessian products need the forward
pass under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

>>> import torch
>>> from sfumato.masks import random_mask
>>> from sfumato.nn import MaskedDecoder, MaskedViTEncoder
>>> encoder = MaskedViTEncoder(32, 4, 3, dim=64, depth=2, heads=4)
>>> decoder = MaskedDecoder(64, 48, depth=1, heads=4, out_dim=4 * 4 * 3, grid=encoder.grid)
>>> x, hidden = torch.rand(2, 3, 32, 32), random_mask(2, encoder.grid, 0.75)
>>> z = encoder(x, hidden)
>>> z.shape, decoder(z, hidden).shape
(torch.Size([2, 17, 64]), torch.Size([2, 64, 48]))
>>> encoder.features(torch.rand(2, 3, 48, 40)).shape
torch.Size([2, 64])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.errors import BadData, BadSetting
from sfumato.masks.random_masks import Grid, grid_shape
from sfumato.masks.token_index import as_views, take_tokens, to_ids
from sfumato.nn.patches import patchify
from sfumato.nn.positions import RelativePositionBias, sincos_2d
from sfumato.nn.vit_blocks import initialise_linear, run_blocks, vit_block

POSITIONS = ("sincos", "learned", "relative")


class EncoderOutput(NamedTuple):
    """What an encoder returns when more than its tokens is asked for.

    Args:
        tokens: `[B, 1 + n, D]`, after the last norm.
        layers: after each block, `[B, 1 + n, D]`; empty if not asked for.
        attention: of each block, `[B, heads, 1 + n, 1 + n]`, rows sum to 1; empty if not asked for.
    """

    tokens: Tensor
    layers: list[Tensor]
    attention: list[Tensor]


class PatchEmbed(nn.Module):
    """A linear map of each patch. Stored as the convolution that it is in timm; computed only for the patches asked for."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` to `[B, L, D]`, or to `[V B, n, D]` for the patches `ids` `[V B, n]` of V views."""
        patches = patchify(x, self.patch, order="chw")
        if ids is not None:
            patches = take_tokens(as_views(patches, ids), ids)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class MaskedViTEncoder(nn.Module):
    """A plain pre-norm ViT whose hidden tokens are dropped before the first block (or replaced, with `mask_token`).

    Args:
        size: image side in pixels, or (height, width), that it is trained on; any other multiple of `patch` works too.
        patch: side of a patch in pixels.
        channels: of the image.
        dim: width D; a multiple of 4 (for `positions="sincos"`) and of `heads`.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over D.
        cls: put a learned class token first.
        positions: "sincos" (fixed), "learned" (one vector a token) or "relative" (a bias in the attention, shared by all
            layers).
        drop_path: share of residual branches skipped in training, rising linearly from 0 at the first block.
        init_values: first value of LayerScale; None: none.

    Raises:
        BadSetting: sizes that do not fit each other.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        patch: int,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        cls: bool = True,
        positions: str = "sincos",
        drop_path: float = 0.0,
        init_values: float | None = None,
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        if height % patch or width % patch:
            raise BadSetting(f"size {height} x {width} is not a multiple of patch={patch}")
        if positions not in POSITIONS:
            raise BadSetting(f"positions {positions!r} is not known: {', '.join(POSITIONS)}")
        self.settings: dict[str, Any] = {
            "size": size, "patch": patch, "channels": channels, "dim": dim, "depth": depth, "heads": heads,
            "mlp_ratio": mlp_ratio, "cls": cls, "positions": positions, "drop_path": drop_path, "init_values": init_values,
        }  # fmt: skip
        self.patch, self.channels, self.dim, self.grid = patch, channels, dim, (height // patch, width // patch)
        self.patch_embed = PatchEmbed(patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls else None
        length = self.grid[0] * self.grid[1] + cls
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, length, dim))
        elif positions == "sincos":
            self.register_buffer("pos_embed", sincos_2d(dim, self.grid, cls=cls)[None], persistent=False)
        self.position_bias = RelativePositionBias(self.grid, heads, cls=cls) if positions == "relative" else None
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(vit_block(dim, heads, mlp_ratio, drop_path=rate, init_values=init_values) for rate in rates)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialise()

    def _initialise(self) -> None:
        initialise_linear(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.settings["positions"] == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @classmethod
    def from_timm(cls, model: str | nn.Module, *, pretrained: bool = False) -> Self:
        """An encoder with the weights of a plain timm ViT, checked to give the same tokens.

        Args:
            model: a name, such as "vit_base_patch16_224", or a `timm.models.vision_transformer.VisionTransformer`.
            pretrained: download timm's weights, for a name.

        Returns:
            An encoder whose unmasked output equals the model's `forward_features`.

        Raises:
            BadSetting: the model has parts that a plain ViT has not (register tokens, another norm or activation, ...).
        """
        import timm

        vit: Any = timm.create_model(model, pretrained=pretrained) if isinstance(model, str) else model
        name = model if isinstance(model, str) else type(model).__name__
        try:
            encoder = cls(**_timm_settings(vit))
            state = {k: v for k, v in vit.state_dict().items() if not k.startswith("head.")}
            if vit.no_embed_class and encoder.cls_token is not None:
                state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
            encoder.load_state_dict(state)
        except (AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise BadSetting(f"{name} is not a plain ViT with one learned position a token: {reason}") from None
        encoder.to(next(vit.parameters()))
        if not _same_tokens(vit, encoder):
            raise BadSetting(f"{name} is not a plain ViT: its blocks compute something else")
        return encoder.train(vit.training)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        mask_token: Tensor | None = None,
        return_layers: bool = False,
        return_attention: bool = False,
    ) -> Tensor | EncoderOutput:
        """Encode the visible patches.

        Args:
            x: `[B, C, H, W]`, H and W multiples of the patch.
            mask: `[B, L]` bool, True = hidden, equally many in each row; or `[V B, L]`, V views of each image, all first views
                first. None: nothing is hidden.
            mask_token: `[D]` or `[1, 1, D]`; given, hidden patches become it (before positions are added) and stay in.
            return_layers: also return the tokens after each block.
            return_attention: also return each block's attention (not fused: slower).

        Returns:
            `[B, 1 + n, D]` (of views `[V B, 1 + n, D]`), class token first, visible patches in raster order (n = L with
            `mask_token`); or an `EncoderOutput`.

        Raises:
            BadData: an image that cannot be cut into patches, or another number of channels.
        """
        z, bias = self.embed(x, mask, mask_token=mask_token)
        z, kept, maps = run_blocks(self.blocks, z, bias=bias, layers=return_layers, attention=return_attention)
        tokens: Tensor = self.norm(z)
        return EncoderOutput(tokens, kept, maps) if return_layers or return_attention else tokens

    def embed(self, x: Tensor, mask: Tensor | None = None, *, mask_token: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the blocks start from, and the bias on their scores that relative positions are (None: there is none).

        Arguments as of `forward`. The tokens are `[B, 1 + n, D]`; the bias can be added to `[B, heads, 1 + n, 1 + n]`.
        """
        grid, ids = self._grid(x), None
        if mask is not None and mask_token is None:
            ids, _ = to_ids(mask)
        z = self.patch_embed(x, ids)
        if mask is not None and mask_token is not None:
            z = torch.where(mask[..., None], mask_token.to(z.dtype), as_views(z, mask))
        z = self._add_positions(z, grid, ids)
        return z, None if self.position_bias is None else self.position_bias(grid=grid, ids=ids)

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the blocks start from, for loops over `blocks` of one's own: visible patches in raster order, class token first.

        Args:
            x: as for `forward`.
            mask: as for `forward`.

        Returns:
            `[B, 1 + n, D]`, positions added; relative ones are the blocks' and not in it.

        Raises:
            BadData: as for `forward`.
        """
        return self.embed(x, mask)[0]

    def features(self, x: Tensor, *, pool: str = "mean") -> Tensor:
        """One vector an image.

        Args:
            x: `[B, C, H, W]`, H and W multiples of the patch.
            pool: "mean" of the patch tokens, or "cls".

        Returns:
            `[B, D]`.

        Raises:
            BadSetting: an unknown `pool`, or "cls" without a class token.
        """
        if pool not in ("mean", "cls") or (pool == "cls" and self.cls_token is None):
            raise BadSetting(f"pool {pool!r} is not possible: mean" + (" or cls" if self.cls_token is not None else ""))
        tokens: Tensor = self(x)
        return tokens[:, 0] if pool == "cls" else tokens[:, self.prefix :].mean(1)

    def timm_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The same network for timm.

        Returns:
            Arguments of `timm.models.vision_transformer.VisionTransformer`, and the state that it loads strictly; the model
            then gives `features(x)`.

        Raises:
            BadSetting: relative positions, which timm's plain ViT has not.
        """
        s = self.settings
        if self.position_bias is not None:
            raise BadSetting("timm's plain ViT has no relative positions: train with positions=sincos to export it")
        arguments = {
            "img_size": s["size"], "patch_size": s["patch"], "in_chans": s["channels"], "num_classes": 0, "global_pool": "avg",
            "fc_norm": False, "embed_dim": s["dim"], "depth": s["depth"], "num_heads": s["heads"], "mlp_ratio": s["mlp_ratio"],
            "class_token": s["cls"], "init_values": s["init_values"],
        }  # fmt: skip
        state = {name: value.detach().clone() for name, value in self.state_dict().items()}
        return arguments, state | {"pos_embed": self.pos_embed.detach().clone()}

    @property
    def prefix(self) -> int:
        """Tokens that stand before the patches: 1 with a class token."""
        return int(self.cls_token is not None)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        channels, height, width = x.shape[1:]
        if channels != self.channels:
            raise BadData(f"images of {channels} channels were given, this encoder takes {self.channels}")
        if height % self.patch or width % self.patch:
            raise BadData(f"an image of {height} x {width} pixels cannot be cut into patches of {self.patch}")
        return height // self.patch, width // self.patch

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """`[1, 1 + L, D]` for any grid: sine-cosine is computed anew, learned ones are resampled."""
        if grid == self.grid:
            return self.pos_embed
        if self.settings["positions"] == "sincos":
            like = self.pos_embed
            return sincos_2d(self.dim, grid, cls=bool(self.prefix), dtype=like.dtype, device=like.device)[None]
        from timm.layers.pos_embed import resample_abs_pos_embed

        resized: Tensor = resample_abs_pos_embed(self.pos_embed, list(grid), list(self.grid), num_prefix_tokens=self.prefix)
        return resized

    def _add_positions(self, z: Tensor, grid: tuple[int, int], ids: Tensor | None) -> Tensor:
        """Positions added, the class token put first: `[B, 1 + n, D]`."""
        cls: Tensor | None = self.cls_token
        if self.position_bias is None:
            positions = self._positions(grid)
            places = positions[0, self.prefix :]
            z = z + (places if ids is None else F.embedding(ids, places))
            if cls is not None:
                cls = cls + positions[:, :1]
        return z if cls is None else torch.cat((cls.to(z.dtype).expand(len(z), -1, -1), z), 1)


class MaskedDecoder(nn.Module):
    """Puts a learned token into every hole and predicts all tokens from it.

    Args:
        dim_in: width of the encoder's tokens.
        dim: width of the decoder.
        depth: blocks.
        heads: attention heads.
        out_dim: numbers predicted for each token, p²C for pixels.
        grid: tokens along each side.
        cls: the encoder's tokens begin with a class token.
        mlp_ratio: hidden width of the MLPs over `dim`.
    """

    positions: Tensor

    def __init__(
        self,
        dim_in: int,
        dim: int,
        depth: int,
        heads: int,
        out_dim: int,
        grid: Grid,
        *,
        cls: bool = True,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.prefix = int(cls)
        self.embed = nn.Linear(dim_in, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_2d(dim, grid_shape(grid), cls=cls)[None], persistent=False)
        self.blocks = nn.Sequential(*(vit_block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)
        initialise_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """Predict every token.

        Args:
            z: `[B, 1 + n, dim_in]`, the encoder's output for the visible tokens.
            mask: `[B, L]` bool, True = hidden.

        Returns:
            `[B, L, out_dim]`.
        """
        return self.decode(self.tokens(z, mask))

    def tokens(self, z: Tensor, mask: Tensor) -> Tensor:
        """What the blocks start from: visible tokens and mask tokens in their places, positions added; `[B, 1 + L, dim]`."""
        z = self.embed(z)
        visible = z[:, self.prefix :]
        _, restore = to_ids(mask, n_keep=visible.shape[1])
        holes = self.mask_token.to(z.dtype).expand(len(z), mask.shape[1] - visible.shape[1], -1)
        placed = take_tokens(torch.cat((visible, holes), 1), restore)
        return torch.cat((z[:, : self.prefix], placed), 1) + self.positions

    def decode(self, tokens: Tensor) -> Tensor:
        """From `tokens` on: `[B, 1 + L, dim]` to `[B, L, out_dim]`."""
        decoded: Tensor = self.head(self.norm(self.blocks(tokens)[:, self.prefix :]))
        return decoded


def _timm_settings(vit: Any) -> dict[str, Any]:
    """Arguments of `MaskedViTEncoder` read off a timm ViT."""
    embed, block = vit.patch_embed, vit.blocks[0]
    return {
        "size": tuple(embed.img_size), "patch": embed.patch_size[0], "channels": embed.proj.in_channels, "dim": vit.embed_dim,
        "depth": len(vit.blocks), "heads": block.attn.num_heads, "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "cls": vit.cls_token is not None, "positions": "learned", "init_values": 1.0 if hasattr(block.ls1, "gamma") else None,
    }  # fmt: skip


@torch.no_grad()
def _same_tokens(vit: Any, encoder: MaskedViTEncoder) -> bool:
    training = vit.training
    weight = encoder.patch_embed.proj.weight
    shape = (1, encoder.channels, encoder.grid[0] * encoder.patch, encoder.grid[1] * encoder.patch)
    x = torch.linspace(-2, 2, shape[1] * shape[2] * shape[3], device=weight.device, dtype=weight.dtype).sin().view(shape)
    same = torch.allclose(vit.eval().forward_features(x), encoder.eval()(x), atol=1e-3, rtol=1e-3)
    vit.train(training)
    return same
