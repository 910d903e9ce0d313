"""AdaHessian: does curvature in Adam's denominator help? (Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, AAAI 2021.)

θ ← θ − lr·( m̂ / (√v̂)ᵏ + wd·θ ), v the running mean of the squared, block-averaged Hessian diagonal, which one random sign vector
a step estimates: z ⊙ Hz. The optimizer is `sfumato.optim.AdaHessian`; it trains through `classifier`. This page holds what the
paper claims, at small scale: the accuracy (`accuracy`), and two properties that are exact (`scaling`).

>>> from sfumato.papers.optimization.adahessian import scaling_curves
>>> curves = scaling_curves()
>>> curves["AdaHessian"][-1] < 1e-14 < 1e-7 < curves["AdamW"][-1]
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.samples import digits
from sfumato.optim.adahessian import AdaHessian
from sfumato.papers.optimization.classifier import Classifier

GRID = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adam": (1e-3, 3e-3, 1e-2, 3e-2),
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "adahessian": (0.05, 0.15, 0.4, 1.0),
}
"""Learning rates that were tried, with seeds 0 to 4; the verdict uses other seeds."""

BEST_LR = {"sgd": 0.1, "adam": 0.01, "adamw": 0.01, "adahessian": 0.15}
"""The best of each row of `GRID`: mean accuracies .9809, .9834, .9834 and .9802."""


def recipe(optimizer: str, lr: float) -> Classifier.Config:
    """The paper's CIFAR recipe shrunk to digits: 12 epochs, rate times 0.1 at one half and three quarters, decay 5e-4.

    As in the official script the decay is divided by the learning rate where it is decoupled.
    """
    decay = 5e-4 / lr if optimizer in ("adamw", "adahessian") else 5e-4
    return Classifier.Config.small(
        channels=1, classes=10, image_size=8, optimizer=optimizer, lr=lr, weight_decay=decay, schedule="step", warmup=0.0,
        batch_size=64, steps=180,
    )  # fmt: skip


def digits_accuracy(lab: Lab, optimizer: str, lr: float) -> float:
    """Test accuracy on 797 digits after training on 1000, from the weights and in the order of this seed."""
    train, test = digits(train=1000, seed=lab.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lab.seed)  # the same first weights for every optimizer
        method = Classifier(recipe(optimizer, lr))
    trained: Classifier = lab.fit(method, train, steps=lab.steps(180))
    return trained.evaluate([test])["accuracy"]


@claim(
    "AdaHessian classifies digits better than Adam after equally many steps, each at its best learning rate",
    Better("accuracy", "adahessian", over="adam", by=0.003),
    seeds=range(100, 105),
    note="180 steps of a tiny network are few for a running mean of one-sample curvature estimates; the paper trains for 160 "
    "epochs. The optimizer equals the official class to 1e-10, so this is about the scale, not the code.",
)
def accuracy(lab: Lab) -> Figures:
    """All optimizers of the paper's comparison on digits."""
    return {name: {"accuracy": digits_accuracy(lab, name, lr)} for name, lr in BEST_LR.items()}


# The exact properties: L(θ) = ½ Σ aᵢ (sᵢ θᵢ)², a from 1 to a million, started where every sᵢ θᵢ = 1.

CURVATURE = torch.logspace(0, 6, 13, dtype=torch.float64)
Maker = Callable[[list[nn.Parameter]], Optimizer]


def loss_curve(make: Maker, steps: int, scale: Tensor | None = None) -> Tensor:
    """Relative loss before each of `steps` steps and after the last, `[steps + 1]`, on the badly scaled quadratic.

    Args:
        make: builds the optimizer from the parameters.
        steps: how many.
        scale: s in θ = θ′ / s, `[13]`; None: ones.
    """
    s = torch.ones_like(CURVATURE) if scale is None else scale
    theta = nn.Parameter(1 / s)
    optimizer = make([theta])

    def loss() -> Tensor:
        return (CURVATURE * (s * theta).square()).sum() / 2

    def closure() -> Tensor:
        theta.grad = CURVATURE * s.square() * theta.detach()
        return loss()

    first_order = not isinstance(optimizer, AdaHessian)
    values = [optimizer.step(closure if first_order else loss) for _ in range(steps)]  # type: ignore[arg-type]
    curve = torch.stack([*values, loss()]).detach()  # type: ignore[list-item]
    return curve / curve[0]


