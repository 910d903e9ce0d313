import math
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.probes import class_stats, gof_spectrum, minority_threshold, nc1, nc2, nc3, self_duality

STORED = np.load(Path(__file__).parents[1] / "vectors" / "neural-collapse.npz")


@pytest.fixture(params=["bal", "imb", "raw"])
def case(request):
    prefix = f"{request.param}_"
    return {k.removeprefix(prefix): torch.from_numpy(np.asarray(STORED[k])) for k in STORED.files if k.startswith(prefix)}


def test_reference_vectors(case):
    depth, decays = int(case["depth"]), {"weight_decay": float(case["wd"]), "feature_decay": float(case["fd"])}
    weight = reduce(lambda found, i: case[f"fc{i}"] @ found, range(1, depth), case["fc0"])
    stats = class_stats(case["H"], case["y"])
    ends = gof_spectrum(case["counts"], depth=depth, **decays)
    assert torch.equal(stats.counts, case["counts"])
    torch.testing.assert_close(ends.layer, case["s_pred"], rtol=1e-6, atol=0)
    expected = {
        "NC1": (nc1(case["H"], case["y"]), 1e-9),
        "NC2_W_GOF": (nc2(weight, target=ends.classifier), 1e-5),
        "NC3_WH_GOF": (nc3(weight, stats.means, target=ends.product), 1e-5),
        "NC3_W_minus_H": ((weight - (ends.classifier / ends.product)[:, None] * stats.means).norm(), 1e-5),
        "NC2_H_GOF_unnormalised": ((stats.means @ stats.means.T - torch.diag(ends.features)).norm(), 1e-5),
        "NC2_ETF_W": (nc2(weight), 1e-9),
        "NC2_ID_W": (nc2(weight, target="of"), 1e-9),
        "NC3_ETF_WH": (nc3(weight, stats.means - stats.mean), 1e-7),
        "NC3_ID_WH": (nc3(weight, stats.means, target="of"), 1e-9),
    }
    for name, (found, rtol) in expected.items():
        torch.testing.assert_close(found, case[name], rtol=rtol, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_nc1_is_the_trace_of_the_textbook():
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 7, dtype=torch.float64, generator=g), torch.arange(60) % 4
    features += 2 * torch.randn(4, 7, dtype=torch.float64, generator=g)[labels]
    counts, means, mean = class_stats(features, labels)
    apart = features - means[labels]
    within, between = apart.T @ apart / 60, (means - mean).T @ (means - mean) / 4
    expected = torch.trace(within @ torch.linalg.pinv(between)) / 4
    torch.testing.assert_close(nc1(features, labels), expected, rtol=1e-9, atol=0)
    halves = [nc1(features[part], labels[part], stats=class_stats(features, labels)) for part in (slice(30), slice(30, 60))]
    torch.testing.assert_close(sum(halves) / 2, expected, rtol=1e-9, atol=0)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=g)).Q
    torch.testing.assert_close(nc1(5 * features @ turn, labels), expected, rtol=1e-9, atol=0)
    assert counts.tolist() == [15] * 4


def test_nc1_in_single_precision_of_features_far_from_zero():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4000,), generator=g)
    features = (torch.randn(3, 64, generator=g)[labels] + 0.3 * torch.randn(4000, 64, generator=g) + 2).relu()
    torch.testing.assert_close(nc1(features, labels).double(), nc1(features.double(), labels), rtol=1e-3, atol=0)


def test_frames_are_recognised():
    k = 5
    simplex = torch.eye(k, dtype=torch.float64) - 1 / k
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q[:k]
    rows = 3 * simplex @ turn
    assert nc2(rows) < 1e-12
    assert nc3(rows, 7 * rows) < 1e-12
    assert self_duality(rows, 7 * rows) < 1e-12
    assert float(nc2(rows, target="of")) == pytest.approx(math.sqrt(2 - 2 * math.sqrt((k - 1) / k)), abs=1e-12)
    lengths = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    frame = lengths.sqrt()[:, None] * turn
    assert nc2(frame, target=lengths) < 1e-12
    assert nc2(frame, target="of") > 0.3


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_lengths_minimise_and_are_stationary(depth):
    counts, wd, fd = [40, 20, 9, 9], 2e-3, 3e-3
    total = sum(counts)
    ends = gof_spectrum(counts, depth=depth, weight_decay=wd, feature_decay=fd)
    x = (ends.classifier / (total * fd)) ** (1 / depth)
    b = depth * total * (total * wd**depth * fd) ** (1 / depth) / torch.tensor(counts).double()
    grid = torch.linspace(0, 20, 200_001, dtype=torch.float64)[:, None]

    def value(at):
        return 1 / (at**depth + 1) + b * at

    assert (value(x) <= value(grid).amin(0) + 1e-7).all()
    alive = x > 0
    slope = depth * x ** (depth - 1) / (x**depth + 1) ** 2
    torch.testing.assert_close(slope[alive], b[alive], rtol=1e-9, atol=0)
    assert ends.layer[2] == ends.layer[3]
    assert (ends.layer.diff() <= 0).all()
    torch.testing.assert_close(ends.product, ends.features.sqrt() * ends.classifier.sqrt())


def test_one_layer_in_closed_form():
    counts, wd, fd = torch.tensor([30.0, 10, 1], dtype=torch.float64), 0.02, 0.01
    squared = 41 * fd * ((counts / (41**2 * wd * fd)).sqrt() - 1).clamp(min=0)
    found = gof_spectrum(counts, depth=1, weight_decay=wd, feature_decay=fd)
    torch.testing.assert_close(found.classifier, squared, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_threshold_is_where_a_class_vanishes(depth):
    settings = {"depth": depth, "weight_decay": 0.01, "feature_decay": 0.02}
    least = minority_threshold(100, **settings)
    for n, there in ((1.01 * least, True), (0.99 * least, False)):
        counts = torch.tensor([100 - n, n], dtype=torch.float64)
        assert (gof_spectrum(counts, **settings).layer[1] > 0) == there


def test_refusals():
    with pytest.raises(BadData, match="features are"):
        class_stats(torch.rand(4, 2), torch.zeros(3).long())
    with pytest.raises(BadSetting, match="positive"):
        gof_spectrum([3, 0], depth=1, weight_decay=0.1, feature_decay=0.1)
    with pytest.raises(BadSetting, match="etf"):
        nc2(torch.eye(3), target="simplex")
    with pytest.raises(BadSetting, match="2 lengths"):
        nc2(torch.eye(3), target=torch.ones(2))
    assert nc1(torch.ones(4, 2), torch.tensor([0, 0, 1, 1])) == math.inf
