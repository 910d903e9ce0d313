"""The basis of a denoiser through the whole instrument: closed forms, runs, what is chosen for a time, refusals, a stop."""

import signal

import pytest
import torch
from torch import nn

import sfumato
from sfumato.data import Batch
from sfumato.errors import BadData, BadSetting
from sfumato.instruments import Probe
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.harmonic_bases import BlindDenoiser
from sfumato.papers.masking.mae import MAE
from sfumato.papers.restoration.cbsn import CBSN
from sfumato.probes import denoiser_basis
from sfumato.report import write_probe_report


class Shrink(nn.Module):
    """A known shrinkage of 4 x 4 pixels, plus a constant."""

    def __init__(self, values, constant=0.0):
        super().__init__()
        q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
        self.matrix, self.constant = nn.Parameter(q * torch.as_tensor(values) @ q.T), constant

    def forward(self, y):
        return (y.flatten(1) @ self.matrix).view_as(y) + self.constant


def _blind(**over):
    torch.manual_seed(0)
    return BlindDenoiser(BlindDenoiser.Config.small(**{"channels": 1, "image_size": 8, "width": 4, **over})).eval()


X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SMALL = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_shrinkage_has_the_basis_that_it_was_made_of(method, tmp_path):
    values = torch.linspace(1, 0, 16)
    found = sfumato.probe("harmonic", Shrink(values), SMALL, method=method, vectors=4, sigma=0.2)
    assert len(found.numbers["pictures"]) == 3
    for one in found.numbers["pictures"]:
        assert one["values"][:4] == pytest.approx(values[:4].tolist(), abs=1e-4)
        assert one["effective_rank"] == pytest.approx(8, abs=1e-4 if method == "dense" else 2.0)
        assert one["asymmetry"] < 1e-4
        assert one["off_linear"] < 1e-5
        assert one["energy"] == sorted(one["energy"])
        assert one["energy"][-1] <= 1 + 1e-5
    assert "100% of its Jacobian is symmetric" in found.verdict
    assert "J y = f(y)" in found.verdict
    assert any("random signs" in note for note in found.notes) == (method == "lanczos")
    assert write_probe_report(found, tmp_path / "report.html").exists()
    assert found.as_json()["numbers"]["pictures"][0]["values"]


def test_what_makes_pictures_worse_is_told():
    assert "leaves" not in sfumato.probe("harmonic", Shrink(torch.full((16,), 0.9)), SMALL, sigma=0.3).verdict
    found = sfumato.probe("harmonic", Shrink(torch.full((16,), 0.9), constant=0.3), SMALL, sigma=0.1)
    assert "leaves 0.2" in found.verdict
    assert "where noise of 0.1 was added" in found.verdict


def test_pictures_of_unlike_sizes_are_brought_to_that_of_a_run(tmp_path):
    from PIL import Image

    for i, side in enumerate((20, 30)):
        Image.new("L", (side, 24), 90 * i).save(tmp_path / f"{i}.png")
    assert Probe("harmonic", _blind(), str(tmp_path)).plan.chosen["numbers"] == 64  # it was trained on whole pictures


def test_what_is_no_shrinkage_is_told():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.9))

        def forward(self, y):
            return self.gain * y.roll(1, -1)

    found = sfumato.probe("harmonic", Turned(), SMALL)
    assert "no mere shrinkage" in found.verdict
    assert found.numbers["symmetric_share"] == pytest.approx(0.5, abs=1e-4)  # rows of 4 pixels, each turned by one
    assert "constants add" in sfumato.probe("harmonic", Shrink(torch.ones(16), constant=1.0), SMALL).verdict


def test_error_and_steins_estimate():
    found = sfumato.probe("harmonic", Shrink(torch.full((16,), 0.5)), torch.rand(400, 1, 4, 4), samples=400, sigma=0.3)
    errors, guesses = ([one[name] for one in found.numbers["pictures"]] for name in ("error", "stein_error"))
    assert found.numbers["stein_error"] == pytest.approx(found.numbers["error"], rel=0.1)
    assert errors != guesses


@pytest.mark.parametrize("labelled", [False, True])
def test_labels_and_targets_do_not_matter(labelled):
    data = Batch(SMALL, torch.arange(3), label=torch.tensor([0, 1, 1])) if labelled else SMALL
    found = sfumato.probe("harmonic", Shrink(torch.linspace(1, 0, 16)), data)
    assert found.numbers["effective_rank"] == pytest.approx(8, abs=1e-4)


