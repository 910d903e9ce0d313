import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.nn import small_unet, unet_decode, unet_encode


@pytest.mark.parametrize("attn_at", [(), (1,)])
def test_the_two_halves_make_the_whole(attn_at):
    net = small_unet(8, 1, 2, width=8, mults=(1, 2), attn_at=attn_at, classes=3).eval()
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 700]), torch.tensor([2, 0])
    h, skips, temb = unet_encode(net, x, t, cond=label)
    assert h.shape == (2, 16, 4, 4)
    y = unet_decode(net, h, skips, temb)
    assert y.shape == (2, 2, 8, 8)
    assert torch.allclose(y, net(x, t, class_labels=label).sample, atol=1e-6)
    assert not torch.allclose(unet_decode(net, h + 1, skips, temb), y, atol=1e-3)


def test_the_halves_agree_under_autocast():
    net = small_unet(8, 1, width=8, mults=(1, 2)).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(unet_decode(net, *unet_encode(net, x, t)), net(x, t).sample, atol=1e-6)


def _conditional(**over):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4, **over,
    }  # fmt: skip
    return UNet2DConditionModel(**settings).eval()


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("over", [{}, {"time_embedding_act_fn": "silu", "center_input_sample": True}])
def test_the_halves_of_a_network_that_attends(size, over):
    net = _conditional(**over)
    x, t, text = torch.randn(2, 4, *size), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    h, skips, temb = unet_encode(net, x, t, cond=text)
    y = unet_decode(net, h, skips, temb, cond=text)
    assert torch.allclose(y, net(x, t, encoder_hidden_states=text).sample, atol=1e-6)
    assert not torch.allclose(unet_decode(net, h, skips, temb, cond=0 * text), y, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        halves = unet_decode(net, *unet_encode(net, x, t[:1], cond=text), cond=text)
        assert torch.allclose(halves, net(x, t[:1], encoder_hidden_states=text).sample, atol=1e-6)


def test_one_way_down_serves_many_ways_up():
    """Bottleneck and skips repeated along the batch, with other times."""
    net = _conditional()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    h, skips, early = unet_encode(net, x, torch.tensor(751), cond=text)
    late = unet_encode(net, x, torch.tensor(1), cond=text)[2]
    both = unet_decode(
        net, h.repeat(2, 1, 1, 1), tuple(s.repeat(2, 1, 1, 1) for s in skips), torch.cat([early, late]), cond=text.repeat(2, 1, 1)
    )
    for part, temb in zip(both.chunk(2), (early, late)):
        assert torch.allclose(part, unet_decode(net, h, skips, temb, cond=text), atol=1e-5)


def test_networks_with_more_inputs_are_refused():
    from diffusers import UNet2DModel

    x, t = torch.randn(1, 4, 8, 8), torch.tensor(0)
    with pytest.raises(BadSetting, match="num_class_embeds"):
        unet_encode(_conditional(num_class_embeds=3), x, t, cond=torch.randn(1, 5, 12))
    with pytest.raises(BadSetting, match="give cond"):
        unet_encode(_conditional(), x, t)
    kinds = {"down_block_types": ("SkipDownBlock2D",), "up_block_types": ("SkipUpBlock2D",)}
    net = UNet2DModel(8, 4, 4, block_out_channels=(8,), time_embedding_type="fourier", norm_num_groups=8, **kinds)
    with pytest.raises(BadSetting, match="skip convolutions, fourier"):
        unet_encode(net, x, t)


@pytest.mark.parametrize(
    ("size", "over", "match"), [(9, {}, "size=9"), (8, {"width": 9}, "width=9"), (8, {"attn_at": (5,)}, "attn_at")]
)
def test_bad_settings_are_refused(size, over, match):
    with pytest.raises(BadSetting, match=match):
        small_unet(size, 1, **{"mults": (1, 2), **over})
