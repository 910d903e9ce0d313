"""Mode interpolation: diffusion models draw what never was in the data, between neighbouring modes, and betray it (Aithal, Maini,
Lipton, Kolter, NeurIPS 2024).

    exact score of a mixture: jumps between two modes at little noise     learned score: goes there smoothly, over a strip
    Hal(x) = mean over coordinates of Var_{i in W} [x̂_0^(i)], W the last steps: large for samples that end in the strip

This page holds the toy (`PointDiffusion`: diffusion on points), what is known of it exactly (`interpolating`, `score_gap`), and
the claims. The detector is `sfumato.diffusion.X0Variance`, all its windows at once `sfumato.diffusion.scan_windows`, training on
one's own samples `sfumato.diffusion.recursive_training`. Pictures are learned by `sfumato train ddpm`, and those of either are
filtered by `sfumato sample RUN --keep 0.96`.

>>> import torch
>>> from sfumato.data import GaussianMixture
>>> from sfumato.papers.diffusion.mode_interpolation import interpolating
>>> line = GaussianMixture(torch.tensor([[1.0], [2.0], [4.0], [5.0]]), 0.05)
>>> interpolating(torch.tensor([[1.5], [3.0], [2.1], [4.6]]), line)  # 2 and 4 are no neighbours, 2.1 belongs to a mode
tensor([ True, False, False,  True])
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.batch import Batch, Facts
from sfumato.data.gaussian_mixture import GaussianMixture
from sfumato.diffusion import (
    SamplerStep,
    Schedule,
    X0Variance,
    beta_schedule,
    denoising_loss,
    filter_by_variance,
    keep_all,
    keep_random,
    keep_steady,
    recursive_training,
    sample_ddpm,
    uniform_t,
)
from sfumato.diffusion.recursive import Draw
from sfumato.diffusion.samplers import Callback, Model
from sfumato.errors import BadData, BadSetting
from sfumato.method import Context, Loss, Method, MethodConfig
from sfumato.nn import ToyDenoiser


class PointDiffusion(Method):
    """Ho et al.'s diffusion on points of a line, a plane or a space of few dimensions, as the paper's toys train it."""

    class Config(MethodConfig):
        """Defaults: the paper's, for 25 modes in the plane (50,000 points, 10 steps an epoch)."""

        steps: int = Field(100_000, gt=0, description="optimizer steps")
        batch_size: int = Field(10_000, gt=0, description="points a step")
        dim: int | None = Field(None, gt=0, description="coordinates of a point; None: those of the data")
        width: int = Field(128, ge=4, description="hidden units")
        layers: int = Field(3, gt=0, description="residual blocks")
        times: int = Field(1000, gt=1, description="noise levels (T)")
        beta_start: float = Field(1e-3, gt=0, lt=1, description="noise that the first time adds (variance); it grows linearly")
        beta_end: float = Field(0.2, gt=0, lt=1, description="noise that the last time adds")
        lr: float = Field(1e-3, gt=0, description="Adam's learning rate")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """A line on two cores in half a minute; of the plane's modes it learns little."""
            return cls(**{"steps": 1500, "batch_size": 1000, "width": 64, "times": 250, **over})

        def fitted(self, facts: Facts) -> Self:
            """The coordinates from the data."""
            if facts.size is not None:
                raise BadData(
                    "mode-interpolation learns points [N, D]; for pictures: sfumato train ddpm, then sample --keep 0.96"
                )
            return type(self).model_validate({**self.model_dump(), "dim": self.dim or facts.channels})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        self.schedule = Schedule(beta_schedule("linear", c.times, c.beta_start, c.beta_end))
        self.shape = (c.dim or 1,)
        self.net = ToyDenoiser(c.dim or 1, width=c.width, layers=c.layers)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The error of the predicted noise at one random time a point.

        Raises:
            BadData: no points, or of another space.
        """
        x0 = batch.x.to(self.net.enter.weight.dtype)  # whole numbers come as such
        if x0.shape[1:] != self.shape:
            raise BadData(f"points must be vectors of {self.shape[0]} coordinates (set dim), not {list(x0.shape[1:])}")
        t = uniform_t(len(x0), len(self.schedule), generator=ctx.generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=ctx.generator, device=x0.device, dtype=x0.dtype)
        return Loss(denoising_loss(self.net, x0, t, noise, self.schedule), len(batch))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam, as in the paper; no average of the weights, no clipping."""
        return {"net": torch.optim.Adam(self.net.parameters(), self.config.lr)}

    @property
    def trajectory_steps(self) -> int:
        """Network calls for a sample."""
        return len(self.schedule)

    def sample(self, n: int, generator: torch.Generator | None = None, *, callback: Callback | None = None) -> Tensor:
        """Draw `n` new points, `[n, D]`, over all times."""
        device = generator.device if generator is not None else self.device
        start = torch.randn(n, *self.shape, generator=generator, device=device).to(self.device)
        return draw_points(self.net, start, self.schedule, callback=callback, generator=generator)


