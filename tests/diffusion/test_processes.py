from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.diffusion import (
    EDMPrecond,
    Schedule,
    as_denoiser,
    beta_schedule,
    convert,
    denoising_loss,
    edm_sigmas,
    lognormal_sigma,
    range_t,
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_heun,
    uniform_t,
)
from sfumato.errors import BadSetting

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "diffusion-base.npz").items()}
SCHEDULE = Schedule(beta_schedule("linear"))


def _stand_in(x, t):
    """The fixed model of the reference trajectories."""
    return 0.9 * x * (t / 1000).sqrt().view(-1, 1, 1, 1) + 0.05


def _close(a, b, atol=1e-5):
    assert torch.allclose(a, b, rtol=0, atol=atol), (a - b).abs().max()


@pytest.mark.parametrize(
    ("kind", "key"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_tables_match_diffusers(kind, key):
    ends = {} if kind == "cosine" else {"beta_start": 1e-4, "beta_end": 0.02}
    _close(Schedule(beta_schedule(kind, **ends)).abar, VECTORS[f"abar_{key}"])


def test_forward_and_velocity_match_diffusers():
    x0, eps, t = VECTORS["x0"], VECTORS["eps"], VECTORS["t"]
    x_t = SCHEDULE.q_sample(x0, t, eps)
    _close(x_t, VECTORS["x_t"])
    _close(convert(eps, x_t, t, SCHEDULE, source="eps", target="v"), VECTORS["v"])
    _close(SCHEDULE.q_sample(x0, t, eps, abar=SCHEDULE.abar[t]), x_t, 1e-12)


def test_predictions_come_back():
    t, x0, eps = VECTORS["t"], VECTORS["x0"], VECTORS["eps"]
    x_t = SCHEDULE.q_sample(x0, t, eps)
    value, source = eps, "eps"
    for target in ("x0", "v", "score", "eps"):
        value, source = convert(value, x_t, t, SCHEDULE, source=source, target=target), target
    _close(value, eps, 1e-10)
    with pytest.raises(BadSetting, match="epsilon"):
        convert(eps, x_t, t, SCHEDULE, source="epsilon", target="x0")


def test_denoiser_face_agrees_with_noise_face():
    x, t = VECTORS["x_t"][:2], torch.tensor([250, 250])
    x0 = convert(_stand_in(x, t), x, t, SCHEDULE, source="eps", target="x0")
    _close(as_denoiser(_stand_in, SCHEDULE)(x / SCHEDULE.abar[250].sqrt(), SCHEDULE.sigma[250]), x0, 1e-10)


@pytest.mark.parametrize("eta", [0, 1])
def test_ddim_follows_the_reference(eta):
    seen = []
    end = sample_ddim(
        _stand_in, VECTORS["ddim_x_T"], SCHEDULE, steps=10, eta=float(eta), noise=VECTORS["ddim_noise"], callback=seen.append
    )
    states = torch.stack([s.x_t for s in seen] + [end])
    reference = VECTORS[f"ddim_eta{eta}"]
    assert ((states - reference).abs() <= 1e-5 * (1 + reference.abs())).all()
    assert [s.step for s in seen] == list(range(10))
    assert [s.sigma.item() for s in seen] == SCHEDULE.sigma[VECTORS["ddim_timesteps"]].tolist()


def test_ancestral_steps_are_draws_from_the_posterior():
    schedule = Schedule(beta_schedule("linear", 6, 0.1, 0.3))
    noise, seen = torch.randn(6, 2, 1, 3, 3, dtype=torch.float64), []
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    end = sample_ddpm(_stand_in, x, schedule, noise=noise, callback=seen.append)
    states = [s.x_t for s in seen] + [end]
    for i, s in enumerate(seen):
        mean, var = schedule.posterior(s.x0, s.x_t, 5 - i)
        _close(states[i + 1], mean + var.sqrt() * noise[i], 1e-10)


def test_clipping_keeps_every_guess_in_range():
    seen = []
    end = sample_ddim(lambda x, t: 0 * x, 5 * VECTORS["ddim_x_T"], SCHEDULE, steps=4, clip=True, callback=seen.append)
    assert max(s.x0.abs().max().item() for s in seen) == 1
    assert end.abs().max() <= 1


def test_draws_follow_the_generator_and_given_noise_draws_nothing():
    x = VECTORS["ddim_x_T"]

    def run(seed, **kw):
        return sample_ddim(_stand_in, x, SCHEDULE, steps=5, eta=1.0, generator=torch.Generator().manual_seed(seed), **kw)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    noise = VECTORS["ddim_noise"]
    assert torch.equal(run(0, noise=noise), run(1, noise=noise))
    with pytest.raises(BadSetting, match="steps=2000"):
        sample_ddim(_stand_in, x, SCHEDULE, steps=2000)


def _gauss(x, sigma):
    mean, var = VECTORS["edm_gauss"]
    return mean + var / (var + sigma**2) * (x - mean)


def test_heun_follows_the_reference():
    sigmas, seen = edm_sigmas(10), []
    _close(sigmas, VECTORS["edm_sigmas"], 1e-9)
    end = sample_heun(_gauss, VECTORS["edm_heun_traj"][0], sigmas, callback=seen.append)
    _close(torch.stack([s.x_t for s in seen] + [end]), VECTORS["edm_heun_traj"], 1e-8)


@pytest.mark.parametrize(("sampler", "low", "high"), [(sample_heun, 3.5, 4.6), (sample_euler, 1.7, 2.4)])
def test_order_of_the_integrators(sampler, low, high):
    x, exact = VECTORS["edm_heun_traj"][0], VECTORS["heun_exact_end"]
    coarse, fine = ((sampler(_gauss, x, edm_sigmas(n)) - exact).abs().max() for n in (40, 80))
    assert low < coarse / fine < high


def test_churn_draws_by_the_generator():
    x = VECTORS["edm_heun_traj"][0]
    a, b = (sample_euler(_gauss, x, edm_sigmas(5), churn=2.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(a, b)
    assert not torch.equal(a, sample_euler(_gauss, x, edm_sigmas(5)))


def test_preconditioning_matches_the_reference():
    model = EDMPrecond(nn.Identity())
    sigma = VECTORS["edm_sigmas"][:-1]
    for name, value in zip(("skip", "out", "in", "noise"), model.coefficients(sigma)):
        _close(value, VECTORS[f"edm_c_{name}"], 1e-10)
    _close(model.weight(sigma), VECTORS["edm_weight"], 1e-7)
    _close(model.weight(sigma) * model.coefficients(sigma)[1].square(), torch.ones_like(sigma), 1e-12)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_min_snr_weighs_the_clean_picture_alike(predict):
    """One error, said in three ways, has one weighted loss."""
    x0, eps, t = VECTORS["x0"], VECTORS["eps"], VECTORS["t"]

    def model(x_t, t):
        return convert(x0 + 0.1, x_t, t, SCHEDULE, source="x0", target=predict)

    loss = denoising_loss(model, x0, t, eps, SCHEDULE, predict=predict, weight="min_snr", reduction="none")
    _close(loss, 0.01 * SCHEDULE.snr[t].clamp(max=5), 1e-10)


def test_exact_predictions_have_no_loss():
    x0, eps, t = VECTORS["x0"], VECTORS["eps"], VECTORS["t"]
    assert denoising_loss(lambda x, t: eps, x0, t, eps, SCHEDULE) == 0
    assert denoising_loss(lambda x, t: eps + 2, x0, t, eps, SCHEDULE).item() == pytest.approx(4)
    with pytest.raises(BadSetting, match="score"):
        denoising_loss(lambda x, t: x, x0, t, eps, SCHEDULE, predict="score")


def test_times_and_levels():
    g = torch.Generator().manual_seed(0)
    assert uniform_t(2000, 4, generator=g).unique().tolist() == [0, 1, 2, 3]
    assert range_t(2000, 3, 5, generator=g).unique().tolist() == [3, 4]
    log = lognormal_sigma(20000, generator=g).log()
    assert log.mean().item() == pytest.approx(-1.2, abs=0.05)
    assert log.std().item() == pytest.approx(1.2, abs=0.05)
    with pytest.raises(BadSetting, match="high"):
        range_t(1, 3, 3)


def test_diffusers_there_and_back():
    again = Schedule.from_diffusers(SCHEDULE.to_ddim())
    _close(again.abar, SCHEDULE.abar, 1e-6)
    with pytest.raises(BadSetting, match="betas"):
        Schedule(torch.tensor([1.0]))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.01), (torch.float16, 2e-3), (torch.float32, 1e-6)])
def test_the_first_noise_survives_rounding(dtype, rtol):
    x0, eps = torch.zeros(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 2, 2, dtype=dtype)
    for t in (0, torch.tensor([0])):
        x_t = SCHEDULE.q_sample(x0, t, eps)
        assert x_t.dtype == dtype
        torch.testing.assert_close(x_t.double(), torch.full((1, 1, 2, 2), 0.01).double(), rtol=rtol, atol=0)
