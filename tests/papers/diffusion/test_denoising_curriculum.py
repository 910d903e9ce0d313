import pytest
import torch
from deepinv.physics import Inpainting
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.claim import judge
from sfumato.data import Batch, digits
from sfumato.diffusion import EDMPrecond, edm_sigmas, lognormal_clusters
from sfumato.engine import Lab, fit
from sfumato.engine.run_folder import Run
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.method import Context, Result
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.denoising_curriculum import (
    DenoisingCurriculum,
    easy_to_hard,
    low_noise_is_hard,
)
from sfumato.papers.diffusion.maskunet import MaskUNet
from sfumato.papers.diffusion.time_independent_encoder import TiUE

PICTURES = digits()[0].x[:128]


def small(kind=DenoisingCurriculum, **over):
    torch.manual_seed(0)
    settings = {"channels": 1, "image_size": 8, "width": 8, "batch_size": 16, "sample_steps": 5, "share": None, **over}
    return kind(kind.Config.small(**settings))


def context(step=0, total=10):
    return Context(step, total, 0, torch.Generator().manual_seed(1))


class NothingIsRead(TorchDispatchMode):
    """Refuses what makes the CPU wait for a GPU: a tensor's value as a number, or a size that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


# The method


def test_it_begins_with_the_noisiest_times_and_ends_with_all():
    method = small(clusters=4, longest=3, patience=100)
    seen = []
    draw = method.draw_times
    method.draw_times = lambda n, ctx: seen.append(draw(n, ctx)) or seen[-1]
    fit(method, PICTURES, steps=14, progress=False, device="cpu")
    for step, t in enumerate(seen):
        assert t.min() >= 250 * (3 - min(3, step // 3))
    assert torch.cat(seen[9:]).min() < 250
    assert int(method.pacer.stage) == 4
    assert method.average.updates == 14


def test_one_cluster_is_the_base():
    torch.manual_seed(0)
    settings = {"channels": 1, "image_size": 8, "width": 8}
    base, same = DDPM(DDPM.Config.small(**settings)), small(clusters=1)
    same.net.load_state_dict(base.net.state_dict())
    t = same.draw_times(4000, context())
    assert (t.min() < 5, t.max() > 994) == (True, True)
    base.draw_times = same.draw_times
    batch = Batch(PICTURES[:8], torch.arange(8))
    assert torch.equal(base.loss(batch, context()).value, same.loss(batch, context()).value)


def test_linear_pacing_reads_the_progress_alone():
    method = small(pacing="linear", clusters=4, share=0.5, patience=0)
    stages = [int(method.loss(Batch(PICTURES[:2], torch.arange(2)), context(i, 8)).logs["stage"]) for i in range(8)]
    assert stages == [1, 2, 3, 4, 4, 4, 4, 4]
    assert int(small(pacing="linear", clusters=5).stage(context(159, 1000))) == 4
    assert int(small(pacing="linear", clusters=5).stage(context(160, 1000))) == 5


def test_patience_may_not_take_more_than_its_share():
    method = small(clusters=5, share=0.25, patience=1000)
    fit(method, PICTURES, steps=12, progress=False, device="cpu")
    assert int(method.pacer.stage) == 5
    assert int(method.pacer.age) >= 8


def test_the_pacer_sees_the_loss_of_all_processes():
    method = small()
    training = method.steps(context())
    next(training)
    with pytest.raises(StopIteration):
        training.send(Result(torch.tensor(5.0), {}))
    assert method.pacer.best == 5
    assert method.pacer.age == 1


@pytest.mark.parametrize(("pacing", "formulation"), [("patience", "ddpm"), ("linear", "ddpm"), ("patience", "edm")])
def test_a_step_waits_for_no_number(pacing, formulation):
    method, ctx = small(pacing=pacing, formulation=formulation, longest=2), context()
    for _ in range(4):
        training = method.steps(ctx)
        next(training)
        with NothingIsRead():
            t = method.draw_times(16, ctx)
            stage = method.stage(ctx).float()
            with pytest.raises(StopIteration):
                training.send(Result(torch.tensor(1.0), {"stage": stage}))
        assert t.min() >= (1000 - 200 * int(stage) if formulation == "ddpm" else 0)


class Killed(DenoisingCurriculum):
    """Its first training dies in the middle."""

    alive = True

    def loss(self, batch, ctx):
        if ctx.step == 9 and not self.alive:
            raise KeyboardInterrupt
        return super().loss(batch, ctx)


@pytest.mark.parametrize("formulation", ["ddpm", "edm"])
def test_a_stopped_run_goes_on_as_if_never_stopped(tmp_path, formulation):
    settings = {"formulation": formulation, "clusters": 5, "longest": 3, "smoothing": 0.5, "order": "random"}
    whole, broken = (Run.create(tmp_path, "denoising-curriculum") for _ in range(2))
    for run in (whole, broken):
        run.write_config({"slug": "denoising-curriculum"})
    straight = fit(small(Killed, **settings), PICTURES, steps=12, run=whole, progress=False, device="cpu")
    first, other = small(Killed, **settings), small(Killed, **settings)
    first.alive = False
    with pytest.raises(KeyboardInterrupt):
        fit(first, PICTURES, steps=12, run=broken, save_every=4, progress=False, device="cpu")
    other.curriculum.low.copy_(other.curriculum.low.flip(0))  # another random order
    resumed = fit(other, PICTURES, run=broken, progress=False, device="cpu")
    assert int(resumed.pacer.stage) > 1
    mine, theirs = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items() if torch.is_tensor(value))
    a, b = (method.sample(2, torch.Generator().manual_seed(0)) for method in (straight, resumed))
    assert torch.equal(a, b)


def test_settings():
    assert DenoisingCurriculum.Config().clusters == 20
    assert DenoisingCurriculum.Config().patience == 200
    with pytest.raises(BadSetting, match="clusters=30 of times=20"):
        small(clusters=30, times=20)


# Continuous noise levels


def edm(**over):
    return small(**{"formulation": "edm", **over})


def test_edm_begins_with_the_noisiest_levels_and_ends_with_all():
    method = edm(clusters=4, longest=3, patience=100)
    seen = []
    draw = method.draw_times
    method.draw_times = lambda n, ctx: seen.append(draw(n, ctx)) or seen[-1]
    fit(method, PICTURES, steps=40, progress=False, device="cpu")
    edges = lognormal_clusters(4)
    for step, sigma in enumerate(seen):
        assert sigma.log().min() >= edges[3 - min(3, step // 3)] - 1e-6
    logs = torch.cat(seen[9:]).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.2)
    assert logs.std().item() == pytest.approx(1.2, abs=0.2)


def test_edm_loss_is_that_of_the_scaled_network():
    method, batch = edm(clusters=1), Batch(PICTURES[:16], torch.arange(16))
    value, again = (method.loss(batch, context()).value for _ in range(2))
    assert torch.equal(value, again)
    replay, x0 = context(), 2 * PICTURES[:16] - 1
    sigma = method.draw_times(16, replay)
    noise = torch.randn(x0.shape, generator=replay.generator)
    scaled = EDMPrecond(method.net)
    errors = (scaled(x0 + sigma[:, None, None, None] * noise, sigma) - x0).square().flatten(1).mean(1)
    assert value.item() == pytest.approx((scaled.weight(sigma) * errors).mean().item(), rel=1e-4)


def test_edm_learns():
    torch.manual_seed(0)
    method = edm(clusters=1, batch_size=32, ema=0.9)
    t, noise = torch.randint(0, 1000, (128,)), torch.randn(PICTURES.shape)
    before = method.losses_at(PICTURES, t, noise).mean()
    fit(method, PICTURES, steps=50, progress=False, device="cpu")
    assert method.losses_at(PICTURES, t, noise).mean() < 0.9 * before
    y = PICTURES + 0.2 * noise
    assert (method.denoise(y, 0.2) - PICTURES).square().mean() < 0.9 * (y - PICTURES).square().mean()
    assert torch.allclose(method.denoise(PICTURES, 0.0), PICTURES, atol=1e-2)


def test_edm_draws_by_heun_from_the_largest_level():
    method, seen = edm(sample_steps=None), []
    assert (method.config.sampler, method.config.sample_steps, method.trajectory_steps) == ("heun", 18, 18)
    drawn = method.sample(3, torch.Generator().manual_seed(0), callback=seen.append)
    assert drawn.shape == (3, 1, 8, 8)
    torch.testing.assert_close(torch.stack([s.sigma for s in seen]).double(), edm_sigmas(18)[:-1], rtol=1e-6, atol=0)
    assert seen[0].x_t.std().item() == pytest.approx(80, rel=0.2)
    assert torch.equal(drawn, method.sample(3, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, edm(sample_steps=18, sampler="euler").sample(3, torch.Generator().manual_seed(0)))


def test_edm_learns_and_draws_classes():
    told = {"conditional": True, "classes": 3, "class_dropout": 0.0, "sample_steps": 3}
    method, batch = edm(**told), Batch(PICTURES[:4], torch.arange(4), torch.tensor([0, 1, 2, 0]))
    fit(method, (PICTURES, torch.arange(128) % 3), steps=3, progress=False, device="cpu")
    other = Batch(PICTURES[:4], torch.arange(4), torch.tensor([1, 2, 0, 1]))
    assert method.loss(batch, context()).value != method.loss(other, context()).value
    drawn = {}
    for guidance in (0.0, 1.0, 3.0):
        method.config = method.config.model_copy(update={"guidance": guidance, "label": "1"})
        drawn[guidance] = method.sample(2, torch.Generator().manual_seed(0))
    assert len({float(x.sum()) for x in drawn.values()}) == 3
    with pytest.raises(BadSetting, match="train with conditional=true"):
        edm(label="1").sample(1)


def test_a_run_is_a_base_like_a_ddpm_run_but_for_edm():
    method = small()
    base = DDPM(DDPM.Config.model_validate(method.base_settings()))
    base.net.load_state_dict(method.net.state_dict())
    with pytest.raises(BadCheckpoint, match="give one of formulation=ddpm"):
        edm().base_settings()


def test_edm_restores_pictures_of_another_size():
    physics = Inpainting((1, 8, 12), mask=torch.ones(1, 8, 12).index_fill_(2, torch.tensor([4, 5]), 0))
    method = edm()
    y = physics(PICTURES[:2].repeat(1, 1, 1, 2)[..., :12])
    restored = method.restore(y, physics, steps=4)
    assert restored.shape == (2, 1, 8, 12)
    assert torch.allclose(physics(restored), y, atol=1e-4)


def test_formulations_are_kept_apart():
    assert (small(sample_steps=None).config.sampler, small(sample_steps=None).config.sample_steps) == ("ddim", 250)
    with pytest.raises(BadSetting, match="sampler=ddpm goes by discrete times"):
        edm(sampler="ddpm")
    method = edm()
    method.config = method.config.model_copy(update={"sampler": "ddim"})
    with pytest.raises(BadSetting, match="takes heun or euler"):
        method.sample(1)
    with pytest.raises(BadSetting, match="not below sigma_max"):
        edm(sigma_min=9.0, sigma_max=3.0)
    with pytest.raises(BadCheckpoint, match="trained with formulation=ddpm"):
        DenoisingCurriculum.init_from(method.config, small())
    again = DenoisingCurriculum.init_from(method.config, method)
    assert torch.equal(*(m.sample(1, torch.Generator().manual_seed(0)) for m in (again, edm())))


@pytest.mark.parametrize("formulation", ["ddpm", "edm"])
def test_an_expert_draws_in_its_part_alone(formulation):
    method = small(formulation=formulation, sample_steps=10)
    asked = []

    class Asked(torch.nn.Module):
        def forward(self, x, t):
            asked.append(t)
            return method.average(x, t)

    start = torch.Generator().manual_seed
    plain = method.sample(2, start(0))
    assert torch.equal(plain, method.with_expert(Asked(), 250, 500).sample(2, start(0)))
    told = torch.stack(asked)[:, 0]
    if formulation == "edm":
        told = (method.schedule.sigma - (4 * told[:, None]).exp()).abs().argmin(1)
    assert ((told >= 250) & (told < 500)).all()
    assert len(told) == (2 if formulation == "ddpm" else 4)  # Heun: two steps of two calls
    x, t, noise = PICTURES[:4], torch.tensor([0, 300, 600, 999]), torch.randn(4, 1, 8, 8)
    torch.manual_seed(5)
    other = DenoisingCurriculum(method.config)
    whole = method.with_expert(other.average)
    assert torch.equal(whole.losses_at(x, t, noise), other.losses_at(x, t, noise))
    assert torch.equal(plain, method.sample(2, start(0)))  # the method itself stays


@pytest.mark.parametrize("kind", [MaskUNet, TiUE])
def test_what_starts_from_a_ddpm_run_starts_from_its_runs_too(kind):
    """They take the network, and leave the settings of the curriculum behind."""
    previous = small(attn_at=(1,))  # masks lie on attention's layers
    method = kind.init_from(kind.Config.small(), previous)
    assert method.config.ddpm == previous.base_settings()
    assert DDPM(DDPM.Config.model_validate(method.config.ddpm)).config.width == 8
    assert "clusters" not in method.config.ddpm
    assert any(torch.equal(p, previous.average.module.conv_in.weight) for p in method.parameters())


# The claims


def test_difficulty_claim_in_small():
    figures = low_noise_is_hard(Lab(0, budget=0.04))
    tenths, rest = list(figures)[:10], list(figures)[10:]
    assert rest == ["quieter half", "noisier half", "all times"]
    assert all(0 < v["steps to converge"] <= 12 for name, v in figures.items() if name != "all times")
    far = [figures[name]["Fréchet distance"] for name in tenths]
    assert len(set(far)) == 10
    assert figures["quieter half"]["Fréchet distance"] == pytest.approx(sum(far[:5]) / 5)
    findings = judge(low_noise_is_hard, [figures]).findings
    assert findings[0].verdict.value == "reproduced"
    figures[tenths[3]]["relative entropy"] = 9.0
    assert judge(low_noise_is_hard, [figures]).findings[0].verdict.value == "not reproduced"


def test_training_claim_in_small():
    lab = Lab(0, budget=0.004)
    figures = easy_to_hard(lab)
    assert set(figures) == {"real digits", "uniform", "easy to hard", "hard to easy", "random order"}
    distances = {name: v["Fréchet distance"] for name, v in figures.items()}
    assert min(distances, key=distances.get) == "real digits"
    assert len(set(distances.values())) == 5
    assert figures["uniform"]["steps before all times"] == 0
    assert 0 < figures["easy to hard"]["steps before all times"] <= 3
    assert {curve["arm"] for curve in lab.curves} == set(figures) - {"real digits"}
