import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.diffusion import (
    Schedule,
    beta_schedule,
    convert,
    ddim_coefficients,
    fake_score_loss,
    noise_kl,
    sample_ddim,
    shared_encoder_sample,
    vsd_loss,
)
from sfumato.errors import BadData, BadSetting, Diverged
from sfumato.nn import small_unet, unet_decode, unet_embed, unet_encode

FILE = Path(__file__).parents[1] / "vectors" / "time-independent-encoder.npz"
V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(FILE).items()}
ABAR = V["alphas_cumprod"]
STORED = Schedule(1 - ABAR / torch.cat([ABAR.new_ones(1), ABAR[:-1]]))
LINEAR = Schedule(beta_schedule())


def _net(**over):
    torch.manual_seed(0)
    return small_unet(8, 2, width=8, mults=(1, 2), **over).double().eval()


def _text_net():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip
    return net.double().eval()


def _noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NETS = {
    "plain": (_net, None),
    "classes": (lambda: _net(classes=5), torch.tensor([1, 4, 0])),
    "text": (_text_net, _noise(3, 6, 12, seed=1)),
}


@pytest.mark.parametrize("kind", NETS)
def test_decoders_at_once_give_what_they_give_one_by_one_with_the_first_times_skips(kind):
    build, cond = NETS[kind]
    net, z, times = build(), _noise(3, 2, 8, 8), (751, 501, 251, 1)
    with torch.no_grad():
        at_once = shared_encoder_sample(net, z, cond, LINEAR, times=times)
        in_turn = shared_encoder_sample(net, z, cond, LINEAR, times=times, parallel=False)
        assert torch.allclose(at_once.x0, in_turn.x0, atol=1e-10)
        h, skips, _ = unet_encode(net, z, torch.tensor(times[0]), cond=cond)
        for k, t in enumerate(times):
            e = unet_embed(net, torch.full((3,), t), cond=cond, dtype=z.dtype)
            assert torch.allclose(unet_decode(net, h, skips, e, cond=cond), at_once.eps[k], atol=1e-10)
    a, b = ddim_coefficients(LINEAR, times)
    assert torch.allclose(at_once.x0, a * z + torch.einsum("k,kb...->b...", b, at_once.eps), atol=1e-9)


def test_the_linear_map_is_diffusers_loop():
    eps = V["eps_stack"].unflatten(0, (4, 2))
    a, b = ddim_coefficients(STORED, V["timesteps"], end=0)
    assert torch.allclose(a * V["z"] + torch.einsum("k,kb...->b...", b, eps), V["z0"], atol=1e-6)
    a, b = ddim_coefficients(LINEAR, [500])
    guess = convert(eps[0], V["z"], 500, LINEAR, source="eps", target="x0")
    assert torch.allclose(a * V["z"] + b * eps[0], guess)


def test_a_scheduler_of_diffusers_brings_its_times_and_its_last_step():
    from diffusers import DDIMScheduler

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDIMScheduler(steps_offset=1, set_alpha_to_one=False, **settings)
    net, z = _net(), _noise(2, 2, 8, 8)
    with torch.no_grad():
        found = shared_encoder_sample(net, z, None, scheduler, steps=4)
    assert scheduler.num_inference_steps is None
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]
    x = z
    for t, eps in zip(scheduler.timesteps, found.eps, strict=True):
        x = scheduler.step(eps, t, x).prev_sample
    assert torch.allclose(found.x0, x, atol=1e-5)


@pytest.mark.parametrize("predict", ["eps", "v", "x0"])
def test_one_decoder_is_one_step(predict):
    net, z = _net(), _noise(2, 2, 8, 8)
    with torch.no_grad():
        found = shared_encoder_sample(net, z, None, LINEAR, times=[600], predict=predict)
        out = net(z, torch.full((2,), 600)).sample
    assert torch.allclose(found.x0, convert(out, z, 600, LINEAR, source=predict, target="x0"))
    assert torch.allclose(found.eps[0], convert(out, z, 600, LINEAR, source=predict, target="eps"))


def test_a_decoder_that_ignores_its_skips_and_middle_makes_it_the_ordinary_loop():
    """Nothing but the time reaches the output: then a shared encoder shares nothing that matters."""
    net, z = _net(), _noise(2, 2, 8, 8)

    def ordinary(x, t):
        h, skips, _ = unet_encode(net, torch.zeros_like(x), torch.zeros_like(t))
        return unet_decode(net, h, skips, unet_embed(net, t))

    with torch.no_grad():
        net.conv_in.weight.zero_()
        for block in (*net.down_blocks, net.mid_block):
            for resnet in block.resnets:
                resnet.time_emb_proj.weight.zero_()
        slow = sample_ddim(ordinary, z, LINEAR, steps=4)
        assert torch.allclose(shared_encoder_sample(net, z, None, LINEAR).x0, slow, atol=1e-8)


