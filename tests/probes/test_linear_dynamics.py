import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import linear_teacher
from sfumato.errors import BadData, BadSetting
from sfumato.probes import (
    exact_gradient_flow,
    feature_spectrum,
    final_error,
    frozen_subspace,
    generalization_error,
    mode_optimal_time,
    optimal_time,
    ridge_error,
    training_error,
)
from sfumato.probes.random_matrix import marchenko_pastur

STORED = np.load(Path(__file__).parents[1] / "vectors" / "high-dimensional-dynamics.npz")
ALPHAS = torch.tensor([0.25, 0.5, 0.8, 1.25, 2.0, 4.0], dtype=torch.float64)


@pytest.fixture(params=["under", "crit", "over"])
def case(request):
    prefix = f"{request.param}_"
    case = {k.removeprefix(prefix): torch.from_numpy(np.asarray(STORED[k])) for k in STORED.files if k.startswith(prefix)}
    x = case["X"].T  # [P, N]
    return case | {
        "x": x, "alpha": len(x) / x.shape[1], "spectrum": torch.linalg.eigvalsh(x.T @ x),
        "ratios": {"snr": float(case["snr"]), "inr": float(case["inr"])},
    }  # fmt: skip


def test_reference_errors(case):
    t, given = case["t"], {"spectrum": case["spectrum"], **case["ratios"]}
    torch.testing.assert_close(generalization_error(t, **given), case["Eg_expected_given_spectrum"], rtol=1e-8, atol=0)
    found = training_error(t, samples_per_dim=case["alpha"], **given)
    torch.testing.assert_close(found, case["Etrain_expected_given_spectrum"], rtol=1e-8, atol=1e-12)
    law = generalization_error(t, samples_per_dim=case["alpha"], **case["ratios"])
    rtol = 1e-2 if case["alpha"] == 1 else 1e-3
    torch.testing.assert_close(law, case["Eg_marchenko_pastur"], rtol=rtol, atol=0)


def test_reference_flow(case):
    weights = exact_gradient_flow(case["x"], case["y"], case["w0"], case["t"])
    torch.testing.assert_close(weights, case["w_t"], rtol=1e-8, atol=1e-8)
    error = 1 + (weights - case["w_teacher"]).square().mean(-1)
    torch.testing.assert_close(error, case["Eg_this_draw"], rtol=1e-8, atol=0)
    residual = (case["y"] - weights @ case["x"].T).square().mean(-1)
    torch.testing.assert_close(residual, case["Etrain_this_draw"], rtol=1e-8, atol=1e-12)


def test_reference_stopping_times(case):
    lam = case["spectrum"][-len(case["t_opt_mode"]) :]
    torch.testing.assert_close(mode_optimal_time(lam, **case["ratios"]), case["t_opt_mode"], rtol=1e-8, atol=0)


def test_quadrature_of_the_law():
    for alpha in ALPHAS:
        nodes, weights, at_zero = marchenko_pastur(alpha)
        assert float(weights.sum() + at_zero) == pytest.approx(1, abs=1e-10)
        assert float((weights * nodes).sum()) == pytest.approx(float(alpha), abs=1e-10)
        inverse = 1 / (alpha - 1) if alpha > 1 else alpha / (1 - alpha)
        assert float((weights / nodes).sum()) == pytest.approx(float(inverse), rel=1e-10)
        edges = (alpha.sqrt() - 1) ** 2, (alpha.sqrt() + 1) ** 2
        assert edges[0] < nodes.min()
        assert nodes.max() < edges[1]


def test_first_and_last_errors():
    ratios = {"snr": 4.0, "inr": 1.5}
    start = generalization_error(0.0, samples_per_dim=ALPHAS, **ratios)
    torch.testing.assert_close(start, torch.full_like(ALPHAS, 6.5))
    for late in (1e6, math.inf):
        end = generalization_error(late, samples_per_dim=ALPHAS, **ratios)
        torch.testing.assert_close(end, final_error(ALPHAS, **ratios), rtol=1e-6, atol=0)
    assert final_error(1.0, snr=1.0) == math.inf
    times = torch.logspace(-2, 6, 60)
    training = training_error(times, samples_per_dim=ALPHAS, **ratios)
    assert (training.diff(dim=-1) <= 1e-12).all()
    torch.testing.assert_close(training[:, -1], (1 - 1 / ALPHAS).clamp(min=0), rtol=0, atol=1e-9)
    first = training_error(0.0, samples_per_dim=ALPHAS, **ratios)  # labels less what random weights say
    torch.testing.assert_close(first, torch.full_like(ALPHAS, 6.5))


