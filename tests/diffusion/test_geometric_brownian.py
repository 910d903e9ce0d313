"""Geometric Brownian motion: the released formulas, the law of what is drawn, and the sign that is never lost."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from sfumato.diffusion import GBMSchedule, dls_step, multiplicative_dsm, sample_gbm, ums_step
from sfumato.errors import BadSetting, Diverged

STORED = Path(__file__).parents[1] / "vectors" / "multiplicative-diffusion.npz"
V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(STORED).items()}
SCHEDULE = GBMSchedule()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def log_normal_score(mean, variance, schedule=SCHEDULE):
    """The exact Stein score where log x_0 is N(mean, variance)."""

    def score(x, k):
        total = variance + schedule.std[k].view(-1, *[1] * (x.ndim - 1)).to(x) ** 2
        return (-1 - (x.abs().log() - mean) / total) / x

    return score


# Against the released code


def test_forward_and_conditional_score():
    x_k = SCHEDULE.q_sample(V["x0"], V["k"], V["z"])
    torch.testing.assert_close(x_k, V["x_k"], rtol=1e-10, atol=1e-10)
    known = SCHEDULE.hyvarinen_score(V["x_k"], V["x0"], V["k"])
    torch.testing.assert_close(known, V["hyvarinen_cond"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(known / V["x_k"], V["score_cond"], rtol=1e-10, atol=1e-10)


def test_loss():
    args = V["score"], V["x_k"], V["x0"], V["k"], SCHEDULE
    torch.testing.assert_close(multiplicative_dsm(*args, reduction="none"), V["loss_per_sample"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(multiplicative_dsm(*args), V["loss"], rtol=1e-10, atol=1e-10)


def test_steps():
    x, score = V["x_k"], V["score"]
    settings = {"delta": V["delta"].item(), "anneal": V["anneal"].item(), "noise": V["noise_step"]}
    for step, name in ((dls_step, "dls"), (ums_step, "ums")):
        torch.testing.assert_close(step(x, score, SCHEDULE, **settings), V[f"{name}_next"], rtol=1e-10, atol=1e-10)
        quiet = step(x, score, SCHEDULE, delta=V["delta"].item())
        torch.testing.assert_close(quiet, V[f"{name}_denoise"], rtol=1e-10, atol=1e-10)


# The motion


def test_log_ratio_is_standard_normal_without_drift():
    x0 = 1 + torch.rand(100_000, generator=seeded(), dtype=torch.float64)
    k = torch.randint(1, 1000, (100_000,), generator=seeded(1))
    x_k = SCHEDULE.q_sample(x0, k, normal(100_000, seed=2))
    assert kstest(((x_k / x0).log() / SCHEDULE.std[k]).numpy(), "norm").pvalue > 0.01
    drifting = GBMSchedule(1000, sigma=0.8, mu=1.0).q_sample(x0, 500, normal(100_000, seed=2))
    assert (drifting / x0).log().mean().item() == pytest.approx((1.0 - 0.32) * 0.5, abs=0.01)


def test_clean_at_time_zero_and_signs_kept():
    x0, z = normal(50, 3), normal(50, 3, seed=1)
    assert torch.equal(SCHEDULE.q_sample(x0, 0, z), x0)
    assert torch.equal(SCHEDULE.q_sample(x0, 999, z).sign(), x0.sign())


@pytest.mark.parametrize("mu", [None, 1.0])
def test_start_has_the_moments_of_the_last_time(mu):
    schedule = GBMSchedule(100, sigma=0.7, mu=mu)
    x0 = (0.3 + 0.5 * normal(200_000)).exp()
    last = schedule.q_sample(x0, 99, normal(200_000, seed=1)).log()
    mean, deviation = schedule.start(0.3, 0.25)
    assert last.mean().item() == pytest.approx(mean, abs=0.01)
    assert last.std().item() == pytest.approx(deviation, rel=0.01)
    of_channels = schedule.start(torch.tensor([0.1, 0.3]), torch.tensor([0.0, 0.25]))
    assert of_channels[0][1].item() == pytest.approx(mean)
    assert of_channels[1][1].item() == pytest.approx(deviation)


def test_posterior_is_exact_for_the_conditional_score():
    x_k = SCHEDULE.q_sample(V["x0"], V["k"], V["z"])
    score = SCHEDULE.hyvarinen_score(x_k, V["x0"], V["k"]) / x_k
    torch.testing.assert_close(SCHEDULE.posterior_x0(x_k, score, V["k"]), V["x0"], rtol=1e-10, atol=0)


# The loss


@pytest.mark.parametrize("weight", ["paper", "unit"])
@pytest.mark.parametrize("mu", [None, 1.0])
def test_no_loss_at_the_conditional_score(weight, mu):
    schedule = GBMSchedule(1000, sigma=0.8, mu=mu)
    x_k = schedule.q_sample(V["x0"], V["k"], V["z"])
    score = schedule.hyvarinen_score(x_k, V["x0"], V["k"]) / x_k
    assert multiplicative_dsm(score, x_k, V["x0"], V["k"], schedule, weight=weight) < 1e-12


def test_gradient_of_the_loss():
    x_k, x0, k = V["x_k"], V["x0"], V["k"]
    score = V["score"].clone().requires_grad_()
    multiplicative_dsm(score, x_k, x0, k, SCHEDULE).backward()
    variance = (0.64 * k / 1000).view(-1, 1, 1, 1)
    r = variance * x_k * V["score"] + x_k.log() - x0.log() + variance  # mu = sigma² / 2: 3/2 - 1/2
    torch.testing.assert_close(score.grad, 2 * variance * x_k * r / len(x0))
    assert torch.autograd.gradcheck(lambda s: multiplicative_dsm(s, x_k, x0, k, SCHEDULE, weight="unit"), (score,))


def test_unit_weight_is_the_error_of_the_noise_and_the_shift_is_one_time():
    x0, x_k, k, z = (V[name] for name in ("x0", "x_k", "k", "z"))
    guess = normal(*z.shape, seed=4)
    score = (-1 - guess / SCHEDULE.std[k].view(-1, 1, 1, 1)) / x_k
    unit = multiplicative_dsm(score, x_k, x0, k, SCHEDULE, weight="unit", reduction="none")
    torch.testing.assert_close(unit, (z - guess).square().sum((1, 2, 3)))
    shifted = multiplicative_dsm(V["score"], x_k, x0, k, SCHEDULE, tau_shift=1)
    torch.testing.assert_close(shifted, multiplicative_dsm(V["score"], x_k, x0, k + 1, SCHEDULE))
    assert not torch.isclose(shifted, V["loss"])


def test_denoising_and_explicit_matching_have_one_gradient():
    """On x_0 of two values: the mixture's own score against that of each sample, over noise drawn once."""
    n, k = 200_000, 400
    x0 = torch.where(torch.rand(n, 1, generator=seeded(), dtype=torch.float64) < 0.3, 1.0, 2.0)
    x_k = SCHEDULE.q_sample(x0, k, normal(n, 1, seed=1))
    variance = SCHEDULE.std[k].item() ** 2
    densities = torch.cat([(-((x_k.log() - np.log(m)) ** 2) / 2 / variance).exp() * w for m, w in ((1, 0.3), (2, 0.7))], 1)
    share = densities / densities.sum(1, keepdim=True)
    explicit = -1 - (x_k.log() - share[:, 1:] * np.log(2)) / variance
    theta = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)

    def score(x):
        return theta[0] + theta[1] * x

    (denoising,) = torch.autograd.grad(multiplicative_dsm(score(x_k), x_k, x0, k, SCHEDULE), theta)
    error = variance**2 * (x_k * score(x_k) - explicit).square().sum(1).mean()
    torch.testing.assert_close(denoising, torch.autograd.grad(error, theta)[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("over", [{"weight": "other"}, {"reduction": "sum"}])
def test_unknown_words_are_refused(over):
    with pytest.raises(BadSetting, match=r"paper or unit.*mean or none"):
        multiplicative_dsm(V["score"], V["x_k"], V["x0"], V["k"], SCHEDULE, **over)
    with pytest.raises(BadSetting, match="N=1"):
        GBMSchedule(1)


# Steps


def test_dls_and_ums_agree_for_short_steps():
    x, score, z = 1 + torch.rand(5000, generator=seeded(), dtype=torch.float64), normal(5000), normal(5000, seed=1)
    gaps = []
    for delta in (1e-3, 5e-4):
        settings = {"delta": delta, "noise": z}
        gap = (dls_step(x, score, SCHEDULE, **settings) - ums_step(x, score, SCHEDULE, **settings)) / x
        gaps.append((gap - 0.5 * delta * 0.64 * (z**2 - 1)).abs().mean())  # what Itô's rule says of the step
    assert gaps[0] / gaps[1] == pytest.approx(2**1.5, rel=0.1)


def test_dls_is_the_reverse_euler_step_of_an_additive_diffusion_of_the_logarithm():
    y, score_y, z = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    x = y.exp()
    moved = dls_step(x, (score_y - 1) / x, SCHEDULE, delta=0.01, noise=z)
    torch.testing.assert_close(moved.log(), y + 0.01 * 0.64 * score_y + 0.1 * 0.8 * z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dls_never_changes_a_sign_whatever_the_score(dtype):
    x = start = normal(200).to(dtype)
    wild = torch.randn(200, generator=seeded(5)).to(dtype) * 1e4
    for _ in range(50):
        x = dls_step(x, wild / x, SCHEDULE, delta=0.1)
    assert torch.equal(x.sign(), start.sign())
    assert torch.isfinite(x).all()
    assert ((x / start)[wild > 1e3] > 1e3).all()


def test_ums_can_change_a_sign():
    x = torch.ones(3)
    assert (ums_step(x, torch.full((3,), -500.0), SCHEDULE, delta=1e-2) < 0).all()
    assert (dls_step(x, torch.full((3,), -500.0), SCHEDULE, delta=1e-2) > 0).all()


# Sampling


@pytest.mark.parametrize(("sampler", "sign"), [("dls", 1), ("dls", -1), ("ums", 1)])
def test_reverse_motion_brings_back_log_normal_data(sampler, sign):
    mean, deviation = 0.4, 0.3
    noise = normal(1000, 4000, 1, seed=1)
    x = sign * (mean + (deviation**2 + SCHEDULE.std[-2].item() ** 2) ** 0.5 * normal(4000, 1)).exp()
    x = sample_gbm(
        log_normal_score(mean, deviation**2), 4000, SCHEDULE, shape=(1,), x=x, delta=1e-3, sampler=sampler, noise=noise
    )
    assert torch.equal(x.sign(), torch.full_like(x, sign))
    assert x.abs().log().mean().item() == pytest.approx(mean, abs=0.02)
    assert x.abs().log().std().item() == pytest.approx(deviation, rel=0.03)


def test_few_times_with_their_distances_come_close_and_denoising_ends_at_the_data():
    exact, steps = log_normal_score(0.4, 0.0), []
    start = SCHEDULE.start(torch.tensor(0.4), torch.tensor(0.0))
    x = sample_gbm(
        lambda x, k: exact(x, k.clamp(min=1)), 200, SCHEDULE, shape=(3,), start=start, steps=50, denoise_steps=2,
        callback=steps.append, generator=seeded(),
    )  # fmt: skip
    assert (steps[-2].x_t.log() - 0.4).std() < 0.15  # one step of noise is left
    assert (x.log() - 0.4).abs().max() < 1e-5
    assert [round(s.sigma.item() ** 2 / 0.64 * 1000) for s in steps] == [*range(999, 0, -20), 0, 0]
    assert (steps[0].x0.log() - 0.4).abs().max() < 1e-4


def test_noise_is_replayed_and_the_generator_decides():
    model, start = log_normal_score(0.4, 0.1, GBMSchedule(20)), (torch.zeros(2, 1, dtype=torch.float64), 0.9)
    settings = {"shape": (2, 3), "start": start, "anneal": 0.9, "inner": 2}
    a, b, c = (sample_gbm(model, 4, GBMSchedule(20), **settings, generator=seeded(s)) for s in (0, 0, 1))
    assert a.shape == (4, 2, 3)
    assert a.dtype == torch.float64
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    z = torch.randn(38, 4, 2, 3, generator=seeded(3), dtype=torch.float64)
    x = (0.9 * normal(4, 2, 3)).exp()
    replayed = sample_gbm(model, 4, GBMSchedule(20), shape=(2, 3), x=x, anneal=0.9, inner=2, noise=z)
    by_hand, factor, i = x, 1.0, 0
    for k in range(19, 0, -1):
        for _ in range(2):
            score = model(by_hand, torch.full((4,), k))
            by_hand = dls_step(by_hand, score, GBMSchedule(20), delta=1 / 40, noise=z[i], anneal=factor)
            i += 1
        factor *= 0.9
    torch.testing.assert_close(replayed, by_hand)


def test_one_length_is_taken_at_every_time_and_lists_give_each_its_own():
    asked = []

    def model(x, k):
        asked.append(int(k[0]))
        return torch.zeros_like(x)

    schedule = GBMSchedule(6)
    sample_gbm(model, 1, schedule, shape=(1,), start=(0.0, 1.0), delta=1e-3, denoise_steps=2)
    assert asked == [5, 4, 3, 2, 1, 0, 0, 0]
    asked.clear()
    sample_gbm(model, 1, schedule, shape=(1,), start=(0.0, 1.0), steps=3, inner=[1, 0, 2], delta=[0.1, 0.1, 0.2])
    assert asked == [5, 1, 1]
    quiet = sample_gbm(model, 2, schedule, shape=(1,), x=torch.ones(2, 1), delta=0.1, anneal=[0.0, 1, 1, 1, 1, 1], inner=1)
    noisy_once = dls_step(torch.ones(2, 1), torch.zeros(2, 1), schedule, delta=0.1)
    assert not torch.allclose(quiet, noisy_once**6)  # the first step has its noise
    with pytest.raises(BadSetting, match="inner has 2 entries, 3 times"):
        sample_gbm(model, 1, schedule, shape=(1,), start=(0.0, 1.0), steps=3, inner=[1, 2])


def test_wild_scores_are_said_and_what_is_not_finite_is_refused():
    schedule, begin = GBMSchedule(10), {"shape": (2,), "start": (0.0, 0.5)}
    with pytest.warns(UserWarning, match="held at ±20"):
        x = sample_gbm(lambda x, k: -1e6 / x, 3, schedule, **begin, generator=seeded())
    assert (x > 0).all()
    with pytest.raises(Diverged, match=r"3 of 3 samples broke off: from step 1 of 9 on the sample is NaN"):
        sample_gbm(lambda x, k: x * torch.nan, 3, schedule, **begin)
    one = lambda x, k: torch.where(torch.arange(3)[:, None] == 1, 1e30, 0.0) / x  # noqa: E731
    with pytest.raises(Diverged, match=r"1 of 3 samples broke off.* \(sample 1\).*dls sampler"):
        sample_gbm(one, 3, schedule, **begin, sampler="ums")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_gbm(log_normal_score(0.0, 0.1, schedule), 3, schedule, **begin)


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"sampler": "ddim"}, "dls or ums"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 11}, "schedule's 10"),
        ({"start": None}, "nowhere to begin"),
    ],
)
def test_bad_settings_are_refused(over, match):
    with pytest.raises(BadSetting, match=match):
        sample_gbm(lambda x, k: x, 3, GBMSchedule(10), **{"shape": (2,), "start": (0.0, 0.5), **over})
