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


@pytest.mark.parametrize(
    ("size", "over", "match"), [(9, {}, "size=9"), (8, {"width": 9}, "width=9"), (8, {"attn_at": (5,)}, "attn_at")]
)
def test_bad_settings_are_refused(size, over, match):
    with pytest.raises(BadSetting, match=match):
        small_unet(size, 1, **{"mults": (1, 2), **over})
