"""Difficulty through the whole instrument: known losses, what is chosen for a time, refusals, a stop."""

import signal

import pytest
import torch
from torch import nn

import sfumato
from sfumato.errors import BadSetting, Interrupted
from sfumato.instruments import Probe, expert_training
from sfumato.instruments.expert_training import distances
from sfumato.method import Loss, Method, MethodConfig
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.denoising_curriculum import DenoisingCurriculum
from sfumato.papers.masking.mae import MAE
from sfumato.probes import Expert, linear_denoising_loss, marginal_kl, principal_variances
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


# A network for each part alone


def study(model, pictures=PICTURES, **over):
    settings = {"intervals": 3, "draws": 1, "train_steps": 6, "drawn": 16, "samples": 20, **over}
    return Probe("difficulty", model, pictures, minutes=None, **settings)


@pytest.mark.parametrize("formulation", ["ddpm", "edm"])
def test_networks_of_one_part_are_trained_and_drawn_with(tmp_path, formulation):
    torch.manual_seed(0)
    settings = {"channels": 1, "image_size": 8, "width": 8, "batch_size": 16, "sample_steps": 4, "formulation": formulation}
    model = DenoisingCurriculum(DenoisingCurriculum.Config.small(**settings))
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    found = study(model).run()
    told = found.numbers["trained alone"]
    assert found.about["plan"]["drawn"] == 16
    assert told["edges"].tolist() == [0, 333, 666, 1000]
    assert told["losses"].shape == (3, 7)
    assert (told["losses"][:, -1] < told["losses"][:, 0]).all()
    assert (told["steps_to"] <= 6).all()
    assert len({one["whole"] for one in [told["trained"], *told["distances"]]}) == 4
    if formulation == "ddpm":
        assert found.as_json()["numbers"] == study(model).run().as_json()["numbers"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if torch.is_tensor(value))
    assert "Samples suffer most from a network of 6 steps at times" in found.verdict
    assert found.numbers["predict"] == ("edm" if formulation == "edm" else "eps")
    write_probe_report(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Each part learned alone" in page
    assert "own network" in page


def test_an_expert_as_good_as_the_model_changes_nothing(monkeypatch):
    model = method(sample_steps=4)
    model.wiener = True

    def alike(net, *_, **__):
        return Expert(model.average, torch.linspace(2, 1, 11).double(), torch.zeros(0).double())

    monkeypatch.setattr(expert_training, "train_expert", alike)
    told = study(model, torch.rand(20, 1, 8, 8), drawn=20).run().numbers["trained alone"]
    assert all(one == told["trained"] for one in told["distances"])


def test_samples_are_compared_as_a_whole_and_in_patches():
    x = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    brighter = distances(x, x + 0.1)
    assert brighter["whole"] == pytest.approx(0.01 * 3 * 64, rel=1e-4)
    assert brighter["patches"] == pytest.approx(0.01 * 3 * 64, rel=1e-4)
    fine = distances(x, blurred)
    assert fine["whole"] < 1e-6 < 1 < fine["patches"]
    assert distances(x[..., :8, :8], x[..., :8, :8]).keys() == {"whole"}


def test_the_study_takes_its_share_of_the_time():
    model = method(sample_steps=4)
    model.wiener = True
    short, long = (Probe("difficulty", model, PICTURES, minutes=m, train_steps=5).plan for m in (1e-9, None))
    assert (short.chosen["drawn"], long.chosen["drawn"]) == (64, 512)
    assert "study" not in Probe("difficulty", model, PICTURES, minutes=None).plan.chosen
    assert short.seconds > short.chosen["study"]["training"] * 10


def test_a_run_that_knows_classes_is_studied_without_them():
    torch.manual_seed(0)
    settings = {"channels": 1, "image_size": 8, "width": 8, "sample_steps": 3, "conditional": True, "classes": 2, "guidance": 4.0}
    model, seen = DDPM(DDPM.Config.small(**settings)), []
    model.average.module.register_forward_pre_hook(lambda _, given: seen.append(given[2]) if len(given) > 2 else None)
    found = study(model, (PICTURES, torch.arange(40) % 2), train_steps=2).run()
    assert len(found.numbers["trained alone"]["distances"]) == 3
    plan = study(model, (PICTURES, torch.arange(40) % 2), train_steps=2).plan  # times a chain as it is drawn
    assert torch.cat(seen[-3:]).min() == 2
    assert plan.chosen["study"]["steps"] == 2


def test_a_method_that_takes_no_expert_has_no_study():
    class Bare(Method):
        schedule = method().schedule

        def __init__(self):
            super().__init__(MethodConfig(batch_size=8))
            self.weight = nn.Parameter(torch.zeros(()))

        def loss(self, batch, ctx):
            return Loss(self.weight * batch.x.mean(), len(batch))

        def losses_at(self, x, t, noise):
            return noise.square().flatten(1).mean(1)

    assert "trained alone" not in sfumato.probe("difficulty", Bare(), PICTURES, draws=1).numbers
    with pytest.raises(BadSetting, match="leave out train_steps"):
        Probe("difficulty", Bare(), PICTURES, train_steps=5)


def test_a_study_that_is_stopped_keeps_the_parts_that_were_finished():
    model, training = method(batch_size=20, sample_steps=4), []
    model.wiener = True
    ready = study(model, intervals=4)
    owner = ready.subjects[0].owner
    real = owner.with_expert

    def counted(net, low=0, high=None):
        if high is not None:
            training.append(low)
        if training == [0, 250, 500]:
            signal.raise_signal(signal.SIGINT)
        return real(net, low, high)

    owner.with_expert = counted
    found = ready.run()
    assert found.interrupted
    told = found.numbers["trained alone"]
    assert told["edges"].tolist() == [0, 250, 500]
    assert len(told["distances"]) == 2
