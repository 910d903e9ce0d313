"""M-FAC: inverse Fisher products from m gradients, to prune with and to train with (Frantar, Kurtic, Alistarh, NeurIPS 2021).

    F = λI + (1/m) Σ gᵢ gᵢᵀ,    F⁻¹x = ( x − Gᵀ (mλI + GGᵀ)⁻¹ G x ) / λ

The products are `sfumato.optim.StaticInverseFisher` and `SlidingInverseFisher`, the optimizer is `sfumato.optim.MFAC`, the pruner
`sfumato.sparsity.MFACPruner`; the optimizer trains through `classifier`. This page holds what the paper claims, at small scale:
that pruning with correlations between weights loses less (`pruning`), that the products are exact (`exact`), and how the
optimizer compares (`accuracy`).

>>> from sfumato.papers.optimization.m_fac import small_classifier
>>> sum(p.numel() for p in small_classifier(seed=0).parameters() if p.ndim > 1)
3560
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.samples import digits
from sfumato.optim.inverse_fisher import SlidingInverseFisher, Solver, StaticInverseFisher
from sfumato.papers.optimization.classifier import Classifier, Network
from sfumato.sparsity.obs import MFACPruner, obs_prune

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of all weights that are removed at once, without training afterwards."""

NGRADS, BATCH, RECOMPUTATIONS = 256, 8, 8
"""Gradients of a Fisher matrix, samples a gradient, times it is made anew on the way to a sparsity."""

WAYS: dict[str, int | None] = {"magnitude": 0, "diagonal fisher": 1, "m-fac": None}
"""Width of the blocks of F: none at all; its diagonal, which corrects no weight for the loss of another; the whole."""


