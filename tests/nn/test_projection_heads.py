import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn import ProjectionHead, ReweightingHead, SymmetricReLU

V = np.load(Path(__file__).parents[1] / "vectors" / "projection-head.npz")


def test_reweighting_of_the_reference():
    head = ReweightingHead(6, kappa=float(V["kappa"]), dtype=torch.float64)
    torch.testing.assert_close(head.weight, torch.from_numpy(V["reweights"]), rtol=0, atol=1e-10)
    z = head(torch.from_numpy(V["z"]))
    torch.testing.assert_close(z, torch.from_numpy(V["z_reweighted"]), rtol=0, atol=1e-10)


def test_reweighting_is_fixed_and_lets_gradients_through():
    head = ReweightingHead(5, kappa=1.3)
    assert not list(head.parameters())
    assert list(head.state_dict()) == ["weight"]
    h = torch.randn(3, 5, requires_grad=True)
    head(h).sum().backward()
    torch.testing.assert_close(h.grad, (1.3 ** -torch.arange(5.0)).expand(3, 5))
    assert torch.equal(ReweightingHead(5, kappa=1)(h), h)
    other = ReweightingHead(5)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(h), head(h))


def test_reweighting_of_many_features_in_low_precision():
    head = ReweightingHead(2048)
    assert head.weight.isfinite().all()
    assert head.weight[-1] < 1e-40
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.ones(1, 2048, dtype=torch.bfloat16)).dtype == torch.float32


def test_symmetric_relu_of_the_reference():
    x = torch.from_numpy(V["sym_relu_x"])
    unit = SymmetricReLU(float(V["sym_relu_b"])).double()
    with torch.no_grad():
        unit.b.fill_(float(V["sym_relu_b"]))  # not rounded to float32
        torch.testing.assert_close(unit(x), torch.from_numpy(V["sym_relu_y"]), rtol=0, atol=1e-10)


def test_symmetric_relu_is_odd_and_thresholds():
    u = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    unit = SymmetricReLU(0.75).double()
    out = unit(u)
    torch.testing.assert_close(out, -unit(-u))
    torch.testing.assert_close(out, nn.functional.softshrink(u, 0.75))
    slope, at_threshold = torch.autograd.grad(out.sum(), (u, unit.b))
    assert torch.equal(slope, (u.abs() > 0.75).double())
    assert float(at_threshold) == 0  # as many above b as below -b
    assert torch.equal(SymmetricReLU()(u), u)
    assert torch.autograd.gradcheck(lambda b: torch.func.functional_call(unit, {"b": b}, (u.detach(),)), unit.b)


def test_projection_head_is_linear_layers_with_relu_between():
    for layers in (1, 2, 3):
        head = ProjectionHead(6, 16, 4, layers=layers)
        assert [type(m) for m in head] == [nn.Linear, *[nn.ReLU, nn.Linear] * (layers - 1)]
        assert head(torch.zeros(2, 3, 6)).shape == (2, 3, 4)
        assert sum(isinstance(m, nn.Linear) and m.out_features == 16 for m in head) == layers - 1


def test_impossible_heads_are_refused():
    with pytest.raises(BadSetting, match="layers=0"):
        ProjectionHead(6, 16, 4, layers=0)
    for kappa in (0.9, math.inf, math.nan):
        with pytest.raises(BadSetting, match="kappa"):
            ReweightingHead(6, kappa=kappa)
    with pytest.raises(BadData, match="must be 6"):
        ReweightingHead(6)(torch.zeros(2, 5))
