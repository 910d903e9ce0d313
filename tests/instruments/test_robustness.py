"""Robustness through the whole instrument: linear classifiers, whose distances and angles are known, pictures, refusals."""

import math
import signal

import pytest
import torch
from torch import nn

import sfumato
from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments import Pictures, Probe
from sfumato.report import write_probe_report


def linear(angle=0.0, bias=0.0):
    """Two classes at (∓2, 0), told apart by a boundary that leans by `angle`."""
    net = nn.Linear(2, 2).double()
    normal = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    net.weight.data = torch.stack([-normal, normal]) * 3
    net.bias.data = torch.tensor([-bias, bias], dtype=torch.float64) * 3
    return net


@pytest.fixture(scope="module")
def data():
    y = torch.arange(40) % 2
    x = torch.stack([4.0 * y - 2, torch.linspace(-1, 1, 40)], 1).double()
    x[:, 1] -= torch.stack([x[y == k, 1].mean() for k in (0, 1)])[y]
    return [(x[:15], y[:15]), (x[15:], y[15:])]


@pytest.mark.parametrize("angle", [0.0, 0.6])
def test_distances_and_angles_of_a_linear_classifier_are_exact(data, angle):
    found = sfumato.probe("robustness", linear(angle, bias=0.3), data, batch_size=11, radii=[0.5, 1.8, 2.9])
    x, y = (torch.cat(t) for t in zip(*data))
    away = (2 * y - 1) * (math.cos(angle) * x[:, 0] + math.sin(angle) * x[:, 1] + 0.3)
    samples = found.numbers["samples"]
    torch.testing.assert_close(samples["first_order"], away)
    torch.testing.assert_close(samples["margin"], 6 * away)
    torch.testing.assert_close(samples["angle"], torch.full_like(away, angle), atol=1e-6, rtol=0)
    torch.testing.assert_close(samples["half_way"], torch.full_like(away, 2.0))
    torch.testing.assert_close(found.numbers["attacked"]["deepfool"], 1.02 * away)
    assert found.numbers["accuracy"] == 1
    assert "across the line" in found.verdict
    attacked = found.numbers["attacked"]
    for radius, accuracy in zip(attacked["radii"], attacked["accuracy"]):
        assert accuracy == pytest.approx((away > radius).double().mean().item())
    assert attacked["accuracy"][0] == 1
    assert attacked["accuracy"][-1] == 0


def test_a_leaning_boundary_is_nearer_and_noise_misses_it(data):
    upright, leaning = (sfumato.probe("robustness", linear(a), data) for a in (0.0, 1.45))
    assert upright.numbers["medians"]["deepfool"] > 3 * leaning.numbers["medians"]["deepfool"]
    assert "leans along" in leaning.verdict
    assert leaning.numbers["attacked"]["noise_misleads"] < 0.5


def test_temperature_does_not_depend_on_the_scale_of_logits(data):
    one, other = linear(), linear()
    other.weight.data *= 7
    a, b = (sfumato.probe("robustness", net, data, radii=[1.0], steps=2).numbers for net in (one, other))
    assert b["temperature"] == pytest.approx(7 * a["temperature"], rel=1e-6)
    assert b["medians"]["margin"] / b["temperature"] == pytest.approx(a["medians"]["margin"] / a["temperature"], rel=1e-6)


def test_the_ball_of_the_largest_pixel(data):
    found = sfumato.probe("robustness", linear(), data, norm="linf", radii=[2.5, 1.5])
    assert found.numbers["attacked"]["radii"] == [1.5, 2.5]
    assert found.numbers["attacked"]["accuracy"] == [1.0, 0.0]


def test_pictures_show_the_change(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    x = torch.rand(12, 3, 4, 4)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 3  # one is wrong already
    if len(y.unique()) < 2:
        y[1] = (y[1] + 1) % 3
    found = sfumato.probe("robustness", net, [(x, y)], steps=3)
    assert found.numbers["attacked"]["deepfool"][0] == 0
    blocks = found.sections[-1].blocks
    assert len(blocks) == 4
    assert all(isinstance(b, Pictures) and len(b.images) == 3 for b in blocks)
    assert all(image.min() >= 0 and image.max() <= 1 for b in blocks for image in b.images.values())
    assert "Smallest changes" in write_probe_report(found, tmp_path / "page.html").read_text()


def test_classes_without_samples_do_not_matter(data):
    wide = nn.Linear(2, 5).double()
    nn.init.constant_(wide.bias, -50.0)
    nn.init.zeros_(wide.weight)
    wide.weight.data[[1, 3]], wide.bias.data[[1, 3]] = linear(0.4).weight.data, 0.0
    x, y = (torch.cat(t) for t in zip(*data))
    found, plain = (
        sfumato.probe("robustness", net, [(x, labels)], radii=[1.0], steps=2, candidates=1)
        for net, labels in ((wide, 1 + 2 * y), (linear(0.4), y))
    )
    for name, values in plain.numbers["samples"].items():
        torch.testing.assert_close(found.numbers["samples"][name], values)


def test_what_cannot_be_measured_is_refused(data):
    with pytest.raises(BadData, match="of at least two classes"):
        sfumato.probe("robustness", linear(), [(x, y * 0) for x, y in data])
    with pytest.raises(BadSetting, match="all above 0"):
        sfumato.probe("robustness", linear(), data, radii=[0.0])
    with pytest.raises(BadSetting, match="not above 1/2"):
        sfumato.probe("robustness", linear(), data, confidence=0.4)
    words = nn.Sequential(nn.Embedding(5, 2), nn.Flatten())
    with pytest.raises(BadData, match="whole numbers"):
        sfumato.probe("robustness", words, [(torch.arange(4)[:, None], torch.arange(4) % 2)])
    wrong = sfumato.probe("robustness", linear(math.pi), data)
    assert wrong.verdict.startswith("No sample is classified rightly")


def test_samples_are_left_out_where_the_time_is_short(data):
    plan = Probe("robustness", linear(), data, minutes=1e-9).plan
    assert plan.chosen["samples"] == 8
    assert any("only 8 samples" in note for note in plan.notes)


class Stopping(nn.Linear):
    """A layer that presses Ctrl-C once it was called often enough."""

    left = 10**9

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def test_ctrl_c_gives_what_was_measured(data):
    net = Stopping(2, 2).double()
    net.load_state_dict(linear().state_dict())
    ready = [Probe("robustness", net, data, batch_size=10, minutes=None) for _ in range(3)]
    net.left = 2
    with pytest.raises(Interrupted, match="before anything"):
        ready[0].run()
    net.left = 5
    first = ready[1].run()
    assert first.interrupted
    assert len(first.numbers["samples"]["margin"]) == 40
    assert "attacked" not in first.numbers or len(first.numbers["attacked"]["deepfool"]) == 10
    net.left = 250
    second = ready[2].run()
    assert second.interrupted
    assert len(second.numbers["attacked"]["deepfool"]) in (10, 20, 30)
