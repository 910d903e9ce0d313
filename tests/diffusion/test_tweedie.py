from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import GaussianMixture
from sfumato.diffusion import posterior_cov_trace, posterior_mean
from sfumato.errors import BadSetting

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "stsl.npz").items()}


@pytest.fixture
def noised():
    return GaussianMixture(V["mu"], V["std"], weights=V["weights"]).noised(V["abar"])


def test_the_moments_are_those_of_the_reference(noised):
    mean = posterior_mean(V["z"], noised.score(V["z"]), V["abar"])
    assert torch.allclose(mean, V["z0_hat"], rtol=0, atol=1e-8)
    units = torch.eye(6, dtype=torch.float64)[:, None].expand(6, 10, 6) * 6**0.5  # probes that give the trace exactly
    for method, tolerance in (("jvp", 1e-8), ("fd", 1e-4)):
        trace = posterior_cov_trace(V["z"], noised.score, V["abar"], method=method, noise=units)
        assert torch.allclose(trace, V["trace_cov"], rtol=0, atol=tolerance)


def test_the_trace_is_that_of_the_means_jacobian(noised):
    """(1 - abar) / sqrt(abar) tr ∂x̂_0/∂x_t, never negative."""
    abar = V["abar"]
    for z, trace in zip(V["z"], V["trace_cov"]):
        jacobian = torch.func.jacrev(lambda z: posterior_mean(z[None], noised.score(z[None]), abar)[0])(z)
        assert torch.allclose((1 - abar) / abar.sqrt() * jacobian.trace(), trace, atol=1e-8)
        assert trace >= 0


def test_random_probes_agree_with_the_exact_trace(noised):
    z = V["z"][:1].repeat(2000, 1)
    for method in ("jvp", "fd"):
        traces = posterior_cov_trace(
            z, noised.score, V["abar"], method=method, probe="gaussian", generator=torch.Generator().manual_seed(0)
        )
        assert abs(traces.mean() - V["trace_cov"][0]) < 3 * traces.std() / 2000**0.5


def test_the_moments_of_a_mixture_are_those_of_its_draws():
    """Against the exact posterior p(x_0 | x_t), which is a measurement of x_0."""
    mixture, abar = GaussianMixture(V["mu"], V["std"], weights=V["weights"]), V["abar"]
    score, eye = mixture.noised(abar).score, torch.eye(6, dtype=torch.float64)
    z = V["z"][3]
    draws = mixture.posterior(z, abar.sqrt() * eye, (1 - abar).sqrt()).sample(40_000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(draws.mean(0), posterior_mean(z[None], score(z[None]), abar)[0], atol=0.02)
    assert abs(draws.var(0).sum() - V["trace_cov"][3]) < 0.02


def test_one_share_a_sample_and_what_is_no_share(noised):
    z, score = V["z"][:2].float(), -V["z"][:2].float()
    both = posterior_mean(z, score, torch.tensor([0.5, 1.0]))
    assert torch.equal(both[0], posterior_mean(z, score, 0.5)[0])
    assert torch.equal(both[1], z[1])
    for abar in (0.0, 1.5, float("nan")):
        with pytest.raises(BadSetting, match="abar"):
            posterior_mean(z, score, abar)
