import pytest
import torch

from sfumato.claim import judge
from sfumato.data import Batch, Facts, digits
from sfumato.diffusion import multiplicative_dsm
from sfumato.engine import Lab, build, fit
from sfumato.engine.run_folder import Run
from sfumato.errors import BadData, Diverged
from sfumato.method import Context, Sampler, TrajectorySampler, capabilities
from sfumato.papers.diffusion import multiplicative_diffusion as paper
from sfumato.papers.diffusion.multiplicative_diffusion import MultiplicativeDiffusion, positive_pictures


def _small(**over):
    torch.manual_seed(0)
    small = {"image_size": 8, "channels": 1, "width": 8, "batch_size": 32, "sample_steps": 10, "ema": 0.9, **over}
    return MultiplicativeDiffusion(MultiplicativeDiffusion.Config.small(**small))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_learns_and_samples_look_more_like_the_data():
    x = digits()[0].x[:512]
    method = _small(lr=3e-3)

    def gap(m):
        return (m.sample(64, seeded(3)).mean(0) - x.mean(0)).abs().mean()

    before = gap(method)
    trained = fit(method, x, steps=40, progress=False)
    assert isinstance(trained, Sampler)
    assert list(capabilities(trained)) == ["sample"]
    assert trained.average.updates == 40
    assert gap(trained) < 0.7 * before
    assert (trained.draw(64, generator=seeded()) > 0).all()


def test_the_paper_s_own_setting_learns():
    """The score itself, of x, with the weight of the paper: the loss falls, though slower than with the noise."""
    method = _small(input="x", output="score", weight="paper", lr=5e-3)
    train = digits()[0].x[:256]
    batch = Batch(train[:128], torch.arange(128))

    def loss():
        return method.loss(batch, Context(0, 9, 0, seeded(5))).value.item()

    before = loss()
    fit(method, train, steps=20, progress=False)
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


def test_the_start_is_fitted_to_the_training_pictures():
    x = digits()[0].x[:300]
    method = fit(_small(batch_size=64), x, steps=1, progress=False)
    logs = (1 + x).log()
    assert method.log_mean.item() == pytest.approx(logs.mean().item(), rel=1e-5)
    assert method.log_variance.item() == pytest.approx(logs.var().item(), rel=1e-3)
    mean, deviation = method.schedule.start(method.log_mean, method.log_variance)
    pushed = method.schedule.q_sample(1 + x, 999, torch.randn(x.shape, generator=seeded())).log()
    assert pushed.mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert pushed.std().item() == pytest.approx(deviation.item(), rel=0.02)


def test_channels_have_a_start_each_and_before_any_data_pixels_count_as_uniform():
    method, u = _small(channels=3), torch.rand(1000, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    uniform, squares = (1 + u).log(), (1 + u**2).log()
    assert method.log_mean.flatten().tolist() == pytest.approx([uniform.mean().item()] * 3, abs=2e-3)
    assert method.log_variance.flatten().tolist() == pytest.approx([uniform.var().item()] * 3, abs=2e-3)
    u[:, 1] **= 2
    method.survey([Batch(u[:200], torch.arange(200)), Batch(u[200:], torch.arange(800))])
    expected = [(squares if i == 1 else uniform)[:, i].mean().item() for i in range(3)]
    assert method.log_mean.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_a_run_that_was_cut_goes_on_with_the_same_numbers(tmp_path):
    x, run = digits()[0].x[:64], Run.create(tmp_path, "multiplicative-diffusion")
    run.write_config({"slug": "multiplicative-diffusion"})
    whole = fit(_small(), x, steps=4, run=run, save_every=2, progress=False)
    assert list(run.pictures.glob("4-samples.png"))
    (run.checkpoints / "step-4.safetensors").unlink()
    again = _small()
    assert not torch.equal(again.log_mean, whole.log_mean)
    again = fit(again, digits()[0].x[:64], steps=4, run=run, progress=False)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)) if torch.is_tensor(a) else a == b, name
    assert torch.equal(again.sample(2, seeded()), whole.sample(2, seeded()))


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
    c = MultiplicativeDiffusion.Config()
    assert (c.sigma, c.times, c.delta, c.anneal, c.lr, c.ema) == (0.8, 1000, 6.165e-4, 0.995, 1e-4, 0.999)


