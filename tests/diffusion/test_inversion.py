import pytest
import torch

from sfumato.diffusion import Schedule, beta_schedule, convert, ddim_invert, ddpm_invert, sample_ddim
from sfumato.errors import BadSetting

SCHEDULE = Schedule(beta_schedule("linear"))


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _eps(x, t):
    """A smooth network: the noise of a prior of unit pictures, bent."""
    level = (1 - SCHEDULE.abar[t]).sqrt().to(x.dtype).view(-1, 1, 1, 1)
    return level * x + 0.2 * torch.sin(2 * x).roll(1, -1)


@pytest.fixture
def x0():
    return 2 * torch.rand(3, 2, 4, 4, generator=_seeded(), dtype=torch.float64) - 1


def test_ddim_inversion_is_close_and_corrections_make_it_exact(x0):
    errors = []
    for corrections in (0, 2, 30):
        x_T = ddim_invert(_eps, x0, SCHEDULE, steps=20, corrections=corrections)
        errors.append((sample_ddim(_eps, x_T, SCHEDULE, steps=20) - x0).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 0.3
    assert errors[2] < 1e-8


def test_ddim_inversion_of_gaussian_pictures_is_their_noise():
    """Unit pictures: ε̂ = sqrt(1 - abar) x exactly, the flow leaves x as it is, so with many steps x_T is near x_0."""

    def model(x, t):
        return (1 - SCHEDULE.abar[t]).sqrt().view(-1, 1) * x

    x0 = torch.randn(6, 3, generator=_seeded(), dtype=torch.float64)
    x_T = ddim_invert(model, x0, SCHEDULE, steps=1000, corrections=5)
    assert torch.allclose(x_T, x0, rtol=0.05)


@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 200])
def test_ddpm_inversion_draws_the_picture_again(x0, predict, eta, steps):
    def model(x, t):
        return convert(_eps(x, t), x, t, SCHEDULE, source="eps", target=predict)

    x_T, z = ddpm_invert(model, x0, SCHEDULE, steps=steps, eta=eta, predict=predict, generator=_seeded(1))
    assert z.shape == (steps, *x0.shape)
    assert not z[-1].any()
    again = sample_ddim(model, x_T, SCHEDULE, steps=steps, eta=eta, predict=predict, noise=z)
    # float64 all through but for the tables' casts: what is left is the fixed point of the last step
    assert torch.allclose(again, x0, rtol=0, atol=1e-4)


def test_states_of_ddpm_inversion_are_independent_noisings(x0):
    noise, seen = torch.randn(10, *x0.shape, generator=_seeded(2), dtype=torch.float64), []
    x_T, z = ddpm_invert(_eps, x0, SCHEDULE, steps=10, noise=noise)
    sample_ddim(_eps, x_T, SCHEDULE, steps=10, eta=1.0, noise=z, callback=seen.append)
    for i, step in enumerate(seen[:-1]):
        t = 100 * (9 - i)
        assert torch.allclose(step.x_t, SCHEDULE.q_sample(x0, t, noise[i]), atol=1e-8)
    assert torch.allclose(x_T, seen[0].x_t)
    a, b = (ddpm_invert(_eps, x0, SCHEDULE, steps=10, generator=_seeded(s))[1] for s in (3, 3))
    assert torch.equal(a, b)


def test_a_network_that_predicts_pictures_draws_its_own_last_guess(x0):
    x_T, z = ddpm_invert(lambda x, t: 0.9 * x0, x0, SCHEDULE, steps=5, predict="x0", generator=_seeded())
    again = sample_ddim(lambda x, t: 0.9 * x0, x_T, SCHEDULE, steps=5, eta=1.0, predict="x0", noise=z)
    assert torch.allclose(again, 0.9 * x0)


def test_bad_settings_are_refused(x0):
    for call, match in (
        (lambda: ddpm_invert(_eps, x0, SCHEDULE, eta=0.0), "ddim_invert"),
        (lambda: ddpm_invert(_eps, x0, SCHEDULE, steps=2000), "steps=2000"),
        (lambda: ddim_invert(_eps, x0, SCHEDULE, steps=0), "steps=0"),
        (lambda: ddim_invert(_eps, x0, SCHEDULE, corrections=-1), "corrections=-1"),
    ):
        with pytest.raises(BadSetting, match=match):
            call()
