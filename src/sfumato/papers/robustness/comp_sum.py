"""Comp-sum losses: what cross-entropy can hide, and training against attacks (Mao, Mohri, Zhong, ICML 2023).

    errors(h) − least errors ≤ Γ_τ( loss_τ(h) − least loss_τ ),     adversarial:  ℓ_τ(h(x), y) + ν sup ‖Δ̄(x′) − Δ̄(x)‖₂

The losses are `sfumato.losses.comp_sum` and `smooth_adversarial_comp_sum`, the attack is `sfumato.attacks.pgd`; they train
through `classifier`. This page holds what the paper claims, at small scale: the bound, which is exact (`bounds`); that mean
absolute error suffers from many classes (`many_classes`); and accuracy under attack against TRADES (`robustness`).

>>> import torch
>>> from sfumato.papers.robustness.comp_sum import least_loss
>>> p = torch.tensor([0.7, 0.2, 0.1])
>>> [round(least_loss(p, tau=tau).item(), 3) for tau in (1.0, 2.0)]  # the entropy; the share of the rarer classes
[0.802, 0.3]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.batch import Batch
from sfumato.data.samples import digits
from sfumato.losses.comp_sum_family import comp_sum, comp_sum_bound
from sfumato.papers.optimization.classifier import Classifier

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)


def least_loss(p: Tensor, *, tau: float) -> Tensor:
    """The smallest expected comp-sum loss that any logits reach when labels have probabilities `p`.

    Reached at a softmax proportional to p^(1/(2−τ)) below τ = 2, from there on at certainty of the likeliest class.

    Args:
        p: `[..., n]`, each row sums to 1.
        tau: τ, at least 0.

    Returns:
        `[...]`.
    """
    if tau == 1:
        return torch.special.entr(p).sum(-1)
    if tau >= 2:
        return (1 - p.amax(-1)) / (tau - 1)
    power = 1 / (2 - tau)
    return ((p**power).sum(-1) ** (1 / power) - 1) / (1 - tau)


def excess_error(scores: Tensor, p: Tensor) -> Tensor:
    """Errors of the class with the largest of `scores` `[..., n]` above the least possible, `[...]`; ties count as the worst."""
    chosen = torch.where(scores == scores.amax(-1, keepdim=True), p, 1.0).amin(-1)
    return p.amax(-1) - chosen


def excess_loss(scores: Tensor, p: Tensor, *, tau: float) -> Tensor:
    """Expected comp-sum loss of logits `[N, n]` above the least possible, `[N]`."""
    return comp_sum(scores, p, tau=tau, reduction="none") - least_loss(p, tau=tau)


def hard_cases(count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random distributions over labels and logits, `[count, n]` each, float64; half of the logits are nearly the worst ones.

    Those are the best logits for cross-entropy but for a tie of the two likeliest classes: an error at the least excess.
    """
    sharpness = 4 * torch.rand(count, 1, dtype=torch.float64, generator=generator)
    p = (sharpness * torch.randn(count, n, dtype=torch.float64, generator=generator)).softmax(-1)
    scores = 2 * torch.randn(count, n, dtype=torch.float64, generator=generator)
    tied = p.log()
    two = p.topk(2).indices
    tied = tied.scatter(-1, two, tied.gather(-1, two).logsumexp(-1, keepdim=True).expand(-1, 2) - math.log(2))
    half = torch.arange(count)[:, None] < count // 2
    return p, torch.where(half, tied, scores)


@claim(
    "The excess of a comp-sum loss bounds the excess of errors, and for two classes no better bound exists",
    Holds("no distribution and no logits break a bound (1e-9)", lambda f: f["bound"]["worst violation"] < 1e-9),
    Holds("bounds are reached: two classes, a tie (1e-12)", lambda f: f["bound"]["gap at two classes"] < 1e-12),
    Holds("cases come near the bound beyond two classes, below tau = 2", lambda f: f["bound"]["share of the excess"] > 0.9),
    seeds=range(100, 105),
    note="2000 random distributions and logits of 2, 3, 5 and 10 classes for each of five losses. For tau above 1 and more than "
    "two classes the bound holds with room to spare, as n enters it.",
)
def bounds(lab: Lab) -> Figures:
    """The bound on random distributions, and where it is reached."""
    generator, count = lab.generator, lab.steps(2000)
    violation, nearest = -1.0, 0.0
    for n in (2, 3, 5, 10):
        p, scores = hard_cases(count, n, generator)
        for tau in TAUS:
            excess = excess_loss(scores, p, tau=tau)
            least = comp_sum_bound(excess_error(scores, p), tau=tau, n_classes=n)
            violation = max(violation, float((least - excess).max()))
            if n > 2 and tau <= 1:
                nearest = max(nearest, float((least / excess)[excess > 1e-6].max()))
    beta = torch.linspace(0, 1, 21, dtype=torch.float64)
    p, tie = torch.stack([1 + beta, 1 - beta], -1) / 2, torch.zeros(21, 2, dtype=torch.float64)
    gaps = [(excess_loss(tie, p, tau=tau) - comp_sum_bound(beta, tau=tau)).abs().max() for tau in TAUS]
    for tau in TAUS:
        curve = comp_sum_bound(beta, tau=tau, n_classes=10).tolist()
        lab.curve(f"tau {tau:g}", beta.tolist(), curve, xlabel="excess errors", ylabel="least excess of the loss, 10 classes")
    figures = {"worst violation": violation, "gap at two classes": float(max(gaps)), "share of the excess": nearest}
    return {"bound": figures}