def test_preview_is_quick_whatever_the_sampler_is_set_to():
    method, asked = _small(sample_steps=1000, inner=4, delta=1e-3), []
    score = method.score
    method.score = lambda x, k: asked.append(int(k[0])) or score(x, k)
    rows = method.preview(Batch(torch.rand(2, 1, 8, 8), torch.arange(2)), seeded())
    assert {name: x.shape for name, x in rows.items()} == dict.fromkeys(("data", "samples"), (2, 1, 8, 8))
    assert asked == [*range(999, 0, -20), *[0] * 5]


def test_its_steps_are_shown_as_pictures():
    """For filters and films: as many as are told, with expected pictures in [-1, 1] where the network is sure."""
    method, seen = _small(sample_steps=6, inner=2, denoise_steps=3), []
    assert isinstance(method, TrajectorySampler)
    known = 1 + torch.rand(1, 8, 8, generator=seeded())
    method.score = lambda x, k: method.schedule.hyvarinen_score(x, known.expand_as(x), k.clamp(min=1)) / x
    drawn = method.sample(2, seeded(), callback=seen.append)
    assert torch.equal(drawn, method.sample(2, seeded()))
    assert len(seen) == method.trajectory_steps == 15
    assert all(torch.allclose((step.x0 + 1) / 2, known - 1, atol=1e-3) for step in seen if step.sigma > 0)


@pytest.mark.parametrize("sampler", ["dls", "ums"])
def test_a_network_that_is_broken_is_said_in_one_line(sampler):
    method = _small(sampler=sampler)
    with torch.no_grad():
        next(method.average.parameters()).fill_(torch.nan)
    with pytest.raises(Diverged, match="the sample is NaN"):
        method.sample(1)


def test_ums_draws_pictures_too_even_past_zero():
    method = _small(sampler="ums", sample_steps=5)
    drawn = method.draw(200, generator=seeded())
    assert (drawn <= 0).any()
    x = method.sample(200, seeded())
    assert 0 <= x.min() <= x.max() <= 1


# The claim


def test_the_claim_in_small(monkeypatch):
    monkeypatch.setattr(paper, "_TINY", {**paper._TINY, "width": 8, "batch_size": 32, "sample_steps": 20, "lr": 3e-3, "ema": 0.9})
    monkeypatch.setattr(paper, "_DRAWN", 100)
    lab = Lab(0, budget=0.1)
    figures = positive_pictures(lab)
    assert figures["DLS"]["log2 Fréchet"] < figures["start"]["log2 Fréchet"] - 0.5
    best = min(figures[f"DDPM, {how}"]["log2 Fréchet"] for how in ("DDIM", "ancestral"))
    assert figures["DDPM, three times"]["log2 Fréchet"] == pytest.approx(best + 1.585, abs=1e-3)
    signs = judge(positive_pictures, [figures]).findings[2:]
    assert [finding.verdict.value for finding in signs] == ["reproduced"] * 2
    assert figures["DLS, 10 steps"]["smallest value"] > 0 >= figures["UMS, 10 steps"]["smallest value"]
    (pictures,) = lab.pictures.values()
    assert len(pictures) == 8 * 8


def test_the_claim_fails_where_signs_are_lost():
    good = {"share not positive": 0.0, "smallest value": 0.4}
    bad = {"share not positive": 1e-4, "smallest value": -0.1}
    for dls, ums, expected in ((good, bad, True), (bad, bad, False), (good, good, False)):
        figures = {"DLS": good, "DLS, 10 steps": dls, "UMS": good, "UMS, 10 steps": ums}
        assert all(condition.fn(figures) for condition in positive_pictures.conditions[2:]) is expected
