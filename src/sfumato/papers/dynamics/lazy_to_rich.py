"""Grokking as the transition from lazy to rich training: the network first fits with the kernel that it started with, and
generalises when that kernel moves (Kumar, Bordelon, Gershman, Pehlevan, ICLR 2024).

    f(x) = (α/N) Σᵢ φ(wᵢ·x),  φ(h) = h + ε h²/2;      with w̄ = mean wᵢ, M = mean wᵢwᵢᵀ:   f = α w̄·x + (αε/2) xᵀMx

Two knobs delay it: a large α (lazy) and a small ε (a kernel poorly aligned with labels ½(β·x)²). The measures are
`sfumato.probes.kernel_alignment` and its neighbours; for any other network the first knob is `sfumato.nn.scale_output` and the
network without feature learning `sfumato.nn.linearise`. This page holds the quadratic network (`Committee`), its gradient descent
and its test loss in closed form (`descend`, `loss_decomposition`), when it groks (`grok_time`), and what the paper claims
(`laziness`, `alignment`, `mechanism`).

>>> import torch
>>> from sfumato.papers.dynamics.lazy_to_rich import Committee, grok_time
>>> net = Committee(8, 100, alpha=1.0, eps=0.25, generator=torch.Generator().manual_seed(0))
>>> x = torch.randn(5, 8) / 8**0.5
>>> m = net.moments()
>>> torch.allclose(net(x), x @ m.mean + 0.25 / 2 * (x @ m.second * x).sum(1), atol=1e-5)
True
>>> grok_time([1.0, 0.1, 0.1, 0.1], [1.0, 1.0, 1.0, 0.1], 0.5)
GrokTime(train=1.0, test=3.0, delay=2.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.teachers import SingleIndex, single_index
from sfumato.errors import BadData, BadSetting
from sfumato.probes.kernels import kernel_alignment, kernel_regression, kernel_velocity


class Moments(NamedTuple):
    """All that matters of a committee's weights: mean w̄ `[..., D]` and second moment M `[..., D, D]` over its units."""

    mean: Tensor
    second: Tensor


class Decomposition(NamedTuple):
    """The three terms of the test loss, each at least 0, which add up to it."""

    variance: Tensor
    misalignment: Tensor
    linear: Tensor

    def total(self) -> Tensor:
        """The test loss."""
        return self.variance + self.misalignment + self.linear


class GrokTime(NamedTuple):
    """First times at which the curves are below a level (infinite: never), and how much later the second is."""

    train: float
    test: float
    delay: float


