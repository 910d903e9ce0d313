"""Projection head: why the layer below the head is the better representation, and a fixed head instead (Xue, Gan, Ni, Joshi,
Mirzasoleiman, ICLR 2024).

    weight of a feature = its strength after the layers:   input φ_i,   before the head φ_i m_i^(1/4),   after it φ_i m_i^(1/2)
    m_i = φ_i² / (φ_i² + s_i²)²,      so   before = √(input · after)

Feature i has strength φ_i, and augmentation adds noise s_i to it. A two-layer linear network that descends the spectral
contrastive loss from small weights ends there: what augmentation or a coarse label suppresses is suppressed half as much, in log
scale, below the head. The losses are `sfumato.losses.supervised_contrastive` and its neighbours, the heads
`sfumato.nn.ProjectionHead` and `sfumato.nn.ReweightingHead`. This page holds the closed form (`linear_theory`), the descent
(`descend`), and what the paper claims at small scale (`linear`, `coarse_to_fine`).

>>> import torch
>>> from sfumato.papers.representation.projection_head import linear_theory
>>> weights = linear_theory(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]))  # augmentation drowns the second feature
>>> [[round(v, 2) for v in w.tolist()] for w in (weights.before, weights.after)]
[[1.0, 0.71], [1.0, 0.5]]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.batch import Batch
from sfumato.data.samples import digits
from sfumato.losses.contrastive import supervised_contrastive
from sfumato.nn.projection_heads import ProjectionHead, ReweightingHead
from sfumato.probes.evaluation import extract_features, layer_probe


class Weights(NamedTuple):
    """Weights of features `[p]` below and above the head, and the diagonal m of (W₂W₁)ᵀ(W₂W₁)."""

    before: Tensor
    after: Tensor
    gram: Tensor


def feature_weights(weight: Tensor, directions: Tensor) -> Tensor:
    """How strongly a linear map answers to each feature: ‖W d_i‖.

    Args:
        weight: W, `[out, in]`.
        directions: `[p, in]`, a row a feature, as long as the feature is strong.

    Returns:
        `[p]`, not negative.
    """
    return torch.linalg.vector_norm(directions @ weight.T, dim=1)


def linear_theory(strength: Tensor, noise: Tensor) -> Weights:
    """Where small weights end: at the minimiser of the population loss, with balanced layers.

    Args:
        strength: φ, `[p]`, positive.
        noise: s, `[p]`, deviation of what augmentation adds to each feature.
    """
    total = strength.square() + noise.square()
    gram = strength.square() / total.square()
    return Weights(strength * gram**0.25, strength * gram.sqrt(), gram)


def population_loss(first: Tensor, second: Tensor, strength: Tensor, noise: Tensor) -> Tensor:
    """Spectral contrastive loss of z = W₂W₁x in expectation: −2 tr(A C₊) + tr(A C A C), A = (W₂W₁)ᵀ(W₂W₁).

    Args:
        first: W₁, `[width, p]`.
        second: W₂, `[out, width]`.
        strength: φ, `[p]`; C₊ = diag(φ²).
        noise: s, `[p]`; C = diag(φ² + s²).
    """
    end_to_end = second @ first
    moment = end_to_end.T @ end_to_end * (strength.square() + noise.square())
    return (moment * moment.T).sum() - 2 * (end_to_end.square() * strength.square()).sum()


def descend(
    strength: Tensor, noise: Tensor, *, width: int | None = None, steps: int = 20_000, lr: float = 0.03, std: float = 0.02,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient descent on `population_loss` from small random weights; the gradient is written out, as the matrices are tiny.

    A feature waits for about 1 / (8 φ² a²) / lr steps, a: length of the weights along its direction at the start. A square layer
    of random weights has a direction that is nearly empty, twice the width has none.

    Args:
        strength: φ, `[p]`.
        noise: s, `[p]`.
        width: of both layers; below p only so many features survive. None: 2p.
        steps: of descent.
        lr: step size.
        std: deviation of the first weights.
        generator: of those.

    Returns:
        W₁ `[width, p]` and W₂ `[width, width]`.
    """
    p = len(strength)
    width = width or 2 * p
    first, second = (std * torch.randn(width, n, dtype=strength.dtype, generator=generator) for n in (p, width))
    own, total = strength.square(), strength.square() + noise.square()
    for _ in range(steps):
        end_to_end = second @ first
        seen = end_to_end * total
        slope = 4 * (seen @ end_to_end.T @ seen - end_to_end * own)
        first, second = first - lr * second.T @ slope, second - lr * slope @ first.T
    return first, second


STRENGTH, NOISE = (2.0, 1.5, 1.2, 1.0, 1.0, 0.8), (0.3, 0.3, 1.2, 0.3, 0.6, 0.3)
DROWNED = 2
"""The feature that augmentation hides most: noise as strong as itself."""


