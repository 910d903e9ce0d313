"""From pictures to latents and back: what latent methods need of an auto-encoder, and some of them.

    PatchPCA:  z = U (p - m),   p̂ = m + Uᵀ z       of every patch p; U: the directions of largest variance, orthonormal

`IdentityCodec` is pixel space, `SignedCodec` the same in [-1, 1]; `PatchPCA` fits on the user's pictures in a second;
`DiffusersVAE` is latent diffusion's auto-encoder, from weights that the user has; `PaddedCodec` makes any size fit.

Sources: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022 (VAE); Pearson 1901 (PCA);
Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance" (batch by batch).

>>> import torch
>>> from sfumato.nn import PatchPCA
>>> x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
>>> codec = PatchPCA(4, 16).fit(x)
>>> codec.encode(x).shape, torch.allclose(codec.decode(codec.encode(x)), x, atol=1e-5)  # 16 of 16 dimensions: exact
(torch.Size([16, 16, 2, 2]), True)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.nn.padding import pad_to_multiple
from sfumato.nn.patches import patchify, unpatchify


@runtime_checkable
class LatentCodec(Protocol):
    """Pictures `[B, C, H, W]` in [0, 1] to latents `[B, c, h, w]`, and back."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents of pictures."""

    def decode(self, z: Tensor) -> Tensor:
        """Pictures of latents; not clamped, so that gradients pass."""


