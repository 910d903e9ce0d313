from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.diffusion import Schedule, beta_schedule, edm_sigmas, sample_ddpm, sample_euler, sample_heun
from sfumato.errors import BadSetting

PATH = Path(__file__).parents[1] / "vectors" / "mode-interpolation.npz"
VECTORS = {k: torch.from_numpy(np.atleast_1d(v)) for k, v in np.load(PATH).items()}


def _gauss(x, sigma):
    return 0.25 * x / (0.25 + sigma**2)


def test_large_variance_is_beta():
    """The mean stays the posterior's; only the noise grows."""
    schedule = Schedule(VECTORS["betas"])
    x, noise, seen = VECTORS["x_T"], VECTORS["noise"], []
    end = sample_ddpm(lambda x, t: 0.3 * x, x, schedule, variance="large", noise=noise, callback=seen.append)
    states = [s.x_t for s in seen] + [end]
    for i in range(99):
        t = 99 - i
        mean, _ = schedule.posterior(seen[i].x0, seen[i].x_t, t)
        assert torch.allclose(states[i + 1], mean + schedule.betas[t].sqrt() * noise[i], rtol=0, atol=1e-9)
        assert torch.allclose((VECTORS["fixed_logvar"][t] / 2).exp(), schedule.betas[t].sqrt())
    assert torch.equal(end, seen[-1].x0)
    with pytest.raises(BadSetting, match="huge"):
        sample_ddpm(lambda x, t: x, x, schedule, variance="huge")


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_churn_stays_in_its_window(sampler):
    sigmas, seen = edm_sigmas(6), []
    noise = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = 80 * noise[0]
    sampler(_gauss, start, sigmas, churn=2.4, churn_range=(0.1, 20.0), churn_noise=1.5, noise=noise, callback=seen.append)
    inside = [0.1 <= s <= 20 for s in sigmas[:-1].tolist()]
    assert any(inside)
    assert not all(inside)
    plain = []
    sampler(_gauss, start, sigmas, callback=plain.append)
    assert torch.equal(seen[0].x_t, plain[0].x_t)  # the first level lies above the window
    for i, step in enumerate(seen):
        raised = sigmas[i] * (1.4 if inside[i] else 1)
        assert step.sigma.item() == pytest.approx(raised.item())
    first = inside.index(True)
    lift = 1.5 * sigmas[first] * (1.4**2 - 1) ** 0.5 * noise[first]
    assert torch.allclose(seen[first].x_t, plain[first].x_t + lift)


def test_noise_of_the_churn_keeps_a_gaussian():
    """Exact denoiser, much churn: the end is still N(0, 1/4)."""
    g = torch.Generator().manual_seed(0)
    x = 80 * torch.randn(20000, generator=g, dtype=torch.float64)
    end = sample_heun(_gauss, x, edm_sigmas(160), churn=60.0, churn_range=(0.05, 50.0), generator=g)
    assert end.var().item() == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_levels_are_those_of_the_table(kind):
    schedule = Schedule(beta_schedule(kind))
    sigmas = schedule.levels(40)
    assert (len(sigmas), sigmas[-1].item()) == (41, 0)
    assert torch.isin(sigmas[:-1], schedule.sigma).all()
    assert (sigmas.diff() <= 0).all()
    assert sigmas[0].item() == pytest.approx(80, rel=0.2)  # EDM's highest, though cosine's table goes far beyond
    wanted = edm_sigmas(40, low=schedule.sigma[0].item())[:-1]
    nearest = (schedule.sigma - wanted[20]).abs().min()
    assert (sigmas[20] - wanted[20]).abs() == nearest


@pytest.mark.parametrize("sigmas", [[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, -1.0], [0.0]])
def test_levels_out_of_order_are_refused(sigmas):
    with pytest.raises(BadSetting, match="must fall"):
        sample_euler(_gauss, torch.ones(2, 1), torch.tensor(sigmas))
