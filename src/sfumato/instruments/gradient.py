"""The mean loss of a subject and its gradient, summed batch by batch; the module and its own `.grad` stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.instruments.subject import Subject
from sfumato.probes.functional_model import FunctionalModel, Selection, as_batches


def loss_and_gradient(subject: Subject, data: Any, params: Selection = None) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the chosen weights by name (they share memory with the module's), each with its gradient in `.grad`."""
    function = FunctionalModel(subject.module, params=params)
    total: Any = 0.0
    with function.at_rest(), torch.enable_grad():
        theta = {name: t.requires_grad_() for name, t in function.theta().items()}
        sums = [torch.zeros_like(t) for t in theta.values()]
        for x, y in as_batches(data, subject.device):
            value = subject.loss(function(theta, x), y) * (len(x) / subject.count)
            torch._foreach_add_(sums, torch.autograd.grad(value, list(theta.values()), materialize_grads=True))
            total = total + value.detach()
    for t, g in zip(theta.values(), sums, strict=True):
        t.grad = g
    return float(total), theta
