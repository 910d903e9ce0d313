from types import SimpleNamespace

import pytest
import torch

from sfumato.diffusion.pipelines import facts_of_pipeline, open_pipeline, unet_of
from sfumato.engine import fit, load
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.nn import small_unet
from sfumato.papers.diffusion.ddpm import DDPM


def _unet(**over):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 24), "layers_per_block": 1}
    return UNet2DModel(**{**sizes, **blocks, "norm_num_groups": 8, **over}).eval()


def _scheduler(**over):
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{"num_train_timesteps": 100, "beta_end": 0.1, "set_alpha_to_one": True, **over})


def _pipeline(**over):
    return SimpleNamespace(**{"unet": _unet(), "scheduler": _scheduler(), **over})


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("predict", ["epsilon", "v_prediction"])
def test_it_draws_what_the_pipelines_own_scheduler_draws(kind, predict):
    scheduler = _scheduler(beta_schedule=kind, prediction_type=predict, clip_sample=True)
    pipeline = _pipeline(scheduler=scheduler)
    method = DDPM.from_pipeline(pipeline)
    method.config = method.config.model_copy(update={"sample_steps": 10})
    drawn = method.sample(3, torch.Generator().manual_seed(1))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            # ours keeps the noise consistent with the clipped guess, as diffusers' other option does
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    assert torch.allclose(drawn, (x / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_from_a_folder_it_learns_on_saves_and_is_loaded(tmp_path):
    from diffusers import DDIMPipeline

    DDIMPipeline(_unet(), _scheduler()).save_pretrained(tmp_path / "pipe")
    method = load(f"diffusers:{tmp_path}/pipe")
    assert torch.equal(method.net.conv_in.weight, _unet().conv_in.weight)
    assert method.bottleneck == (24, 4, 4)
    config = DDPM.Config.small(channels=1, image_size=6, batch_size=4, sample_steps=3)
    tuned = fit(DDPM.init_from(config, method), torch.rand(8, 1, 8, 8), steps=2, progress=False)
    assert not torch.equal(tuned.net.conv_in.weight, method.net.conv_in.weight)
    again = DDPM(DDPM.Config.model_validate(tuned.config.model_dump(mode="json")))
    again.load_state_dict(tuned.state_dict())
    a, b = (m.sample(2, torch.Generator().manual_seed(0)) for m in (tuned, again))
    assert torch.equal(a, b)
    with pytest.raises(BadData, match="3 channels"):
        DDPM.init_from(DDPM.Config.small(channels=3), method)
    with pytest.raises(BadCheckpoint, match=r"model_index\.json"):
        open_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"vae": object()}, "latents"),
        ({"unet": small_unet(8, 1, width=8, mults=(1, 2), classes=3)}, "classes"),
        ({"unet": _unet(out_channels=2)}, "other channels"),
        ({"unet": _unet(sample_size=(8, 16))}, "no squares"),
        ({"unet": SimpleNamespace(config={"in_channels": 4, "out_channels": 4})}, "not a UNet2DModel"),
        ({"scheduler": SimpleNamespace(config={})}, "no table of betas"),
        ({"scheduler": _scheduler(trained_betas=[0.1, 0.02, 0.3])}, "no way that is known"),
        ({"scheduler": _scheduler(rescale_betas_zero_snr=True)}, "no way that is known"),
    ],
)
def test_what_does_not_fit_is_said(over, told):
    with pytest.raises(BadCheckpoint, match=told):
        facts_of_pipeline(_pipeline(**over))


def test_a_wrong_description_of_a_network_is_told():
    with pytest.raises(BadCheckpoint, match="does not describe"):
        unet_of({"block_out_channels": [8, 16], "down_block_types": ["NoBlock"] * 2})
    with pytest.raises(BadSetting, match="knows no classes"):
        DDPM(DDPM.Config.small(unet=facts_of_pipeline(_pipeline())["unet"], conditional=True, classes=2))
