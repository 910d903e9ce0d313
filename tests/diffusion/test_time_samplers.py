from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.diffusion import Schedule, interpolated_gamma, sqrt_uniform_sigma
from sfumato.errors import BadSetting

PATH = Path(__file__).parents[1] / "vectors" / "noise-space-adaptation.npz"
VECTORS = {k: torch.from_numpy(v) for k, v in np.load(PATH).items()}


def test_the_square_root_of_the_level_is_uniform():
    root = sqrt_uniform_sigma(20000, low=0.04, high=1.0, generator=torch.Generator().manual_seed(0)).sqrt()
    assert 0.2 <= root.min() < 0.21
    assert 0.99 < root.max() <= 1
    assert root.mean().item() == pytest.approx(0.6, abs=0.01)
    assert root.std().item() == pytest.approx(0.8 / 12**0.5, abs=0.01)
    assert torch.equal(sqrt_uniform_sigma(3, high=0.25, u=torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.0, 0.0625, 0.25]))
    with pytest.raises(BadSetting, match="low=2"):
        sqrt_uniform_sigma(1, low=2.0)


def test_powers_between_times_follow_the_reference():
    schedule = Schedule(VECTORS["betas"])
    gamma = interpolated_gamma(schedule.abar, VECTORS["t"], u=VECTORS["u"].flatten())
    assert torch.allclose(gamma, VECTORS["gamma_sampled"].flatten(), rtol=1e-12, atol=0)
    noisy = schedule.q_sample(VECTORS["y0"], VECTORS["t"], VECTORS["eps"], abar=gamma)
    assert torch.allclose(noisy, VECTORS["y_noisy"], rtol=0, atol=1e-12)


def test_powers_lie_between_their_neighbours():
    gammas = Schedule(VECTORS["betas"]).abar
    t = torch.randint(1000, (5000,), generator=torch.Generator().manual_seed(1))
    gamma = interpolated_gamma(gammas, t, generator=torch.Generator().manual_seed(2))
    before = torch.cat([torch.ones(1, dtype=torch.float64), gammas])[t]
    assert ((gammas[t] <= gamma) & (gamma <= before)).all()
    assert torch.equal(gamma, interpolated_gamma(gammas, t, generator=torch.Generator().manual_seed(2)))
    assert interpolated_gamma(gammas, torch.tensor([0]), u=torch.zeros(1)).item() == 1
