import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel

from sfumato.diffusion import Schedule, beta_schedule, sample_ddim
from sfumato.errors import BadSetting
from sfumato.nn import small_unet
from sfumato.sparsity import MaskedUNet, RewardedUNet, optimise_masks, rewarded_model


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def free():
    torch.manual_seed(0)
    return MaskedUNet(small_unet(8, 1, width=8, mults=(1, 2), attn_at=(0, 1)).eval(), by="free")


def test_masks_are_moved_towards_the_reward_and_put_back(free):
    x, t = torch.randn(2, 1, 8, 8, generator=_seeded()), torch.full((2,), 500)
    worth, before = [], [p.clone() for p in free.mask_parameters()]

    def reward(pictures):
        worth.append(float(pictures.mean()))
        return pictures.mean((1, 2, 3))

    def step():
        out = free(x, t, generator=_seeded(7)).sample
        return out, out

    last = optimise_masks(step, free, reward, iters=12, lr=0.3)
    assert not last.requires_grad
    assert float(last.mean()) > worth[0]
    assert len(worth) == 11
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(free.mask_parameters(), before, strict=True))
    assert torch.allclose(optimise_masks(step, free, reward, iters=1), step()[0], atol=1e-5)


def test_early_steps_take_one_call_and_late_ones_several(free):
    schedule, calls = Schedule(beta_schedule("linear")), []
    hook = free.unet.register_forward_hook(lambda *_: calls.append(1))
    model = rewarded_model(free, lambda x: x.mean((1, 2, 3)), schedule, iters=4, early=3, generator=_seeded())
    x = sample_ddim(model, torch.randn(2, 1, 8, 8, generator=_seeded()), schedule, steps=5)
    hook.remove()
    assert len(calls) == 3 + 2 * 4
    assert x.isfinite().all()


class Guided(DiffusionPipeline):
    """Latent diffusion with classifier-free guidance, as pipelines of diffusers call their parts; states stand for a text."""

    def __init__(self, vae, unet, scheduler):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, states, steps, guidance_scale=3.0):
        self.scheduler.set_timesteps(steps, device=self.unet.device)
        side, guided = self.unet.config.sample_size, guidance_scale > 1
        x = torch.randn(len(states), self.unet.config.in_channels, side, side, generator=_seeded(), dtype=self.unet.dtype)
        x = x * self.scheduler.init_noise_sigma
        told = torch.cat([torch.zeros_like(states), states]) if guided else states
        for t in self.scheduler.timesteps:
            seen = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            eps = self.unet(seen, t, encoder_hidden_states=told, return_dict=False)[0]
            if guided:
                without, with_it = eps.chunk(2)
                eps = without + guidance_scale * (with_it - without)
            x = self.scheduler.step(eps, t, x, return_dict=False)[0]
        return self.vae.decode(x / self.vae.config.scaling_factor).sample / 2 + 0.5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Saved and loaded, as one's own pipeline would be."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    Guided(vae, unet, DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)).save_pretrained(folder)
    return Guided.from_pretrained(folder)


@pytest.fixture
def pipeline(loaded):
    return copy.deepcopy(loaded)


STATES = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))


def _brightness(pictures):
    return pictures.mean((1, 2, 3))


@pytest.mark.parametrize("by", ["free", "sample"])
def test_a_gated_unet_takes_its_place_in_a_pipeline(pipeline, by):
    plain = pipeline(STATES, 3)
    pipeline.unet = MaskedUNet(pipeline.unet, by=by, logit=50.0)
    assert torch.allclose(pipeline(STATES, 3), plain, atol=1e-5)
    assert pipeline.unet.dtype == torch.float32
    assert pipeline.unet.device == torch.device("cpu")
    assert copy.deepcopy(pipeline.unet).config.in_channels == 4
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        pipeline.unet.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("guidance", [3.0, None])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_pipeline_is_moved_towards_a_reward(pipeline, kind, guidance):
    """Against the same gates unmoved, and not drawn, so that nothing else differs."""
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    calls, decoded, worth = [], [], {}
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    pipeline.vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    pipeline.unet = MaskedUNet(pipeline.unet, by="free", sample=False)
    for iters in (1, 8):
        pipeline.unet = RewardedUNet.open(pipeline, _brightness, guidance=guidance, iters=iters, early=2, lr=0.3)
        assert isinstance(pipeline.unet.unet, MaskedUNet)
        runs = []
        for _ in range(2):
            calls.clear()
            decoded.clear()
            runs.append(pipeline(STATES, 5, guidance or 1.0))
            assert len(calls) == 2 + 3 * iters  # a second run begins with early steps again
            assert len(decoded) == 3 * (iters - 1) + 1  # for the reward, and at the end
        worth[iters] = float(_brightness(torch.cat(runs)).mean())
    assert worth[8] > worth[1]
    assert all((p == 1).all() for p in pipeline.unet.mask_parameters())


def test_what_the_reward_sees_is_the_guess_of_the_pipeline(pipeline):
    """At the last step of DDIM the guess of the clean latents is what is decoded."""
    pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, "set_alpha_to_one": True})
    seen = []

    def reward(pictures):
        seen.append(pictures.detach())
        return _brightness(pictures)

    masked = MaskedUNet(pipeline.unet, by="free", logit=50.0)  # all weights are kept
    pipeline.unet = masked
    pipeline.unet = RewardedUNet.open(pipeline, reward, guidance=3.0, iters=2, early=0, lr=1e-6)
    pictures = pipeline(STATES, 4)
    assert len(seen) == 4
    assert torch.allclose(seen[-1], pictures, atol=1e-4)


def test_guidance_without_halves_is_refused(pipeline):
    pipeline.unet = RewardedUNet.open(pipeline, _brightness, guidance=3.0)
    with pytest.raises(BadSetting, match="two halves"):
        pipeline(STATES[:1], 2, guidance_scale=1.0)


def test_noise_that_is_put_back_is_no_new_run(free):
    """Samplers with churn go a little way back to noisier times."""
    unet = RewardedUNet(free, _brightness, Schedule(beta_schedule("linear")), iters=2, early=2, generator=_seeded())
    calls = []
    free.unet.register_forward_hook(lambda *_: calls.append(1))
    x, counts = torch.randn(1, 1, 8, 8, generator=_seeded()), []
    for t in (990, 900, 600, 620, 300, 950, 800, 10):
        calls.clear()
        unet(x, torch.tensor(t))
        counts.append(len(calls))
    assert counts == [1, 1, 2, 2, 2, 1, 1, 2]
