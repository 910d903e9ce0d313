import pytest
import torch

from sfumato.data import Batch, Facts, digits
from sfumato.diffusion import ResidualSchedule, convert, power_schedule
from sfumato.engine import Lab, build, fit
from sfumato.errors import BadData, BadSetting
from sfumato.method import Context, Restorer, capabilities
from sfumato.metrics import psnr
from sfumato.papers.diffusion import rddm
from sfumato.papers.diffusion.rddm import (
    RDDM,
    degrade,
    low_light,
    mixed_loss,
    select_objective,
    without_noise_prediction,
)

LOW_LIGHT = {"degrade_blur": 3, "degrade_gain": 0.4, "degrade_sigma": 0.05}
SCHEDULE = ResidualSchedule(power_schedule("decreased", 100), power_schedule("increased", 100))


def _small(**over):
    torch.manual_seed(0)
    return RDDM(
        RDDM.Config.small(**{"channels": 1, "patch": 8, "width": 8, "mults": (1, 2), "batch_size": 32, "ema": 0.9, **over})
    )


# Data


def test_degraded_pictures():
    x = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(degrade(x), x)
    assert torch.allclose(degrade(x, gain=0.4), 0.4 * x)
    blurred = degrade(x, blur=3)
    assert torch.allclose(blurred[..., 4, 4], x[..., 3:6, 3:6].mean((-1, -2)))
    assert torch.allclose(blurred[..., 0, 0], x[..., :2, :2].mean((-1, -2)))
    grey = torch.full((1, 1, 200, 200), 0.5)
    noisy = degrade(grey, sigma=0.1, generator=torch.Generator().manual_seed(0))
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noisy, degrade(grey, sigma=0.1, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(degrade(grey, sigma=0.1, noise=torch.ones_like(grey)), grey + 0.1)
    assert degrade(x, sigma=3.0).min() == 0


def test_pairs_are_needed_or_made():
    pairs, alone = Facts(9, 1, (8, 8), fields=("x", "index", "target")), Facts(9, 1, (8, 8))
    assert build(RDDM, pairs, preset="small").config.channels == 1
    assert build(RDDM, alone, preset="small", settings={"degrade_sigma": 0.1}).config.patch == 8
    with pytest.raises(BadData, match="degrade_gain"):
        build(RDDM, alone, preset="small")
    with pytest.raises(BadSetting, match="leave one of them out"):
        build(RDDM, pairs, preset="small", settings={"degrade_sigma": 0.1})
    with pytest.raises(BadData, match="no target"):
        _small().pair(Batch(torch.rand(2, 1, 8, 8), torch.arange(2)))
    with pytest.raises(BadData, match=r"9x8 pixels.*8x8"):
        _small().pair(Batch(torch.rand(2, 1, 8, 9), torch.arange(2), target=torch.rand(2, 1, 8, 8)))


def test_patches_fit_the_data_and_both_sides_of_a_pair_are_cut_alike():
    from torchvision.tv_tensors import Image

    fitted = RDDM.Config.small(degrade_sigma=0.1).fitted(Facts(9, 3, (31, 70)))
    assert fitted.patch == 24
    assert RDDM.Config.small(degrade_sigma=0.1).fitted(Facts(9, 3)).patch == 48
    augment, x = _small().augment(), torch.arange(400.0).view(1, 20, 20)
    a, b = augment(Image(x), Image(x + 1))
    assert a.shape == (1, 8, 8)
    assert torch.equal(a + 1, b)
    assert augment(torch.zeros(1, 3, 50)).shape == (1, 8, 8)
    with pytest.raises(BadData, match="20x20 pixels and its clean one 19x20"):
        augment(Image(x), Image(x[..., 1:]))


@pytest.mark.parametrize(
    ("over", "match"), [({"patch": 7}, "patch=7"), ({"degrade_blur": 2}, "degrade_blur=2"), ({"times": 3}, "sample_steps=5")]
)
def test_bad_settings_are_refused(over, match):
    with pytest.raises(BadSetting, match=match):
        _small(**over)


# The method


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (33, 20)])
def test_restores_pictures_of_any_size_and_always_alike(size):
    method, x = _small(mults=(1, 2, 2)), torch.rand(2, 1, *size)
    assert list(capabilities(method)) == ["restore"]
    assert isinstance(method, Restorer)
    y = method.restore(x)
    assert y.shape == x.shape
    assert not y.requires_grad
    assert 0 <= y.min() <= y.max() <= 1
    assert torch.equal(y, method.restore(x))
    other = method.restore(x, generator=torch.Generator().manual_seed(1))
    assert size == (1, 1) or not torch.equal(y, other)


def test_large_pictures_go_through_in_tiles(monkeypatch):
    method, seen = _small(sample_steps=1), []
    forward = type(method.net).forward
    monkeypatch.setattr(type(method.net), "forward", lambda self, x, t: seen.append(x.shape[-2:]) or forward(self, x, t))
    assert method.restore(torch.rand(1, 1, 600, 9)).shape == (1, 1, 600, 9)
    assert seen == [(512, 10), (216, 10)]


