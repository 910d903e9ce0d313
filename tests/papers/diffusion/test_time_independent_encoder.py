import math
from functools import partial

import pytest
import torch

from sfumato.claim import Better
from sfumato.data import digits
from sfumato.diffusion import Schedule, beta_schedule, noise_kl, sample_ddim
from sfumato.engine import Lab, Run, fit, load
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.method import Sampler, capabilities
from sfumato.papers.diffusion import time_independent_encoder as paper
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.time_independent_encoder import (
    TiUE,
    distillation,
    encoder_decoder_similarity,
    paper_times,
    shared_encoder,
)
from sfumato.papers.restoration.cbsn import CBSN


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures():
    return digits()[0].x[:256]


@pytest.fixture(scope="module")
def teacher(pictures):
    torch.manual_seed(0)
    return fit(DDPM(DDPM.Config.small(image_size=8, channels=1, width=8, batch_size=32)), pictures, steps=30, progress=False)


def _student(teacher, **over):
    return TiUE.init_from(TiUE.Config.small(**{"batch_size": 8, **over}), teacher)


def _weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("rank", [None, 2])
def test_all_begin_as_the_teacher_and_student_and_fake_score_move_away(teacher, pictures, rank):
    student = _student(teacher, rank=rank)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    start = teacher.average(x, t).sample
    nets = {"student": student.base.net, "average": student.base.average, "teacher": student.teacher, "fake": student.fake}
    assert all(torch.equal(net.eval()(x, t).sample, start) for net in nets.values())
    fit(student, pictures, steps=3, progress=False)
    moved = {name for name, net in nets.items() if not torch.allclose(net(x, t).sample, start, atol=1e-5)}
    assert moved == {"student", "average", "fake"}
    assert torch.equal(student.teacher(x, t).sample, start)


def test_the_seed_decides_and_the_pictures_do_not(teacher, pictures):
    a, b, c = (
        fit(_student(teacher), data, steps=2, progress=False, seed=seed)
        for data, seed in ((pictures, 0), (1 - pictures, 0), (pictures, 1))
    )
    assert torch.equal(_weights(a.base.net), _weights(b.base.net))
    assert not torch.equal(_weights(a.base.net), _weights(c.base.net))


def test_the_fake_score_learns_what_the_student_draws_and_both_losses_are_told(teacher, pictures, tmp_path):
    run = Run.create(tmp_path, "time-independent-encoder")
    run.write_config({"slug": "time-independent-encoder"})
    student = _student(teacher, lr=1e-9, fake_lr=1e-3, batch_size=32)
    fit(student, pictures, steps=25, progress=False, run=run, log_every=1)
    lines = [line for line in run.metrics() if "vsd" in line]
    assert len(lines) == 25
    assert all(line["kl"] > 0 for line in lines)
    assert lines[0]["vsd"] == 0  # the fake score is still the teacher
    assert lines[-1]["vsd"] > 0
    losses = [line["loss"] for line in lines]
    assert sum(losses[-8:]) < sum(losses[:8])
    assert {path.stem.split("-")[1] for path in run.pictures.iterdir()} == {"teacher", "student"}


def test_the_kl_makes_noise_maps_more_like_noise(teacher, pictures):
    found = {}
    for weight in (0.0, 5.0):
        student = fit(_student(teacher, kl_weight=weight, lr=1e-3), pictures, steps=12, progress=False)
        with torch.no_grad():
            found[weight] = noise_kl(student.draw(student.base.net, 64, _seeded()).eps.flatten(0, 1), reduction="mean")
    assert found[5.0] < found[0.0]


def test_saved_and_loaded_it_draws_the_same_and_a_student_goes_on(teacher, pictures, tmp_path):
    run = Run.create(tmp_path, "time-independent-encoder")
    run.write_config({"slug": "time-independent-encoder"})
    student = fit(_student(teacher, rank=2), pictures, steps=2, progress=False, run=run)
    again = load(run.path)
    assert isinstance(again, Sampler)
    assert list(capabilities(again)) == ["sample"]
    a, b = (m.sample(3, _seeded()) for m in (student, again))
    assert torch.equal(a, b)
    assert a.shape == (3, 1, 8, 8)
    assert 0 <= a.min() <= a.max() <= 1
    for over in ({"rank": 2}, {"rank": None, "decoder_times": (751,)}):
        other = _student(again, **over)
        assert torch.equal(_weights(other.base.net), _weights(again.base.average.module))
        assert torch.equal(_weights(other.teacher), _weights(again.teacher))
        assert torch.equal(_weights(other.teacher), _weights(teacher.average.module))
        same = torch.equal(_weights(other.fake), _weights(again.fake if over["rank"] else teacher.average.module))
        assert same


