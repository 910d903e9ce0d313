import math

import pytest
import torch

from sfumato.claim import Better, Holds
from sfumato.data import linear_teacher
from sfumato.engine.lab import Lab
from sfumato.papers.dynamics import high_dimensional_dynamics as page
from sfumato.probes import exact_gradient_flow, feature_spectrum, ridge_error


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("samples", [10, 40])
def test_ridge_is_at_a_minimum_and_has_the_error_of_theory(samples):
    task = linear_teacher(20, samples, snr=4.0, generator=generator())
    w = page.ridge(task, 0.3).requires_grad_()
    loss = (task.y - task.x @ w).square().sum() + 0.3 * w.square().sum()
    (slope,) = torch.autograd.grad(loss, w)
    assert slope.abs().max() < 1e-10
    curves = page.learning_curves(0.5, 20, generator())
    expected = float(ridge_error(snr=page.SNR, samples_per_dim=0.5))
    assert float(curves["ridge"].mean()) == pytest.approx(expected, rel=0.1)


def test_random_features_keep_their_scale():
    x = torch.randn(400, 30, dtype=torch.float64, generator=generator())
    for width in (300, 3000):
        features = page.random_features(x, width, generator=generator(1))
        assert (features >= 0).all()
        assert float(features.square().sum(1).mean()) == pytest.approx(0.5, rel=0.1)


def test_relu_task_is_standardised():
    x, labels, answers = page.relu_task(generator())
    assert x.shape == (2200, 30)
    assert labels.shape == (200,)
    assert float(answers.mean()) == pytest.approx(0, abs=0.1)
    assert float(answers.var()) == pytest.approx(1, rel=0.1)
    assert float(labels.var()) == pytest.approx(2, rel=0.25)  # half of it is noise


def test_wide_layers_are_better_conditioned_and_fit_without_moving_far():
    x, labels, _ = page.relu_task(generator())
    train, found = x[: page.SAMPLES], {}
    for width in (page.SAMPLES, 5 * page.SAMPLES):
        features = page.random_features(train, width, generator=generator(1))
        weights = exact_gradient_flow(features, labels, features.new_zeros(width), math.inf)
        torch.testing.assert_close(features @ weights, labels, rtol=0, atol=1e-5)
        found[width] = feature_spectrum(features).smallest, float(weights.norm())
    (narrow, far), (wide, near) = found.values()
    assert wide > 100 * narrow
    assert near < far / 10


def hold(claim, figures):
    """Whether each condition is met by one seed."""
    return [c.fn(figures) if isinstance(c, Holds) else c.difference(figures) >= c.by for c in claim.conditions]


def test_linear_claim_in_small():
    lab = Lab(0, budget=0.1)
    figures = page.linear(lab)
    assert all(hold(page.linear, figures)[2:])  # the first two are means over many teachers
    assert figures["alpha 0.25"]["theory"] == pytest.approx(13 / 3)
    assert "theory" not in figures["alpha 1"]
    assert len(lab.curves) == 3
    figures["alpha 0.25"]["final error"] *= 1.2
    figures["alpha 2"]["final error, large first weights"] *= 1.01
    broken = hold(page.linear, figures)
    assert not broken[0]
    assert not broken[-1]


def test_width_claim_in_small(monkeypatch):
    monkeypatch.setattr(page, "WIDTHS", (10, 100, 200, 1000, 3000))
    figures = page.width(Lab(1, budget=0.25))
    assert all(hold(page.width, figures))
    assert isinstance(page.width.conditions[2], Better)
    figures["width 200"]["final error"] /= 1e3
    figures["width 100"]["least eigenvalue"] = 0.0
    broken = hold(page.width, figures)
    assert not broken[0]
    assert not broken[3]
