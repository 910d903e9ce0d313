import math

import pytest
import torch

from sfumato.data import Batch, Facts, digits
from sfumato.diffusion import multiplicative_dsm
from sfumato.engine import build, fit
from sfumato.errors import BadData, Diverged
from sfumato.method import Context, Sampler, capabilities
from sfumato.papers.diffusion.multiplicative_diffusion import MultiplicativeDiffusion


def _small(**over):
    torch.manual_seed(0)
    small = {"image_size": 8, "channels": 1, "width": 16, "batch_size": 32, "sample_steps": 20, "ema": 0.9, **over}
    return MultiplicativeDiffusion(MultiplicativeDiffusion.Config.small(**small))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_learns_and_samples_look_more_like_the_data():
    x = digits()[0].x[:512]
    method = _small()

    def gap(m):
        return (m.sample(64, seeded(3)).mean(0) - x.mean(0)).abs().mean()

    before = gap(method)
    trained = fit(method, x, steps=80, progress=False)
    assert isinstance(trained, Sampler)
    assert list(capabilities(trained)) == ["sample"]
    assert trained.average.updates == 80
    assert gap(trained) < 0.7 * before
    assert (trained.draw(64, generator=seeded()) > 0).all()


def test_the_paper_s_own_setting_learns():
    """The score itself, of x, with the weight of the paper: the loss falls, though slower than with the noise."""
    method = _small(input="x", output="score", weight="paper", lr=3e-3)
    train = digits()[0].x[:256]
    batch = Batch(train[:128], torch.arange(128))

    def loss():
        return method.loss(batch, Context(0, 9, 0, seeded(5))).value.item()

    before = loss()
    fit(method, train, steps=40, progress=False)
    assert loss() < 0.7 * before


def test_the_two_outputs_are_one_loss():
    """A network that gives the noise, and one that gives the score made of it, are the same to M-DSM."""
    noise, score = _small(output="noise"), _small(output="score")
    x, k = 1 + torch.rand(3, 1, 8, 8, generator=seeded()), torch.tensor([1, 40, 999])
    given = noise.score(x, k, noise.net)
    std = noise.schedule.std[k].view(-1, 1, 1, 1).float()
    torch.testing.assert_close(given, (score.score(x, k, score.net) / std - 1) / x)
    x0 = 1 + torch.rand(3, 1, 8, 8, generator=seeded(1))
    unit = multiplicative_dsm(given, x, x0, k, noise.schedule, weight="unit", reduction="none")
    truth = (x / x0).log() / std
    told = noise.net(x.log() / (1 + std.square()).sqrt(), k).sample
    torch.testing.assert_close(unit, (truth + told).square().sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_the_start_is_fitted_to_the_training_pictures_and_kept(tmp_path):
    x = digits()[0].x[:300]
    method = fit(_small(batch_size=64), x, steps=1, run=tmp_path / "run", progress=False)
    logs = (1 + x).log()
    assert method.log_mean.item() == pytest.approx(logs.mean().item(), rel=1e-5)
    assert method.log_variance.item() == pytest.approx(logs.var().item(), rel=1e-3)
    mean, deviation = method.schedule.start(method.log_mean, method.log_variance)
    pushed = method.schedule.q_sample(1 + x, 999, torch.randn(x.shape, generator=seeded())).log()
    assert pushed.mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert pushed.std().item() == pytest.approx(deviation.item(), rel=0.02)
    colour = _small(channels=3)
    u = torch.rand(50, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    before = colour.log_mean.clone()
    colour.survey([Batch(u[:20], torch.arange(20)), Batch(u[20:] ** 2, torch.arange(30))])
    assert (colour.log_mean < before - 0.03).all()
    assert len(colour.log_mean.unique()) == 3
    uniform = (1 + torch.rand(1_000_000, generator=seeded())).log()
    assert before[0].item() == pytest.approx(uniform.mean().item(), abs=1e-3)
    assert _small().log_variance.item() == pytest.approx(uniform.var().item(), abs=1e-3)
    assert before[0].item() == pytest.approx(2 * math.log(2) - 1)


def test_a_run_is_resumed_with_the_same_numbers(tmp_path):
    x = digits()[0].x[:64]
    whole = fit(_small(), x, steps=4, run=tmp_path / "whole", progress=False)
    state = whole.state_dict()
    again = _small()
    assert not torch.equal(again.log_mean, whole.log_mean)
    again.load_state_dict(state)
    assert torch.equal(again.sample(2, seeded()), whole.sample(2, seeded()))
    assert list((tmp_path / "whole" / "pictures").glob("4-samples.png"))


def test_saved_and_loaded_it_draws_the_same():
    method, other = _small(), _small()
    with torch.no_grad():
        for p in method.average.parameters():
            p.add_(0.01)
        method.log_mean.add_(0.1)
    a = method.sample(2, seeded())
    assert not torch.equal(a, other.sample(2, seeded()))
    other.load_state_dict(method.state_dict())
    assert torch.equal(a, other.sample(2, seeded()))
    assert 0 <= a.min() <= a.max() <= 1


def test_the_loss_repeats_with_its_generator_and_refuses_other_sizes():
    method, batch = _small(), Batch(torch.rand(4, 1, 8, 8), torch.arange(4))
    a, b, c = (method.loss(batch, Context(0, 10, 0, seeded(s))).value for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(BadData, match="image_size"):
        method.loss(Batch(torch.rand(4, 1, 9, 9), torch.arange(4)), Context(0, 10, 0, seeded()))


def test_sizes_are_taken_from_the_data_and_others_are_cut():
    method = build(MultiplicativeDiffusion, Facts(9, 3, (20, 50)), preset="small", settings={"width": 8})
    assert method.shape == (3, 20, 20)
    assert method.augment()(torch.rand(3, 20, 50)).shape == (3, 20, 20)
    assert build(MultiplicativeDiffusion, Facts(9, 1, (8, 8)), preset="small", settings={"width": 8}).augment() is None
    paper = MultiplicativeDiffusion.Config()
    assert (paper.sigma, paper.times, paper.delta, paper.anneal, paper.lr, paper.ema) == (0.8, 1000, 6.165e-4, 0.995, 1e-4, 0.999)


def test_preview_is_quick_whatever_the_sampler_is_set_to():
    method, asked = _small(sample_steps=1000, inner=4, delta=1e-3), []
    score = method.score
    method.score = lambda x, k: asked.append(int(k[0])) or score(x, k)
    rows = method.preview(Batch(torch.rand(2, 1, 8, 8), torch.arange(2)), seeded())
    assert {name: x.shape for name, x in rows.items()} == dict.fromkeys(("data", "samples"), (2, 1, 8, 8))
    assert len(asked) == 55


@pytest.mark.parametrize("sampler", ["dls", "ums"])
def test_a_network_that_is_broken_is_said_in_one_line(sampler):
    method = _small(sampler=sampler)
    with torch.no_grad():
        next(method.average.parameters()).fill_(torch.nan)
    with pytest.raises(Diverged, match=f"{sampler} left the finite numbers"):
        method.sample(1)


def test_ums_draws_pictures_too_even_past_zero():
    method = _small(sampler="ums", sample_steps=5)
    drawn = method.draw(200, generator=seeded())
    assert (drawn <= 0).any()
    x = method.sample(200, seeded())
    assert 0 <= x.min() <= x.max() <= 1
