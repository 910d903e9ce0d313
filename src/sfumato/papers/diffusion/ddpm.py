"""A denoising diffusion model of pictures: the base of the diffusion papers.

    L = mean |f(x_t, t) - eps|²,    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    t ~ U{0, ..., T - 1}

on pictures in [-1, 1]. Samples are drawn with the moving average of the weights: by DDIM, by DDPM (ancestral; the paper's where
it takes all times), or along the probability flow by Euler's or Heun's rule. Told how pictures were degraded it restores them
too (`sfumato.diffusion.sample_posterior`), though it has never seen a degraded one.

Source: Jonathan Ho, Ajay Jain, Pieter Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239).

>>> from sfumato.papers.diffusion.ddpm import DDPM
>>> method = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, sample_steps=2))
>>> method.sample(3).shape
torch.Size([3, 1, 8, 8])
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from sfumato.data.batch import Batch, Facts
from sfumato.diffusion import (
    DiffusionPrior,
    Schedule,
    as_denoiser,
    beta_schedule,
    denoising_loss,
    sample_ddim,
    sample_euler,
    sample_heun,
    uniform_t,
)
from sfumato.diffusion.samplers import Callback
from sfumato.errors import BadData
from sfumato.method import Context, Loss, Method, MethodConfig, Result, Step
from sfumato.nn import small_unet
from sfumato.optim import EMA


class PictureConfig(MethodConfig):
    """Which pictures are drawn: what generators of one size share."""

    channels: int | None = Field(None, gt=0, description="channels of a picture; None: those of the data")
    image_size: int | None = Field(None, gt=0, description="side of a picture in pixels; None: that of the data, at most 32")
    crop: bool | None = Field(None, description="resize and cut pictures to image_size while loading; None: where they differ")

    def fitted(self, facts: Facts) -> Self:
        """Channels and size from the data."""
        config = super().fitted(facts)
        side = config.image_size or min(32, *(facts.size or (32,)))
        crop = facts.size != (side, side) if config.crop is None else config.crop
        return type(config).model_validate({**config.model_dump(), "image_size": side, "crop": crop})


class PictureMethod(Method):
    """A generator of pictures of one size; its config is a `PictureConfig`."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        side = self.config.image_size or 32
        self.shape = (self.config.channels or 3, side, side)

    def augment(self) -> Callable[..., Any] | None:
        """A random square of the picture, its short side resized; nothing where pictures have the right size."""
        from torchvision.transforms import v2

        size = self.shape[1]
        return v2.Compose([v2.Resize(size, antialias=True), v2.RandomCrop(size)]) if self.config.crop else None

    def checked(self, batch: Batch) -> Tensor:
        """The pictures of a batch.

        Raises:
            BadData: of another size.
        """
        if batch.x.shape[1:] != self.shape:
            side = tuple(batch.x.shape[1:])
            raise BadData(f"pictures are {side}, the network takes {self.shape}: set image_size and channels, or resize them")
        return batch.x


