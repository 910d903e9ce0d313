"""A small classifier to judge generated pictures by, where no large one knows such pictures.

One hidden layer, trained on all of the data at once. Its classes say what a picture shows; without the last layer it gives
features for `frechet_features` and `precision_recall`.

>>> import torch
>>> from sfumato.probes import train_judge
>>> x, label = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
>>> x[label == 1, :, :4] += 1  # the upper half is brighter
>>> judge = train_judge(x, label, steps=50)
>>> bool((judge(x).argmax(1) == label).all()), judge[:-1](x).shape
(True, torch.Size([40, 64]))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def train_judge(x: Tensor, label: Tensor, *, steps: int = 200, hidden: int = 64, lr: float = 1e-2) -> nn.Sequential:
    """Flatten, a hidden layer, and one output a class; trained and frozen.

    Args:
        x: `[N, ...]`, in the range that the pictures to judge will have.
        label: `[N]`, classes 0, 1, ...
        steps: of Adam, each on all of `x`.
        hidden: units.
        lr: Adam's learning rate; the weight decay is 1e-4.

    Returns:
        A network from `[B, ...]` to logits `[B, classes]`; `[:-1]` of it gives features `[B, hidden]`. First weights come from
        torch's global generator.
    """
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), hidden), nn.ReLU(), nn.Linear(hidden, int(label.max()) + 1)).to(x)
    optimizer = torch.optim.Adam(net.parameters(), lr, weight_decay=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), label).backward()
        optimizer.step()
    return net.requires_grad_(False)
