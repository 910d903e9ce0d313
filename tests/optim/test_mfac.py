import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.engine import checkpoint
from sfumato.errors import BadSetting, Diverged
from sfumato.nn import flatten_params
from sfumato.optim import MFAC, StaticInverseFisher

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "m-fac.npz")


def vector(name):
    return torch.from_numpy(VECTORS[name])


@pytest.mark.parametrize("cuts", [(), (5, 7)])
def test_equals_the_official_class(cuts):
    a, b = vector("opt_A"), vector("opt_b")
    params = [nn.Parameter(piece.clone()) for piece in vector("opt_w0").tensor_split(cuts)]
    names = {"lr": "opt_lr", "momentum": "opt_momentum", "weight_decay": "opt_wd", "damp": "opt_damp"}
    settings = {name: float(VECTORS[key]) for name, key in names.items()}
    opt = MFAC(params, ngrads=int(VECTORS["opt_ngrads"]), **settings)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (a @ torch.cat(params) - b).square().mean()
        loss.backward()
        return loss

    for expected in vector("opt_traj"):
        opt.step(closure)
        torch.testing.assert_close(flatten_params(params).detach(), expected, rtol=1e-8, atol=1e-12)


def problem(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(64, 6, dtype=dtype), torch.randint(3, (64,))

    def closure_at(step, opt):
        rows = slice(8 * (step % 8), 8 * (step % 8) + 8)

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            return loss

        return closure

    return net, closure_at


def run(net, closure_at, opt, steps, start=0):
    return [float(opt.step(closure_at(t, opt))) for t in range(start, start + steps)]


def test_steps_are_natural_gradients_of_the_window():
    net, closure_at = problem()
    opt = MFAC(net.parameters(), lr=0.3, ngrads=4, damp=0.01)
    grads = []
    for t in range(7):
        before = flatten_params(net).detach()
        opt.step(closure_at(t, opt))
        grads.append(flatten_params([p.grad for p in net.parameters()]))
        rows = torch.zeros(4, len(before), dtype=torch.float64)
        rows[: len(grads[-4:])] = torch.stack(grads[-4:])
        expected = before - 0.3 * StaticInverseFisher(rows, damp=0.01).mul(grads[-1])
        torch.testing.assert_close(flatten_params(net).detach(), expected, rtol=1e-9, atol=1e-12)


def test_strong_damping_is_gradient_descent():
    (net, closure_at), (other, other_at) = problem(), problem()
    run(net, closure_at, MFAC(net.parameters(), lr=0.1 * 1e8, damp=1e8, ngrads=4), 5)
    run(other, other_at, torch.optim.SGD(other.parameters(), lr=0.1), 5)
    torch.testing.assert_close(flatten_params(net), flatten_params(other), rtol=1e-6, atol=1e-7)


def test_it_trains():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net, closure_at = problem(dtype=dtype)
        opt = MFAC(net.parameters(), lr=0.02, ngrads=16, damp=1e-3, momentum=0.5, weight_decay=1e-4)
        losses = run(net, closure_at, opt, 60)
        assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
        assert all(p.dtype is dtype for p in net.parameters())


@pytest.mark.parametrize("settings", [{}, {"grad_dtype": "bfloat16"}, {"momentum": 0.9}, {"sparse": True}])
@pytest.mark.parametrize("at", [3, 9])  # while the window fills, and in the middle of its second round
def test_resume_is_bit_equal(settings, at, tmp_path):
    settings = {"lr": 0.05, "ngrads": 6, "damp": 1e-2, "weight_decay": 1e-3, **settings}

    def fresh():
        net, closure_at = problem(dtype=torch.float32)
        with torch.no_grad():
            net[0].weight[:, ::2] = 0
        return net, closure_at, MFAC(net.parameters(), **settings)

    net, closure_at, opt = fresh()
    run(net, closure_at, opt, at)
    checkpoint.save(tmp_path / "step-0.safetensors", {"net": net.state_dict(), "opt": opt.state_dict()})
    again, again_at, resumed = fresh()
    saved = checkpoint.read(tmp_path / "step-0.safetensors")
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    clone_of_all = copy.deepcopy((net, opt))
    kept = saved["opt"]["state"][0]["grads"].clone()
    for model, at_step, optimizer in ((net, closure_at, opt), (again, again_at, resumed)):
        run(model, at_step, optimizer, 8, start=at)
    assert torch.equal(flatten_params(net), flatten_params(again))
    assert torch.equal(saved["opt"]["state"][0]["grads"], kept)  # the checkpoint is not written to
    state = next(iter(resumed.state.values()))
    assert state["grads"].dtype is (torch.bfloat16 if "grad_dtype" in settings else torch.float32)
    assert state["gram"].dtype is torch.float64
    copied, optimizer = clone_of_all
    for p, q in zip(copied.parameters(), net.parameters(), strict=True):
        p.grad = q.grad
    optimizer.step()
    assert not torch.equal(flatten_params(copied), flatten_params(net))


def test_settings_of_the_checkpoint_win():
    net, closure_at = problem()
    opt = MFAC(net.parameters(), ngrads=4)
    run(net, closure_at, opt, 2)
    other = MFAC(net.parameters(), ngrads=9)
    other.load_state_dict(opt.state_dict())
    run(net, closure_at, other, 1)
    assert other.param_groups[0]["ngrads"] == 4


def test_groups_differ_in_rate_momentum_and_decay():
    a, b = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    opt = MFAC([{"params": [a]}, {"params": [b], "lr": 0.5, "momentum": 0.75, "weight_decay": 2.0}], lr=0.1, damp=0.3, ngrads=2)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    a.grad, b.grad = torch.full_like(a, 2.0), torch.full_like(b, -1.0)
    g = torch.cat([a.grad, b.grad + 2])
    step = g / (0.3 + g @ g / 2)
    opt.step()
    torch.testing.assert_close(a.detach(), 1 - 0.1 * step[:3])
    torch.testing.assert_close(b.detach(), 1 - 0.5 * 0.25 * step[3:])
    schedule.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.25]
    with pytest.raises(BadSetting, match="one window"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "damp": 0.1})


