import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.nn import TwoHeadUNet, small_unet


def _make(channels):
    return small_unet(8, 2, channels, width=8, mults=(1, 2))


@pytest.mark.parametrize("sharing", ["none", "encoder", "all"])
def test_two_predictions_of_any_size(sharing):
    torch.manual_seed(0)
    net, x, t = TwoHeadUNet(_make, 1, sharing=sharing).eval(), torch.randn(2, 2, 12, 8), torch.tensor([0, 700])
    y = net(x, t)
    assert y.shape == (2, 2, 12, 8)
    assert not torch.allclose(y[:, :1], y[:, 1:], atol=1e-3)
    assert not torch.allclose(net(x, torch.tensor([500, 700]))[0], y[0], atol=1e-6)
    y.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_what_is_shared():
    nets = {sharing: TwoHeadUNet(_make, 1, sharing=sharing).eval() for sharing in ("none", "encoder", "all")}
    count = {sharing: sum(p.numel() for p in net.parameters()) for sharing, net in nets.items()}
    one = sum(p.numel() for p in _make(1).parameters())
    assert count["none"] == 2 * one
    assert one < count["all"] < count["encoder"] < count["none"]
    x, t = torch.randn(1, 2, 8, 8), torch.tensor(3)
    y = nets["none"](x, t)
    assert torch.allclose(y[:, 1:], nets["none"].body(x, t).sample, atol=1e-6)
    assert torch.allclose(y[:, :1], nets["none"].other(x, t).sample, atol=1e-6)
    assert torch.allclose(nets["all"](x, t), nets["all"].body(x, t).sample, atol=1e-6)


def test_the_residual_head_has_no_skips():
    net, x, t = TwoHeadUNet(_make, 1, sharing="encoder").eval(), torch.randn(1, 2, 8, 8), torch.tensor(3)
    before = net(x, t)
    for block in net.body.up_blocks:  # the way up of the other head
        torch.nn.init.zeros_(block.resnets[0].conv1.weight)
    after = net(x, t)
    assert torch.equal(before[:, :1], after[:, :1])
    assert not torch.equal(before[:, 1:], after[:, 1:])
    with pytest.raises(BadSetting, match="sharing='both'"):
        TwoHeadUNet(_make, 1, sharing="both")
