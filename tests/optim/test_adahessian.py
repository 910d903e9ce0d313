import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn import flatten_params
from sfumato.optim import AdaHessian, spatial_average

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "adahessian.npz")


def vector(name):
    return torch.from_numpy(VECTORS[name])


def reference_net(prefix):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(vector(f"{prefix}_p{i}_init"))
    return net


class Objective:
    """The engine's closure in small: averages over micro-batches, fills `.grad`, and gives Hessian-vector products."""

    def __init__(self, loss, parts, params):
        self.loss, self.parts, self.params, self.calls = loss, parts, params, []

    @torch.enable_grad()
    def run(self, z):
        value = sum(self.loss(part) for part in self.parts) / len(self.parts)
        grads = torch.autograd.grad(value, self.params, create_graph=z is not None)
        products = torch.autograd.grad(grads, self.params, z) if z is not None else None
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.detach()
        return value.detach(), products

    def __call__(self):
        self.calls.append("gradient")
        return self.run(None)[0]

    def hvp(self, z):
        self.calls.append("hvp")
        return self.run(z)


def take_step(form, optimizer, loss, params):
    """The three calling forms, by name."""
    if form == "closure":
        return optimizer.step(loss)
    if form == "objective":
        return optimizer.step(Objective(lambda _: loss(), [None], params))
    optimizer.zero_grad()
    value = loss()
    value.backward(create_graph=True)
    optimizer.step()
    return value


