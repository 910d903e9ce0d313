import pytest
import torch
from torch import nn

from sfumato.optim import EMA


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def shift(module, by=1.0):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by)


def test_closed_form_of_a_steady_drift():
    module = net().double()
    start = module[0].weight.detach().clone()
    ema, d = EMA(module, decay=0.8), 0.8
    for _ in range(10):
        shift(module)
        ema.update(module)
    lag = d * (1 - d**10) / (1 - d)
    assert torch.allclose(ema.module[0].weight, start + 10 - lag)


def test_limits_and_buffers():
    module = net()
    follow, stay = EMA(module, decay=0.0), EMA(module, decay=1.0)
    frozen = stay.module[0].weight.clone()
    shift(module)
    module(torch.randn(8, 3))  # moves the batch statistics
    follow.update(module)
    stay.update(module)
    assert torch.equal(follow.module[0].weight, module[0].weight)
    assert torch.equal(stay.module[0].weight, frozen)
    assert torch.equal(stay.module[1].running_mean, module[1].running_mean)
    assert stay.module[1].num_batches_tracked == 1


def test_every_and_warmup_and_callable_decay():
    module = net()
    seen = []
    ema = EMA(module, decay=lambda n: seen.append(n) or 0.5, every=3)
    for _ in range(7):
        ema.update(module)
    assert seen == [0, 1]
    assert ema.updates == 2
    warm = EMA(module, decay=0.999, warmup=True)
    before = warm.module[0].bias.clone()
    shift(module)
    warm.update(module)
    assert torch.allclose(warm.module[0].bias, before + 0.9)  # decay 1/10 at the first update


def test_it_is_frozen_in_eval_mode_and_runs():
    module = net()
    ema = EMA(module).train()
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.parameters())
    x = torch.randn(4, 3)
    assert torch.equal(ema(x), module.eval()(x))


def test_state_travels():
    module = net()
    ema, other = EMA(module, decay=0.9, every=2), EMA(net(1), decay=0.9, every=2)
    shift(module)
    for _ in range(3):
        ema.update(module)
    other.load_state_dict(ema.state_dict())
    ema.update(module)
    other.update(module)
    assert other.updates == ema.updates == 2
    for a, b in zip(ema.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_structure_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        EMA(net()).update(nn.Linear(2, 2))
