from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.nn import unflatten_params
from sfumato.probes import Curve, barrier, connectivity, fork_geometry, layerwise_barrier, path_loss

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "mode-connectivity.npz")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def vector(name):
    return torch.from_numpy(VECTORS[name])


def reference():
    """The reference net and its data; states by name."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    states = {name: unflatten_params(vector(f"theta{name}"), net) for name in ("1", "2", "_fork")}
    return net, states, (vector("X"), vector("y"))


def batch_norm_net(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64) * 3 + 1, torch.randint(3, (40,))
    net.train()
    for _ in range(50):
        net(x)
    return net, (x, y)


def test_reference_path_and_barrier():
    net, states, data = reference()
    curve = path_loss(net, states["1"], states["2"], F.cross_entropy, data, alphas=vector("alphas"))
    torch.testing.assert_close(curve.loss, vector("path_loss"), **EXACT)
    found = barrier(curve)
    torch.testing.assert_close(found.rise, vector("barrier_curve"), **EXACT)
    assert found.height == pytest.approx(float(VECTORS["barrier_max"]), abs=1e-12)
    outputs = [nn.functional.linear(torch.tanh(F.linear(data[0], s["0.weight"], s["0.bias"])), s["2.weight"], s["2.bias"])
               for s in (states["1"], states["2"])]  # fmt: skip
    wrong = torch.stack([(o.argmax(1) != data[1]).double().mean() for o in outputs])
    torch.testing.assert_close(curve.error[[0, -1]], wrong)


def test_batches_of_unequal_size_make_no_difference():
    net, states, (x, y) = reference()
    whole = path_loss(net, states["1"], states["2"], F.cross_entropy, (x, y), alphas=3)
    parts = path_loss(net, states["1"], states["2"], F.cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], alphas=3)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_swapping_the_ends_mirrors_and_equal_ends_are_flat():
    net, states, data = reference()
    there, back = (
        barrier(path_loss(net, states[a], states[b], F.cross_entropy, data, alphas=7)) for a, b in (("1", "2"), ("2", "1"))
    )
    torch.testing.assert_close(there.rise, back.rise.flip(0))
    assert there.rise[0] == there.rise[-1] == 0
    flat = barrier(path_loss(net, states["1"], states["1"], F.cross_entropy, data))
    assert flat.height < 1e-15
    assert len(flat.rise) == 25


def test_references_differ_where_ends_do():
    alphas = torch.linspace(0, 1, 5, dtype=torch.float64)
    straight = Curve(alphas, 1 + 2 * alphas, torch.full_like(alphas, torch.nan))
    assert barrier(straight).height == 0
    assert barrier(straight, reference="mean").height == 1
    assert np.isnan(barrier(straight, of="error").height)
    peaked = straight._replace(loss=torch.tensor([0.0, 3, 1, 0, 0]).double())
    assert barrier(peaked)[:2] == (3.0, 0.25)
    with pytest.raises(BadSetting, match="reference='chord'"):
        barrier(straight, reference="chord")


def test_convex_model_has_no_barrier():
    net, generator = nn.Linear(4, 3).double(), torch.Generator().manual_seed(0)
    states = [
        {n: 3 * torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in net.named_parameters()} for _ in "abcd"
    ]
    data = torch.randn(30, 4, dtype=torch.float64, generator=generator), torch.arange(30) % 3
    for a, b in pairwise(states):
        found = barrier(path_loss(net, a, b, F.cross_entropy, data))
        assert found.height == 0
        assert float(found.rise[12]) < -1e-3


def test_statistics_of_batch_norm_are_recomputed():
    (net, data), (other, _) = batch_norm_net(0), batch_norm_net(1)
    a, b = net.state_dict(), other.state_dict()
    b = {name: -3 * t if name == "0.weight" else t for name, t in b.items()}  # its statistics no longer fit
    before = {name: t.clone() for name, t in a.items()}
    default, stored = (path_loss(net, a, b, F.cross_entropy, data, alphas=5, **o) for o in ({}, {"bn": "interpolate"}))
    again = path_loss(net, a, b, F.cross_entropy, data, alphas=5, bn="recompute")
    assert torch.equal(default.loss, again.loss)
    assert float((stored.loss - default.loss)[1:].max()) > 0.05
    assert net.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    # by hand, half-way: statistics of this very data, without dropout
    half = {name: torch.lerp(a[name], b[name], 0.5) for name in a if a[name].is_floating_point()}
    z = F.linear(data[0], half["0.weight"], half["0.bias"])
    z = (z - z.mean(0)) / (z.var(0) + 1e-5).sqrt() * half["1.weight"] + half["1.bias"]
    expected = F.cross_entropy(F.linear(z.relu(), half["4.weight"], half["4.bias"]), data[1])
    torch.testing.assert_close(default.loss[2], expected)


def test_layers_against_their_own_ends():
    net, states, data = reference()
    found = layerwise_barrier(net, states["1"], states["2"], F.cross_entropy, data, alphas=3)
    assert list(found) == ["0", "2"]
    torch.testing.assert_close(torch.stack([b.rise[1] for b in found.values()]), vector("layerwise_mid"), **EXACT)
    whole = barrier(path_loss(net, states["1"], states["2"], F.cross_entropy, data, alphas=3)).rise
    first, last = (
        layerwise_barrier(net, states["1"], states["2"], F.cross_entropy, data, alphas=3, mode=mode) for mode in ("first", "last")
    )
    for cumulative in (first["2"], last["0"]):
        torch.testing.assert_close(cumulative.rise, whole)
    torch.testing.assert_close(first["0"].rise, found["0"].rise)
    groups = {"bias": ["0.bias", "2.bias"], "none": []}
    chosen = layerwise_barrier(net, states["1"], states["2"], F.cross_entropy, data, alphas=3, groups=groups)
    assert list(chosen) == ["bias", "none"]
    assert float(chosen["none"].rise.abs().max()) < 1e-15
    with pytest.raises(BadSetting, match=r"'0\.weights'; nearest: 0\.weight"):
        layerwise_barrier(net, states["1"], states["2"], F.cross_entropy, data, groups={"a": ["0.weights"]})


def test_geometry_of_the_fork():
    _, states, _ = reference()
    found = fork_geometry(states["1"], states["2"], states["_fork"])
    for value, name in ((found.d1, "dist1"), (found.d2, "dist2"), (found.dist, "dist"), (found.angle_deg, "angle_deg")):
        assert value == pytest.approx(float(VECTORS[name]), rel=1e-9)
    assert found.dist**2 == pytest.approx(found.d1**2 + found.d2**2 - 2 * found.d1 * found.d2 * found.cos)
    assert sum(layer.dist**2 for layer in found.layers.values()) == pytest.approx(found.dist**2)
    none = fork_geometry(states["1"], states["1"], states["1"])
    assert (none.d1, none.dist) == (0, 0)
    assert np.isnan(none.angle_deg)


def test_geometry_leaves_statistics_out():
    net, _ = batch_norm_net(0)
    state = net.state_dict()
    moved = {name: t + 1 if "running" in name else t for name, t in state.items()}
    assert fork_geometry(state, moved, state).dist == 0


def test_report_is_plain():
    import json

    net, states, data = reference()
    report = connectivity(net, states["1"], states["2"], F.cross_entropy, data, fork=states["_fork"], alphas=11)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["fork"]["angle_deg"] == pytest.approx(float(VECTORS["angle_deg"]))
    assert set(report["prediction"]) == {"endpoint", "midpoint", "identity", "fork"}
    targets = F.one_hot(data[1], 3).double()
    squares = connectivity(net, states["1"], states["2"], F.mse_loss, (data[0], targets), alphas=3)
    assert squares["barrier"]["error, line"] is None
    assert "fork" not in squares


def test_bad_calls_are_told():
    net, states, data = reference()
    a, b = states["1"], states["2"]
    with pytest.raises(BadCheckpoint, match=r"state_b lacks tensor '0\.bias'"):
        path_loss(net, a, {n: t for n, t in b.items() if n != "0.bias"}, F.cross_entropy, data)
    with pytest.raises(BadCheckpoint, match=r"state_a: '0\.bias' is \[4\], and \[5\]"):
        path_loss(net, {**a, "0.bias": torch.zeros(4)}, b, F.cross_entropy, data)
    with pytest.raises(BadSetting, match="at least 2"):
        path_loss(net, a, b, F.cross_entropy, data, alphas=1)
    with pytest.raises(BadSetting, match="from 0 to 1"):
        path_loss(net, a, b, F.cross_entropy, data, alphas=[0.0, 0.5])
    with pytest.raises(BadSetting, match="bn='eval'"):
        path_loss(net, a, b, F.cross_entropy, data, bn="eval")
    with pytest.raises(BadData, match="empty"):
        path_loss(net, a, b, F.cross_entropy, [])
    with pytest.raises(BadSetting, match="mode='all'"):
        layerwise_barrier(net, a, b, F.cross_entropy, data, mode="all")
