import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadSetting
from sfumato.nn import flatten_params
from sfumato.optim import SurrogateSharpness, gradient_norm_penalty


def closure(params, fn):
    def call():
        for p in params:
            p.grad = None
        value = fn()
        value.backward()
        return value

    return call


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(16, 4).double(), torch.randn(16, 1).double()
    params = list(net.parameters())
    return net, params, closure(params, lambda: F.mse_loss(net(x), y)), closure(params, lambda: net(x).mean()), x


@pytest.mark.parametrize("kind", ["ignite", "ignite2"])
def test_reference_vectors(kind):
    stored = np.load(Path(__file__).parents[1] / "vectors" / "ignite.npz")
    v = {k.removeprefix(f"{kind}_"): torch.from_numpy(np.asarray(stored[k])) for k in stored.files if k.startswith(f"{kind}_")}
    params = [nn.Parameter(v[f"p{i}"].clone()) for i in range(4)]

    def model():
        return F.leaky_relu(v["X"] @ params[0] + params[1], 0.3) @ params[2] + params[3]

    optimizer = SurrogateSharpness(
        torch.optim.SGD(params, lr=float(v["lr"])), rho=float(v["rho"]), r=float(v["r"]), lam=float(v["lam0"]),
        eps=float(v["epsilon"]), lam_lr=0.0 if v["constant_lambda"] else float(v["eta_lambda"]), clip=False,
    )  # fmt: skip
    loss_of = closure(params, lambda: (model() - v["y"]).square().mean() / 2)
    output = closure(params, lambda: model().mean())
    for t in range(len(v["losses"])):
        torch.testing.assert_close(optimizer.lam, v["lambdas"][t], rtol=1e-9, atol=0)
        loss = optimizer.step(loss_of, output)
        torch.testing.assert_close(loss, v["losses"][t], rtol=1e-9, atol=0)
        torch.testing.assert_close(optimizer.norm, v["sharp_norms"][t], rtol=1e-9, atol=0)
        torch.testing.assert_close(flatten_params([p.grad for p in params]), v["total_grads"][t], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(flatten_params(params).detach(), v["params_traj"][t], rtol=1e-9, atol=1e-12)


def test_finite_difference_converges_to_the_exact_gradient(problem):
    net, params, _, output, x = problem
    grads = torch.autograd.grad(net(x).mean(), params, create_graph=True)
    norm = flatten_params(grads).norm()
    exact = flatten_params(torch.autograd.grad(norm, params, materialize_grads=True))
    before = flatten_params(params).clone()
    errors = []
    for r in (0.02, 0.01, 0.005):
        found, penalty = gradient_norm_penalty(output, params, r)
        torch.testing.assert_close(found, norm.detach())
        errors.append((flatten_params(penalty) - exact).norm())
    assert torch.equal(flatten_params(params), before)
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_linear_models_have_no_penalty():
    w, b, x = nn.Parameter(torch.randn(5).double()), nn.Parameter(torch.zeros(1).double()), torch.randn(20, 5).double()
    norm, penalty = gradient_norm_penalty(closure([w, b], lambda: (x @ w + b).mean()), [w, b], 0.05)
    torch.testing.assert_close(norm, (x.mean(0).square().sum() + 1).sqrt())
    assert flatten_params(penalty).abs().max() < 1e-12


def test_zero_gradients_and_unused_parameters():
    w, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))
    norm, penalty = gradient_norm_penalty(closure([w], lambda: (w**2).sum()), [w, unused], 0.05)
    assert norm == 0
    assert all((p == 0).all() for p in penalty)
    with pytest.raises(BadSetting, match="positive"):
        gradient_norm_penalty(closure([w], lambda: (w**2).sum()), [w], 0.0)


def test_without_weight_it_is_the_base_optimizer(problem):
    net, params, _loss, output, x = problem
    other = copy.deepcopy(net)
    theirs = list(other.parameters())
    plain = torch.optim.Adam(theirs, 0.01)
    ours = SurrogateSharpness(torch.optim.Adam(params, 0.01), lam=0.0, lam_lr=0.0)
    y = torch.zeros(16, 1).double()
    for _ in range(5):
        ours.step(closure(params, lambda: F.mse_loss(net(x), y)), output)
        plain.step(closure(theirs, lambda: F.mse_loss(other(x), y)))
    assert torch.equal(flatten_params(params), flatten_params(theirs))


