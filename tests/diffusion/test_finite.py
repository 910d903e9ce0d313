"""A trajectory that is no longer of numbers: named by step and sample in every sampler, never given back."""

import pytest
import torch

from sfumato.diffusion import (
    FiniteTrajectory,
    ResidualSchedule,
    Schedule,
    beta_schedule,
    edm_sigmas,
    power_schedule,
    sample_blind,
    sample_ddim,
    sample_ddpm,
    sample_euler,
    sample_heun,
    sample_residual,
)
from sfumato.errors import Diverged

SCHEDULE = Schedule(beta_schedule("linear", 20))
RESIDUAL = ResidualSchedule(power_schedule("decreased", 20), power_schedule("increased", 20))
SAMPLERS = {
    "ddpm": lambda model, x: sample_ddpm(model, x, SCHEDULE, clip=True),
    "ddim": lambda model, x: sample_ddim(model, x, SCHEDULE, steps=20, clip=True),
    "euler": lambda model, x: sample_euler(model, x, edm_sigmas(20)),
    "heun": lambda model, x: sample_heun(model, x, edm_sigmas(20)),
    "residual": lambda model, x: sample_residual(model, x, RESIDUAL, steps=20, objective="pred_res"),
    "blind": lambda model, x: sample_blind(lambda y: model(y, None), x, steps=20, sigma_max=9.0),
}


def breaking(step, value, rows=(1, 3)):
    """A model that answers with a bad value for two samples in one call; later calls are fine again."""
    calls = iter(range(1000))

    def model(x, _):
        out = 0.5 * x
        if next(calls) == step:
            out[list(rows), 0] = value
        return out

    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", SAMPLERS)
def test_step_and_samples_are_named(name, value):
    step = 6 if name == "heun" else 3  # two calls a step
    with pytest.raises(Diverged, match=r"2 of 5 samples broke off: from step 4 of 20 on .* \(samples 1, 3\)"):
        SAMPLERS[name](breaking(step, value), torch.ones(5, 1, 2, 2))


@pytest.mark.parametrize("name", SAMPLERS)
def test_finite_trajectories_pass(name):
    assert SAMPLERS[name](breaking(999, torch.nan), torch.ones(5, 1, 2, 2)).isfinite().all()


def test_a_bad_beginning_is_step_one():
    x = torch.ones(2, 3)
    x[0, 0] = torch.nan
    with pytest.raises(Diverged, match=r"1 of 2 .* step 1 of 20 .*sample 0\)"):
        sample_ddim(lambda x, t: x, x, SCHEDULE, steps=20)


def test_the_end_itself_is_looked_at_and_long_lists_are_cut():
    watch = FiniteTrajectory(torch.zeros(9, 1), 2)
    watch(0, torch.zeros(9, 1))
    with pytest.raises(Diverged, match=r"step 2 of 2 on the samples themselves are .*samples 0, 1, 2, 3, 4, \.\.\.\)"):
        watch.end(torch.full((9, 1), torch.nan))


def test_half_precision_may_be_large():
    """A sum of finite float16 numbers can pass its largest one."""
    x = torch.full((2, 8), 60000.0, dtype=torch.float16)
    watch = FiniteTrajectory(x, 1)
    assert watch.end(watch(0, x)) is x
