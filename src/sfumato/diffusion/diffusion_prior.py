"""A trained diffusion model as what is known of pictures: it restores what any physics has degraded, at any size.

`DiffusionPrior` holds a network, its noise schedule and the codec between its latents and pictures in [0, 1]. It is made from a
network of one's own, or opened from a pipeline of diffusers: a UNet2DModel in pixel space (DDPM), or a UNet2DModel or
UNet2DConditionModel behind an AutoencoderKL (latent diffusion, Stable Diffusion without a text). What the sides lack to be halved
as often as the network does is padded and left to the model: the physics sees the picture's own size. Large pictures go through
the network in tiles, whose graphs are made again on the way back, so that one tile's memory is enough.

>>> import torch
>>> from deepinv.physics import Denoising, GaussianNoise
>>> from sfumato.diffusion import DiffusionPrior, Schedule, beta_schedule
>>> from sfumato.nn import small_unet
>>> prior = DiffusionPrior(small_unet(8, 1, width=8, mults=(1, 2)), Schedule(beta_schedule("linear")), stride=2)
>>> prior.restore(torch.rand(1, 1, 9, 7), Denoising(GaussianNoise(0.1)), steps=2).shape
torch.Size([1, 1, 9, 7])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from sfumato.diffusion.pipelines import open_pipeline
from sfumato.diffusion.posterior_sampling import sample_posterior, transpose
from sfumato.diffusion.predictions import Model, as_denoiser
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.nn.latent_codec import DiffusersVAE, LatentCodec, PaddedCodec, SignedCodec
from sfumato.nn.padding import tiled_apply

TILE, OVERLAP = 512, 64
"""Latents (pixels, where there is no codec) of a tile, and those that it shares with each neighbour."""


class DiffusionPrior(nn.Module):
    """A diffusion model that restores.

    Args:
        model: `model(z_t, t)` with t `[B]` int64; a network of diffusers will do.
        schedule: the tables that it was trained with.
        codec: pictures in [0, 1] to the model's latents and back; None: pictures in [-1, 1].
        predict: what the model predicts: "eps", "x0", "v" or "score".
        stride: sides that model and codec take are multiples of it, in pixels.
        channels: of the pictures.
    """

    needs_physics: ClassVar[bool] = True
    model: Any

    def __init__(
        self,
        model: Model | nn.Module,
        schedule: Schedule,
        *,
        codec: LatentCodec | None = None,
        predict: str = "eps",
        stride: int = 1,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.schedule, self.prediction = model, schedule, predict
        self.codec: Any = SignedCodec() if codec is None else codec
        self.stride, self.channels = stride, channels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @classmethod
    def open(cls, source: Any, *, cond: Tensor | None = None) -> Self:
        """A pipeline of diffusers, without its sampler.

        Args:
            source: a folder with its weights (safetensors), the name of one on the hub (then diffusers downloads it), or a loaded
                pipeline: anything with `.unet`, `.scheduler` and, for latents, `.vae` or `.vqvae`.
            cond: for a UNet2DConditionModel what it attends to, `[1, L, D]`; None: the pipeline's own empty text. For a
                UNet2DModel with classes the number of one, `[1]`.

        Raises:
            BadCheckpoint: no pipeline there, or one that is not of this kind.
            BadSetting: a network that needs `cond` and has none.
        """
        from diffusers import AutoencoderKL

        pipeline = open_pipeline(source) if isinstance(source, (str, Path)) else source
        unet = pipeline.unet.eval().requires_grad_(False)
        vae: Any = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
        other = vae is not None and not isinstance(vae, AutoencoderKL)
        if other:
            raise BadCheckpoint(f"{type(vae).__name__} is no AutoencoderKL: give a pipeline that has one, or none")
        codec = None if vae is None else DiffusersVAE(vae, scale=vae.config.get("scaling_factor") or 1.0)
        channels = unet.config.in_channels if vae is None else vae.config.in_channels
        width = unet.config.in_channels if vae is None else vae.config.latent_channels
        if unet.config.in_channels != width or unet.config.get("addition_embed_type") is not None:
            raise BadCheckpoint("this U-Net wants more than a noisy picture, its time and one condition: give a plain one")
        if not hasattr(pipeline.scheduler, "betas"):
            kind = type(pipeline.scheduler).__name__
            raise BadCheckpoint(f"{kind} has no table of betas: give the scheduler that the network was trained with")
        stride = 2 ** (len(unet.config.block_out_channels) - 1)
        stride *= 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        net = _Conditioned(unet, _condition(pipeline, cond))
        model = as_denoiser(net, pipeline.scheduler, face="eps")
        prior = cls(model, Schedule.from_diffusers(pipeline.scheduler), codec=codec, stride=stride, channels=channels)
        prior.net = net  # so that its weights move with the rest
        return prior.eval()

    def restore(
        self,
        inputs: Tensor,
        physics: Any = None,
        *,
        solver: str = "stsl",
        steps: int = 50,
        inner: int | None = None,
        eta: float = 1.0,
        lam: float = 0.02,
        weighting: str = "variance",
        gamma: float = 0.1,
        ancestral: float = 1.0,
        project: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pictures that explain degraded ones; arguments that are not named here as of `sample_posterior`.

        Args:
            inputs: measurements, as the physics makes them of pictures in [0, 1].
            physics: of deepinv, what degraded them; the deviation of its Gaussian noise is heeded.
            solver: "dps", "psld" or "stsl".
            project: keep what was measured exactly; None: where the physics is a mask without noise.
            generator: source of the draws; None: always the same.

        Returns:
            `[B, C, H, W]` in [0, 1].

        Raises:
            BadSetting: no physics, or settings out of range.
            BadData: a physics that does not make such measurements, or pictures of other channels.
            Diverged: a trajectory is no longer finite.
        """
        if physics is None:
            raise BadSetting("a diffusion model must be told what degraded the pictures: give a physics, such as deepinv's Blur")
        if generator is None:
            generator = torch.Generator(self.device).manual_seed(0)
        linear = hasattr(physics, "A_adjoint")
        with torch.no_grad():
            _, channels, height, width = (transpose(physics, inputs) if linear else inputs).shape
        if self.channels not in (None, channels):
            raise BadData(f"these are pictures of {channels} channels, and the model was trained on {self.channels}")
        codec = PaddedCodec(self.codec, (height, width), self.stride)
        restored = sample_posterior(
            self._tiled, inputs, physics, self.schedule, method=solver, codec=codec, steps=steps, inner=inner, eta=eta,
            lam=lam, weighting=weighting, gamma=gamma, sigma=noise_level(physics), ancestral=ancestral,
            predict=self.prediction, clip=isinstance(self.codec, SignedCodec),
            start=None if linear else inputs, project=_exact_mask(physics) if project is None else project, generator=generator,
        )  # fmt: skip
        return restored.clamp(0, 1)

    def _tiled(self, z: Tensor, t: Tensor) -> Tensor:
        """The network, large pictures in tiles; only one tile's graph is kept at a time."""

        def apply(tile: Tensor) -> Tensor:
            out = self.model(tile, t)
            return out if isinstance(out, Tensor) else out.sample

        if max(z.shape[-2:]) <= TILE:
            return apply(z)
        return tiled_apply(lambda tile: checkpoint(apply, tile, use_reentrant=False), z, tile=TILE, overlap=OVERLAP)


