from functools import partial

import pytest
import torch

from sfumato.diffusion import (
    Schedule,
    as_denoiser,
    beta_schedule,
    edit_h,
    edm_sigmas,
    h_function,
    input_at,
    record_h,
    sample_ddim,
    sample_heun,
)
from sfumato.errors import BadData, BadSetting
from sfumato.nn import small_unet, unet_decode, unet_encode

SCHEDULE = Schedule(beta_schedule("linear"))
DDIM = partial(sample_ddim, schedule=SCHEDULE, steps=4)


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = small_unet(8, 1, width=8, mults=(1, 2), dropout=0.5)
    with torch.no_grad():  # a fresh output layer is small: an edit should be seen
        net.conv_out.weight.mul_(3)
    return net


@pytest.fixture
def x():
    return torch.randn(5, 1, 8, 8, generator=_seeded())


@pytest.fixture
def delta():
    return torch.randn(4, 16, 4, 4, generator=_seeded(1))


def test_recording_changes_nothing_and_sees_every_call(net, x):
    pictures, hs = record_h(net, DDIM, x)
    assert net.training
    seen = []
    net.eval()
    plain = DDIM(lambda x, t: net(x, t).sample, x, callback=seen.append)
    assert torch.allclose(pictures, plain, atol=1e-5)
    assert hs.shape == (5, 4, 16, 4, 4)
    times = (750, 500, 250, 0)
    for i, (step, t) in enumerate(zip(seen, times, strict=True)):
        h, _, _ = unet_encode(net, step.x_t, torch.tensor(t))
        assert torch.allclose(hs[:, i], h, atol=1e-4)
    net.train()


def test_no_move_is_bit_for_bit_the_same_picture(net, x, delta):
    plain, _ = record_h(net, DDIM, x)
    assert torch.equal(edit_h(net, DDIM, x, delta, scale=0.0), plain)
    assert torch.equal(edit_h(net, DDIM, x, delta, scale=0.0, asymmetric=True), plain)
    assert not torch.allclose(edit_h(net, DDIM, x, delta), plain, atol=1e-3)


def test_a_small_move_is_linear_and_a_return_is_not_the_way_back(x, delta):
    torch.manual_seed(0)
    net = small_unet(8, 1, width=8, mults=(1, 2)).double()
    x, delta = x.double(), delta.double()
    plain, _ = record_h(net, DDIM, x)
    slopes = [(edit_h(net, DDIM, x, delta, scale=s) - plain).norm() / s for s in (0.01, 0.002)]
    assert (slopes[0] / slopes[1]).item() == pytest.approx(1, abs=0.05)
    there, back = (edit_h(net, DDIM, x, delta, scale=s) - plain for s in (3.0, -3.0))
    assert (there + back).norm() > 0.01 * there.norm()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_independent_of_the_batch_size(net, x, delta, asymmetric):
    noise, scale = torch.randn(4, 5, 1, 8, 8, generator=_seeded(2)), torch.linspace(-1, 1, 5)
    each, sampler = torch.stack([delta * i for i in range(5)]), partial(DDIM, eta=1.0)
    a, b = (record_h(net, sampler, (x, noise), batch_size=size) for size in (None, 2))
    assert torch.allclose(a[0], b[0], rtol=1e-4, atol=1e-3)
    assert torch.allclose(a[1], b[1], rtol=1e-4, atol=1e-3)
    a, b = (edit_h(net, sampler, (x, noise), each, scale=scale, asymmetric=asymmetric, batch_size=s) for s in (None, 2))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)


def test_the_edited_guess_goes_one_way_and_the_plain_noise_the_other(net, x, delta):
    """One asymmetric step by hand: x̂_0 from the moved half, ε̂ from the plain one."""
    sampler = partial(sample_ddim, schedule=SCHEDULE, steps=2)
    seen = []
    edit_h(net, partial(sampler, callback=seen.append), x, 5 * delta[:2], asymmetric=True)
    net.eval()
    h, skips, temb = unet_encode(net, x, torch.tensor(500))
    plain, moved = unet_decode(net, h, skips, temb), unet_decode(net, h + 5 * delta[0], skips, temb)
    net.train()
    signal, level = SCHEDULE.abar[500].sqrt().float(), (1 - SCHEDULE.abar[500]).sqrt().float()
    x0 = (x - level * moved) / signal
    assert torch.allclose(seen[0].x0, x0, atol=1e-4)
    follows = SCHEDULE.abar[0].sqrt().float() * x0 + (1 - SCHEDULE.abar[0]).sqrt().float() * plain
    assert torch.allclose(seen[1].x_t, follows, atol=1e-4)
    both = []
    edit_h(net, partial(sampler, callback=both.append), x, 5 * delta[:2])
    assert not torch.allclose(both[1].x_t, follows, atol=1e-3)


