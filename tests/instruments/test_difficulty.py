"""Difficulty through the whole instrument: known losses, what is chosen for a time, refusals, a stop."""

import signal

import pytest
import torch
from torch import nn

import sfumato
from sfumato.errors import BadSetting, Interrupted
from sfumato.instruments import Probe
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.masking.mae import MAE
from sfumato.probes import linear_denoising_loss, marginal_kl, principal_variances
from sfumato.report import write_probe_report

PICTURES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Known(DDPM):
    """A diffusion model whose error is known: the time over T at every pixel, or Wiener's on white pictures."""

    wiener = False
    stop_after = 10**9

    def losses_at(self, x, t, noise):
        self.stop_after -= 1
        if self.stop_after == 0:
            signal.raise_signal(signal.SIGINT)
        if not self.wiener:
            return t / len(self.schedule)
        return super().losses_at(x, t, noise)


def method(**over):
    torch.manual_seed(0)
    return Known(DDPM.Config.small(channels=1, image_size=8, width=8, **over))


def test_losses_and_divergences_are_those_of_their_parts():
    found = sfumato.probe("difficulty", method(), PICTURES, minutes=None, intervals=4, draws=16)
    x = 2 * PICTURES - 1
    kl = marginal_kl(x, method().schedule)
    linear = linear_denoising_loss(principal_variances(x)[0], method().schedule)
    for i, part in enumerate(found.numbers["parts"]):
        assert part["times"] == [250 * i, 250 * i + 249]
        assert part["loss"] == pytest.approx((i + 0.5) / 4, abs=0.012)
        assert part["error"] == pytest.approx(0.25 / 12**0.5 / (16 * 40) ** 0.5, rel=0.4)
        assert part["linear"] == pytest.approx(linear[250 * i : 250 * i + 250].mean().item(), rel=1e-5)
        pairs = kl[max(0, 250 * i - 1) : 250 * i + 249]
        assert part["relative_entropy"] == pytest.approx(pairs.sum().item(), rel=1e-5)
    assert found.headline["loss, all times"] == pytest.approx(0.5, abs=0.01)
    assert "The more noise, the harder" in found.verdict
    assert "behind the best linear denoiser at times" in found.verdict
    assert any("40 samples span fewer directions than a picture has numbers (64)" in note for note in found.notes)


def test_an_untrained_network_is_found_behind_and_its_page_is_written(tmp_path):
    model = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, times=50, predict="v"))
    found = sfumato.probe("difficulty", model, PICTURES, intervals=5, draws=1, samples=24, batch_size=10, estimator="exact")
    assert found.about["plan"]["samples"] == 24
    assert all(part["loss"] > part["linear"] for part in found.numbers["parts"])
    assert found.numbers["predict"] == "v"
    assert any("whole distribution" in note for note in found.notes)
    again = sfumato.probe("difficulty", model, PICTURES, intervals=5, draws=1, samples=24, batch_size=10, estimator="exact")
    assert found.as_json()["numbers"] == again.as_json()["numbers"]
    write_probe_report(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "best linear denoiser" in page
    assert "Relative entropy" in page


def test_samples_and_draws_are_left_out_where_the_time_is_short():
    chosen = Probe("difficulty", method(), PICTURES, minutes=1e-9).plan
    assert (chosen.chosen["samples"], chosen.chosen["draws"]) == (32, 1)
    assert any("only 32 samples" in note for note in chosen.notes)
    whole = Probe("difficulty", method(), PICTURES, minutes=None).plan.chosen
    assert (whole["samples"], whole["draws"], whole["intervals"]) == (40, 16, 10)
    assert Probe("difficulty", method(), PICTURES, minutes=1e-9, draws=3, samples=9).plan.chosen["draws"] == 3


def test_what_is_no_diffusion_is_refused():
    mae = MAE(MAE.Config.small(channels=1, image_size=8, patch=4, dim=16, depth=1, heads=2, decoder_dim=16, decoder_heads=2))
    with pytest.raises(BadSetting, match=r"difficulty takes a run of a diffusion model.*MAE"):
        sfumato.probe("difficulty", mae, PICTURES)
    with pytest.raises(BadSetting, match="difficulty takes a run"):
        sfumato.probe("difficulty", nn.Linear(2, 2), (torch.randn(5, 2), torch.arange(5) % 2))
    with pytest.raises(BadSetting, match="30 clusters of 20 times"):
        sfumato.probe("difficulty", method(times=20), PICTURES, intervals=30)


def test_ctrl_c_gives_the_draws_that_were_made():
    for after, draws in ((13, True), (3, False)):
        model = method()
        ready = Probe("difficulty", model, PICTURES, intervals=4, draws=5, batch_size=20, minutes=None)
        ready.subjects[0].owner.stop_after = after
        if not draws:
            with pytest.raises(Interrupted, match="before anything"):
                ready.run()
            continue
        found = ready.run()
        assert found.interrupted
        assert all(0 < part["loss"] < 1 for part in found.numbers["parts"])