class _Conditioned(nn.Module):
    """A network of diffusers with one condition for all samples."""

    unet: Any
    cond: Tensor | None

    def __init__(self, unet: nn.Module, cond: Tensor | None) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("cond", cond)

    def forward(self, z: Tensor, t: Tensor) -> Any:
        """Its result; what it learned of the variance is left out."""
        if self.cond is None:
            out = self.unet(z, t)
        else:
            out = self.unet(z, t, self.cond.expand(len(z), *self.cond.shape[1:]))
        return out.sample[:, : z.shape[1]]


def noise_level(physics: Any) -> float:
    """The standard deviation of a physics' Gaussian noise; 0 where it has none or of another kind.

    Raises:
        BadSetting: one that differs from picture to picture.
    """
    from deepinv.physics import GaussianNoise

    model = getattr(physics, "noise_model", None)
    if not isinstance(model, GaussianNoise):
        return 0.0
    sigma = torch.as_tensor(model.sigma)
    if sigma.numel() > 1 and (sigma != sigma.flatten()[0]).any():
        raise BadSetting("the noise of this physics differs from picture to picture: restore them one by one")
    return float(sigma.flatten()[0])


def _exact_mask(physics: Any) -> bool:
    from deepinv.physics import Inpainting

    return isinstance(physics, Inpainting) and not noise_level(physics)


def _condition(pipeline: Any, cond: Tensor | None) -> Tensor | None:
    """What the network of a pipeline is told beside the picture: what was given, else its own empty text."""
    config = pipeline.unet.config
    attends = config.get("cross_attention_dim") is not None
    if cond is None and attends and hasattr(pipeline, "encode_prompt"):
        with torch.no_grad():
            cond = pipeline.encode_prompt("", pipeline.unet.device, 1, False)[0]
    if cond is None and (attends or config.get("num_class_embeds") is not None):
        raise BadSetting("this U-Net needs a condition: give cond, the states it attends to or the number of a class")
    return cond
