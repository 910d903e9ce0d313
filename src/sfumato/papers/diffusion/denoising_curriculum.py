"""Denoising curriculum: a diffusion model learns the noisiest times first, then ever quieter ones, then all as usual.

    t ~ U(C_N ∪ ... ∪ C_{N-s+1}) at stage s,    s → s + 1 once the loss has not improved for more than τ steps

Times with little noise are the hard ones: alone they take longest to learn (`task_difficulty`), and there the noisy marginals
change fastest (`sfumato.probes.marginal_kl`). Network, loss and sampler are those of `ddpm`; only the draw of times differs, so
weights of the loss and better networks combine with it. Stages are per step and of the loss of all processes. For EDM's noise
levels there are parts: `sfumato.diffusion.lognormal_clusters`, `CurriculumTimesteps`.

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
from collections.abc import Callable, Generator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.samples import digits
from sfumato.diffusion import (
    CurriculumTimesteps,
    PatiencePacer,
    Schedule,
    beta_schedule,
    denoising_loss,
    linear_stage,
    range_t,
    uniform_clusters,
)
from sfumato.errors import BadSetting
from sfumato.method import Batch, Context, Loss, Result, Step
from sfumato.metrics import frechet_features
from sfumato.nn import ToyDenoiser
from sfumato.optim import EMA
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.probes import marginal_kl


class DenoisingCurriculum(DDPM):
    """Kim et al. 2025 on the base `ddpm`. Trains on pictures of one size, draws new ones."""

    class Config(DDPM.Config):
        """Defaults: the paper's for DiT (steps, batch, Adam, no dropout, 250 steps of DDPM), on the base's U-Net."""

        steps: int = Field(100_000, gt=0, description="optimizer steps")
        batch_size: int = Field(256, gt=0, description="pictures a step")
        clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; None: no clipping")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the residual blocks")
        lr: float = Field(1e-4, gt=0, description="Adam's learning rate")
        sample_steps: int = Field(250, gt=0, description="network calls for a sample")
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

    def stage(self, ctx: Context) -> Tensor:
        """1 to `clusters`: int64 scalar, on the device of the parameters."""
        c = self.config
        if c.pacing == "linear":
            return torch.full((), linear_stage(ctx.progress, c.clusters, share=c.share or 0.2), device=self.device)
        return self.pacer.stage

    def draw_times(self, n: int, ctx: Context) -> Tensor:
        """Times of the clusters that have come: `[n]` int64."""
        return self.curriculum(n, stage=self.stage(ctx), generator=ctx.generator)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The base's; `stage` is logged."""
        return super().loss(batch, ctx)._replace(logs={"stage": self.stage(ctx).float()})

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """One step; then the average follows, and the pacer sees the loss of all processes."""
        result = yield Step("net", (self.loss,))
        self.average.update(self.net)
        c = self.config
        latest = 1 if c.share is None else linear_stage(ctx.progress, c.clusters, share=c.share)
        self.pacer.update(result.loss, at_least=latest)


# How hard is which time?


class TaskDifficulty(NamedTuple):
    """What separate trainings of the parts of the times tell.

    Args:
        edges: `[n + 1]`, times at which the parts begin; T at the end.
        steps: `[k]`, training steps at which the loss was measured, from 0 on.
        losses: `[n, k]`, of fixed samples, times and noise.
    """

    edges: Tensor
    steps: Tensor
    losses: Tensor

    @property
    def normalised(self) -> Tensor:
        """`[n, k]`: the loss from its first value (1) to its last (0)."""
        first, last = self.losses[:, :1], self.losses[:, -1:]
        return (self.losses - last) / (first - last)

    def steps_to(self, left: float = 0.1) -> Tensor:
        """`[n]`: steps until the normalised loss stays below `left`: how slowly each part is learned."""
        above = self.normalised > left
        last = above.shape[1] - 1 - above.flip(1).int().argmax(1)  # the first measurement is 1, so there is one above
        return self.steps[(last + 1).clamp(max=len(self.steps) - 1)]