def test_of_a_run_it_is_the_basis_of_its_denoiser():
    method = _blind()
    found = sfumato.probe("harmonic", method, X, samples=1, seed=3)
    one = found.numbers["pictures"][0]
    assert one["off_linear"] < 1e-4  # without biases
    assert len(one["values"]) == 64
    again = sfumato.probe("harmonic", method, X, samples=1, seed=3).numbers["pictures"][0]
    assert again == one
    assert Probe("harmonic", method, X).plan.chosen["eigenvectors"] == 64
    few = sfumato.probe("harmonic", method, X, samples=1, seed=3, method="lanczos", vectors=3).numbers["pictures"][0]
    assert few["values"] == pytest.approx(one["values"][:3], abs=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDPM(DDPM.Config.small(channels=1, image_size=8, width=8)),
        lambda: CBSN(CBSN.Config.small(channels=1, width=4, modules=1, patch=10, window=None)),
    ],
)
def test_other_denoisers_have_one_too(make):
    method = make()
    few, whole = (
        sfumato.probe("harmonic", method, X, samples=1, sigma=0.2, method=how, vectors=2, minutes=None).numbers["pictures"][0]
        for how in ("lanczos", "dense")
    )
    assert few["values"] == pytest.approx(whole["values"][:2], rel=1e-3)
    assert few["off_linear"] == pytest.approx(whole["off_linear"], abs=1e-4)
    homogeneous = isinstance(method, CBSN)  # it divides by the deviation of the picture; DDPM knows times and shifts grey
    assert (few["off_linear"] < 1e-4) == homogeneous


def test_ddpm_denoises_at_the_level_it_is_told():
    """With the exact noise prediction for the picture 0.5 it gives that back, whatever the level."""
    method = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8))
    tables = method.schedule

    class Exact(nn.Module):
        def forward(self, x_t, t):
            noise = (1 - tables.abar[t]).sqrt().float().view(-1, 1, 1, 1)
            return type("Out", (), {"sample": x_t / noise})()

    method.average = Exact()
    for sigma in (0.05, 1.0):
        assert torch.allclose(
            method.denoise(0.5 + sigma * torch.randn(2, 1, 8, 8), sigma), torch.full((2, 1, 8, 8), 0.5), atol=1e-3
        )


def test_large_pictures_are_brought_to_size():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    probe = Probe("harmonic", conv, torch.rand(2, 1, 90, 120), vectors=2)
    assert probe.plan.chosen["numbers"] == 64 * 64
    assert probe.plan.chosen["Jacobian"] == "by products"
    assert any("64 x 64" in note for note in probe.plan.notes)
    assert Probe("harmonic", conv, torch.rand(2, 1, 90, 120), image_size=16).plan.chosen["numbers"] == 256
    assert Probe("harmonic", _blind(), torch.rand(2, 1, 12, 12)).plan.chosen["numbers"] == 64


def test_what_is_chosen_for_a_time():
    model = nn.Conv2d(3, 3, 3, padding=1)
    x = torch.rand(4, 3, 20, 20)
    hasty, patient = (Probe("harmonic", model, x, minutes=m).plan.chosen for m in (1e-9, None))
    assert (hasty["pictures"], hasty["eigenvectors"]) == (1, 4)
    assert (patient["pictures"], patient["eigenvectors"]) == (4, 16)
    assert Probe("harmonic", model, x, minutes=1e-9, vectors=9).plan.chosen["eigenvectors"] == 9
    tight = Probe("harmonic", model, x, memory=4e-4)  # of 41 vectors
    assert tight.plan.chosen["eigenvectors"] < 16
    assert any("memory" in note for note in tight.plan.notes)


def test_what_cannot_be_is_refused():
    with pytest.raises(BadSetting, match="is a MAE, which has no denoiser"):
        sfumato.probe("harmonic", MAE(MAE.Config.small(image_size=8, patch=4, channels=1)), X)
    with pytest.raises(BadSetting, match=r"the model gives \[10\] a sample"):
        sfumato.probe("harmonic", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), X)
    with pytest.raises(BadSetting, match="no more than 16"):
        sfumato.probe("harmonic", Shrink(torch.ones(16)), SMALL, vectors=17)
    with pytest.raises(BadSetting, match="too large to write out"):
        sfumato.probe("harmonic", nn.Conv2d(1, 1, 3, padding=1), torch.rand(1, 1, 101, 101), method="dense", image_size=101)
    with pytest.raises(BadData, match=r"pictures \[C, H, W\]"):
        sfumato.probe("harmonic", nn.Linear(4, 4), [(torch.rand(3, 4), torch.rand(3, 4))])


def test_stopped_half_way_it_gives_what_it_has(monkeypatch):
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return denoiser_basis(*args, **kwargs)

    monkeypatch.setattr("sfumato.instruments.harmonic.denoiser_basis", stop)
    found = sfumato.probe("harmonic", Shrink(torch.ones(16)), SMALL)
    assert found.interrupted
    assert len(found.numbers["pictures"]) == 2
