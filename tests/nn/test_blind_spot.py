from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.nn import CentreMaskedConv2d, ConditionalBlindSpotNet
from sfumato.probes import blindness

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "cbsn.npz").items()}


def _net(channels=1, width=4, modules=1):
    torch.manual_seed(0)
    net = ConditionalBlindSpotNet(channels, width=width, modules=modules).double()
    for parameter in net.parameters():  # biases too: no zero may hide a path
        torch.nn.init.normal_(parameter, std=0.5)
    return net


def test_masked_convolution_matches_the_reference():
    layer = CentreMaskedConv2d(1, 4, 5).double()
    layer.load_state_dict({"weight": VECTORS["w5"], "bias": VECTORS["b5"]})
    torch.testing.assert_close(layer(VECTORS["x"], blind=True), VECTORS["masked_conv5"], rtol=1e-12, atol=1e-14)


def test_the_centre_tap_learns_from_the_other_mode_alone():
    layer = CentreMaskedConv2d(2, 3, 3)
    x = torch.rand(1, 2, 6, 6)
    (blind,) = torch.autograd.grad(layer(x, blind=True).square().sum(), layer.weight)
    (seeing,) = torch.autograd.grad(layer(x, blind=False).square().sum(), layer.weight)
    assert (blind[..., 1, 1] == 0).all()
    assert (blind[..., 0, 0] != 0).all()
    assert (seeing[..., 1, 1] != 0).all()


@pytest.mark.parametrize("modules", [0, 1, 2, 3])
def test_blind_means_blind_at_every_pixel(modules):
    net, x = _net(2, modules=modules), torch.rand(1, 2, 9, 8, dtype=torch.float64)
    assert blindness(lambda t: net(t, blind=True), x) <= 1e-12
    assert blindness(net, x) > 1e-3


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_reach_is_what_an_output_looks_at(modules):
    net = _net(modules=modules)
    assert net.reach == 2 + 3 * modules
    side = 2 * net.reach + 5
    x = torch.rand(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0, 0, side // 2, side // 2], x)
    rows = grad[0, 0].abs().sum(1).nonzero().squeeze(1)
    assert (rows.min().item(), rows.max().item()) == (side // 2 - net.reach, side // 2 + net.reach)


@pytest.mark.parametrize(("c", "n", "channels"), [(128, 9, 3), (16, 2, 1)])
def test_parameter_count_is_the_sum_of_the_layers(c, n, channels):
    def conv(cin, cout, k):
        return cin * cout * k * k + cout

    branches = [conv(c, c, k) + 3 * conv(c, c, 1) + n * (conv(c, c, 3) + conv(c, c, 1)) for k in (3, 5)]
    tail = conv(2 * c, c, 1) + conv(c, 64, 1) + conv(64, 64, 1) + conv(64, channels, 1)
    net = ConditionalBlindSpotNet(channels, width=c, modules=n)
    assert sum(p.numel() for p in net.parameters()) == conv(channels, c, 1) + sum(branches) + tail


def test_he_initialisation():
    torch.manual_seed(0)
    net = ConditionalBlindSpotNet(3, width=64, modules=1)
    masked = net.branches[1].masked
    assert masked.weight.std().item() == pytest.approx((2 / (64 * 25)) ** 0.5, rel=0.02)
    assert not masked.bias.any()


def test_state_holds_weights_only():
    assert all(name.endswith(("weight", "bias")) for name in ConditionalBlindSpotNet(1, width=2, modules=1).state_dict())
