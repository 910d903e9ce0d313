import pytest
import timm
import torch
from torch import nn

from sfumato.errors import BadData, BadSetting
from sfumato.masks import random_mask, upsample_mask
from sfumato.nn import MaskedConvEncoder


def encoder(model="test_resnet", size=64, channels=3, **over):
    torch.manual_seed(0)
    return MaskedConvEncoder(model, size, channels, **over)


def pictures(n=2, channels=3, size=(64, 64), seed=0):
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed))


def hide(e, n=2):
    return random_mask(n, e.grid, 0.5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_unmasked_it_is_timms_network_and_exports_to_it(model, sync):
    ours = encoder(model, channels=1, model_settings={"drop_rate": 0.1}, drop_path=0.2, sync=sync).eval()
    arguments, state = ours.timm_weights()
    assert arguments == {"model_name": model, "in_chans": 1, "num_classes": 0, "drop_rate": 0.1}
    theirs = timm.create_model(**arguments).eval()
    theirs.load_state_dict(state)
    x = pictures(channels=1, size=(64, 96))
    with torch.no_grad():
        last = theirs.forward_features(x)
        torch.testing.assert_close(ours(x)[-1], last)
        torch.testing.assert_close(ours.features(x), last.mean((2, 3)))
    assert not any("Sparse" in type(m).__name__ for m in theirs.modules())


@pytest.mark.parametrize("model", ["test_resnet", "convnet"])
def test_maps_are_zero_in_their_holes_packed_or_not(model):
    e, x = encoder(model).eval(), pictures()
    mask = hide(e)
    for a, b, width, stride in zip(e(x, mask), e(x, mask, packed=False), e.widths, e.strides, strict=True):
        assert a.shape == (2, width, 64 // stride, 64 // stride)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        hidden = upsample_mask(mask, e.grid, a.shape[-1] // e.grid[1])
        assert (a.masked_select(hidden) == 0).all()


def test_its_facts_are_the_networks():
    e = encoder()
    assert (e.patch, e.grid, e.strides) == (32, (2, 2), [4, 8, 16, 32])
    assert e.dim == e.widths[-1] == timm.create_model("test_resnet").num_features
    assert encoder(scales=2).strides == [16, 32]
    small = encoder("convnet", 32, model_settings={"widths": [8, 16], "depth": 2})
    assert (small.patch, small.grid, small.widths) == (4, (8, 8), [8, 16])
    assert (e.batch_norm, encoder("test_convnext").batch_norm) == (True, False)
    assert [type(m.dense) for m in encoder(sync=True).modules() if isinstance(m, nn.SyncBatchNorm)]
    assert not [m for m in e.modules() if isinstance(m, nn.SyncBatchNorm)]


def test_settings_rebuild_the_encoder():
    e = encoder(drop_path=0.1, scales=2, sync=True, sparse=False)
    again = MaskedConvEncoder(**e.settings)
    again.load_state_dict(e.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.eval()(pictures()), e.eval()(pictures()), strict=True))


def small(**over):
    return encoder("small", 16, 1, model_settings={"dim": 32}, sparse=False, **over)


def test_the_small_network_halves_twice_and_doubles_its_width():
    e = encoder("small", 16, 1, model_settings={"dim": 32, "depth": 2}, sparse=False)
    x = pictures(channels=1, size=(16, 24))
    (last,) = e(x)
    assert last.shape == (2, 32, 4, 6)
    assert (e.dim, e.patch, e.grid, e.widths, e.strides, e.batch_norm) == (32, 4, (4, 4), [32], [4], False)
    torch.testing.assert_close(e.features(x), last.mean((2, 3)))
    assert [m.weight.shape[0] for m in e.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)] == [
        8, *(8,) * 4, *(16,) * 4, *(32,) * 4,
    ]  # fmt: skip


def test_a_sample_of_the_small_network_does_not_depend_on_its_batch():
    e, x = small().train(), pictures(4, 1, (16, 16))
    torch.testing.assert_close(e.features(x)[1:2], e.features(x[1:2]), atol=1e-6, rtol=1e-4)


def test_a_network_that_is_not_sparse_takes_no_mask():
    e = small()
    assert not [m for m in e.modules() if hasattr(m, "dense")]
    with pytest.raises(BadSetting, match="no sparse layers"):
        e(pictures(channels=1, size=(16, 16)), hide(e))
    with pytest.raises(BadSetting, match=r"layers.1 is a GroupNorm, which has no sparse form"):
        encoder("small", 16, 1)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s16_224"])
def test_networks_of_one_size_are_refused(model):
    with pytest.raises(BadSetting, match=f"{model} makes no feature map of a picture of any size"):
        encoder(model, 224)


@pytest.mark.parametrize(("model", "dim"), [("convnext_atto", 320), ("mobilenetv3_small_050", 288)])
def test_other_networks_of_timm(model, dim):
    e = encoder(model, 64, 1, scales=1).eval()
    assert [m.shape for m in e(pictures(1, 1, (64, 32)))] == [(1, dim, 2, 1)]
    assert (e.dim, e.patch) == (dim, 32)
    assert e.timm_weights()[1].keys() == timm.create_model(model, in_chans=1, num_classes=0).state_dict().keys()


def test_what_does_not_fit_is_told():
    with pytest.raises(BadSetting, match="dim must be a multiple of 16"):
        encoder("small", 16, model_settings={"dim": 24}, sparse=False)
    with pytest.raises(BadData, match="40 x 64 pixels cannot be cut into patches of 32"):
        encoder()(pictures(size=(40, 64)))
    with pytest.raises(BadSetting, match="there is no model 'resnet5'; did you mean resnet"):
        encoder("resnet5")
    with pytest.raises(BadSetting, match="gives no feature maps"):
        encoder(model_settings={"no_such_thing": 1})
    with pytest.raises(BadSetting, match=r"model_settings=.* do not suit convnet"):
        encoder("convnet", model_settings={"no_such_thing": 1})
    with pytest.raises(BadSetting, match="size=40 is not a multiple of test_resnet's stride, 32"):
        encoder(size=40)
    with pytest.raises(BadSetting, match="--weights writes any"):
        encoder("convnet").timm_weights()
    with pytest.raises(BadData, match="pictures of 1 channels were given, this encoder takes 3"):
        encoder()(pictures(channels=1))
    with pytest.raises(BadData, match="48 x 64 pixels cannot be cut into patches of 32"):
        encoder()(pictures(size=(48, 64)), hide(encoder()))
