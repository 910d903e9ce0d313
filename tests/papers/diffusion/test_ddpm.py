import pytest
import torch

from sfumato.data import Batch, digits
from sfumato.engine import fit
from sfumato.errors import BadData, BadSetting
from sfumato.method import Context, Sampler
from sfumato.nn import unet_decode, unet_embed, unet_encode
from sfumato.papers.diffusion.ddpm import DDPM


def _small(**over):
    torch.manual_seed(0)
    return DDPM(DDPM.Config.small(**{"image_size": 8, "channels": 1, "width": 16, "batch_size": 32, "sample_steps": 10, **over}))


def test_learns_and_samples_look_more_like_the_data():
    data = digits()[0]
    x = data.x[:512]
    method = _small(ema=0.9)

    def gap(m):
        return (m.sample(64, torch.Generator().manual_seed(3)).mean(0) - x.mean(0)).abs().mean()

    before = gap(method)
    trained = fit(method, x, steps=80, progress=False)
    assert isinstance(trained, Sampler)
    assert trained.average.updates == 80
    assert gap(trained) < 0.7 * before


def test_saved_and_loaded_it_draws_the_same():
    method, other = _small(), _small()
    with torch.no_grad():
        for p in method.average.parameters():
            p.add_(0.01)
    a = method.sample(2, torch.Generator().manual_seed(0))
    assert not torch.equal(a, other.sample(2, torch.Generator().manual_seed(0)))
    other.load_state_dict(method.state_dict())
    assert torch.equal(a, other.sample(2, torch.Generator().manual_seed(0)))
    assert 0 <= a.min() <= a.max() <= 1


def test_the_loss_repeats_with_its_generator_and_refuses_other_sizes():
    method, batch = _small(), Batch(torch.rand(4, 1, 8, 8), torch.arange(4))
    a, b = (method.loss(batch, Context(0, 10, 0, torch.Generator().manual_seed(s))).value for s in (1, 1))
    assert torch.equal(a, b)
    with pytest.raises(BadData, match="image_size"):
        method.loss(Batch(torch.rand(4, 1, 9, 9), torch.arange(4)), Context(0, 10, 0, torch.Generator()))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun"])
def test_every_sampler_finds_the_one_picture_that_is_known(sampler, schedule):
    """A network that always expects the same picture: all samplers end there, and are watched at every step."""
    method, seen = _small(sampler=sampler, schedule=schedule, predict="x0", sample_steps=12), []
    known = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1))
    method.average.forward = lambda x, t: type("Out", (), {"sample": (2 * known - 1).expand_as(x)})()
    drawn = method.sample(3, torch.Generator().manual_seed(0), callback=seen.append)
    assert torch.allclose(drawn, known.expand(3, 1, 8, 8), atol=1e-3)
    assert len(seen) == method.trajectory_steps == 12
    assert all(torch.allclose((step.x0 + 1) / 2, known, atol=1e-5) for step in seen)


def test_samplers_agree_where_steps_are_many():
    """Of data that is one normal, so that the exact answer is known: the flow keeps the order of the noise it starts from."""
    method = _small(sample_steps=200)
    spread, abar = 0.3, method.schedule.abar

    def exact(x, t):
        signal = abar[t].to(x).view(-1, 1, 1, 1)
        return type("Out", (), {"sample": (1 - signal).sqrt() * x / (signal * spread**2 + 1 - signal)})()

    method.average.forward = exact
    drawn = {}
    for sampler in ("ddim", "ddpm", "euler", "heun"):
        method.config = method.config.model_copy(update={"sampler": sampler})
        drawn[sampler] = 2 * method.sample(16, torch.Generator().manual_seed(0)) - 1
    assert all(x.std().item() == pytest.approx(spread, rel=0.1) for x in drawn.values())
    assert (drawn["heun"] - drawn["ddim"]).abs().max() < 0.05
    assert (drawn["euler"] - drawn["ddim"]).abs().max() < 0.1
    assert (drawn["ddpm"] - drawn["ddim"]).abs().max() > 0.3


def _conditional(**over):
    return _small(conditional=True, classes=10, **over)


