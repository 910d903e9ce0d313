import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.data import symmetric_rule_12bit
from sfumato.engine.lab import Lab
from sfumato.errors import BadSetting
from sfumato.papers.dynamics import adaptive_information as page
from sfumato.probes import adaptive_bin_edges


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("unit", page.UNITS)
def test_networks_start_as_in_the_paper_and_bins_fit_their_range(unit):
    net = page.network(unit, generator=generator())
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linears] == [10, 7, 5, 4, 3, 2]
    for m in linears:
        std = page.UNITS[unit].scale / m.in_features**0.5
        assert m.weight.abs().max() <= 2 * std
        assert not m.bias.any()
    wide = page.network(unit, (400,), generator=generator()).hidden1[0].weight
    assert float(wide.std()) == pytest.approx(0.8796 * page.UNITS[unit].scale / 12**0.5, rel=0.05)  # cut at two deviations
    activity = net.hidden1(symmetric_rule_12bit().x)
    assert len(adaptive_bin_edges(activity, low=page.UNITS[unit].low)) == 32


@pytest.mark.parametrize("unit", ["prelu", "elu"])
def test_networks_train_together_as_if_alone(unit):
    task = symmetric_rule_12bit()
    x, y = task.x[1900:2100], task.label[1900:2100]
    together = [page.network(unit, generator=generator(seed)) for seed in range(3)]
    alone, penalty = copy.deepcopy(together[1]), 0.1
    seen = []
    page.train_together(
        together, (x, y), at=[0, 2, 3], record=seen.append, l2=torch.tensor([0.0, penalty, 0.0]), lr=0.01, batch_size=64,
        generator=generator(),
    )  # fmt: skip
    assert seen == [0, 2, 3]
    optimizer, order = torch.optim.Adam(alone.parameters(), 0.01), generator()
    matrices = [m.weight for m in alone.modules() if isinstance(m, nn.Linear)][:-1]
    for _ in range(3):
        for rows in torch.randperm(200, generator=order).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(alone(x[rows]), y[rows]) + penalty / 2 * sum(w.square().sum() for w in matrices)
            loss.backward()
            optimizer.step()
    for found, expected in zip(together[1].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_recorded_epochs():
    epochs = page.epochs_to_record(800)
    assert epochs[0] == 0
    assert epochs[-1] == 800
    assert 14 <= len(epochs) <= 18
    assert page.epochs_to_record(1) == [0, 1]


def test_correlation():
    a = torch.tensor([1.0, 2.0, 4.0])
    assert page.correlation(a, -3 * a) == pytest.approx(-1)
    assert page.correlation(a, torch.ones(3)) == 0


def test_an_unknown_unit_is_refused():
    with pytest.raises(BadSetting, match="relu"):
        page.network("rellu")


def test_penalty_in_small(monkeypatch):
    monkeypatch.setattr(page, "NETWORKS", 2)
    monkeypatch.setattr(page, "LR", 0.01)
    monkeypatch.setattr(page, "L2", 0.05)
    lab = Lab(0, budget=0.02)
    figures = page.penalty(lab)
    layers = "compression of layers 3 to 5"
    assert figures["relu, L2"][layers] > figures["relu"][layers] + 0.1
    assert all(f["test accuracy"] > 0.7 for f in figures.values())
    assert all(curve["y"][0] <= 12 for curve in lab.curves)


def test_compression_in_small(monkeypatch):
    monkeypatch.setattr(page, "NETWORKS", 1)
    figures = page.compression(Lab(0, budget=0.003))
    assert set(figures) == {"none", "relu", "tanh"}
    assert all(0 <= value <= 1 for arm in figures.values() for value in arm.values())


def test_networks_that_learned_nothing_do_not_count():
    task = symmetric_rule_12bit()
    nets = [page.network("relu", generator=generator(seed)) for seed in range(2)]
    seen = page.planes(nets, "relu", (task.x, task.label))
    for epoch in range(2):
        for plane in seen:
            plane.record(epoch)
        for p in nets[1].hidden4.parameters():  # dies
            nn.init.zeros_(p)
    runs = page.Trained(seen, torch.tensor([0.9, 0.5]))
    assert runs.scores()["hidden4"].tolist() == [0.0, 1.0]
    figures = runs.figures()
    assert figures["compression of layer 4"] == 0.0
    assert figures["test accuracy"] == pytest.approx(0.9)
    assert figures["share that learned"] == 0.5


def test_last_layer_in_small(monkeypatch):
    monkeypatch.setattr(page, "RUNS", 3)
    figures = page.last_layer(Lab(0, budget=0.003))
    assert {"last layer", "hidden layers", "none"} < set(figures)
    assert all(abs(f["correlation with test accuracy"]) <= 1 for f in figures.values())


@pytest.mark.slow
def test_a_penalty_compresses():
    scores = page.trained(Lab(0), "relu", 2, (0.0, page.L2)).scores()
    assert (scores["hidden4"][2:] > scores["hidden4"][:2] + 0.1).all()
