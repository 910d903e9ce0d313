"""Kernel alignment through the whole instrument: exact kernels, sketches, checkpoints, what is said, refusals, and a stop."""

import pytest
import torch
import torch.nn.functional as F
from probed import LABELS, PICTURES, kept_run, stopped
from torch import nn

import sfumato
from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments import Probe, alignment
from sfumato.instruments.alignment import TANGENT, _words
from sfumato.probes import kernel_alignment, kernel_similarity, kernel_velocity, ntk


def net(seed=0, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, outputs)).double().train()


@pytest.fixture(scope="module")
def data():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [(x, x[:, :3].argmax(1))]


@pytest.mark.parametrize("size", [40, 7])
def test_kernels_are_those_of_the_parts(data, size):
    model, (x, y) = net(), data[0]
    found = sfumato.probe("alignment", model, data, batch_size=size)
    assert model.training
    model.eval()
    hidden, out = model[:3](x).detach(), model(x).detach()
    kernels = {"2 (Tanh)": hidden @ hidden.T, "output": out @ out.T, TANGENT: ntk(model, x)}
    assert list(found.numbers["kernels"]) == list(kernels)
    for name, k in kernels.items():
        one = found.numbers["kernels"][name]
        assert one["alignment"] == pytest.approx(float(kernel_alignment(k, F.one_hot(y))))
        assert 0 < one["shuffled"] < one["alignment"]
    assert any("dropout is off" in note for note in found.notes)
    assert any("running statistics" in note for note in found.notes)
    assert "only a run with several checkpoints can tell" in found.verdict


def test_numbers_as_targets(data):
    x = data[0][0]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 60)).double()
    for targets in (x[:, :1] @ torch.ones(1, 60).double(), torch.sin(x @ torch.randn(4, 60, dtype=torch.float64))):
        numbers = sfumato.probe("alignment", model, [(x, targets)], kernels="tangent").numbers
        assert list(numbers["kernels"]) == [TANGENT]
        assert numbers["kernels"][TANGENT]["alignment"] == pytest.approx(float(kernel_alignment(ntk(model, x), targets)), rel=0.2)
    narrow = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 12)).double()
    for rows in (40, 8):  # of 8 samples the targets are longer than there are samples
        y = torch.cos(x[:rows] @ torch.randn(4, 12, dtype=torch.float64))
        numbers = sfumato.probe("alignment", narrow, [(x[:rows], y)], kernels="tangent").numbers
        assert numbers["kernels"][TANGENT]["alignment"] == pytest.approx(float(kernel_alignment(ntk(narrow, x[:rows]), y)))


def test_combined_outputs_and_sketches_come_near(data, monkeypatch):
    model, x, y = net(outputs=8), data[0][0], data[0][1]
    exact = float(kernel_alignment(ntk(model, x), F.one_hot(y)))
    monkeypatch.setattr(alignment, "EXACT", 1)
    sketched = sfumato.probe("alignment", model, data, kernels="tangent")
    assert sketched.about["plan"]["width"] == alignment.WIDEST
    assert sketched.numbers["kernels"][TANGENT]["alignment"] == pytest.approx(exact, rel=1e-9)  # wider than there are weights
    monkeypatch.setattr(alignment, "WIDEST", 41)
    monkeypatch.setattr(alignment, "NARROWEST", 41)
    monkeypatch.setattr(alignment, "MOST_OUTPUTS", 6)
    near = [sfumato.probe("alignment", model, data, kernels="tangent", seed=s) for s in range(6)]
    values = torch.tensor([n.numbers["kernels"][TANGENT]["alignment"] for n in near])
    assert values.std() > 1e-3
    assert values.mean().item() == pytest.approx(exact, rel=0.2)
    assert any("summed over: 6 random combinations of the 8" in note for note in near[0].notes)
    assert any("random sketches of 41" in note for note in near[0].notes)


