"""The straight line between two trained networks: its loss, its barrier, its layers, and the geometry of a fork.

θ_α = (1 − α) θ_a + α θ_b, B(α) = L(θ_α) − (1 − α) L(θ_a) − α L(θ_b), height max_α B(α). Two networks are linearly mode
connected when it is about 0. What curvature says of it is in `path_curvature`.

Barrier: Frankle, Dziugaite, Roy, Carbin, "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, Section 2.
Layers: Adilova et al., "Layer-wise linear mode connectivity", ICLR 2024. Angles: Singh et al., arXiv 2406.16300.

>>> import torch
>>> from sfumato.probes import barrier, path_loss
>>> net = torch.nn.Linear(1, 1, bias=False)
>>> a, b = {"weight": torch.tensor([[1.0]])}, {"weight": torch.tensor([[-1.0]])}
>>> well = lambda out, _: (out.square() - 1).square().mean()  # two minima, at 1 and -1
>>> curve = path_loss(net, a, b, well, (torch.ones(4, 1), torch.ones(4, 1)), alphas=5)
>>> curve.loss.tolist(), barrier(curve).height, barrier(curve).alpha
([0.0, 0.5625, 1.0, 0.5625, 0.0], 1.0, 0.5)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sfumato.errors import BadCheckpoint, BadData, BadSetting, nearest
from sfumato.probes.functional_model import Data, as_batches, eval_mode, exact_arithmetic
from sfumato.probes.operators import LossFunction

State = Mapping[str, Tensor]
"""A `state_dict`."""

BatchNorm = Literal["recompute", "interpolate"]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Curve(NamedTuple):
    """Along the line: positions, mean losses and (for class labels, else NaN) shares of wrong predictions, each `[K]` float64."""

    alphas: Tensor
    loss: Tensor
    error: Tensor


class Barrier(NamedTuple):
    """The largest rise, where on the line it is, and the rise everywhere (`[K]`)."""

    height: float
    alpha: float
    rise: Tensor


@dataclass(frozen=True)
class Geometry:
    """A triangle of networks: both distances from the base, the one between the two, and the angle at the base (NaN: none)."""

    d1: float
    d2: float
    dist: float
    cos: float
    angle_deg: float
    layers: dict[str, Geometry] = field(default_factory=dict)


class _Line:
    """A copy of the model that is moved along the line in place; no model and no state is made anew at any point."""

    def __init__(self, model: nn.Module, state_a: State, state_b: State) -> None:
        self.model = copy.deepcopy(model)
        own = self.model.state_dict()
        check_states(own, state_a=state_a, state_b=state_b)
        self.model.load_state_dict(state_a)  # integers stay those of a
        moving = [name for name, t in own.items() if t.is_floating_point()]
        self.targets = [own[name] for name in moving]
        self.ends = [[s[name].detach().to(own[name]) for name in moving] for s in (state_a, state_b)]
        self.norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.device = next((t.device for t in self.targets), torch.device("cpu"))

    def move(self, alpha: float) -> None:
        for target, a, b in zip(self.targets, *self.ends, strict=True):
            torch.lerp(a, b, alpha, out=target)

    def recompute_statistics(self, data: Data) -> None:
        """Running statistics of this point: plain means over the batches, with everything but batch norm at rest."""
        momenta = [m.momentum for m in self.norms]
        for m in self.norms:
            m.reset_running_stats()
            m.momentum = None  # a cumulative mean instead of a fading one
            m.training = True
        for x, _ in as_batches(data, self.device):
            self.model(x)
        for m, momentum in zip(self.norms, momenta, strict=True):
            m.momentum, m.training = momentum, False


def check_states(own: State, **states: State) -> None:
    """Refuse states that have other tensors than `own` (BadCheckpoint)."""
    for which, state in states.items():
        for name in own.keys() ^ state.keys():
            side = "lacks" if name in own else "has an extra"
            raise BadCheckpoint(f"{which} {side} tensor {name!r}: give state_dicts of the very model that is probed")
        for name, t in own.items():
            if t.shape != state[name].shape:
                raise BadCheckpoint(f"{which}: {name!r} is {[*state[name].shape]}, and {[*t.shape]} in the model")


@torch.no_grad()
def path_loss(
    model: nn.Module, state_a: State, state_b: State, loss: LossFunction, data: Data,
    *, alphas: int | Sequence[float] | Tensor = 25, bn: BatchNorm = "recompute",
) -> Curve:  # fmt: skip
    """Loss and classification error on the straight line between two checkpoints.

    Args:
        model: any module that the states fit; it is not changed. It is run in eval mode.
        state_a: `state_dict` at α = 0.
        state_b: `state_dict` at α = 1.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        data: a pair (inputs, targets), a list of pairs, or a DataLoader; equal at every reading.
        alphas: where: a count of equally spaced positions from 0 to 1 (at least 2), or the positions themselves, ends included.
        bn: batch norm at every point, the ends too: `"recompute"` its statistics on `data`, or `"interpolate"` the stored ones
            (which are those of neither network: the line then looks worse than it is).

    Returns:
        A `Curve`, on the CPU.

    Raises:
        BadCheckpoint: a state that does not fit the model.
        BadSetting: fewer than 2 positions, positions that do not run from 0 to 1, or another `bn`.
        BadData: no data.

    Reference: Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020.
    """
    positions = _positions(alphas)
    if bn not in ("recompute", "interpolate"):
        raise BadSetting(f"bn={bn!r} must be 'recompute' or 'interpolate'")
    line = _Line(model, state_a, state_b)
    rows = []
    with eval_mode(line.model), exact_arithmetic(line.device.type):
        for alpha in positions.tolist():
            line.move(alpha)
            if bn == "recompute" and line.norms:
                line.recompute_statistics(data)
            rows.append(_evaluate(line, loss, data))
    values, errors = torch.stack(rows).cpu().unbind(1)
    return Curve(positions, values, errors)


def _positions(alphas: int | Sequence[float] | Tensor) -> Tensor:
    if isinstance(alphas, int):
        if alphas < 2:
            raise BadSetting(f"alphas={alphas}: a line has two ends, give at least 2 positions")
        return torch.linspace(0, 1, alphas, dtype=torch.float64)
    positions = torch.as_tensor(alphas, dtype=torch.float64).detach().cpu()
    if len(positions) < 2 or positions[0] != 0 or positions[-1] != 1:
        raise BadSetting("alphas must run from 0 to 1: a barrier is measured against both ends")
    return positions


def _evaluate(line: _Line, loss: LossFunction, data: Data) -> Tensor:
    """Mean loss and error, `[2]`."""
    total, count = torch.zeros(2, dtype=torch.float64, device=line.device), 0
    for x, y in as_batches(data, line.device):
        outputs = line.model(x)
        classes = outputs.dim() == y.dim() + 1 and not y.is_floating_point()
        wrong = (outputs.argmax(1) != y).double().mean() if classes else total.new_tensor(math.nan)
        total += torch.stack([loss(outputs, y).double(), wrong]) * len(x)
        count += len(x)
    if not count:
        raise BadData("the probe's data is empty")
    return total / count


def barrier(curve: Curve, *, of: Literal["loss", "error"] = "loss", reference: Literal["line", "mean"] = "line") -> Barrier:
    """How far a curve rises above its ends.

    Args:
        curve: from `path_loss`.
        of: loss or classification error.
        reference: `"line"`: above the chord between the ends; `"mean"`: above the mean of the ends, as Frankle et al. do, which
            differs where the ends do (two ends unlike each other make a "barrier" even of a straight line).

    Returns:
        A `Barrier`. With `"line"` the rise is 0 at both ends, so the height is never negative.

    Raises:
        BadSetting: another `of` or `reference`.
    """
    if of not in ("loss", "error") or reference not in ("line", "mean"):
        raise BadSetting(f"of={of!r} must be 'loss' or 'error', reference={reference!r} 'line' or 'mean'")
    values = curve.loss if of == "loss" else curve.error
    ends = torch.lerp(values[0], values[-1], curve.alphas) if reference == "line" else (values[0] + values[-1]) / 2
    rise = values - ends
    peak = int(rise.argmax())
    return Barrier(float(rise[peak]), float(curve.alphas[peak]), rise)


def layerwise_barrier(
    model: nn.Module, state_a: State, state_b: State, loss: LossFunction, data: Data,
    *, groups: Mapping[str, Iterable[str]] | None = None, mode: Literal["single", "first", "last"] = "single",
    alphas: int | Sequence[float] | Tensor = 25, bn: BatchNorm = "recompute",
) -> dict[str, Barrier]:  # fmt: skip
    """Barriers when only some layers of `state_a` go to those of `state_b`, each against the chord of its own ends.

    Args:
        model: any module; not changed.
        state_a: `state_dict` that gives all the other layers.
        state_b: `state_dict` that the chosen layers move to.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        data: as in `path_loss`.
        groups: names of state entries by layer, in order; None: one group for each module that owns some.
        mode: `"single"`: one group at a time; `"first"`: it and all before it; `"last"`: it and all after it.
        alphas: as in `path_loss`.
        bn: as in `path_loss`.

    Returns:
        A `Barrier` by group.

    Raises:
        BadSetting: a group that names an unknown entry, or another `mode`.

    Reference: Adilova, Andriushchenko, Kamp, Fischer, Jaggi, "Layer-wise linear mode connectivity", ICLR 2024.
    """
    if mode not in ("single", "first", "last"):
        raise BadSetting(f"mode={mode!r} must be 'single', 'first' or 'last'")
    layers = {name: list(entries) for name, entries in (groups or _by_module(state_a)).items()}
    for entry in (e for entries in layers.values() for e in entries if e not in state_a):
        raise BadSetting(f"no state entry {entry!r}; nearest: {', '.join(nearest(entry, state_a)) or list(state_a)[:3]}")
    names = list(layers)
    result = {}
    for i, name in enumerate(names):
        chosen = {"single": names[i : i + 1], "first": names[: i + 1], "last": names[i:]}[mode]
        mixed = {**state_a, **{entry: state_b[entry] for layer in chosen for entry in layers[layer]}}
        result[name] = barrier(path_loss(model, state_a, mixed, loss, data, alphas=alphas, bn=bn))
    return result


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


def fork_geometry(state_a: State, state_b: State, base: State) -> Geometry:
    """Distances and the angle between two networks seen from a third: their fork, or their initialisation.

    The two bases tell different stories: seen from the initialisation the angle falls the later runs part, seen from the fork
    it grows.

    Args:
        state_a: `state_dict` of one network (statistics of batch norm and integers are left out).
        state_b: of the other.
        base: where the angle is taken.

    Returns:
        A `Geometry`, in parameter units and degrees, with one for every layer in `layers`.

    Raises:
        BadCheckpoint: states of unlike networks.
    """
    check_states(base, state_a=state_a, state_b=state_b)
    names = [n for n, t in base.items() if t.is_floating_point() and n.rpartition(".")[2] not in _STATISTICS]
    dots = {}
    for n in names:
        origin = base[n].detach().double().flatten()
        a, b = (s[n].detach().to(origin).flatten() - origin for s in (state_a, state_b))
        dots[n] = torch.stack([a @ a, b @ b, a @ b, (b - a) @ (b - a)])
    layers = {layer: _triangle([dots[n] for n in of_layer]) for layer, of_layer in _by_module(names).items()}
    return Geometry(**{**vars(_triangle(list(dots.values()))), "layers": layers})


def _triangle(dots: list[Tensor]) -> Geometry:
    aa, bb, ab, dd = torch.stack(dots).sum(0).tolist()
    reach = math.sqrt(aa * bb)
    cos = max(-1.0, min(1.0, ab / reach)) if reach else math.nan
    return Geometry(math.sqrt(aa), math.sqrt(bb), math.sqrt(dd), cos, math.degrees(math.acos(cos)) if reach else math.nan)
