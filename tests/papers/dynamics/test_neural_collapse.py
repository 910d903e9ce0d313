from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.engine.lab import Lab
from sfumato.papers.dynamics import neural_collapse as page
from sfumato.probes import class_stats, gof_spectrum, nc1, nc2, nc3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_minimiser_is_critical_balanced_and_least(depth):
    settings = {"weight_decay": 2e-3, "feature_decay": 3e-3}
    counts = (12, 6, 3)
    model = page.minimiser(counts, 8, depth, **settings, generator=torch.Generator().manual_seed(0))
    value = model.objective(*settings.values())
    grads = torch.autograd.grad(value, list(model.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 1e-10
    for below, above in zip(model.layers, list(model.layers)[1:]):
        torch.testing.assert_close(above.T @ above, below @ below.T, rtol=0, atol=1e-10)
    ends = gof_spectrum(counts, depth=depth, **settings)
    total = sum(counts)
    x = (ends.classifier / (total * 3e-3)) ** (1 / depth)
    b = depth * total * (total * 2e-3**depth * 3e-3) ** (1 / depth) / torch.tensor(counts).double()
    identity = (torch.tensor(counts) / (2 * total) * (1 / (x**depth + 1) + b * x)).sum()
    torch.testing.assert_close(value.detach(), identity)
    with torch.no_grad():
        stats = class_stats(model.features, model.labels)
        assert nc1(model.features, model.labels) < 1e-20
        assert nc2(model.product(), target=ends.classifier) < 1e-6
        assert nc2(stats.means, target=ends.features) < 1e-6
        assert nc3(model.product(), stats.means, target=ends.product) < 1e-6
        for j in range(1, depth):  # at every layer
            inside = class_stats(model.inputs(j), model.labels).means
            assert nc3(model.product(j), inside, target=ends.product) < 1e-6
    other = page.UnconstrainedFeatures(counts, 8, depth, generator=torch.Generator().manual_seed(1))
    assert other.descend(300, *settings.values()) >= value - 1e-9


def test_objective_of_the_reference():
    v = np.load(Path(__file__).parents[2] / "vectors" / "neural-collapse.npz")
    model = page.UnconstrainedFeatures(v["raw_counts"].tolist(), 8, 3)
    with torch.no_grad():
        order = torch.from_numpy(v["raw_y"]).argsort(stable=True)
        model.features.copy_(torch.from_numpy(v["raw_H"])[order])
        for i, layer in enumerate(model.layers):
            layer.copy_(torch.from_numpy(v[f"raw_fc{i}"]))
        found = model.objective(float(v["raw_wd"]), float(v["raw_fd"]))
    torch.testing.assert_close(found, torch.tensor(float(v["raw_loss"]), dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_bias_makes_a_simplex():
    model = page.UnconstrainedFeatures([6] * 3, 5, 1, bias=True, generator=torch.Generator().manual_seed(0))
    model.descend(1500, 1e-3, 1e-3)
    assert nc2(model.product().detach()) < 0.01
    assert nc2(model.product().detach(), target="of") > 0.3
    torch.testing.assert_close(model.bias.detach(), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.05)


def test_values_of_the_two_layers():
    decay = page.decay_for(0.3, 2)
    assert page.objective_of(decay, 2, keep=True) == pytest.approx(0.12326, abs=2e-5)
    assert page.objective_of(decay, 2, keep=False) == pytest.approx(0.13084, abs=2e-5)
    decay = page.decay_for(0.45, 2)
    assert page.objective_of(decay, 2, keep=True) == pytest.approx(0.15897, abs=2e-5)
    assert page.objective_of(decay, 2, keep=False) == pytest.approx(0.16061, abs=2e-5)


def test_claims_in_small(monkeypatch):
    monkeypatch.setattr(page, "DEPTHS", (1,))
    figures = page.frames(Lab(0, budget=0.05))["1 layer"]
    assert figures["to the general frame"] < 0.1 < figures["to equal lengths"] < figures["to the simplex"]
    minority = page.minority(Lab(0, budget=0.05))
    assert minority["vanished"]["length of the smallest"] < 0.1 < minority["kept"]["length of the smallest"]
    assert minority["two layers"]["advantage"] > 0 > minority["two layers"]["advantage above"]
    network = page.network(Lab(0, budget=0.02))
    assert network["training"]["accuracy"] > 0.5
    assert {"general frame", "equal lengths", "simplex"} < set(network)
