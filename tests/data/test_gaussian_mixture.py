from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from sfumato.data import GaussianMixture, gaussian_grid
from sfumato.errors import BadData, BadSetting

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "stsl.npz").items()}
PRIOR = GaussianMixture(V["mu"], V["std"], weights=V["weights"])
NOISED = PRIOR.noised(V["abar"])


def _posteriors():
    """z_0 given each noised z."""
    eye = torch.eye(6, dtype=torch.float64)
    return [PRIOR.posterior(z, V["abar"].sqrt() * eye, (1 - V["abar"]).sqrt()) for z in V["z"]]


def _full():
    """A mixture with a covariance of its own for every mode."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(3, 2, 2, generator=g, dtype=torch.float64)
    means = 2 * torch.randn(3, 2, generator=g, dtype=torch.float64)
    return GaussianMixture(means, weights=torch.tensor([1.0, 2, 3]), cov=root @ root.mT + 0.1 * torch.eye(2))


def test_density_and_score_of_the_reference():
    assert torch.allclose(NOISED.log_prob(V["z"]), V["log_p"], rtol=0, atol=1e-8)
    assert torch.allclose(NOISED.score(V["z"]), V["score"], rtol=0, atol=1e-8)


def test_posterior_of_the_reference():
    mean = torch.stack([p.weights @ p.means for p in _posteriors()])
    assert torch.allclose(mean, V["z0_hat"], rtol=0, atol=1e-8)
    second = torch.stack([p.weights @ (p.means.square().sum(1) + p.cov.diagonal(dim1=1, dim2=2).sum(1)) for p in _posteriors()])
    assert torch.allclose(second - mean.square().sum(1), V["trace_cov"], rtol=0, atol=1e-8)
    exact = [p.measured(V["A"], V["sigma_y"]).log_prob(y[None]) for p, y in zip(_posteriors(), V["y"])]
    assert torch.allclose(torch.cat(exact), V["loglik_exact"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("mixture", [PRIOR, _full(), _full().noised(0.3)])
def test_score_is_the_gradient(mixture):
    d = mixture.means.shape[1]
    x = torch.randn(20, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    assert torch.allclose(mixture.score(x), gradient, rtol=0, atol=1e-8)


def test_density_is_scipys():
    mixture, x = _full(), torch.randn(9, 2, dtype=torch.float64)
    parts = [w * multivariate_normal(m, c).pdf(x) for w, m, c in zip(mixture.weights, mixture.means, mixture.cov)]
    assert np.allclose(mixture.log_prob(x).exp(), sum(parts))
    assert torch.allclose(PRIOR.log_prob(V["z"]), GaussianMixture(
        V["mu"], weights=V["weights"], cov=V["std"] ** 2 * torch.eye(6)).log_prob(V["z"]))  # fmt: skip


def test_bayes_rule():
    """p(x | y) p(y) = p(y | x) p(x), everywhere."""
    prior, A, sigma = _full(), torch.tensor([[1.0, -0.5]], dtype=torch.float64), 0.4
    y, x = torch.tensor([0.7], dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    likelihood = torch.distributions.Normal(x @ A.T, sigma).log_prob(y)[:, 0]
    left = prior.posterior(y, A, sigma).log_prob(x) + prior.measured(A, sigma).log_prob(y[None])
    assert torch.allclose(left, likelihood + prior.log_prob(x), atol=1e-10)
    with pytest.raises(BadSetting, match="without noise"):
        prior.posterior(y, A, 0.0)
    with pytest.raises(BadData, match="one measurement"):
        prior.posterior(y.expand(2), A, 0.1)


@pytest.mark.parametrize("mixture", [PRIOR, _full()])
def test_samples_have_the_mixtures_moments(mixture):
    x = mixture.sample(40000, generator=torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.means
    within = mixture._full()
    gaps = mixture.means - mean
    cov = torch.einsum("k,kij->ij", mixture.weights, within + gaps[:, :, None] * gaps[:, None])
    assert torch.allclose(x.mean(0), mean, atol=0.04)
    assert torch.allclose(torch.cov(x.T), cov, rtol=0.05, atol=0.1)
    assert torch.equal(x[:5], mixture.sample(40000, generator=torch.Generator().manual_seed(0))[:5])


def test_balanced_samples_share_alike():
    grid = gaussian_grid()
    x = grid.sample(1013, balanced=True, generator=torch.Generator().manual_seed(0))
    counts = torch.cdist(x, grid.means).argmin(1).bincount(minlength=25)
    assert counts.max() - counts.min() <= 1
    assert torch.allclose(x.std(0), torch.ones(2), atol=0.02)
    weighted = GaussianMixture(torch.tensor([[0.0], [10.0]]), 0.1, weights=torch.tensor([3.0, 1.0]))
    assert (weighted.sample(400, balanced=True) > 5).sum() == 100


def test_the_grid_and_its_rotation():
    grid, rotated = gaussian_grid(), gaussian_grid(rotated=True)
    assert grid.means.shape == rotated.means.shape == (25, 2)
    spacing = torch.pdist(grid.means).min().item()
    assert spacing == pytest.approx(0.707, abs=1e-3)
    assert torch.pdist(rotated.means).min().item() == pytest.approx(spacing / 2**0.5, abs=1e-6)
    for mixture in (grid, rotated):
        assert mixture.var.sqrt().unique().item() == pytest.approx(0.0177, abs=1e-4)
    corners = rotated.means[rotated.means.abs().sum(1) > 1.41]
    assert sorted(map(tuple, (corners * 2.0 * 2**0.5).round().tolist()))[0] == (-4, 0)
    with pytest.raises(BadSetting, match="side=1"):
        gaussian_grid(1)


def test_support_ends_after_kappa_deviations():
    mixture = GaussianMixture(torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.tensor([0.1, 0.5]))
    x = torch.tensor([[0.59, 0], [0.61, 0], [2.1, 0], [1.9, 0]])
    assert mixture.off_support(x).tolist() == [False, True, False, True]
    assert mixture.off_support(x, kappa=7.0).tolist() == [False, False, False, False]
    assert not mixture.off_support(mixture.sample(2000, generator=torch.Generator().manual_seed(0))).any()


def test_bad_mixtures_are_refused():
    means = torch.zeros(2, 1)
    with pytest.raises(BadSetting, match="give std, or cov"):
        GaussianMixture(means)
    with pytest.raises(BadSetting, match="positive"):
        GaussianMixture(means, 0.0)
    with pytest.raises(BadSetting, match="positive"):
        GaussianMixture(means, 1.0, weights=torch.tensor([1.0, 0.0]))
