from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.probes import CountSketch, JacobianOperator, ntk, per_sample_grads, tangent_features

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "curvature-base.npz")


def half_squares(outputs, targets):
    return (outputs - targets).square().sum() / 2 / len(outputs)


def problem(kind):
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    nn.utils.vector_to_parameters(torch.from_numpy(VECTORS[f"{kind}_theta"]), net.parameters())
    loss = F.cross_entropy if kind == "ce" else half_squares
    return net, loss, torch.from_numpy(VECTORS[f"{kind}_X"]), torch.from_numpy(VECTORS[f"{kind}_y"])


@pytest.mark.parametrize("kind", ["ce", "mse"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_reference_gradients(kind, chunk):
    net, loss, x, y = problem(kind)
    expected = torch.from_numpy(VECTORS[f"{kind}_per_sample_grads"])
    for data in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        torch.testing.assert_close(per_sample_grads(net, loss, data, chunk=chunk), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(expected.mean(0), torch.from_numpy(VECTORS[f"{kind}_grad"]), atol=1e-9, rtol=0)
    torch.testing.assert_close(per_sample_grads(net, loss, (x, y), params=["2.bias"]), expected[:, -3:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("chunk", [None, 2])
def test_kernel_is_the_gram_matrix_of_jacobians(chunk):
    net, _, x, _ = problem("mse")
    j = JacobianOperator(net, x).dense().view(7, 3, 57)
    torch.testing.assert_close(ntk(net, x, chunk=chunk), torch.einsum("icd,jcd->ij", j, j))
    pairs = ntk(net, x[:4], x[4:], trace_outputs=False, chunk=chunk)
    torch.testing.assert_close(pairs, torch.einsum("icd,jed->ijce", j[:4], j[4:]))
    torch.testing.assert_close(ntk(net, [x[:4], x[4:]], chunk=chunk), ntk(net, x))


def test_scalar_outputs_and_mode_is_restored():
    net = nn.Sequential(nn.Linear(5, 1), nn.Dropout(), nn.Flatten(0)).double().train()
    x = torch.randn(4, 5).double()
    torch.testing.assert_close(ntk(net, x), x @ x.T + 1)
    assert net[1].training


@pytest.mark.parametrize("chunk", [None, 2])
def test_tangent_features_are_the_factor_of_the_kernel(chunk):
    net, _, x, _ = problem("mse")
    found = tangent_features(net, [x[:4], x[4:]], chunk=chunk)
    assert found.shape == (7, 3 * 57)
    torch.testing.assert_close(found @ found.T, ntk(net, x))
    some = tangent_features(net, x, params=["2.bias"], chunk=chunk)
    torch.testing.assert_close(some @ some.T, torch.full((7, 7), 3.0).double())
    sketch = CountSketch(57, 31, generator=torch.Generator().manual_seed(0))
    short = tangent_features(net, x, sketch=sketch, chunk=chunk)
    torch.testing.assert_close(short, sketch(found.view(7, 3, 57)).flatten(1))
