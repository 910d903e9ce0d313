"""A module and its arithmetic at rest: what a measurement needs and a training step does not.

>>> import torch
>>> from sfumato.nn import eval_mode
>>> net = torch.nn.Sequential(torch.nn.Dropout())
>>> with eval_mode(net):
...     net(torch.ones(3))
tensor([1., 1., 1.])
>>> net.training
True
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within, and after it every submodule as it was."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """No autocast, no TF32, and attention through the kernel that can be differentiated twice."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