def small_classifier(seed: int, **over: Any) -> Classifier:
    """A classifier of 8 x 8 digits, 64-40-20-10 with ReLU, from this seed's weights; Adam at rate 0.01, 30 epochs of 1200."""
    usual: dict[str, Any] = {
        "model": "mlp", "channels": 1, "classes": 10, "image_size": 8, "mean": 0.0, "std": 1.0, "optimizer": "adam", "lr": 1e-2,
        "schedule": "constant", "warmup": 0.0, "batch_size": 64, "steps": 570,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = Classifier(Classifier.Config.small(**{**usual, **over}))
        layers = nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU()
        method.network = Network(nn.Sequential(nn.Flatten(), *layers), 20, 10)
    return method


def prune_by_magnitude(network: nn.Module, to_sparsity: float) -> None:
    """Set the smallest weights of all matrices together to zero."""
    from torch.nn.utils import prune

    layers = [(m, "weight") for m in network.modules() if isinstance(m, nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=to_sparsity)
    for layer, name in layers:
        prune.remove(layer, name)


def pruned_accuracy(lab: Lab) -> dict[str, dict[float, float]]:
    """Test accuracy on 597 digits, by way of pruning and sparsity; sparsity 0 is the network as trained."""
    train, test = digits(train=1200, seed=lab.seed)
    dense: Classifier = lab.fit(small_classifier(lab.seed), train, steps=lab.steps(570))
    assert train.label is not None
    samples = dense.prepare(train.x), train.label
    settings: dict[str, Any] = {"ngrads": NGRADS, "batch": BATCH, "recomputations": lab.steps(RECOMPUTATIONS)}
    found: dict[str, dict[float, float]] = {}
    for way, block in WAYS.items():
        found[way] = {0.0: dense.evaluate([test])["accuracy"]}
        for sparsity in SPARSITIES:
            method = copy.deepcopy(dense)
            if block == 0:
                prune_by_magnitude(method.network, sparsity)
            else:
                pruner = MFACPruner(
                    method.network, None, F.cross_entropy, samples, block=block, generator=lab.generator, **settings
                )
                pruner.step(sparsity)
            found[way][sparsity] = method.evaluate([test])["accuracy"]
    return found


@claim(
    "With 80 % of all weights removed at once M-FAC keeps more accuracy than magnitude or a diagonal Fisher matrix",
    Better("accuracy at 80 %", "m-fac", over="magnitude", by=0.10),
    Better("accuracy at 80 %", "m-fac", over="diagonal fisher", by=0.03),
    Better("lost at 80 %", "m-fac", over="four points", higher=False),
    seeds=range(100, 105),
    note="A network of 3560 weights for 8 x 8 digits, not trained again after pruning. The diagonal Fisher matrix has the same "
    "damping, gradients and recomputations.",
)
def pruning(lab: Lab) -> Figures:
    """Accuracy against sparsity for three ways to choose, and correct, what is pruned."""
    found = pruned_accuracy(lab)
    for name, points in found.items():
        lab.curve(name, list(points), list(points.values()), xlabel="share of weights removed", ylabel="test accuracy")
    figures: Figures = {
        name: {"accuracy at 80 %": points[0.8], "accuracy at 90 %": points[0.9]} for name, points in found.items()
    }
    figures["m-fac"]["lost at 80 %"] = found["m-fac"][0.0] - found["m-fac"][0.8]
    figures["four points"] = {"lost at 80 %": 0.04}
    return figures


def worst(ours: Tensor, dense: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((ours - dense).abs().max() / dense.abs().max())


def step_seconds(d: int, m: int = 64, repeats: int = 5) -> float:
    """The median time of `SlidingInverseFisher.update_mul` with a full window, in seconds."""
    window = SlidingInverseFisher(m, d, damp=1e-5)
    window.grads.normal_()
    window.refresh(m)
    g, seconds = torch.randn(d), []
    for _ in range(repeats):
        start = time.perf_counter()
        window.update_mul(g)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@claim(
    "Products with the inverse Fisher matrix are exact, though no d x d matrix is ever held",
    Holds("static products, diagonal and entries equal the dense inverse (1e-8)", lambda f: f["static"]["worst"] < 1e-8),
    Holds("so do blocks (1e-8)", lambda f: f["blocks"]["worst"] < 1e-8),
    Holds("so does a sliding window, half full and refilled, with either solver (1e-8)", lambda f: f["sliding"]["worst"] < 1e-8),
    Holds("the order of gradients does not matter (1e-8)", lambda f: f["static"]["change by order"] < 1e-8),
    Holds("a pruned weight costs w² / (2 [F⁻¹]ᵢᵢ) (1e-8)", lambda f: f["pruned"]["worst"] < 1e-8),
    seeds=range(100, 105),
    note="500 weights, 64 gradients, float64. The curve is the time of one step of the window as it was on this machine; no "
    "condition rests on it.",
)
def exact(lab: Lab) -> Figures:
    """Differences from dense inverses, and how time grows with the number of weights."""
    d, m, damp, generator = 500, 64, 1e-3, lab.generator
    grads = torch.randn(2 * m, d, dtype=torch.float64, generator=generator)
    x = torch.randn(d, dtype=torch.float64, generator=generator)
    fisher = damp * torch.eye(d, dtype=torch.float64) + grads[m:].T @ grads[m:] / m
    dense = torch.linalg.inv(fisher)
    static = StaticInverseFisher(grads[m:], damp=damp)
    rows, columns = (torch.randint(d, (1000,), generator=generator) for _ in range(2))
    pairs = (static.mul(x), dense @ x), (static.diag(), dense.diag()), (static.entry(rows, columns), dense[rows, columns])
    shuffled = StaticInverseFisher(grads[m:][torch.randperm(m, generator=generator)], damp=damp)
    place = torch.arange(d) // 50
    blocks = torch.linalg.inv(fisher * (place[:, None] == place))
    ours = StaticInverseFisher(grads[m:], damp=damp, block=50)
    sliding = []
    solvers: tuple[Solver, ...] = ("woodbury", "sequential")
    for solver in solvers:
        window = SlidingInverseFisher(m, d, damp=damp, solver=solver, dtype=torch.float64)
        updates = [window.update_mul(g) for g in grads]
        sliding += [worst(updates[-1], dense @ grads[-1]), worst(window.mul(x), dense @ x)]
        half = grads[: m // 2]
        early = torch.linalg.solve(damp * torch.eye(d, dtype=torch.float64) + half.T @ half / m, half[-1])
        sliding.append(worst(updates[m // 2 - 1], early))
    change = obs_prune(x, static, 1)[0] - x
    saliency = (x.square() / (2 * dense.diag())).min()
    sizes = [10_000, 30_000, 100_000, 300_000, 1_000_000][: lab.steps(5)]
    seconds = [step_seconds(size) for size in sizes]
    lab.curve("a step of the window", sizes, seconds, xlabel="weights", ylabel="seconds, 64 gradients")
    return {
        "static": {"worst": max(worst(*pair) for pair in pairs), "change by order": worst(shuffled.mul(x), static.mul(x))},
        "blocks": {"worst": max(worst(ours.mul(x), blocks @ x), worst(ours.diag(), blocks.diag()))},
        "sliding": {"worst": max(sliding)},
        "pruned": {"worst": worst(change @ fisher @ change / 2, saliency)},
    }


GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": {"lr": (0.03, 0.1, 0.3), "momentum": (0.8, 0.9, 0.95)},
    "adam": {"lr": (3e-3, 1e-2, 3e-2), "eps": (1e-8, 1e-3, 1e-2)},
    "mfac": {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "damp": (1e-5, 1e-3, 1e-2)},
}
"""Settings that were tried, with seeds 0 to 4; the verdict uses other seeds."""

BEST: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.1, "momentum": 0.8},
    "adam": {"lr": 1e-2, "eps": 1e-3},
    "mfac": {"lr": 1e-2, "damp": 1e-2, "ngrads": 128},
}
"""The best of each grid: mean accuracies .9814, .9837 and .9907."""


def recipe(optimizer: str, lr: float, **settings: float) -> Classifier.Config:
    """Two convolutions on digits: 12 epochs, rate times 0.1 at one half and three quarters, decay 5e-4 in the gradient."""
    return Classifier.Config.small(
        channels=1, classes=10, image_size=8, optimizer=optimizer, lr=lr, weight_decay=5e-4, schedule="step", warmup=0.0,
        batch_size=64, steps=180, optimizer_settings=settings,
    )  # fmt: skip


def digits_accuracy(lab: Lab, optimizer: str, lr: float, **settings: float) -> float:
    """Test accuracy on 797 digits after training on 1000, from the weights and in the order of this seed."""
    train, test = digits(train=1000, seed=lab.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lab.seed)  # the same first weights for every optimizer
        method = Classifier(recipe(optimizer, lr, **settings))
    trained: Classifier = lab.fit(method, train, steps=lab.steps(180))
    return trained.evaluate([test])["accuracy"]


@claim(
    "M-FAC classifies digits better than SGD and Adam after equally many steps, each with its best settings",
    Better("accuracy", "mfac", over="sgd"),
    Better("accuracy", "mfac", over="adam"),
    seeds=range(100, 105),
    note="180 steps, a window of 128 gradients. The damping decides: with the paper's 1e-5 the best mean accuracy on the "
    "development seeds was .9774, below both others; it was tuned here as Adam's eps and SGD's momentum were. The margins are "
    "zero: the paper's tables are not in our source.",
)
def accuracy(lab: Lab) -> Figures:
    """All three optimizers on digits."""
    return {name: {"accuracy": digits_accuracy(lab, name, **settings)} for name, settings in BEST.items()}
