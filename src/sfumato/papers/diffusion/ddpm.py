"""A denoising diffusion model of pictures: the base of the diffusion papers.

    L = mean |f(x_t, t) - eps|²,    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    t ~ U{0, ..., T - 1}

on pictures in [-1, 1]. Samples are drawn with the moving average of the weights: by DDIM, by DDPM (ancestral; the paper's where
it takes all times), or along the probability flow by Euler's or Heun's rule. Told how pictures were degraded it restores them
too (`sfumato.diffusion.sample_posterior`), though it has never seen a degraded one.

A pipeline of diffusers with a U-Net of pixels (`diffusers:FOLDER`, or its name on the hub) is such a model too: it draws, goes on
learning from one's own pictures (`--init`), and is what the other papers of the family look into.

With `conditional` the network is told the class of a picture, but not always, so that it knows both pictures of a class and
pictures of any: samples are of the class in `label`, or of all in turn, and `guidance` leads away from pictures of any.

Sources: Jonathan Ho, Ajay Jain, Pieter Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239);
classes: Jonathan Ho, Tim Salimans, "Classifier-Free Diffusion Guidance", NeurIPS 2021 workshop (arXiv 2207.12598).

>>> from sfumato.papers.diffusion.ddpm import DDPM
>>> method = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, sample_steps=2))
>>> method.sample(3).shape
torch.Size([3, 1, 8, 8])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.data.batch import Batch, Facts
from sfumato.diffusion import (
    DiffusionPrior,
    ExpertDenoiser,
    Schedule,
    as_denoiser,
    beta_schedule,
    classifier_free_guidance,
    denoising_loss,
    drop_condition,
    sample_ddim,
    sample_euler,
    sample_heun,
    uniform_t,
)
from sfumato.diffusion.pipelines import facts_of_pipeline, open_pipeline, unet_of
from sfumato.diffusion.samplers import Callback
from sfumato.errors import BadData, BadSetting
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
        unet: dict[str, Any] | None = Field(
            None, description="the network as diffusers' UNet2DModel describes it, in place of width to dropout"
        )
        schedule: Literal["linear", "scaled_linear", "cosine"] = Field("linear", description="how the noise grows")
        betas: tuple[float, float] | None = Field(None, description="first and last noise of a step; None: the customary ones")
        times: int = Field(1000, gt=1, description="noise levels (T)")
        predict: Literal["eps", "x0", "v"] = Field("eps", description="what the network predicts")
        lr: float = Field(2e-4, gt=0, description="Adam's learning rate")
        ema: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights that samples are drawn with")
        sampler: Literal["ddim", "ddpm", "euler", "heun"] = Field(
            "ddim", description="how samples are drawn: ddim, ddpm (ancestral), or by euler's or heun's rule"
        )
        sample_steps: int = Field(50, gt=0, description="steps of a sample, a network call each (heun: two)")
        eta: float = Field(0.0, ge=0, le=1, description="noise while sampling by ddim; 1: that of ddpm")
        conditional: bool = Field(False, description="learn what class a picture is of")
        classes: int | None = Field(None, gt=1, description="where conditional: number of classes; None: those of the data")
        class_names: tuple[str, ...] | None = Field(None, description="their names, for label; None: those of the data")
        class_dropout: float = Field(0.1, ge=0, lt=1, description="where conditional: share of training pictures without class")
        label: str | None = Field(
            None, coerce_numbers_to_str=True, description="class to draw, a name or a number from 0; None: all in turn"
        )
        guidance: float = Field(1.0, ge=0, description="towards the class; 1: none, 0: any class, above 1: more typical")

        def fitted(self, facts: Facts) -> Self:
            """As of every generator; the classes from the data."""
            config = super().fitted(facts)
            if config.conditional and "label" not in facts.fields:
                raise BadData("conditional needs pictures with classes, and these have none: give one folder a class")
            if not config.conditional or facts.classes is None:
                return config
            if len(facts.classes) > (config.classes or 0):
                raise BadSetting(f"classes={config.classes}, and the data has {len(facts.classes)}: leave classes out")
            return type(config).model_validate({**config.model_dump(), "class_names": config.class_names or facts.classes})

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
        if c.conditional and c.classes is None:
            raise BadSetting("classes is not set, and there is no labelled data to count them in: say classes=10")
        self.schedule = Schedule(beta_schedule(c.schedule, c.times, *(c.betas or ())))
        self.net: Any = self._network()
        self.average = EMA(self.net, decay=c.ema, warmup=True)

    def _network(self) -> nn.Module:
        c = self.config
        if c.unet is None:
            return small_unet(
                self.shape[1], self.shape[0], width=c.width, mults=c.mults, attn_at=c.attn_at, layers=c.layers,
                dropout=c.dropout, classes=c.classes if c.conditional else None, null_class=c.conditional,
            )  # fmt: skip
        if c.conditional:
            raise BadSetting("a network of your own knows no classes here: leave out unet or conditional")
        return unet_of(c.unet)

    @classmethod
    def from_pipeline(cls, source: Any) -> Self:
        """The model of a pipeline of diffusers, ready to draw or to go on learning.

        Args:
            source: a folder with its weights (safetensors), the name of one on the hub (then diffusers downloads it), or a loaded
                pipeline: anything with `.unet` (a UNet2DModel of pixels, without classes) and `.scheduler`.

        Raises:
            BadCheckpoint: no pipeline there, or one that is not of this kind.
        """
        pipeline = open_pipeline(source) if isinstance(source, (str, Path)) else source
        method = cls(cls.Config.model_validate(facts_of_pipeline(pipeline)))
        for net in (method.net, method.average.module):
            net.load_state_dict(pipeline.unet.state_dict())
        return method

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Go on from another run; from a pipeline's model with its network, its noise and its size of pictures."""
        if isinstance(previous, DDPM) and previous.config.unet is not None:
            kept = ("unet", "schedule", "times", "betas", "predict", "channels", "image_size")
            same = {name: getattr(previous.config, name) for name in kept}
            if config.channels not in (None, same["channels"]):
                raise BadData(f"the pictures have {config.channels} channels, and the model takes {same['channels']}")
            config = type(config).model_validate({**config.model_dump(), **same, "crop": True})
        return super().init_from(config, previous)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The error of the prediction at one random time a picture.

        Raises:
            BadData: pictures of another size.
        """
        x0 = 2 * self.checked(batch) - 1
        t = self.draw_times(len(batch), ctx).to(x0.device)
        noise = torch.randn(x0.shape, generator=ctx.generator, device=x0.device, dtype=x0.dtype)
        told = self._told(batch, ctx)
        net = self.net if told is None else lambda x, t: self.net(x, t, told)
        value = denoising_loss(lambda x, t: net(x, t).sample, x0, t, noise, self.schedule, predict=self.config.predict)
        return Loss(value, len(batch))

    def _told(self, batch: Batch, ctx: Context) -> Tensor | None:
        """The classes that the network is told of a training batch; some are left out."""
        if not self.config.conditional:
            return None
        if batch.label is None:
            raise BadData("conditional needs a class with every picture, and these have none: give one folder a class")
        return drop_condition(batch.label, self._null(batch.label), self.config.class_dropout, generator=ctx.generator)

    def _null(self, like: Tensor) -> Tensor:
        """The class that says nothing, the last of the network's: `[1]`."""
        return like.new_full((1,), int(self.config.classes))

    def labels(self, n: int) -> Tensor:
        """The classes of `n` samples: that of `label`, or all in turn, `[n]` int64.

        Raises:
            BadSetting: a label that is none of the classes.
        """
        c = self.config
        if c.label is None:
            return torch.arange(n, device=self.device) % c.classes
        names = c.class_names or ()
        number = names.index(c.label) if c.label in names else int(c.label) if c.label.isdecimal() else c.classes
        if number >= c.classes:
            known = ", ".join(names) if names else f"0 to {c.classes - 1}"
            raise BadSetting(f"label={c.label} is none of the classes of this model: {known}")
        return torch.full((n,), number, device=self.device)

    def draw_times(self, n: int, ctx: Context) -> Tensor:
        """At which times a training batch of `n` pictures is made: `[n]` int64."""
        return uniform_t(n, len(self.schedule), generator=ctx.generator)

    def losses_at(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of pictures in [0, 1] at times and with noise that are given, by the averaged weights: `[B]`."""
        return denoising_loss(
            lambda x, t: self.average(x, t).sample, 2 * x - 1, t, noise, self.schedule, predict=self.config.predict,
            reduction="none",
        )  # fmt: skip

    def with_expert(self, net: nn.Module, low: int = 0, high: int | None = None) -> Self:
        """The same model, but `net` takes the place of the averaged network at times `low` to `high - 1` (None: up to the last).

        It draws, denoises and measures with it; all else is shared, nothing is copied.
        """
        other, high = copy.copy(self), len(self.schedule) if high is None else high
        whole = (low, high) == (0, len(self.schedule))
        other._modules = {**self._modules, "average": net if whole else self._expert(net, low, high)}
        return other

    def _expert(self, net: nn.Module, low: int, high: int) -> ExpertDenoiser:
        return ExpertDenoiser(self.average, net, low=low, high=high)

    def base_settings(self) -> dict[str, Any]:
        """The settings, of JSON's types, of a plain `ddpm` that the networks of this run fit: for what is built on one."""
        known = self.config.model_dump(mode="json")
        return {name: known[name] for name in DDPM.Config.model_fields}

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """One step; then the average follows."""
        yield Step("net", (self.loss,))
        self.average.update(self.net)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam, as in the paper."""
        return {"net": torch.optim.Adam(self.net.parameters(), self.config.lr)}

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
        net = self._guided(n)
        x = torch.randn((n, *self.shape), generator=generator, device=device).to(self.device)
        c, steps = self.config, self.trajectory_steps
        if c.sampler in ("euler", "heun"):
            integrate, sigmas = sample_heun if c.sampler == "heun" else sample_euler, self.schedule.levels(steps)
            start = (1 + sigmas[0].square()).sqrt().to(x) * x  # as noisy pictures with a signal of 1 are
            denoise = as_denoiser(net, self.schedule, predict=c.predict)
            drawn = integrate(lambda x, sigma: denoise(x, sigma).clamp(-1, 1), start, sigmas, callback=callback)
        else:
            drawn = sample_ddim(
                net, x, self.schedule, steps=steps, eta=1.0 if c.sampler == "ddpm" else c.eta,
                predict=c.predict, clip=True, callback=callback, generator=generator,
            )  # fmt: skip
        return (drawn + 1).div(2).clamp(0, 1)

    def _guided(self, n: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The averaged weights as `f(x_t, t)` of `n` pictures, with their classes where there are any."""
        c = self.config
        if not c.conditional:
            if c.label is not None or c.guidance != 1:
                raise BadSetting("label and guidance are of models that know classes: train with conditional=true")
            return lambda x, t: self.average(x, t).sample
        cond = self.labels(n)
        return classifier_free_guidance(self.average, cond, self._null(cond), scale=c.guidance)

    @property
    def stride(self) -> int:
        """Sides that the network takes are multiples of this, in pixels."""
        return int(2 ** (len(self.net.config.block_out_channels) - 1))

    @property
    def bottleneck(self) -> tuple[int, int, int]:
        """Channels, height and width of the middle of the network."""
        return (self.net.config.block_out_channels[-1], *(side // self.stride for side in self.shape[1:]))

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


class FromDDPM(Method):
    """A method that begins at a trained DDPM run; its config has `ddpm`, how that model is built."""

    no_model: ClassVar[str]
    """What is said where there is none."""
    trained = False
    """Whether it took over a model: a new one has learned nothing."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if self.config.ddpm is None:
            raise BadSetting(self.no_model)

    def adopt(self, open_model: Callable[[str], nn.Module]) -> None:
        """Refuse a new model, whatever the settings say."""
        if not self.trained:
            raise BadSetting(self.no_model)