@pytest.mark.parametrize("objective", ["pred_res_noise", "pred_res", "pred_noise", "pred_x0_noise"])
def test_every_objective_trains_on_pairs(objective):
    clean = digits()[0].x[:64]
    dark = degrade(clean, blur=3, gain=0.4, sigma=0.05, generator=torch.Generator().manual_seed(0))
    method = _small(objective=objective, lr=3e-3)
    batch, context = Batch(dark, torch.arange(64), target=clean), Context(0, 9, 0, torch.Generator())

    def error():
        context.generator.manual_seed(5)
        return method.loss(batch, context).value.item()

    before = error()
    assert before == error()
    method = fit(method, batch, steps=15, progress=False)
    assert error() < 0.95 * before
    assert method.average.updates == 15


def test_learns_to_restore_clean_pictures_that_it_degrades_itself():
    train, test = digits()
    method = fit(_small(**LOW_LIGHT, objective="pred_res", lr=5e-3), train.x, steps=60, progress=False)
    figures = method.evaluate([test])
    assert figures["psnr"] > figures["psnr_degraded"] + 3
    rows = method.preview(Batch(test.x[:3], test.index[:3]), torch.Generator().manual_seed(0))
    assert {name: x.shape for name, x in rows.items()} == dict.fromkeys(("degraded", "restored", "clean"), (3, 1, 8, 8))
    assert method.evaluate([]) == {}


def test_evaluation_is_the_mean_over_pictures():
    method, x, y = _small(), torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    batch = Batch(x, torch.arange(3), target=y)
    expected = (-10 * (x - y).square().mean((1, 2, 3)).log10()).mean().item()
    assert method.evaluate([batch])["psnr_degraded"] == pytest.approx(expected)
    assert method.evaluate([batch])["psnr"] == pytest.approx(psnr(method.restore(x), y).mean().item())


def test_saved_and_loaded_it_restores_the_same():
    method, other, x = _small(sharing="encoder"), _small(sharing="encoder"), torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        for p in method.average.parameters():
            p.add_(0.01)
    assert not torch.equal(method.restore(x), other.restore(x))
    other.load_state_dict(method.state_dict())
    assert torch.equal(method.restore(x), other.restore(x))


# Which objective


def test_the_weight_moves_to_what_is_known():
    g = torch.Generator().manual_seed(0)
    x0, x_in = (2 * torch.rand(8, 1, 4, 4, generator=g) - 1 for _ in range(2))
    noise, t = torch.randn(8, 1, 4, 4, generator=g), torch.arange(5, 93, 11)
    for output, sign in ((x_in - x0, -1), (noise, 1)):
        share = torch.tensor(0.5, requires_grad=True)
        mixed_loss(output, share, x0, x_in, t, noise, SCHEDULE).backward()
        assert share.grad.sign() == sign
    assert mixed_loss(x_in - x0, 1.0, x0, x_in, t, noise, SCHEDULE) == 0
    assert mixed_loss(noise, 0.0, x0, x_in, t, noise, SCHEDULE) == 0


def test_select_objective_by_what_the_network_can_learn():
    class OneOutput(torch.nn.Module):
        """Sees the degraded picture alone: what follows from it can be learned, the noise cannot."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            return self.scale * x[:, 1:]

    g = torch.Generator().manual_seed(0)
    clean = torch.rand(16, 1, 4, 4, generator=g)
    pairs, net = [(0.5 + 2 * (clean - 0.5), clean)], OneOutput()
    assert select_objective(net, pairs, SCHEDULE, lr=0.01, generator=g) == "pred_res"
    assert net.scale == 0
    with pytest.raises(BadData, match="no pairs"):
        select_objective(net, [], SCHEDULE)


# The claims


@pytest.mark.parametrize(("claim", "rows"), [(low_light, 5), (without_noise_prediction, 4)])
def test_the_claims_run_and_report_every_arm(claim, rows, monkeypatch):
    few = [Batch(part.x[:40], part.index[:40]) for part in digits()]
    monkeypatch.setattr(rddm, "digits", lambda **_: few)
    lab = Lab(0, budget=1 / 400)
    figures = claim(lab)
    assert {"degraded", "RDDM, 2 steps", "RDDM, 5 steps", "DDIM, 5 steps", "DDIM, 50 steps"} <= figures.keys()
    assert figures["degraded"]["PSNR"] == pytest.approx(9.0, abs=0.5)
    assert [curve["arm"] for curve in lab.curves] == ["RDDM", "DDIM"]
    (pictures,) = lab.pictures.values()
    assert len(pictures) == 8 * rows


@pytest.mark.parametrize("objective", ["pred_noise", "pred_res"])
def test_the_baseline_is_exact_with_an_exact_network(objective):
    method = rddm._FromNoise(_small(objective=objective).config)
    x0, g = 2 * torch.rand(4, 1, 8, 8) - 1, torch.Generator().manual_seed(0)

    def exact(x, t):
        return convert(x0, x, t, method.ddpm, source="x0", target=method.predict)

    assert torch.allclose(method._sample(exact, x0, 5, g), x0, atol=1e-3)


def test_low_light_in_small(monkeypatch):
    train, test = digits(train=1500)
    few = Batch(test.x[:60], test.index[:60], test.label[:60])
    monkeypatch.setattr(rddm, "digits", lambda train, seed, data=(train, few): data)
    figures = low_light(Lab(0, budget=0.1))
    assert figures["RDDM, 5 steps"]["PSNR"] > figures["DDIM, 5 steps"]["PSNR"] + 0.5
    assert figures["RDDM, 5 steps"]["PSNR"] > figures["degraded"]["PSNR"] + 1
