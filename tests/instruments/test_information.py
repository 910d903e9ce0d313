"""The information plane through the whole instrument: the parts' figures, what is chosen, checkpoints, refusals, and a stop."""

import math

import pytest
import torch
from probed import LABELS, PICTURES, kept_run, stopped
from torch import nn

import sfumato
from sfumato.errors import BadData, BadSetting, Diverged, Interrupted
from sfumato.instruments import Probe
from sfumato.instruments.information import _words
from sfumato.probes import adaptive_bin_edges, binned_information_bits, kde_information


def net(seed=0, width=3, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, width), *middle, nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def data():
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    return [(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())]


@pytest.mark.parametrize("size", [90, 17])
def test_figures_are_those_of_the_parts(data, size):
    model, (x, y) = net(norm=True), data[0]
    model(x)  # running statistics that are not those of a batch
    model.eval()
    found = sfumato.probe("information", model, data, batch_size=size, bins=7)
    first, narrow = model[:2](x).detach(), model[:5](x).detach()
    assert narrow.min() == 0
    activity = {"1 (Tanh)": (first, None), "4 (ReLU)": (narrow, 0.0), "output": (model(x).softmax(1).detach(), None)}
    assert [row["layer"] for row in found.numbers["layers"]] == ["1 (Tanh)", "4 (ReLU)", "output"]
    for row in found.numbers["layers"]:
        t, low = activity[row["layer"]]
        bins, kde = binned_information_bits(t, y, adaptive_bin_edges(t, bins=7, low=low)), kde_information(t, y)
        for about in ("input", "label"):
            assert row["bins"][about] == pytest.approx(float(getattr(bins, about)), abs=0.05)
            assert row["kde"][about] == pytest.approx(float(getattr(kde, about)) / math.log(2), abs=1e-2)
    shares = torch.bincount(y).double() / 90
    assert found.numbers["classes"] == pytest.approx(float(-(shares * shares.log2()).sum()))
    assert any("running statistics" in note for note in found.notes)
    assert any("keeps more checkpoints" in note for note in found.notes)


def test_layers_units_and_noise_can_be_chosen(data):
    found = sfumato.probe("information", net(), data, layers="0", units=5, noise=0.5)
    row = found.numbers["layers"][0]
    assert (row["layer"], row["size"], row["units"]) == ("0 (Linear)", 40, 5)
    assert any("of 0 (Linear) only 5 units" in note for note in found.notes)
    assert any("variance 0.5" in note for note in found.notes)
    again, other = (sfumato.probe("information", net(), data, layers="0", units=5, noise=0.5, seed=s) for s in (0, 1))
    assert again.numbers["layers"] == found.numbers["layers"]
    assert other.numbers["layers"][0]["kde"] != row["kde"]


def test_words_say_what_saturated_layers_are_worth():
    def layer(name, bins, kde):
        return {"layer": name, "bins": {"input": bins, "label": 1.0}, "kde": {"input": kde, "label": 1.0}}

    numbers = {"samples": 512, "most": 9.0, "classes": 2.0, "layers": [layer("wide", 9.0, 9.0), layer("output", 9.0, 9.0)]}
    assert "says nothing of the model" in _words(numbers)
    numbers["layers"][1] = layer("output", 9.0, 3.0)
    assert "1 of 2 layers tells all samples apart" in _words(numbers)
    assert "By Gaussian noise output keeps 3.00 of 9.00 bits about the sample and 1.00 of 2.00" in _words(numbers)
    numbers["layers"][1] = layer("output", 4.0, 3.0)
    numbers["checkpoints"] = [{"step": 0}, {"step": 30}]
    numbers["lost"] = {"bins": {"wide": 0.0, "output": 0.25}}
    assert "output compressed most between steps 0 and 30: it lost 25%" in _words(numbers)
    numbers["lost"]["bins"]["output"] = 0.02
    assert "No layer compressed" in _words(numbers)


def test_a_run_is_followed_over_its_checkpoints(tmp_path):
    path, methods = kept_run(tmp_path)
    options = {"samples": 20, "device": "cpu", "minutes": None, "units": 8}
    found = sfumato.probe("information", path, (PICTURES, LABELS), **options)
    table = found.numbers["checkpoints"]
    assert [row["step"] for row in table] == [10, 20, 30]
    for method, row in zip(methods, table):
        assert row["layers"] == sfumato.probe("information", method, (PICTURES, LABELS), **options).numbers["layers"]
    assert table[-1]["layers"] == found.numbers["layers"]
    for i, layer in enumerate(found.numbers["layers"]):
        course = [row["layers"][i]["kde"]["input"] for row in table]
        assert found.numbers["lost"]["kde"][layer["layer"]] == pytest.approx(1 - course[-1] / max(course))
    two = sfumato.probe("information", path, (PICTURES, LABELS), checkpoints=1, **options)
    assert [row["step"] for row in two.numbers["checkpoints"]] == [10, 30]
    assert Probe("information", path, (PICTURES, LABELS), samples=20, device="cpu", minutes=1e-9).plan.chosen["checkpoints"] == 0
    sfumato.report.write_probe_report(found, tmp_path / "page.html")
    assert "Over training" in (tmp_path / "page.html").read_text()


def test_samples_are_left_out_where_the_time_or_the_memory_is_short():
    x = torch.randn(200, 2)
    short = Probe("information", net(), [(x, torch.arange(200) % 3)], minutes=1e-9).plan
    assert short.chosen["samples"] == 64
    assert any("only 64 samples" in note for note in short.notes)
    small = Probe("information", net(), [(x, torch.arange(200) % 3)], minutes=None, memory=64 * 40 * 100 / 1e9).plan
    assert small.chosen["samples"] == 100


def test_refusals(data):
    x, y = data[0]
    with pytest.raises(BadData, match="information needs a class label with every sample"):
        sfumato.probe("information", nn.Linear(2, 1), [(x, x[:, :1])])
    with pytest.raises(BadData, match="at least two classes"):
        sfumato.probe("information", net(), [(x, torch.zeros_like(y))])
    with pytest.raises(BadSetting, match="there is no layer 'hidden'"):
        sfumato.probe("information", net(), data, layers="hidden")
    broken = net()
    broken[0].weight.data[0, 0] = 1e30  # one sample has x = 0, and the first is looked at before anything is measured
    broken[2].weight.data[0, 0] = math.inf
    zero = lambda out, _: (out * 0).nan_to_num().sum()  # noqa: E731
    with pytest.raises(Diverged, match="not finite"):
        sfumato.probe("information", broken, data, loss=zero)


def test_a_stop_gives_what_was_measured(data, monkeypatch):
    ready = Probe("information", net(), data, batch_size=45, minutes=None)
    with pytest.raises(Interrupted, match="before anything"):
        stopped(ready, 2, monkeypatch)  # both batches were read, no layer was measured
    found = stopped(ready, 4, monkeypatch)
    assert found.interrupted
    assert found.numbers["layers"] == ready.run().numbers["layers"][:2]
    assert "2 of 3 layers were measured" in found.notes


def test_a_stop_leaves_whole_checkpoints(tmp_path, monkeypatch):
    path, _ = kept_run(tmp_path)
    ready = Probe("information", path, (PICTURES, LABELS), samples=20, batch_size=20, device="cpu", minutes=None)
    one = 1 + ready.plan.chosen["layers"]
    found = stopped(ready, 2 * one + 2, monkeypatch)
    assert [row["step"] for row in found.numbers["checkpoints"]] == [10, 30]
