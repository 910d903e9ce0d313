import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

from sfumato.data import Batch
from sfumato.errors import BadData, BadSetting
from sfumato.probes import (
    InformationPlane,
    adaptive_bin_edges,
    binned_information_bits,
    kde_information,
    pattern_entropy_bits,
)

STORED = np.load(Path(__file__).parents[1] / "vectors" / "adaptive-information.npz")
LABELS = torch.from_numpy(STORED["y"])
LOWS = {"relu": 0.0, "softplus": 0.0, "tanh": -1.000001, "elu": -1.000001}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("unit", LOWS)
def test_reference_bins(unit):
    activity = torch.from_numpy(STORED[f"{unit}_T"])
    edges = adaptive_bin_edges(activity, bins=int(STORED["num_bins"]), low=LOWS[unit])
    assert torch.equal(edges, torch.from_numpy(STORED[f"{unit}_edges"]))
    found = binned_information_bits(activity, LABELS, edges)
    assert float(found.input) == pytest.approx(float(STORED[f"{unit}_ixt_bits"]), abs=1e-10)
    assert float(found.label) == pytest.approx(float(STORED[f"{unit}_ity_bits"]), abs=1e-10)


@pytest.mark.parametrize("variance", ["0.001", "0.1"])
@pytest.mark.parametrize("bound", ["upper", "lower"])
def test_reference_kernels(variance, bound):
    activity = torch.from_numpy(STORED["tanh_T"])
    entropy, noise = (float(STORED[f"kde_{name}_nats_var{variance}"]) for name in (f"{bound}_H", "condH"))
    found = kde_information(activity, LABELS, variance=float(variance), bound=bound)
    assert float(found.input) == pytest.approx(entropy - noise, abs=1e-10)


def test_reference_fixed_bins():
    activity = torch.from_numpy(STORED["tanh_T"])  # bins floor(t / 0.5)
    found = binned_information_bits(activity, LABELS, torch.arange(-4, 5, dtype=torch.float64) / 2)
    for value, stored in ((found.input, "fixed_bin_ixt_nats_0.5"), (found.label, "fixed_bin_ity_nats_0.5")):
        assert float(value) * math.log(2) == pytest.approx(float(STORED[stored]), abs=1e-10)


@pytest.mark.parametrize("low", [None, -1e9])
def test_bins_hold_equally_many_distinct_values(low):
    values = draw(100, 7).round(decimals=1)
    distinct = values.unique()
    edges = adaptive_bin_edges(values, bins=20, low=low)
    assert len(edges) == 22
    held = (torch.bucketize(distinct, edges, right=True) - 1).bincount(minlength=22)
    assert held[0] == 0
    assert held[-1] == 1  # the largest value is alone
    inner = held[1:-1].clone()
    inner[-1] += 1
    assert inner.max() - inner.min() <= 1
    assert held.sum() == len(distinct)


def test_a_value_at_the_lower_end_is_alone():
    values = draw(50, 4).relu()
    edges = adaptive_bin_edges(values, low=0.0)
    codes = torch.bucketize(values, edges, right=True) - 1
    assert torch.equal(codes == 0, values == 0)


def test_adaptive_bins_ignore_increasing_maps_and_fixed_bins_do_not():
    values = draw(300, 4).tanh()
    maps = {"scale": lambda t: 1000 * t, "cube": lambda t: (2 * t) ** 3, "exp": lambda t: t.exp()}
    fixed = torch.linspace(-1, 1, 31, dtype=torch.float64)
    labels = values[:, 0] > 0
    before = binned_information_bits(values, labels, adaptive_bin_edges(values))
    for change in maps.values():
        after = binned_information_bits(change(values), labels, adaptive_bin_edges(change(values)))
        assert after == before
        assert binned_information_bits(change(values), labels, fixed) != binned_information_bits(values, labels, fixed)


def test_limits():
    n = 64
    labels = torch.arange(n) % 2
    distinct = torch.arange(n, dtype=torch.float64)[:, None]
    found = binned_information_bits(distinct, labels, adaptive_bin_edges(distinct, bins=n))
    assert float(found.input) == pytest.approx(6, abs=1e-12)
    assert float(found.label) == pytest.approx(1, abs=1e-12)
    silent = torch.zeros(n, 3)
    assert adaptive_bin_edges(silent, low=0.0).tolist() == [0.0]
    assert binned_information_bits(silent, labels, adaptive_bin_edges(silent, low=0.0)) == (0, 0)


def test_information_about_classes_is_bounded_and_merging_codes_loses():
    values, labels = draw(500, 3), torch.arange(500) % 7
    fine = torch.linspace(-3, 3, 13, dtype=torch.float64)
    of_fine, of_coarse = (binned_information_bits(values, labels, edges) for edges in (fine, fine[::4]))
    entropy = pattern_entropy_bits(labels[:, None])
    assert of_fine.label <= min(entropy, of_fine.input)
    assert of_coarse.input < of_fine.input
    assert of_coarse.label < of_fine.label


