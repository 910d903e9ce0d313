"""How hard times are by the data alone: closed forms, limits, and agreement of the estimators."""

import math

import pytest
import torch

from sfumato.data import digits
from sfumato.diffusion import EDMPrecond, Schedule, beta_schedule, denoising_loss, edm_loss
from sfumato.errors import BadData, BadSetting
from sfumato.probes import denoising_tasks, linear_denoising_loss, marginal_kl, principal_variances

SCHEDULE = Schedule(beta_schedule("linear"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n=4000, scales=(0.5, 0.2), shift=0.0):
    x = torch.randn(n, len(scales), generator=generator(), dtype=torch.float64)
    root = torch.linalg.cholesky(torch.cov(x.T).reshape(2 * [len(scales)]))
    x = (x - x.mean(0)) @ torch.linalg.inv(root).T  # moments are exact
    return x * torch.tensor(scales, dtype=torch.float64) + shift


def test_digits_have_the_known_divergence():
    x = 2 * torch.cat([part.x for part in digits()]) - 1
    kl = marginal_kl(x - x.mean(0), SCHEDULE)
    for t, value in ((1, 0.82), (10, 0.055), (100, 0.0022), (400, 4.5e-5), (800, 8e-9)):
        assert kl[t - 1].item() == pytest.approx(value, rel=0.02)
    tenths = [kl[max(0, 100 * i - 1) : 100 * i + 99].sum().item() for i in range(10)]
    known = [2.97, 0.118, 0.034, 0.0095, 0.0023, 4.2e-4, 5.3e-5, 4.5e-6, 2.5e-7, 9.1e-9]
    assert tenths == pytest.approx(known, rel=0.03)
    assert tenths == sorted(tenths, reverse=True)


def test_closed_form_is_the_divergence_of_two_normals_in_one_dimension():
    x = gaussian(scales=(0.7,), shift=0.4)
    times = [1, 30, 500, 999]
    for t, kl in zip(times, marginal_kl(x, SCHEDULE, times=times), strict=True):
        moments = [(a.sqrt() * 0.4, a * 0.49 + 1 - a) for a in SCHEDULE.abar[[t - 1, t]]]
        p, q = (torch.distributions.Normal(m, v.sqrt()) for m, v in moments)
        assert kl.item() == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-6)


def test_white_noise_stays_what_it_is():
    assert marginal_kl(gaussian(scales=(1.0, 1.0)), SCHEDULE).abs().max() < 1e-20


def test_estimators_agree_where_the_data_is_dense():
    x, times = gaussian(600), [150, 300, 600, 900]
    known = marginal_kl(x, SCHEDULE, times=times)
    exact = marginal_kl(x, SCHEDULE, estimator="exact", times=times, generator=generator(1))
    torch.testing.assert_close(exact, known, rtol=0.12, atol=0)
    times = times[:2]  # later the noise of the moments is all that is left
    fitted = marginal_kl(x, SCHEDULE, space=lambda y: y, times=times, generator=generator(1))
    torch.testing.assert_close(fitted, known[:2], rtol=0.12, atol=0)
    turned = marginal_kl(x, SCHEDULE, space=lambda y: y @ torch.ones(2, 2).triu().to(y), times=times, generator=generator(1))
    torch.testing.assert_close(turned, fitted)  # a divergence does not depend on the coordinates


