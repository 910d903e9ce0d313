import copy

import pytest
import torch
from torch import nn

from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.optim import ExponentiatedGradient


def test_the_formula():
    w = nn.Parameter(torch.tensor([0.5, -0.5, 2.0, 0.0], dtype=torch.float64))
    before, grad = w.detach().clone(), torch.tensor([1.0, 1.0, -3.0, 7.0], dtype=torch.float64)
    w.grad = grad.clone()
    ExponentiatedGradient([w], lr=0.1).step()
    torch.testing.assert_close(w.data, before * torch.exp(-0.1 * before.sign() * grad))
    assert torch.equal(w.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_sign_ever_changes_however_wild_the_gradient(dtype):
    g = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(100, generator=g).to(dtype))
    signs, optimizer = w.detach().sign(), ExponentiatedGradient([w], lr=1.0)
    for _ in range(60):
        w.grad = (torch.randn(100, generator=g) * 1e3).to(dtype)
        optimizer.step()
    assert torch.equal(w.detach().sign(), signs)
    assert torch.isfinite(w).all()


def test_a_network_learns_and_its_weights_keep_their_signs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    x = torch.randn(256, 4)
    y = x[:, :1] * x[:, 1:2]
    before, optimizer = copy.deepcopy(net), ExponentiatedGradient(net.parameters(), lr=0.3)

    def loss():
        return (net(x) - y).square().mean()

    start = loss().item()
    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 0.5 * start
    assert all(torch.equal(p.sign(), q.sign()) for p, q in zip(net.parameters(), before.parameters()))


def test_groups_have_their_own_step_and_those_without_gradient_rest():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = ExponentiatedGradient([{"params": [a], "lr": 1.0}, {"params": [b, c]}], lr=0.5)
    (a + b).sum().backward()
    optimizer.step()
    assert a.data.tolist() == pytest.approx([torch.tensor(-1.0).exp().item()] * 2)
    assert b.data.tolist() == pytest.approx([torch.tensor(-0.5).exp().item()] * 2)
    assert c.data.tolist() == [1.0, 1.0]


def test_a_closure_is_called_with_gradients_on():
    w = nn.Parameter(torch.ones(1))
    optimizer = ExponentiatedGradient([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert w.item() == pytest.approx(torch.tensor(-0.2).exp().item())


def test_what_it_cannot_take_is_refused_in_one_line():
    with pytest.raises(BadSetting, match="lr=0"):
        ExponentiatedGradient([nn.Parameter(torch.ones(1))], lr=0)
    with pytest.raises(BadSetting, match="no sign to keep"):
        ExponentiatedGradient([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(BadSetting, match="sparse=False"):
        ExponentiatedGradient(table.parameters()).step()
    one, two = (ExponentiatedGradient([nn.Parameter(torch.ones(1)) for _ in range(n)]) for n in (1, 2))
    with pytest.raises(BadCheckpoint, match="other parameters"):
        two.load_state_dict(one.state_dict())
    again = ExponentiatedGradient([nn.Parameter(torch.ones(1))], lr=0.7)
    one.load_state_dict(again.state_dict())
    assert one.param_groups[0]["lr"] == 0.7