@claim(
    "After descent from small weights a feature counts, below the head, the geometric mean of its strength and its weight above",
    Holds("the network ends where theory says (Gram matrix within 1e-3)", lambda f: f["descent"]["error of the gram"] < 1e-3),
    Holds("weights below the head as theory says, within 0.02", lambda f: f["descent"]["error before the head"] < 0.02),
    Holds("halfway in log scale between input and after, within 0.02", lambda f: f["descent"]["off halfway"] < 0.02),
    Holds("the drowned feature keeps more of its share below", lambda f: f["before"]["drowned"] > f["after"]["drowned"] + 0.02),
    seeds=range(100, 105),
    note="Six features, two linear layers, the expected spectral contrastive loss: this is arithmetic, and seeds only change the "
    "first weights. Layers are twice as wide as there are features: in square ones a feature may wait for very long.",
)
def linear(lab: Lab) -> Figures:
    """Weights of six features at the input, below the head and above it, after descent."""
    strength, noise = (torch.tensor(v, dtype=torch.float64) for v in (STRENGTH, NOISE))
    first, second = descend(strength, noise, steps=lab.steps(20_000), generator=lab.generator)
    theory, features = linear_theory(strength, noise), strength.diag()
    end_to_end = second @ first
    before, after = (feature_weights(w, features) for w in (first, end_to_end))
    figures: Figures = {
        "descent": {
            "error of the gram": float((end_to_end.T @ end_to_end - theory.gram.diag()).abs().max()),
            "error before the head": float((before - theory.before).abs().max()),
            "off halfway": float((before.log() - (strength * after).log() / 2).abs().max()),
            "imbalance of the layers": float((first @ first.T - second.T @ second).abs().max()),
        }
    }
    for name, weights in {"input": strength, "before": before, "after": after}.items():
        share = weights / weights[0]
        figures[name] = {"drowned": float(share[DROWNED]), "weakest": float(share[-1])}
        lab.curve(name, range(1, 7), share.tolist(), xlabel="feature", ylabel="weight, share of the first feature's")
    return figures


KAPPA, HIDDEN, DIM = 1.1, 256, 64
STEPS, BATCH, SIGMA = 500, 128, 0.1


def contrastive_network(head: Callable[[], nn.Module], train: Batch, steps: int, generator: torch.Generator) -> nn.Module:
    """An encoder 64-256-256-64 and a head, trained to tell apart what `train.label` does: supervised contrastive loss.

    Args:
        head: makes the module from `[B, 64]` to what the loss sees; called once, after the encoder is drawn.
        train: digits with the labels that training may see.
        steps: SGD steps at rate 0.03 with momentum 0.9, batches of 128, each sample with new noise of deviation 0.1.
        generator: of batches and noise. The first weights are torch's global ones.
    """
    assert train.label is not None
    encoder = nn.Sequential(nn.Flatten(), *ProjectionHead(DIM, HIDDEN, DIM, layers=3))
    network = nn.Sequential(OrderedDict(encoder=encoder, head=head()))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    for _ in range(steps):
        rows = torch.randperm(len(train), generator=generator)[:BATCH]
        x = train.x[rows] + SIGMA * torch.randn(train.x[rows].shape, generator=generator)
        optimizer.zero_grad()
        supervised_contrastive(network(x), train.label[rows], temperature=0.5).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def spectrum(features: Tensor, count: int = 20) -> Tensor:
    """Shares of variance of the first principal components of features `[N, D]`, `[count]`."""
    variance = torch.linalg.svdvals((features - features.mean(0)).double())[:count].square()
    return variance / variance.sum()


@claim(
    "Trained on a coarse label, the layer before the head knows more of the fine label than the layer after it, and a fixed "
    "reweighting head keeps more than no head",
    Better("fine accuracy", "MLP head, before", over="MLP head, after", by=0.03),
    Better("fine accuracy", "reweighting head, before", over="no head"),
    seeds=range(100, 105),
    note="Digits; training sees only whether a digit is 5 or more, a linear probe on standardised features then tells all ten. "
    "Standardising would undo a fixed head, so the layer after it is probed as it is. kappa is 1.1, as 64 features are few.",
)
def coarse_to_fine(lab: Lab) -> Figures:
    """Fine and coarse accuracy of linear probes before and after a learned head, a fixed head and no head."""
    fine = digits(train=1000, seed=lab.seed)
    coarse = tuple(_coarse(batch) for batch in fine)
    heads: dict[str, Callable[[], nn.Module]] = {
        "MLP head": lambda: ProjectionHead(DIM, DIM, DIM),
        "reweighting head": lambda: ReweightingHead(DIM, kappa=KAPPA),
        "no head": nn.Identity,
    }
    figures: Figures = {}
    for name, head in heads.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lab.seed)  # the encoder is drawn first: the same one for every arm
            network = contrastive_network(head, coarse[0], lab.steps(STEPS), lab.generator)
        layers = {"encoder": name} if name == "no head" else {"encoder": f"{name}, before", "head": f"{name}, after"}
        features = extract_features(network, fine[1], layers=list(layers))
        for layer, arm in layers.items():
            scaler = None if isinstance(network.get_submodule(layer), ReweightingHead) else "standard"
            figures[arm] = {
                f"{kind} accuracy": layer_probe(network, [layer], train, test=test, scaler=scaler)[layer]
                for kind, (train, test) in {"fine": fine, "coarse": coarse}.items()
            }
            shares = spectrum(features[layer]).clamp_min(1e-12).log10()
            lab.curve(arm, range(1, len(shares) + 1), shares.tolist(), xlabel="component", ylabel="log10 share of variance")
    return figures


def _coarse(batch: Batch) -> Batch:
    """The same digits, labelled by whether they are 5 or more."""
    assert batch.label is not None
    return Batch(batch.x, batch.index, (batch.label >= 5).long())
