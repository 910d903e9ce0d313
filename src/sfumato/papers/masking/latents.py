"""Masked models whose pictures are latents: of a frozen VAE, of principal components of patches, or the pixels themselves.

Pictures are encoded in every step, or come from a `LatentCache` as the latents that they are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from sfumato.errors import BadData, BadSetting
from sfumato.losses import masked_mean
from sfumato.masks import fill, upsample_mask
from sfumato.method import Batch, Method
from sfumato.nn import DiffusersVAE, IdentityCodec, PatchPCA
from sfumato.papers.masking.mae import MaskedConfig, MaskedImageModel

PCA_PICTURES = 4096
"""Pictures of the training data that the PCA is fitted on, about: the first ones of those that `survey` is given."""


class LatentConfig(MaskedConfig):
    """What makes latents of pictures, beside what all masked models have."""

    codec: Literal["vae", "pca", "identity"] = Field("vae", description="what makes latents: identity is pixel space")
    vae: str | None = Field(None, description="codec=vae: folder, or name on the hub, of an AutoencoderKL's weights")
    reduction: int = Field(8, gt=0, description="side in pixels of what becomes one latent; 1 with codec=identity")
    latent_channels: int | None = Field(
        None, gt=0, description="numbers a latent; None: 4 (vae), a quarter of the pixels' (pca), the picture's (identity)"
    )
    patch: int = Field(4, gt=0, description="side of a token, latents")
    norm_pix: bool = Field(True, description="predict latents normalised within each token; off for reconstruction")


class LatentImageModel(MaskedImageModel):
    """A masked model of latents `latent_shape`; a subclass gives it `encoder`, and what its parent asks for."""

    codec: Any
    """A `LatentCodec`; of codec=vae None until `survey` or a checkpoint brings it."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        self.reduction: int = 1 if c.codec == "identity" else c.reduction
        if c.image_size % (self.reduction * c.patch):
            raise BadSetting(
                f"image_size={c.image_size} is no multiple of {self.reduction * c.patch}, the {c.patch} latents of "
                f"{self.reduction} pixels of a token: set image_size or patch"
            )
        side = c.image_size // self.reduction
        numbers = {"vae": 4, "pca": -(-self.channels * self.reduction**2 // 4), "identity": self.channels}[c.codec]
        self.latent_shape: tuple[int, int, int] = (c.latent_channels or numbers, side, side)
        self.codec, self.surveyed = None, c.codec == "identity"
        if c.codec == "identity":
            if self.latent_shape[0] != self.channels:
                raise BadSetting(f"latent_channels={c.latent_channels}: with codec=identity leave it out")
            self.codec = IdentityCodec()
        elif c.codec == "pca":
            self.codec = PatchPCA(self.reduction, self.latent_shape[0], channels=self.channels)

    def augment(self) -> Callable[..., Any] | None:
        """A random crop, bicubic, and a random flip; latents of a cache pass: they were augmented when they were made."""
        inner = super().augment()
        return inner if inner is None or self.config.codec == "identity" else _OfPictures(inner, self.latent_shape)

    # ---- pictures and latents

    def survey(self, batches: Iterable[Batch]) -> None:
        """Read the VAE, or fit the PCA on the first pictures, which should be a random few; a codec that is known stays.

        Raises:
            BadSetting: codec=vae without `vae`, or one of another shape.
            BadData: no pictures or their latents, and a PCA that has seen none.
        """
        self._need_codec()
        if self.surveyed:
            return
        if self.config.codec == "pca":
            self.codec.fit(self._first_pictures(batches))
        self.surveyed = True

    def _first_pictures(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """As many as the PCA is fitted on, a batch at a time."""
        count = 0
        for batch in batches:
            if self._are_latents(batch.x):
                raise BadData("these are latents, of a PCA that is not known here: give the pictures to survey() first")
            yield self.to_size(batch.x)
            count += len(batch)
            if count >= PCA_PICTURES:
                return
        if not count:
            raise BadData("a PCA is fitted on pictures: give survey() batches of some")

    def normalised(self, x: Tensor) -> Tensor:
        """What the network sees: latents `[B, c, h, w]` of pictures of any size, or latents of `codec` as a cache has them.

        Pictures of exactly the latents' shape are taken for latents. The codec is frozen; pictures that want a gradient get it.
        """
        dtype = self.encoder.patch_embed.proj.weight.dtype
        if not self._are_latents(x):
            codec = self._need_codec()
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                x = codec.encode(self.to_size(x))
        mean, deviation = self._statistics()
        return (x.to(dtype) - mean) / deviation

    def decoded(self, z: Tensor) -> Tensor:
        """Pictures `[B, C, H, W]` in [0, 1] of what `normalised` gave."""
        mean, deviation = self._statistics()
        pictures: Tensor = self._need_codec().decode(z * deviation + mean)
        return pictures.clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Pictures whose hidden tokens are painted, in one pass; what is visible goes through the codec alone.

        Args:
            x: `[B, C, H, W]` in [0, 1], or latents. With `norm_pix` the mean and deviation of hidden tokens are looked up in it:
                to restore what is not known, train with norm_pix=false.
            hidden: `[B, L]` bool, True = hidden, equally many in each row.

        Returns:
            `[B, C, image_size, image_size]` in [0, 1].
        """
        return self._painted(self.normalised(x), hidden)

    # ---- use

    def encode(self, x: Tensor) -> Tensor:
        """Features of images of any size (short side resized, centre cropped), or of their latents; tokens averaged.

        Args:
            x: `[B, C, H, W]` in [0, 1], or latents `[B, c, h, w]`.

        Returns:
            `[B, dim]`.
        """
        return self.encoder.features(self.normalised(x))

    def timm_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The encoder for timm, see `MaskedViTEncoder.timm_weights`; its inputs are what `normalised` gives: latents."""
        return super().timm_weights()

    @torch.no_grad()
    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, what the codec keeps of them, what is left by the last ratio, and the reconstruction."""
        z = self.normalised(batch.x)
        hidden = self.mask(z, generator)[: len(z)]
        decoded = self.decoded(z)
        picture = decoded if self._are_latents(batch.x) else self.to_size(batch.x)
        pixels = upsample_mask(hidden, self.encoder.grid, self.config.patch * self.reduction)
        return {
            "picture": picture,
            "decoded": decoded,
            "masked": fill(picture, pixels, how="color", value=0.5),
            "reconstruction": self._painted(z, hidden),
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss at the last ratio, and without `norm_pix` how near hidden pixels come, `hidden_psnr` in dB of all of them.

        Masks are the same every time. Of a cache the pictures are those that the codec decodes.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        loss = error = count = 0.0
        for batch in batches:
            z = self.normalised(batch.x)
            hidden = self.evaluation_mask(z, generator)
            loss += float(self.loss_of_views(z, hidden)) * len(batch)
            if not self.config.norm_pix:
                picture = self.decoded(z) if self._are_latents(batch.x) else self.to_size(batch.x)
                hidden = hidden[: len(z)]
                pixels = upsample_mask(hidden, self.encoder.grid, self.config.patch * self.reduction)
                error += float(masked_mean((self._painted(z, hidden) - picture).square(), pixels)) * len(batch)
            count += len(batch)
        if not count:
            return {}
        psnr = {} if self.config.norm_pix else {"hidden_psnr": float(-10 * torch.tensor(error / count).log10())}
        return {"masked_loss": loss / count, **psnr}

    def _painted(self, z: Tensor, hidden: Tensor) -> Tensor:
        """Pictures of latents whose hidden tokens are predicted."""
        tokens = upsample_mask(hidden, self.encoder.grid, self.config.patch)
        return self.decoded(torch.where(tokens, self.predict_image(z, hidden), z))

    # ---- the codec's state

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Start with another masked model's encoder, and with its codec unless the settings want another."""
        method = super().init_from(config, previous)
        if isinstance(previous, LatentImageModel) and previous.surveyed:
            ours, theirs = config, previous.config
            alike = all(getattr(ours, k) == getattr(theirs, k) for k in ("codec", "reduction", "channels"))
            if alike and method.latent_shape[0] == previous.latent_shape[0] and ours.vae in (None, theirs.vae):
                method.codec, method.surveyed = copy.deepcopy(previous.codec), True
        return method

    def get_extra_state(self) -> dict[str, Any]:
        """Whether the codec is known, and the architecture of a VAE: a run needs its folder no more."""
        vae = self.codec.vae.config if isinstance(self.codec, DiffusersVAE) else None
        plain = None if vae is None else json.loads(json.dumps({k: v for k, v in vae.items() if not k.startswith("_")}))
        return {"surveyed": self.surveyed, "vae": plain}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Make room for the codec whose weights are loaded next."""
        self.surveyed = state["surveyed"]
        if self.codec is None and state["vae"] is not None:
            from diffusers import AutoencoderKL

            self.codec = DiffusersVAE(AutoencoderKL.from_config(state["vae"])).to(self.device)

    def _need_codec(self) -> Any:
        """The codec; a VAE is read when it is first needed."""
        if self.codec is None:
            c = self.config
            if c.vae is None:
                raise BadSetting("codec=vae needs weights: set vae=FOLDER of an AutoencoderKL of diffusers, or codec=pca")
            codec = DiffusersVAE(c.vae)
            settings = codec.vae.config
            found = (2 ** (len(settings.block_out_channels) - 1), settings.latent_channels)
            if found != (self.reduction, self.latent_shape[0]):
                raise BadSetting(f"the VAE at {c.vae} has other latents: set reduction={found[0]} and latent_channels={found[1]}")
            self.codec, self.surveyed = codec.to(self.device), True
        return self.codec

    def _are_latents(self, x: Tensor) -> bool:
        return tuple(x.shape[1:]) == self.latent_shape

    def _statistics(self) -> tuple[Tensor | float, Tensor | float]:
        """What latents are shifted and divided by: nothing for a VAE, as published; MAE's for pixels; one deviation for a PCA."""
        if self.config.codec == "identity":
            return self.mean, self.std
        return 0.0, self.codec.variance.mean().sqrt().clamp(min=1e-6) if self.config.codec == "pca" else 1.0


class _OfPictures:
    """A transform that leaves latents alone."""

    def __init__(self, transform: Callable[..., Any], latent_shape: tuple[int, ...]) -> None:
        self.transform, self.latent_shape = transform, latent_shape

    def __call__(self, x: Tensor) -> Any:
        return x if x.is_floating_point() and tuple(x.shape) == self.latent_shape else self.transform(x)
