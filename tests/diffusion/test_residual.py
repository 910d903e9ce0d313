from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from sfumato.diffusion import (
    ResidualObjective,
    ResidualSchedule,
    Schedule,
    beta_schedule,
    power_schedule,
    residual_loss,
    sample_residual,
)
from sfumato.errors import BadSetting

VECTORS = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "rddm.npz").items()}
X0, X_IN, EPS, T = (VECTORS[k] for k in ("x0", "x_in", "eps", "t"))
SCHEDULE = ResidualSchedule(power_schedule("decreased", 100), power_schedule("increased", 100))
OBJECTIVES = get_args(ResidualObjective)


def _close(a, b, atol=1e-5):
    assert torch.allclose(a, b.to(a.dtype), rtol=0, atol=atol), (a - b).abs().max()


def _stand_in(x, t):
    """The fixed model of the reference figures."""
    y = torch.einsum("ij,bjhw->bihw", VECTORS["stub_w"], torch.cat([x, X_IN], 1)) * (1 + t.view(-1, 1, 1, 1) / 1000)
    return torch.cat([y[:, :3].clamp(-1.5, 1.5), y[:, 3:]], 1)


def _doubles(n=3):
    g = torch.Generator().manual_seed(0)
    x0, x_in = (2 * torch.rand(n, 1, 4, 4, generator=g, dtype=torch.float64) - 1 for _ in range(2))
    return x0, x_in, torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64)


def _exact(objective, x0, x_in, noise):
    """Outputs of a network that knows everything."""
    res = x_in - x0
    heads = {
        "pred_res_noise": (res, noise),
        "pred_x0_noise": (x0, noise),
        "pred_res_add_noise": (res, res + noise),
        "pred_x0_add_noise": (x0, x0 + noise),
        "pred_res": (res,),
        "pred_noise": (noise,),
    }
    return torch.cat(heads[objective], 1)


# Schedules


@pytest.mark.parametrize("kind", ["decreased", "increased", "average", "normal"])
def test_shares_match_the_reference(kind):
    power = float(VECTORS["power_ratio"])
    _close(power_schedule(kind, 100, power, zero=True), VECTORS[f"power_{kind}"], 1e-7)
    assert power_schedule(kind, 77, 0.5, 0.01).sum().item() == pytest.approx(0.01, abs=1e-12)


def test_tables_match_the_reference():
    _close(SCHEDULE.alpha, VECTORS["sched_alphas"], 1e-7)
    _close(SCHEDULE.beta2, VECTORS["sched_betas2"], 1e-7)
    _close(SCHEDULE.alpha_bar, VECTORS["sched_alphas_cumsum"], 1e-6)
    _close(SCHEDULE.beta_bar, VECTORS["sched_betas_cumsum"], 1e-6)
    assert SCHEDULE.alpha_bar[-1].item() == pytest.approx(1, abs=1e-12)
    assert SCHEDULE.beta_bar[-1].item() == pytest.approx(1, abs=1e-12)


def test_posterior_coefficients_match_the_reference():
    t, one = torch.arange(100), torch.ones(100, 1, dtype=torch.float64)
    mean_of_x_t, variance = SCHEDULE.posterior(0 * one, 0 * one, one, t)
    _close(mean_of_x_t[:, 0], VECTORS["sched_posterior_mean_coef1"])
    _close(SCHEDULE.posterior(0 * one, one, 0 * one, t)[0][:, 0], VECTORS["sched_posterior_mean_coef2"])
    _close(SCHEDULE.posterior(one, one, 0 * one, t)[0][:, 0], VECTORS["sched_posterior_mean_coef3"])
    _close(variance[:, 0], VECTORS["sched_posterior_variance"])


def test_bad_tables_are_refused():
    for alpha, beta2, match in (
        (torch.full((4,), 0.25), torch.full((5,), 0.2), "one length"),
        (torch.tensor([1.5, -0.5]), torch.tensor([0.5, 0.5]), "alpha"),
        (torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.9]), "beta2"),
    ):
        with pytest.raises(BadSetting, match=match):
            ResidualSchedule(alpha, beta2)
    with pytest.raises(BadSetting, match="'linear'"):
        power_schedule("linear", 10)
    with pytest.raises(BadSetting, match="T=1"):
        power_schedule("average", 1)


# Forward, posterior, predictions


