from types import SimpleNamespace

import pytest
import torch
from deepinv.physics import Blur, Denoising, DownsamplingMatlab, GaussianNoise, Inpainting, Physics
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, UNet2DConditionModel, UNet2DModel, VQModel

from sfumato.diffusion import DiffusionPrior, Schedule, beta_schedule
from sfumato.diffusion import diffusion_prior as module
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.nn import small_unet


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vae(**over):
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **kinds, **over)


def attending(**over):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=6, **blocks, **sizes, **over)


def scheduler(**over):
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, **over)


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    net = small_unet(8, 1, width=8, mults=(1, 2)).eval()
    return DiffusionPrior(net, Schedule(beta_schedule("linear")), stride=2)


QUICK = {"steps": 2, "inner": 2}


@pytest.mark.parametrize("solver", ["dps", "psld", "stsl"])
def test_any_size_and_any_degradation(prior, solver):
    x = torch.rand(2, 1, 13, 10, generator=seeded())
    mask = (torch.rand(1, 13, 10, generator=seeded(1)) > 0.3).float()
    for physics in (Blur(torch.ones(1, 1, 3, 3) / 9, padding="reflect"), Denoising(), Inpainting((1, 13, 10), mask=mask)):
        out = prior.restore(physics.A(x), physics, solver=solver, **QUICK)
        assert out.shape == x.shape
        assert 0 <= out.min() <= out.max() <= 1
    assert torch.allclose(out * mask, x * mask, atol=1e-6)  # a mask without noise: what is known stays
    loose = prior.restore(physics.A(x), physics, solver=solver, project=False, **QUICK)
    assert not torch.allclose(loose * mask, x * mask, atol=1e-3)
    small = torch.rand(1, 1, 5, 4, generator=seeded())
    assert prior.restore(small, DownsamplingMatlab(factor=2), solver=solver, **QUICK).shape == (1, 1, 10, 8)


def test_the_pull_brings_it_to_the_measurement(prior):
    x = torch.rand(4, 1, 8, 8, generator=seeded())
    physics = Denoising(GaussianNoise(0.0))
    near, free = (prior.restore(x, physics, solver="dps", steps=20, eta=eta) for eta in (3.0, 0.0))
    assert (near - x).square().mean() < 0.5 * (free - x).square().mean()


def test_it_repeats_itself_and_takes_a_generator(prior):
    x, physics = torch.rand(1, 1, 8, 8, generator=seeded()), Denoising()
    assert torch.equal(prior.restore(x, physics, **QUICK), prior.restore(x, physics, **QUICK))
    assert not torch.equal(*(prior.restore(x, physics, generator=seeded(s), **QUICK) for s in (1, 2)))


def test_without_a_physics_it_cannot_and_without_a_transpose_it_can(prior):
    x = torch.rand(1, 1, 8, 8, generator=seeded())
    with pytest.raises(BadSetting, match="physics"):
        prior.restore(x)
    assert prior.restore(x.square(), Physics(A=lambda x, **_: x.square()), **QUICK).shape == x.shape


def test_measurements_of_another_physics_are_refused_in_a_line(prior):
    x, mask = torch.rand(1, 1, 9, 8), torch.ones(1, 8, 8)
    with pytest.raises(BadData, match=r"does not take measurements of shape .1, 1, 9, 8."):
        prior.restore(x, Inpainting((1, 8, 8), mask=mask), **QUICK)
    grey = DiffusionPrior(prior.model, prior.schedule, stride=2, channels=1)
    with pytest.raises(BadData, match="3 channels, and the model was trained on 1"):
        grey.restore(torch.rand(1, 3, 8, 8), Denoising(), **QUICK)
    with pytest.raises(BadSetting, match="one by one"):
        prior.restore(torch.rand(2, 1, 8, 8), Denoising(GaussianNoise(torch.tensor([0.1, 0.2]))), **QUICK)


def test_the_noise_of_the_physics_is_heeded(prior, monkeypatch):
    seen = {}

    def spy(*args, **settings):
        seen.update(settings)
        return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(module, "sample_posterior", spy)
    x, mask = torch.rand(1, 1, 8, 8), torch.ones(1, 8, 8)
    for physics, sigma, project in (
        (Denoising(GaussianNoise(0.25)), 0.25, False),
        (Blur(torch.ones(1, 1, 3, 3) / 9, padding="reflect"), 0.0, False),
        (Inpainting((1, 8, 8), mask=mask), 0.0, True),
        (Inpainting((1, 8, 8), mask=mask, noise_model=GaussianNoise(0.1)), 0.1, False),
    ):
        prior.restore(x, physics)
        assert (seen["sigma"], seen["project"]) == (pytest.approx(sigma), project)


