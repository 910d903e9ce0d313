"""Neural collapse in deep linear networks: where training must end, with equal and with unequal classes (Dang, Tran, Osher,
Tran-The, Ho, Nguyen, ICML 2023).

    min  ‖W_M⋯W_1 H (+ b) − Y‖² / (2N) + ½ λ_W Σ ‖W_j‖² + ½ λ_H ‖H‖²      over all layers W_j and free features H

The measures and the closed form are `sfumato.probes.nc1` and its neighbours. This page holds the model (`UnconstrainedFeatures`),
its global minimisers as weights (`minimiser`), and what the paper claims: frames of known lengths (`frames`), classes that vanish
below a threshold (`minority`), and the same direction in a trained network (`network`).

>>> import torch
>>> from sfumato.papers.dynamics.neural_collapse import minimiser
>>> model = minimiser([6, 3], width=4, depth=2, weight_decay=1e-3, feature_decay=1e-3, generator=torch.Generator().manual_seed(0))
>>> grads = torch.autograd.grad(model.objective(1e-3, 1e-3), list(model.parameters()))
>>> max(g.abs().max().item() for g in grads) < 1e-12
True
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.samples import digits
from sfumato.probes.collapse import class_stats, gof_spectrum, nc1, nc2


class UnconstrainedFeatures(nn.Module):
    """One free feature a sample, then `depth` linear layers.

    Args:
        counts: samples of each class.
        width: of features and hidden layers, at least the number of classes.
        depth: layers, M.
        bias: whether the last layer has one (it is not decayed).
        std: deviation of all first values.
        generator: of those.
    """

    def __init__(
        self, counts: Sequence[int], width: int, depth: int = 1, *, bias: bool = False, std: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.register_buffer("labels", labels)
        shapes = [(width, width)] * (depth - 1) + [(len(counts), width)]

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(*shape, dtype=torch.float64, generator=generator))

        self.features = draw(len(labels), width)
        self.layers = nn.ParameterList([draw(*shape) for shape in shapes])
        self.bias = nn.Parameter(torch.zeros(len(counts), dtype=torch.float64)) if bias else None

    labels: Tensor

    def product(self, first: int = 0) -> Tensor:
        """All layers from `first` (0: next to the features) on as one, `[K, width]`."""
        return reduce(lambda found, layer: layer @ found, list(self.layers)[first:][1:], self.layers[first])

    def inputs(self, layer: int) -> Tensor:
        """What a layer reads of every sample, `[N, width]`."""
        return reduce(lambda h, w: h @ w.T, list(self.layers)[:layer], self.features)

    def objective(self, weight_decay: float, feature_decay: float) -> Tensor:
        """The regularised squared error, a scalar."""
        answers = self.features @ self.product().T
        answers = answers if self.bias is None else answers + self.bias
        wanted = F.one_hot(self.labels, answers.shape[1]).to(answers)
        decay = weight_decay * sum(w.square().sum() for w in self.layers) + feature_decay * self.features.square().sum()
        return (answers - wanted).square().sum() / (2 * len(answers)) + decay / 2

    def descend(self, steps: int, weight_decay: float, feature_decay: float, *, lr: float = 0.1, momentum: float = 0.9) -> Tensor:
        """Full-batch descent with momentum, in place; the last objective."""
        optimizer = torch.optim.SGD(self.parameters(), lr, momentum)
        for _ in range(steps):
            optimizer.zero_grad()
            self.objective(weight_decay, feature_decay).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self.objective(weight_decay, feature_decay).detach()


@torch.no_grad()
def minimiser(
    counts: Sequence[int], width: int, depth: int, *, weight_decay: float, feature_decay: float,
    generator: torch.Generator | None = None,
) -> UnconstrainedFeatures:  # fmt: skip
    """A global minimiser without bias, built from the closed form in a random orientation; arguments as of `gof_spectrum`."""
    model = UnconstrainedFeatures(counts, width, depth, generator=generator)
    ends = gof_spectrum(counts, depth=depth, weight_decay=weight_decay, feature_decay=feature_decay)
    turns = [torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q for _ in range(depth)]
    frames = [q[:, : len(counts)] for q in turns]
    for j, layer in enumerate(model.layers):
        left = frames[j + 1] if j + 1 < depth else torch.eye(len(counts), dtype=torch.float64)
        layer.copy_(left * ends.layer @ frames[j].T)
    model.features.copy_((frames[0] * ends.features.sqrt())[:, model.labels].T)
    return model


DECAY = 5e-4
COUNTS, WIDTH, DEPTHS, STEPS = (24, 12, 6, 6), 16, (1, 2), 6000


@claim(
    "With unequal classes and without bias, deep linear networks end in orthogonal directions whose lengths follow class size as "
    "the closed form says, not in a simplex",
    Holds("features of a class coincide (NC1 below 1e-4)", lambda f: all(d["NC1"] < 1e-4 for d in f.values())),
    Holds("distance to the general frame below 0.02", lambda f: all(d["to the general frame"] < 0.02 for d in f.values())),
    Holds("distance to equal lengths above 0.1", lambda f: all(d["to equal lengths"] > 0.1 for d in f.values())),
    Holds("distance to the simplex above 0.2", lambda f: all(d["to the simplex"] > 0.2 for d in f.values())),
    Holds("lengths within 2 % of the closed form", lambda f: all(d["error of lengths"] < 0.02 for d in f.values())),
    seeds=range(100, 105),
    note="Free features of four classes with 24, 12, 6 and 6 samples, one and two layers, from random starts.",
)
def frames(lab: Lab) -> Figures:
    """Direct optimisation of the model with one layer and with two."""
    figures: Figures = {}
    for depth in DEPTHS:
        model = UnconstrainedFeatures(COUNTS, WIDTH, depth, generator=lab.generator)
        ends = gof_spectrum(COUNTS, depth=depth, weight_decay=DECAY, feature_decay=DECAY)
        steps, points = lab.steps(STEPS), 20
        distances = []
        for _ in range(points):
            model.descend(max(1, steps // points), DECAY, DECAY)
            distances.append(float(nc2(model.product(), target=ends.classifier).detach()))
        label = f"{depth} layer{'s' * (depth > 1)}"
        at = [(i + 1) * max(1, steps // points) for i in range(points)]
        lab.curve(label, at, distances, xlabel="steps", ylabel="distance to the general frame")
        with torch.no_grad():
            weight = model.product()
            lengths = torch.linalg.vector_norm(weight, dim=1) / ends.classifier.sqrt()
            figures[label] = {
                "NC1": float(nc1(model.features, model.labels)),
                "to the general frame": distances[-1],
                "to equal lengths": float(nc2(weight, target="of")),
                "to the simplex": float(nc2(weight, target="etf")),
                "error of lengths": float((lengths - 1).abs().max()),
            }
    return figures


SMALL = (20, 10, 2)


def decay_for(ratio: float, depth: int) -> float:
    """λ_W = λ_H at which the smallest class of `SMALL` has b_k = `ratio`."""
    total = sum(SMALL)
    return float(((ratio * SMALL[-1] / (depth * total)) ** depth / total) ** (1 / (depth + 1)))


@claim(
    "Below an exact threshold a small class vanishes: its weights and features are zero where training ends, and above it they "
    "have the lengths of the closed form",
    Holds(
        "one layer, b = 0.8: lengths of weights and features within 1 % of the closed form",
        lambda f: f["kept"]["error of lengths"] < 0.01,
    ),
    Holds(
        "one layer, b = 1.2: both of the smallest class are below 1e-3 of the largest",
        lambda f: f["vanished"]["length of the smallest"] < 1e-3,
    ),
    Holds("two layers, b = 0.3: the closed form is the lower point", lambda f: f["two layers"]["advantage"] > 0),
    Holds("two layers, b = 0.3: training from beside it comes back", lambda f: f["two layers"]["objective above it"] < 1e-6),
    Holds("two layers, b = 0.55: keeping the class costs more", lambda f: f["two layers"]["advantage above"] < 0),
    seeds=range(100, 105),
    note="Classes of 20, 10 and 2 samples. With two layers and more the origin of every class is a local minimum, so small "
    "random starts lose the class also where the global minimum keeps it: these conditions compare objective values, and train "
    "from near the minimiser. The threshold for two layers and more, b = (M − 1)^((M − 1)/M) / M, is ours.",
)
def minority(lab: Lab) -> Figures:
    """The smallest of three classes around its threshold."""
    figures: Figures = {}
    for name, ratio in (("kept", 0.8), ("vanished", 1.2)):
        decay = decay_for(ratio, 1)
        model = UnconstrainedFeatures(SMALL, 8, 1, generator=lab.generator)
        model.descend(lab.steps(6000), decay, decay)
        ends = gof_spectrum(SMALL, depth=1, weight_decay=decay, feature_decay=decay)
        means = class_stats(model.features.detach(), model.labels).means
        lengths = [
            (m.norm(dim=1), end.sqrt()) for m, end in ((model.product().detach(), ends.classifier), (means, ends.features))
        ]
        figures[name] = {
            "length of the smallest": max(float(found[-1] / found.max()) for found, _ in lengths),
            "error of lengths": max(float((found - end).abs().max() / end.max()) for found, end in lengths),
        }
    figures["two layers"] = _two_layers(lab)
    return figures


def _two_layers(lab: Lab) -> dict[str, float]:
    decay = decay_for(0.3, 2)
    model = minimiser(SMALL, 8, 2, weight_decay=decay, feature_decay=decay, generator=lab.generator)
    least = float(model.objective(decay, decay).detach())
    noise = lab.generator
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, dtype=p.dtype, generator=noise))
    back = float(model.descend(lab.steps(4000), decay, decay)) - least
    return {
        "advantage": objective_of(decay, 2, keep=False) - objective_of(decay, 2, keep=True),
        "objective above it": back,
        "advantage above": objective_of(above := decay_for(0.55, 2), 2, keep=False) - objective_of(above, 2, keep=True),
    }


def objective_of(decay: float, depth: int, *, keep: bool) -> float:
    """The least objective of `SMALL` with the smallest class kept at its stationary point, or dropped: Σ n_k/(2N) g_k(x_k)."""
    total, value = sum(SMALL), 0.0
    for i, count in enumerate(SMALL):
        b = depth * total * (total * decay ** (depth + 1)) ** (1 / depth) / count
        x = torch.linspace(0, (depth / b) ** (1 / (depth + 1)), 200_001, dtype=torch.float64)
        g = 1 / (x**depth + 1) + b * x
        if i == len(SMALL) - 1:
            turning = ((depth - 1) / (depth + 1)) ** (1 / depth)
            g = g[x >= turning] if keep else g[:1]
        value += count / (2 * total) * float(g.min())
    return value


@claim(
    "In a trained network with unequal classes the last linear layers are nearer to the general orthogonal frame than to an "
    "orthogonal frame of equal lengths or to a simplex",
    Better("distance", "general frame", over="equal lengths", higher=False),
    Better("distance", "general frame", over="simplex", higher=False),
    seeds=range(100, 105),
    note="Digits, 20 to 100 a class, two hidden layers of 128, three linear layers without bias, squared errors, 3000 epochs of "
    "Adam on the whole set. Training is not at its end by then (the paper trains 12,000 epochs): a direction, not an equality.",
)
def network(lab: Lab) -> Figures:
    """Ten unequal classes of digits through a network with three linear layers at its end."""
    train, _ = digits(seed=lab.seed)
    assert train.label is not None
    counts = torch.linspace(20, 100, 10).round().long()
    rows = torch.cat([(train.label == k).nonzero()[: int(n), 0] for k, n in enumerate(counts)])
    x, y = train.x[rows].flatten(1), train.label[rows]
    total, weight_decay, feature_decay = len(rows), 1e-3, 1e-5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lab.seed)
        body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        head = nn.Sequential(*(nn.Linear(128, width, bias=False) for width in (128, 128, 10)))
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 1e-3)
    wanted = F.one_hot(y, 10).float()
    for _ in range(lab.steps(3000)):
        optimizer.zero_grad()
        features = body(x)
        decay = weight_decay * sum(w.square().sum() for w in head.parameters()) + feature_decay * features.square().sum()
        ((head(features) - wanted).square().sum() / (2 * total) + decay / 2).backward()
        optimizer.step()
    with torch.no_grad():
        first, second, third = (layer.detach() for layer in head.parameters())
        weight = third @ second @ first
        ends = gof_spectrum(counts, depth=3, weight_decay=weight_decay, feature_decay=feature_decay)
        frames_: dict[str, Tensor | str] = {"general frame": ends.classifier, "equal lengths": "of", "simplex": "etf"}
        distances = {arm: {"distance": float(nc2(weight, target=target))} for arm, target in frames_.items()}  # type: ignore[arg-type]
        accuracy = float((head(body(x)).argmax(1) == y).float().mean())
    return distances | {"training": {"NC1": float(nc1(body(x).detach(), y)), "accuracy": accuracy}}