def test_forward_and_posterior_match_the_reference():
    x_t = SCHEDULE.q_sample(X0, X_IN, T, EPS)
    _close(x_t, VECTORS["x_t"])
    mean, variance = SCHEDULE.posterior(X0, X_IN, x_t, T)
    _close(mean, VECTORS["post_mean"])
    _close(mean, VECTORS["post_mean_from_res_noise"])
    _close(variance.flatten(), VECTORS["post_var"])


def test_forward_is_linear_and_ends_at_the_degraded_picture_with_noise_on_it():
    x0, x_in, eps = _doubles()
    t = torch.tensor([0, 40, 99])
    both = SCHEDULE.q_sample(2 * x0 + x_in, 2 * x_in - eps, t, 2 * eps + x0)
    _close(both, 2 * SCHEDULE.q_sample(x0, x_in, t, eps) + SCHEDULE.q_sample(x_in, -eps, t, x0), 1e-12)
    few = ResidualSchedule(power_schedule("decreased", 100), power_schedule("increased", 100, total=0.01))
    _close(few.q_sample(x0, x_in, 99, eps), x_in + 0.1 * eps, 1e-12)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_both_forms_of_the_posterior_mean_agree(dtype, atol):
    x0, x_in, eps = (v.to(dtype) for v in _doubles())
    for t in (1, 2, 50, 99):
        x_t = SCHEDULE.q_sample(x0, x_in, t, eps)
        by_noise = x_t - SCHEDULE.alpha[t] * (x_in - x0) - SCHEDULE.beta2[t] / SCHEDULE.beta_bar[t] * eps
        _close(SCHEDULE.posterior(x0, x_in, x_t, t)[0], by_noise, atol)


@pytest.mark.parametrize("zero", [True, False])
def test_the_posterior_at_time_0_is_the_clean_picture(zero):
    schedule = ResidualSchedule(power_schedule("decreased", 9, zero=zero), power_schedule("increased", 9, zero=zero))
    x0, x_in, eps = _doubles()
    mean, variance = schedule.posterior(x0, x_in, schedule.q_sample(x0, x_in, 0, eps), 0)
    assert torch.equal(mean, x0)
    assert variance == 0


def test_conversions_match_the_reference():
    x_t, off = VECTORS["x_t"], {"clip": False, "clip_res": None}
    by_noise = SCHEDULE.predictions(EPS, x_t, X_IN, T, objective="pred_noise", **off)
    rows = T < 99  # at the end 1 - abar is 0
    _close(by_noise.x0[rows], VECTORS["x0_from_xin_noise"][rows])
    by_res = SCHEDULE.predictions(X_IN - X0, x_t, X_IN, T, objective="pred_res", **off)
    _close(by_res.noise, VECTORS["noise_from_res"], 2e-5)  # divided by bbar = 0.014 at time 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_outputs_give_everything_back(objective):
    x0, x_in, eps = _doubles()
    for t in (0, 30, 98):
        x_t = SCHEDULE.q_sample(x0, x_in, t, eps)
        said = SCHEDULE.predictions(_exact(objective, x0, x_in, eps), x_t, x_in, t, objective=objective, clip_res=2.0)
        _close(said.res, x_in - x0, 1e-10)
        _close(said.noise, eps, 1e-10)
        _close(said.x0, x0, 1e-10)


def test_clipping():
    x_t, x_in = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), -0.9)
    out = torch.full((1, 1, 2, 2), -1.7)
    assert SCHEDULE.predictions(out, x_t, x_in, 5, objective="pred_res").res.min() == -1
    wide = SCHEDULE.predictions(out, x_t, x_in, 5, objective="pred_res", clip_res=2.0)
    assert wide.res.min() == out.min()
    _close(wide.x0, torch.full_like(out, 0.8))
    free = SCHEDULE.predictions(2 * out, x_t, x_in, 5, objective="pred_res", clip=False, clip_res=None)
    _close(free.x0, torch.full_like(out, 2.5))


def test_unknown_objectives_and_channels_are_refused():
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(BadSetting, match="'pred_v'"):
        SCHEDULE.predictions(x, x, x, 0, objective="pred_v")
    with pytest.raises(BadSetting, match="gives 3 channels"):
        residual_loss(lambda x, t: x, x, x, torch.zeros(1, dtype=torch.long), x, SCHEDULE)


# Loss


