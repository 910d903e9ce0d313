import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.nn import ConvEncoder


def test_the_small_network_halves_twice_and_doubles_its_width():
    encoder = ConvEncoder("small", 1, dim=32, depth=2)
    x = torch.rand(2, 1, 16, 24)
    assert encoder(x).shape == (2, 32, 4, 6)
    assert (encoder.dim, encoder.stride) == (32, 4)
    torch.testing.assert_close(encoder.features(x), encoder(x).mean((2, 3)))
    assert [m.weight.shape[0] for m in encoder.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)] == [
        8, *(8,) * 4, *(16,) * 4, *(32,) * 4,
    ]  # fmt: skip


def test_a_sample_does_not_depend_on_its_batch():
    encoder, x = ConvEncoder("small", 3).train(), torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_networks_without_a_feature_map_are_refused(name):
    with pytest.raises(BadSetting, match=f"{name} makes no feature map"):
        ConvEncoder(name)


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("convnext_atto", 320), ("mobilenetv3_small_050", 1024)])
def test_networks_of_timm(name, dim):
    encoder = ConvEncoder(name, 1).eval()
    z = encoder(torch.rand(1, 1, 64, 32))
    assert z.shape == (1, dim, 2, 1)
    assert (encoder.dim, encoder.stride) == (dim, 32)


def test_settings_build_it_again():
    encoder = ConvEncoder("small", 1, dim=32)
    again = ConvEncoder(**encoder.settings)
    again.load_state_dict(encoder.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(x), encoder(x))


def test_what_cannot_be_is_refused():
    with pytest.raises(BadSetting, match="multiple of 16"):
        ConvEncoder("small", 1, dim=24)
    with pytest.raises(BadSetting, match="resnet50"):
        ConvEncoder("resnet5O")
    with pytest.raises(BadData, match="3 channels"):
        ConvEncoder("small", 1)(torch.rand(1, 3, 8, 8))
    with pytest.raises(BadData, match="stride 4"):
        ConvEncoder("small", 1)(torch.rand(1, 1, 8, 10))
