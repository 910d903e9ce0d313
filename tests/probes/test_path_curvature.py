from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadCheckpoint, BadData
from sfumato.nn import flatten_params, unflatten_params
from sfumato.probes import HessianOperator, barrier_prediction, directional_derivatives

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "mode-connectivity.npz")


def vector(name):
    return torch.from_numpy(VECTORS[name])


def reference():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    states = {name: unflatten_params(vector(f"theta{name}"), net) for name in ("1", "2", "_fork")}
    return net, states, (vector("X"), vector("y"))


def difference(a, b):
    return {name: b[name] - a[name] for name in a}


def test_reference_derivatives():
    net, states, data = reference()
    delta = difference(states["1"], states["2"])
    found = directional_derivatives(net, states["1"], delta, F.cross_entropy, data, alphas=VECTORS["alphas"])
    torch.testing.assert_close(found[:, 0], vector("path_loss"), rtol=1e-9, atol=0)
    torch.testing.assert_close(found[:, 2], vector("path_second_derivative"), rtol=1e-9, atol=1e-11)
    net.load_state_dict(states["1"])
    flat = flatten_params(delta)
    slope = torch.autograd.grad(F.cross_entropy(net(data[0]), data[1]), list(net.parameters()))
    torch.testing.assert_close(found[0, 1], flatten_params(slope) @ flat)
    torch.testing.assert_close(found[0, 2], flat @ (HessianOperator(net, F.cross_entropy, data) @ flat))
    halves = [(data[0][:5], data[1][:5]), (data[0][5:], data[1][5:])]
    torch.testing.assert_close(directional_derivatives(net, states["1"], delta, F.cross_entropy, halves), found[:1])


def test_reference_predictions():
    net, states, data = reference()
    found = barrier_prediction(net, states["1"], states["2"], F.cross_entropy, data, fork=states["_fork"], nodes=30)
    assert found["endpoint"] == pytest.approx(float(VECTORS["endpoint_taylor_mid"]), rel=1e-9)
    assert found["fork"] == pytest.approx(float(VECTORS["fork_taylor_mid"]), rel=1e-9)
    middle = VECTORS["path_second_derivative"][VECTORS["alphas"] == 0.5][0]
    assert found["midpoint"] == pytest.approx(-middle / 8, rel=1e-9)
    direct = VECTORS["barrier_curve"][VECTORS["alphas"] == 0.5][0]
    assert found["identity"] == pytest.approx(direct, abs=1e-8)
    assert float(VECTORS["barrier_mid_from_curvature"]) == pytest.approx(direct, abs=1e-12)
    few = barrier_prediction(net, states["1"], states["2"], F.cross_entropy, data)
    assert few["identity"] == pytest.approx(direct, abs=1e-3)
    assert "fork" not in few


def test_all_forms_agree_on_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(4, 1, bias=False).double()
    x, y = (torch.randn(20, n, dtype=torch.float64, generator=generator) for n in (4, 1))
    a, b, fork = ({"weight": torch.randn(1, 4, dtype=torch.float64, generator=generator)} for _ in range(3))
    found = barrier_prediction(net, a, b, F.mse_loss, (x, y), fork=fork)
    expected = -(x @ (b["weight"] - a["weight"]).T).square().mean() * 2 / 8
    assert all(value == pytest.approx(float(expected)) for value in found.values())
    assert len(found) == 4


def test_batch_norm_is_differentiated_through_its_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    a = {name: t.clone() for name, t in net.state_dict().items()}
    b = {name: t + torch.randn_like(t) if t.is_floating_point() else t for name, t in a.items()}

    def level(alpha):
        net.load_state_dict({n: torch.lerp(a[n], b[n], alpha) if t.is_floating_point() else t for n, t in a.items()})
        return float(F.cross_entropy(net.train()(data[0]), data[1]))

    direct = level(0.5) - (level(0.0) + level(1.0)) / 2
    assert barrier_prediction(net, a, b, F.cross_entropy, data, nodes=40)["identity"] == pytest.approx(direct, abs=1e-5)


def test_bad_calls_are_told():
    net, states, data = reference()
    with pytest.raises(BadCheckpoint, match="fork lacks"):
        barrier_prediction(net, states["1"], states["2"], F.cross_entropy, data, fork={})
    with pytest.raises(BadData, match="empty"):
        barrier_prediction(net, states["1"], states["2"], F.cross_entropy, [])
