"""Curvature through the whole instrument: exact spectra of small models, what is chosen for a time, and stopping early."""

import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfumato
from sfumato.errors import BadSetting, Interrupted
from sfumato.instruments import Probe
from sfumato.instruments.curvature import _words, choose
from sfumato.probes import EmpiricalFisherOperator, GGNOperator, HessianOperator

SIZE = 27


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    return [(x[:12], torch.arange(12) % 3), (x[12:], torch.arange(18) % 3)]


KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


@pytest.fixture(scope="module")
def full(net, data):
    """As many Lanczos steps as there are parameters: nothing is left to estimate but the trace."""
    return sfumato.probe("curvature", net, data, steps=SIZE, starts=2, top=SIZE, batch_size=20)


@pytest.mark.parametrize("name", KINDS)
def test_spectrum_of_a_small_model_is_exact(net, data, full, name):
    dense = KINDS[name](net, F.cross_entropy, data).dense()
    true = torch.linalg.eigvalsh(dense)
    found = full.numbers[name]
    rank = int((true.abs() > 1e-10 * true.abs().max()).sum())
    for end, values in (("largest", true.flip(0)), ("smallest", true)):
        outer = values[values.abs() > 1e-10 * true.abs().max()]
        outer = outer[outer > 0] if end == "largest" else outer[outer < 0]
        got = torch.tensor(found[end]["values"][: len(outer)], dtype=torch.float64)
        torch.testing.assert_close(got, outer, atol=1e-9, rtol=0)
        assert max(found[end]["bounds"][: len(outer)], default=0) < 1e-10
    for start in found["starts"]:
        assert start["weights"].sum().item() == pytest.approx(1)
        assert len(start["nodes"]) >= min(rank, SIZE)
        assert (start["weights"] @ start["nodes"]).item() * SIZE == pytest.approx(start["trace"])
    t, phi = (torch.as_tensor(found["density"][of], dtype=torch.float64) for of in ("t", "phi"))
    assert torch.trapezoid(phi, t).item() == pytest.approx(1, abs=1e-3)
    assert (t[0] < true[0]) & (t[-1] > true[-1])


def test_trace_and_its_layers_are_those_of_the_matrix(net, data):
    found = sfumato.probe("curvature", net, data, operator="ggn", steps=2, starts=100).numbers["ggn"]
    diagonal = GGNOperator(net, F.cross_entropy, data).dense().diag()
    assert abs(found["trace"]["value"] - diagonal.sum()) < 4 * found["trace"]["stderr"]
    layers = {"0": diagonal[:15].sum(), "2": diagonal[15:].sum()}
    for name, true in layers.items():
        assert abs(found["layers"][name]["value"] - true) < 4 * found["layers"][name]["stderr"]
    assert sum(one["value"] for one in found["layers"].values()) == pytest.approx(found["trace"]["value"])


def test_loss_and_gradient_are_those_of_the_data(net, data, full):
    x, y = (torch.cat(t) for t in zip(*data))
    loss = F.cross_entropy(net(x), y)
    length = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]).norm()
    assert full.numbers["loss"] == pytest.approx(loss.item())
    assert full.numbers["gradient_norm"] == pytest.approx(length.item())


def test_words_claim_no_more_than_the_errors_allow():
    def words(largest, smallest, trace=(10.0, 1.0), name="hessian"):
        ends = {end: {"values": [v], "bounds": [b]} for end, (v, b) in (("largest", largest), ("smallest", smallest))}
        return _words(name, {**ends, "trace": dict(zip(("value", "stderr"), trace))})

    assert words((4.0, 0.1), (-1.0, 0.5)).startswith(
        "Gradient descent on this loss is stable up to a learning rate of 2 / 4 = 0.5."
    )
    assert "not at a minimum" in words((4.0, 0.1), (-1.0, 0.5))
    assert "valley" in words((4.0, 0.1), (0.0, 0.01))
    assert "more Lanczos steps would tell" in words((4.0, 0.1), (0.0, 0.5))
    assert words((4.0, 3.0), (-1.0, 0.5)).startswith("The largest eigenvalue was not found")
    assert "40% of the trace" in words((4.0, 0.1), (0.0, 0.01))
    assert "trace" not in words((4.0, 0.1), (0.0, 0.01), trace=(10.0, float("nan")))
    assert "minimum" not in words((4.0, 0.1), (-1.0, 0.5), name="ggn")


