import pytest
import torch
import torch.nn.functional as F

from sfumato.physics import correlated_noise
from sfumato.probes import blindness, noise_autocorrelation


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_blindness_is_the_largest_entry_of_the_own_pixel_blocks(chunk):
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    x = torch.rand(2, 2, 5, 4, dtype=torch.float64)

    def net(t):
        return F.conv2d(t.square(), weight, padding=1)

    jacobian = torch.autograd.functional.jacobian(lambda t: net(t[None])[0], x[0]).flatten(1, 2).flatten(2)
    own = [
        torch.autograd.functional.jacobian(lambda t: net(t[None])[0], s).view(3, 20, 2, 20).diagonal(dim1=1, dim2=3) for s in x
    ]
    assert jacobian.numel() == 3 * 20 * 2 * 20
    assert blindness(net, x, chunk=chunk).item() == pytest.approx(torch.stack(own).abs().max().item())


def test_a_pixel_that_sees_itself_through_another_channel_is_not_blind():
    x = torch.rand(1, 2, 4, 4)
    assert blindness(lambda t: t.flip(1), x).item() == 1
    assert blindness(lambda t: t.roll(1, -1), x).item() == 0


def test_blindness_leaves_no_gradient_behind():
    layer = torch.nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        assert not blindness(layer, torch.rand(1, 1, 4, 4)).requires_grad
    assert layer.weight.grad is None


def test_autocorrelation_of_filtered_noise_is_that_of_the_filter():
    line = torch.tensor([1.0, 2.0, 1.0])
    noise = correlated_noise((4, 1, 512, 512), 0.1, torch.outer(line, line), generator=torch.Generator().manual_seed(0))
    r = noise_autocorrelation(noise + 0.5)  # the mean does not count
    assert r.shape == (512, 512)
    assert r[0, 0] == 1
    assert r[0, :4].tolist() == pytest.approx([1, 2 / 3, 1 / 6, 0], abs=0.01)
    assert r[-1, 1].item() == pytest.approx(4 / 9, abs=0.01)


@pytest.mark.parametrize("size", [(6, 5), (5, 8)])
def test_autocorrelation_is_a_sum_over_periodic_shifts(size):
    n = torch.randn(1, 1, *size, dtype=torch.float64)
    n = n - n.mean()
    expected = (n * n.roll((-2, -1), (-2, -1))).sum() / n.square().sum()
    assert noise_autocorrelation(n)[2, 1].item() == pytest.approx(expected.item())
