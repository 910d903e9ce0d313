from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.diffusion import sample_blind
from sfumato.errors import BadSetting

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "harmonic-bases.npz").items()}


def _shrink(y):
    """A linear denoiser: its residual is K y."""
    return y - (y.flatten(1) @ V["K"].T).view_as(y)


def test_the_path_follows_the_reference():
    seen = []
    end = sample_blind(
        _shrink, V["samp_init"], steps=20, h0=V["h0"].item(), beta=V["beta"].item(), noise=V["samp_noise"],
        callback=seen.append,
    )  # fmt: skip
    path = torch.stack([s.x_t for s in seen] + [end])
    assert torch.allclose(path, V["samp_traj"][1:], rtol=0, atol=1e-9)
    assert torch.allclose(torch.cat([s.sigma for s in seen]), V["samp_sigma"][1:-1], rtol=0, atol=1e-9)
    assert torch.allclose(end, V["samp_out"], rtol=0, atol=1e-9)


class _Rows:
    """Measures the first `k` of n numbers: orthonormal rows."""

    def __init__(self, k, n):
        self.k, self.n = k, n

    def A(self, x):
        return x[:, : self.k]

    def A_adjoint(self, m):
        return torch.nn.functional.pad(m, (0, self.n - self.k))


def _towards_mean(y):
    """The exact blind denoiser of data ~ N(3, tiny): the mean."""
    return torch.full_like(y, 3.0)


def test_without_noise_nothing_is_drawn_and_it_ends_at_the_mode():
    y = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) + 3
    runs = [sample_blind(_towards_mean, y, h0=0.1, beta=1.0, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    assert torch.equal(*runs)
    assert torch.equal(runs[0], torch.full_like(y, 3.0))


def test_the_noise_falls_as_beta_says():
    """Each step leaves (1 - beta h) of the noise's deviation."""
    y, seen = 3 + torch.randn(2, 40000, generator=torch.Generator().manual_seed(0)), []
    sample_blind(_towards_mean, y, h0=0.2, beta=0.3, steps=6, callback=seen.append, generator=torch.Generator().manual_seed(1))
    for i in range(5):
        h = 0.2 * (i + 1) / (1 + 0.2 * i)
        assert torch.allclose(seen[i + 1].sigma / seen[i].sigma, torch.tensor(1 - 0.3 * h), atol=0.02)


def test_measurements_are_met_and_the_rest_is_filled_in():
    physics, measured = _Rows(10, 30), torch.linspace(-1, 1, 10).expand(2, 10)
    y = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)) + 3
    last = []
    sample_blind(
        _towards_mean, y, h0=0.05, beta=0.5, physics=physics, measured=measured, sigma_end=1e-3, callback=last.append,
        sigma_max=9.0, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert not torch.allclose(last[0].x_t[:, :10], measured, atol=0.5)
    # the step's direction on the measured part is y - m: it ends there, the rest at the prior's mean
    assert torch.allclose(last[-1].x_t[:, :10], measured, atol=0.02)
    assert torch.allclose(last[-1].x_t[:, 10:], torch.tensor(3.0), atol=0.02)


def test_each_sample_rests_where_it_stopped():
    """A batch ends as its samples would alone, though one needs more steps, and one has diverged."""
    y = torch.stack([3 + 0.05 * torch.randn(50), 3 + torch.randn(50), 3 + 9 * torch.randn(50)])
    noise = torch.randn(200, 3, 50)
    paths = []
    kw = {"h0": 0.2, "beta": 0.5, "steps": 200}
    model = lambda y: 3 + 0.1 * (y - 3)  # noqa: E731
    with pytest.warns(UserWarning, match="1 of 3 samples diverged"):
        together = sample_blind(model, y, noise=noise, callback=paths.append, **kw)
    counts = []
    for i in range(3):
        alone = []
        end = sample_blind(model, y[i : i + 1], noise=noise[:, i : i + 1], callback=alone.append, **kw)
        assert torch.allclose(end[0], together[i], atol=1e-5)
        counts.append(len(alone))
    assert counts[2] == 1
    assert counts[0] < counts[1] == len(paths) < 200


def test_bad_settings_are_refused():
    y = torch.zeros(1, 4)
    with pytest.raises(BadSetting, match="h0=2"):
        sample_blind(_towards_mean, y, h0=2.0)
    with pytest.raises(BadSetting, match="physics"):
        sample_blind(_towards_mean, y, measured=y)
