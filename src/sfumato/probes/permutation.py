"""Networks that differ in the order of their hidden units: put one in the order of another (weight matching).

Hidden units can be permuted without changing a network: W_l → P_l W_l P_{l−1}ᵀ. Units of b are matched to those of a by
maximising Σ_l ⟨W_l^a, P_l W_l^b P_{l−1}ᵀ⟩, one P_l at a time: each is a linear assignment, repeated until nothing gains.

Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: merging models modulo permutation symmetries", ICLR 2023, Section 3.2.

>>> import torch
>>> from sfumato.probes import match_permutation
>>> net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
>>> a, order = net.state_dict(), torch.tensor([3, 0, 4, 1, 2])
>>> b = {"0.weight": a["0.weight"][order], "0.bias": a["0.bias"][order], "2.weight": a["2.weight"][:, order]}
>>> b["2.bias"] = a["2.bias"]
>>> all(torch.equal(t, a[name]) for name, t in match_permutation(net, a, b).items())
True
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sfumato.errors import BadSetting
from sfumato.probes.paths import State, check_states

_UNITWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_UNITWISE_CALLS = {torch.relu, torch.tanh, torch.sigmoid, F.relu, F.gelu, F.silu, F.elu, F.leaky_relu, F.dropout, torch.flatten,
                   F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d}  # fmt: skip
_UNITWISE_METHODS = {"relu", "tanh", "sigmoid", "flatten", "contiguous"}
_SUMS = {"add", "iadd", "add_"}


class _Axis(NamedTuple):
    """An axis of a state entry whose units are in a group's order, each `block` neighbours wide (after flattening)."""

    entry: str
    axis: int
    block: int = 1


