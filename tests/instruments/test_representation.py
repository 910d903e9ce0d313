"""Representations through the whole instrument: features of every kind of model, known readers, twins, refusals, stops."""

import pytest
import torch
from torch import nn

import sfumato
from sfumato.data import digits
from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments import Probe, prepare_subject
from sfumato.instruments.features import FeatureReader, samples_of, untrained_twin
from sfumato.instruments.progress import Progress, Stop
from sfumato.instruments.representation import _parted, _place_score
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.masking.mae import MAE
from sfumato.papers.optimization.classifier import Classifier
from sfumato.probes import linear_probe


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def labelled(n=60, apart=4.0):
    label = torch.arange(n) % 3
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0)) + apart * torch.eye(6)[label], label


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    tiny = {"dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_heads": 2, "channels": 1, "flip": False}
    return MAE(MAE.Config.small(image_size=8, patch=2, crop_scale=None, **tiny))


def test_partings_halve_every_class():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    known, others = _parted(labels, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[known]).tolist() == [4, 1, 1]
    assert sorted([*known.tolist(), *others.tolist()]) == list(range(10))
    again = _parted(labels, torch.Generator().manual_seed(1))[0]
    assert known.tolist() != again.tolist()


def test_readers_are_those_of_the_parts():
    x, y = labelled(apart=1.0)
    model = net()
    found = sfumato.probe("representation", model, [(x, y)], repeats=2, minutes=None, progress=False)
    hidden = model[:2](x).detach()
    partings = _partings_of(found, y, 2)
    expected = [linear_probe(hidden[a], y[a], test=(hidden[b], y[b]), scaler="standard") for a, b in partings]
    assert found.numbers["trained"]["linear"]["each"] == pytest.approx(expected)
    assert "places" not in found.numbers["trained"]
    assert found.numbers["chance"] == pytest.approx(1 / 3)
    gain = found.numbers["gain"]["linear"]["each"]
    assert gain == pytest.approx([a - b for a, b in zip(expected, found.numbers["untrained"]["linear"]["each"], strict=True)])


def _partings_of(found, y, repeats):
    """The same draws as the probe made from its seed."""
    from sfumato.engine.randomness import key

    source = torch.Generator().manual_seed(key(found.about["seed"], "probe"))
    draws = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=source)))
    return [_parted(y, draws) for _ in range(repeats)]


def test_features_that_carry_the_class_are_told_from_those_that_do_not():
    x, y = labelled()
    blind = net()
    nn.init.zeros_(blind[0].weight)
    assert sfumato.probe("representation", net(), [(x, y)], progress=False).numbers["trained"]["linear"]["mean"] > 0.9
    found = sfumato.probe("representation", blind, [(x, y)], progress=False)
    assert found.numbers["trained"]["linear"]["mean"] < 0.5
    assert found.numbers["gain"]["linear"]["mean"] < -0.3
    assert "worse" in found.verdict


def test_a_masked_model_is_read_through_its_encoder(mae):
    data, _ = digits(seed=0)
    found = sfumato.probe("representation", mae, data, samples=300, repeats=2, progress=False)
    assert found.numbers["trained"].keys() >= {"linear", "neighbours", "places", "linear, 1"}
    assert found.numbers["trained"]["linear"]["mean"] > 0.3  # a random feature map already
    subject = prepare_subject(mae, data)
    whole = samples_of(subject)
    read = FeatureReader(subject).read(whole.x[:10].split(4))
    assert torch.allclose(read.whole, mae.eval().encode(whole.x[:10]), atol=1e-5)
    assert read.places.shape == (10, 16, 16)
    assert torch.allclose(read.places.mean(1), read.whole, atol=1e-5)
    mae.train()
    assert "Nearest pictures" in [s.title for s in found.sections]


def test_a_classifier_run_and_its_twin():
    data, _ = digits(seed=0)
    torch.manual_seed(0)
    model = Classifier(Classifier.Config.small(model="conv", channels=1, classes=10, image_size=8))
    found = sfumato.probe("representation", model, data, samples=60, repeats=2, progress=False)
    assert set(found.numbers["trained"]) >= {"linear", "neighbours"}
    subject = prepare_subject(model, data)
    twin, notes = untrained_twin(subject, 1)
    again, _ = untrained_twin(subject, 1)
    assert not notes
    first = [next(m.parameters()) for m in (model, twin, again)]
    assert torch.equal(first[1], first[2])
    assert not torch.equal(first[0], first[1])


def test_timm_models_give_places(tmp_path):
    x = torch.rand(24, 3, 32, 32)
    for name, width in (("resnet10t", 512), ("vit_tiny_patch16_224", 192)):
        subject = prepare_subject(f"timm:{name}", _saved(tmp_path, x))
        whole = samples_of(subject)
        read = FeatureReader(subject).read([whole.x[:2]])
        assert read.whole.shape == (2, width)
        assert read.places.shape[0] == 2
        assert read.places.shape[2] == width


def _saved(folder, x):
    import numpy as np

    np.savez(folder / "data.npz", x=(x * 255).byte().numpy(), y=np.arange(len(x)) % 3)
    return f"arrays:{folder / 'data.npz'}"


def test_parameters_that_cannot_be_drawn_anew_are_told():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.net = nn.Parameter(torch.ones(6)), net(seed=3)

        def forward(self, x):
            return self.net(x * self.scale)

    x, y = labelled()
    subject = prepare_subject(Scaled(), [(x, y)])
    twin, notes = untrained_twin(subject, 0)
    assert notes == ["the untrained network keeps 1 parameters that their layers cannot draw anew"]
    assert not torch.equal(twin.net[0].weight, subject.owner.net[0].weight)


def test_places_spread_over_all_samples():
    labels = torch.arange(40) % 2
    places = torch.randn(40, 9, 3, generator=torch.Generator().manual_seed(0)) + 5.0 * labels[:, None, None]
    parting = _parted(labels, torch.Generator().manual_seed(0))
    assert _place_score(places, labels, parting) > 0.95


def test_refusals():
    x, y = labelled()
    with pytest.raises(BadData, match="at least two classes of at least 4 samples"):
        Probe("representation", net(), [(x[:9], y[:9])])
    with pytest.raises(BadData, match="class label with every sample"):
        Probe("representation", nn.Linear(6, 6), [(x, x)])
    ddpm = DDPM(DDPM.Config.small(channels=1, image_size=8))
    with pytest.raises(BadSetting, match="gives no features"):
        Probe("representation", ddpm, digits(seed=0)[0])


def test_a_stop_keeps_what_was_measured(monkeypatch):
    x, y = labelled()
    ready = Probe("representation", net(), [(x, y)], repeats=3, minutes=None)
    advance, seen = Progress.advance, []

    def stopping(self, after):
        seen.append(1)
        if len(seen) > after:
            raise Stop
        advance(self)

    monkeypatch.setattr(Progress, "advance", lambda self: stopping(self, 4))  # one batch and three partings
    found = ready.run(progress=False)
    assert found.interrupted
    assert "gain" not in found.numbers
    assert found.numbers["trained"]["linear"]["mean"] > 0.8
    seen.clear()
    monkeypatch.setattr(Progress, "advance", lambda self: stopping(self, 0))
    with pytest.raises(Interrupted, match="before anything was measured"):
        ready.run(progress=False)


def test_fewer_samples_where_the_time_is_short():
    x, y = labelled(300)
    many, few = (Probe("representation", net(), [(x, y)], minutes=m).plan for m in (None, 1e-9))
    assert many.chosen["samples"] == 300
    assert few.chosen["samples"] == 12
    assert any("to fit the time" in note for note in few.notes)