@pytest.mark.parametrize("width", [1, 3, 12, 13, 40])
@pytest.mark.parametrize("spread", [2, 32, 2**62])
def test_entropy_of_patterns_agrees_with_numpy(width, spread):
    g = torch.Generator().manual_seed(width)
    some = torch.randint(-(spread // 2), spread // 2, (60, width), generator=g)
    codes = some[torch.randint(60, (400,), generator=g)]
    counts = np.unique(codes.numpy(), axis=0, return_counts=True)[1] / 400
    assert float(pattern_entropy_bits(codes)) == pytest.approx(float(-(counts * np.log2(counts)).sum()), abs=1e-12)


def test_agrees_with_scikit_learn():
    values, labels = draw(400, 2), torch.arange(400) % 3
    edges = torch.linspace(-2, 2, 5, dtype=torch.float64)
    codes = torch.bucketize(values, edges, right=True)
    expected = mutual_info_score(labels.numpy(), (codes[:, 0] * 10 + codes[:, 1]).numpy()) / math.log(2)
    assert float(binned_information_bits(values, labels, edges).label) == pytest.approx(expected, abs=1e-10)


def test_kernel_limits():
    n = 50
    labels = torch.arange(n) % 5
    equal, apart = torch.ones(n, 3, dtype=torch.float64), 100 * torch.arange(n, dtype=torch.float64)[:, None]
    for bound in ("upper", "lower"):
        assert kde_information(equal, labels, variance=0.1, bound=bound).input.abs() < 1e-12
        found = kde_information(apart, labels, variance=0.1, bound=bound)
        assert float(found.input) == pytest.approx(math.log(n), abs=1e-12)
        assert float(found.label) == pytest.approx(math.log(5), abs=1e-12)
    values = draw(n, 3)
    assert kde_information(values, labels, bound="lower").input <= kde_information(values, labels).input
    assert kde_information(torch.zeros(n, 2), labels) == (0, 0)


def test_kernel_information_about_classes_is_a_difference_of_entropies():
    values, labels = draw(60, 2), torch.tensor([0] * 35 + [1] * 25)
    conditional = 0.0
    for k in (0, 1):
        part = values[labels == k]
        conditional += len(part) / 60 * kde_information(part, labels[labels == k], variance=0.2).input
    found = kde_information(values, labels, variance=0.2)
    torch.testing.assert_close(found.label, found.input - conditional, rtol=1e-12, atol=0)


def test_adaptive_noise_follows_the_activity():
    values, labels = draw(80, 2), torch.arange(80) % 2
    v = float(1e-3 * values.abs().max())
    assert kde_information(values, labels) == kde_information(values, labels, variance=v)


def test_kernels_in_blocks(monkeypatch):
    values, labels = draw(90, 2), torch.arange(90) % 4
    whole = kde_information(values, labels, variance=0.01)
    monkeypatch.setattr("sfumato.probes.information._PAIRS", 90 * 7)
    torch.testing.assert_close(tuple(kde_information(values, labels, variance=0.01)), tuple(whole), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    values, labels = draw(64, 4).to(dtype), torch.arange(64) % 2
    found = binned_information_bits(values, labels, adaptive_bin_edges(values, low=None))
    assert 0 < found.label <= 1 < found.input <= 6
    assert kde_information(values, labels).input <= math.log(64) + 1e-4


def test_plane_follows_a_network():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    data = Batch(draw(200, 4).float(), torch.arange(200), torch.arange(200) % 3)
    plane = InformationPlane(net, ["1", "2"], data, bins=5, low={"1": 0.0, "2": 0.0}, softmax=["2"])
    with pytest.raises(BadData, match="record"):
        plane.compression_score()
    plane.record(0)
    with torch.no_grad():
        relu = net[1](net[0](data.x))
    by_hand = binned_information_bits(relu, data.label, adaptive_bin_edges(relu, bins=5, low=0.0))
    assert plane.points["1"][0] == by_hand
    assert plane.compression_score() == {"1": 0.0, "2": 0.0}
    nn.init.zeros_(net[2].weight)
    plane.record(1)
    assert plane.compression_score() == {"1": 0.0, "2": 1.0}
    assert [row["epoch"] for row in plane.rows()] == [0, 1, 0, 1]
    assert plane.rows()[0] == {"epoch": 0, "layer": "1", "input": float(by_hand.input), "label": float(by_hand.label)}
    assert net.training


def test_plane_with_another_estimator():
    net = nn.Sequential(nn.Linear(4, 2), nn.Tanh())
    x, labels = draw(50, 4).float(), torch.arange(50) % 3
    plane = InformationPlane(net, ["1"], (x, labels), estimator=partial(kde_information, variance=0.1))
    plane.record(0)
    assert plane.points["1"][0] == kde_information(net(x), labels, variance=0.1)


def test_refusals():
    values, labels = torch.rand(4, 2), torch.zeros(4).long()
    with pytest.raises(BadSetting, match="at least 1"):
        adaptive_bin_edges(values, bins=0)
    with pytest.raises(BadSetting, match="lower end"):
        adaptive_bin_edges(values - 5, low=0.0)
    with pytest.raises(BadData, match="not finite"):
        adaptive_bin_edges(values / 0)
    with pytest.raises(BadData, match="empty"):
        adaptive_bin_edges(values[:0])
    with pytest.raises(BadData, match="labels"):
        binned_information_bits(values, labels[:3], torch.zeros(1))
    with pytest.raises(BadData, match="whole numbers"):
        pattern_entropy_bits(values)
    with pytest.raises(BadSetting, match="bound"):
        kde_information(values, labels, bound="middle")
    with pytest.raises(BadSetting, match="positive"):
        kde_information(values, labels, variance=0.0)
    with pytest.raises(BadData, match="classes"):
        InformationPlane(nn.Identity(), [""], Batch(values, labels))