def test_first_weights_matter_only_where_data_cannot_reach():
    small, large = (final_error(ALPHAS, snr=4.0, inr=inr) for inr in (0.0, 4.0))
    torch.testing.assert_close(large - small, 4 * (1 - ALPHAS).clamp(min=0))


def test_shapes():
    times = torch.rand(3, 4, dtype=torch.float64)
    for error in (generalization_error, training_error):
        whole = error(times, snr=1.0, samples_per_dim=ALPHAS.view(2, 3))
        assert whole.shape == (2, 3, 3, 4)
        single = error(float(times[2, 1]), snr=1.0, samples_per_dim=float(ALPHAS[4]))
        assert single.shape == ()
        torch.testing.assert_close(whole[1, 1, 2, 1], single)
    assert optimal_time(snr=1.0, samples_per_dim=ALPHAS.view(2, 3)).shape == (2, 3)
    assert ridge_error(snr=1.0, samples_per_dim=2.0).shape == ()


@pytest.mark.parametrize("samples", [12, 35])
def test_formula_is_the_mean_of_simulated_runs(samples):
    dims, draws, snr, inr = 20, 600, 3.0, 0.5
    g = torch.Generator().manual_seed(samples)
    x = linear_teacher(dims, samples, snr=snr, generator=g).x
    spectrum, t = torch.linalg.eigvalsh(x.T @ x), torch.tensor([0.3, 2.0, 20.0])
    errors, residuals = [], []
    for _ in range(draws):
        teacher, first, noise = (torch.randn(n, dtype=torch.float64, generator=g) for n in (dims, dims, samples))
        teacher, first = snr**0.5 * teacher, inr**0.5 * first
        weights = exact_gradient_flow(x, x @ teacher + noise, first, t)
        errors.append(1 + (weights - teacher).square().mean(-1))
        residuals.append((x @ teacher + noise - weights @ x.T).square().mean(-1))
    found = {
        generalization_error(t, snr=snr, inr=inr, spectrum=spectrum): torch.stack(errors),
        training_error(t, snr=snr, inr=inr, spectrum=spectrum, samples_per_dim=samples / dims): torch.stack(residuals),
    }
    for expected, runs in found.items():
        assert ((runs.mean(0) - expected).abs() <= 3 * runs.std(0) / draws**0.5).all()


def test_law_agrees_with_a_large_matrix():
    x = linear_teacher(1000, 500, snr=1.0, generator=torch.Generator().manual_seed(0)).x
    spectrum = torch.linalg.svdvals(x).square()
    spectrum, t = torch.cat([spectrum, spectrum.new_zeros(500)]), torch.logspace(-1, 4, 12)
    given = {"snr": 4.0, "inr": 1.0}
    one, law = generalization_error(t, spectrum=spectrum, **given), generalization_error(t, samples_per_dim=0.5, **given)
    torch.testing.assert_close(one, law, rtol=0.01, atol=0)


@pytest.mark.parametrize("samples", [6, 10, 25])
def test_flow_is_the_limit_of_small_steps(samples):
    g = torch.Generator().manual_seed(1)
    x, y, _ = linear_teacher(10, samples, snr=2.0, generator=g)
    first = torch.randn(10, dtype=torch.float64, generator=g)
    rate = 1e-3 / feature_spectrum(x).largest
    weights, steps = first, 3000
    for _ in range(steps):
        weights = weights + rate * x.T @ (y - x @ weights)
    flow = exact_gradient_flow(x, y, first, [0.0, rate * steps, math.inf])
    torch.testing.assert_close(flow[0], first)
    torch.testing.assert_close(flow[1], weights, rtol=1e-3, atol=1e-3)
    if samples <= 10:
        torch.testing.assert_close(x @ flow[2], y)
    else:
        torch.testing.assert_close(flow[2], torch.linalg.lstsq(x, y).solution)