def test_its_times_are_as_noisy_as_the_papers_whatever_the_teachers_schedule(teacher):
    student = _student(teacher)
    assert teacher.config.schedule == "linear"
    wanted = Schedule(beta_schedule("scaled_linear")).abar[[751, 501, 251, 1]]
    assert torch.allclose(student.base.schedule.abar[list(student.decoder_times)], wanted, atol=2e-3)
    drawn = student.draw(student.base.net, 3, _seeded())
    assert drawn.eps.shape == (4, 3, 1, 8, 8)
    assert _student(teacher, decoder_times=(751, 1)).decoder_times == (751, 1)
    for kind in ("scaled_linear", "cosine"):
        times = paper_times(Schedule(beta_schedule(kind)))
        assert (times == (751, 501, 251, 1)) == (kind == "scaled_linear")
    few = Schedule(torch.tensor([0.5, 0.5]))
    assert paper_times(few) == (1, 0)


def test_the_fake_scores_errors_are_weighed_as_released_or_not(teacher, pictures):
    weights = [
        _weights(fit(_student(teacher, fake_weighted=weighted), pictures, steps=1, progress=False).fake)
        for weighted in (True, False)
    ]
    assert not torch.equal(*weights)


def test_what_it_refuses(teacher):
    with pytest.raises(BadSetting, match="--init runs/ddpm"):
        TiUE(TiUE.Config.small())
    with pytest.raises(BadSetting, match="--init runs/ddpm"):
        TiUE(TiUE.Config.small(ddpm=teacher.config.model_dump())).adopt(load)
    with pytest.raises(BadCheckpoint, match="not from one of CBSN"):
        TiUE.init_from(TiUE.Config.small(), CBSN(CBSN.Config.small(channels=1)))
    for times in ((1000, 1), (1, 751)):
        with pytest.raises(BadSetting, match="must fall within 999 to 0"):
            _student(teacher, decoder_times=times)
    with pytest.raises(BadSetting, match="holds none"):
        _student(teacher, vsd_range=(0.5, 0.5))


def test_similarity_is_one_where_nothing_changes_and_sees_what_does(teacher):
    net, x = teacher.average.module, torch.randn(4, 1, 8, 8)
    still = encoder_decoder_similarity(net, lambda model, x: [model(x, torch.full((4,), 5)) for _ in range(3)][-1], x)
    assert torch.allclose(torch.cat(still), torch.ones(4), atol=1e-5)
    found = encoder_decoder_similarity(net, partial(sample_ddim, schedule=teacher.schedule, steps=4), x)
    assert found.encoder.shape == found.decoder.shape == (3,)
    assert (torch.cat(found) < 0.99999).all()
    other = encoder_decoder_similarity(net, lambda model, x: [model(s * x, torch.full((4,), 5)) for s in (1, -1)][-1], x)
    assert other.encoder < 0.9
    assert not net._forward_hooks
    assert not any(block._forward_hooks for block in net.up_blocks)


# The claims


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(paper, "DRAWN", 40)
    monkeypatch.setattr(paper, "WIDTH", 8)


@pytest.mark.usefixtures("few")
def test_the_claims_in_small():
    """A teacher that has hardly learned: every arm is measured, every condition has its figures."""
    lab = Lab(0, budget=0.004)
    first, second = shared_encoder(lab), distillation(lab)
    for claim, figures in ((shared_encoder, first), (distillation, second)):
        for condition in claim.conditions:
            found = condition.difference(figures) if isinstance(condition, Better) else condition.fn(figures)
            assert found in (True, False) or math.isfinite(found)
    assert first["one step"]["times one step"] == 1
    assert {"encoder", "decoder"} == {curve["arm"] for curve in lab.curves}
    assert {"shared encoder", "without KL", "one step", "teacher, 4 steps", "teacher, 20 steps"} < second.keys()
    assert {"shared encoder, untrained", "one step, untrained"} < second.keys()
    assert second["held-out pictures"]["recall"] > second["one step"]["recall"]
    assert {"one step", "shared encoder", "without KL"} < lab.pictures.keys()


@pytest.mark.usefixtures("few")
def test_the_second_claim_fails_where_students_learn_nothing(monkeypatch):
    monkeypatch.setattr(Lab, "fit", lambda self, method, data, *, steps=None: method.eval())
    figures = distillation(Lab(0, budget=0.004))
    assert figures["shared encoder"] == figures["without KL"]
    assert [distillation.conditions[i].difference(figures) for i in (0, 2)] == [0, 0]