# Training on digits: 64 pixels, two hidden layers of 256, 25 epochs.


def recipe(**over: Any) -> Classifier.Config:
    """SGD with Nesterov's momentum at rate 0.05 down a cosine, decay 5e-4, batches of 128, on 8 x 8 digits."""
    nesterov = {"nesterov": True}
    usual: dict[str, Any] = {
        "model": "mlp", "channels": 1, "classes": 10, "image_size": 8, "optimizer": "sgd", "lr": 0.05,
        "weight_decay": 5e-4, "warmup": 0.0, "optimizer_settings": nesterov, "batch_size": 128, "steps": 254,
    }  # fmt: skip
    return Classifier.Config.small(**{**usual, **over})


def trained(lab: Lab, data: Batch, config: Classifier.Config) -> Classifier:
    """A classifier from the first weights and in the order of this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lab.seed)  # the same first weights for every arm
        method = Classifier(config)
    fitted: Classifier = lab.fit(method, data, steps=lab.steps(config.steps))
    return fitted


def digit_accuracy(lab: Lab, tau: float, split: int) -> float:
    """Test accuracy in digits when each of the ten classes is split at random into `split` classes to be told apart."""
    train, test = digits(seed=lab.seed)
    assert train.label is not None
    assert test.label is not None
    parts = torch.randint(split, train.label.shape, generator=lab.generator)
    split_up = Batch(train.x, train.index, train.label * split + parts)
    method = trained(lab, split_up, recipe(loss="comp_sum", tau=tau, classes=10 * split))
    with torch.no_grad():
        found = method.predict(test.x).argmax(1) // split
    return float((found == test.label).float().mean())


@claim(
    "Mean absolute error (tau = 2) learns slower than cross-entropy, and the more so the more classes there are",
    Better("accuracy, 10 classes", "cross-entropy", over="mae"),
    Better("lost to cross-entropy", "40 classes", over="10 classes"),
    seeds=range(100, 105),
    note="40 classes: each digit is split at random into four classes, and finding the digit counts. The margins are zero: the "
    "paper states a direction, its figures are not in our source. tau below 1 is left out: it diverges at this learning rate.",
)
def many_classes(lab: Lab) -> Figures:
    """Accuracy after equally many steps against τ, for 10 classes and for 40."""
    arms = {"cross-entropy": 1.0, "tau 1.5": 1.5, "mae": 2.0}
    figures: Figures = {
        name: {f"accuracy, {10 * split} classes": digit_accuracy(lab, tau, split) for split in (1, 4)}
        for name, tau in arms.items()
    }
    for many in ("10 classes", "40 classes"):
        lost = figures["cross-entropy"][f"accuracy, {many}"] - figures["mae"][f"accuracy, {many}"]
        figures[many] = {"lost to cross-entropy": lost}
    return figures


EPS = 0.1
"""Radius of every attack, in pixels from 0 to 1."""

GRID = {"trades": (1.0, 3.0, 6.0), "smooth comp-sum": (0.03, 0.1, 0.3, 1.0)}
"""Weights of the attack's term that were tried, with seeds 0 to 4; the verdict uses other seeds."""

ARMS: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "pgd": {"adversarial": "pgd"},
    "trades": {"adversarial": "trades", "adversarial_weight": 3.0},
    "smooth comp-sum": {"adversarial": "smooth", "loss": "comp_sum", "adversarial_weight": 0.3, "adversarial_warmup": 0.2},
}
"""Each at the best weight of `GRID`: robust accuracy .838, .864, .839 of TRADES; .738, .793, .810, .772 of the other."""


def robust_figures(lab: Lab, **over: Any) -> dict[str, float]:
    """Clean and robust accuracy on 497 digits after training on 1300; the attack is PGD on the margin, 40 steps."""
    train, test = digits(seed=lab.seed)
    method = trained(lab, train, recipe(eps=EPS, **over))
    method.config = method.config.model_copy(update={"adversarial": "pgd"})  # evaluation attacks every arm alike
    figures = method.evaluate([test])
    return {name: figures[name] for name in ("accuracy", "robust_accuracy")}


@claim(
    "Smooth adversarial comp-sum training withstands PGD better than TRADES and is no less accurate on clean digits",
    Better("robust_accuracy", "smooth comp-sum", over="trades"),
    Holds("clean accuracy is not below TRADES", lambda f: _clean_loss(f) <= 0),
    seeds=range(100, 105),
    note="A small network on 8 x 8 digits, pixels moved by at most 0.1. The paper reports gains on wide residual networks after "
    "hundreds of epochs; here TRADES and plain PGD training were ahead on the development seeds at every weight that was tried. "
    "The norm in the smooth loss is not squared: it shrinks the margins of all pictures, robust or not. Its weight and the "
    "rise over the first fifth are our choice.",
)
def robustness(lab: Lab) -> Figures:
    """Clean and robust accuracy after plain, PGD, TRADES and smooth comp-sum training on digits."""
    return {name: robust_figures(lab, **settings) for name, settings in ARMS.items()}


def _clean_loss(figures: Figures) -> float:
    return figures["trades"]["accuracy"] - figures["smooth comp-sum"]["accuracy"]
