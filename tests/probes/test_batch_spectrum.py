import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadData, BadSetting
from sfumato.probes import (
    HessianOperator,
    batch_hessians,
    deviation_along,
    effective_batch,
    hessian_noise,
    max_stable_lr,
    noise_edge,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def regression(n=30, d=5):
    x = torch.randn(n, d, dtype=torch.float64, generator=seeded())
    return nn.Linear(d, 1, bias=False).double(), (x, torch.zeros(n, 1, dtype=torch.float64))


def half_squares(out, target):
    return F.mse_loss(out, target) / 2


def test_effective_batch():
    assert effective_batch(100, 100) == math.inf
    assert effective_batch(1, 10**9) == pytest.approx(1)
    assert effective_batch(50, 100) == 100
    for wrong in (0, 101):
        with pytest.raises(BadSetting, match="from 1 to"):
            effective_batch(wrong, 100)


def test_noise_of_a_linear_model_is_the_closed_form():
    model, data = regression()
    x, batch = data[0], 6
    outer = x[:, :, None] * x[:, None]  # Hessian of one sample
    apart = outer - outer.mean(0)
    # without replacement: variance of the mean is S² / (effective batch), S² with n - 1
    z = torch.randn(8, 5, dtype=torch.float64, generator=seeded(1))
    unit = z / z.norm(dim=1, keepdim=True)
    expected = (apart @ unit.T).square().sum((0, 1)).mean() / (len(x) - 1) / effective_batch(batch, len(x))
    found = hessian_noise(model, half_squares, data, batch=batch, batches=48, noise=z, generator=seeded(2))
    spread = (found.value - expected).abs()
    assert spread < 3 * found.stderr
    assert spread < 0.3 * expected
    assert found.samples == 384
    free = hessian_noise(model, half_squares, data, batch=batch, batches=24, probes=32, generator=seeded(3))
    everywhere = apart.square().sum() / 5 / (len(x) - 1) / effective_batch(batch, len(x))
    assert (free.value - everywhere).abs() < 3 * free.stderr
    assert free.stderr < 0.3 * everywhere


def test_noise_on_given_batches_and_its_edge():
    model, data = regression()
    index = torch.stack([torch.randperm(30, generator=seeded(i))[:4] for i in range(3)])
    whole, parts = batch_hessians(model, half_squares, data, batch=4, index=index)
    torch.testing.assert_close(whole.dense(), data[0].T @ data[0] / 30)
    torch.testing.assert_close(parts[2].dense(), data[0][index[2]].T @ data[0][index[2]] / 4)
    noise = torch.stack([part.dense() - whole.dense() for part in parts])
    z = torch.eye(5, dtype=torch.float64)
    found = hessian_noise(model, half_squares, data, batch=4, index=index, noise=3 * z)
    torch.testing.assert_close(found.value, noise.square().sum() / 15)
    edge = noise_edge(model, half_squares, data, batch=4, index=index, generator=seeded())
    torch.testing.assert_close(edge.value, torch.linalg.eigvalsh(noise)[:, -1].mean(), rtol=1e-3, atol=0)
    listed = [(data[0][:12], data[1][:12]), (data[0][12:], data[1][12:])]
    again = hessian_noise(model, half_squares, listed, batch=4, index=index, noise=z)
    torch.testing.assert_close(again.value, found.value)


def test_no_more_is_differentiated_at_once_than_was_given():
    seen = []

    class Noting(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    model, (x, y) = Noting(5, 1, bias=False).double(), regression()[1]
    pairs = list(zip(x.split(7), y.split(7)))
    whole, parts = batch_hessians(model, half_squares, pairs, batch=20, batches=2, generator=seeded())
    z = torch.ones(5, 1, dtype=torch.float64)
    products = whole @ z, [part @ z for part in parts]
    assert max(seen) == 7
    found = deviation_along(*products)
    again = hessian_noise(model, half_squares, (x, y), batch=20, batches=2, noise=z.T, generator=seeded())
    torch.testing.assert_close(found.value, again.value * 5)  # of z as long as 1


def test_draws_repeat_and_the_whole_data_has_no_noise():
    model, data = regression()
    a, b = (hessian_noise(model, half_squares, data, batch=4, generator=seeded(5)) for _ in range(2))
    assert torch.equal(a.value, b.value)
    assert hessian_noise(model, half_squares, data, batch=30, generator=seeded()).value < 1e-25
    assert hessian_noise(model, half_squares, data, batch=4, batches=1).stderr == math.inf


def test_largest_eigenvalue_of_a_batch_is_larger_on_average():
    model, data = regression()
    whole, parts = batch_hessians(model, half_squares, data, batch=4, batches=20, generator=seeded())
    assert isinstance(whole, HessianOperator)
    tops = torch.stack([torch.linalg.eigvalsh(part.dense())[-1] for part in parts])
    assert tops.mean() > torch.linalg.eigvalsh(whole.dense())[-1]


def test_bisection_finds_the_edge_of_stability():
    curvature, tried = torch.tensor([10.0, 1.0], dtype=torch.float64), []

    def trains(lr):
        tried.append(lr)
        theta = torch.ones(2, dtype=torch.float64)
        for _ in range(300):
            theta = theta - lr * curvature * theta
        return bool((curvature * theta.square()).sum() < 0.9 * curvature.sum())

    assert max_stable_lr(trains, (1e-3, 10.0), factor=1.01) == pytest.approx(2 / 10, rel=0.01)
    assert len(tried) == math.ceil(math.log2(math.log(1e4) / math.log(1.01)))
    assert max_stable_lr(trains, (1e-3, 10.0)) in tried


def test_refusals():
    model, data = regression()
    with pytest.raises(BadSetting, match="from 1 to the 30"):
        hessian_noise(model, half_squares, data, batch=31)
    with pytest.raises(BadSetting, match="at least 1"):
        hessian_noise(model, half_squares, data, batch=3, batches=0)
    with pytest.raises(BadSetting, match="0 probes"):
        hessian_noise(model, half_squares, data, batch=3, probes=0)
    with pytest.raises(BadSetting, match="no batches"):
        deviation_along(torch.ones(3, 1), [])
    with pytest.raises(BadData, match="index is"):
        noise_edge(model, half_squares, data, batch=3, index=torch.zeros(2, 4).long())
    for bracket, factor in (((1.0, 0.1), 1.1), ((0.0, 1.0), 1.1), ((0.1, 1.0), 1.0)):
        with pytest.raises(BadSetting, match="bracket"):
            max_stable_lr(lambda lr: True, bracket, factor=factor)
    with pytest.raises(BadSetting, match="raise the upper end"):
        max_stable_lr(lambda lr: True, (0.1, 1.0))
    with pytest.raises(BadSetting, match="lower the lower end"):
        max_stable_lr(lambda lr: False, (0.1, 1.0))