def test_loss_matches_the_reference():
    value = residual_loss(_stand_in, X0, X_IN, T, EPS, SCHEDULE)
    _close(value, VECTORS["loss_l1"])
    _close(residual_loss(_stand_in, X0, X_IN, T, EPS, SCHEDULE, reduction="none").mean(), value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_outputs_have_no_loss(objective):
    exact = _exact(objective, X0, X_IN, EPS)
    assert residual_loss(lambda x, t: exact, X0, X_IN, T, EPS, SCHEDULE, objective=objective) == 0
    off = residual_loss(lambda x, t: exact + 1, X0, X_IN, T, EPS, SCHEDULE, objective=objective)
    assert off.item() == pytest.approx(exact.shape[1] // 3, rel=1e-5)


# Sampler


def test_the_trajectory_matches_the_reference():
    seen, times = [], []

    def model(x, t):
        times.append(int(t[0]))
        return _stand_in(x, t)

    out = sample_residual(model, X_IN, SCHEDULE, steps=5, start=VECTORS["start_noise"], callback=lambda s: seen.append(s.x_t))
    assert times == VECTORS["ddim_times"].tolist()[:-1]
    for mine, theirs in zip([*seen, out], VECTORS["ddim_traj"], strict=True):
        _close(mine, theirs)


@pytest.mark.parametrize("steps", [1, 3, 7, 100])
@pytest.mark.parametrize("objective", OBJECTIVES[:-1])
def test_exact_outputs_restore_exactly(objective, steps):
    x0, x_in, eps = (v.float() for v in _doubles())
    exact = _exact(objective, x0, x_in, eps)
    options = {"objective": objective, "steps": steps, "clip_res": 2.0, "start": eps}
    _close(sample_residual(lambda x, t: exact, x_in, SCHEDULE, **options), x0)


def test_residual_and_noise_may_be_removed_one_after_the_other():
    x0, x_in, eps = _doubles()
    joint = SCHEDULE.q_sample(x0, x_in, 60, eps)
    without_residual = joint - SCHEDULE.alpha_bar[60] * (x_in - x0)
    exact = _exact("pred_res_noise", x0, x_in, eps)
    one = SCHEDULE.predictions(exact, joint, x_in, 60, clip_res=2.0).x0
    both = SCHEDULE.predictions(torch.cat([0 * eps, eps], 1), without_residual, x_in, 60, clip_res=2.0).x0
    _close(one, both, 1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_ddim_tables_it_is_ddim_of_diffusers(eta):
    base = Schedule(beta_schedule("linear", 100))
    schedule, scheduler = ResidualSchedule.from_ddim(base), base.to_ddim(timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    g = torch.Generator().manual_seed(0)
    start, *said = (torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(11))
    noise = torch.randn(10, 2, 1, 4, 4, generator=g, dtype=torch.float64)
    outputs = iter(said)
    seen = []
    last = sample_residual(
        lambda x, t: next(outputs), torch.zeros_like(start), schedule, steps=10, eta=eta, objective="pred_noise",
        clip=False, clip_res=None, start=start, noise=noise, callback=lambda s: seen.append(s.x_t),
    )  # fmt: skip
    x = seen[0]
    _close(x, start * (1 - base.abar[-1]).sqrt(), 1e-12)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(said[i], int(t), x, eta=eta, variance_noise=noise[i]).prev_sample
        _close(last if i == 9 else seen[i + 1], x, 1e-6 * max(1, float(x.abs().max())))


def test_ancestral_steps_are_the_posterior():
    x0, x_in, eps = _doubles()
    z = torch.randn(100, *x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []

    def exact(x, t):
        at = int(t[0])
        noise = (x - x0 - SCHEDULE.alpha_bar[at] * (x_in - x0)) / SCHEDULE.beta_bar[at]
        return torch.cat([x_in - x0, noise], 1)

    sample_residual(
        exact, x_in, SCHEDULE, steps=100, eta=1.0, start=eps, noise=z, clip_res=2.0, callback=lambda s: seen.append(s.x_t)
    )
    for i in (0, 40, 98):
        mean, variance = SCHEDULE.posterior(x0, x_in, seen[i], 99 - i)
        _close(seen[i + 1], mean + variance.sqrt() * z[i], 1e-10)


def test_the_generator_decides_and_given_noise_overrides_it():
    def draw(seed, **given):
        generator = torch.Generator().manual_seed(seed)
        return sample_residual(_stand_in, X_IN, SCHEDULE, steps=4, eta=1.0, generator=generator, **given)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    given = {"start": EPS, "noise": torch.zeros(4, *EPS.shape)}
    assert torch.equal(draw(0, **given), draw(1, **given))
    for steps in (0, 101):
        with pytest.raises(BadSetting, match=f"steps={steps}"):
            sample_residual(_stand_in, X_IN, SCHEDULE, steps=steps)
