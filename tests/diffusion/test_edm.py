"""EDM's scalings, its loss and its tables of levels: identities of Karras et al. 2022, table 1, and what follows from them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.diffusion import (
    EDMPrecond,
    Schedule,
    as_denoiser,
    beta_schedule,
    edm_loss,
    edm_sigmas,
    lognormal_sigma,
    sample_heun,
)
from sfumato.errors import BadSetting

SIGMAS = torch.logspace(-3, 2, 11, dtype=torch.float64)


def drawn(*shape, seed=0, std=1.0):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 0.9])
def test_inputs_and_targets_have_unit_variance_at_every_level(sigma_data):
    seen = []
    net = EDMPrecond(lambda x, c_noise: seen.append((x, c_noise)) or x, sigma_data=sigma_data)
    x0, noise = drawn(200_000, 1, std=sigma_data), drawn(200_000, 1, seed=1)
    for sigma in SIGMAS:
        net.network(x0 + sigma * noise, sigma)
        inputs, told = seen[-1]
        assert inputs.var().item() == pytest.approx(1, rel=0.02)
        assert net.target(x0, sigma, noise).var().item() == pytest.approx(1, rel=0.02)
        assert torch.equal(told, (sigma.log() / 4).expand(len(x0)))


def test_the_target_is_what_makes_the_denoised_clean():
    x0, noise, sigma = drawn(11, 2, 3, 3), drawn(11, 2, 3, 3, seed=1), SIGMAS
    net = EDMPrecond(nn.Identity(), sigma_data=0.7)
    skip, out, _, _ = (c[:, None, None, None] for c in net.coefficients(sigma))
    noisy = x0 + sigma[:, None, None, None] * noise
    torch.testing.assert_close(net.target(x0, sigma, noise), (x0 - skip * noisy) / out, rtol=1e-8, atol=1e-8)
    knowing = EDMPrecond(lambda x, c_noise: net.target(x0, sigma, noise), sigma_data=0.7)
    torch.testing.assert_close(knowing(noisy, sigma), x0)
    assert edm_loss(knowing, x0, sigma, noise) == 0


def test_the_loss_is_the_weighted_error_of_the_denoised():
    torch.manual_seed(0)
    net = EDMPrecond(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2))).double(), sigma_data=0.4)
    net.model.forward = lambda x, c_noise, inner=net.model.forward: inner(x)
    x0, noise = drawn(11, 1, 2, 2), drawn(11, 1, 2, 2, seed=1)
    noisy = x0 + SIGMAS[:, None, None, None] * noise
    weighted = net.weight(SIGMAS) * (net(noisy, SIGMAS) - x0).square().flatten(1).mean(1)
    each = edm_loss(net, x0, SIGMAS, noise, reduction="none")
    torch.testing.assert_close(each, weighted, rtol=1e-7, atol=0)
    torch.testing.assert_close(edm_loss(net, x0, SIGMAS, noise), each.mean())
    torch.testing.assert_close(net.weight(SIGMAS) * net.coefficients(SIGMAS)[1].square(), torch.ones_like(SIGMAS))


def test_without_noise_the_picture_stays_and_without_signal_the_network_is_all():
    net, x = EDMPrecond(lambda x, c_noise: torch.ones_like(x)), drawn(3, 5)
    torch.testing.assert_close(net(x, torch.tensor(1e-9)), x)
    torch.testing.assert_close(net(1e6 * x, torch.tensor(1e6)), torch.full_like(x, 0.5), rtol=0, atol=1e-5)


def test_gradients():
    net = EDMPrecond(lambda x, c_noise: x.sin() * (1 + c_noise[:, None]))
    x, noise, sigma = drawn(3, 2).requires_grad_(), drawn(3, 2, seed=1), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(net, (x, sigma.clone().requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: edm_loss(net, x, sigma, noise), (x,))


def test_of_normal_data_the_best_network_answers_nothing_and_samples_are_the_data():
    net = EDMPrecond(lambda x, c_noise: 0 * x)
    x0, sigma = drawn(50_000, 1, std=0.5), lognormal_sigma(50_000, generator=torch.Generator().manual_seed(2))
    best = edm_loss(net, x0, sigma, drawn(50_000, 1, seed=1)).item()
    assert best == pytest.approx(1, rel=0.02)
    other = EDMPrecond(lambda x, c_noise: 0.1 * x)
    assert edm_loss(other, x0, sigma, drawn(50_000, 1, seed=1)).item() == pytest.approx(best + 0.01, rel=0.005)
    samples = sample_heun(net, 80 * drawn(5000, 1, seed=3), edm_sigmas(60))
    assert samples.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_network_of_diffusers_is_asked_for_its_sample():
    plain, wrapped = EDMPrecond(lambda x, t: x), EDMPrecond(lambda x, t: SimpleNamespace(sample=x))
    assert torch.equal(plain(drawn(2, 3), SIGMAS[:2]), wrapped(drawn(2, 3), SIGMAS[:2]))
    with pytest.raises(BadSetting, match="sigma_data=0"):
        EDMPrecond(nn.Identity(), sigma_data=0.0)


def test_a_schedule_from_levels():
    known = Schedule(beta_schedule("cosine"))
    torch.testing.assert_close(Schedule.from_sigmas(known.sigma).betas, known.betas, rtol=1e-8, atol=1e-12)
    levels = edm_sigmas(40)[:-1].flip(0)
    schedule = Schedule.from_sigmas(levels)
    torch.testing.assert_close(schedule.sigma, levels, rtol=1e-9, atol=0)
    asked = []
    answer = as_denoiser(lambda x, sigma: asked.append(sigma) or x, schedule, predict="D", face="x0")
    answer(torch.ones(2, 3, dtype=torch.float64), 7)
    assert asked[0].tolist() == pytest.approx([float(levels[7])] * 2)
    for wrong in (levels.flip(0), torch.tensor([0.0, 1.0]), torch.ones(2, 2)):
        with pytest.raises(BadSetting, match="positive numbers that do not fall"):
            Schedule.from_sigmas(wrong)


def test_scalings_are_those_of_diffusers():
    from diffusers import EDMEulerScheduler

    theirs, ours = EDMEulerScheduler(sigma_data=0.5), EDMPrecond(lambda x, c_noise: (3 * x).tanh() + c_noise[:, None])
    x = drawn(4, 3)
    for sigma in SIGMAS:
        answer = ours.model(theirs.precondition_inputs(x, sigma), theirs.precondition_noise(sigma).expand(4))
        torch.testing.assert_close(ours(x, sigma), theirs.precondition_outputs(x, answer, sigma), rtol=1e-6, atol=1e-9)
