import pytest
import torch

from sfumato.attacks import deepfool
from sfumato.errors import BadSetting


@pytest.fixture
def linear():
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 4, dtype=torch.float64, generator=g), torch.randn(4, dtype=torch.float64, generator=g)
    return weight, bias, torch.randn(32, 6, dtype=torch.float64, generator=g)


def test_linear_model_in_one_step(linear):
    weight, bias, x = linear

    def model(t):
        return t @ weight + bias

    logits = model(x)
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    lengths = (weight.T[y][:, None] - weight.T[None]).norm(dim=-1)
    nearest = torch.where(lengths > 0, gaps / lengths.clamp(min=1e-12), torch.inf).amin(1)
    moved = deepfool(model, x, overshoot=0.0, steps=1)
    torch.testing.assert_close((moved - x).norm(dim=1), nearest)
    top = model(moved).topk(2).values
    torch.testing.assert_close(top[:, 0], top[:, 1])
    beyond = deepfool(model, x, y, overshoot=0.02)
    assert (model(beyond).argmax(1) != y).all()
    torch.testing.assert_close((beyond - x).norm(dim=1), 1.02 * nearest)


def test_binary_linear_model_projects(linear):
    weight, bias, x = linear
    w = weight[:, 0]

    def model(t):
        return torch.stack([torch.zeros(len(t), dtype=t.dtype), t @ w + bias[0]], 1)

    projected = x - ((x @ w + bias[0]) / w.square().sum())[:, None] * w
    torch.testing.assert_close(deepfool(model, x, overshoot=0.0), projected)


def test_network_is_fooled_by_less_than_pgd_needs():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5)).eval()
    x = torch.rand(16, 3, 4, 4)
    y = net(x).argmax(1)
    moved = deepfool(net, x, y)
    assert (net(moved).argmax(1) != y).all()
    way = (moved - x).flatten(1)
    back = x + 0.9 * (moved - x)
    assert (net(back).argmax(1) == y).float().mean() > 0.8  # it stops just behind the boundary
    assert way.norm(dim=1).max() < 3
    clipped = deepfool(net, x, y, clip=(0.0, 1.0))
    assert clipped.min() >= 0
    assert clipped.max() <= 1
    assert all(p.grad is None for p in net.parameters())


def test_misclassified_samples_stay(linear):
    weight, bias, x = linear

    def model(t):
        return t @ weight + bias

    wrong = (model(x).argmax(1) + 1) % 4
    assert torch.equal(deepfool(model, x, wrong), x)


def test_flat_models_give_up_without_nan():
    x = torch.rand(3, 2)

    def flat(t):
        return t.sum(1, keepdim=True) * 0 + torch.tensor([1.0, 0.0])

    assert torch.equal(deepfool(flat, x, steps=3), x)


def test_refusals():
    with pytest.raises(BadSetting, match="two classes"):
        deepfool(lambda t: t[:, :1], torch.rand(2, 3))
    with pytest.raises(BadSetting, match="at least 1"):
        deepfool(lambda t: t, torch.rand(2, 3), steps=0)
