"""When do networks overfit, and how does width protect? Learning curves in closed form (Advani, Saxe, Sompolinsky, 2017 and
Neural Networks 132, 2020).

The formulas are `sfumato.probes.generalization_error` and its neighbours, the data `sfumato.data.linear_teacher`. This page holds
random features of a ReLU layer (`random_features`) and what the paper claims: errors follow the theory, with a peak where
parameters equal samples, and stopping early is nearly as good as ridge (`linear`); the same peak over the width of a ReLU layer,
and very wide layers are safe (`width`).

>>> import torch
>>> from sfumato.papers.dynamics.high_dimensional_dynamics import random_features
>>> random_features(torch.randn(7, 30), 100, generator=torch.Generator().manual_seed(0)).shape
torch.Size([7, 100])
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.linear_regression import LinearTeacher, linear_teacher
from sfumato.probes.linear_dynamics import exact_gradient_flow, feature_spectrum, final_error

DIMS, SNR, DRAWS = 200, 4.0, 100
ALPHAS = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)
"""Samples per parameter."""


def ridge(task: LinearTeacher, strength: float) -> Tensor:
    """Weights `[N]` that minimise ‖y − Xw‖² + strength ‖w‖²."""
    x, y, _ = task
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return x.T @ torch.linalg.solve(x @ x.T + strength * eye, y)


TIMES = torch.logspace(-2, 5, 120, dtype=torch.float64)


def learning_curves(alpha: float, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Errors on new samples, noise included, of `draws` teachers: over time from zero and from large first weights, and of ridge.

    Returns:
        "zero" and "large" `[draws, times]`, "ridge" `[draws]`.
    """
    curves: dict[str, list[Tensor]] = {"zero": [], "large": [], "ridge": []}
    for _ in range(draws):
        task = linear_teacher(DIMS, round(alpha * DIMS), snr=SNR, generator=generator)
        large = SNR**0.5 * torch.randn(DIMS, dtype=torch.float64, generator=generator)
        for arm, first in (("zero", torch.zeros_like(large)), ("large", large)):
            curves[arm].append(_error(exact_gradient_flow(task.x, task.y, first, TIMES), task))
        curves["ridge"].append(_error(ridge(task, 1 / SNR), task))
    return {arm: torch.stack(found) for arm, found in curves.items()}


def _error(weights: Tensor, task: LinearTeacher) -> Tensor:
    return 1 + (weights - task.weight).square().mean(-1)


def _arm(alpha: float) -> str:
    return f"alpha {alpha:g}"


def _final(figures: Figures, alpha: float) -> float:
    return figures[_arm(alpha)]["final error, median"]


@claim(
    "Errors of linear networks follow the theory, with a peak where parameters equal samples; stopping in time is nearly as good "
    "as the best ridge; large first weights hurt only where samples are fewer than parameters",
    Holds("final errors within 10 % of the theory away from alpha = 1", lambda f: _off(f, "") < 0.1),
    Holds("so are those from large first weights", lambda f: _off(f, ", large first weights") < 0.1),
    Holds(
        "the peak at alpha = 1 is at least 5 times the errors at 0.5 and 2",
        lambda f: _final(f, 1.0) >= 5 * max(_final(f, 0.5), _final(f, 2.0)),
    ),
    Holds("stopping in time is within 3 % of the best ridge", lambda f: max(_stopping(f)) < 0.03),
    Better("final error", "alpha 0.5", over="large first weights, alpha 0.5", by=1.0, higher=False),
    Holds("beyond alpha = 1 first weights are forgotten (0.1 %)", lambda f: _forgotten(f) < 1e-3),
    seeds=range(100, 105),
    note="200 inputs, an SNR of 4, means over 100 teachers; the peak is a median, as errors scatter wildly there. "
    "Training is solved exactly up to time 1e5. The time to stop is the best one of the mean curve.",
)
def linear(lab: Lab) -> Figures:
    """Seven loads, from fewer samples than parameters to many more; first weights zero, or as large as the teacher's."""
    generator, draws = lab.generator, lab.steps(DRAWS)
    figures: Figures = {}
    for alpha in ALPHAS:
        found = learning_curves(alpha, draws, generator)
        zero, large = found["zero"].mean(0), found["large"].mean(0)
        figures[_arm(alpha)] = arm = {
            "final error": float(zero[-1]),
            "final error, median": float(found["zero"][:, -1].median()),
            "final error, large first weights": float(large[-1]),
            "stopped in time": float(zero.min()),
            "best ridge": float(found["ridge"].mean()),
        }
        if alpha != 1:  # where it is infinite
            arm["theory"] = float(final_error(alpha, snr=SNR))
            arm["theory, large first weights"] = float(final_error(alpha, snr=SNR, inr=SNR))
        if alpha in (0.5, 1.0, 2.0):
            lab.curve(_arm(alpha), TIMES.log10().tolist(), zero.tolist(), xlabel="log10 of time", ylabel="error on new samples")
    half = figures[_arm(0.5)]["final error, large first weights"]
    return {**figures, "large first weights, alpha 0.5": {"final error": half}}


