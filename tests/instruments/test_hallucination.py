"""Suspicious samples through the whole instrument: a sampler whose guesses are known, refusals, a stop half-way, and the page."""

import json
import math

import pytest
import torch
from probed import stopped
from torch import nn

import sfumato
from sfumato.diffusion import SamplerStep
from sfumato.errors import BadCheckpoint, BadSetting, Diverged, Interrupted
from sfumato.instruments import Probe
from sfumato.method import Method
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.mode_interpolation import PointDiffusion
from sfumato.papers.optimization.classifier import Classifier
from sfumato.report import write_probe_report


class Swinging(Method):
    """Its guess of sample i swings by ± amplitude[i] in the second half of the chain and by ± 1 before."""

    shape = (1, 4, 4)
    trajectory_steps = 20

    def __init__(self, amplitude):
        super().__init__()
        self.amplitude = nn.Parameter(torch.as_tensor(amplitude))
        self.drawn = 0

    def sample(self, n, generator=None, *, callback=None):
        own = self.amplitude.detach()[self.drawn : self.drawn + n].view(-1, 1, 1, 1)
        size = torch.ones(n, *self.shape)
        for i in range(self.trajectory_steps):
            swing = (-1) ** i * size * (own if i >= 10 else 1)
            if callback is not None:
                callback(SamplerStep(i, size, swing, torch.ones(())))
        self.drawn += n
        return own.expand(n, *self.shape)


AMPLITUDE = torch.cat([0.1 + 0.01 * torch.rand(37, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0, 0.05, 3.0])])


@pytest.fixture
def swinging(monkeypatch):
    """The method, and a timing that draws none of its samples."""
    from sfumato.instruments import hallucination

    monkeypatch.setattr(hallucination, "seconds_a_sample", lambda *a, **k: 1e-3)
    return Swinging(AMPLITUDE)


def test_variances_are_those_of_the_swings(swinging):
    found = sfumato.probe("hallucination", swinging, samples=40, batch_size=16, window="10:", slices=2, shown=3)
    numbers = found.numbers
    torch.testing.assert_close(numbers["variance"], AMPLITUDE.double().square(), rtol=1e-5, atol=0)
    assert numbers["window"] == [10, 20]
    early, late = numbers["slices"]
    assert (early["median"], early["largest"]) == (1, 1)
    assert math.isnan(early["rank correlation"])
    assert late["rank correlation"] == pytest.approx(1)
    assert late["largest"] == pytest.approx(9, rel=1e-5)
    assert numbers["most suspicious"]["sample"][:2] == [39, 37]
    assert numbers["least suspicious"]["sample"][0] == 38
    assert numbers["stand out"] == [37, 39]
    assert "2 of 40 samples stand out" in found.verdict
    assert "--keep 0.95 --window 10:20" in found.verdict
    assert found.about["models"][0]["data"] == "its own samples"


def test_nothing_stands_out_where_all_are_alike(swinging):
    found = sfumato.probe("hallucination", swinging, samples=37, window="10:20", slices=2)
    assert found.numbers["stand out"] == []
    assert found.verdict.startswith("No sample stands out")


def test_a_stop_gives_the_batches_that_were_finished(swinging, monkeypatch):
    ready = Probe("hallucination", swinging, samples=40, batch_size=10, slices=2)
    assert ready.plan.ticks == 4 * 20
    found = stopped(ready, 50, monkeypatch)
    assert found.interrupted
    assert found.numbers["samples"] == 20
    with pytest.raises(Interrupted, match="before anything"):
        stopped(Probe("hallucination", Swinging(AMPLITUDE), samples=40, slices=2), 3, monkeypatch)


def test_a_run_of_pictures_and_one_of_points(tmp_path):
    torch.manual_seed(0)
    pictures = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, sample_steps=10))
    found = sfumato.probe("hallucination", pictures, samples=6, slices=2, shown=2)
    again = sfumato.probe("hallucination", pictures, samples=6, slices=2, shown=2)
    assert torch.equal(found.numbers["variance"], again.numbers["variance"])
    assert found.numbers["window"] == [5, 7]
    page = write_probe_report(found, tmp_path / "pictures.html").read_text()
    assert "Hallucination of DDPM run" in page
    assert page.count("<img") >= 4
    points = PointDiffusion(PointDiffusion.Config.small(dim=2, width=8, layers=1, times=20))
    found = sfumato.probe("hallucination", points, samples=30, shown=2)
    assert found.numbers["window"] == [18, 20]
    json.dumps(found.as_json(), allow_nan=False)
    assert "steadiest first" in write_probe_report(found, tmp_path / "points.html").read_text()


def test_fewer_samples_where_the_time_is_short():
    pictures = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, sample_steps=20))
    plan = Probe("hallucination", pictures, minutes=1e-9).plan
    assert plan.chosen["samples"] == 16
    assert any("only 16 samples" in note for note in plan.notes)
    assert Probe("hallucination", pictures, minutes=None).plan.chosen["samples"] == 256


def test_a_run_that_breaks_off_says_so():
    broken = PointDiffusion(PointDiffusion.Config.small(dim=1, width=8, layers=1, times=20))
    broken.net.leave[1].bias.data.fill_(torch.nan)
    with pytest.raises(Diverged, match="30 of 30 samples broke off: from step 1 of 20"):
        sfumato.probe("hallucination", broken, samples=30)


def test_what_cannot_be_probed_is_refused(tmp_path, swinging):
    with pytest.raises(BadSetting, match="is no run"):
        sfumato.probe("hallucination", nn.Linear(2, 2))
    with pytest.raises(BadSetting, match="steps that can be watched"):
        sfumato.probe("hallucination", Classifier(Classifier.Config.small(model="conv", channels=1, classes=2, image_size=8)))
    with pytest.raises(BadCheckpoint):
        sfumato.probe("hallucination", str(tmp_path))
    with pytest.raises(BadSetting, match="looks at no data: leave out the data"):
        sfumato.probe("hallucination", swinging, torch.rand(4, 1, 8, 8))
    with pytest.raises(BadSetting, match="leave out loss and weights"):
        sfumato.probe("hallucination", swinging, loss="mse")
    with pytest.raises(BadSetting, match="two or more of the 20 steps"):
        sfumato.probe("hallucination", swinging, window="19:25")
    with pytest.raises(BadSetting, match="slices=10"):
        sfumato.probe("hallucination", swinging, slices=11)
    with pytest.raises(BadSetting, match="one step has no variance"):
        sfumato.probe("hallucination", DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, sample_steps=1)))
    with pytest.raises(BadSetting, match="say on what"):
        sfumato.probe("curvature", nn.Linear(2, 2))