def draw_points(
    model: Model,
    start: Tensor,
    schedule: Schedule,
    *,
    predict: str = "eps",
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The paper's sampler: ancestral, of the large variance, guesses not clipped; arguments as of `sample_ddpm`."""
    return sample_ddpm(model, start, schedule, predict=predict, variance="large", callback=callback, generator=generator)


def exact_score(mixture: GaussianMixture, schedule: Schedule) -> Model:
    """`model(x, t)`: the score of the mixture at the noise of t, one time for all; for samplers with `predict="score"`."""
    return lambda x, t: mixture.noised(schedule.abar[int(t.flatten()[0])]).score(x)


def interpolating(x: Tensor, mixture: GaussianMixture, *, kappa: float = 6.0) -> Tensor:
    """Which points belong to no mode and lie between two neighbouring ones.

    Neighbours are the modes at the smallest distance that occurs. Between: the projection falls on the line between their
    centres, and the point is at most `kappa` standard deviations away from it.

    Args:
        x: `[N, D]`.
        mixture: of round modes.
        kappa: a mode reaches this many standard deviations from its centre.

    Returns:
        `[N]` bool.

    Raises:
        BadSetting: fewer than two modes, or modes that are not round.
    """
    if mixture.var is None or len(mixture.means) < 2:
        raise BadSetting("between which modes? give a mixture of two or more round ones")
    apart = torch.cdist(mixture.means, mixture.means)
    first, second = torch.triu_indices(len(apart), len(apart), 1)
    distance = apart[first, second]
    near = distance <= 1.01 * distance.min()
    a, b = mixture.means[first[near]], mixture.means[second[near]]
    way, offset = b - a, x[:, None] - a  # [P, D], [N, P, D]
    place = (offset * way).sum(2) / way.square().sum(1)
    aside = (offset - place[..., None] * way).square().sum(2)
    between = (place > 0) & (place < 1) & (aside <= kappa**2 * mixture.var.max())
    return between.any(1) & mixture.off_support(x, kappa=kappa)


def score_gap(
    model: Model, mixture: GaussianMixture, schedule: Schedule, t: int, *, ends: tuple[int, int] = (0, 1), points: int = 201
) -> tuple[Tensor, Tensor, Tensor]:
    """The exact and a learned score on the line between two modes, along that line, at the noise of time `t`.

    Args:
        model: predicts noise, `model(x, t)`.
        mixture: the exact one.
        schedule: its tables.
        t: a time.
        ends: numbers of the two modes.
        points: places on the line.

    Returns:
        Places from 0 to 1, exact score, learned score: `[points]` each.
    """
    signal, a, b = schedule.abar[t].sqrt(), *(mixture.means[i] for i in ends)
    place = torch.linspace(0, 1, points, dtype=a.dtype)
    along = (b - a) / torch.linalg.vector_norm(b - a)
    x = signal.to(a) * (a + place[:, None] * (b - a))
    with torch.no_grad():
        noise = model(x, torch.full((points,), t))
    learned = -noise / (1 - schedule.abar[t]).sqrt().to(noise)
    return place, mixture.noised(schedule.abar[t]).score(x) @ along, learned @ along


def strip(exact: Tensor, learned: Tensor, *, tolerance: float = 0.25) -> float:
    """Share of the places at which two scores differ by more than `tolerance` of the largest exact one."""
    return float(((learned - exact).abs() > tolerance * exact.abs().max()).double().mean())


def histogram_divergence(x: Tensor, data: Tensor) -> float:
    """Kullback-Leibler divergence of the data from samples, over boxes: √(N / 10) an axis, N the number of data points.

    Half a point is added to every box of the samples; what lies beyond the data's range counts to the outermost boxes.
    """
    count = max(2, round(math.sqrt(len(data) / 10)))
    low, high = data.amin(0), data.amax(0)
    edges = [np.linspace(float(a), float(b) + 1e-9, count + 1) for a, b in zip(low, high)]
    inside = torch.minimum(torch.maximum(x, low), high)
    p, q = (np.histogramdd(v.double().numpy(), edges)[0] for v in (data, inside))
    p, q = p / p.sum(), (q + 0.5) / (q + 0.5).sum()
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


# Claims

MODES, STD, COUNT = ((1.0,), (2.0,), (3.0,)), 0.05, 10_000
WINDOWS = (5, 10, 20, 40)
KEEP = 0.96


def _trained(lab: Lab) -> tuple[GaussianMixture, Tensor, PointDiffusion]:
    """The modes, the data and a network trained on it, as small as `Config.small`."""
    mixture = GaussianMixture(torch.tensor(MODES), STD)
    data = mixture.sample(lab.steps(COUNT), balanced=True, generator=lab.generator)
    torch.manual_seed(lab.seed)
    config = PointDiffusion.Config.small(dim=1)
    return mixture, data, lab.fit(PointDiffusion(config), data, steps=lab.steps(config.steps))


@claim(
    "A trained diffusion model draws points between the modes of its data, where there are none; with the exact score the same "
    "sampler draws none",
    Holds(
        "the network puts more than ten times as many points off support as the exact score",
        lambda f: f["network"]["off support, %"] > 10 * f["exact score"]["off support, %"],
    ),
    Better("between modes, %", "network", over="exact score"),
    Holds(
        "most points off support lie between neighbouring modes",
        lambda f: f["network"]["between modes, %"] > 0.5 * f["network"]["off support, %"],
    ),
    seeds=range(100, 105),
    note="Modes 1, 2, 3 of deviation 0.05 on a line, 10,000 points, T = 250, 1500 steps of batch 1000; a point belongs to a mode "
    "within 6 deviations. Both samplers begin at the same noise. The 25 modes in the plane need far more training than this.",
)
def between_modes(lab: Lab) -> Figures:
    """Shares of points off support, and the learned score beside the exact one between the first two modes."""
    mixture, data, method = _trained(lab)
    schedule, figures = method.schedule, {}
    wide = GaussianMixture(mixture.means.double(), STD)
    arms: dict[str, tuple[Model, str, torch.dtype]] = {
        "network": (method.net, "eps", torch.float32),
        "exact score": (exact_score(wide, schedule), "score", torch.float64),
    }
    for name, (model, predict, dtype) in arms.items():
        generator = lab.generator
        start = torch.randn(len(data), 1, generator=generator, dtype=torch.float64).to(dtype)
        figures[name] = _shares(draw_points(model, start, schedule, predict=predict, generator=generator), mixture)
    figures["data"] = _shares(data, mixture)
    for t in (2, 10, 30):
        place, exact, learned = score_gap(method.net, mixture, schedule, t)
        figures["network"][f"strip at time {t}"] = strip(exact, learned)
        for name, values in (("exact", exact), ("learned", learned)):
            lab.curve(f"{name}, time {t}", place.tolist(), values.tolist(), xlabel="from mode 1 to mode 2", ylabel="score")
    return figures


def _shares(x: Tensor, mixture: GaussianMixture) -> dict[str, float]:
    """Of points off support, and of those between neighbours."""
    x = x.to(mixture.means)
    off, between = mixture.off_support(x), interpolating(x, mixture)
    return {"off support, %": 100 * float(off.double().mean()), "between modes, %": 100 * float(between.double().mean())}


class NoiseSize:
    """A callback: for each sample the mean square of the predicted noise, summed over a window of steps."""

    def __init__(self, window: tuple[int, int]) -> None:
        self.window, self.total = window, torch.zeros(())

    def __call__(self, step: SamplerStep) -> None:
        """See one step."""
        if self.window[0] <= step.step < self.window[1]:
            sigma = step.sigma.to(step.x_t)
            noise = (step.x_t * (1 + sigma**2).sqrt() - step.x0) / sigma
            self.total = self.total + noise.square().flatten(1).mean(1)


@claim(
    "The variance of the predicted clean point over the last 2 % of the steps tells points off support from the rest, and "
    "dropping 4 % of the samples by it removes most of them",
    Holds("AUC of the variance over the last 5 steps at least 0.9", lambda f: f["variance, last 5 steps"]["AUC"] >= 0.9),
    Better("removed", "variance, last 5 steps", over="random filter", by=0.5),
    seeds=range(100, 105),
    note="As the other claim; some 20 to 80 of 10,000 points are off support. The paper's figure, over 95 % "
    "removed with 96 % kept, is of a far longer training. Longer windows are worse: beyond a tenth of the chain every sample "
    "still moves. Logged beside at equal retention: the change of the last step, the size of the predicted noise, and the "
    "density of the training data, which is told where the data lies.",
)
def detector(lab: Lab) -> Figures:
    """AUC and share removed, by window and by other scores of the same samples."""
    mixture, data, method = _trained(lab)
    steps = method.trajectory_steps
    variances = {f"variance, last {w} steps": X0Variance((steps - w, steps)) for w in WINDOWS}
    change, noise = X0Variance((steps - 2, steps)), NoiseSize((steps - WINDOWS[0], steps))
    parts: list[Callback] = [*variances.values(), change, noise]

    def watch(step: SamplerStep) -> None:
        for part in parts:
            part(step)

    generator, count = lab.generator, len(data)
    x = method.sample(count, generator, callback=watch)
    scores = {name: part.variance for name, part in variances.items()}
    scores |= {"change of the last step": change.variance, "size of the predicted noise": noise.total}
    scores |= {"density of the data": -GaussianMixture(data[:: max(1, count // 1000)], 0.02).log_prob(x)}
    scores |= {"random filter": torch.rand(count, generator=generator)}
    bad = mixture.off_support(x)
    figures = {name: separation(score, bad, keep=KEEP) for name, score in scores.items()}
    for name in ("variance, last 5 steps", "variance, last 40 steps"):
        ordered = bad[scores[name].argsort(descending=True)].double().cumsum(0) / max(1, int(bad.sum()))
        dropped = range(0, count, max(1, count // 50))
        lab.curve(name, [i / count for i in dropped], ordered[list(dropped)].tolist(), xlabel="dropped", ylabel="found")
    figures["samples"] = {"off support": float(bad.sum())}
    return figures


GENERATIONS = 4
FILTERS: dict[str, Draw] = {"no filter": keep_all, "random filter": keep_random, "variance filter": keep_steady}


@claim(
    "A model that learns from its own samples generation after generation draws ever more points off support; dropping the 4 % "
    "with the largest variance slows that, and the divergence from the data, more than dropping as many by chance",
    Better("off support, %", "no filter, generation 4", over="generation 1"),
    Better("off support, %", "variance filter, generation 4", over="no filter, generation 4", higher=False),
    Better("off support, %", "variance filter, generation 4", over="random filter, generation 4", higher=False),
    Better("divergence", "variance filter, generation 4", over="random filter, generation 4", higher=False),
    seeds=range(100, 105),
    note="The same modes, 3000 points, T = 250, 700 steps of batch 1000 from scratch a generation; generation 1 learns from the "
    "data and is one for all. What a model drew is judged before it is filtered, so a filter can help only by what the next "
    "generation learns. On two development seeds the share grew from 1 % to 16 to 29 % with every filter: from the second "
    "generation on far more than the 4 % that a filter drops are off support, and trainings as short as these scatter as much as "
    "the filters differ. The paper's, of 25 modes in the plane, are far longer.",
)
def own_samples(lab: Lab) -> Figures:
    """Off support, counts of the modes and divergence of what each generation draws, by filter."""
    mixture = GaussianMixture(torch.tensor(MODES), STD)
    data = mixture.sample(lab.steps(3000), balanced=True, generator=lab.generator)
    config = PointDiffusion.Config.small(dim=1)

    first: list[PointDiffusion] = []  # trained once: it sees no filter

    def train(points: Tensor, number: int) -> PointDiffusion:
        if number == 0 and first:
            return first[0]
        torch.manual_seed(1000 * lab.seed + number)
        trained: PointDiffusion = lab.fit(PointDiffusion(config), points, steps=lab.steps(700))
        if number == 0:
            first.append(trained)
        return trained

    figures: Figures = {}
    for name, draw in FILTERS.items():
        drawn = recursive_training(train, data, generations=GENERATIONS, draw=draw, generator=lab.generator)
        found = [_drift(one.all, data, mixture) for one in drawn]
        figures |= {"generation 1": found[0]} if name == "no filter" else {}
        figures[f"{name}, generation {GENERATIONS}"] = found[-1]
        off = [one["off support, %"] for one in found]
        lab.curve(name, range(1, GENERATIONS + 1), off, xlabel="generation", ylabel="off support, %")
    return figures


def _drift(x: Tensor, data: Tensor, mixture: GaussianMixture) -> dict[str, float]:
    """What a generation's points are worth: shares off support; of the others how wide the modes are (1: as the data's) and what
    share each has; divergence from the data."""
    away, near = torch.cdist(x[~mixture.off_support(x)], mixture.means).min(1)
    shares = near.bincount(minlength=len(mixture.means)) / max(1, len(near))
    figures = {"width of the modes": float(away.square().mean().sqrt()) / (STD * data.shape[1] ** 0.5)}
    figures |= {"smallest mode, %": 100 * float(shares.min()), "largest mode, %": 100 * float(shares.max())}
    return {**_shares(x, mixture), **figures, "divergence": histogram_divergence(x, data)}


def separation(score: Tensor, bad: Tensor, *, keep: float = KEEP) -> dict[str, float]:
    """How well a score tells bad samples: AUC, and at a retention the shares of bad ones removed and of good ones kept.

    Args:
        score: `[N]`, large for suspicious samples.
        bad: `[N]` bool; without a bad or a good one AUC and shares are NaN.
        keep: share of the samples that is kept.
    """
    if bad.all() or not bad.any():
        return {"AUC": math.nan, "removed": math.nan, "kept": math.nan}
    from sklearn.metrics import roc_auc_score

    stays = torch.zeros_like(bad)
    stays[filter_by_variance(torch.arange(len(bad)), score, keep=keep)] = True
    return {
        "AUC": float(roc_auc_score(bad.numpy(), score.double().numpy())),
        "removed": float((~stays[bad]).double().mean()),
        "kept": float(stays[~bad].double().mean()),
    }
