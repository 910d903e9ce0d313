from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.nn import BFCNN, BiasFreeNorm2d

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "harmonic-bases.npz").items()}


def test_norm_follows_the_reference():
    norm = BiasFreeNorm2d(4).double()
    norm.weight.data = V["bn_gamma"].flatten()
    assert torch.allclose(norm(V["bn_x"]), V["bn_train"], rtol=0, atol=1e-9)
    assert torch.allclose(norm.running_sd, V["bn_running_sd"].flatten(), rtol=0, atol=1e-9)
    assert torch.allclose(norm.eval()(V["bn_x"]), V["bn_eval"], rtol=0, atol=1e-9)


def test_norm_leaves_the_mean_and_is_linear_in_evaluation():
    norm, x = BiasFreeNorm2d(3).double(), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    sd = (x.var((0, 2, 3), correction=0) + 1e-5).sqrt().view(3, 1, 1)
    assert torch.allclose(norm(x + 7) - norm(x), 7 / sd.expand_as(x))
    norm.eval()
    a, b = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(norm(2 * a - 3 * b), 2 * norm(a) - 3 * norm(b))
    assert torch.autograd.gradcheck(norm.train(), a[:2, :, :2].requires_grad_())


def test_the_released_gain_is_tiny():
    torch.manual_seed(0)
    weight = BiasFreeNorm2d(2000, gain="tiny").weight
    assert weight.abs().max().item() == pytest.approx(0.025)
    assert weight.mean().abs() < 2e-3  # of both signs
    assert 0.2 < (weight.abs() < 0.024).float().mean() < 0.5  # N(0, 0.059²) cut at 0.025
    with pytest.raises(BadSetting, match="gain='small'"):
        BiasFreeNorm2d(2, gain="small")


def test_bf_cnn_has_the_size_of_the_paper():
    assert sum(p.numel() for p in BFCNN(1).parameters()) == 702_784


@pytest.mark.parametrize("field", [5, 9, 13, 23, 43])
def test_receptive_field(field):
    torch.manual_seed(0)
    net = BFCNN(1, width=4, receptive_field=field).double().eval()
    assert net.reach == field // 2
    for p in net.parameters():
        p.data.abs_()  # so that every path counts
    x = torch.rand(1, 1, 51, 51, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0, 0, 25, 25], x)
    seen = grad[0, 0].nonzero()
    assert (seen.amin(0).tolist(), seen.amax(0).tolist()) == ([25 - field // 2] * 2, [25 + field // 2] * 2)


def test_bf_cnn_is_homogeneous_in_evaluation():
    net, y = BFCNN(2, layers=5, width=8).double(), torch.randn(2, 2, 9, 7, dtype=torch.float64)
    net(y)  # a running deviation that is not 1
    net.eval()
    assert torch.allclose(net(3.7 * y), 3.7 * net(y), rtol=1e-10)
    assert torch.allclose(torch.func.jvp(net, (y,), (y,))[1], net(y), rtol=1e-10)


@pytest.mark.parametrize("over", [{"receptive_field": 6}, {"receptive_field": 3}, {"receptive_field": 45}, {"layers": 1}])
def test_fields_that_cannot_be_are_refused(over):
    with pytest.raises(BadSetting, match="odd number of pixels"):
        BFCNN(1, **over)