def task_difficulty(
    model: nn.Module, data: Tensor, schedule: Schedule, *, intervals: int = 10, steps: int = 300, batch_size: int = 64,
    lr: float = 1e-3, predict: str = "eps", measure: int = 30, generator: torch.Generator | None = None,
) -> TaskDifficulty:  # fmt: skip
    """Train a copy of a network on each part of the times alone, all with the same budget, and follow their losses.

    Args:
        model: `model(x_t, t)`, untrained; copies of it are trained, from the same weights.
        data: clean samples `[n, ...]`, in the range that they are diffused in.
        schedule: its tables.
        intervals: parts of equal length.
        steps: training steps of each copy.
        batch_size: samples a step.
        lr: Adam's learning rate.
        predict: "eps", "x0" or "v".
        measure: how often the loss is measured, apart from the start.
        generator: source of samples, times and noise, on the data's device; the parts see the same samples and noise.

    Raises:
        BadSetting: more intervals than times, or an unknown prediction.
    """
    edges = uniform_clusters(len(schedule), intervals)
    if generator is None:
        generator = torch.Generator(data.device).manual_seed(int(torch.randint(1 << 62, ())))
    start, marks = generator.get_state(), sorted({i * steps // measure for i in range(measure + 1)})
    curves = []
    for low, high in zip(edges.tolist(), edges[1:].tolist()):
        generator.set_state(start)
        net = copy.deepcopy(model).train()
        optimizer = torch.optim.Adam(net.parameters(), lr)
        held = data[torch.randperm(len(data), generator=generator, device=data.device)[:512]]
        noise = torch.randn(held.shape, generator=generator, device=data.device, dtype=data.dtype)
        spread = low + torch.arange(len(held), device=data.device) * (high - low) // len(held)
        losses = []
        for step in range(steps + 1):
            if step in marks:
                with torch.no_grad():
                    losses.append(denoising_loss(net.eval(), held, spread, noise, schedule, predict=predict))
                net.train()
            if step == steps:
                break
            rows = torch.randint(len(data), (batch_size,), generator=generator, device=data.device)
            t = range_t(batch_size, low, high, generator=generator)
            fresh = torch.randn(data[rows].shape, generator=generator, device=data.device, dtype=data.dtype)
            optimizer.zero_grad()
            denoising_loss(net, data[rows], t, fresh, schedule, predict=predict).backward()
            optimizer.step()
        curves.append(torch.stack(losses))
    return TaskDifficulty(edges, torch.tensor(marks), torch.stack(curves).double().cpu())


# The claims


class _Dense(nn.Module):
    """The toy network on the pixels of 8 x 8 pictures; answers like diffusers' U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ToyDenoiser(64, width=128, layers=3)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return SimpleNamespace(sample=self.inner(x.flatten(1), t).view_as(x))


class _OnDigits(DenoisingCurriculum):
    """The method with a dense network in place of the U-Net; it tells how good its samples are while it trains."""

    def __init__(self, config: Any, net: nn.Module, judge: Callable[[Tensor], float], draws: int) -> None:
        super().__init__(config)
        self.draws = draws
        self.net, self.average, self.judge = copy.deepcopy(net), EMA(net, decay=config.ema, warmup=True), judge
        self.quality: dict[int, float] = {}
        self.steps_before_all = 0

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        yield from super().steps(ctx)
        done = ctx.step + 1
        self.steps_before_all += int(self.pacer.stage) < self.config.clusters
        if done == ctx.total or done % max(1, ctx.total // 4) == 0:
            self.quality[done] = self.judge(self.sample(self.draws, torch.Generator().manual_seed(done)))


def _judge(train: Batch, test: Batch) -> Callable[[Tensor], float]:
    """Fréchet distance to the test digits in the features of a small classifier of the training digits."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    assert train.label is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        net = MLPClassifier((64, 32), max_iter=60, random_state=0).fit(train.x.flatten(1).numpy(), train.label.numpy())
    layers = [(torch.from_numpy(w).float(), torch.from_numpy(b).float()) for w, b in zip(net.coefs_[:-1], net.intercepts_)]

    def features(x: Tensor) -> Tensor:
        h = x.flatten(1)
        for weight, bias in layers:
            h = (h @ weight + bias).relu()
        return h

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
    seeds=range(100, 105),
    note="Digits of 8 x 8 pixels. The relative entropy is that of Gaussians with the digits' moments, in closed form. For the "
    "second condition a dense network is trained on each tenth of the times alone, 300 steps each; converged means that nine "
    "tenths of the fall of the loss are behind it.",
)
def low_noise_is_hard(lab: Lab) -> Figures:
    """Both studies of the paper."""
    train, _ = digits(train=1300, seed=lab.seed)
    x, schedule = 2 * train.x - 1, Schedule(beta_schedule("linear"))
    kl = marginal_kl(x, schedule)
    torch.manual_seed(lab.seed)
    net = ToyDenoiser(64, width=128, layers=3)
    found = task_difficulty(net, x.flatten(1), schedule, steps=lab.steps(300), generator=lab.generator)
    slow, edges = found.steps_to().double(), found.edges.tolist()
    figures = {
        name: {"relative entropy": kl[max(0, low - 1) : high - 1].sum().item(), "steps to converge": slow[i].item()}
        for i, (name, low, high) in enumerate(zip(_TENTHS, edges, edges[1:]))
    }
    for name, part in (("quieter half", slow[:5]), ("noisier half", slow[5:])):
        figures[name] = {"steps to converge": part.mean().item()}
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
    "that in the features of a small classifier of digits.",
)
def easy_to_hard(lab: Lab) -> Figures:
    """One network, one sampler, one budget; only the order in which the times come differs."""
    train, test = digits(train=1300, seed=lab.seed)
    judge, steps = _judge(train, test), lab.steps(3000)
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
