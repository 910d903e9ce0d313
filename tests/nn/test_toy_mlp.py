import math

import pytest
import torch
import torch.nn.functional as F

from sfumato.diffusion import Schedule, beta_schedule, denoising_loss, uniform_t
from sfumato.errors import BadSetting
from sfumato.nn import ToyDenoiser


def test_one_block_by_hand():
    torch.manual_seed(0)
    net = ToyDenoiser(2, width=6, layers=1).double()
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 3, 50, 999])
    frequency = torch.exp(-math.log(10000) * torch.arange(3) / 2)
    angle = t[:, None].double() * frequency
    e = F.leaky_relu(net.time[0](torch.cat([angle.sin(), angle.cos()], 1)), 0.02)
    w = dict(net.blocks[0].named_modules())
    h = x @ net.enter.weight.T
    inner = F.leaky_relu(F.layer_norm(h, (6,)), 0.02) @ w["first"].weight.T + w["time"](e)
    h = h + F.leaky_relu(F.layer_norm(inner, (6,)), 0.02) @ w["second"].weight.T
    wanted = F.layer_norm(h, (6,)) @ net.leave[1].weight.T + net.leave[1].bias
    assert torch.allclose(net(x, t), wanted, atol=1e-4)  # the sinusoids are float32
    assert torch.allclose(net(x, torch.tensor(3))[1], net(x, t)[1])
    assert [name for name, _ in net.named_parameters() if "enter" in name or "first" in name] == [
        "enter.weight", "blocks.0.first.weight"
    ]  # fmt: skip


def test_it_learns():
    torch.manual_seed(0)
    schedule = Schedule(beta_schedule("linear", 250, 1e-3, 0.2))
    net = ToyDenoiser(1, width=32, layers=2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        x0 = torch.randint(1, 4, (256, 1)).float()
        loss = denoising_loss(net, x0, uniform_t(256, 250), torch.randn(256, 1), schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.4 * sum(losses[:20])


def test_narrow_networks_are_refused():
    with pytest.raises(BadSetting, match="width=3"):
        ToyDenoiser(1, width=3)