class DDPM(PictureMethod):
    """Ho et al. 2020. Trains on pictures of one size, draws new ones, restores pictures of any size."""

    needs_physics: ClassVar[bool] = True

    class Config(PictureConfig):
        """Defaults: the paper's, for CIFAR-10."""

        steps: int = Field(800_000, gt=0, description="optimizer steps")
        batch_size: int = Field(128, gt=0, description="pictures a step")
        clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; None: no clipping")
        width: int = Field(128, gt=0, description="channels at full resolution; a multiple of 8")
        mults: tuple[int, ...] = Field((1, 2, 2, 2), description="channels at each resolution, in multiples of width")
        attn_at: tuple[int, ...] = Field((1,), description="levels with self-attention; 0: full resolution")
        layers: int = Field(2, gt=0, description="residual blocks a level")
        dropout: float = Field(0.1, ge=0, lt=1, description="dropout inside the residual blocks")
        schedule: Literal["linear", "scaled_linear", "cosine"] = Field("linear", description="how the noise grows")
        times: int = Field(1000, gt=1, description="noise levels (T)")
        predict: Literal["eps", "x0", "v"] = Field("eps", description="what the network predicts")
        lr: float = Field(2e-4, gt=0, description="Adam's learning rate")
        ema: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights that samples are drawn with")
        sampler: Literal["ddim", "ddpm", "euler", "heun"] = Field(
            "ddim", description="how samples are drawn: ddim, ddpm (ancestral), or by euler's or heun's rule"
        )
        sample_steps: int = Field(50, gt=0, description="steps of a sample, a network call each (heun: two)")
        eta: float = Field(0.0, ge=0, le=1, description="noise while sampling by ddim; 1: that of ddpm")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Digits, or 32-pixel crops, on two cores in minutes."""
            small = {
                "steps": 1500, "batch_size": 64, "width": 32, "mults": (1, 2), "attn_at": (), "layers": 1,
                "dropout": 0.0, "lr": 1e-3, "ema": 0.995,
            }  # fmt: skip
            return cls(**{**small, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        self.schedule = Schedule(beta_schedule(c.schedule, c.times))
        self.net = small_unet(
            self.shape[1], self.shape[0], width=c.width, mults=c.mults, attn_at=c.attn_at, layers=c.layers, dropout=c.dropout
        )
        self.average = EMA(self.net, decay=c.ema, warmup=True)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The error of the prediction at one random time a picture.

        Raises:
            BadData: pictures of another size.
        """
        x0 = 2 * self.checked(batch) - 1
        t = self.draw_times(len(batch), ctx).to(x0.device)
        noise = torch.randn(x0.shape, generator=ctx.generator, device=x0.device, dtype=x0.dtype)
        value = denoising_loss(lambda x, t: self.net(x, t).sample, x0, t, noise, self.schedule, predict=self.config.predict)
        return Loss(value, len(batch))

    def draw_times(self, n: int, ctx: Context) -> Tensor:
        """At which times a training batch of `n` pictures is made: `[n]` int64."""
        return uniform_t(n, len(self.schedule), generator=ctx.generator)

    @torch.no_grad()
    def losses_at(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of pictures in [0, 1] at times and with noise that are given, by the averaged weights: `[B]`."""
        return denoising_loss(
            lambda x, t: self.average(x, t).sample, 2 * x - 1, t, noise, self.schedule, predict=self.config.predict,
            reduction="none",
        )  # fmt: skip

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """One step; then the average follows."""
        yield Step("net", (self.loss,))
        self.average.update(self.net)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam, as in the paper."""
        return {"net": torch.optim.Adam(self.net.parameters(), self.config.lr)}

    @property
    def base_settings(self) -> dict[str, Any]:
        """What builds a plain DDPM of the same network, from a subclass with more settings too; as JSON has it."""
        return dict(self.config.model_dump(mode="json", include=set(DDPM.Config.model_fields)))

    def denoise(self, y: Tensor, sigma: float) -> Tensor:
        """The clean pictures of `y = x + sigma z`, by the averaged weights at the time whose noise is nearest; not clamped."""
        level = torch.as_tensor(2 * sigma, device=y.device)  # pictures in [-1, 1] are twice as wide
        return (self._denoiser(2 * y - 1, level) + 1) / 2

    @property
    def _denoiser(self) -> Callable[[Tensor, Tensor], Tensor]:
        """D(x, sigma) of pictures in [-1, 1]."""
        return as_denoiser(self.average, self.schedule, predict=self.config.predict)

    @property
    def trajectory_steps(self) -> int:
        """Steps of a sample."""
        return int(min(self.config.sample_steps, self.config.times))

    def sample(self, n: int, generator: torch.Generator | None = None, *, callback: Callback | None = None) -> Tensor:
        """Draw `n` new pictures: `[n, C, H, W]` in [0, 1]; `callback` sees every step, with pictures in [-1, 1]."""
        device = generator.device if generator is not None else self.device
        x = torch.randn((n, *self.shape), generator=generator, device=device).to(self.device)
        c, steps = self.config, self.trajectory_steps
        if c.sampler in ("euler", "heun"):
            integrate, sigmas = sample_heun if c.sampler == "heun" else sample_euler, self.schedule.levels(steps)
            start = (1 + sigmas[0].square()).sqrt().to(x) * x  # as noisy pictures with a signal of 1 are
            drawn = integrate(lambda x, sigma: self._denoiser(x, sigma).clamp(-1, 1), start, sigmas, callback=callback)
        else:
            drawn = sample_ddim(
                lambda x, t: self.average(x, t).sample, x, self.schedule, steps=steps, eta=1.0 if c.sampler == "ddpm" else c.eta,
                predict=c.predict, clip=True, callback=callback, generator=generator,
            )  # fmt: skip
        return (drawn + 1).div(2).clamp(0, 1)

    @property
    def stride(self) -> int:
        """Sides that the network takes are multiples of this, in pixels."""
        return int(2 ** (len(self.config.mults) - 1))

    def restore(self, inputs: Tensor, physics: Any = None, **settings: Any) -> Tensor:
        """Pictures that explain degraded ones, any height and width.

        Args:
            inputs: measurements, as the physics makes them of pictures in [0, 1].
            physics: of deepinv: what degraded them.
            **settings: of `sfumato.diffusion.DiffusionPrior.restore`: solver, steps, inner, eta, lam, ..., generator.

        Returns:
            `[B, C, H, W]` in [0, 1].
        """
        c = self.config
        prior = DiffusionPrior(self.average, self.schedule, predict=c.predict, stride=self.stride, channels=self.shape[0])
        return prior.restore(inputs, physics, **settings)

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures of the data, and as many new ones."""
        return {"data": batch.x, "samples": self.sample(len(batch.x), generator)}
