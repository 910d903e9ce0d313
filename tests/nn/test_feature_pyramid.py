import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.nn import FeaturePyramid, PyramidBackbone


def test_the_pyramid_adds_what_is_above():
    torch.manual_seed(0)
    pyramid = FeaturePyramid((2, 3), dim=4, out=4)
    maps = [torch.rand(1, 2, 6, 8), torch.rand(1, 3, 3, 4)]
    fine, coarse = (lateral(x) for lateral, x in zip(pyramid.laterals, maps, strict=True))
    up = torch.nn.functional.interpolate(coarse, (6, 8), mode="bilinear")
    torch.testing.assert_close(pyramid(maps)[:, :4], pyramid.blocks[0](fine + up))
    moved = pyramid([maps[0], maps[1] + 1])
    assert not torch.equal(moved[:, :4], pyramid(maps)[:, :4])


@pytest.mark.parametrize(("name", "stride"), [("convnext_tiny", 8), ("resnet34", 4)])
def test_backbones(name, stride):
    backbone = PyramidBackbone(name, 4).eval()
    assert (backbone.stride, backbone.out_channels) == (stride, 512)
    with torch.no_grad():
        features = backbone(torch.rand(1, 4, 64, 96))
    assert features.shape == (1, 512, 64 // stride, 96 // stride)


def test_the_taps_of_convnext_are_strides_8_16_32_32():
    backbone = PyramidBackbone("convnext_tiny")
    with torch.no_grad():
        maps = backbone._stages(torch.rand(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(192, 8, 8), (384, 4, 4), (768, 2, 2), (768, 2, 2)]


def test_unknown_backbones_and_weights():
    with pytest.raises(BadSetting, match="convnext_base"):
        PyramidBackbone("vgg")
    with pytest.raises(BadSetting, match="pretrained=false"):
        PyramidBackbone("conv", pretrained=True)
