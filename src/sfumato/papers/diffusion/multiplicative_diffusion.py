"""Multiplicative diffusion: geometric Brownian motion instead of additive noise, so that no update changes the sign of a pixel.

    x_k = x_0 exp(σ √τ_k z),    L = E |σ²τ x_k s(x_k, k) + log(x_k / x_0) - μτ + 3σ²τ/2|²,    k ~ U{1, ..., N - 1}

with x_0 the picture plus 1. Samples begin at a log-normal law fitted to the training pictures and come back by exponentiated
gradient with noise (`sfumato.diffusion.sample_gbm`), drawn with the moving average of the weights.

Source: Nishanth Shetty, Madhava Prasath, Chandra Sekhar Seelamantula, "Dale meets Langevin: A Multiplicative Denoising Diffusion
Model", 2025 (arXiv 2510.02730), and the settings of the released code.

>>> from sfumato.papers.diffusion.multiplicative_diffusion import MultiplicativeDiffusion
>>> config = MultiplicativeDiffusion.Config.small(channels=1, image_size=8, width=8, sample_steps=2)
>>> MultiplicativeDiffusion(config).sample(3).shape
torch.Size([3, 1, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.batch import Batch
from sfumato.data.samples import digits
from sfumato.diffusion import GBMSchedule, multiplicative_dsm, range_t, sample_gbm
from sfumato.diffusion.samplers import Callback, SamplerStep
from sfumato.diffusion.schedules import expand
from sfumato.method import Context, Loss, Method, Result, Step
from sfumato.metrics import GaussianStats, frechet_features
from sfumato.nn import MaskedConvEncoder, small_unet
from sfumato.optim import EMA
from sfumato.papers.diffusion.ddpm import DDPM, PictureConfig, PictureMethod

OFFSET = 1.0
"""Added to pictures in [0, 1]: zero has no logarithm."""


class MultiplicativeDiffusion(PictureMethod):
    """Shetty et al. 2025. Trains on pictures of one size, draws new ones."""

    class Config(PictureConfig):
        """Defaults: the paper's, for MNIST with the NCSN-deeper network; the network is a U-Net here."""

        steps: int = Field(300_000, gt=0, description="optimizer steps")
        batch_size: int = Field(128, gt=0, description="pictures a step")
        width: int = Field(128, gt=0, description="channels at full resolution; a multiple of 8")
        mults: tuple[int, ...] = Field((1, 2, 2), description="channels at each resolution, in multiples of width")
        attn_at: tuple[int, ...] = Field((1,), description="levels with self-attention; 0: full resolution")
        layers: int = Field(2, gt=0, description="residual blocks a level")
        times: int = Field(1000, gt=1, description="noise levels (N)")
        sigma: float = Field(0.8, gt=0, description="volatility: deviation of the log of a pixel after all times")
        mu: float | None = Field(None, description="drift; None: sigma²/2, with which the logarithm does not drift")
        weight: Literal["paper", "unit"] = Field("paper", description="weight of the times; unit: all alike, as for DDPM's noise")
        tau_shift: int = Field(0, ge=0, le=1, description="1: the time in the loss is one later than the noise's, as released")
        input: Literal["x", "log"] = Field("x", description="what the network sees; log: log x, scaled to unit variance at most")
        output: Literal["score", "noise"] = Field(
            "score", description="what it gives: the Stein score, or the noise that makes it"
        )
        lr: float = Field(1e-4, gt=0, description="Adam's learning rate")
        ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights that samples are drawn with")
        sampler: Literal["dls", "ums"] = Field("dls", description="dls: in log space, keeps signs; ums: on the pixels")
        sample_steps: int = Field(1000, gt=0, description="times that are visited for a sample, at most times")
        delta: float | None = Field(
            6.165e-4, gt=0, description="length of a sampling step; None: the distance to the next time visited"
        )
        inner: int = Field(1, gt=0, description="sampling steps at each time")
        anneal: float = Field(0.995, gt=0, le=1, description="factor on the sampling noise after each time; 1: none")
        denoise_steps: int = Field(0, ge=0, description="sampling steps without noise in the end (the paper: 25 for CIFAR-10)")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Digits, or 32-pixel crops, on two cores in minutes."""
            small = {
                "steps": 1500, "batch_size": 64, "clip_norm": 1.0, "width": 32, "mults": (1, 2), "attn_at": (), "layers": 1,
                "weight": "unit", "input": "log", "output": "noise", "lr": 1e-3, "ema": 0.995, "sample_steps": 125,
                "delta": None, "anneal": 1.0, "denoise_steps": 5,
            }  # fmt: skip
            return cls(**{**small, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        self.schedule = GBMSchedule(c.times, sigma=c.sigma, mu=c.mu)
        self.net = small_unet(self.shape[1], self.shape[0], width=c.width, mults=c.mults, attn_at=c.attn_at, layers=c.layers)
        self.average = EMA(self.net, decay=c.ema, warmup=True)
        # of log x_0, one a channel; before any data is seen, of pixels that are uniform in [0, 1]
        self.log_mean: Tensor
        self.log_variance: Tensor
        self.register_buffer("log_mean", torch.full((self.shape[0], 1, 1), 2 * math.log(2) - 1))
        self.register_buffer("log_variance", torch.full((self.shape[0], 1, 1), 1 - 2 * math.log(2) ** 2))

    def survey(self, batches: Iterable[Batch]) -> None:
        """Mean and variance of log x_0 in each channel: samples begin at the log-normal law that they end in."""
        stats = GaussianStats()
        for batch in batches:
            stats.update((OFFSET + batch.x).log().movedim(1, -1).flatten(0, -2))
        moments = stats.compute()
        for kept, found in ((self.log_mean, moments.mean), (self.log_variance, moments.cov.diagonal())):
            kept.copy_(found.view(-1, 1, 1))

    def score(self, x: Tensor, k: Tensor, net: nn.Module | None = None) -> Tensor:
        """The Stein score by the averaged weights, or by `net`, at `x` `[B, C, H, W]` and times `[B]`; time 0 is taken as 1."""
        c, k = self.config, k.clamp(min=1)
        std = expand(self.schedule.std, k, x)
        seen = x
        if c.input == "log":  # ums may have left what has a logarithm
            seen = x.clamp(min=torch.finfo(x.dtype).tiny).log() / (1 + std.square()).sqrt()
        out: Tensor = (self.average if net is None else net)(seen, k).sample
        return out if c.output == "score" else (out / std - 1) / x

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """M-DSM at one random time a picture.

        Raises:
            BadData: pictures of another size.
        """
        c, x0 = self.config, OFFSET + self.checked(batch)
        k = range_t(len(x0), 1, c.times, generator=ctx.generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=ctx.generator, device=x0.device, dtype=x0.dtype)
        x_k = self.schedule.q_sample(x0, k, noise)
        score = self.score(x_k, k, self.net)
        value = multiplicative_dsm(score, x_k, x0, k, self.schedule, weight=c.weight, tau_shift=c.tau_shift)
        return Loss(value, len(batch))

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """One step; then the average follows."""
        yield Step("net", (self.loss,))
        self.average.update(self.net)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam, as in the paper."""
        return {"net": torch.optim.Adam(self.net.parameters(), self.config.lr)}

    def draw(self, n: int, *, generator: torch.Generator | None = None, **settings: Any) -> Tensor:
        """Samples as the sampler leaves them, offset and not clamped.

        Args:
            n: how many.
            generator: source of the start and the noise.
            **settings: of `sfumato.diffusion.sample_gbm`, instead of the method's.

        Returns:
            `[n, C, H, W]`, about 1 to 2.

        Raises:
            Diverged: values that are not finite.
        """
        c = self.config
        own = {
            "sampler": c.sampler, "steps": min(c.sample_steps, c.times), "delta": c.delta, "inner": c.inner, "anneal": c.anneal,
            "denoise_steps": c.denoise_steps,
        }  # fmt: skip
        start = self.schedule.start(self.log_mean, self.log_variance)
        return sample_gbm(self.score, n, self.schedule, shape=self.shape, start=start, generator=generator, **{**own, **settings})

    @property
    def trajectory_steps(self) -> int:
        """Steps of a sample."""
        c = self.config
        return int(min(c.sample_steps, c.times) * c.inner + c.denoise_steps)

    def sample(self, n: int, generator: torch.Generator | None = None, *, callback: Callback | None = None) -> Tensor:
        """Draw `n` new pictures: `[n, C, H, W]` in [0, 1]; `callback` sees every step, with pictures in [-1, 1]."""

        def see(step: SamplerStep) -> None:
            assert callback is not None
            callback(step._replace(x_t=2 * (step.x_t - OFFSET) - 1, x0=2 * (step.x0 - OFFSET) - 1))

        drawn = self.draw(n, generator=generator, callback=None if callback is None else see)
        return (drawn - OFFSET).clamp(0, 1)

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures of the data, and as many new ones, quickly: at most 50 times are visited."""
        c = self.config
        quick = {"steps": min(50, c.sample_steps, c.times), "delta": None, "inner": 1, "anneal": 1.0, "denoise_steps": 5}
        drawn = self.draw(len(batch.x), generator=generator, **quick)
        return {"data": batch.x, "samples": (drawn - OFFSET).clamp(0, 1)}


# ---- claim

_TINY: dict[str, Any] = {"channels": 1, "image_size": 8, "width": 16}
_DRAWN = 300
"""Samples an arm; the reference are 1,300 digits."""
_FEW = 10
"""Steps that are long enough for the sampler on the pixels to leave the positive numbers."""


@claim(
    "Score matching for multiplicative noise learns to draw digits: far closer to them than the noise it begins at, at most "
    "three times as far as additive DDPM; the sampler in log space keeps every value positive, the one on pixels does not",
    Better("log2 Fréchet", "DLS", over="start", by=2.0, higher=False),
    Better("log2 Fréchet", "DLS", over="DDPM, three times", higher=False),
    Holds(f"every value on the way of DLS is positive, in 125 steps and in {_FEW}", lambda f: _positive(f, "DLS")),
    Holds(f"with UMS in {_FEW} steps some are not", lambda f: f[f"UMS, {_FEW} steps"]["share not positive"] > 0),
    seeds=range(100, 105),
    note="Digits of 8 x 8 pixels; the same U-Net, 500 steps and 125 network calls for every arm (DLS and UMS: 5 more, without "
    "noise). DDPM is sampled by DDIM and ancestrally, the better one counts. Squared Fréchet distances in the features of a "
    "small classifier of the same digits; by 2 in log2 is a quarter. The network gives the noise, seen from log x, and all times "
    "weigh alike: the CPU preset, our choice.",
)
def positive_pictures(lab: Lab) -> Figures:
    """Samples of both samplers, and of DDPM, against digits."""
    train, test = digits(seed=lab.seed)
    features = _classifier(train, lab)
    of_digits = features(train.x)
    figures: Figures = {}
    shown = [test.x[:8]]

    def tell(arm: str, drawn: Tensor, more: dict[str, float]) -> None:
        distance = frechet_features(features(drawn.clamp(0, 1)), of_digits).item()
        figures[arm] = {"Fréchet": distance, "log2 Fréchet": math.log2(distance), **more}
        shown.append(drawn[:8])

    def trained(kind: type[Method], **settings: Any) -> Any:
        torch.manual_seed(lab.seed)  # all arms begin at the same weights
        return lab.fit(kind(kind.Config.small(**{**_TINY, **settings})), train.x, steps=lab.steps(500))

    model = trained(MultiplicativeDiffusion)
    mean, deviation = model.schedule.start(model.log_mean, model.log_variance)
    start = (mean + deviation * torch.randn(_DRAWN, *model.shape, generator=lab.generator)).exp()
    tell("start", start - OFFSET, {})
    tell("DLS", *_watched(model, lab))
    tell("UMS", *_watched(model, lab, sampler="ums"))
    few = {"steps": _FEW, "denoise_steps": 0}
    tell(f"DLS, {_FEW} steps", *_watched(model, lab, **few))
    tell(f"UMS, {_FEW} steps", *_watched(model, lab, sampler="ums", **few))
    additive = trained(DDPM, sample_steps=model.config.sample_steps)
    kinds = {"DDPM, DDIM": 0.0, "DDPM, ancestral": 1.0}
    for arm, eta in kinds.items():
        additive.config = additive.config.model_copy(update={"eta": eta})
        tell(arm, additive.sample(_DRAWN, lab.generator), {})
    best = min(figures[arm]["log2 Fréchet"] for arm in kinds)
    figures["DDPM, three times"] = {"log2 Fréchet": best + math.log2(3)}
    lab.picture(f"digits, {', '.join(name for name in figures if 'times' not in name)}", torch.cat(shown))
    return figures


def _watched(model: MultiplicativeDiffusion, lab: Lab, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """Samples, and what was seen of the signs on the way to them."""
    seen: list[Tensor] = []
    drawn = model.draw(_DRAWN, generator=lab.generator, callback=lambda step: seen.append(step.x_t), **settings)
    values = torch.stack([*seen, drawn])
    signs = {"smallest value": values.min().item(), "share not positive": (values <= 0).double().mean().item()}
    return drawn - OFFSET, signs


def _positive(figures: Figures, sampler: str) -> bool:
    arms = [figures[arm] for arm in figures if arm.startswith(sampler)]
    return all(arm["share not positive"] == 0 and arm["smallest value"] > 0 for arm in arms)


def _classifier(train: Batch, lab: Lab) -> Callable[[Tensor], Tensor]:
    """Features of a small network that was taught to tell the digits apart: `[N, 1, 8, 8]` to `[N, 32]`.

    Convolutions, not `train_judge`: in the features of its one dense layer the noise of the start is hardly farther from digits
    than samples are.
    """
    assert train.label is not None
    torch.manual_seed(lab.seed)
    encoder, generator = MaskedConvEncoder("small", 8, 1, scales=1, model_settings={"dim": 32}, sparse=False), lab.generator
    head = nn.Linear(encoder.dim, 10)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 3e-3)
    for _ in range(lab.steps(200)):
        rows = torch.randint(len(train), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(head(encoder.features(train.x[rows])), train.label[rows]).backward()
        optimizer.step()
    return torch.no_grad()(encoder.eval().features)
