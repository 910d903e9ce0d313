"""Networks of one part of the times: alike but for their times, followed by loss and judge."""

import pytest
import torch

from sfumato.data import digits
from sfumato.diffusion import Schedule, beta_schedule
from sfumato.errors import BadSetting
from sfumato.nn import ToyDenoiser
from sfumato.probes import TaskDifficulty, task_difficulty, train_expert

X = 2 * digits()[0].x[:128].flatten(1) - 1
SCHEDULE = Schedule(beta_schedule("linear"))


def generator():
    return torch.Generator().manual_seed(0)


def test_parts_are_trained_alone_from_the_same_weights():
    torch.manual_seed(0)
    net = ToyDenoiser(64, width=16, layers=1)
    before = {name: p.clone() for name, p in net.named_parameters()}
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            if self.training:
                seen.append(t)
            return self.net(x, t)

    asked = []

    def judge(net, low, high):
        assert not net.training
        assert not torch.is_grad_enabled()
        asked.append((low, high, float(next(net.parameters()).sum())))
        return 0.5 * len(asked)

    found, again = (
        task_difficulty(
            model, X, SCHEDULE, intervals=3, steps=20, measure=5, lr=1e-2, judge=who, judgements=2, generator=generator()
        )
        for model, who in ((Watched(), judge), (net, None))
    )
    assert found.edges.tolist() == [0, 333, 666, 1000]
    assert found.steps.tolist() == [0, 4, 8, 12, 16, 20]
    assert found.losses.shape == (3, 6)
    assert torch.equal(found.losses, again.losses)
    assert len(seen) == 60
    for part, times in enumerate((seen[:20], seen[20:40], seen[40:])):
        assert torch.cat(times).min() >= found.edges[part]
        assert torch.cat(times).max() < found.edges[part + 1]
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert (found.losses[:, -1] < found.losses[:, 0]).all()
    assert found.judged.tolist() == [10, 20]
    assert found.judgements.tolist() == [[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]]
    assert [span[:2] for span in asked] == [(0, 333), (0, 333), (333, 666), (333, 666), (666, 1000), (666, 1000)]
    assert len({weights for _, _, weights in asked}) == 6
    assert again.judged.tolist() == []
    assert again.judgements.shape == (3, 0)


def test_an_expert_of_a_loss_of_ones_own():
    steps, net = [], torch.nn.Linear(2, 2)

    def loss(net, x0, t, noise):
        assert t.min() >= 3
        assert t.max() < 7
        return (net(x0) - noise).square().mean()

    expert = train_expert(
        net, torch.randn(50, 2), 3, 7, loss, steps=9, measure=3, judge=lambda *_: 2.0, watch=lambda: steps.append(1),
        generator=generator(),
    )  # fmt: skip
    assert len(steps) == 9
    assert expert.losses.shape == (4,)
    assert expert.judgements.tolist() == [2.0]
    assert not torch.equal(expert.net.weight, net.weight)
    assert not expert.net.training


def test_steps_until_the_loss_stays_low():
    losses = torch.tensor([[9.0, 1.0, 5.0, 1.4, 1.0], [2.0, 1.05, 1.0, 1.0, 1.0]])
    found = TaskDifficulty(torch.arange(3), torch.arange(0, 50, 10), losses, torch.zeros(0), torch.zeros(2, 0))
    assert found.normalised[0].tolist() == [1, 0, 0.5, pytest.approx(0.05), 0]
    assert found.steps_to(0.1).tolist() == [30, 10]
    assert found.steps_to(0.01).tolist() == [40, 20]
    with pytest.raises(BadSetting, match="clusters of 1000"):
        task_difficulty(torch.nn.Identity(), losses, SCHEDULE, intervals=2000)