def test_frozen_directions_keep_their_weights():
    g = torch.Generator().manual_seed(2)
    x, y, _ = linear_teacher(12, 5, snr=2.0, generator=g)
    first = torch.randn(12, dtype=torch.float64, generator=g)
    dim, basis = frozen_subspace(x)
    assert dim == 7
    assert basis.shape == (12, 7)
    torch.testing.assert_close(basis.T @ basis, torch.eye(7, dtype=torch.float64))
    moved = exact_gradient_flow(x, y, first, [1.0, 1e5]) - first
    assert (moved @ basis).abs().max() < 1e-12
    assert moved.norm() > 1
    assert frozen_subspace(torch.cat([x, x @ torch.randn(12, 12, dtype=torch.float64, generator=g)])).dim == 2


def test_stopping_times_zero_the_slope():
    lam, times = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64), []
    for value in lam:
        t = mode_optimal_time(value, snr=4.0, inr=0.5).requires_grad_()
        error = 4.5 * (-2 * value * t).exp() + (1 - (-value * t).exp()).square() / value
        (slope,) = torch.autograd.grad(error, t)
        assert slope.abs() < 1e-12
        times.append(float(t))
    assert times[0] > times[1] > times[2]
    assert mode_optimal_time(0.0, snr=4.0, inr=0.5) == 4.5


def test_one_stopping_time_is_the_best_of_all_and_near_to_ridge():
    alphas = torch.cat([ALPHAS, torch.ones(1, dtype=torch.float64)])
    for snr in (0.25, 4.0):
        best = optimal_time(snr=snr, samples_per_dim=alphas)
        for alpha, t in zip(alphas, best, strict=True):
            near = t * torch.tensor([0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 2.0], dtype=torch.float64)
            errors = generalization_error(near, snr=snr, samples_per_dim=alpha)
            assert errors.argmin() == 3
            ridge = ridge_error(snr=snr, samples_per_dim=alpha)
            assert ridge <= errors[3] <= 1.03 * ridge


def test_ridge():
    g = torch.Generator().manual_seed(3)
    x = linear_teacher(20, 15, snr=1.0, generator=g).x
    lam = torch.linalg.eigvalsh(x.T @ x)
    for strength in (0.1, 0.25, 1.0):
        shrink = torch.linalg.solve(x.T @ x + strength * torch.eye(20, dtype=torch.float64), x.T)
        bias = (shrink @ x - torch.eye(20, dtype=torch.float64)).square().sum() * 4
        expected = 1 + (bias + shrink.square().sum()) / 20
        torch.testing.assert_close(ridge_error(snr=4.0, strength=strength, spectrum=lam), expected)
    best = ridge_error(snr=4.0, samples_per_dim=ALPHAS)
    for strength in (0.2, 0.3):
        assert (ridge_error(snr=4.0, strength=strength, samples_per_dim=ALPHAS) > best).all()


def test_spectrum_of_features():
    x = torch.diag(torch.tensor([3.0, 2.0, 0.0]))[:, [0, 1, 2, 2]]
    assert feature_spectrum(x) == pytest.approx((4.0, 9.0, 2, 0.75))


def test_refusals():
    x, y, w = torch.rand(4, 3), torch.rand(4), torch.rand(3)
    with pytest.raises(BadData, match="first"):
        exact_gradient_flow(x, y, torch.rand(4), 1.0)
    with pytest.raises(BadSetting, match="samples_per_dim"):
        generalization_error(1.0, snr=1.0)
    with pytest.raises(BadSetting, match="positive"):
        generalization_error(1.0, snr=1.0, samples_per_dim=0.0)
    with pytest.raises(BadSetting, match="snr"):
        final_error(2.0, snr=0.0)
    with pytest.raises(BadSetting, match="strength"):
        ridge_error(snr=1.0, strength=0.0, spectrum=w)
    with pytest.raises(BadSetting, match="spectrum"):
        optimal_time(snr=1.0, spectrum=torch.zeros(3))
    with pytest.raises(BadData, match="zero"):
        feature_spectrum(torch.zeros(4, 3))
