"""Does training compress hidden layers? Bins that adapt to the activity tell (Chelombiev, Houghton, O'Donnell, ICLR 2019).

    compression of a layer = 1 − I(X;T) at the end / the largest I(X;T) on the way

The estimators are `sfumato.probes.binned_information_bits` and its neighbours, the task is `sfumato.data.symmetric_rule_12bit`.
This page holds the narrow networks of the paper (`network`), trains many of them in one pass (`train_together`), and what the
paper claims: an L2 penalty makes layers compress (`penalty`), they compress without saturating units (`compression`), and only
the last layer's compression goes with generalisation (`last_layer`).

>>> import torch
>>> from sfumato.papers.dynamics.adaptive_information import network
>>> network("relu", generator=torch.Generator().manual_seed(0))(torch.ones(5, 12)).shape
torch.Size([5, 2])
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.claim import Better, Figures, Lab, claim
from sfumato.data.symmetric_rule import symmetric_rule_12bit
from sfumato.errors import BadSetting, nearest
from sfumato.probes.information import InformationPlane

Samples = tuple[Tensor, Tensor]


class Unit(NamedTuple):
    """An activation: its module, the scale of first weights, and the lower end of its range (None: where activity begins)."""

    module: Callable[[], nn.Module]
    scale: float
    low: float | None


class Abs(nn.Module):
    """|x|."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.abs()


UNITS = {
    "tanh": Unit(nn.Tanh, 1.0, -1.000001),
    "abs": Unit(Abs, 1.0, 0.0),
    "relu": Unit(nn.ReLU, 2.0, 0.0),
    "softplus": Unit(nn.Softplus, 2.0, 0.0),
    "elu": Unit(nn.ELU, 2.0, -1.000001),
    "prelu": Unit(lambda: nn.PReLU(init=0.0), 2.0, None),
    "swish": Unit(nn.SiLU, 2.0, None),
}

HIDDEN = (10, 7, 5, 4, 3)

DEEP = ("hidden3", "hidden4", "hidden5")
"""Layers narrow enough to lose anything; the ones before tell nearly all inputs apart."""


def network(unit: str, widths: Sequence[int] = HIDDEN, *, generator: torch.Generator | None = None) -> nn.Sequential:
    """12 inputs, hidden layers, 2 logits; layers are called `hidden1`, `hidden2`, ..., `output`.

    Weights come from a normal distribution of deviation c / √inputs, cut at two deviations, with c = 1 or 2 by the unit.

    Args:
        unit: a key of `UNITS`.
        widths: of the hidden layers.
        generator: of the weights.

    Raises:
        BadSetting: an unknown unit.
    """
    if unit not in UNITS:
        raise BadSetting(f"unit {unit!r} is not known; did you mean {' or '.join(nearest(unit, UNITS) or UNITS)}?")
    module, scale, _ = UNITS[unit]
    sizes = [12, *widths, 2]
    linears = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    for linear in linears:
        std = scale / linear.in_features**0.5
        nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        nn.init.zeros_(linear.bias)
    hidden = {f"hidden{i + 1}": nn.Sequential(linear, module()) for i, linear in enumerate(linears[:-1])}
    return nn.Sequential(OrderedDict[str, nn.Module](**hidden, output=linears[-1]))


def planes(networks: Sequence[nn.Sequential], unit: str, data: Samples) -> list[InformationPlane]:
    """One information plane for each network, with the bins of the paper, of its narrow layers; the last as probabilities."""
    names = [*DEEP, "output"]
    low = dict.fromkeys(names, UNITS[unit].low) | {"output": 0.0}
    return [InformationPlane(net, names, data, low=low, softmax=("output",)) for net in networks]


