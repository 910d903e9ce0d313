"""A barrier is negative curvature along the line: second-order expressions for it, and a full report of two checkpoints.

δ = θ_b − θ_a, B(α) = −∫₀¹ G(α, s) δᵀ∇²L(θ_s)δ ds, where the tent G(α, s) is s (1 − α) for s ≤ α and α (1 − s) beyond: exact for
every twice differentiable loss. With the curvature at one point in place of all it becomes the midpoint or the fork form.

Source: the identity is our derivation; Singh, Adilova, Kamp, Fischer, Schölkopf, Hofmann, "Landscaping linear mode
connectivity", 2024 (arXiv 2406.16300), give a theorem of this family.

>>> import torch
>>> from sfumato.probes import barrier_prediction
>>> net = torch.nn.Linear(1, 1, bias=False)
>>> a, b = {"weight": torch.tensor([[1.0]])}, {"weight": torch.tensor([[-1.0]])}
>>> well = lambda out, _: (out.square() - 1).square().mean()  # L(0) = 1 between two minima: the barrier is 1
>>> found = barrier_prediction(net, a, b, well, (torch.ones(4, 1), torch.ones(4, 1)))
>>> {name: round(value, 5) for name, value in found.items()}
{'endpoint': 4.0, 'midpoint': 2.0, 'identity': 1.0}
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.errors import BadData
from sfumato.probes.functional_model import Data, FunctionalModel, as_batches
from sfumato.probes.operators import LossFunction, Point
from sfumato.probes.paths import State, barrier, check_states, fork_geometry, layerwise_barrier, path_loss


def directional_derivatives(
    model: nn.Module, state: State, direction: State, loss: LossFunction, data: Data, *, alphas: Iterable[float] = (0.0,)
) -> Tensor:
    """Value, slope and curvature of the loss along a direction: L, gᵀδ and δᵀ∇²Lδ at θ + α δ, without a Hessian.

    The loss is a function of α alone, differentiated twice in reverse mode: a few forward passes a position. Batch norm takes,
    and is differentiated through, the statistics of each batch.

    Args:
        model: any module that can be differentiated twice; it is not changed.
        state: `state_dict` at α = 0.
        direction: δ, a tensor for each trainable parameter; others are constants.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        data: as in `path_loss`.
        alphas: positions.

    Returns:
        `[K, 3]` float64 on the CPU: L, dL/dα, d²L/dα².
    """
    at = copy.deepcopy(model)
    at.load_state_dict(state)
    function = FunctionalModel(at, bn="batch")
    device = at.get_parameter(function.names[0]).device
    delta = {name: direction[name].detach().to(at.get_parameter(name)) for name in function.names}
    rows = []
    with function.at_rest(), torch.no_grad():
        theta = function.theta()
        for alpha in alphas:
            total, count = torch.zeros(3, dtype=torch.float64, device=device), 0
            for x, y in as_batches(data, device):
                total += _second_order(function, loss, (theta, delta), alpha, x, y) * len(x)
                count += len(x)
            if not count:
                raise BadData("the probe's data is empty")
            rows.append(total / count)
    return torch.stack(rows).cpu()


def _second_order(
    f: FunctionalModel, loss: LossFunction, line: tuple[Point, Point], alpha: float, x: Tensor, y: Tensor
) -> Tensor:
    """L, L′ and L″ of one batch at θ + α δ, `[3]`."""
    theta, delta = line
    with torch.enable_grad():
        t = next(iter(theta.values())).new_tensor(alpha).requires_grad_()
        level = loss(f({name: p + t * delta[name] for name, p in theta.items()}, x), y)
        # reverse over reverse: forward over forward is wrong for batch norm in torch, whose saved statistics carry no tangent
        (slope,) = torch.autograd.grad(level, t, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, t, materialize_grads=True) if slope.requires_grad else (torch.zeros_like(t),)
    return torch.stack([level, slope, curvature]).detach().double()


def barrier_prediction(
    model: nn.Module, state_a: State, state_b: State, loss: LossFunction, data: Data,
    *, fork: State | None = None, nodes: int = 8,
) -> dict[str, float]:  # fmt: skip
    """What second-order expressions say of the barrier half-way, B(½), without looking at the loss there.

    Args:
        model: any module; see `directional_derivatives`.
        state_a: `state_dict` at α = 0.
        state_b: `state_dict` at α = 1.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        data: as in `path_loss`.
        fork: `state_dict` where the two runs parted, if they did.
        nodes: Gauss-Legendre nodes on each half of the line.

    Returns:
        `endpoint`: both ends' quadratics, (g_a − g_b)ᵀδ / 4 + δᵀ(H_a + H_b)δ / 16; takes both walls for parabolas, so it is often
        too high. `midpoint`: −δᵀH_½δ / 8. `identity`: the exact integral, up to quadrature. `fork`, if given: −δᵀH_forkδ / 8.

    Raises:
        BadCheckpoint: a state that does not fit the model.

    Reference: our derivation; Singh et al., "Landscaping linear mode connectivity", 2024, give a theorem of this family.
    """
    check_states(model.state_dict(), state_a=state_a, state_b=state_b, **({} if fork is None else {"fork": fork}))
    delta = {name: state_b[name].detach() - state_a[name].detach() for name, _ in model.named_parameters()}
    unit, weights = np.polynomial.legendre.leggauss(nodes)
    half, tent = (unit + 1) / 4, weights / 4 * (unit + 1) / 8  # on [0, ½]: nodes s, and weights times G(½, s) = s / 2
    alphas = [0.0, 0.5, 1.0, *half.tolist(), *(1 - half).tolist()]
    first, middle, last, *inner = directional_derivatives(model, state_a, delta, loss, data, alphas=alphas).tolist()
    curvature = np.array([row[2] for row in inner])
    prediction = {
        "endpoint": (first[1] - last[1]) / 4 + (first[2] + last[2]) / 16,
        "midpoint": -middle[2] / 8,
        "identity": -float(np.concatenate([tent, tent]) @ curvature),
    }
    if fork is not None:
        prediction["fork"] = -float(directional_derivatives(model, fork, delta, loss, data)[0, 2]) / 8
    return prediction


def connectivity(
    model: nn.Module, state_a: State, state_b: State, loss: LossFunction, data: Data,
    *, fork: State | None = None, alphas: int = 25,
) -> dict[str, Any]:  # fmt: skip
    """All of it as plain numbers, ready for JSON: the curve, barriers, predictions, layers and, with a fork, the geometry.

    Args:
        model: any module; not changed.
        state_a: `state_dict` at α = 0.
        state_b: `state_dict` at α = 1.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        data: as in `path_loss`.
        fork: where the runs parted; None: unknown.
        alphas: number of positions.

    Returns:
        `curve`, `barrier` (loss and error, above the chord and above the mean; None: no classes), `prediction` (of B(½)),
        `layers` (heights), `distance`, and `fork` (a `Geometry` as a dict) where one is given.
    """
    curve = path_loss(model, state_a, state_b, loss, data, alphas=alphas)
    heights = {
        f"{of}, {ref}": barrier(curve, of=of, reference=ref).height for of in ("loss", "error") for ref in ("line", "mean")
    }  # type: ignore[arg-type]
    layers = layerwise_barrier(model, state_a, state_b, loss, data, alphas=alphas)
    report: dict[str, Any] = {
        "curve": {name: [None if math.isnan(v) else v for v in t.tolist()] for name, t in curve._asdict().items()},
        "barrier": {name: None if math.isnan(height) else height for name, height in heights.items()},
        "prediction": barrier_prediction(model, state_a, state_b, loss, data, fork=fork),
        "layers": {name: found.height for name, found in layers.items()},
        "distance": fork_geometry(state_a, state_b, state_a).dist,
    }
    if fork is not None:
        report["fork"] = asdict(fork_geometry(state_a, state_b, fork))
    return report
