"""Linear mode connectivity: when is the line between two trained networks flat? (Singh, Adilova, Kamp, Fischer, Schölkopf,
Hofmann, ICML 2024 workshop HiLD.)

Two copies of a run part after k epochs and go on with their own data orders; B = max_α L(θ_α) − chord. Training comes down a
mountainside: copies that part early pass a ridge on different sides (B > 0), copies that part late end in one valley (B ≈ 0).
The probes are `sfumato.probes.path_loss` and its neighbours; this page spawns the runs (`spawn`), holds the ridge as a function
of two variables (`ridge_loss`, ours), and what the paper claims at small scale (`forks`, `curvature`, `ridge`).

>>> import torch
>>> from sfumato.papers.dynamics.mode_connectivity import ridge_barrier
>>> left, right = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0])  # two valleys, at equal height v = 1
>>> float(ridge_barrier(left, right)), float(ridge_barrier(right, right))
(0.25, 0.0)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.samples import digits
from sfumato.probes.path_curvature import barrier_prediction
from sfumato.probes.paths import State, barrier, fork_geometry, path_loss
from sfumato.probes.permutation import match_permutation

FORKS = (0, 1, 2, 4, 8, 16)
"""Epochs after which runs part."""

AFTER, COPIES, ALPHAS = 30, 3, 21
"""Epochs after the fork, copies at each fork (three pairs), positions on a line."""

Samples = tuple[Tensor, Tensor]


class Spawned(NamedTuple):
    """Runs from one fork: where they parted, and where each of them ended."""

    fork: dict[str, Tensor]
    ends: list[dict[str, Tensor]]


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def descend(
    model: nn.Module,
    optimizer: Optimizer,
    data: Samples,
    epochs: int,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> None:
    """Train a classifier in place; every epoch in a fresh order, the last incomplete batch left out.

    Args:
        model: gives logits `[B, K]`.
        optimizer: of its parameters, with whatever state it has by now.
        data: inputs `[N, ...]` and labels `[N]`.
        epochs: how many.
        batch_size: samples a step.
        generator: of the orders.
    """
    x, y = data
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // batch_size * batch_size].view(-1, batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def spawn(
    model: nn.Module, data: Samples, *, at: Sequence[int], epochs: int, copies: int = 2, lr: float = 0.1, momentum: float = 0.9,
    batch_size: int = 64, generator: torch.Generator | None = None,
) -> dict[int, Spawned]:  # fmt: skip
    """Train one run, and at each fork let copies go on that differ in nothing but the order of the data.

    The copies take the momentum of the trunk along. The rate is constant, so that a fork changes no schedule.

    Args:
        model: the initialisation; it is not changed.
        data: inputs `[N, ...]` and labels `[N]`.
        at: epochs at which copies part from the trunk.
        epochs: epochs of every copy after its fork.
        copies: how many at each fork.
        lr: learning rate of SGD.
        momentum: of SGD.
        batch_size: samples a step.
        generator: of all orders; one seed is drawn for the trunk and for each copy.

    Returns:
        For every fork, in order, its `Spawned` runs.

    Reference: Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, Section 2.
    """

    def own_order() -> torch.Generator:
        return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))

    trunk = copy.deepcopy(model)
    optimizer = SGD(trunk.parameters(), lr=lr, momentum=momentum)
    order, done, found = own_order(), 0, {}
    for fork in sorted(set(at)):
        descend(trunk, optimizer, data, fork - done, batch_size, order)
        done, ends = fork, []
        for _ in range(copies):
            run = copy.deepcopy(trunk)
            resumed = SGD(run.parameters(), lr=lr, momentum=momentum)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            descend(run, resumed, data, epochs, batch_size, own_order())
            ends.append(_snapshot(run))
        found[fork] = Spawned(_snapshot(trunk), ends)
    return found


def small_network(seed: int) -> nn.Sequential:
    """64-32-32-32-10 with ReLU: 4,522 parameters for 8 x 8 digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for i in (64, 32, 32) for layer in (nn.Linear(i, 32), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(32, 10))