def test_a_run_is_followed_over_its_checkpoints(tmp_path):
    path, methods = kept_run(tmp_path)
    options = {"samples": 20, "device": "cpu", "minutes": None}
    found = sfumato.probe("alignment", path, (PICTURES, LABELS), **options)
    assert [row["step"] for row in found.numbers["checkpoints"]] == [10, 20, 30]
    subject = Probe("alignment", path, (PICTURES, LABELS), **options).subjects[0]
    x = torch.cat([x for x, _ in subject.batches])
    kernels = [ntk(method.network, x) for method in methods]
    for k, row in zip(kernels, found.numbers["checkpoints"]):
        one = row["kernels"][TANGENT]
        assert one["movement"] == pytest.approx(float(kernel_velocity(k, kernels[0])), abs=0.03)
        assert one["similarity"] == pytest.approx(float(kernel_similarity(k, kernels[0])), abs=0.03)
    flat = [torch.cat([p.detach().flatten() for p in method.network.parameters()]) for method in methods]
    moved = float((flat[2] - flat[0]).norm() / flat[0].norm())
    assert found.numbers["weights"]["movement"] == pytest.approx(moved, rel=1e-4)
    assert found.numbers["checkpoints"][0]["kernels"][TANGENT]["movement"] == 0
    assert any("no longer has its first weights" in note for note in found.notes)
    short = sfumato.probe("alignment", path, (PICTURES, LABELS), checkpoints=1, kernels="features", **options)
    assert [row["step"] for row in short.numbers["checkpoints"]] == [10, 30]
    assert TANGENT not in short.numbers["kernels"]
    sfumato.report.write_probe_report(found, tmp_path / "page.html")
    assert "similarity to step 10" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("movement", "similarity", "told"),
    [(0.05, 1.0, "Lazy: "), (3.0, 0.99, "Lazy but for its scale: "), (3.0, 0.5, "Rich: "), (0.3, 0.8, "Between lazy and rich: ")],
)
def test_words(movement, similarity, told):
    one = {"alignment": 0.5, "shuffled": 0.1, "movement": movement, "similarity": similarity}
    numbers = {"kernels": {TANGENT: one}, "checkpoints": [{"kernels": {TANGENT: {"alignment": 0.2}}}]}
    words = _words(numbers, TANGENT, [0, 100])
    assert told in words
    assert "alignment went from 0.20 to 0.50" in words


def test_what_fits_the_time_is_chosen(data):
    x = torch.randn(300, 4, dtype=torch.float64)
    pairs = [(x, x[:, :3].argmax(1))]
    assert Probe("alignment", net(), pairs, minutes=None).plan.chosen["samples"] == 256
    short = Probe("alignment", net(), pairs, minutes=1e-9).plan
    assert short.chosen["samples"] == 32
    assert "weights" not in short.chosen
    assert any("no time for the tangent kernel" in note for note in short.notes)
    asked = Probe("alignment", net(), pairs, minutes=1e-9, kernels="tangent").plan.chosen
    assert (asked["samples"], asked["differentiated"], asked["outputs"]) == (32, 1, 3)


def test_refusals(data):
    x, y = data[0]
    with pytest.raises(BadSetting, match="does not fit the memory twice"):
        sfumato.probe("alignment", net(), data, memory=1e-9)
    with pytest.raises(BadData, match="whose targets differ"):
        sfumato.probe("alignment", net(), [(x, torch.zeros_like(y))])
    with pytest.raises(BadData, match="not these 3"):
        sfumato.probe("alignment", net(), data, samples=3)
    pixels = lambda out, _: out.square().mean()  # noqa: E731
    with pytest.raises(BadData, match="a class or numbers for every sample"):
        sfumato.probe("alignment", net(), [(x, y[:, None].repeat(1, 2))], loss=pixels)


def test_a_stop_gives_what_was_measured(data, tmp_path, monkeypatch):
    ready = Probe("alignment", net(), data, minutes=None)
    with pytest.raises(Interrupted, match="before anything"):
        stopped(ready, 0, monkeypatch)
    found = stopped(ready, 2, monkeypatch)
    assert found.interrupted
    assert list(found.numbers["kernels"]) == ["2 (Tanh)", "output"]
    assert "not every kernel was finished" in found.notes
    path, _ = kept_run(tmp_path)
    ready = Probe(
        "alignment", path, (PICTURES, LABELS), samples=20, batch_size=20, device="cpu", minutes=None, kernels="features"
    )
    assert [row["step"] for row in stopped(ready, 2, monkeypatch).numbers["checkpoints"]] == [10, 30]