@pytest.mark.parametrize("steps", [4, 8, 15])
def test_short_runs_bound_the_ends_from_inside_and_say_how_well(net, data, steps):
    true = torch.linalg.eigvalsh(HessianOperator(net, F.cross_entropy, data).dense())
    found = sfumato.probe("curvature", net, data, operator="hessian", steps=steps, starts=4).numbers["hessian"]
    top, low = found["largest"], found["smallest"]
    assert top["values"][0] <= true[-1] + 1e-12
    assert low["values"][0] >= true[0] - 1e-12
    assert true[-1] - top["values"][0] <= top["bounds"][0]
    assert low["values"][0] - true[0] <= low["bounds"][0]
    for end in (top, low):
        distances = (torch.tensor(end["values"], dtype=torch.float64)[:, None] - true).abs().amin(1)
        assert (distances <= torch.tensor(end["bounds"], dtype=torch.float64)).all()


def test_chosen_layers_alone(net, data):
    found = sfumato.probe("curvature", net, data, operator="hessian", layers="2", steps=12, starts=1, top=12)
    true = torch.linalg.eigvalsh(HessianOperator(net, F.cross_entropy, data, params=["2.weight", "2.bias"]).dense())
    assert found.about["plan"]["dimension"] == 12
    assert found.numbers["hessian"]["largest"]["values"][0] == pytest.approx(true[-1].item())
    assert set(found.numbers["hessian"]["layers"]) == {"2"}
    with pytest.raises(BadSetting, match="begin with 0, 2"):
        sfumato.probe("curvature", net, data, layers="head")


@pytest.mark.parametrize(("limit", "seconds"), [(120, 0.01), (120, 1.0), (120, 7.0), (30, 3.0)])
def test_what_is_chosen_fits_the_time(limit, seconds):
    steps, starts = choose(limit, seconds, 100)
    assert 0.5 * limit < steps * starts * seconds <= limit or (steps, starts) == (100, 16)
    assert starts <= steps


def test_there_is_always_one_product_and_memory_bounds_the_steps(net, data):
    assert choose(1e-9, 1, 100) == (1, 1)
    tight = Probe("curvature", net, data, memory=2 * 8 * SIZE * 10 / 1e9, minutes=None)
    assert tight.plan.chosen["steps"] == 6
    assert any("memory" in note for note in tight.plan.notes)
    once = sfumato.probe("curvature", net, data, minutes=1e-9, operator="hessian")
    assert (once.about["plan"]["steps"], once.about["plan"]["starts"]) == (1, 1)
    assert once.numbers["hessian"]["trace"]["value"] == once.numbers["hessian"]["starts"][0]["trace"]
    assert any("one start" in note for note in once.notes)
    assert once.headline["largest eigenvalue (Hessian)"] == "not found yet"
    assert [section.title for section in once.sections] == ["Eigenvalues"]


def test_samples_are_left_out_where_the_time_is_short(net):
    x = torch.randn(200, 4, dtype=torch.float64)
    data = [(x, torch.arange(200) % 3)]
    hurried = Probe("curvature", net, data, minutes=1e-9, operator="hessian")
    assert hurried.plan.chosen["samples"] == 16
    found = hurried.run()
    assert found.numbers["loss"] == pytest.approx(F.cross_entropy(net(x[:16]), data[0][1][:16]).item())
    assert any("only 16 samples" in note for note in found.notes)
    assert Probe("curvature", net, data, minutes=1e-9, samples=150).plan.chosen["samples"] == 150
    assert Probe("curvature", net, data, minutes=None).plan.chosen["samples"] == 200


def test_the_seed_decides(net, data):
    runs = [sfumato.probe("curvature", net, data, operator="hessian", steps=5, starts=2, seed=s).as_json() for s in (0, 0, 1)]
    assert runs[0]["numbers"] == runs[1]["numbers"]
    assert runs[0]["numbers"] != runs[2]["numbers"]


def test_the_model_is_left_as_it_was(data):
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    found = sfumato.probe("curvature", net, data, steps=3, starts=1)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert sum("eval mode" in note or "dropout is off" in note for note in found.notes) == 2


class Stopping:
    """A loss that presses Ctrl-C once it was asked often enough."""

    def __init__(self, after):
        self.left = after

    def __call__(self, outputs, targets):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(outputs, targets)


def test_ctrl_c_gives_what_was_measured(net, data):
    settings = {"operator": "hessian", "steps": 5, "starts": 10, "batch_size": 256}
    found = sfumato.probe("curvature", net, data, loss=Stopping(25), **settings)
    assert found.interrupted
    assert 1 <= len(found.numbers["hessian"]["starts"]) < 10
    assert "stopped early" in found.notes[0]
    with pytest.raises(Interrupted, match="before anything"):
        sfumato.probe("curvature", net, data, loss=Stopping(8), **settings)
