import pytest
import torch

from sfumato.data import Batch, digits
from sfumato.engine import Lab, Run, fit, load
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.method import Sampler, capabilities
from sfumato.papers.diffusion import maskunet
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.maskunet import MaskUNet, learned_masks, rewarded_masks
from sfumato.papers.restoration.cbsn import CBSN


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def ddpm():
    torch.manual_seed(0)
    method = DDPM(DDPM.Config.small(image_size=8, channels=1, width=8, attn_at=(0, 1), batch_size=16))
    return fit(method, digits()[0].x[:256], steps=10, progress=False)


def _over(ddpm, **over):
    settings = {"steps": 3, "batch_size": 8, "sample_steps": 3, "hidden": 8, **over}
    return MaskUNet.init_from(MaskUNet.Config.small(**settings), ddpm)


def test_it_begins_with_the_samples_of_the_averaged_model(ddpm):
    ddpm.config = ddpm.config.model_copy(update={"sample_steps": 3})
    method = _over(ddpm)
    assert torch.allclose(method.sample(4, _seeded()), ddpm.sample(4, _seeded()), atol=1e-5)
    assert torch.equal(method.sample(4, _seeded(), masks=False), ddpm.sample(4, _seeded()))


def test_masks_learn_the_model_does_not_and_saved_it_draws_the_same(ddpm, tmp_path):
    run = Run.create(tmp_path, "maskunet")
    run.write_config({"slug": "maskunet"})
    method = fit(_over(ddpm, lr=0.05), digits()[0].x[:64], progress=False, run=run)
    before = ddpm.average.module.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in method.masked.unet.state_dict().items())
    again = load(run.path)
    assert isinstance(again, Sampler)
    assert list(capabilities(again)) == ["sample"]
    a, b, c = (m.sample(3, _seeded(seed)) for m, seed in ((method, 0), (again, 0), (again, 1)))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.allclose(a, again.sample(3, _seeded(), masks=False), atol=1e-3)
    further = MaskUNet.init_from(again.config, again)
    assert torch.equal(further.sample(3, _seeded()), a)
    with pytest.raises(BadCheckpoint, match="another hidden"):
        MaskUNet.init_from(MaskUNet.Config.small(hidden=16), again)


@pytest.mark.parametrize(("decay", "last"), [("none", 1.0), ("cosine", 0.5)])
def test_the_rate_stays_as_the_authors_have_it_or_falls(ddpm, decay, last):
    method, rates = _over(ddpm, steps=2, decay=decay), []
    build = method.optimizers

    def optimizers():
        built = build()
        built["net"].register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return built

    method.optimizers = optimizers
    fit(method, digits()[0].x[:64], progress=False)
    assert rates == pytest.approx([1e-3, last * 1e-3])


def test_held_out_errors_with_and_without_masks(ddpm):
    x = digits()[1].x[:40]
    found = _over(ddpm).evaluate([Batch(x, torch.arange(40))])
    assert found["error with masks"] == pytest.approx(found["error without"], rel=1e-4)
    assert found["weights kept"] == 1
    method = _over(ddpm)
    for p in method.masked.mask_parameters():
        p.data -= 2 * torch.rand(p.shape, generator=_seeded())
    found = method.evaluate([Batch(x, torch.arange(40))])
    assert found["error with masks"] != pytest.approx(found["error without"], rel=1e-3)
    assert found["weights kept"] < 1
    for block in method.masked.masks:  # all open but one wide layer, which counts by its weights
        for name, p in block.named_parameters():
            p.data.fill_(5.0 if name.endswith(("in_bias", "out_bias")) else 0.0)
    names = list(method.masked.gated_weights)
    method.masked.masks[0].adapters[0].in_bias.data.fill_(-9.0)
    sizes = [weight.numel() for weight in method.masked.gated_weights.values()]
    kept = method.evaluate([Batch(x, torch.arange(40))])["weights kept"]
    assert names[0].startswith("up_blocks.0")
    assert kept == pytest.approx(1 - sizes[0] / sum(sizes), abs=1e-3)
    assert kept != pytest.approx(1 - 1 / len(sizes), abs=1e-2)
    method = MaskUNet.init_from(method.config.model_copy(update={"draw_masks": False}), method).eval()
    start, model = torch.randn(2, 1, 8, 8, generator=_seeded()), method.model
    t = torch.full((2,), 500)
    assert torch.equal(model(_seeded(0))(start, t), model(_seeded(1))(start, t))


def test_words_are_refused_in_one_line(ddpm):
    with pytest.raises(BadSetting, match="--init runs/ddpm"):
        MaskUNet(MaskUNet.Config.small())
    with pytest.raises(BadSetting, match="--init runs/ddpm"):
        MaskUNet(_over(ddpm).config).adopt(lambda _: torch.nn.Identity())
    with pytest.raises(BadCheckpoint, match="not for one of CBSN"):
        MaskUNet.init_from(MaskUNet.Config.small(), CBSN(CBSN.Config.small(channels=1)))
    with pytest.raises(BadData, match="resize them"):
        _over(ddpm).evaluate([Batch(torch.rand(2, 1, 8, 4), torch.arange(2))])
    with pytest.raises(BadSetting, match="include some of"):
        _over(ddpm, include=("to_z",))


# Claims


@pytest.fixture
def few(monkeypatch):
    for name, value in {"TIMES": 2, "DRAWN": 20, "DIGITS": 1, "PER_DIGIT": 2}.items():
        monkeypatch.setattr(maskunet, name, value)
    monkeypatch.setattr(maskunet, "BASE", {**maskunet.BASE, "width": 8})


def _judged(claim, figures):
    return [c.difference(figures) if hasattr(c, "difference") else c.fn(figures) for c in claim.conditions]


@pytest.mark.usefixtures("few")
def test_the_claim_of_learned_masks_in_small():
    """A model that has hardly learned: every arm is measured, masks are still all 1."""
    figures = learned_masks(Lab(0, budget=0.01))
    assert set(figures) == {"frozen", "masks", "static mask", "masks by time", "random masks", "fine-tuned layers"}
    assert figures["masks"]["weights kept"] > 0.99
    assert figures["fine-tuned layers"]["noise error"] != figures["frozen"]["noise error"]
    assert figures["masks"]["noise error"] == pytest.approx(figures["frozen"]["noise error"], rel=1e-3)
    assert len(_judged(learned_masks, figures)) == 4


@pytest.mark.usefixtures("few")
def test_the_claim_of_rewarded_masks_in_small():
    """The reward of masks that are never moved is that of random ones."""
    lab = Lab(0, budget=0.01)
    figures = rewarded_masks(lab)
    assert figures["moved masks"]["weights kept"] == pytest.approx(0.93, abs=0.05)
    assert all(f["reward"] < 0 for f in figures.values())
    assert set(lab.pictures) == {"all weights", "random masks", "moved masks"}
    assert len(_judged(rewarded_masks, figures)) == 4
