import torch
from torch import nn

from sfumato.optim import ValueClippedAdamW


def test_gradients_are_clipped_by_value_inside_the_closure():
    p = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = ValueClippedAdamW([p], clip=0.5, lr=0.1, weight_decay=0.0)

    def closure():
        p.grad = torch.tensor([3.0, -0.25])
        return torch.tensor(1.0)

    assert optimizer.step(closure) == 1
    assert p.grad.tolist() == [0.5, -0.25]
