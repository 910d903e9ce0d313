import copy

import pytest
import torch
from torch import nn

from sfumato.errors import BadSetting
from sfumato.nn import flatten_params, linearise, scale_output


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)).double()
    return net, torch.randn(12, 3).double(), torch.randn(12).double()


def fitted(model, x, y, lr, steps=30):
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        sgd.zero_grad()
        (model(x) - y).square().mean().backward()
        sgd.step()
    return model(x).detach()


def test_scaled_outputs():
    net, x, _ = problem()
    before = net(x).detach()
    scaled, plain = scale_output(net, 3.0), scale_output(net, 3.0, centre=False)
    assert torch.equal(scaled(x), torch.zeros(12).double())
    assert torch.equal(plain(x), 3 * net(x))
    with torch.no_grad():
        net[0].weight.mul_(2)
    torch.testing.assert_close(scaled(x), 3 * (net(x) - before))
    trained = {id(p) for p in scaled.parameters() if p.requires_grad}
    assert trained == {id(p) for p in net.parameters()}


def test_frozen_copies_stay_in_eval_mode_and_are_saved():
    net, x, y = problem()
    net = nn.Sequential(nn.Dropout(0.5), net).train()
    for make in (lambda m: scale_output(m, 2.0), linearise):
        model = make(copy.deepcopy(net)).train()
        assert model.training
        assert not any(m.training for m in model.start.modules())
        fitted(model, x, y, 0.01, steps=2)
        other = make(copy.deepcopy(net))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_linearised_model_is_the_taylor_expansion():
    net, x, _ = problem()
    line = linearise(net)
    torch.testing.assert_close(line(x), net(x))
    step = torch.randn(flatten_params(net).shape[0], generator=torch.Generator().manual_seed(1)).double()
    errors = []
    for size in (1e-2, 5e-3):
        moved = copy.deepcopy(net)
        for model in (moved, line):
            start = 0
            for p, first in zip([q for q in model.parameters() if q.requires_grad], net.parameters()):
                p.data = first.detach() + size * step[start : start + p.numel()].view_as(p)
                start += p.numel()
        errors.append(float((moved(x) - line(x)).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # second order
    assert errors[0] < 1e-2

    def outputs(*params):
        return torch.func.functional_call(line, dict(zip(names(line), params)), (x[:2],))

    assert torch.autograd.gradcheck(outputs, tuple(p.detach().requires_grad_() for p in line.params))


def names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_large_alpha_trains_like_the_linearised_model():
    net, x, y = problem()
    wanted = fitted(scale_output(linearise(net), 1.0), x, y, 0.05)
    gaps = []
    for alpha in (20.0, 40.0):
        gaps.append(float((fitted(scale_output(copy.deepcopy(net), alpha), x, y, 0.05 / alpha**2) - wanted).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.15)  # O(1/α)
    rich = float((fitted(scale_output(copy.deepcopy(net), 0.5), x, y, 0.05 / 0.25) - wanted).norm())
    assert rich > 10 * gaps[1]


def test_refusals():
    net, _, _ = problem()
    for alpha in (0.0, -1.0):
        with pytest.raises(BadSetting, match="must be positive"):
            scale_output(net, alpha)
    with pytest.raises(BadSetting, match="no trainable"):
        linearise(net.requires_grad_(False))