@pytest.mark.parametrize("form", ["closure", "objective", "backward"])
@pytest.mark.parametrize("prefix", ["a", "b"])
def test_equals_the_official_class(prefix, form):
    net = reference_net(prefix)
    x, y = vector(f"{prefix}_x"), vector(f"{prefix}_y")
    names = {"lr": "lr", "weight_decay": "wd", "hessian_power": "hessian_power", "eps": "eps"}
    settings = {k: float(VECTORS[f"{prefix}_{v}"]) for k, v in names.items()}
    betas = (float(VECTORS[f"{prefix}_beta1"]), float(VECTORS[f"{prefix}_beta2"]))
    params = list(net.parameters())
    opt = AdaHessian(params, betas=betas, noise=vector(f"{prefix}_rademacher"), **settings)
    for expected, trajectory in zip(vector(f"{prefix}_losses"), vector(f"{prefix}_params_traj"), strict=True):
        loss = take_step(form, opt, lambda: F.cross_entropy(net(x), y), params)
        torch.testing.assert_close(loss.detach(), expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(flatten_params(net).detach(), trajectory, atol=1e-10, rtol=0)
    for key, name in (("exp_avg", "m"), ("exp_hessian_sq", "v")):
        state = flatten_params([opt.state[p][key] for p in params])
        torch.testing.assert_close(state, vector(f"{prefix}_{name}_final"), atol=1e-10, rtol=0)
    kernels = opt.state[params[0]]["exp_hessian_sq"].flatten(2)
    assert torch.equal(kernels, kernels[..., :1].expand_as(kernels))
    assert opt.state[params[2]]["exp_hessian_sq"].unique().numel() > 4
    assert not any(p.grad.requires_grad for p in params)


@pytest.mark.parametrize(("power", "expected"), [(1.0, 1 - 0.1), (0.0, 1 - 0.1 * 7 / (1 + 0.5))])
def test_one_step_on_a_parabola(power, expected):
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = AdaHessian([theta], lr=0.1, betas=(0, 0), eps=0.5 * (1 - power), hessian_power=power)
    opt.step(lambda: 3.5 * theta.square().sum())
    assert theta.item() == pytest.approx(expected, abs=1e-15)


def test_signs_do_not_matter_where_the_hessian_is_diagonal():
    finals = []
    for seed in (0, 1):
        theta = nn.Parameter(torch.linspace(1, 2, 9, dtype=torch.float64))
        opt = AdaHessian([theta], generator=torch.Generator().manual_seed(seed))
        for _ in range(5):
            opt.step(lambda: (torch.arange(9) * theta**4).sum())  # noqa: B023
        finals.append(theta.detach())
    assert torch.equal(*finals)


def test_weight_decay_is_decoupled():
    theta = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    AdaHessian([theta], lr=0.1, weight_decay=0.5).step(lambda: (0 * theta).sum())
    torch.testing.assert_close(theta.detach(), torch.tensor([2.0, -3.0], dtype=torch.float64) * 0.95, atol=0, rtol=1e-15)


def test_scaling_of_parameters_changes_nothing():
    a = torch.logspace(0, 6, 13, dtype=torch.float64)
    curves = []
    for s in (torch.ones_like(a), torch.logspace(-2, 2, 13, dtype=torch.float64).flip(0)):
        theta = nn.Parameter(1 / s)
        opt = AdaHessian([theta], eps=0)
        curves.append(torch.stack([opt.step(lambda: (a * (s * theta) ** 2).sum() / 2).detach() for _ in range(301)]))  # noqa: B023
    relative = curves[0] / curves[0][0]
    assert relative[63] < 1e-8  # passes through zero, as a heavy ball does,
    assert relative[163:].max() < 1e-8  # and from here on stays below
    assert relative[300] < 1e-14
    torch.testing.assert_close(curves[0][:100], curves[1][:100], rtol=1e-10, atol=0)


def small_problem(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()
    x, y = torch.randn(4, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    return net, lambda: F.cross_entropy(net(x), y)


@pytest.mark.parametrize("settings", [{}, {"samples": 2}, {"hessian_every": 3}, {"block": 4}, {"average": "signed"}])
def test_forms_agree(settings):
    ends = []
    for form in ("closure", "objective", "backward"):
        net, loss = small_problem()
        opt = AdaHessian(net.parameters(), generator=torch.Generator().manual_seed(3), **settings)
        for _ in range(5):
            take_step(form, opt, loss, list(net.parameters()))
        ends.append(flatten_params(net).detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-14)


def test_a_closure_that_calls_backward_with_graph_is_the_same():
    ends = []
    for calls_backward in (False, True):
        net, loss = small_problem()
        opt = AdaHessian(net.parameters())

        def closure():
            opt.zero_grad()  # noqa: B023
            value = loss()  # noqa: B023
            if calls_backward:  # noqa: B023
                value.backward(create_graph=True)
            return value

        opt.step(closure)
        ends.append(flatten_params(net).detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("every", [1, 3])
def test_resume_is_bit_equal(every):
    settings = {"hessian_every": every, "samples": 2}
    net, loss = small_problem()
    opt = AdaHessian(net.parameters(), generator=torch.Generator().manual_seed(7), **settings)
    for _ in range(4):
        opt.step(loss)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())
    for _ in range(4):
        opt.step(loss)
    again, loss = small_problem()
    again.load_state_dict(weights)
    resumed = AdaHessian(again.parameters(), generator=torch.Generator().manual_seed(8), **settings)
    resumed.load_state_dict(state)
    for _ in range(4):
        resumed.step(loss)
    assert torch.equal(flatten_params(again), flatten_params(net))


def plain(tree):
    if isinstance(tree, dict):
        return all(plain(v) for v in tree.values())
    if isinstance(tree, (list, tuple)):
        return all(plain(v) for v in tree)
    return isinstance(tree, (torch.Tensor, int, float, str))


def test_state_is_made_of_plain_values():
    net, loss = small_problem()
    opt = AdaHessian(net.parameters())
    opt.step(loss)
    assert plain(opt.state_dict())


def test_signs_are_the_same_in_every_process_and_change_every_step():
    p = [nn.Parameter(torch.zeros(200)), nn.Parameter(torch.zeros(2, 100, dtype=torch.float64))]
    first, second = (AdaHessian(p, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    z = [torch.cat([t.double().flatten() for t in first._signs(p, draw)]) for draw in range(2)]
    assert set(z[0].tolist()) == {-1.0, 1.0}
    assert not torch.equal(*z)
    assert torch.equal(z[0], torch.cat([t.double().flatten() for t in second._signs(p, 0)]))
    other = AdaHessian(p, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(z[0], torch.cat([t.double().flatten() for t in other._signs(p, 0)]))


def test_curvature_every_third_step():
    net, loss = small_problem()
    params = list(net.parameters())
    objective = Objective(lambda _: loss(), [None], params)
    opt = AdaHessian(params, hessian_every=3)
    v = []
    for _ in range(5):
        opt.step(objective)
        v.append(flatten_params([opt.state[p]["exp_hessian_sq"] for p in params]).clone())
    assert objective.calls == ["hvp", "gradient", "gradient", "hvp", "gradient"]
    assert torch.equal(v[0], v[2])
    assert not torch.equal(v[2], v[3])
    assert (opt.state[params[0]]["step"], opt.state[params[0]]["hessian_step"]) == (5, 2)


def test_samples_average_before_the_square():
    h = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = h + h.T
    z = torch.tensor([[1.0, 1, -1, 1, -1, 1], [1, -1, -1, 1, 1, 1]], dtype=torch.float64)
    theta = nn.Parameter(torch.ones(6, dtype=torch.float64))
    opt = AdaHessian([theta], samples=2, noise=z, betas=(0.9, 0.5))
    opt.step(lambda: theta @ h @ theta / 2)
    torch.testing.assert_close(opt.state[theta]["exp_hessian_sq"], 0.5 * (z * (z @ h)).mean(0) ** 2)


def test_groups_have_their_own_settings():
    a, b = (nn.Parameter(torch.ones(2, 4, dtype=torch.float64)) for _ in range(2))
    opt = AdaHessian([{"params": [a]}, {"params": [b], "lr": 0.01, "weight_decay": 1.0, "block": 4}], betas=(0, 0), eps=0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    scale = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    opt.step(lambda: (scale * (a**2 + b**2)).sum() / 2)
    torch.testing.assert_close(a.detach(), torch.full_like(a, 0.85))
    torch.testing.assert_close(b.detach(), (1 - 0.01 - 0.01 * scale / 2.5).expand(2, 4))
    scheduler.step()
    opt.step(lambda: (scale * (a**2 + b**2)).sum() / 2)
    torch.testing.assert_close(a.detach(), torch.full_like(a, 0.85 * 0.925))


def test_a_parameter_thawed_later_gets_its_own_bias_correction():
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    b.requires_grad_(False)
    opt = AdaHessian([a, b], eps=0, hessian_every=4)
    for step in range(9):
        assert torch.equal(b, torch.ones_like(b))
        b.requires_grad_(step >= 5)
        opt.step(lambda: (a**2 + b**2).sum())
    torch.testing.assert_close(b.detach(), torch.full_like(b, 0.85))  # the first step of a parabola, at the next curvature


def test_parameters_outside_the_loss_stay():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = AdaHessian([a, b], hessian_every=2)
    for due in (True, False):
        opt.zero_grad()
        (a**2).sum().backward(create_graph=due)
        opt.step()
    assert torch.equal(b, torch.ones(2))
    assert not torch.equal(a, torch.ones(2))


def test_missing_graph_is_told_and_gradients_survive():
    net, loss = small_problem()
    opt = AdaHessian(net.parameters(), hessian_every=2)
    loss().backward()
    with pytest.raises(BadSetting, match="create_graph=True"):
        opt.step()
    assert all(p.grad is not None for p in net.parameters())
    opt.zero_grad()
    loss().backward(create_graph=True)
    opt.step()
    opt.zero_grad()
    loss().backward()  # no curvature is due now
    opt.step()


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": -1}, {"weight_decay": -1}, {"hessian_power": 2}, {"block": 0}, {"block": "x"},
     {"samples": 0}, {"hessian_every": 0}, {"average": "mean"}],
)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(BadSetting, match=next(iter(settings))):
        AdaHessian([nn.Parameter(torch.zeros(1))], **settings)


def test_complex_sparse_and_used_up_noise_are_refused():
    with pytest.raises(BadSetting, match="real, dense"):
        AdaHessian([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 2, sparse=True)
    opt = AdaHessian(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(BadSetting, match="sparse"):
        opt.step()
    theta = nn.Parameter(torch.ones(2))
    opt = AdaHessian([theta], noise=torch.ones(1, 2))
    opt.step(lambda: theta.square().sum())
    with pytest.raises(BadData, match="1 rows"):
        opt.step(lambda: theta.square().sum())
    with pytest.raises(BadSetting, match="return the loss"):
        AdaHessian([theta]).step(lambda: None)


def test_fused_attention_works_inside_a_closure():
    q = nn.Parameter(torch.randn(1, 1, 4, 8))

    def loss():
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    opt = AdaHessian([q])
    before = loss()
    for _ in range(3):
        opt.step(loss)
    assert loss() < before
    loss().backward(create_graph=True)
    with pytest.raises(BadSetting, match="sdpa_kernel"):
        opt.step()


def test_spatial_average():
    d = torch.arange(24.0)
    assert torch.equal(spatial_average(d, (2, 12), "conv"), d)
    assert torch.equal(spatial_average(d, (24,), 4), d)
    assert spatial_average(d.view(2, 3, 4), (2, 3, 4), "conv").flatten()[:5].tolist() == [1.5, 1.5, 1.5, 1.5, 5.5]
    assert spatial_average(d.view(4, 6), (4, 6), 5)[3].tolist() == [17, 17, 21.5, 21.5, 21.5, 21.5]
    assert torch.equal(spatial_average(d.view(2, 12), (2, 12), None), d.view(2, 12))
    kernels = torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last)
    averaged = spatial_average(kernels, kernels.shape, "conv")
    assert averaged.stride() == kernels.stride()
    torch.testing.assert_close(averaged, kernels.mean((2, 3), keepdim=True).expand_as(kernels))


def test_bfloat16_and_float32_parameters_train():
    for dtype in (torch.bfloat16, torch.float32):
        theta = nn.Parameter(torch.ones(4, dtype=dtype))
        opt = AdaHessian([theta])
        for _ in range(5):
            opt.step(lambda: theta.square().sum())  # noqa: B023
        assert theta.dtype is dtype
        assert theta.abs().max() < 0.6