def test_multiplier_follows_the_constraint(problem):
    _, params, loss, output, _ = problem
    optimizer = SurrogateSharpness(torch.optim.SGD(params, 0.0), rho=0.5, lam=0.3, lam_lr=0.2, eps=0.1)
    optimizer.step(loss, output)
    torch.testing.assert_close(optimizer.lam, 0.3 + 0.2 * (0.5 * optimizer.norm - 0.1))
    held, norm = optimizer.lam.clone(), float(optimizer.norm)
    optimizer.eps = 0.5 * norm
    optimizer.step(loss, output)
    torch.testing.assert_close(optimizer.lam, held)
    optimizer.eps = 1e3
    optimizer.step(loss, output)
    assert optimizer.lam == 0
    optimizer.clip = False
    optimizer.step(loss, output)
    assert optimizer.lam < 0


def test_penalty_on_the_loss_itself(problem):
    _, params, loss, _, _ = problem
    optimizer = SurrogateSharpness(torch.optim.SGD(params, 0.0), lam=1.0, lam_lr=0.0, rho=1.0)
    optimizer.step(loss)
    total = flatten_params([p.grad for p in params])
    loss()
    plain = flatten_params([p.grad for p in params])
    _, penalty = gradient_norm_penalty(loss, params, 0.05)
    torch.testing.assert_close(total, plain + flatten_params(penalty))


def test_state_goes_on_where_it_was(problem):
    net, params, loss, output, x = problem
    ours = SurrogateSharpness(torch.optim.Adam(params, 0.01), lam_lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, 0.9)
    for _ in range(3):
        ours.step(loss, output)
        scheduler.step()
    other = copy.deepcopy(net)
    theirs = list(other.parameters())
    again = SurrogateSharpness(torch.optim.Adam(theirs, 0.01), lam_lr=0.5)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    y = torch.zeros(16, 1).double()
    assert again.lam == ours.lam
    assert again.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**3)
    for _ in range(3):
        ours.step(closure(params, lambda: F.mse_loss(net(x), y)), output)
        again.step(closure(theirs, lambda: F.mse_loss(other(x), y)), closure(theirs, lambda: other(x).mean()))
    assert torch.equal(flatten_params(params), flatten_params(theirs))
    assert again.lam == ours.lam


def test_output_only_parameters_feel_the_penalty_alone():
    w, s = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    optimizer = SurrogateSharpness(torch.optim.SGD([w, s], 0.0), rho=1.0, lam=1.0, lam_lr=0.0)
    optimizer.step(closure([w, s], lambda: w.square().sum()), closure([w, s], lambda: s.pow(2).sum() / 2))
    torch.testing.assert_close(w.grad, torch.tensor([2.0]))
    torch.testing.assert_close(s.grad, torch.tensor([1.0]), rtol=1e-5, atol=1e-5)


def test_closures_without_backward_are_told():
    net = nn.Linear(2, 1)
    optimizer = SurrogateSharpness(torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(BadSetting, match="must call backward"):
        optimizer.step(lambda: net(torch.ones(1, 2)).sum())


def test_refusals():
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    for bad in ({"rho": -1.0}, {"r": 0.0}, {"lam_lr": -0.1}):
        with pytest.raises(BadSetting):
            SurrogateSharpness(base, **bad)


def test_multiplier_goes_where_the_weights_are_and_keeps_its_digits():
    far = SurrogateSharpness(torch.optim.SGD([nn.Parameter(torch.zeros(1, device="meta"))], 0.1))
    near = SurrogateSharpness(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    far.load_state_dict(near.state_dict())
    assert far.lam.device.type == "meta"
    near.load_state_dict(near.base.state_dict() | {"param_groups": [{"params": [0], "lr": 0.3}]})
    assert near.lam == torch.tensor(1e-3)
    w = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    low = SurrogateSharpness(torch.optim.SGD([w], 0.0), rho=0.05, lam=0.5, lam_lr=1e-3, eps=0.2)
    low.step(closure([w], lambda: (w**2).sum()))
    assert 0 < 0.5 - low.lam < 1e-3
