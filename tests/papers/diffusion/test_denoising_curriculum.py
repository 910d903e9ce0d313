import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.claim import judge
from sfumato.data import Batch, digits
from sfumato.diffusion import Schedule, beta_schedule
from sfumato.engine import Lab, fit
from sfumato.engine.run_folder import Run
from sfumato.errors import BadSetting
from sfumato.method import Context, Result
from sfumato.nn import ToyDenoiser
from sfumato.papers.diffusion import denoising_curriculum
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.denoising_curriculum import (
    DenoisingCurriculum,
    easy_to_hard,
    low_noise_is_hard,
    task_difficulty,
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


@pytest.mark.parametrize("pacing", ["patience", "linear"])
def test_a_step_waits_for_no_number(pacing):
    method, ctx = small(pacing=pacing, longest=2), context()
    for _ in range(4):
        training = method.steps(ctx)
        next(training)
        with NothingIsRead():
            t = method.draw_times(16, ctx)
            stage = method.stage(ctx).float()
            with pytest.raises(StopIteration):
                training.send(Result(torch.tensor(1.0), {"stage": stage}))
        assert t.min() >= 1000 - 200 * int(stage)


class Killed(DenoisingCurriculum):
    """Its first training dies in the middle."""

    alive = True

    def loss(self, batch, ctx):
        if ctx.step == 9 and not self.alive:
            raise KeyboardInterrupt
        return super().loss(batch, ctx)


def test_a_stopped_run_goes_on_as_if_never_stopped(tmp_path):
    settings = {"clusters": 5, "longest": 3, "smoothing": 0.5, "order": "random"}
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


# How hard is which time?


def test_parts_are_trained_alone_from_the_same_weights():
    torch.manual_seed(0)
    net, x = ToyDenoiser(64, width=16, layers=1), 2 * PICTURES.flatten(1) - 1
    before = {name: p.clone() for name, p in net.named_parameters()}
    schedule = Schedule(beta_schedule("linear"))
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            if self.training:
                seen.append(t)
            return self.net(x, t)

    found, again = (
        task_difficulty(model, x, schedule, intervals=3, steps=20, measure=5, lr=1e-2, generator=torch.Generator().manual_seed(0))
        for model in (Watched(), net)
    )
    assert found.edges.tolist() == [0, 333, 666, 1000]
    assert found.steps.tolist() == [0, 4, 8, 12, 16, 20]
    assert found.losses.shape == (3, 6)
    assert torch.equal(found.losses, again.losses)
    assert len(seen) == 60
    for part, times in enumerate((seen[:20], seen[20:40], seen[40:])):
        assert torch.cat(times).min() >= found.edges[part]
        assert torch.cat(times).max() < found.edges[part + 1]
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert (found.losses[:, -1] < found.losses[:, 0]).all()


def test_steps_until_the_loss_stays_low():
    losses = torch.tensor([[9.0, 1.0, 5.0, 1.4, 1.0], [2.0, 1.05, 1.0, 1.0, 1.0]])
    found = denoising_curriculum.TaskDifficulty(torch.arange(3), torch.arange(0, 50, 10), losses)
    assert found.normalised[0].tolist() == [1, 0, 0.5, pytest.approx(0.05), 0]
    assert found.steps_to(0.1).tolist() == [30, 10]
    assert found.steps_to(0.01).tolist() == [40, 20]
    with pytest.raises(BadSetting, match="clusters of 1000"):
        task_difficulty(torch.nn.Identity(), losses, Schedule(beta_schedule("linear")), intervals=2000)


@pytest.mark.parametrize("kind", [MaskUNet, TiUE])
def test_what_starts_from_a_ddpm_run_starts_from_its_runs_too(kind):
    """They take the network, and leave the settings of the curriculum behind."""
    previous = small(attn_at=(1,))  # masks lie on attention's layers
    method = kind.init_from(kind.Config.small(), previous)
    assert method.config.ddpm == previous.base_settings
    assert DDPM(DDPM.Config.model_validate(method.config.ddpm)).config.width == 8
    assert "clusters" not in method.config.ddpm
    assert any(torch.equal(p, previous.average.module.conv_in.weight) for p in method.parameters())


# The claims


def test_difficulty_claim_in_small():
    figures = low_noise_is_hard(Lab(0, budget=0.04))
    assert len(figures) == 12
    assert all(0 < v["steps to converge"] <= 12 for v in figures.values())
    findings = judge(low_noise_is_hard, [figures]).findings
    assert findings[0].verdict.value == "reproduced"
    tenths = list(figures)[:10]
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