def measure(network: nn.Module, state_a: State, state_b: State, data: Samples, base: State) -> dict[str, float]:
    """Barrier on `data`, minus the midpoint's curvature δᵀHδ, distance, and the angle in degrees seen from `base`."""
    curve = path_loss(network, state_a, state_b, F.cross_entropy, data, alphas=ALPHAS)
    prediction = barrier_prediction(network, state_a, state_b, F.cross_entropy, data)
    geometry = fork_geometry(state_a, state_b, base)
    return {
        "barrier": barrier(curve).height,
        "midpoint curvature": 8 * prediction["midpoint"],
        "endpoint form": prediction["endpoint"],
        "distance": geometry.dist,
        "angle at init": geometry.angle_deg,
    }


def _pairs(network: nn.Module, ends: Sequence[State], data: Samples, base: State) -> list[dict[str, float]]:
    return [measure(network, ends[i], ends[j], data, base) for i in range(len(ends)) for j in range(i)]


def _median(rows: list[dict[str, float]], key: str) -> float:
    return float(torch.tensor([row[key] for row in rows]).median())


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 where one side does not vary."""
    from scipy.stats import spearmanr

    value = float(spearmanr(a, b).statistic) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0
    return 0.0 if math.isnan(value) else value


def _late(figures: Figures) -> float:
    return max(figures[arm]["barrier"] for arm in ("fork at 8", "fork at 16"))


Rows = dict[str, list[dict[str, float]]]
"""What was measured of every pair, by arm."""


def measured_pairs(lab: Lab) -> Rows:
    """Digits: three copies at each of six forks, three independent runs, and these again with their hidden units matched."""
    train, _ = digits(train=1200, seed=lab.seed)
    assert train.label is not None
    x = train.x.flatten(1)
    data, after = ((x - x.mean()) / x.std(), train.label), lab.steps(AFTER)
    network, orders = small_network(lab.seed), lab.generator
    first, at = _snapshot(network), {k: lab.steps(k) if k else 0 for k in FORKS}
    runs = spawn(network, data, at=list(at.values()), epochs=after, copies=COPIES, generator=orders)
    rows = {f"fork at {k}": _pairs(network, runs[at[k]].ends, data, first) for k in FORKS}
    strangers = [small_network(1000 * (i + 1) + lab.seed) for i in range(COPIES)]
    ends = [spawn(s, data, at=(0,), epochs=after, copies=1, generator=orders)[0].ends[0] for s in strangers]
    matched = [ends[0], *(match_permutation(network, ends[0], end) for end in ends[1:])]
    rows["independent"], rows["independent, matched"] = (_pairs(network, some, data, first) for some in (ends, matched))
    return rows


def _medians(rows: Rows) -> Figures:
    figures = {arm: {key: _median(pairs, key) for key in pairs[0]} for arm, pairs in rows.items()}
    for arm in figures.values():
        arm["log10 of the barrier"] = math.log10(max(arm["barrier"], 1e-4))
    return figures


@claim(
    "Runs that part early have a barrier between them; runs that part late have none, and end nearer to each other",
    Better("log10 of the barrier", "independent", over="fork at 0", by=1.0),
    Better("barrier", "fork at 0", over="fork at 16", by=0.005),
    Holds("runs that part after 8 and 16 epochs have barriers below 0.005", lambda f: _late(f) < 5e-3),
    Better("rank trend of distance", "fork epoch", over="no trend", by=0.9, higher=False),
    Better("rank trend of angle at init", "fork epoch", over="no trend", by=0.9, higher=False),
    seeds=range(100, 105),
    note="Medians over three pairs of a network of 4,522 weights: at this size even runs that part at once may share a valley.",
)
def forks(lab: Lab) -> Figures:
    """Barrier and geometry against the epoch of the fork."""
    figures = _medians(measured_pairs(lab))
    by_fork = [figures[f"fork at {k}"] for k in FORKS]
    lab.curve("same start", FORKS, [f["barrier"] for f in by_fork], xlabel="epoch of the fork", ylabel="barrier, training loss")
    trends = {f"rank trend of {key}": rank_correlation(FORKS, [f[key] for f in by_fork]) for key in ("distance", "angle at init")}
    return {**figures, "fork epoch": trends, "no trend": dict.fromkeys(trends, 0.0)}


@claim(
    "Curvature half-way between two networks ranks the barriers between them",
    Better("rank correlation", "midpoint curvature", over="chance", by=0.7),
    seeds=range(100, 105),
    note="Most forked pairs have barriers near 0, in an order of chance, and curvature at one point is not its mean on the line. "
    "For independent runs, whose barriers are high, it has the right sign and is large.",
)
def curvature(lab: Lab) -> Figures:
    """Spearman correlation with the barrier over all forked and independent pairs, of three predictors."""
    rows = measured_pairs(lab)
    pairs = [row for arm, some in rows.items() if arm != "independent, matched" for row in some]
    barriers = [row["barrier"] for row in pairs]
    predictors = ("midpoint curvature", "endpoint form", "distance")
    found = {key: {"rank correlation": rank_correlation([row[key] for row in pairs], barriers)} for key in predictors}
    return {**found, "chance": {"rank correlation": 0.0}}


# The ridge: L(u, v) = ¼ (u² − κ(v))² + ½ (v − v*)², κ(v) = max(0, v). Descending in v, one valley (u = 0) becomes two (u = ±√v).


def ridge_loss(u: Tensor, v: Tensor, goal: float = 1.0) -> Tensor:
    """The height of the landscape at (u, v), of any one shape; `goal` is v*, where both valleys are deepest."""
    return (u.square() - v.clamp_min(0)).square() / 4 + (v - goal).square() / 2


def ridge_barrier(a: Tensor, b: Tensor, alphas: int = 101) -> Tensor:
    """Barriers between points `[..., 2]` of the landscape, `[...]`: κ² / 4 between the two valleys at equal v = κ."""
    t = torch.linspace(0, 1, alphas, dtype=a.dtype).view(-1, *[1] * a.dim())
    points = torch.lerp(a, b, t)
    heights = ridge_loss(points[..., 0], points[..., 1])
    chord = torch.lerp(heights[0], heights[-1], t[..., 0])
    return (heights - chord).amax(0)


def ridge_run(
    start: Tensor, steps: int, lr: float = 0.05, noise: float = 0.02, generator: torch.Generator | None = None
) -> Tensor:
    """Noisy gradient descent from points `[..., 2]`, all at once; the noise is Gaussian, in u only, and fades over the run."""
    with torch.no_grad():
        for step in range(steps):
            u, v = start.unbind(-1)
            gap = u.square() - v.clamp_min(0)
            slope = torch.stack([u * gap, v - 1 - gap / 2 * (v > 0)], -1)
            kick = torch.randn(u.shape, dtype=u.dtype, generator=generator) * noise * (1 - step / steps)
            start = start - lr * slope + torch.stack([kick, torch.zeros_like(kick)], -1)
    return start


@claim(
    "Where a slope splits in two, pairs that part before the split are divided by a ridge, later pairs are not",
    Better("share with a barrier", "fork at 0", over="fork at 200", by=0.3),
    Holds("pairs that part on one side have no barrier", lambda f: all(a["on one side"] == 0 for a in f.values())),
    Holds("a barrier has the height kappa^2 / 4 (1 %)", lambda f: abs(f["fork at 0"]["height"] - 0.25) < 0.0025),
    seeds=range(100, 105),
    note="The landscape is ours: the paper's own toy could not be verified.",
)
def ridge(lab: Lab) -> Figures:
    """500 pairs a fork, on the landscape of two valleys; the share with a barrier, and that of pairs clear of it."""
    generator, pairs, figures = lab.generator, lab.steps(500), {}
    for fork in (0, 25, 50, 100, 200):
        begin = torch.tensor([0.0, -1.0], dtype=torch.float64).expand(pairs, 2)
        trunk = ridge_run(begin, fork, generator=generator)
        a, b = (ridge_run(trunk, 300, generator=generator) for _ in range(2))
        rise = ridge_barrier(a, b)
        divided = rise > 0.125
        height = float(rise[divided].mean()) if divided.any() else 0.0
        decided = trunk[:, 0].abs() > 0.5  # clear of the ridge u = 0 when they part
        figures[f"fork at {fork}"] = {
            "share with a barrier": float(divided.double().mean()),
            "on one side": float((divided & decided).double().mean()),
            "height": height,
        }
    shares = [f["share with a barrier"] for f in figures.values()]
    lab.curve("ridge", (0, 25, 50, 100, 200), shares, xlabel="step of the fork", ylabel="share of pairs with a barrier")
    return figures