def train_together(
    networks: Sequence[nn.Sequential], data: Samples, *, at: Sequence[int], record: Callable[[int], None],
    l2: float | Tensor = 0.0, lr: float = 4e-4, batch_size: int = 256, generator: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Train networks in place, side by side in one pass; each as if it were alone.

    Adam on cross-entropy, plus ½ `l2` Σ ‖W‖² over all weight matrices but the last.

    Args:
        networks: of `network`, with the same unit and widths; they differ in their weights.
        data: inputs `[N, 12]` and labels `[N]`.
        at: epochs, from 0; the last of them ends training.
        record: called after each of these epochs, when the networks have the weights of the moment.
        l2: one penalty for all, or `[networks]`.
        lr: learning rate of Adam.
        batch_size: samples a step; the last batch of an epoch is smaller.
        generator: of the order of samples, the same for all networks.
    """
    x, y = data
    states = [dict(net.named_parameters()) for net in networks]
    stacked = {name: torch.stack([s[name].detach() for s in states]).requires_grad_() for name in states[0]}
    penalised = [w for w in stacked.values() if w.dim() == 3][:-1]
    strength = torch.as_tensor(l2, dtype=x.dtype, device=x.device).expand(len(networks))
    optimizer = torch.optim.Adam(list(stacked.values()), lr, fused=True)
    for epoch in range(max(at) + 1):
        if epoch:
            for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                optimizer.zero_grad()
                logits = _logits_of_all(networks[0], stacked, x[rows])
                error = F.cross_entropy(logits.flatten(0, 1), y[rows].repeat(len(networks))) * len(networks)
                squares = torch.stack([w.square().sum((1, 2)) for w in penalised]).sum(0)
                (error + (strength * squares).sum() / 2).backward()
                optimizer.step()
        if epoch in at:
            with torch.no_grad():
                for i, state in enumerate(states):
                    for name, parameter in state.items():
                        parameter.copy_(stacked[name][i])
            record(epoch)


def _logits_of_all(template: nn.Sequential, stacked: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits `[networks, B, 2]` of networks like `template` with parameters `[networks, ...]`."""
    h = x.expand(len(next(iter(stacked.values()))), -1, -1)
    for name, module in template.named_modules():
        if isinstance(module, nn.Linear):
            h = torch.baddbmm(stacked[f"{name}.bias"][:, None], h, stacked[f"{name}.weight"].mT)
        elif isinstance(module, nn.PReLU):
            h = h.clamp(min=0) + stacked[f"{name}.weight"][:, None] * h.clamp(max=0)
        elif not isinstance(module, nn.Sequential):
            h = module(h)
    return h


def epochs_to_record(last: int, count: int = 18) -> list[int]:
    """Epochs from 0 to `last`, about `count` of them, evenly spaced in the logarithm."""
    return sorted({0, *torch.logspace(0, 1, count - 1, base=max(last, 1)).round().long().tolist()})


class Trained(NamedTuple):
    """Networks after training: their information planes, and their test accuracies `[networks]`."""

    planes: list[InformationPlane]
    accuracy: Tensor

    def scores(self) -> dict[str, Tensor]:
        """Compression of each layer, `[networks]`."""
        every = [plane.compression_score() for plane in self.planes]
        return {name: torch.tensor([scores[name] for scores in every]) for name in every[0]}

    def learnt(self) -> Tensor:
        """Which networks learned something, `[networks]`; where all units of a layer die, nothing is left to compress."""
        return self.accuracy > 0.6

    def figures(self) -> dict[str, float]:
        """Means over the networks that learned something."""
        scores, learnt = self.scores(), self.learnt()
        found = {f"compression of layer {name[-1]}": scores[name] for name in DEEP}
        deep = torch.stack(list(found.values())).mean(0)
        found = {"compression of layers 3 to 5": deep, **found, "test accuracy": self.accuracy}
        means = {name: float(values[learnt].mean().nan_to_num(0.0)) for name, values in found.items()}
        return {**means, "share that learned": float(learnt.float().mean())}

    def draw(self, lab: Lab, arm: str, layer: str = "hidden4") -> None:
        """The course of one layer's I(X;T), the mean over networks that learned something, on the claim's page."""
        course = torch.tensor([[float(point.input) for point in plane.points[layer]] for plane in self.planes])
        epochs = [epoch + 1 for epoch in self.planes[0].epochs]
        mean = course[self.learnt()].mean(0).nan_to_num(0.0).tolist()
        lab.curve(arm, epochs, mean, xlabel="epoch + 1", ylabel=f"I(X;T) of layer {layer[-1]}, bits")


def trained(lab: Lab, unit: str, count: int, l2: Sequence[float] = (0.0,)) -> Trained:
    """`count` networks from different first weights, each with every penalty in turn, on 80 % of the task; measured on all."""
    task, generator = symmetric_rule_12bit(), lab.generator
    assert task.label is not None
    train, test = torch.randperm(len(task), generator=generator).split(round(0.8 * len(task)))
    first = [network(unit, generator=generator) for _ in range(count)]
    networks = [copy.deepcopy(net) for _ in l2 for net in first]
    seen = planes(networks, unit, (task.x, task.label))

    def record(epoch: int) -> None:
        for plane in seen:
            plane.record(epoch)

    train_together(
        networks, (task.x[train], task.label[train]), at=epochs_to_record(lab.steps(EPOCHS)), record=record,
        l2=torch.tensor(l2).repeat_interleave(count), lr=LR, generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        right = [(net(task.x[test]).argmax(1) == task.label[test]).float().mean() for net in networks]
    return Trained(seen, torch.stack(right))


EPOCHS, LR, L2, NETWORKS, RUNS = 800, 4e-4, 0.015, 4, 30


@claim(
    "An L2 penalty makes hidden layers compress more",
    Better("compression of layers 3 to 5", "relu, L2", over="relu", by=0.1),
    seeds=range(200, 205),
    note="Networks 12-10-7-5-4-3-2 on the 12-bit task, 800 epochs (the paper: 8,000); means over four first weights, the same "
    "with and without the penalty. The margin is our choice.",
)
def penalty(lab: Lab) -> Figures:
    """ReLU with and without the penalty."""
    both = trained(lab, "relu", NETWORKS, (0.0, L2))
    halves = {"relu": slice(NETWORKS), "relu, L2": slice(NETWORKS, None)}
    arms = {arm: Trained(both.planes[half], both.accuracy[half]) for arm, half in halves.items()}
    for arm, runs in arms.items():
        runs.draw(lab, arm)
    return {arm: runs.figures() for arm, runs in arms.items()}


@claim(
    "Units that do not saturate compress too, without any penalty",
    Better("compression of layer 4", "relu", over="none", by=0.1),
    seeds=range(200, 205),
    note="The same networks, four of each unit; tanh, which saturates, for comparison. The margin is our choice. On the "
    "development seeds layer 4 lost 2 to 10 % of its bits with ReLU, 5 to 18 % with tanh.",
)
def compression(lab: Lab) -> Figures:
    """ReLU and tanh without a penalty."""
    figures: Figures = {"none": {"compression of layer 4": 0.0}}
    for unit in ("relu", "tanh"):
        runs = trained(lab, unit, NETWORKS)
        runs.draw(lab, unit)
        figures[unit] = runs.figures()
    return figures


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of `[N]` each; 0 where one side does not vary."""
    if len(a) < 2:
        return 0.0
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num(0.0))


@claim(
    "Networks whose last layer compresses more generalise better, and no other layer tells as much",
    Better("correlation with test accuracy", "last layer", over="none"),
    Better("correlation with test accuracy", "last layer", over="hidden layers"),
    seeds=range(200, 205),
    note="30 ReLU networks that differ in their first weights, 800 epochs without a penalty (the paper: 8,000); hidden layers: "
    "the mean over layers 3 to 5. Networks that learned nothing, up to two of 30 on the development seeds, are left out: "
    "they answer at chance, and would decide the correlation alone (about -0.9 where they died during training).",
)
def last_layer(lab: Lab) -> Figures:
    """Pearson correlation over networks of each layer's compression with test accuracy."""
    runs = trained(lab, "relu", RUNS)
    learnt = runs.learnt()
    found = {name: correlation(scores[learnt], runs.accuracy[learnt]) for name, scores in runs.scores().items()}
    arms = {
        "last layer": found["output"],
        "hidden layers": sum(found[name] for name in DEEP) / len(DEEP),
        **{f"layer {name[-1]}": found[name] for name in DEEP},
        "last layer, all networks": correlation(runs.scores()["output"], runs.accuracy),
        "none": 0.0,
    }
    return {arm: {"correlation with test accuracy": value} for arm, value in arms.items()}
