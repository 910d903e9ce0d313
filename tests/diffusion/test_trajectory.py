from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import GaussianMixture
from sfumato.diffusion import (
    SamplerStep,
    Schedule,
    X0Variance,
    beta_schedule,
    default_window,
    filter_by_variance,
    last_steps,
    parse_window,
    sample_ddpm,
    sample_filtered,
)
from sfumato.errors import BadData, BadSetting

PATH = Path(__file__).parents[1] / "vectors" / "mode-interpolation.npz"
V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(PATH).items()}
MODES = GaussianMixture(V["modes"], V["mode_std"])


def _exact(schedule):
    return lambda x, t: MODES.noised(schedule.abar[t[0]]).score(x)


def test_the_chain_and_its_variance_follow_the_reference():
    schedule = Schedule(V["betas"])
    assert torch.allclose(schedule.abar, V["alphas_bar"], rtol=1e-12)
    steady, guesses = X0Variance((100 - V["window"].item(), 100)), []

    def watch(step):
        steady(step)
        guesses.append(step.x0)

    end = sample_ddpm(
        _exact(schedule), V["x_T"], schedule, predict="score", variance="large", noise=V["noise"], callback=watch
    )  # fmt: skip
    assert torch.allclose(end, V["x_0"], rtol=0, atol=1e-8)
    assert torch.allclose(torch.stack(guesses[-10:]), V["pred_x0_last"], rtol=0, atol=1e-8)
    assert torch.allclose(steady.variance, V["traj_variance"], rtol=0, atol=1e-8)


def test_the_exact_score_draws_nothing_off_support():
    schedule = Schedule(beta_schedule("linear", 1000, 1e-3, 0.2))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=g, dtype=torch.float64)
    x = sample_ddpm(_exact(schedule), x, schedule, predict="score", variance="large", generator=g)
    assert MODES.off_support(x).float().mean() < 1e-3
    assert torch.cdist(x, MODES.means).argmin(1).bincount().min() > 500


def _feed(callback, guesses):
    for i, x0 in enumerate(guesses):
        callback(SamplerStep(i, x0, x0, torch.ones(())))


def test_running_variance_is_numpys_over_the_window():
    guesses = 100 + torch.randn(20, 5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steady = X0Variance((4, 17))
    _feed(steady, torch.randn(20, 7, 2, 3))  # an earlier batch leaves nothing behind
    _feed(steady, guesses)
    assert steady.count == 13
    assert np.allclose(steady.variance, guesses[4:17].numpy().var(0).mean((1, 2)), rtol=1e-10)
    single = X0Variance((3, 4))
    _feed(single, guesses)
    assert (single.variance == 0).all()
    with pytest.raises(BadData, match="window"):
        _ = X0Variance((30, 40)).variance
    with pytest.raises(BadSetting, match="no step"):
        X0Variance((5, 5))


def test_the_steadiest_stay_in_order():
    var = torch.tensor([0.3, 0.1, 0.9, 0.2])
    x = torch.arange(8.0).view(4, 2)
    assert filter_by_variance(torch.arange(4), var, keep=0.75).tolist() == [0, 1, 3]
    assert torch.equal(filter_by_variance(x, var, keep=1.0), x)
    assert len(filter_by_variance(torch.arange(101), torch.rand(101))) == 97  # ceil(96.96)
    assert len(filter_by_variance(torch.arange(100), torch.rand(100), keep=0.07)) == 7
    with pytest.raises(BadSetting, match="keep=0"):
        filter_by_variance(x, var, keep=0)
    with pytest.raises(BadData, match="variance each"):
        filter_by_variance(x, var[:3])


def _swinging(n, generator=None, *, callback=None):
    """Samples that are their own amplitude: the guess swings by ± it in the last four of eight steps."""
    x = torch.rand(n, 3, generator=generator)
    for i in range(8):
        callback(SamplerStep(i, x, x * (-1) ** i if i >= 4 else 0 * x, torch.ones(())))
    return x


def test_more_are_drawn_and_the_steadiest_kept():
    found = sample_filtered(_swinging, 10, keep=0.4, window=(4, 8), batch=7, generator=torch.Generator().manual_seed(0))
    assert (len(found.samples), len(found.dropped)) == (10, 15)
    assert found.variance.max() <= found.dropped_variance.min()
    assert torch.allclose(found.variance, found.samples.square().mean(1))
    again = sample_filtered(_swinging, 10, keep=0.4, window=(4, 8), batch=7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.samples, again.samples)
    all_kept = sample_filtered(_swinging, 5, keep=1.0, window=(4, 8))
    assert (len(all_kept.samples), len(all_kept.dropped)) == (5, 0)
    assert len(sample_filtered(_swinging, 64, window=(4, 8)).dropped) == 3  # of 67
    for n, keep in ((0, 0.5), (3, 0.0), (3, 1.5)):
        with pytest.raises(BadSetting, match="keep one sample"):
            sample_filtered(_swinging, n, keep=keep, window=(4, 8))
    with pytest.raises(BadData, match="within the sampler's steps"):
        sample_filtered(_swinging, 3, window=(20, 30))


@pytest.mark.parametrize("text", ["", "5", "5:6", "a:b", "3:99", "-2:5", "9:4"])
def test_windows_that_are_none_are_refused(text):
    with pytest.raises(BadSetting, match="FIRST:END with two or more of the 50 steps"):
        parse_window(text, 50)
    with pytest.raises(BadSetting, match="no variance"):
        last_steps(1)


def test_the_windows_that_nobody_chose():
    assert default_window(250, points=True) == last_steps(250) == (245, 250)
    assert default_window(1000, points=False) == (500, 700)
    for steps in range(2, 40):
        low, high = default_window(steps, points=False)
        assert 0 <= low < high - 1 < steps
    for points in (True, False):
        with pytest.raises(BadSetting, match="no variance"):
            default_window(1, points=points)
