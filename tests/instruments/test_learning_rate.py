"""Learning rates through the whole instrument: closed forms, trials that find the edge, rates that are moved."""

import math

import pytest
import torch
import torch.nn.functional as F
from probed import stopped
from torch import nn

import sfumato
from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments import Probe
from sfumato.instruments.rate_findings import power_of, sgd_limit
from sfumato.method import Loss, Method, MethodConfig
from sfumato.optim import lr_for_batch
from sfumato.probes import effective_batch, per_sample_grads, spiked_wigner


def half_squares(out, target):
    return F.mse_loss(out, target) / 2


def regression(count=60, d=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, d, dtype=torch.float64, generator=generator)
    return nn.Linear(d, 1, bias=False).double(), [(x, torch.ones(count, 1, dtype=torch.float64))]


def alike(curvature=8.0):
    """Every sample has the same Hessian, so all batches do: a rate of 2 / curvature is the edge."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    sign = (torch.arange(32) % 2 * 2 - 1).double()[:, None]
    return model, [(math.sqrt(curvature) * sign, torch.zeros(32, 1, dtype=torch.float64))]


@pytest.mark.parametrize("size", [60, 7])
def test_spectrum_and_noise_of_a_linear_model_are_the_closed_forms(size):
    model, data = regression()
    x = data[0][0]
    outer = x[:, :, None] * x[:, None]
    found = sfumato.probe("learning-rate", model, data, loss=half_squares, steps=0, batches="3,12", batch_size=size, momentum=0.5)
    numbers = found.numbers
    top = float(torch.linalg.eigvalsh(outer.mean(0))[-1])
    assert numbers["largest"]["value"] == pytest.approx(top)
    assert numbers["ceiling"] == pytest.approx(3 / top)
    apart = outer - outer.mean(0)
    a_sample = float(apart.square().sum() / 5 / 59)  # v of one sample, along a direction on average
    assert numbers["noise"]["along_random_directions"] == pytest.approx(a_sample, rel=0.5)
    for row in numbers["batches"]:
        assert row["effective"] == effective_batch(row["batch"], 60)
        assert len(row["values"]) == row["draws"] == min(16, 60 // row["batch"])
        mean = sum(row["values"]) / row["draws"]
        assert row["largest"]["value"] == pytest.approx(mean)
        assert mean > top
        assert row["sgd"] == pytest.approx(3 / mean)
        assert abs(row["noise"]["value"] - a_sample / row["effective"]) < 5 * row["noise"]["stderr"]
        v = numbers["noise"]["along_random_directions"] / row["effective"]
        if top**2 > v:
            assert row["theory"] == pytest.approx(3 / float(spiked_wigner(torch.tensor(top).double(), v)))
    grads = per_sample_grads(model, half_squares, data)
    noise = numbers["gradient_noise"]
    assert abs(noise["trace"] - float(grads.var(0).sum())) < 4 * noise["stderr"]
    square = float(grads.mean(0).square().sum()) - noise["trace"] / 60
    assert noise["scale"] == pytest.approx(noise["trace"] / square if square > 0 else math.inf)
    assert list(numbers["power"]) == ["sgd, by curvature"]
    assert "trials" not in numbers


def test_draws_go_by_the_seed():
    model, data = regression()
    a, b, c = (sfumato.probe("learning-rate", model, data, loss=half_squares, steps=0, seed=s).numbers for s in (0, 0, 1))
    assert a["batches"] == b["batches"]
    assert a["batches"] != c["batches"]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_trials_find_the_edge(momentum):
    model, data = alike()
    found = sfumato.probe("learning-rate", model, data, loss=half_squares, steps=40, momentum=momentum, minutes=None)
    numbers, edge = found.numbers, 2 * (1 + momentum) / 8
    assert numbers["ceiling"] == pytest.approx(edge)
    assert numbers["turning_batch"] == pytest.approx(0, abs=1e-9)
    assert "the batch hardly matters" in found.verdict
    assert [t["batch"] for t in numbers["trials"]["sgd"]] == [2, 8]
    for one in numbers["trials"]["sgd"]:
        assert one["bound"] == ""
        assert edge / 1.25 < one["rate"] <= edge
    assert numbers["trials"]["share"] == 0.9
    assert numbers["trials"]["first"] == pytest.approx(4)
    assert float(model.weight) == 1, "a copy was trained"
    assert all(p.grad is None for p in model.parameters())


def test_at_a_minimum_a_trial_need_not_fall():
    model, (pair,) = alike()
    noisy = pair[0] + 0, pair[0] * 1.0 + torch.randn(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = (noisy[0] * noisy[1]).mean() / noisy[0].square().mean()
    nn.init.constant_(model.weight, float(weight))
    numbers = sfumato.probe("learning-rate", model, [noisy], loss=half_squares, steps=30, batches="16", minutes=None).numbers
    assert numbers["trials"]["share"] == 1.1
    assert numbers["gradient_noise"]["scale"] == math.inf
    assert numbers["trials"]["sgd"][0]["bound"] == ""
    assert numbers["trials"]["adam"] == [{"batch": 16, "rate": 1.0, "bound": "at least"}]  # no step of Adam leads far from here


def test_a_tuned_rate_is_moved():
    model, data = regression()
    options = {"loss": half_squares, "steps": 0, "tuned_lr": 0.01, "tuned_batch": 32}
    found = sfumato.probe("learning-rate", model, data, **options)
    numbers = found.numbers
    top, risen = numbers["largest"]["value"], numbers["noise"]["by_the_rise"]
    moved = {row["batch"]: row for row in numbers["moved"]}
    assert list(moved) == [1, 4, 16, 32, 64, 256, 1024, 4096]
    for batch, row in moved.items():
        assert row["sgd_linear"] == pytest.approx(0.01 * batch / 32)
        assert row["adam_root"] == pytest.approx(0.01 * math.sqrt(batch / 32))
        assert row["sgd"] == pytest.approx(lr_for_batch(0.01, 32, batch, lam1=top, v0=risen / 32))
        assert row["limit"] == pytest.approx(sgd_limit(batch, numbers["ceiling"], top, risen))
    scale = numbers["gradient_noise"]["scale"]
    assert moved[4]["adam"] == pytest.approx(0.01 * math.sqrt((1 + scale / 32) / (1 + scale / 4)))
    assert any("From 0.01 at a batch of 32" in (section.text or "") for section in found.sections)


def test_the_page_tells_how_the_theory_came_out(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    found = sfumato.probe("learning-rate", net, [(x, x[:, :3].argmax(1))], steps=10, batches="4,16", minutes=None)
    assert found.numbers["explained"] < 0.5
    assert "The theory does not hold here" in found.verdict
    notes = " ".join(found.notes)
    assert "sfumato show batch-size-scaling" in notes
    assert "not reproduced" in notes
    assert "normalises each batch by its own statistics" in notes
    page = sfumato.report.write_probe_report(found, tmp_path / "page.html").read_text()
    assert "Learning rate of Sequential" in page
    assert "theory, random directions" in page


def test_powers():
    assert power_of([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert power_of([1, 4], [3.0, 6.0]) == pytest.approx(0.5)
    assert math.isnan(power_of([1], [3.0]))


def test_a_methods_own_loss_is_drawn_in_batches_too():
    class Mean(Method):
        class Config(MethodConfig):
            batch_size: int = 16

        def __init__(self, config=None):
            super().__init__(config)
            self.mean = nn.Parameter(torch.zeros(3, 1, 1))

        def loss(self, batch, ctx):
            hidden = torch.rand(len(batch), 1, 8, 8, generator=ctx.generator) < 0.5
            return Loss(((batch.x - self.mean).square() * hidden).mean(), len(batch))

    pictures = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = sfumato.probe("learning-rate", Mean(), pictures, steps=5, batches="2,6", minutes=None)
    assert found.numbers["largest"]["value"] == pytest.approx(2 / 3 / 2, rel=0.1)  # half of the pixels count
    assert all(row["largest"]["stderr"] > 0 for row in found.numbers["batches"])  # by the noise alone
    assert found.numbers["gradient_noise"]["trace"] > 0
    assert found.numbers["trials"]["sgd"][0]["rate"] > 0


def test_no_curvature_is_told():
    model, data = alike()
    down = lambda out, _: -out.square().mean()  # noqa: E731
    found = sfumato.probe("learning-rate", model, data, loss=down, steps=0)
    assert "the largest eigenvalue is not above zero" in found.verdict


def test_what_fits_the_time_is_chosen():
    model, data = regression(400)
    short = Probe("learning-rate", model, data, minutes=1e-9).plan
    assert short.chosen["samples"] == 32
    assert set(short.chosen["draws"].values()) == {4}
    assert short.chosen["trials for batches of"] == []
    assert any("no time for trial trainings" in note for note in short.notes)
    long = Probe("learning-rate", model, data, minutes=None).plan
    assert long.chosen["batch sizes"] == [2, 8, 32] == long.chosen["trials for batches of"]
    assert long.chosen["draws"] == {2: 16, 8: 16, 32: 12}
    assert Probe("learning-rate", model, data, minutes=1e-9, steps=3).plan.chosen["trials for batches of"] != []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batches": "2,x"}, "whole numbers with commas"),
        ({"batches": "0,4"}, "batches of 1 to 30"),
        ({"batches": "31"}, "batches of 1 to 30"),
        ({"memory": 1e-9}, "do not fit the memory"),
        ({"momentum": 1.0}, "less than 1"),
    ],
)
def test_refused_settings(settings, told):
    model, data = regression()
    with pytest.raises(BadSetting, match=told):
        Probe("learning-rate", model, data, **settings)


def test_too_few_samples_are_refused():
    model, data = regression(7)
    with pytest.raises(BadData, match="from at least 8 samples"):
        Probe("learning-rate", model, data)


def test_a_stop_gives_what_was_measured(monkeypatch):
    model, data = regression()
    ready = Probe("learning-rate", model, data, loss=half_squares, steps=5, minutes=None)
    with pytest.raises(Interrupted, match="before anything"):
        stopped(ready, 3, monkeypatch)
    whole = 1 + 5 + 4  # gradient, Lanczos steps, directions
    found = stopped(ready, whole + 2, monkeypatch)
    assert found.interrupted
    assert found.numbers["batches"] == []
    assert "no batch was measured" in found.verdict
    found = stopped(ready, whole + ready.plan.chosen["draws"][2] * whole + 2, monkeypatch)
    assert [row["batch"] for row in found.numbers["batches"]] == [2]
    assert "ceiling" in found.numbers