class Committee(nn.Module):
    """(α/N) Σᵢ φ(wᵢ·x) with φ(h) = h + ε h²/2: a quadratic network whose second layer is fixed; wᵢ ~ N(0, I) at first.

    Args:
        dim: D, numbers of an input.
        width: N, hidden units.
        alpha: α, scale of the output, positive: how lazily it learns, when rates fall with 1/α².
        eps: ε, weight of the square, at least 0: how well the first kernel is aligned with quadratic labels.
        dtype: of the weights.
        generator: of the first weights.

    Raises:
        BadSetting: values out of range.
    """

    def __init__(
        self, dim: int, width: int, *, alpha: float = 1.0, eps: float = 0.25, dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not alpha > 0 or eps < 0:
            raise BadSetting(f"alpha={alpha:g} must be positive and eps={eps:g} at least 0")
        self.alpha, self.eps = alpha, eps
        device = None if generator is None else generator.device
        self.weight = nn.Parameter(torch.randn(width, dim, dtype=dtype, device=device, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """`[P, D]` to `[P]`."""
        h = x @ self.weight.T
        return self.alpha * (h + self.eps / 2 * h.square()).mean(1)

    def moments(self) -> Moments:
        """Mean and second moment of the weights, detached."""
        w = self.weight.detach()
        return Moments(w.mean(0), w.T @ w / len(w))


def outputs(m: Moments, x: Tensor, alpha: Tensor, eps: Tensor) -> Tensor:
    """What committees answer, from their moments: `x` `[P, D]`, `alpha` and `eps` `[...]` to `[..., P]`."""
    quadratic = ((x @ m.second) * x).sum(-1)
    return alpha[..., None] * (m.mean @ x.T + eps[..., None] / 2 * quadratic)


def tangent_kernel(m: Moments, x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """The committee's tangent kernel divided by α²/N: x·x′ (1 + ε w̄·(x + x′) + ε² xᵀMx′), `[P1, P2]`."""
    drift = (x1 @ m.mean)[:, None] + x2 @ m.mean
    return x1 @ x2.T * (1 + eps * drift + eps**2 * x1 @ m.second @ x2.T)


def loss_decomposition(m: Moments, beta: Tensor, alpha: Tensor | float, eps: Tensor | float) -> Decomposition:
    """The mean squared error over all inputs x ~ N(0, I/D) with labels ½(β·x)², exactly.

        ¼ (|β|²/D − αε tr M/D)²  +  ‖αεM − ββᵀ‖² / (2D²)  +  α² |w̄|²/D

    Args:
        m: moments of the weights, `[..., D]` and `[..., D, D]`.
        beta: `[D]`.
        alpha: α, a number or `[...]`.
        eps: ε, a number or `[...]`.

    Returns:
        Errors of the mean, of the direction, and of the linear part, `[...]` each.
    """
    d = len(beta)
    alpha, eps = (torch.as_tensor(t).to(m.mean) for t in (alpha, eps))
    scale = alpha * eps
    trace = m.second.diagonal(dim1=-2, dim2=-1).sum(-1)
    variance = (beta.square().sum() - scale * trace).square() / (4 * d**2)
    apart = scale[..., None, None] * m.second - torch.outer(beta, beta)
    misalignment = apart.square().sum((-2, -1)) / (2 * d**2)
    return Decomposition(variance, misalignment, alpha.square() * m.mean.square().sum(-1) / d)


class Pull(NamedTuple):
    """N times the gradient of the loss in wᵢ, which is `shift + turn wᵢ` for every unit, and the loss."""

    shift: Tensor
    turn: Tensor
    loss: Tensor


def training_pull(m: Moments, x: Tensor, y: Tensor, alpha: Tensor, eps: Tensor) -> Pull:
    """The gradient of mean (f − y)² over samples `[P, D]` with labels `[P]` (or `[..., P]`)."""
    residual = outputs(m, x, alpha, eps) - y
    scaled = 2 * alpha[..., None] * residual / len(x)
    return Pull(scaled @ x, eps[..., None, None] * (x.T * scaled[..., None, :]) @ x, residual.square().mean(-1))


def population_pull(m: Moments, beta: Tensor, alpha: Tensor, eps: Tensor) -> Pull:
    """The gradient of the loss over all inputs: training on infinitely many samples."""
    d, scale = len(beta), alpha * eps
    trace = m.second.diagonal(dim1=-2, dim2=-1).sum(-1)
    level = -scale / d**2 * (beta.square().sum() - scale * trace)  # 2 ∂/∂M of the variance term, times I
    apart = scale[..., None, None] * m.second - torch.outer(beta, beta)
    turn = level[..., None, None] * torch.eye(d, dtype=beta.dtype) + 2 * scale[..., None, None] / d**2 * apart
    loss = loss_decomposition(m, beta, alpha, eps).total()
    return Pull(2 * alpha.square()[..., None] * m.mean / d, turn, loss)


def descend(m: Moments, pull: Callable[[Moments], Pull], rate: Tensor) -> tuple[Moments, Tensor]:
    """One step of gradient descent of all weights, of which the moments alone are kept: exact, as φ is quadratic.

    wᵢ ← wᵢ − (rate/N) N ∂L/∂wᵢ, so rate = c/α² for a learning rate of c N/α².

    Args:
        m: moments, `[..., D]` and `[..., D, D]`.
        pull: the gradient, from the moments.
        rate: `[...]`.

    Returns:
        The moments after the step, and the loss before it.
    """
    shift, turn, loss = pull(m)
    shift = rate[..., None] * shift
    keep = torch.eye(shift.shape[-1], dtype=shift.dtype) - rate[..., None, None] * turn
    mean = (keep @ m.mean[..., None])[..., 0]
    cross = mean[..., :, None] * shift[..., None, :]
    second = keep @ m.second @ keep - cross - cross.mT + shift[..., :, None] * shift[..., None, :]
    return Moments(mean - shift, second), loss


def linearised_outputs(
    k_train: Tensor, k_test: Tensor, start: Tensor, start_test: Tensor, y: Tensor, *, rate: float, steps: int
) -> Tensor:
    """Test outputs of the linearised network after full-batch gradient descent on mean (f − y)², in closed form.

    Args:
        k_train: tangent kernel between training samples, `[P, P]`, without α²/N.
        k_test: between test and training samples, `[Q, P]`.
        start: outputs at first, `[P]`.
        start_test: `[Q]`.
        y: labels, `[P]`.
        rate: c, for a learning rate of c N/α².
        steps: how many.

    Returns:
        `[Q]`.
    """
    values, vectors = torch.linalg.eigh(k_train)
    step = 2 * rate / len(y)
    shrunk = (1 - step * values) ** steps
    growth = torch.where(values.abs() > 1e-12 * values[-1], (1 - shrunk) / values, step * steps)
    return start_test + k_test @ (vectors @ (growth * (vectors.T @ (y - start))))


def grok_time(
    train_curve: Sequence[float] | Tensor, test_curve: Sequence[float] | Tensor, level: float, *, every: float = 1.0
) -> GrokTime:
    """When the training loss and when the test loss first fall below a level.

    Args:
        train_curve: losses, `[T]`.
        test_curve: losses at the same times, `[T]`.
        level: of both.
        every: time from one entry to the next.

    Raises:
        BadData: curves of unlike lengths.
    """
    curves = [torch.as_tensor(c, dtype=torch.float64) for c in (train_curve, test_curve)]
    if curves[0].shape != curves[1].shape:
        raise BadData(f"both curves have one entry a time, these have {len(curves[0])} and {len(curves[1])}")
    train, test = (float((c < level).nonzero()[0, 0]) * every if (c < level).any() else math.inf for c in curves)
    return GrokTime(train, test, math.inf if math.isinf(test) else test - train)


# The experiment: 30 dimensions, 165 samples, 100 units, c = 1/2.

D, P, N, TEST, RATE, EVERY = 30, 165, 100, 300, 0.5, 10
VARIANCE = 0.5
"""Of the labels: β·x is standard normal."""

LEVEL = 0.1 * VARIANCE
"""Below this loss a set counts as fitted."""


class Runs(NamedTuple):
    """Many settings `[A]` trained side by side from the same weights.

    Losses `[A, T]` before every tenth step; moments by step, at a hundred of these and after the last; both sets.
    """

    alpha: Tensor
    eps: Tensor
    train_loss: Tensor
    test_loss: Tensor
    kept: dict[int, Moments]
    train: SingleIndex
    test: SingleIndex

    def times(self) -> list[GrokTime]:
        """When each run groks."""
        return [grok_time(a, b, LEVEL, every=EVERY) for a, b in zip(self.train_loss, self.test_loss)]

    def at(self, arm: int, step: int) -> Moments:
        """Moments of one run before a step that is kept."""
        return Moments(*(t[arm] for t in self.kept[step]))

    def kernel(self, arm: int, step: int) -> Tensor:
        """Tangent kernel of one run between test samples, before a step that is kept."""
        return tangent_kernel(self.at(arm, step), self.test.x, self.test.x, float(self.eps[arm]))


def sweep(lab: Lab, alpha: Sequence[float], eps: Sequence[float], steps: int) -> Runs:
    """Train a committee for each pair of settings, all from the same first weights and on the same data."""
    generator, f64 = lab.generator, torch.float64
    beta = torch.randn(D, dtype=f64, generator=generator)
    beta = beta * math.sqrt(D) / beta.norm()
    train, test = (single_index(D, count, beta=beta, dtype=f64, generator=generator) for count in (P, TEST))
    a, e = torch.tensor(alpha, dtype=f64), torch.tensor(eps, dtype=f64)
    start = Committee(D, N, dtype=f64, generator=generator).moments()
    m = Moments(*(t.expand(len(a), *t.shape) for t in start))
    steps = lab.steps(steps)
    rate, seldom = RATE / a.square(), max(1, steps // (100 * EVERY)) * EVERY
    train_loss, test_loss = [], []
    kept: dict[int, Moments] = {}
    for step in range(steps):
        after, loss = descend(m, lambda now: training_pull(now, train.x, train.y, a, e), rate)
        if step % EVERY == 0:
            train_loss.append(loss)
            test_loss.append(loss_decomposition(m, beta, a, e).total())
        if step % seldom == 0:
            kept[step] = m
        m = after
    return Runs(a, e, torch.stack(train_loss, 1), torch.stack(test_loss, 1), kept | {steps: m}, train, test)


def arm_figures(runs: Runs, arm: int) -> dict[str, float]:
    """Times in steps, the last test loss over the labels' variance, how far the kernel moved, weight norms, alignment.

    What was not reached counts as reached after the last step.
    """
    end = max(runs.kept)
    first, last = runs.at(arm, 0), runs.at(arm, end)
    fit, generalise = (min(t, float(end)) for t in runs.times()[arm][:2])
    loss = float(loss_decomposition(last, runs.test.beta, runs.alpha[arm], runs.eps[arm]).total()) / VARIANCE
    return {
        "steps to fit": fit,
        "steps to generalise": generalise,
        "delay": generalise - fit,
        "log10 of the delay": math.log10(max(generalise - fit, EVERY)),
        "test loss": loss,
        "log10 of the test loss": math.log10(loss),
        "kernel movement": float(kernel_velocity(runs.kernel(arm, end), runs.kernel(arm, 0))),
        "weight norm, times the first": math.sqrt(float(last.second.trace() / first.second.trace())),
        "first alignment": float(kernel_alignment(runs.kernel(arm, 0), runs.test.y)),
    }


def controls(runs: Runs, arm: int) -> Figures:
    """The same task by regression with the first kernel, and by the linearised network after as many steps."""
    m, eps, (x, y, _), test = runs.at(arm, 0), float(runs.eps[arm]), runs.train, runs.test
    k_train, k_test = tangent_kernel(m, x, x, eps), tangent_kernel(m, test.x, x, eps)
    start, start_test = (outputs(m, z, runs.alpha[arm], runs.eps[arm]) for z in (x, test.x))
    found = {
        "kernel regression": kernel_regression(k_train, y, k_test),
        "linearised network": linearised_outputs(k_train, k_test, start, start_test, y, rate=RATE, steps=max(runs.kept)),
    }
    losses = {name: float((f - test.y).square().mean()) / VARIANCE for name, f in found.items()}
    return {name: {"test loss": loss, "log10 of the test loss": math.log10(loss)} for name, loss in losses.items()}


def draw(lab: Lab, runs: Runs, arm: int, name: str) -> None:
    """Both losses of one run as curves."""
    steps = EVERY * torch.arange(runs.train_loss.shape[1])
    at = torch.unique(torch.logspace(0, math.log10(len(steps)), 60).long() - 1)
    x = steps[at].clamp(min=1).log10().tolist()
    for which, losses in (("training", runs.train_loss), ("test", runs.test_loss)):
        lab.curve(f"{name}, {which}", x, losses[arm, at].tolist(), xlabel="log10 of the step", ylabel="squared error")


def rising(values: Sequence[float]) -> bool:
    """Whether each value is above the one before."""
    return all(a < b for a, b in pairwise(values))


ALPHAS = (1 / 16, 1 / 4, 1.0, 4.0)
LAZY = tuple(f"alpha {a:g}" for a in ALPHAS)


@claim(
    "The lazier a network learns, the longer it takes from fitting to generalising, the less its kernel moves and the worse it "
    "ends; what cannot move its kernel does not generalise, and weights grow meanwhile",
    Holds("the delay rises with alpha", lambda f: rising([f[a]["delay"] for a in LAZY])),
    Better("log10 of the delay", LAZY[-1], over=LAZY[0], by=math.log10(5)),
    Holds("the kernel moves less the larger alpha is", lambda f: rising([-f[a]["kernel movement"] for a in LAZY])),
    Holds("the last test loss rises with alpha", lambda f: rising([f[a]["test loss"] for a in LAZY])),
    Better("log10 of the test loss", "alpha 1", over="kernel regression", by=1, higher=False),
    Better("log10 of the test loss", "alpha 1", over="linearised network", by=1, higher=False),
    Holds("weights grow at alpha 1", lambda f: f["alpha 1"]["weight norm, times the first"] > 1),
    seeds=range(100, 105),
    note="No weight decay, plain gradient descent, 20,000 steps at rates in proportion to 1/alpha². At this size the time to "
    "generalise stays several times the time to fit for all alphas: that grokking vanishes shows as a short delay, not as curves "
    "that coincide. A run that has not generalised after the last step counts as if it did then. Weights end with "
    "tr M = |beta|²/(alpha epsilon): they grow below alpha epsilon = 1 and shrink above, where the delay is there as well.",
)
def laziness(lab: Lab) -> Figures:
    """Delay, kernel movement and test loss against α, with regression by the first kernel and the linearised network."""
    runs = sweep(lab, ALPHAS, [0.25] * len(ALPHAS), 20_000)
    figures: Figures = {}
    for arm, name in enumerate(LAZY):
        draw(lab, runs, arm, name)
        figures[name] = arm_figures(runs, arm)
    return figures | controls(runs, ALPHAS.index(1.0))


EPSILONS = (0.25, 0.5, 1.0, 2.0)
ALIGNED = tuple(f"epsilon {e:g}" for e in EPSILONS)


@claim(
    "The better the first kernel is aligned with the labels, the sooner the network generalises",
    Holds("the first alignment rises with epsilon", lambda f: rising([f[e]["first alignment"] for e in ALIGNED])),
    Holds("the delay falls with epsilon", lambda f: rising([-f[e]["delay"] for e in ALIGNED])),
    seeds=range(100, 105),
    note="alpha is 1. A part of the effect is a plain time scale: the quadratic part of the kernel grows with epsilon².",
)
def alignment(lab: Lab) -> Figures:
    """Delay against ε."""
    runs = sweep(lab, [1.0] * len(EPSILONS), EPSILONS, 10_000)
    figures: Figures = {}
    for arm, name in enumerate(ALIGNED):
        draw(lab, runs, arm, name)
        figures[name] = arm_figures(runs, arm)
    return figures


@claim(
    "From fitting on, the test loss falls as the kernel turns to the labels",
    Better("rank correlation", "test loss and alignment", over="minus nine tenths", higher=False),
    seeds=range(100, 105),
    note="alpha 1, epsilon 1/4. Spearman's correlation over all times from the end of fitting on, of a hundred in 10,000 steps; "
    "the turn is from the first alignment to the last. It is no clean second stage at this size: on the development seeds "
    "0.3 to 0.5 of it was over when the network had fitted.",
)
def mechanism(lab: Lab) -> Figures:
    """Alignment of the kernel with the labels along training, and the test loss."""
    from scipy.stats import spearmanr

    runs = sweep(lab, [1.0], [0.25], 10_000)
    steps = sorted(runs.kept)[:-1]
    aligned = [float(kernel_alignment(runs.kernel(0, step), runs.test.y)) for step in steps]
    losses = [float(runs.test_loss[0, step // EVERY]) for step in steps]
    for name, values in (("test loss", losses), ("alignment", aligned)):
        lab.curve(name, steps, values, xlabel="step", ylabel="test loss, alignment of the kernel")
    fitted = sum(step < runs.times()[0].train for step in steps)
    late = slice(min(fitted, len(steps) - 2), None)
    return {
        "test loss and alignment": {"rank correlation": float(spearmanr(losses[late], aligned[late]).statistic)},
        "when it fits": {"share of the turn": (aligned[late][0] - aligned[0]) / (aligned[-1] - aligned[0])},
        "minus nine tenths": {"rank correlation": -0.9},
    }
