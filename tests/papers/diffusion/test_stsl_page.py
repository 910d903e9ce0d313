"""The claims of STSL: the bound and its exact likelihood, and the comparison in a shrunken form that can fail."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.data import GaussianMixture
from sfumato.diffusion import posterior_cov_trace, posterior_mean
from sfumato.engine import Lab
from sfumato.papers.diffusion import stsl

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "stsl.npz").items()}


@pytest.fixture
def mixture():
    return GaussianMixture(V["mu"], V["std"], weights=V["weights"])


def test_the_likelihoods_are_the_reference(mixture):
    y, A, z, abar, sigma = V["y"], V["A"], V["z"], V["abar"], float(V["sigma_y"])
    score = mixture.noised(abar).score
    units = torch.eye(6, dtype=torch.float64)[:, None].expand(6, 10, 6) * 6**0.5
    mean, spread = posterior_mean(z, score(z), abar), posterior_cov_trace(z, score, abar, noise=units)
    close = {"rtol": 0, "atol": 1e-8}
    assert torch.allclose(stsl.log_likelihood(mixture, y, A, z, abar, sigma=sigma), V["loglik_exact"], **close)
    assert torch.allclose(stsl.log_likelihood_bound(y, A, mean, 0.0, sigma=sigma), V["loglik_first"], **close)
    assert torch.allclose(stsl.log_likelihood_bound(y, A, mean, spread, sigma=sigma), V["loglik_surrogate"], **close)
    assert (V["loglik_surrogate"] <= V["loglik_exact"]).all()


def test_the_bound_is_what_its_claim_says(monkeypatch):
    monkeypatch.setattr(stsl, "DRAWS", 40)
    figures = stsl.bound(Lab(0))
    assert judge(stsl.bound, [figures] * 5).verdict is Verdict.REPRODUCED
    assert figures["t = 300"]["bias of the bound"] < figures["t = 300"]["bias of the first order"] < 0
    # of the opposite sign it bounds nothing
    monkeypatch.setattr(stsl, "posterior_cov_trace", lambda *a, **k: -posterior_cov_trace(*a, **k))
    assert judge(stsl.bound, [stsl.bound(Lab(0))] * 5).verdict is Verdict.NOT_REPRODUCED


def test_the_comparison_in_small(monkeypatch):
    """One problem, short chains: more iterations help, and the trace with too large a weight is far off."""
    monkeypatch.setattr(stsl, "DRAWS", 60)
    first = {"steps": 10, "inner": 5, "eta": 0.5, "lam": 0.0}
    arms = {
        "first order, 50 x 1": {**first, "inner": 1},
        "first order, 50 x 5": first,
        "first order, 250 x 1": {**first, "steps": 50, "inner": 1},
        "STSL, 50 x 5": {**first, "lam": 0.005},
        "too much of it": {**first, "lam": 5.0},
    }
    monkeypatch.setattr(stsl, "ARMS", arms)
    figures = stsl.mixtures(Lab(0, budget=0.01))
    assert {arm: f["calls"] for arm, f in figures.items()} == {
        "first order, 50 x 1": 10, "first order, 50 x 5": 50, "first order, 250 x 1": 50,
        "STSL, 50 x 5": 100, "too much of it": 100,
    }  # fmt: skip
    distance = {arm: f["sliced W2"] for arm, f in figures.items()}
    assert distance["first order, 50 x 5"] < distance["first order, 50 x 1"]
    assert distance["STSL, 50 x 5"] < 1.2 * distance["first order, 50 x 5"] < distance["too much of it"]
    assert stsl.mixtures(Lab(0, budget=0.01)) == figures
    exact = judge(stsl.mixtures, [figures] * 5).findings[2]
    assert (exact.condition, exact.verdict) == ("the trace costs one score call an iteration", Verdict.REPRODUCED)