def test_large_pictures_go_in_tiles_with_the_same_gradient(prior, monkeypatch):
    """A network whose output sees two pixels to each side, with and without tiles."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(1, 1, 5, padding=2)
    local = DiffusionPrior(lambda z, t: conv(z).tanh(), prior.schedule)

    def answer():
        z = torch.rand(1, 1, 40, 24, generator=seeded()).requires_grad_()
        out = local._tiled(z, torch.zeros(1, dtype=torch.long))
        return out, torch.autograd.grad(out.square().sum(), z)[0]

    whole = answer()
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "OVERLAP", 4)
    for a, b in zip(whole, answer()):
        assert torch.allclose(a, b, atol=1e-5)
    x = torch.rand(1, 1, 40, 24, generator=seeded())
    assert local.restore(x, Denoising(), **QUICK).shape == x.shape


# pipelines of diffusers


def test_a_pipeline_in_pixels_from_a_folder(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path, safe_serialization=True)
    opened = DiffusionPrior.open(tmp_path)
    x, t = torch.rand(2, 1, 8, 8), torch.tensor([5, 700])
    table = opened.schedule.abar[t].float().view(2, 1, 1, 1)
    eps = table.sqrt() * unet.eval()(x, t).sample + (1 - table).sqrt() * x  # of a velocity
    assert torch.allclose(opened.model(x, t), eps, atol=1e-5)
    assert (opened.stride, opened.channels) == (2, 1)
    assert not any(p.requires_grad for p in opened.parameters())
    assert opened.restore(torch.rand(1, 1, 9, 8), Denoising(), **QUICK).shape == (1, 1, 9, 8)


def test_latent_diffusion_without_and_with_a_condition():
    torch.manual_seed(0)
    x, physics = torch.rand(1, 3, 14, 16, generator=seeded()), Denoising()
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    plain = DiffusionPrior.open(SimpleNamespace(unet=unet, vqvae=vae(scaling_factor=0.5), scheduler=scheduler()))
    assert (plain.stride, plain.channels, plain.codec.scale) == (4, 3, 0.5)
    for solver in ("dps", "psld", "stsl"):
        assert plain.restore(x, physics, solver=solver, **QUICK).shape == x.shape

    pipeline = SimpleNamespace(unet=attending(), vae=vae(), scheduler=scheduler())
    with pytest.raises(BadSetting, match="cond"):
        DiffusionPrior.open(pipeline)
    told = DiffusionPrior.open(pipeline, cond=torch.randn(1, 5, 6, generator=seeded()))
    first = told.restore(x, physics, **QUICK)
    assert first.shape == x.shape
    other = DiffusionPrior.open(pipeline, cond=torch.randn(1, 5, 6, generator=seeded(9)))
    assert not torch.allclose(other.restore(x, physics, **QUICK), first, atol=1e-4)
    asked = []

    def encode_prompt(prompt, device, count, guided):
        asked.append((prompt, count, guided))
        return told.net.cond, None

    empty = DiffusionPrior.open(SimpleNamespace(**vars(pipeline), encode_prompt=encode_prompt))
    assert asked == [("", 1, False)]
    assert torch.equal(empty.restore(x, physics, **QUICK), first)


def test_a_network_that_learned_its_variance():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=6, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    opened = DiffusionPrior.open(SimpleNamespace(unet=unet, scheduler=scheduler()))
    x = torch.rand(1, 3, 8, 8)
    assert torch.allclose(opened.model(x, 3), unet(x, 3).sample[:, :3])


def test_pipelines_of_another_kind_are_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match="no pipeline"):
        DiffusionPrior.open(tmp_path / "nowhere")
    good = {"unet": attending(), "vae": vae(), "scheduler": scheduler()}
    quantised = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    for over, words in (
        ({"vae": quantised}, "AutoencoderKL"),
        ({"unet": small_unet(8, 9, 4, width=8, mults=(1, 2))}, "plain one"),
        ({"scheduler": SimpleNamespace()}, "betas"),
    ):
        with pytest.raises(BadCheckpoint, match=words):
            DiffusionPrior.open(SimpleNamespace(**{**good, **over}), cond=torch.zeros(1, 5, 6))
