from pathlib import Path

import numpy as np
import pytest
import torch
from deepinv.physics import Blur, Denoising, GaussianNoise, Inpainting, LinearPhysics, Physics, stack
from torch import nn

from sfumato.data import GaussianMixture
from sfumato.diffusion import Schedule, beta_schedule, sample_ddim, sample_posterior
from sfumato.errors import BadData, BadSetting, Diverged
from sfumato.metrics import sliced_wasserstein
from sfumato.nn import PatchPCA, divergence

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "stsl.npz").items()}
SCHEDULE = Schedule(beta_schedule("linear"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(A):
    return LinearPhysics(A=lambda x, **_: x @ A.mT, A_adjoint=lambda y, **_: y @ A)


class Exact:
    """The score of a noised mixture, and how often it was asked."""

    def __init__(self, mixture):
        self.mixture, self.calls = mixture, 0

    def __call__(self, z, t):
        self.calls += 1
        return self.mixture.noised(SCHEDULE.abar[t[0]]).score(z)


@pytest.fixture
def mixture():
    return GaussianMixture(V["mu"], V["std"], weights=V["weights"])


def run(model, y, A, **over):
    settings = {"steps": 5, "predict": "score", "generator": seeded(), **over}
    return sample_posterior(model, y, matrix(A), SCHEDULE, **settings)


class OneLevel(Schedule):
    """A schedule of one time, at the noise of the reference."""

    def __init__(self):
        super().__init__(1 - V["abar"][None])


def slopes(mixture, **over):
    """Minus what one step adds to ẑ_0 of the reference's z: the gradient of S."""
    z = V["z"]
    start = torch.zeros_like(z)
    noise = z / (1 - V["abar"]).sqrt()

    class Fixed(OneLevel):
        def q_sample(self, *_, **__):
            return (1 - V["abar"]).sqrt() * noise

    settings = {"steps": 1, "predict": "score", "start": start, "inner": 1, "generator": seeded(), **over}
    score = mixture.noised(V["abar"]).score
    end = sample_posterior(lambda x, t: score(x), V["y"], matrix(V["A"]), Fixed(), **settings)
    return V["z0_hat"] - end


def test_the_gradient_of_the_residual_is_the_reference(mixture):
    assert torch.allclose(slopes(mixture, method="dps", eta=1.0), V["grad_residual_norm"], rtol=0, atol=1e-8)


@pytest.mark.parametrize(("trace", "h", "tolerance"), [("jvp", None, 1e-8), ("fd", 1e-5, 1e-3)])
def test_the_gradient_of_the_trace_is_the_reference_on_average(mixture, trace, h, tolerance, monkeypatch):
    """With the six unit vectors as probes the trace is exact."""
    units = torch.eye(6, dtype=torch.float64)[:, None].expand(6, 10, 6) * 6**0.5
    monkeypatch.setattr(
        "sfumato.diffusion.posterior_sampling.divergence",
        lambda fn, x, *, method, h, probe, generator: divergence(fn, x, method=method, h=h, noise=units),
    )
    got = slopes(mixture, method="stsl", eta=0.0, lam=1.0, trace=trace, h=h)
    assert torch.allclose(got, V["grad_hessian_trace"], rtol=0, atol=tolerance)


def test_the_trace_can_be_weighted_by_the_noise(mixture):
    constant, variance = (slopes(mixture, eta=0.0, lam=1.0, weighting=w) for w in ("constant", "variance"))
    assert torch.allclose(variance, (1 - V["abar"]) * constant, atol=1e-10)


def test_one_probe_of_the_trace_is_the_reference(mixture):
    score = mixture.noised(V["abar"]).score
    got = divergence(score, V["z"], method="fd", h=V["fd_h"], noise=V["probe"][None])
    assert torch.allclose(got, V["trace_fd_one_probe"], rtol=0, atol=1e-6)


def test_without_its_trace_it_is_dps_and_without_its_encoder_psld_is_dps(mixture):
    y = V["y"][:3]
    dps = run(Exact(mixture), y, V["A"], method="dps", eta=0.3)
    assert torch.equal(run(Exact(mixture), y, V["A"], method="stsl", eta=0.3, lam=0, inner=1), dps)
    assert torch.equal(run(Exact(mixture), y, V["A"], method="psld", eta=0.3, gamma=0), dps)
    assert not torch.equal(run(Exact(mixture), y, V["A"], method="psld", eta=0.3, gamma=0.1), dps)
    assert not torch.equal(run(Exact(mixture), y, V["A"], method="stsl", eta=0.3, lam=0.1, inner=1), dps)


def test_of_a_single_gaussian_the_trace_has_no_gradient():
    """Its Hessian is the same everywhere: second order changes nothing."""
    gaussian = GaussianMixture(V["mu"][:1], 0.7)
    settings = {"eta": 0.3, "inner": 3, "ancestral": 0.0}
    first, second = (run(Exact(gaussian), V["y"][:3], V["A"], lam=lam, **settings) for lam in (0.0, 0.1))
    assert torch.allclose(first, second, rtol=0, atol=1e-8)


def test_without_a_pull_it_is_ddim(mixture):
    model, start = Exact(mixture), torch.zeros(4, 6, dtype=torch.float64)
    free = run(model, V["y"][:4], V["A"], method="dps", eta=0.0, ancestral=0.0, start=start)
    noise = SCHEDULE.q_sample(start, 800, torch.randn(start.shape, generator=seeded(), dtype=torch.float64))
    assert torch.allclose(free, sample_ddim(model, noise, SCHEDULE, steps=5, predict="score"), atol=1e-10)


def test_network_calls_are_counted(mixture):
    for settings, calls in (
        ({"method": "dps"}, 5),
        ({"method": "psld"}, 5),
        ({"method": "stsl", "inner": 3}, 2 * 5 * 3),
        ({"method": "stsl", "inner": 3, "lam": 0}, 5 * 3),
    ):
        model = Exact(mixture)
        run(model, V["y"][:2], V["A"], **settings)
        assert model.calls == calls


def test_draws_come_near_the_exact_posterior(mixture):
    """Far nearer than draws of the prior, and the measurement is explained."""
    A, sigma, n = V["A"], V["sigma_y"], 300
    y = A @ V["mu"][1] + 0.1
    exact = mixture.posterior(y, A, sigma).sample(n, generator=seeded(1))
    prior = mixture.sample(n, generator=seeded(2))
    drawn = run(Exact(mixture), y.expand(n, 2), A, eta=0.3, lam=0.006, steps=50)
    near, far = (sliced_wasserstein(x, exact, generator=seeded()) for x in (drawn, prior))
    assert near < 0.5 * far
    assert (drawn @ A.T - y).norm(dim=1).median() < 0.5 < (prior @ A.T - y).norm(dim=1).median()


def test_the_same_generator_draws_the_same(mixture):
    a, b, c = (run(Exact(mixture), V["y"][:2], V["A"], generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class Towards(nn.Module):
    """A network of pictures that knows one grey value and looks a little at its input."""

    def __init__(self, weight=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, z, t):
        return 0.5 + self.weight * (z - 0.5)


def pictures(model, y, physics, **over):
    return sample_posterior(model, y, physics, SCHEDULE, **{"steps": 4, "predict": "x0", "generator": seeded(), **over})


def test_any_linear_physics_and_what_is_measured_stays():
    x = torch.rand(2, 1, 8, 8, generator=seeded(3))
    mask = (torch.rand(1, 8, 8, generator=seeded(4)) > 0.5).float()
    physics = Inpainting((1, 8, 8), mask=mask)
    for method in ("dps", "psld", "stsl"):
        out = pictures(Towards(), physics.A(x), physics, method=method, project=True)
        assert torch.allclose(out * mask, x * mask, atol=1e-6)
        assert out.requires_grad is False
    blur = Blur(filter=torch.ones(1, 1, 3, 3) / 9, padding="circular")
    assert pictures(Towards(), blur.A(x), blur).shape == x.shape
    two = stack(blur, physics)
    out = pictures(Towards(), two.A(x), two, method="dps", eta=2.0)
    assert (out - x).abs().mean() < (0.5 - x).abs().mean()


def test_a_physics_without_a_transpose_needs_a_start():
    square = Physics(A=lambda x, **_: x.square())
    x = torch.rand(1, 1, 4, 4, generator=seeded(3))
    with pytest.raises(BadSetting, match="start="):
        pictures(Towards(), x.square(), square)
    with pytest.raises(BadSetting, match="psld"):
        pictures(Towards(), x.square(), square, start=x, method="psld")
    out = pictures(Towards(), x.square(), square, start=torch.full_like(x, 0.5), eta=0.2)
    assert (out.square() - x.square()).norm() < (0.25 - x.square()).norm()


def test_latents_of_a_codec():
    """A linear encoder and decoder: the measurement is of the decoded picture."""
    x = torch.rand(64, 1, 8, 8, generator=seeded(5))
    codec, physics = PatchPCA(4, 6).fit(x), Denoising(GaussianNoise(0.0))
    for method in ("dps", "psld", "stsl"):
        seen = []
        out = sample_posterior(
            lambda z, t: 0.1 * z, x[:2], physics, SCHEDULE, codec=codec, method=method, steps=6, predict="x0", eta=0.5,
            callback=seen.append, generator=seeded(),
        )  # fmt: skip
        assert out.shape == (2, 1, 8, 8)
        assert seen[0].x_t.shape == seen[0].x0.shape == (2, 6, 2, 2)
        assert [s.step for s in seen] == list(range(6))
        assert torch.allclose(codec.decode(codec.encode(out)), out, atol=1e-5)


def test_known_noise_is_not_explained():
    """Once the residual is as long as the noise nothing pulls."""
    y = torch.full((1, 1, 8, 8), 0.9)
    settings = {"eta": 0.3, "steps": 20, "ancestral": 0.0}
    rests = [(pictures(Towards(0.9), y, Denoising(), sigma=s, **settings) - y).square().mean().sqrt() for s in (0.0, 0.3, 2.0)]
    free = (pictures(Towards(0.9), y, Denoising(), **{**settings, "eta": 0.0}) - y).square().mean().sqrt()
    assert rests[0] < 0.1 < rests[1] < rests[2]
    assert rests[2] == free


def test_what_is_wrong_is_told_in_a_line(mixture):
    y, A = V["y"][:2], V["A"]
    for over, words in (
        ({"method": "ddrm"}, "dps, psld, stsl"),
        ({"steps": 0}, "between 1 and"),
        ({"steps": 1001}, "between 1 and"),
        ({"inner": 0}, "inner=0"),
        ({"weighting": "none"}, "constant or variance"),
        ({"eta": -1.0}, "eta=-1"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"ancestral": 2.0}, "ancestral=2"),
    ):
        with pytest.raises(BadSetting, match=words):
            run(Exact(mixture), y, A, **over)
    for physics, words in (
        (LinearPhysics(A=lambda x, **_: x, A_adjoint=lambda y, **_: y @ A), "makes .2, 6. of pictures .2, 6., but .* is .2, 2."),
        (LinearPhysics(A=lambda x, **_: x @ A, A_adjoint=lambda y, **_: y @ A), "does not take pictures of shape .2, 6."),
    ):
        with pytest.raises(BadData, match=words):
            sample_posterior(Exact(mixture), y, physics, SCHEDULE, predict="score")


def test_a_trajectory_that_is_lost_is_refused_with_its_step(mixture):
    def breaks(z, t):
        return mixture.noised(SCHEDULE.abar[t[0]]).score(z) * (1 if t[0] > 500 else float("nan"))

    with pytest.raises(Diverged, match=r"2 of 2 samples broke off: from step 3 of 5 on .* make eta="):
        run(breaks, V["y"][:2], V["A"])

    def explodes(z, t):  # clipped, an infinity would be a white picture
        return torch.where(torch.tensor([[False], [True]]) & (t[0] < 500), torch.inf, 0 * z)

    with pytest.raises(Diverged, match=r"1 of 2 samples .* step 3 of 5 .*sample 1\)"):
        run(explodes, V["y"][:2], V["A"], predict="x0", clip=True, lam=0.0)
