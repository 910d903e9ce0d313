import pytest
import torch
from torch import nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn import PlainUNet, tiled_apply


def _bias_free(*widths, **over):
    torch.manual_seed(0)
    return PlainUNet(1, 1, widths, **{"norm": "bias_free", "up": "transposed", **over}).double()


def test_bias_free_it_has_the_size_of_the_paper():
    net = PlainUNet(1, 1, norm="bias_free", up="transposed")
    assert sum(p.numel() for p in net.parameters()) == 7_659_264
    assert not any(name.endswith("bias") for name, _ in net.named_parameters())


@pytest.mark.parametrize("over", [{}, {"up": "bilinear"}, {"up": "nearest", "down": "max"}, {"act": "leaky_relu", "convs": 1}])
def test_bias_free_it_is_homogeneous_in_evaluation(over):
    net, y = _bias_free(4, 8, 12, **over), torch.randn(2, 1, 8, 12, dtype=torch.float64)
    net(y)
    assert not torch.allclose(net(3.7 * y), 3.7 * net(y), rtol=1e-3)  # by statistics of the batch it is of degree 0
    net.eval()
    assert torch.allclose(net(3.7 * y), 3.7 * net(y), rtol=1e-10)
    assert torch.allclose(torch.func.jvp(net, (y,), (y,))[1], net(y), rtol=1e-10)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_with_biases_it_is_not(norm):
    net, y = PlainUNet(2, 3, (4, 8), norm=norm).eval(), torch.randn(2, 2, 8, 8)
    nn.init.ones_(net.encoders[0][0].bias)
    assert net(y).shape == (2, 3, 8, 8)
    assert not torch.allclose(net(2 * y), 2 * net(y), rtol=1e-2)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (4 if norm else 0)


def test_skips_can_be_watched_and_taken_away():
    net, x = _bias_free(4, 8, 12).eval(), torch.randn(1, 1, 8, 8, dtype=torch.float64)
    seen, whole = {}, net(x)
    hooks = [m.register_forward_hook(lambda m, _, out, name=name: seen.update({name: out})) for name, m in net.skips.items()]
    assert torch.equal(net(x), whole)
    assert {name: tuple(h.shape) for name, h in seen.items()} == {"level0": (1, 4, 8, 8), "level1": (1, 8, 4, 4)}
    for hook in hooks:
        hook.remove()
    net.skips["level0"] = nn.Threshold(torch.inf, 0.0)  # nothing passes
    assert not torch.allclose(net(x), whole)


@pytest.mark.parametrize("over", [{}, {"up": "bilinear"}, {"convs": 1}])
def test_reach_is_enough_for_tiles(over):
    net, x = _bias_free(3, 4, 5, **over).eval(), torch.randn(1, 1, 200, 16, dtype=torch.float64)
    overlap = -(-net.reach // net.stride) * net.stride
    assert torch.allclose(tiled_apply(net, x, tile=128, overlap=overlap), net(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    y = torch.rand(1, 1, 128, 128, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(y)[0, 0, 64, 64], y)
    seen = grad[0, 0].nonzero()
    assert (seen - 64).abs().max() <= net.reach


def test_training_by_float16_statistics_does_not_overflow():
    net = _bias_free(4, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(300 * torch.randn(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"norm": "layer"}, "norm='layer'"), ({"act": "gelu", "norm": "bias_free"}, "not homogeneous"), ({"up": "pixel"}, "up="),
        ({"convs": 0}, "convs=0"), ({"widths": (4,)}, "two resolutions"), ({"act": "tanh"}, "act='tanh'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(over, match):
    with pytest.raises(BadSetting, match=match):
        PlainUNet(1, 1, **{"widths": (4, 8), **over})
    with pytest.raises(BadData, match="multiples of 2"):
        PlainUNet(1, 1, (4, 8))(torch.rand(1, 1, 8, 7))