def test_any_sampler_will_do(net, x, delta):
    """A loop over a scheduler of diffusers, and Heun's rule, which calls the network twice a step."""
    scheduler = SCHEDULE.to_ddim()
    scheduler.set_timesteps(4)

    def loop(model, x):
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        return x

    for a, b in zip(record_h(net, loop, x), record_h(net, DDIM, x), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
    assert torch.allclose(edit_h(net, loop, x, delta), edit_h(net, DDIM, x, delta), atol=1e-3)
    with pytest.raises(BadSetting, match="direction="):
        edit_h(net, loop, x, delta, asymmetric=True)

    def heun(model, x):
        sigmas = edm_sigmas(3, low=0.01, high=float(SCHEDULE.sigma[-1]))
        return sample_heun(as_denoiser(model, SCHEDULE), sigmas[0].float() * x, sigmas)

    pictures, hs = record_h(net, heun, x)
    assert hs.shape[1] == 5
    assert edit_h(net, heun, x, hs[0]).shape == pictures.shape


def test_classes_and_texts_are_passed_on(x, delta):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    classes = small_unet(8, 1, width=8, mults=(1, 2), classes=3)
    text = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=6, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    for net, cond in ((classes, torch.tensor([0, 1, 2, 0, 1])), (text, torch.randn(5, 2, 6, generator=_seeded(3)))):
        whole, hs = record_h(net, DDIM, x, cond=cond)
        parts, _ = record_h(net, DDIM, x, cond=cond, batch_size=2)
        assert hs.shape == (5, 4, 16, 4, 4)
        assert torch.allclose(whole, parts, atol=1e-4)
        assert torch.equal(edit_h(net, DDIM, x, delta, scale=0.0, cond=cond), whole)
        with pytest.raises(BadData, match="a condition each, not 4"):
            record_h(net, DDIM, x, cond=cond[:4])
        with pytest.raises(BadSetting, match="condition"):
            record_h(net, DDIM, x)


def test_the_output_as_a_function_of_the_bottleneck(net, x):
    net.eval()
    f, h = h_function(net, x, torch.tensor(300))
    assert h.shape == (5, 16, 4, 4)
    assert torch.allclose(f(h), net(x, torch.tensor(300)).sample, atol=1e-6)
    moved = h.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(moved).sum(), moved)
    assert grad.abs().max() > 0
    net.train()


def test_what_the_network_is_given_at_a_step(net, x):
    noise, seen = torch.randn(4, 5, 1, 8, 8, generator=_seeded(2)), []
    sampler = partial(DDIM, eta=1.0)
    record_h(net, partial(sampler, callback=seen.append), (x, noise))
    for step, time in ((0, 750), (2, 250)):
        x_t, t = input_at(net, sampler, (x, noise), step)
        assert torch.equal(x_t, seen[step].x_t)
        assert t.tolist() == [time] * 5
    with pytest.raises(BadSetting, match="step=4: the sampler calls the network 4 times"):
        input_at(net, DDIM, x, 4)


def test_bad_directions_are_refused(net, x, delta):
    for bad, match in (
        (delta[0, 0], r"\[C, h, w\]"),
        (delta[:, :8], r"\[8, 4, 4\] a step, the bottleneck \[16, 4, 4\]"),
        (delta[None].expand(3, -1, -1, -1, -1), "for 3 pictures, there are 5"),
    ):
        with pytest.raises(BadData, match=match):
            edit_h(net, DDIM, x, bad)
    with pytest.raises(BadSetting, match="3 steps, the sampler takes more"):
        edit_h(net, DDIM, x, delta[:3])
    with pytest.raises(BadSetting, match="5 steps, the sampler took 4"):
        edit_h(net, DDIM, x, torch.cat([delta, delta[:1]]))
    with pytest.raises(BadData, match="scale is for 2 pictures"):
        edit_h(net, DDIM, x, delta, scale=torch.ones(2))
    with pytest.raises(BadData, match="noise of the steps"):
        record_h(net, DDIM, (x, torch.zeros(4, 3, 1, 8, 8)))
    with pytest.raises(BadSetting, match="batch_size=0"):
        record_h(net, DDIM, x, batch_size=0)