class _Groups:
    """Which axes of which tensors share one order of units; group 0 is the fixed one, of inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, dict(model.named_modules())
        self.parent, self.size, self.flat_last = [0], [0], {0}
        self.axes: dict[_Axis, int] = {}
        if len(list(model.named_parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
            raise BadSetting("units cannot be matched where weights are tied: untie them, or match the layers by hand")
        try:
            graph = fx.symbolic_trace(model).graph
        except Exception as error:  # tracing can fail in any way that a forward function can
            raise BadSetting(
                f"the model's forward cannot be traced by torch.fx ({error}): units can be matched without branches"
            ) from error
        at: dict[fx.Node, int] = {}
        for node in graph.nodes:
            at[node] = self._visit(node, [at[n] for n in node.all_input_nodes])

    def root(self, group: int) -> int:
        while self.parent[group] != group:
            group = self.parent[group]
        return group

    def _unite(self, a: int, b: int) -> int:
        low, high = sorted((self.root(a), self.root(b)))
        self.parent[high] = low
        return low

    def _bind(self, axis: _Axis, group: int) -> None:
        self.axes[axis] = self._unite(self.axes.get(axis, group), group)

    def _visit(self, node: fx.Node, sources: list[int]) -> int:
        """The group of a node's units."""
        if node.op in ("placeholder", "output"):
            for source in sources:
                self._unite(0, source)
            return 0
        if node.op == "call_module":
            return self._layer(str(node.target), self.modules[str(node.target)], sources[0])
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in _SUMS and sources:
            return self._unite(sources[0], sources[-1])
        if (node.op == "call_function" and node.target in _UNITWISE_CALLS) or (
            node.op == "call_method" and name in _UNITWISE_METHODS
        ):
            return sources[0]
        raise BadSetting(
            f"cannot follow units through {name!r}: layers are Linear, Conv, batch norm, unit-wise functions and sums"
        )

    def _layer(self, name: str, layer: nn.Module, source: int) -> int:
        if isinstance(layer, _UNITWISE):
            return source
        vectors = [key for key, t in layer.state_dict().items() if t.dim() == 1]
        if isinstance(layer, _BatchNorm) or (
            isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels
        ):
            for key in {*vectors, "weight"} & layer.state_dict().keys():
                self._bind(_Axis(f"{name}.{key}", 0), source)
            return source
        plain_conv = isinstance(layer, _ConvNd) and layer.groups == 1 and not layer.transposed
        if not (plain_conv or isinstance(layer, nn.Linear)):
            raise BadSetting(
                f"cannot follow units through {name!r} ({type(layer).__name__}): match Linear, Conv and batch norm only"
            )
        weight = layer.get_parameter("weight")
        outputs, inputs = weight.shape[:2]
        known = self.size[source] or inputs
        if inputs % known or (inputs != known and source in self.flat_last and source):
            raise BadSetting(f"{name!r} takes {inputs} inputs and the layer before gives {known} units: these cannot be lined up")
        self._bind(_Axis(f"{name}.weight", 1, inputs // known), source)
        group = len(self.parent)
        self.parent.append(group)
        self.size.append(outputs)
        if isinstance(layer, nn.Linear):
            self.flat_last.add(group)
        for key in {*vectors, "weight"}:
            self._bind(_Axis(f"{name}.{key}", 0), group)
        return group

    def members(self) -> dict[int, list[_Axis]]:
        """The axes of every group that may be permuted."""
        found: dict[int, list[_Axis]] = {}
        for axis, group in self.axes.items():
            if self.root(group):
                found.setdefault(self.root(group), []).append(axis)
        return found


def _reordered(t: Tensor, axis: _Axis, order: Tensor) -> Tensor:
    """`t` with the units of one axis in another order."""
    index = (order[:, None] * axis.block + torch.arange(axis.block)).flatten()
    return t.index_select(axis.axis, index.to(t.device))


def _unit_rows(t: Tensor, axis: _Axis) -> Tensor:
    """One row a unit, in double precision on the CPU."""
    return t.detach().double().cpu().movedim(axis.axis, 0).reshape(t.shape[axis.axis] // axis.block, -1)


def match_permutation(model: nn.Module, state_a: State, state_b: State, *, rounds: int = 100) -> dict[str, Tensor]:
    """The network of `state_b` with its hidden units in the order that is nearest to `state_a`: the same function.

    Args:
        model: what both states fit, made of Linear, Conv (plain or depthwise), batch norm, unit-wise functions, pooling,
            flattening and sums (residual branches); traced by `torch.fx`, never run or changed.
        state_a: `state_dict` whose order is kept.
        state_b: `state_dict` to put in order.
        rounds: passes over the layers at most; it stops as soon as none gains.

    Returns:
        A `state_dict`, permuted copies of `state_b`.

    Raises:
        BadCheckpoint: a state that does not fit the model.
        BadSetting: a model in which units cannot be followed.

    Reference: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, Section 3.2 (layers in order rather than at random).
    """
    check_states(model.state_dict(), state_a=state_a, state_b=state_b)
    groups = _Groups(model).members()
    learned = {name for name, _ in model.named_parameters()}
    found = dict(state_b)
    for _ in range(rounds):
        gains = [_match_group(members, state_a, found, learned) for members in groups.values()]
        if not any(gains):
            break
    return {name: t.detach().clone() for name, t in found.items()}


def _match_group(members: list[_Axis], state_a: State, found: dict[str, Tensor], learned: set[str]) -> bool:
    """Reorder the units of one group within `found`; whether that raised the agreement with `state_a`."""
    from scipy.optimize import linear_sum_assignment

    weights = [m for m in members if m.entry in learned]
    agreement = sum(_unit_rows(state_a[m.entry], m) @ _unit_rows(found[m.entry], m).T for m in weights)
    assert isinstance(agreement, Tensor)
    order = torch.from_numpy(linear_sum_assignment(agreement.numpy(), maximize=True)[1])
    best, present = agreement.gather(1, order[:, None]).sum(), agreement.trace()
    if best <= present + 1e-9 * present.abs():
        return False
    for m in members:
        found[m.entry] = _reordered(found[m.entry], m, order)
    return True