def test_clipped_gradients_enter_the_window():
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = MFAC([theta], lr=1, damp=1.0, ngrads=1)
    theta.grad = torch.tensor([30.0, 40.0], dtype=torch.float64)
    nn.utils.clip_grad_norm_([theta], 5.0)
    opt.step()
    torch.testing.assert_close(theta.detach(), -torch.tensor([3.0, 4.0], dtype=torch.float64) / 26, rtol=1e-6, atol=0)


def test_zero_weights_stay_zero_and_take_no_place():
    net, closure_at = problem()
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    opt = MFAC(net.parameters(), lr=0.1, ngrads=5, damp=1e-2, sparse=True, momentum=0.5)
    before = flatten_params(net).detach()
    run(net, closure_at, opt, 6)
    after = flatten_params(net).detach()
    assert torch.equal(after == 0, before == 0)
    kept = before != 0
    state = opt.state[net[0].weight]
    assert state["grads"].shape == (5, int(kept.sum()))
    alone, alone_at = problem()
    with torch.no_grad():
        alone[0].weight[:, ::2] = 0
    masked = MFAC(alone.parameters(), lr=0.1, ngrads=5, damp=1e-2, momentum=0.5)
    for t in range(6):
        closure = alone_at(t, masked)

        def without(closure=closure):
            loss = closure()
            alone[0].weight.grad[:, ::2] = 0
            return loss

        masked.step(without)
    torch.testing.assert_close(flatten_params(alone).detach(), after)
    zero = nn.Parameter(torch.zeros(3))
    zero.grad = torch.ones(3)
    nothing = MFAC([zero], sparse=True)
    with pytest.raises(BadSetting, match="every weight is zero"):
        nothing.step()