def test_told_classes_it_draws_the_one_that_is_asked_for():
    """A judge of digits finds the classes; guided samples are of their class more often, and any class is none in particular."""
    from sfumato.probes import train_judge

    data = digits()[0]
    method = fit(_conditional(ema=0.98, batch_size=64), data, steps=150, progress=False)
    judge = train_judge(data.x, data.label)
    share = {}
    for guidance in (0.0, 1.0, 3.0):
        method.config = method.config.model_copy(update={"guidance": guidance})
        drawn = method.sample(200, torch.Generator().manual_seed(1))
        share[guidance] = (judge(drawn).argmax(1) == method.labels(200)).float().mean().item()
    assert share[0.0] < 0.25
    assert share[1.0] > 0.4
    assert share[3.0] > share[1.0] + 0.1
    method.config = method.config.model_copy(update={"label": "7"})
    assert (judge(method.sample(50, torch.Generator().manual_seed(1))).argmax(1) == 7).float().mean() > 0.6


def test_classes_come_from_the_data_by_name():
    from sfumato.data.batch import Facts

    facts = Facts(20, 1, (8, 8), ("cat", "dog"), ("x", "index", "label"))
    config = DDPM.Config.small(conditional=True, width=8).fitted(facts)
    assert (config.classes, config.class_names) == (2, ("cat", "dog"))
    method = DDPM(config.model_copy(update={"label": "dog"}))
    assert method.labels(3).tolist() == [1, 1, 1]
    for label in ("wolf", "2", "-1"):
        method.config = config.model_copy(update={"label": label})
        with pytest.raises(BadSetting, match="cat, dog"):
            method.sample(1)
    assert DDPM.Config.small(width=8).fitted(facts).class_names is None
    with pytest.raises(BadData, match="folder a class"):
        DDPM.Config.small(conditional=True).fitted(Facts(20, 1, (8, 8)))
    with pytest.raises(BadSetting, match="the data has 4"):
        DDPM.Config.small(conditional=True, classes=3).fitted(Facts(9, 1, (8, 8), tuple("abcd"), ("x", "index", "label")))
    with pytest.raises(BadSetting, match="conditional=true"):
        _small(guidance=2.0).sample(1)
    with pytest.raises(BadData, match="a class with every picture"):
        method.loss(Batch(torch.rand(4, 1, 8, 8), torch.arange(4)), Context(0, 10, 0, torch.Generator()))


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_guided_by_one_it_is_the_network_of_the_class(sampler):
    method = _conditional(sampler=sampler, sample_steps=4, label="3")
    a, seen = method.sample(2, torch.Generator().manual_seed(0)), []
    inner, method.average.forward = method.average.forward, lambda x, t, c: seen.append(c.tolist()) or inner(x, t, c)
    assert torch.equal(a, method.sample(2, torch.Generator().manual_seed(0)))
    assert seen
    assert all(c == [3, 3] for c in seen)  # one pass of two pictures, not of four
    del method.average.forward
    assert not torch.equal(a, _other_label(method))


def _other_label(method):
    method.config = method.config.model_copy(update={"label": "4"})
    return method.sample(2, torch.Generator().manual_seed(0))


def test_whoever_says_no_class_gets_pictures_of_any():
    """Restoration, noise levels and what other papers make of the network: all call it without a class."""
    from deepinv.physics import Denoising, GaussianNoise

    method, x, t = _conditional(), torch.rand(2, 1, 8, 8), torch.tensor([3, 500])
    net = method.average.module.eval()
    with torch.no_grad():
        assert torch.equal(net(x, t).sample, net(x, t, torch.tensor([10, 10])).sample)
        e = unet_embed(net, t)
        assert torch.allclose(e, unet_embed(net, t, cond=torch.tensor([10, 10])))
        assert torch.allclose(unet_decode(net, *unet_encode(net, x, t)), net(x, t).sample, atol=1e-6)
    assert method.losses_at(x, t, torch.randn_like(x)).shape == (2,)
    assert method.restore(x, Denoising(GaussianNoise(0.1)), steps=2).shape == x.shape
