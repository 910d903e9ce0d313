import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from sfumato.data import Batch
from sfumato.engine import fit
from sfumato.errors import BadSetting
from sfumato.method import Loss, Method
from sfumato.nn import flatten_params
from sfumato.optim import AdaHessian, PerpGrad, project_out_weights_

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "stablemax-perpgrad.npz").items()}


def parameter(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
    p.grad = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return p


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    return net, lambda: F.cross_entropy(net(x), y)


def train(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("form", ["backward", "closure"])
@pytest.mark.parametrize("prefix", ["a", "b"])
def test_equals_the_official_wrapper(prefix, form):
    w, b, x, y = (VECTORS[f"{prefix}_pg_{name}"].clone() for name in "WbXY")
    w, b = nn.Parameter(w), nn.Parameter(b)
    optimizer = PerpGrad(SGD([w, b], lr=0.1) if prefix == "a" else AdamW([w, b], lr=0.01, weight_decay=0))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, w, b), y)
        loss.backward()
        return loss

    for weights, grads in zip(VECTORS[f"{prefix}_pg_traj"], VECTORS[f"{prefix}_pg_perp_grads"], strict=True):
        if form == "closure":
            assert optimizer.step(closure).ndim == 0
        else:
            closure()
            optimizer.step()
        torch.testing.assert_close(flatten_params([w.grad, b.grad]), grads, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(flatten_params([w, b]).detach(), weights, atol=1e-10, rtol=1e-10)


def rows(p, per):
    """Weights and gradients as the vectors that count, `[vectors, length]`."""
    shape = (len(p), -1) if per == "row" and p.ndim > 1 else (1, -1)
    return p.detach().reshape(shape), p.grad.reshape(shape)


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_right_angles_and_lengths(per):
    params = [parameter(5, 4), parameter(7, seed=1), parameter(3, 2, 3, 3, seed=2)]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    before = [p.grad.clone() for p in params]
    project_out_weights_(params, per)
    for p, old in zip(params, before, strict=True):
        w, g = rows(p, per)
        assert ((w * g).sum(1).abs() <= 1e-12 * w.norm(dim=1) * g.norm(dim=1)).all()
        torch.testing.assert_close(g.norm(dim=1), old.reshape(g.shape).norm(dim=1))
        change = (g / g.norm(dim=1, keepdim=True)) - old.reshape(g.shape) / old.reshape(g.shape).norm(dim=1, keepdim=True)
        assert change.norm() > 0.01
        direction = old.reshape(g.shape) - (w * old.reshape(g.shape)).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        torch.testing.assert_close(F.normalize(g), F.normalize(direction))


def test_all_parameters_as_one_vector():
    params, alone = [parameter(5, 4), parameter(7, seed=1)], parameter(5, 4)
    whole = nn.Parameter(flatten_params(params).detach())
    whole.grad = flatten_params([p.grad for p in params])
    project_out_weights_(params, "global")
    project_out_weights_([whole])
    torch.testing.assert_close(flatten_params([p.grad for p in params]), whole.grad)
    project_out_weights_([alone])
    assert not torch.allclose(params[0].grad, alone.grad), "not the same as each tensor for itself"


def test_zero_weights_and_gradients_along_the_weights():
    zero, along, scalar = parameter(4), parameter(50, seed=1), parameter(1, seed=2)
    zero.data.zero_()
    along.grad = 0.3 * along.detach()
    kept = zero.grad.clone()
    still = parameter(3, seed=3)
    still.grad.zero_()
    project_out_weights_([zero, along, scalar, still])
    torch.testing.assert_close(zero.grad, kept)
    for p in (along, scalar, still):
        assert (p.grad == 0).all(), "rounding is not blown up to full length"


def test_almost_along_the_weights_keeps_its_length():
    w = parameter(50)
    other = torch.randn(50, dtype=torch.float64)
    w.grad = w.detach() + 1e-9 * other
    length = w.grad.norm()
    project_out_weights_([w])
    torch.testing.assert_close(w.grad.norm(), length)
    assert (w.grad @ w.detach()).abs() < 1e-5 * length * w.detach().norm()


def test_sgd_step_lengthens_the_weights_by_its_square():
    w = parameter(6, 3)
    squared, g = w.detach().square().sum(), w.grad.clone()
    PerpGrad(SGD([w], lr=0.1)).step()
    torch.testing.assert_close(w.detach().square().sum() - squared, 0.01 * g.square().sum())


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_a_single_number_has_no_right_angle(per):
    p = parameter()
    project_out_weights_([p], per)
    assert p.grad == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types(dtype):
    p, zero = parameter(64, 16, dtype=dtype), parameter(8, seed=1, dtype=dtype)
    exact = parameter(64, 16)
    zero.data.zero_()
    project_out_weights_([p, zero, exact])  # types may be mixed
    assert p.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (p.grad.double() - exact.grad).norm() < 4 * eps * exact.grad.norm()
    assert zero.grad.isfinite().all()
    assert not p.grad.requires_grad


def test_diverged_gradients_are_not_hidden():
    p = parameter(4)
    p.grad[0] = float("nan")
    project_out_weights_([p])
    assert p.grad.isnan().any()


def test_groups_have_their_own_kind():
    params = [parameter(4, 3, seed=s) for s in range(4)]
    before = [p.grad.clone() for p in params]
    groups = [{"params": params[0]}, {"params": params[1], "per": None}, {"params": params[2], "per": "row", "lr": 0.0}]
    optimizer = PerpGrad(SGD(groups, lr=0.1))
    optimizer.add_param_group({"params": params[3], "lr": 0.2})
    assert optimizer.base.param_groups is optimizer.param_groups
    assert [g["per"] for g in optimizer.param_groups] == ["tensor", None, "row", "tensor"]
    start = [p.detach().clone() for p in params]
    optimizer.step()
    assert torch.equal(params[1].grad, before[1])
    assert torch.equal(params[2], start[2])
    torch.testing.assert_close((params[2].detach() * params[2].grad).sum(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(params[3].detach(), start[3] - 0.2 * params[3].grad)
    assert (params[3].grad * start[3]).sum().abs() < 1e-12


@pytest.mark.parametrize("into", ["wrapped", "base alone"])
def test_state_round_trip(into):
    net, loss = problem()
    optimizer = PerpGrad(AdamW(net.parameters(), lr=0.01))
    train(optimizer, loss, 4)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    if into == "base alone":
        for group in state["param_groups"]:
            del group["per"]  # what AdamW alone had saved
    train(optimizer, loss, 4)
    again, loss = problem()
    again.load_state_dict(weights)
    resumed = PerpGrad(AdamW(again.parameters(), lr=0.5))
    resumed.load_state_dict(state)
    assert resumed.param_groups is resumed.base.param_groups
    assert resumed.state is resumed.base.state
    train(resumed, loss, 4)
    assert torch.equal(flatten_params(again), flatten_params(net))


def test_copies_are_whole():
    net, loss = problem()
    optimizer = PerpGrad(AdamW(net.parameters(), lr=0.01), per="row")
    train(optimizer, loss, 2)
    twin = copy.deepcopy(optimizer)
    assert twin.base.param_groups is twin.param_groups
    assert twin.base.state is twin.state
    params = twin.param_groups[0]["params"]
    assert all(p is not q for p, q in zip(params, net.parameters(), strict=True))
    for p, q in zip(params, net.parameters(), strict=True):
        p.grad = q.grad = torch.ones_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(flatten_params(params), flatten_params(net))
    assert "PerpGrad" in repr(twin)


def test_schedulers_and_clipping():
    net, loss = problem()
    optimizer = PerpGrad(SGD(net.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    start = flatten_params(net).detach()
    optimizer.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    torch.testing.assert_close((flatten_params(net).detach() - start).norm().item(), 0.1 * 1e-3, rtol=1e-5, atol=0)
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    assert scheduler.get_last_lr() == [0.05]


def test_every_gradient_of_a_line_search_is_projected():
    net, loss = problem()
    optimizer = PerpGrad(LBFGS(net.parameters(), max_iter=3))
    calls = []

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        calls.append(value.item())
        return value

    optimizer.step(closure)
    assert len(calls) > 1
    for p in net.parameters():
        assert (p.grad * p.detach()).sum().abs() < 1e-10 or p.ndim == 1


def test_second_order_closures_of_the_engine():
    """AdaHessian inside: the products are left alone, the gradient is projected."""

    class Objective:
        def __init__(self, loss, params):
            self.loss, self.params = loss, params

        def __call__(self):
            return self.hvp(None)[0]

        @torch.enable_grad()
        def hvp(self, z):
            value = self.loss()
            grads = torch.autograd.grad(value, self.params, create_graph=True)
            products = torch.autograd.grad(grads, self.params, z) if z is not None else []
            for p, g in zip(self.params, grads, strict=True):
                p.grad = g.detach()
            return value.detach(), products

    net, loss = problem()
    params = list(net.parameters())
    optimizer = PerpGrad(AdaHessian(params))
    start = [p.detach().clone() for p in params]
    optimizer.step(Objective(loss, params))
    assert all((p.grad * w).sum().abs() < 1e-12 for p, w in zip(params, start, strict=True))
    assert not torch.equal(params[0], start[0])
    net, loss = problem()
    with pytest.raises(BadSetting, match=r"loss\.backward"):
        PerpGrad(AdaHessian(net.parameters())).step(loss)


class Line(Method):
    def __init__(self, config=None):
        super().__init__(config)
        self.w = nn.Parameter(torch.tensor([[3.0, 1.0]]))

    def loss(self, batch, ctx):
        return Loss((batch.x.flatten(1) @ self.w.T - 1).square().mean(), len(batch))

    def optimizers(self):
        return {"net": PerpGrad(SGD([self.w], lr=0.1))}


def test_trains_in_the_engine():
    x = torch.tensor([0.2, 0.9]).view(1, 1, 1, 2).repeat(8, 1, 1, 1)
    method = fit(Line(), x, steps=60, progress=False, device="cpu")
    assert method.loss(Batch(x, torch.arange(8)), None).value < 0.01 < Line().loss(Batch(x, torch.arange(8)), None).value
    assert method.w.detach().norm() >= 10**0.5, "steps at right angles only lengthen the weights"


def test_bad_input_is_told():
    with pytest.raises(BadSetting, match="per='column'"):
        PerpGrad(SGD([parameter(2)], lr=0.1), per="column")
    optimizer = PerpGrad(SGD([parameter(2)], lr=0.1))
    with pytest.raises(BadSetting, match="per='x'"):
        optimizer.add_param_group({"params": parameter(3), "per": "x"})
    with pytest.raises(BadSetting, match="per=None"):
        project_out_weights_([parameter(2)], None)
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(BadSetting, match="sparse=False"):
        PerpGrad(SGD(embedding.parameters(), lr=0.1)).step()
    phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    phase.grad = torch.ones_like(phase)
    with pytest.raises(BadSetting, match="real"):
        project_out_weights_([phase])
    project_out_weights_([nn.Parameter(torch.ones(2))])  # nothing to do