def random_scales(generator: torch.Generator | None = None) -> Tensor:
    """Thirteen factors, log-uniform from 0.01 to 100."""
    return 10 ** (torch.rand(13, dtype=torch.float64, generator=generator) * 4 - 2)


def best_adam(steps: int, scale: Tensor | None = None, kind: Callable[..., Optimizer] = Adam) -> Tensor:
    """The curve of Adam (or AdamW) at the one of three learning rates that ends lowest."""
    curves = [loss_curve(partial(kind, lr=lr), steps, scale) for lr in (0.01, 0.03, 0.1)]
    return min(curves, key=lambda curve: float(curve[-1]))


def scaling_curves(steps: int = 300) -> dict[str, list[float]]:
    """Relative loss, step by step, of AdamW (at its best rate of three) and of AdaHessian when parameters have unlike scales.

    Half a second on one core.
    """
    scale = random_scales(torch.Generator().manual_seed(0))
    adahessian = loss_curve(partial(AdaHessian, eps=0.0), steps, scale)
    return {"AdamW": best_adam(steps, scale, AdamW).tolist(), "AdaHessian": adahessian.tolist()}


@claim(
    "On a quadratic with curvatures from 1 to a million AdaHessian converges in hundreds of steps, however parameters are scaled",
    Holds("AdaHessian stays below 1e-8 of the first loss from step 163 on", lambda f: f["adahessian"]["worst after 163"] < 1e-8),
    Holds("AdaHessian is below 1e-14 after 300 steps", lambda f: f["adahessian"]["after 300"] < 1e-14),
    Holds("gradient descent, with and without momentum, is above 1e-7 after 10 000", lambda f: _lowest(f, "sgd") > 1e-7),
    Holds("rescaled parameters leave AdaHessian's curve as it was (1e-10)", lambda f: f["adahessian"]["change"] < 1e-10),
    Better("log10 of the rescaled loss", "adahessian", over="adam", by=3, higher=False),
    seeds=range(100, 105),
    note="Exact only where the Hessian is diagonal and there is no weight decay: there |Hz| is the diagonal for every z.",
)
def scaling(lab: Lab) -> Figures:
    """Curves on the quadratic, and on the same one with parameters rescaled by this seed's factors."""
    scale = random_scales(lab.generator)
    newton = partial(AdaHessian, eps=0.0)
    plain, rescaled = loss_curve(newton, 300), loss_curve(newton, 300, scale)
    adam = best_adam(300, scale)
    rescaled_loss = "log10 of the rescaled loss"
    many = lab.steps(10_000)
    descent = loss_curve(partial(SGD, lr=1.9e-6), many)  # 2 / 1e6 is where it would diverge
    momentum = loss_curve(partial(SGD, lr=1.9e-6, momentum=0.9), many)
    for name, curve in {"AdaHessian": rescaled, "Adam, best rate": adam}.items():
        lab.curve(name, range(301), curve.tolist(), xlabel="step", ylabel="loss / first loss, parameters rescaled")
    return {
        "adahessian": {
            rescaled_loss: math.log10(rescaled[-1]),
            "worst after 163": float(plain[163:].max()),
            "after 300": float(plain[-1]),
            "change": float(((rescaled - plain).abs() / plain)[:101].max()),
        },
        "adam": {rescaled_loss: math.log10(adam[-1])},
        "sgd": {"plain": float(descent[-1]), "momentum": float(momentum[-1])},
    }


def _lowest(figures: Figures, arm: str) -> float:
    return min(figures[arm].values())