def _off(f: Figures, start: str) -> float:
    arms = [f[_arm(alpha)] for alpha in ALPHAS if alpha != 1]
    return max(abs(arm["final error" + start] / arm["theory" + start] - 1) for arm in arms)


def _stopping(f: Figures) -> list[float]:
    return [f[_arm(alpha)]["stopped in time"] / f[_arm(alpha)]["best ridge"] - 1 for alpha in ALPHAS]


def _forgotten(f: Figures) -> float:
    arms = [f[_arm(alpha)] for alpha in ALPHAS if alpha > 1]
    return max(abs(arm["final error, large first weights"] / arm["final error"] - 1) for arm in arms)


# A ReLU layer with random weights, of which only the layer after it learns.

INPUTS, SAMPLES, TESTS, WIDTHS, NETWORKS = 30, 200, 2000, (10, 50, 100, 150, 200, 300, 500, 1000, 3000), 20
LATE = torch.logspace(-2, 7, 120, dtype=torch.float64)


def random_features(x: Tensor, width: int, *, generator: torch.Generator | None = None) -> Tensor:
    """ReLU units with random weights: `[P, D]` to `[P, width]`, scaled by 1 / √width so that width does not change time."""
    weights = torch.randn(x.shape[1], width, dtype=x.dtype, generator=generator) / x.shape[1] ** 0.5
    return (x @ weights).relu() / width**0.5


def relu_task(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher of 30 ReLU units on Gaussian inputs: inputs of 200 training and 2000 test samples, noisy labels of the training
    samples at an SNR of 1, and the teacher's answers to the test samples, of mean 0 and variance 1."""
    x = torch.randn(SAMPLES + TESTS, INPUTS, dtype=torch.float64, generator=generator)
    units = random_features(x, INPUTS, generator=generator)
    answers = units @ torch.randn(INPUTS, dtype=torch.float64, generator=generator)
    answers = (answers - answers.mean()) / answers.std()
    noise = torch.randn(SAMPLES, dtype=torch.float64, generator=generator)
    return x, answers[:SAMPLES] + noise, answers[SAMPLES:]


def width_curves(generator: torch.Generator) -> dict[int, tuple[Tensor, float]]:
    """For one task, by width: errors over time against the teacher, in units of its variance; the least eigenvalue above 0."""
    x, labels, answers = relu_task(generator)
    found = {}
    for width in WIDTHS:
        features = random_features(x, width, generator=generator)
        train, test = features.split([SAMPLES, TESTS])
        weights = exact_gradient_flow(train, labels, train.new_zeros(width), LATE)
        found[width] = (weights @ test.T - answers).square().mean(-1), feature_spectrum(train).smallest
    return found


def _width(width: int) -> str:
    return f"width {width}"


@claim(
    "Trained to the end, random ReLU features do worst where their number equals that of the samples; the widest layer is safe, "
    "and with early stopping it is the best",
    Holds(
        "the peak at width 200 is at least 50 times the errors at widths 10 and 3000",
        lambda f: f["width 200"]["final error"] >= 50 * max(f["width 10"]["final error"], f["width 3000"]["final error"]),
    ),
    Better("final error over that of the best narrow layer", "width 3000", over="a tenth worse", higher=False),
    Better("stopped in time", "width 3000", over="best other width", higher=False),
    Holds(
        "the least eigenvalue is smallest at width 200",
        lambda f: min(f, key=lambda arm: f[arm].get("least eigenvalue", float("inf"))) == "width 200",
    ),
    seeds=range(100, 105),
    note="200 samples of 30 numbers, a teacher of 30 ReLU units, an SNR of 1; errors against the teacher without noise, in units "
    "of its variance, over 20 networks: means with early stopping, medians without. Training starts from zero and is solved "
    "exactly up to time 1e7. The time to stop is the best one for each width.",
)
def width(lab: Lab) -> Figures:
    """Nine widths: error at the end, error at the best time, and the least eigenvalue above 0."""
    generator = lab.generator
    runs = [width_curves(generator) for _ in range(lab.steps(NETWORKS))]
    figures: Figures = {}
    for width in WIDTHS:
        errors, least = zip(*(run[width] for run in runs), strict=True)
        figures[_width(width)] = {
            "final error": float(torch.stack([e[-1] for e in errors]).median()),
            "stopped in time": float(torch.stack([e.min() for e in errors]).mean()),
            "least eigenvalue": float(torch.tensor(least).median()),
        }
    for metric in ("final error", "stopped in time"):
        values = [figures[_width(width)][metric] for width in WIDTHS]
        logs = [torch.tensor(numbers).log10().tolist() for numbers in (WIDTHS, values)]
        lab.curve(metric, *logs, xlabel="log10 of the width", ylabel="log10 of the error")
    widest, ratio = figures[_width(WIDTHS[-1])], "final error over that of the best narrow layer"
    widest[ratio] = widest["final error"] / min(figures[_width(width)]["final error"] for width in WIDTHS if width < SAMPLES)
    best = min(figures[_width(width)]["stopped in time"] for width in WIDTHS[:-1])
    return {**figures, "a tenth worse": {ratio: 1.1}, "best other width": {"stopped in time": best}}