class IdentityCodec(nn.Module):
    """Latents are the pictures themselves."""

    def encode(self, x: Tensor) -> Tensor:
        """`x`."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """`z`."""
        return z


class SignedCodec(nn.Module):
    """Latents are the pictures in [-1, 1], as diffusion in pixel space has them."""

    def encode(self, x: Tensor) -> Tensor:
        """`2 x - 1`."""
        return 2 * x - 1

    def decode(self, z: Tensor) -> Tensor:
        """`(z + 1) / 2`."""
        return (z + 1) / 2


class PaddedCodec(nn.Module):
    """A codec for pictures of one size that it does not take itself: mirrored on the right and below, and cropped again.

    Args:
        codec: for pictures whose sides are multiples of `multiple`.
        size: height and width of the pictures.
        multiple: pixels.
    """

    def __init__(self, codec: LatentCodec, size: tuple[int, int], multiple: int) -> None:
        super().__init__()
        self.codec, self.size, self.multiple = codec, size, multiple

    def encode(self, x: Tensor) -> Tensor:
        """Latents of the padded pictures."""
        return self.codec.encode(pad_to_multiple(x, self.multiple)[0])

    def decode(self, z: Tensor) -> Tensor:
        """Pictures of the given size."""
        return self.codec.decode(z)[..., : self.size[0], : self.size[1]]


class PatchPCA(nn.Module):
    """Every patch as its `dims` leading principal components; `decode(encode(x))` is the orthogonal projection.

    Args:
        patch: side in pixels.
        dims: numbers a patch, 1 to `channels * patch ** 2`.
        channels: of the pictures.

    Raises:
        BadSetting: more components than numbers in a patch, or none.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor

    def __init__(self, patch: int, dims: int, *, channels: int = 1) -> None:
        super().__init__()
        size = channels * patch**2
        if not 1 <= dims <= size:
            raise BadSetting(f"dims={dims}: a patch of {channels} x {patch} x {patch} numbers has 1 to {size} components")
        self.patch, self.channels = patch, channels
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(dims, size))
        self.register_buffer("variance", torch.ones(dims))

    @torch.no_grad()
    def fit(self, x: Tensor | Iterable[Tensor]) -> Self:
        """Find the components; `variance` `[dims]` tells how much each explains.

        Args:
            x: pictures `[N, C, H, W]`, sides multiples of the patch; or batches of them, of which one at a time is held.

        Returns:
            Itself.

        Raises:
            BadData: pictures of other channels or sides, or a single patch.
        """
        count, mean = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        scatter = mean.outer(mean)
        for pictures in [x] if isinstance(x, Tensor) else x:
            rows = self._patches(pictures).flatten(0, 1).double()
            if not len(rows):
                continue
            first, count = count, count + len(rows)
            off = rows.mean(0) - mean
            rows = rows - rows.mean(0)
            scatter = scatter + rows.T @ rows + first * len(rows) / count * off.outer(off)
            mean = mean + len(rows) / count * off
        if count < 2:
            raise BadData(f"components need two patches or more, here are {count}")
        values, vectors = torch.linalg.eigh(scatter / (count - 1))
        basis = vectors.flip(1)[:, : len(self.basis)].T
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))  # positive: the same signs on every machine
        self.mean.copy_(mean)
        self.basis.copy_(basis * largest.sign())
        self.variance.copy_(values.flip(0)[: len(self.basis)].clamp(min=0))
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Components of every patch.

        Args:
            x: `[B, C, H, W]`, sides multiples of the patch.

        Returns:
            `[B, dims, H / patch, W / patch]`.

        Raises:
            BadData: pictures of other channels or sides.
        """
        z = (self._patches(x) - self.mean) @ self.basis.T
        return z.mT.unflatten(2, (x.shape[2] // self.patch, x.shape[3] // self.patch))

    def decode(self, z: Tensor) -> Tensor:
        """Pictures `[B, C, h * patch, w * patch]` of components `[B, dims, h, w]`."""
        rows = z.flatten(2).mT @ self.basis + self.mean
        return unpatchify(rows, self.patch, (z.shape[2], z.shape[3]), self.channels, order="chw")

    def _patches(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise BadData(f"pictures have {x.shape[1]} channels, this codec takes {self.channels}")
        return patchify(x, self.patch, order="chw")


class DiffusersVAE(nn.Module):
    """A frozen AutoencoderKL of diffusers, always in eval mode; gradients pass through to the pictures.

    Args:
        path: a folder with its weights and config, the name of one on the hub (then diffusers downloads it), or the loaded
            module.
        scale: latents are multiplied by this; latent diffusion's networks want 0.18215.
        mode: "mean" or "sample" of the posterior.

    Raises:
        BadSetting: an unknown mode.
        BadCheckpoint: no weights at `path`.
    """

    def __init__(self, path: str | Path | nn.Module, *, scale: float = 1.0, mode: str = "mean") -> None:
        super().__init__()
        if mode not in ("mean", "sample"):
            raise BadSetting(f"there is no mode {mode!r} of a posterior: use mean or sample")
        self.scale, self.mode = scale, mode
        self.vae: Any = (path if isinstance(path, nn.Module) else _load(path)).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def encode(self, x: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Latents of pictures.

        Args:
            x: `[B, C, H, W]` in [0, 1], sides multiples of the VAE's reduction (8 for latent diffusion's).
            noise: standard normal, like the result, instead of drawing it; for mode "sample".
            generator: source of the draws.

        Returns:
            `[B, c, H / 8, W / 8]`.

        Raises:
            BadData: sides that do not fit.
        """
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise BadData(
                f"pictures of {x.shape[2]} x {x.shape[3]} pixels: this VAE takes multiples of {factor}, pad or crop them"
            )
        posterior = self.vae.encode(2 * x - 1).latent_dist
        z: Tensor = posterior.mean
        if self.mode == "sample":
            if noise is None:
                device = z.device if generator is None else generator.device
                noise = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype)
            z = z + posterior.std * noise.to(z)
        return self.scale * z

    def decode(self, z: Tensor) -> Tensor:
        """Pictures, about [0, 1], of latents."""
        out: Tensor = self.vae.decode(z / self.scale).sample
        return (out + 1) / 2


def _load(path: str | Path) -> nn.Module:
    from diffusers import AutoencoderKL

    try:
        vae: nn.Module = AutoencoderKL.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"no VAE at {path}: give a folder with config.json and safetensors weights") from error
    return vae