def test_gradients_reach_both_halves_and_numbers_that_are_none_are_told():
    net, z = _net(), _noise(2, 2, 8, 8)
    drawn = shared_encoder_sample(net, z, None, LINEAR)
    (drawn.x0.square().mean() + noise_kl(drawn.eps.flatten(0, 1))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    z[1] = torch.nan
    with torch.no_grad(), pytest.raises(Diverged, match="1 of 2 samples"):
        shared_encoder_sample(net, z, None, LINEAR)


def test_what_it_refuses():
    net, z = _net(), _noise(1, 2, 8, 8)
    for times in ([1, 751], [500, 500], [1000, 1], [-1], []):
        with pytest.raises(BadSetting, match="must fall within 999 to 0"):
            shared_encoder_sample(net, z, None, LINEAR, times=times)
        with pytest.raises(BadSetting, match="must fall"):
            ddim_coefficients(LINEAR, times)
    with pytest.raises(BadSetting, match="needs a condition"):
        shared_encoder_sample(_text_net(), z, None, LINEAR)


# Losses


def test_kl_of_noise_maps():
    assert torch.allclose(V["lambda_kl"] * noise_kl(V["eps_stack"]), V["kl"], atol=1e-6)
    map_ = torch.tensor([[-1.0, 1.0]]) / 2**0.5  # mean 0, unbiased variance 1
    assert noise_kl(map_).abs() < 1e-7
    assert noise_kl(map_ + 0.1).item() == pytest.approx(0.1**2 / 2, rel=1e-4)
    assert noise_kl(2 * map_).item() == pytest.approx((4 - 1 - math.log(4)) / 2, rel=1e-5)
    n = 200
    values = noise_kl(_noise(4000, n), reduction="none")
    assert values.mean().item() == pytest.approx(1 / n, rel=0.1)
    assert noise_kl(map_.half(), reduction="none").dtype == torch.float32
    assert torch.autograd.gradcheck(noise_kl, (_noise(2, 5).requires_grad_(),))
    with pytest.raises(BadData, match="first dimension counts maps"):
        noise_kl(torch.zeros(3, 1))


def test_its_gradient_leads_a_map_to_mean_0_and_variance_1():
    eps = (3 * _noise(1, 64) + 2).requires_grad_()
    optimizer = torch.optim.Adam([eps], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        noise_kl(eps).backward()
        optimizer.step()
    assert eps.mean().item() == pytest.approx(0, abs=1e-2)
    assert eps.var().item() == pytest.approx(1, abs=1e-2)


def test_vsd_follows_the_reference():
    x0, noise = V["z0"].clone().requires_grad_(), torch.zeros_like(V["z0"])
    loss = vsd_loss(x0, lambda x, t: V["teacher_eps"], lambda x, t: V["lora_eps"], STORED, V["vsd_t"], noise)
    loss.backward()
    assert torch.allclose(loss, V["vsd_loss"], atol=1e-6)
    assert torch.allclose(x0.grad, V["vsd_grad"], atol=1e-9)
    assert torch.allclose(x0.grad * x0.numel(), V["score_gradient"], atol=1e-6)


def test_vsd_is_still_where_the_student_draws_what_the_teacher_would_and_where_scores_are_no_numbers():
    net, x0 = _net(), _noise(2, 2, 8, 8).requires_grad_()
    t, noise = torch.tensor([100, 800]), _noise(2, 2, 8, 8, seed=1)
    loss = vsd_loss(x0, net, net, LINEAR, t, noise)
    loss.backward()
    assert loss == 0 == x0.grad.abs().sum()
    assert all(p.grad is None for p in net.parameters())
    broken = vsd_loss(x0, lambda x, t: torch.full_like(x, torch.nan), net, LINEAR, t, noise)
    assert broken == 0


def _normal(mean, var, predict="eps"):
    """What a network knows that has learned all of N(mean, var)."""

    def model(x, t):
        abar = LINEAR.abar[t].view(-1, 1)
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * var + 1 - abar)
        return convert(eps, x, t, LINEAR, source="eps", target=predict)

    return model


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("t", [20, 300, 900])
def test_vsd_is_the_gradient_of_the_divergence_between_noisy_gaussians(predict, t):
    """Of KL(student || teacher) at time t, times (1 - abar)^(3/2) / abar^(1/2): known in closed form where both are normal."""
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 1.2))
    u, noise = (torch.tensor(v, dtype=torch.float64)[:, None] for v in ([1, 1, -1, -1], [1, -1, 1, -1]))  # exact to 2nd moments
    teacher, fake = _normal(1.0, 0.25, predict), _normal(0.3, 1.2**2, predict)
    vsd_loss(mean + std * u, teacher, fake, LINEAR, torch.full((4,), t), noise, predict=predict).backward()
    abar = LINEAR.abar[t]
    here, there = abar * std**2 + 1 - abar, abar * 0.25 + 1 - abar
    kl = ((there / here).log() + (here + abar * (mean - 1) ** 2) / there - 1) / 2
    wanted = torch.stack(torch.autograd.grad(kl, (mean, std))) * (1 - abar) ** 1.5 / abar.sqrt()
    assert torch.allclose(torch.stack((mean.grad, std.grad)), wanted, rtol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_student_and_a_fake_score_that_learn_in_turn_end_where_the_teacher_draws(weighted):
    """Both linear, which is all that a Gaussian needs: the student begins as N(-1, 1), the teacher's data is N(1, 1/4)."""
    t, g = torch.full((256,), 300), torch.Generator().manual_seed(0)
    student = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
    score = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizers = torch.optim.Adam([student], 0.01), torch.optim.Adam([score], 0.05)

    def fake(x, t):
        return score[0] + score[1] * x

    for _ in range(600):
        z, *noises = (torch.randn(256, 1, generator=g, dtype=torch.float64) for _ in range(3))
        x0 = student[0] + student[1] * z
        losses = (
            vsd_loss(x0, _normal(1.0, 0.25), fake, LINEAR, t, noises[0]),
            fake_score_loss(x0, fake, LINEAR, t, noises[1], weighted=weighted),
        )
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert student[0].item() == pytest.approx(1, abs=0.1)
    assert abs(student[1].item()) == pytest.approx(0.5, abs=0.1)


def test_guidance_is_of_both_networks_in_one_batch():
    net, cond, null = _text_net(), _noise(2, 6, 12), _noise(1, 6, 12, seed=2)
    t, noise, x0 = torch.tensor([100, 800]), _noise(2, 2, 8, 8), _noise(2, 2, 8, 8, seed=1)
    x_t = LINEAR.q_sample(x0, t, noise)

    def nothing(x, t, cond):
        return torch.zeros_like(x)

    with torch.no_grad():
        given, without = net(x_t, t, cond).sample, net(x_t, t, null.expand(2, -1, -1)).sample
    for settings, wanted in (
        ({}, given),
        ({"null": null, "guidance": 1.0}, given),
        ({"null": null}, without + 4.5 * (given - without)),
    ):
        g = (1 - LINEAR.abar[t]).view(-1, 1, 1, 1) * wanted
        found = vsd_loss(x0, net, nothing, LINEAR, t, noise, cond=cond, **settings)
        assert torch.allclose(found, g.square().mean() / 2)
    with pytest.raises(BadSetting, match="give cond too"):
        vsd_loss(x0, net, nothing, LINEAR, t, noise, null=null)


def test_the_fake_score_learns_the_pictures_noise_weighted_by_their_signal():
    t, noise, x0 = torch.tensor([100, 800]), _noise(2, 2, 8, 8), _noise(2, 2, 8, 8, seed=1).requires_grad_()
    net = _net()
    loss = fake_score_loss(x0, net, LINEAR, t, noise)
    with torch.no_grad():
        eps = net(LINEAR.q_sample(x0, t, noise), t).sample
        signal = LINEAR.abar[t].sqrt().view(-1, 1, 1, 1)
    assert torch.allclose(loss, (signal * (eps - noise)).square().mean())
    loss.backward()
    assert x0.grad is None
    assert net.conv_out.weight.grad.abs().sum() > 0
    assert torch.allclose(fake_score_loss(x0, net, LINEAR, t, noise, weighted=False), (eps - noise).square().mean())
    assert fake_score_loss(x0, lambda x, t: noise, LINEAR, t, noise) == 0


def test_a_share_of_the_conditions_is_dropped_for_the_fake_score():
    cond, null, seen = torch.ones(1000, 2), torch.zeros(1, 2), []

    def net(x, t, cond):
        seen.append(cond)
        return x

    t, x0 = torch.zeros(1000, dtype=torch.long), torch.zeros(1000, 1)
    for _ in range(2):
        fake_score_loss(x0, net, LINEAR, t, x0, cond=cond, null=null, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])
    assert 0.87 < seen[0].mean() < 0.93
