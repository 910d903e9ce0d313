"""The line between two models through the whole instrument: closed forms, permuted units, refusals, and what fits the time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfumato
from sfumato.errors import BadSetting
from sfumato.instruments import Probe
from sfumato.probes import barrier, layerwise_barrier, path_loss


def net(seed=0, width=6, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(3, width), *middle, nn.ReLU(), nn.Linear(width, 4)).double()


@pytest.fixture(scope="module")
def data():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [(x, (x.sum(1) > 0).long() + 2 * (x[:, 0] > 0).long())]


@pytest.mark.parametrize("norm", [False, True])
def test_it_measures_what_its_parts_do(data, norm):
    a, b = net(0, norm=norm), net(1, norm=norm)
    found = sfumato.probe("connectivity", a, data, b, match=False, batch_size=15)
    batches = list(zip(*(t.split(15) for t in data[0])))
    states = a.state_dict(), b.state_dict()
    curve = path_loss(a, *states, F.cross_entropy, batches)
    line = found.numbers["as they are"]
    assert list(found.numbers) == ["as they are"]
    torch.testing.assert_close(line["loss"], curve.loss)
    torch.testing.assert_close(line["error"], curve.error)
    assert line["barrier"]["loss"] == barrier(curve).height
    layers = layerwise_barrier(a, *states, F.cross_entropy, batches, alphas=5)
    assert line["layers"] == pytest.approx({name: one.height for name, one in layers.items()})
    assert any("recomputed" in note for note in found.notes) == norm
    assert not any("eval mode" in note for note in found.notes)


def test_permuted_units_are_no_barrier_once_matched(data):
    a, b = net(0), net(0)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters()):
            q.copy_(p.mul_(6))
        data = [(data[0][0], a(data[0][0]).argmax(1))]  # both are right, and sure of it
        for t in (b[0].weight, b[0].bias):
            t.copy_(t[order])
        b[2].weight.copy_(b[2].weight[:, order])
    found = sfumato.probe("connectivity", a, data, b).numbers
    assert found["as they are"]["barrier"]["loss"] > 0.01
    assert found["units matched"]["barrier"]["loss"] == pytest.approx(0, abs=1e-12)
    assert found["units matched"]["distance"] == pytest.approx(0, abs=1e-12)
    assert found["as they are"]["distance"] > 1


def test_the_verdict_says_what_the_numbers_say(data):
    well = lambda out, _: (out.square() - 1).square().mean()  # noqa: E731 (minima at 1 and -1, height 1 between them)
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(a.weight, 1.0)
    nn.init.constant_(b.weight, -1.0)
    pairs = [(torch.ones(4, 1), torch.ones(4, 1))]
    found = sfumato.probe("connectivity", a, pairs, b, loss=well)
    assert found.numbers["as they are"]["barrier"]["loss"] == pytest.approx(1)
    assert found.numbers["as they are"]["at"]["loss"] == 0.5
    assert found.verdict.startswith("Not linearly connected: the loss rises by at most 1, at 0.5")
    same = sfumato.probe("connectivity", a, pairs, a, loss=well)
    assert same.verdict.startswith("Linearly connected")
    assert same.as_json()["numbers"]["as they are"]["barrier"]["error"] is None  # no classes


def test_models_that_only_one_line_can_be_drawn_for(data):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5).double(), nn.Linear(5, 4).double()

        def forward(self, x):
            x = self.first(x)
            return self.last(x.relu() if x.sum() > 0 else x.tanh())

    found = sfumato.probe("connectivity", Branching(), data, Branching())
    assert list(found.numbers) == ["as they are"]
    assert any("could not be matched" in note for note in found.notes)


def test_unlike_models_are_refused_by_the_first_parameter_that_differs(data):
    with pytest.raises(BadSetting, match=r"0\.weight is \[6, 3\] in A .* and \[7, 3\] in B"):
        sfumato.probe("connectivity", net(0), data, net(0, width=7))
    with pytest.raises(BadSetting, match=r"2\.weight is in A .* and not in B"):
        sfumato.probe("connectivity", net(0), data, net(0, norm=True))
    with pytest.raises(BadSetting, match="two models"):
        sfumato.probe("connectivity", net(0), data)
    with pytest.raises(BadSetting, match="one model"):
        sfumato.probe("curvature", net(0), data, net(1))


def test_what_is_asked_for_is_done(data):
    plan = Probe("connectivity", net(0), data, net(1), alphas=7, layers=0, minutes=1e-9).plan
    assert plan.chosen["positions"] == 7
    assert plan.chosen["groups of layers"] == 0
    assert Probe("connectivity", net(0), data, net(1), minutes=1e-9).plan.chosen["positions"] == 3
    assert Probe("connectivity", net(0), data, net(1), minutes=None).plan.chosen["groups of layers"] == 2
