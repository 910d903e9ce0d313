from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sfumato.errors import BadData, BadSetting
from sfumato.nn import flatten_params
from sfumato.probes import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    InputJacobianOperator,
    JacobianOperator,
)

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "curvature-base.npz")
OPERATORS = {"HV": HessianOperator, "GV": GGNOperator, "EV": EmpiricalFisherOperator}
DENSE = {"HV": "hessian", "GV": "ggn", "EV": "ef"}


def half_squares(outputs, targets):
    return (outputs - targets).square().sum() / 2 / len(outputs)


def vector(name):
    return torch.from_numpy(VECTORS[name])


def problem(kind):
    """The reference net with its weights, loss and data."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    nn.utils.vector_to_parameters(vector(f"{kind}_theta"), net.parameters())
    loss = F.cross_entropy if kind == "ce" else half_squares
    return net, loss, (vector(f"{kind}_X"), vector(f"{kind}_y"))


@pytest.fixture(params=["ce", "mse"])
def kind(request):
    return request.param


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_reference_vectors_in_both_modes(kind, name, forward_mode):
    op = OPERATORS[name](*problem(kind))
    op.forward_mode = forward_mode
    torch.testing.assert_close(op @ vector(f"{kind}_V").T, vector(f"{kind}_{name}").T, atol=1e-9, rtol=0)
    torch.testing.assert_close(op @ vector(f"{kind}_V")[1], vector(f"{kind}_{name}")[1], atol=1e-9, rtol=0)
    torch.testing.assert_close(op.dense(), vector(f"{kind}_{DENSE[name]}"), atol=1e-9, rtol=0)
    assert op.forward_mode is forward_mode
    assert (op.shape, op.dtype, op.device) == ((57, 57), torch.float64, torch.device("cpu"))
    assert op.T is op


@pytest.mark.parametrize("name", OPERATORS)
def test_batches_of_unequal_size_make_no_difference(kind, name):
    net, loss, (x, y) = problem(kind)
    whole = OPERATORS[name](net, loss, (x, y)).dense()
    for data in ([(x[:4], y[:4]), (x[4:], y[4:])], DataLoader(TensorDataset(x, y), batch_size=3)):
        torch.testing.assert_close(OPERATORS[name](net, loss, data, chunk=10).dense(), whole, atol=1e-12, rtol=0)


def test_a_held_hessian_of_one_batch_looks_once_and_forgets(kind):
    """Equal products from one forward pass; weights that change afterwards are seen."""
    net, loss, data = problem(kind)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    hessian = HessianOperator(net, loss, data)
    expected = vector(f"{kind}_{DENSE['HV']}")
    with hessian.held():
        for v in torch.eye(len(expected), dtype=torch.float64)[:5]:
            assert torch.allclose(hessian @ v, expected @ v, atol=1e-9)
        with hessian.held():  # as `eigs` does inside
            hessian @ torch.ones(len(expected))
    assert len(calls) == 1
    before = hessian @ torch.ones(len(expected))
    with torch.no_grad():
        net[0].weight.mul_(2)
    with hessian.held():
        assert not torch.allclose(hessian @ torch.ones(len(expected)), before)


def test_over_batches_nothing_is_held(kind):
    net, loss, (x, y) = problem(kind)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    hessian = HessianOperator(net, loss, [(x[:3], y[:3]), (x[3:], y[3:])])
    with hessian.held():
        for _ in range(3):
            hessian @ torch.ones(hessian.shape[0])
    assert len(calls) == 6


def test_gauss_newton_and_fisher_are_positive_and_not_equal(kind):
    ops = {name: op(*problem(kind)).dense() for name, op in OPERATORS.items()}
    for name in ("GV", "EV"):
        assert torch.linalg.eigvalsh(ops[name])[0] > -1e-10
    assert torch.linalg.eigvalsh(ops["HV"])[0] < -1e-3
    assert (ops["GV"] - ops["EV"]).norm() > 0.1 * ops["GV"].norm()


def test_hessian_is_the_central_difference_of_the_gradient(kind):
    net, loss, (x, y) = problem(kind)
    v = vector(f"{kind}_V")[0]
    theta = flatten_params(net).detach()

    def gradient(at):
        nn.utils.vector_to_parameters(at, net.parameters())
        return flatten_params(torch.autograd.grad(loss(net(x), y), list(net.parameters())))

    difference = (gradient(theta + 1e-5 * v) - gradient(theta - 1e-5 * v)) / 2e-5
    nn.utils.vector_to_parameters(theta, net.parameters())
    torch.testing.assert_close(HessianOperator(net, loss, (x, y)) @ v, difference, atol=1e-6, rtol=1e-6)


def test_linear_models():
    x, y, labels = torch.randn(9, 4).double(), torch.randn(9, 2).double(), torch.randint(3, (9,))
    net = nn.Linear(4, 2, bias=False).double()
    expected = torch.kron(torch.eye(2, dtype=torch.float64), x.T @ x / 9)
    torch.testing.assert_close(HessianOperator(net, half_squares, (x, y)).dense(), expected)
    torch.testing.assert_close(GGNOperator(net, half_squares, (x, y)).dense(), expected)
    softmax = nn.Linear(4, 3).double()
    hessian, ggn = (op(softmax, F.cross_entropy, (x, labels)).dense() for op in (HessianOperator, GGNOperator))
    torch.testing.assert_close(hessian, ggn)


def test_monte_carlo_fisher_is_fixed_and_tends_to_gauss_newton():
    net, loss, (x, y) = problem("ce")
    ggn = GGNOperator(net, loss, (x, y)).dense()
    many = (x.repeat(500, 1), y.repeat(500))
    op = FisherOperator(net, loss, many, generator=torch.Generator().manual_seed(0))
    fisher = op.dense()
    assert torch.equal(op @ torch.ones(57).double(), op @ torch.ones(57).double())
    assert (fisher - ggn).norm() < 0.06 * ggn.norm()
    again = FisherOperator(net, loss, many, generator=torch.Generator().manual_seed(0))
    other = FisherOperator(net, loss, many, generator=torch.Generator().manual_seed(1))
    v = vector("ce_V")[0]
    assert torch.equal(op @ v, again @ v)
    assert not torch.equal(op @ v, other @ v)


@pytest.mark.parametrize("forward_mode", [True, False])
def test_jacobians(kind, forward_mode):
    net, _, (x, y) = problem(kind)
    for data in (x, [x[:3], x[3:]], [(x[:2], y[:2]), (x[2:], y[2:])]):
        jacobian = JacobianOperator(net, data)
        jacobian.forward_mode = forward_mode
        assert jacobian.shape == (3 * len(x), 57)
        rows = [flatten_params(torch.autograd.grad(o, list(net.parameters()), retain_graph=True)) for o in net(x).reshape(-1)]
        torch.testing.assert_close(jacobian.dense(), torch.stack(rows))
        torch.testing.assert_close(jacobian.T.dense(), torch.stack(rows).T)
        assert jacobian.T.T is jacobian
    inputs = InputJacobianOperator(net, x[0])
    inputs.forward_mode = forward_mode
    torch.testing.assert_close(inputs.dense(), torch.autograd.functional.jacobian(net, x[0]))
    torch.testing.assert_close(inputs.T.dense(), torch.autograd.functional.jacobian(net, x[0]).T)
    assert InputJacobianOperator(lambda t: (t**2).sum(), x).shape == (1, x.numel())
    assert not inputs.dense().requires_grad  # though the weights do
    with inputs.held(), inputs.held():
        torch.testing.assert_close(inputs.dense(), torch.autograd.functional.jacobian(net, x[0]))
        torch.testing.assert_close(inputs.T.dense(), torch.autograd.functional.jacobian(net, x[0]).T)
        assert not inputs.dense().requires_grad


def test_chosen_parameters(kind):
    net, loss, data = problem(kind)
    whole = HessianOperator(net, loss, data).dense()
    last = slice(36, 57)
    for params in (["2.weight", "2.bias"], lambda name: name.startswith("2.")):
        torch.testing.assert_close(HessianOperator(net, loss, data, params=params).dense(), whole[last, last])
    net[0].requires_grad_(False)
    torch.testing.assert_close(HessianOperator(net, loss, data).dense(), whole[last, last])
    with pytest.raises(BadSetting, match=r"nearest: 2\.weight"):
        HessianOperator(net, loss, data, params=["2.weights"])
    with pytest.raises(BadSetting, match="no trainable"):
        HessianOperator(net, loss, data, params=lambda _: False)


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Cube(nn.Module):
    def __init__(self, custom):
        super().__init__()
        self.linear, self.custom = nn.Linear(3, 2).double(), custom

    def forward(self, x):
        z = self.linear(x)
        return NoForward.apply(z) if self.custom else z**3


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
def test_reverse_mode_takes_over_and_says_so(operator):
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    custom, plain = Cube(True), Cube(False)
    plain.load_state_dict(custom.state_dict())
    op = operator(custom, half_squares, (x, y))
    with pytest.warns(UserWarning, match="reverse mode"):
        dense = op.dense()
    assert not op.forward_mode
    torch.testing.assert_close(dense, operator(plain, half_squares, (x, y)).dense())


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(27, 2)
    )


@pytest.mark.parametrize("bn", ["eval", "batch"])
@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_batch_norm_and_nothing_is_changed(bn, operator):
    net = convnet().double().train()
    net[0].eval()
    x, y = torch.randn(8, 1, 5, 5).double(), torch.randint(2, (8,))
    net(x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    op = operator(net, F.cross_entropy, (x, y), bn=bn)
    v = torch.randn(op.shape[0], 3).double()
    forward = op @ v
    assert op.forward_mode
    op.forward_mode = False
    torch.testing.assert_close(op @ v, forward)
    assert [m.training for m in net.modules()] == modes
    assert net[1].track_running_stats
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_batch_statistics_are_differentiated_and_refused_per_sample():
    net = convnet().double()
    x, y = torch.randn(8, 1, 5, 5).double(), torch.randint(2, (8,))
    eval_mode, batch = (HessianOperator(net, F.cross_entropy, (x, y), bn=bn).dense() for bn in ("eval", "batch"))
    assert not torch.allclose(eval_mode, batch)
    with pytest.raises(BadSetting, match="per-sample"):
        EmpiricalFisherOperator(net, F.cross_entropy, (x, y), bn="batch")


def test_attention_and_tied_weights():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.out.weight = self.inner.weight

        def forward(self, x):
            z = self.inner(x)
            return self.out(F.scaled_dot_product_attention(z, z, z)).mean(1)

    net = Attention().double()
    x, y = torch.randn(3, 5, 4).double(), torch.randn(3, 4).double()
    op = HessianOperator(net, half_squares, (x, y))
    assert op.shape == (24, 24)
    dense = op.dense()
    assert op.forward_mode
    torch.testing.assert_close(dense, dense.T)
    op.forward_mode = False
    torch.testing.assert_close(op.dense(), dense)


def test_autocast_is_off_inside_a_probe(kind):
    net, loss, data = problem(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = HessianOperator(net, loss, data) @ vector(f"{kind}_V").T
    torch.testing.assert_close(products, vector(f"{kind}_HV").T, atol=1e-9, rtol=0)


def test_scipy_finds_the_same_spectrum(kind):
    from scipy.sparse.linalg import eigsh, svds

    found = eigsh(HessianOperator(*problem(kind)).to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), np.sort(VECTORS[f"{kind}_eigs_H"])[-3:], atol=1e-8)
    net, _, (x, _) = problem(kind)
    singular = svds(JacobianOperator(net, x).to_scipy(), k=2, return_singular_vectors=False)
    expected = torch.linalg.svdvals(JacobianOperator(net, x).dense())[:2]
    np.testing.assert_allclose(np.sort(singular)[::-1], expected, atol=1e-8)


def test_bad_calls_are_told(kind):
    net, loss, (x, y) = problem(kind)
    op = HessianOperator(net, loss, (x, y))
    with pytest.raises(BadData, match=r"takes \[57\]"):
        op @ torch.zeros(56)
    with pytest.raises(BadData, match="not an iterator"):
        HessianOperator(net, loss, iter([(x, y)])) @ torch.zeros(57)
    with pytest.raises(BadData, match="pairs"):
        HessianOperator(net, loss, [x]) @ torch.zeros(57)
    with pytest.raises(BadData, match="empty"):
        HessianOperator(net, loss, []) @ torch.zeros(57)
    with pytest.raises(BadSetting, match="bn="):
        HessianOperator(net, loss, (x, y), bn="train")
    with pytest.raises(BadSetting, match="too large"):
        HessianOperator(nn.Linear(200, 60), F.mse_loss, (x, y)).dense()
