import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.claim import Verdict, judge
from sfumato.engine.lab import Lab
from sfumato.errors import BadSetting
from sfumato.papers.dynamics import batch_size_scaling as page
from sfumato.probes import HessianOperator, lanczos, spiked_wigner


def ball(noise=0.0, **over):
    curvature = torch.diag(torch.linspace(1, 50, 8, dtype=torch.float64))
    theta = nn.Parameter(torch.ones(8, dtype=torch.float64))
    sgd = torch.optim.SGD([theta], lr=1e-3, momentum=0.5)
    return curvature, theta, sgd, page.LanczosTuner(sgd, lambda: curvature, every=50, noise=noise, **over)


def test_tuner_reaches_the_best_rate_of_a_quadratic():
    curvature, theta, sgd, tuner = ball(generator=torch.Generator().manual_seed(0))
    sizes = []
    for _ in range(160):
        theta.grad = curvature @ theta.detach()
        tuner.step()
        sgd.step()
        sizes.append(float(theta.detach().norm().log()))
    high, low = math.sqrt(50), 1.0
    assert sgd.param_groups[0]["lr"] == pytest.approx(4 / (high + low) ** 2, rel=1e-6)
    assert sgd.param_groups[0]["momentum"] == pytest.approx(((high - low) / (high + low)) ** 2, rel=1e-6)
    rate = math.exp((sizes[159] - sizes[79]) / 80)
    assert rate == pytest.approx((high - low) / (high + low), rel=0.02)


def test_tuner_smooths_corrects_for_noise_and_caps():
    curvature, _, sgd, tuner = ball(noise=500.0, max_momentum=0.3)
    tuner.step(scale=0.5)
    top = float(spiked_wigner(torch.tensor(50.0), 500.0))
    assert (tuner.lam_max, tuner.lam_min) == pytest.approx((top, 1.0))
    assert sgd.param_groups[0]["momentum"] == pytest.approx(0.3)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.5 * (1 + math.sqrt(0.3)) ** 2 / top)  # half of the fastest with 0.3
    curvature.mul_(2)
    for _ in range(49):
        tuner.step()
    assert tuner.lam_max == pytest.approx(top)  # looks every 50 steps
    tuner.step()
    assert (tuner.lam_max, tuner.lam_min) == pytest.approx(((top + 100 + 500 / 100) / 2, 1.5))
    other = ball(noise=500.0, max_momentum=0.3)[3]
    other.load_state_dict(tuner.state_dict())
    other.step()
    assert other.optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]


def test_tuner_leaves_the_optimizer_alone_without_positive_curvature():
    curvature, _, sgd, tuner = ball()
    curvature.neg_()
    tuner.step()
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]) == (1e-3, 0.5)


def test_tuner_trains_a_network():
    x, y = page.train_digits(0)
    model = page.network(nn.ReLU, 0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.0)  # learns nothing by itself
    generator = torch.Generator().manual_seed(0)
    tuner = page.LanczosTuner(sgd, lambda: HessianOperator(model, F.cross_entropy, (x, y)), every=10, generator=generator)
    for _ in range(60):
        rows = torch.randint(len(x), (128,), generator=generator)
        sgd.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        tuner.step(scale=0.1)
        sgd.step()
    assert sum((model(x).argmax(1) == y).tolist()) > 0.7 * len(x)


def test_tuner_refuses():
    theta = nn.Parameter(torch.ones(2))
    with pytest.raises(BadSetting, match="no momentum"):
        page.LanczosTuner(torch.optim.Adam([theta]), lambda: torch.eye(2), every=1)
    sgd = torch.optim.SGD([theta], lr=0.1)
    for wrong in ({"every": 0}, {"every": 1, "steps": 1}, {"every": 1, "smoothing": 1.0}, {"every": 1, "noise": -1.0}):
        with pytest.raises(BadSetting, match="every="):
            page.LanczosTuner(sgd, lambda: torch.eye(2), **wrong)


def test_ritz_values_are_eigenvalues_after_as_many_steps():
    a = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = a + a.T
    torch.testing.assert_close(page.ritz_values(a, 6), torch.linalg.eigvalsh(a))
    assert len(page.ritz_values(torch.eye(6), 6)) == len(lanczos(torch.eye(6), 6).alpha) == 1


def test_theory_holds_and_can_fail(monkeypatch):
    monkeypatch.setattr(page, "P", 200)
    assert judge(page.theory, [page.theory(Lab(0))]).verdict is Verdict.REPRODUCED
    monkeypatch.setattr(page, "spiked_wigner", lambda lam, v: lam)
    assert judge(page.theory, [page.theory(Lab(0))]).verdict is Verdict.NOT_REPRODUCED


def test_spectrum_in_small():
    figures = page.measured_spectrum(Lab(0), {8: 4, 1300: 1})
    assert figures["batch 8"]["largest"] > figures["full"]["largest"]
    assert figures["batch 1300"]["largest"] == pytest.approx(figures["full"]["largest"], rel=1e-3)
    assert figures["batch 1300"]["v"] < 1e-8 < figures["batch 8"]["v"]
    assert figures["batch 8"]["predicted"] > figures["full"]["largest"]


def test_slope_is_the_power():
    batches = (2, 8, 64)
    assert page.slope(batches, [math.log2(3 * b**0.5) for b in batches]) == pytest.approx(0.5)


def test_larger_batches_stand_larger_rates(monkeypatch):
    monkeypatch.setattr(page, "OPTIMIZERS", {"sgd": page.OPTIMIZERS["sgd"]})
    small, large = page.largest_rates(Lab(0), (2, 64), steps=60)["sgd"]
    assert large > small + 0.5


def test_a_run_that_explodes_is_told_apart():
    data, model = page.train_digits(0), page.network(nn.ReLU, 0)
    generator = torch.Generator().manual_seed(0)
    assert not page.descend(model, torch.optim.SGD(model.parameters(), 1e6), data, 20, 32, generator)
    model = page.network(nn.ReLU, 0)
    assert page.descend(model, torch.optim.SGD(model.parameters(), 0.1), data, 20, 32, generator)


def test_rates_and_laws_are_judged_on_the_powers(monkeypatch):
    power = {"sgd": 1.0, "adam": 0.5}

    def largest_rates(lab, batches):
        return {name: [p * math.log2(b) for b in batches] for name, p in power.items()}

    monkeypatch.setattr(page, "largest_rates", largest_rates)
    assert judge(page.laws, [page.laws(Lab(0))] * 5).verdict is Verdict.REPRODUCED
    assert judge(page.rates, [page.rates(Lab(0))] * 5).verdict is Verdict.NOT_REPRODUCED  # it never saturates
    power["sgd"] = 0.5
    assert judge(page.laws, [page.laws(Lab(0))] * 5).verdict is Verdict.NOT_REPRODUCED
