"""Denoising curriculum: a diffusion model learns the noisiest times first, then ever quieter ones, then all as usual.

    t ~ U(C_N ∪ ... ∪ C_{N-s+1}) at stage s,    s → s + 1 once the loss has not improved for more than τ steps

Times with little noise are the hard ones: alone they take longest to learn (`sfumato.probes.task_difficulty`), and there the
noisy marginals change fastest (`sfumato.probes.marginal_kl`). Network, loss and sampler are those of
`ddpm`; only the draw of times differs, so weights of the loss and better networks combine with it. Stages are per step and of
the loss of all processes. With `formulation=edm` the noise levels are continuous (Karras et al. 2022): log-normal ones, cut into
clusters of equal probability, a network between scalings, and samples by Heun's rule.

Source: Kim, Go, Kwon, Kim, "Denoising Task Difficulty-based Curriculum for Training Diffusion Models", ICLR 2025 (arXiv
2403.10348). Ours: a U-Net in place of DiT, the running mean of the loss and its new start at every stage, a longest stage, a
fixed pace (`pacing=linear`); the average of the weights warms up, so weights of early stages do not linger in it.

>>> import torch
>>> from sfumato.engine import fit
>>> from sfumato.papers.diffusion.denoising_curriculum import DenoisingCurriculum
>>> settings = {"channels": 1, "image_size": 8, "width": 8, "clusters": 3, "longest": 2, "share": None}
>>> method = DenoisingCurriculum(DenoisingCurriculum.Config.small(**settings))
>>> method = fit(method, torch.rand(64, 1, 8, 8), steps=4, progress=False)
>>> int(method.pacer.stage)
3
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.samples import digits
from sfumato.diffusion import (
    CurriculumTimesteps,
    DiffusionPrior,
    EDMPrecond,
    ExpertDenoiser,
    PatiencePacer,
    Schedule,
    as_denoiser,
    beta_schedule,
    edm_loss,
    edm_sigmas,
    linear_stage,
    lognormal_clusters,
    sample_ddim,
    sample_euler,
    sample_heun,
    uniform_clusters,
)
from sfumato.diffusion.samplers import Callback
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.method import Batch, Context, Loss, Method, Result, Step
from sfumato.metrics import frechet_features
from sfumato.nn import ToyDenoiser
from sfumato.optim import EMA
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.probes import marginal_kl, task_difficulty, train_judge


class DenoisingCurriculum(DDPM):
    """Kim et al. 2025 on the base `ddpm`. Trains on pictures of one size, draws new ones."""

    class Config(DDPM.Config):
        """Defaults: the paper's for DiT (steps, batch, Adam, no dropout, 250 steps of DDPM), on the base's U-Net."""

        steps: int = Field(100_000, gt=0, description="optimizer steps")
        batch_size: int = Field(256, gt=0, description="pictures a step")
        clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; None: no clipping")
        formulation: Literal["ddpm", "edm"] = Field(
            "ddpm",
            description="discrete times and their schedule, or continuous noise levels and a scaled network (Karras et al.)",
        )
        log_sigma_mean: float = Field(-1.2, description="edm trains at log-normal noise levels: mean of the logarithm")
        log_sigma_std: float = Field(1.2, gt=0, description="standard deviation of the logarithm of edm's levels")
        sigma_data: float = Field(0.5, gt=0, description="standard deviation of pictures in [-1, 1], for edm's scalings")
        sigma_min: float = Field(0.002, gt=0, description="smallest level of an edm sample")
        sigma_max: float = Field(80.0, gt=0, description="largest level of an edm sample, where it begins")
        rho: float = Field(7.0, gt=0, description="how much closer edm's levels lie where it is quiet; 1: evenly")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the residual blocks")
        lr: float = Field(1e-4, gt=0, description="Adam's learning rate")
        sampler: Literal["ddim", "ddpm", "euler", "heun"] = Field(
            "ddim", description="how samples are drawn: ddim (edm: heun), ddpm (ancestral), or by euler's or heun's rule"
        )
        sample_steps: int | None = Field(  # type: ignore[assignment]
            None, gt=0, description="steps of a sample, a network call each (heun: two); None: 250, edm 18"
        )
        eta: float = Field(1.0, ge=0, le=1, description="noise while sampling; 0: DDIM, 1: ancestral")
        clusters: int = Field(20, gt=0, description="parts that the times are cut into (N); 1: no curriculum")
        order: Literal["easy_to_hard", "hard_to_easy", "random"] = Field(
            "easy_to_hard", description="which cluster comes first: the noisiest, the quietest, or any"
        )
        pacing: Literal["patience", "linear"] = Field(
            "patience", description="the next cluster comes when the loss stalls, or at fixed parts of the training"
        )
        patience: int = Field(200, ge=0, description="steps without improvement that are borne (τ)")
        smoothing: float = Field(0.99, ge=0, lt=1, description="share that the running mean of the loss keeps; 0: the raw loss")
        min_delta: float = Field(1e-4, ge=0, description="fall of the loss that counts as improvement")
        longest: int | None = Field(None, gt=0, description="steps after which a stage ends anyway; None: no limit")
        share: float | None = Field(
            None,
            gt=0,
            le=1,
            description="share of the training that the curriculum may take (pacing=linear: takes); None: no limit (0.2)",
        )

        @classmethod
        def small(cls, **over: Any) -> Self:
            """The base's preset; the curriculum takes a quarter of its steps at most."""
            curriculum = {"clusters": 5, "patience": 25, "smoothing": 0.9, "share": 0.25, "clip_norm": 1.0}
            return super().small(**{**curriculum, "sample_steps": 50, "eta": 0.0, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        if c.clusters > c.times:
            raise BadSetting(f"clusters={c.clusters} of times={c.times}: take fewer clusters")
        pace: dict[str, Any] = {"patience": c.patience, "smoothing": c.smoothing, "min_delta": c.min_delta, "longest": c.longest}
        self.pacer = PatiencePacer(c.clusters, **pace)
        self.curriculum = CurriculumTimesteps(uniform_clusters(c.times, c.clusters), order=c.order)
        own = {"sampler": "heun" if self.continuous and c.sampler == "ddim" else c.sampler}
        self.config = c.model_copy(update={**own, "sample_steps": c.sample_steps or (18 if self.continuous else 250)})
        if not self.continuous:
            return
        self._integrator()  # refuses samplers of discrete times
        if c.sigma_min >= c.sigma_max:
            raise BadSetting(
                f"sigma_min={c.sigma_min} is not below sigma_max={c.sigma_max}: samples go from the largest level down"
            )
        mean, std = c.log_sigma_mean, c.log_sigma_std
        self.curriculum = CurriculumTimesteps(
            lognormal_clusters(c.clusters, mean=mean, std=std), order=c.order, mean=mean, std=std
        )
        # for what goes by discrete times, such as restoring
        self.schedule = Schedule.from_sigmas(self.levels(c.times)[:-1].flip(0))

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Start at another run's weights; one of the same diffusion."""
        if isinstance(previous, cls) and previous.config.formulation != config.formulation:
            raise BadCheckpoint(
                f"that run was trained with formulation={previous.config.formulation}: its network is told something else than "
                f"with {config.formulation}"
            )
        return super().init_from(config, previous)

    @property
    def continuous(self) -> bool:
        """Whether noise levels are continuous (EDM's) in place of discrete times."""
        return bool(self.config.formulation == "edm")

    def levels(self, n: int) -> Tensor:
        """EDM's: `n` noise levels of a sample, from `sigma_max` to `sigma_min`, then 0: `[n + 1]` float64."""
        c = self.config
        return edm_sigmas(n, low=c.sigma_min, high=c.sigma_max, rho=c.rho)

    def stage(self, ctx: Context) -> Tensor:
        """1 to `clusters`: int64 scalar, on the device of the parameters."""
        c = self.config
        if c.pacing == "linear":
            return torch.full((), linear_stage(ctx.progress, c.clusters, share=c.share or 0.2), device=self.device)
        return self.pacer.stage

    def draw_times(self, n: int, ctx: Context) -> Tensor:
        """Times of the clusters that have come: `[n]` int64; for EDM levels of noise."""
        return self.curriculum(n, stage=self.stage(ctx), generator=ctx.generator)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The base's, or EDM's; `stage` is logged."""
        if self.continuous:
            x0 = 2 * self.checked(batch) - 1
            sigma = self.draw_times(len(batch), ctx).to(x0)
            noise = torch.randn(x0.shape, generator=ctx.generator, device=x0.device, dtype=x0.dtype)
            told = self._told(batch, ctx)
            net = self.net if told is None else lambda x, t: self.net(x, t, told)
            loss = Loss(edm_loss(self._scaled(net), x0, sigma, noise), len(batch))
        else:
            loss = super().loss(batch, ctx)
        return loss._replace(logs={**loss.logs, "stage": self.stage(ctx).float()})

    def losses_at(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The base's; for EDM at `times` levels as a sample takes them, quietest first."""
        if not self.continuous:
            return super().losses_at(x, t, noise)
        sigma = self.schedule.sigma.to(x)[t]
        return edm_loss(self._scaled(self.average), 2 * x - 1, sigma, noise, reduction="none")

    def _scaled(self, net: Callable[[Tensor, Tensor], Any]) -> EDMPrecond:
        return EDMPrecond(net, sigma_data=self.config.sigma_data)

    def _expert(self, net: nn.Module, low: int, high: int) -> ExpertDenoiser:
        if not self.continuous:
            return super()._expert(net, low, high)
        told = self._scaled(net).coefficients(self.schedule.sigma)[3].tolist()  # what a network is told in place of the time
        return ExpertDenoiser(
            self.average, net, low=told[low] if low else -math.inf, high=told[high] if high < len(told) else math.inf
        )

    @property
    def _denoiser(self) -> Callable[[Tensor, Tensor], Tensor]:
        if not self.continuous:
            return super()._denoiser
        scaled, smallest = self._scaled(self.average), self.config.sigma_min
        return lambda x, sigma: scaled(x, sigma.clamp(min=smallest))

    def base_settings(self) -> dict[str, Any]:
        """The base's.

        Raises:
            BadCheckpoint: a run of continuous levels.
        """
        if self.continuous:
            raise BadCheckpoint("what is built on a ddpm run goes by its discrete times: give one of formulation=ddpm")
        return super().base_settings()

    def _integrator(self) -> Callable[..., Tensor]:
        rules = {"heun": sample_heun, "euler": sample_euler}
        if self.config.sampler not in rules:
            raise BadSetting(f"sampler={self.config.sampler} goes by discrete times: formulation=edm takes {' or '.join(rules)}")
        return rules[self.config.sampler]

    def sample(self, n: int, generator: torch.Generator | None = None, *, callback: Callback | None = None) -> Tensor:
        """The base's; for EDM along the probability flow, from `sigma_max` down."""
        if not self.continuous:
            return super().sample(n, generator, callback=callback)
        device, net = generator.device if generator is not None else self.device, self._scaled(self._guided(n))
        x = torch.randn((n, *self.shape), generator=generator, device=device).to(self.device)
        sigmas = self.levels(self.trajectory_steps)
        drawn = self._integrator()(net, sigmas[0].to(x) * x, sigmas, callback=callback)
        return (drawn + 1).div(2).clamp(0, 1)

    def restore(self, inputs: Tensor, physics: Any = None, **settings: Any) -> Tensor:
        """The base's; for EDM at `times` levels as a sample takes them."""
        if not self.continuous:
            return super().restore(inputs, physics, **settings)
        model = as_denoiser(self._denoiser, self.schedule, predict="D", face="x0")
        prior = DiffusionPrior(model, self.schedule, predict="x0", stride=self.stride, channels=self.shape[0])
        prior.net = self.average  # whose weights are where the prior works
        return prior.restore(inputs, physics, **settings)

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """One step; then the average follows, and the pacer sees the loss of all processes."""
        result = yield Step("net", (self.loss,))
        self.average.update(self.net)
        c = self.config
        latest = 1 if c.share is None else linear_stage(ctx.progress, c.clusters, share=c.share)
        self.pacer.update(result.loss, at_least=latest)


# The claims


class _Dense(nn.Module):
    """A network of points on the pixels of 8 x 8 pictures; answers like diffusers' U-Net."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = ToyDenoiser(64, width=128, layers=3) if inner is None else inner

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return SimpleNamespace(sample=self.inner(x.flatten(1), t).view_as(x))


class _OnDigits(DenoisingCurriculum):
    """The method with a dense network in place of the U-Net; it tells how good its samples are while it trains."""

    def __init__(self, config: Any, net: nn.Module, judge: Callable[[Tensor], float] | None = None, draws: int = 0) -> None:
        super().__init__(config)
        self.draws = draws
        self.net, self.average, self.judge = copy.deepcopy(net), EMA(net, decay=config.ema, warmup=True), judge
        self.quality: dict[int, float] = {}
        self.steps_before_all = 0

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        yield from super().steps(ctx)
        done = ctx.step + 1
        self.steps_before_all += int(self.pacer.stage) < self.config.clusters
        if self.judge is not None and (done == ctx.total or done % max(1, ctx.total // 4) == 0):
            self.quality[done] = self.judge(self.sample(self.draws, torch.Generator().manual_seed(done)))


def _judge(train: Batch, test: Batch, seed: int) -> Callable[[Tensor], float]:
    """Fréchet distance to the test digits in the features of a small classifier of the training digits."""
    assert train.label is not None
    torch.manual_seed(seed)
    features = train_judge(train.x, train.label)[:-1]
    real = features(test.x)
    return lambda x: frechet_features(features(x), real).item()


_TENTHS = [f"times {100 * i} to {100 * i + 99}" for i in range(10)]
_ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"clusters": 1},
    "easy to hard": {},
    "hard to easy": {"order": "hard_to_easy"},
    "random order": {"order": "random"},
}


@claim(
    "Times with little noise are the hard ones: noisy marginals change faster there, and a network takes longer to learn them",
    Holds(
        "relative entropy of neighbouring times falls from each tenth of the times to the next",
        lambda f: all(f[a]["relative entropy"] > f[b]["relative entropy"] for a, b in pairwise(_TENTHS)),
    ),
    Better("steps to converge", "quieter half", over="noisier half"),
    Better("Fréchet distance", "quieter half", over="noisier half"),
    seeds=range(100, 105),
    note="Digits of 8 x 8 pixels. The relative entropy is that of Gaussians with the digits' moments, in closed form. For the "
    "other conditions a dense network is trained on each tenth of the times alone, 300 steps each. Converged means that nine "
    "tenths of the fall of the loss are behind it. The distance is that of samples drawn with this network in its tenth and one "
    "trained on all times, 2000 steps, elsewhere: a mean over six moments of the 300 steps, in the features of a small "
    "classifier of digits. It depends on this classifier, of one hidden layer: by one with two, the quieter half of the "
    "same samples was farther by 0.20 [0.02, 0.38].",
)
def low_noise_is_hard(lab: Lab) -> Figures:
    """Both studies of the paper."""
    train, test = digits(train=1300, seed=lab.seed)
    x, schedule, judge = (2 * train.x - 1).flatten(1), Schedule(beta_schedule("linear")), _judge(train, test, lab.seed)
    kl = marginal_kl(x, schedule)
    torch.manual_seed(lab.seed)
    net = ToyDenoiser(64, width=128, layers=3)
    config = _OnDigits.Config.small(channels=1, image_size=8, width=8, ema=0.99, clusters=1)
    whole = lab.fit(_OnDigits(config, _Dense(net)), train, steps=lab.steps(2000))
    noise = torch.randn(max(100, lab.steps(1000)), *whole.shape, generator=lab.generator)

    def distance(net: nn.Module, low: int, high: int) -> float:
        model = whole.with_expert(_Dense(net), low, high).average
        drawn = sample_ddim(lambda x, t: model(x, t).sample, noise, schedule, steps=25, clip=True)
        return judge((drawn + 1).div(2).clamp(0, 1))

    settings: dict[str, Any] = {"steps": lab.steps(300), "judge": distance, "judgements": lab.steps(6)}
    found = task_difficulty(net, x, schedule, **settings, generator=lab.generator)
    slow, far, edges = found.steps_to().double(), found.judgements.mean(1), found.edges.tolist()
    figures: Figures = {
        name: {
            "relative entropy": kl[max(0, low - 1) : high - 1].sum().item(),
            "steps to converge": slow[i].item(),
            "Fréchet distance": far[i].item(),
            "Fréchet distance at the end": found.judgements[i, -1].item(),
        }
        for i, (name, low, high) in enumerate(zip(_TENTHS, edges, edges[1:]))
    }
    for name, part in (("quieter half", slice(5)), ("noisier half", slice(5, 10))):
        figures[name] = {"steps to converge": slow[part].mean().item(), "Fréchet distance": far[part].mean().item()}
    figures["all times"] = {"Fréchet distance": distance(whole.average.module.inner, 0, 1)}
    for i in (0, 3, 6, 9):
        lab.curve(_TENTHS[i], found.steps.tolist(), found.normalised[i].tolist(), xlabel="step", ylabel="loss, from 1 to 0")
    return figures


@claim(
    "At equal steps, training from easy to hard times ends with better samples than training on all times at once, and than "
    "training from hard to easy",
    Better("Fréchet distance", "easy to hard", over="uniform", higher=False),
    Better("Fréchet distance", "easy to hard", over="hard to easy", higher=False),
    seeds=range(100, 105),
    note="Digits of 8 x 8 pixels, a dense network, 3000 steps, a quarter of them at most for the curriculum; the distance is "
    "that in the features of a small classifier of digits. By another, with two hidden layers, the gain over all times at once "
    "was 0.17 [-0.03, 0.36]: inconclusive too.",
)
def easy_to_hard(lab: Lab) -> Figures:
    """One network, one sampler, one budget; only the order in which the times come differs."""
    train, test = digits(train=1300, seed=lab.seed)
    judge, steps = _judge(train, test, lab.seed), lab.steps(3000)
    figures: Figures = {"real digits": {"Fréchet distance": judge(train.x[:1000])}}
    torch.manual_seed(lab.seed)
    net = _Dense()  # all arms begin at its weights
    for name, over in _ARMS.items():
        settings = {"clusters": 5, "patience": lab.steps(20), "ema": 0.99, "sample_steps": 20, **over}
        method = _OnDigits(
            _OnDigits.Config.small(channels=1, image_size=8, width=8, **settings), net, judge, max(100, lab.steps(2000))
        )
        lab.fit(method, train, steps=steps)
        figures[name] = {"Fréchet distance": method.quality[steps], "steps before all times": float(method.steps_before_all)}
        lab.curve(name, list(method.quality), list(method.quality.values()), xlabel="step", ylabel="Fréchet distance")
        lab.picture(name, method.sample(16, lab.generator))
    return figures