def test_parameters_freeze_thaw_and_join():
    """At every moment the step is that of a window over those that train, with zeros where they did not."""
    a, b, c = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (2, 3, 4))
    opt = MFAC([a, b], lr=1.0, ngrads=3, damp=0.1)
    rows = torch.randn(7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(7, 9, dtype=torch.float64)
    for t, row in enumerate(rows):
        if t == 2:
            opt.add_param_group({"params": [c]})
        a.requires_grad_(t not in (3, 4))
        a.grad, b.grad, c.grad = row[:2].clone(), row[2:5].clone(), row[5:].clone()
        active = torch.tensor([a.requires_grad] * 2 + [True] * 3 + [t >= 2] * 4)
        seen[t, active] = row[active]
        seen[:t, ~active] = 0  # what is frozen is forgotten
        before = torch.cat([a, b, c]).detach()
        opt.step()
        window = torch.zeros(3, int(active.sum()), dtype=torch.float64)
        latest = seen[max(0, t - 2) : t + 1, active]
        window[: len(latest)] = latest
        expected = before.clone()
        expected[active] -= StaticInverseFisher(window, damp=0.1).mul(row[active])
        torch.testing.assert_close(torch.cat([a, b, c]).detach(), expected)
    assert sum("grads" in state for state in opt.state.values()) == 1


def test_parameters_without_gradient_stay():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = MFAC([a, b], ngrads=2, weight_decay=0.1)
    assert opt.step() is None
    assert opt.step(lambda: 3.0) == 3.0
    for without in (b, a):
        before = without.detach().clone()
        a.grad = b.grad = torch.ones(2)
        without.grad = None
        opt.step()
        assert torch.equal(without.detach(), before)
    assert not torch.equal(a.detach(), torch.ones(2))
    for p in (a, b):
        p.requires_grad_(False)
    with pytest.raises(BadSetting, match="nothing to train"):
        opt.step()


@pytest.mark.parametrize("named", [False, True])
def test_a_gradient_that_is_not_finite_is_named(named):
    net, closure_at = problem()
    opt = MFAC(net.named_parameters() if named else net.parameters(), ngrads=3)
    run(net, closure_at, opt, 4)
    before, state = flatten_params(net).detach(), copy.deepcopy(opt.state_dict())
    closure_at(4, opt)()
    net[2].weight.grad[1, 2] = math.nan
    name = r"2\.weight" if named else r"parameter 2 of group 0, shape \(3, 5\),"
    with pytest.raises(Diverged, match=rf"the gradient of {name} is not finite at step 5"):
        opt.step()
    assert torch.equal(flatten_params(net).detach(), before)
    assert torch.equal(opt.state_dict()["state"][0]["grads"], state["state"][0]["grads"])
    run(net, closure_at, opt, 1)
    big, closure_at = nn.Parameter(torch.ones(2)), None
    big.grad = torch.full((2,), 1e30)
    with pytest.raises(Diverged, match="norm overflows"):
        MFAC([big], ngrads=2).step()


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1}, {"momentum": 1.0}, {"weight_decay": -1}, {"ngrads": 0}, {"damp": 0}, {"grad_dtype": "int8"},
     {"grad_dtype": torch.float16}],
)  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(BadSetting, match=next(iter(bad))):
        MFAC([nn.Parameter(torch.zeros(1))], **bad)


def test_complex_sparse_and_large_are_refused():
    with pytest.raises(BadSetting, match="real, dense"):
        MFAC([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 2, sparse=True)
    opt = MFAC(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(BadSetting, match="sparse=False"):
        opt.step()
    theta = nn.Parameter(torch.ones(1000))
    theta.grad = torch.ones(1000)
    opt = MFAC([theta], ngrads=10**12)
    with pytest.raises(BadSetting, match=r"takes 4,000,000,000,000,000 bytes"):
        opt.step()
    opt.param_groups[0]["ngrads"] = 2
    opt.step()
    assert not torch.equal(theta.detach(), torch.ones(1000))
