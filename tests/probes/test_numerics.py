from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadData
from sfumato.losses import cross_entropy_at
from sfumato.probes import nlm_alignment, softmax_collapse, zero_loss_fraction

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "stablemax-perpgrad.npz")


@pytest.mark.parametrize("prefix", ["a", "b"])
@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.float16)])
def test_reference_fractions(prefix, bits, dtype):
    logits = torch.from_numpy(VECTORS[f"{prefix}_sc_logits_{bits}"])
    assert softmax_collapse(logits, dtype).item() == pytest.approx(float(VECTORS[f"{prefix}_sc_frac_{bits}"]), abs=1e-6)


@pytest.mark.parametrize(("dtype", "edge"), [(torch.float16, 7.6), (torch.float32, 16.6), (torch.float64, 36.7)])
def test_gap_at_which_softmax_collapses(dtype, edge):
    for gap, expected in ((edge - 0.7, 0), (edge + 0.9, 1)):
        z = torch.tensor([[0.0, -gap], [5.0, 5.0 - gap]], dtype=torch.float64)
        assert softmax_collapse(z, dtype) == expected
    if dtype == torch.float32:
        z = torch.tensor([[0.0, -17.5]])
        assert (softmax_collapse(z), softmax_collapse(z, torch.float64)) == (1, 0)
        assert softmax_collapse(torch.tensor([[0.0, -16.0]])) == 0
        assert softmax_collapse(torch.tensor([[0.0] + [-17.5] * 20])) == 0  # competitors add up


def test_collapse_is_read_in_its_own_type_and_over_any_shape():
    z = torch.tensor([0.0, -17.5]).expand(2, 3, 2).clone()
    z[0, 0, 1] = -1
    with torch.autocast("cpu", torch.bfloat16):
        assert softmax_collapse(z).item() == pytest.approx(5 / 6)
    assert not softmax_collapse(z.requires_grad_()).requires_grad


def test_zero_terms_are_those_of_collapsed_right_samples():
    z = torch.tensor([[20.0, 0.0], [0.0, 20.0], [1.0, 0.0], [30.0, 0.0]])
    y = torch.zeros(4, dtype=torch.long)
    assert softmax_collapse(z) == 0.75
    assert zero_loss_fraction(cross_entropy_at(z, y, torch.float32, reduction="none")) == 0.5
    assert zero_loss_fraction(cross_entropy_at(z, y, torch.float64, reduction="none")) == 0


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))


def test_alignment_of_a_homogeneous_network():
    """For f homogeneous of degree L the loss along the weights is that along the logits: <grad, theta> = L <dl/dz, z>."""
    net = network().double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    z = net(x)
    z.retain_grad()
    F.cross_entropy(z, y).backward()
    found = nlm_alignment(net)
    theta, grad = (torch.cat([getattr(t, what).flatten() for t in net.parameters()]) for what in ("data", "grad"))
    assert set(found) == {"0.weight", "2.weight", "all"}
    assert found["all"] == pytest.approx(-2 * float((z.grad * z).sum()) / float(theta.norm() * grad.norm()))
    for layer in (0, 2):
        assert found[f"{layer}.weight"] == pytest.approx(
            float(F.cosine_similarity(-net[layer].weight.grad.flatten(), net[layer].weight.flatten(), dim=0))
        )


def test_gradients_too_small_for_squares_in_float32():
    net = network()
    for p in net.parameters():
        p.grad = -1e-25 * p.detach()
    assert nlm_alignment(net)["all"] == pytest.approx(1)


def test_absent_and_zero_gradients():
    net = network()
    with pytest.raises(BadData, match="backward"):
        nlm_alignment(net)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    assert nlm_alignment(net) == {"0.weight": 0, "all": 0}