def test_of_two_points_the_mixture_is_exact():
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(200)[:, None]
    quantiles = torch.special.ndtri((torch.arange(200, dtype=torch.float64) + 0.5) / 200).repeat(2)[:, None]
    times, grid = [50, 120, 200], torch.linspace(-9, 9, 4001, dtype=torch.float64)
    found = marginal_kl(x, SCHEDULE, estimator="exact", times=times, noise=quantiles)
    for t, kl in zip(times, found, strict=True):
        p, q = (
            sum(torch.distributions.Normal(s * a.sqrt(), (1 - a).sqrt()).log_prob(grid).exp() / 2 for s in (-1, 1))
            for a in SCHEDULE.abar[[t - 1, t]]
        )
        exact = torch.trapezoid(torch.where(p > 1e-300, p * (p / q).log(), 0), grid)
        assert kl.item() == pytest.approx(exact.item(), rel=0.1)
    drawn = [marginal_kl(x, SCHEDULE, estimator="exact", times=times, generator=generator(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_axes_that_samples_do_not_span_have_no_variance(monkeypatch):
    x = torch.randn(5, 12, generator=generator(), dtype=torch.float64) + 3
    variances, mean = principal_variances(x)
    assert variances.sum().item() == pytest.approx(x.var(0).sum().item())
    assert variances[4:].abs().max() < 1e-20
    assert mean.norm().item() == pytest.approx(x.mean(0).norm().item())
    whole = marginal_kl(x, SCHEDULE), linear_denoising_loss(variances, SCHEDULE)
    monkeypatch.setattr(denoising_tasks, "_rows", lambda _: 7)
    torch.testing.assert_close((marginal_kl(x, SCHEDULE), linear_denoising_loss(variances, SCHEDULE)), whole)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_no_linear_denoiser_is_better(predict):
    x = gaussian(20_000, scales=(0.5, 0.2))
    variances = principal_variances(x)[0]
    loss = linear_denoising_loss(variances, SCHEDULE, predict=predict)
    abar, power = SCHEDULE.abar[300], torch.tensor([0.25, 0.04], dtype=torch.float64)
    signal = abar.sqrt() * power / (abar * power + 1 - abar)  # Wiener's guess of x0 is signal * x_t
    slope = {
        "x0": signal, "eps": (1 - abar.sqrt() * signal) / (1 - abar).sqrt(), "v": (abar.sqrt() - signal) / (1 - abar).sqrt()
    }  # fmt: skip
    noise, t = torch.randn(x.shape, generator=generator(2), dtype=torch.float64), torch.full((len(x),), 300)
    for factor, better in ((1.0, True), (0.6, False), (1.4, False)):
        found = denoising_loss(lambda y, _, f=factor: f * slope[predict] * y, x, t, noise, SCHEDULE, predict=predict).item()
        assert (found == pytest.approx(loss[300].item(), rel=0.02)) == better
        assert found > 0.98 * loss[300].item()
    assert linear_denoising_loss(torch.zeros(3), SCHEDULE).abs().max() == 0


def test_no_linear_denoiser_is_better_in_edms_units():
    x, sigma, power = gaussian(20_000, scales=(0.5, 0.2)), 0.8, torch.tensor([0.25, 0.04], dtype=torch.float64)
    schedule = Schedule.from_sigmas(torch.tensor([0.1, sigma, 4.0]))
    known = linear_denoising_loss(principal_variances(x)[0], schedule, predict="edm", sigma_data=0.3)[1].item()
    noise, levels = torch.randn(x.shape, generator=generator(2), dtype=torch.float64), torch.full((len(x),), sigma).double()
    skip, out, inside, _ = EDMPrecond(torch.nn.Identity(), sigma_data=0.3).coefficients(levels[0])
    for factor, better in ((1.0, True), (0.6, False), (1.4, False)):
        wiener = factor * power / (power + sigma**2)
        net = EDMPrecond(lambda y, _, w=wiener: (w - skip) / out * y / inside, sigma_data=0.3)
        found = edm_loss(net, x, levels, noise).item()
        assert (found == pytest.approx(known, rel=0.01)) == better
        assert found > 0.99 * known


@pytest.mark.parametrize(
    ("over", "error", "told"),
    [
        ({"estimator": "kde"}, BadSetting, "no estimator 'kde'"),
        ({"estimator": "exact", "space": lambda y: y}, BadSetting, "leave out space"),
        ({"times": [0]}, BadSetting, "times are 1 to 999"),
        ({"data": torch.zeros(1, 2)}, BadData, "2 samples"),
        ({"space": lambda y: y.repeat(1, 30), "times": [5]}, BadData, "50 samples have no full covariance of 60"),
        ({"space": lambda y: y[:, :1].repeat(1, 2), "times": [5]}, BadData, "direction without variance"),
    ],
)
def test_what_cannot_be_estimated_is_refused(over, error, told):
    settings = {"data": gaussian(50), "schedule": SCHEDULE, "generator": generator(), **over}
    with pytest.raises(error, match=told):
        marginal_kl(**settings)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(BadSetting, match="denoising loss of 'score'"):
        linear_denoising_loss(torch.ones(2), SCHEDULE, predict="score")
    assert math.isclose(linear_denoising_loss(torch.ones(2), SCHEDULE)[0].item(), SCHEDULE.abar[0].item())
