"""Batches as large as the memory allows, and a loss that is one finite number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.instruments.kinds import Setup
from sfumato.nn.at_rest import eval_mode, exact_arithmetic
from sfumato.probes.operators import LossFunction

LARGEST_BATCH = 256
CURVATURE_COPIES = 8
"""Activations of a batch that a Hessian product holds, compared with those of one forward pass: tangents and both gradients."""

Pairs = list[tuple[Tensor, Tensor]]


def memory_for(setup: Setup, device: torch.device) -> int:
    """Bytes that a probe may take: as given, else half of what is free on a GPU, else 4 GB."""
    if setup.memory is not None:
        return int(setup.memory * 1e9)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 4_000_000_000


def cut(
    module: nn.Module, loss: LossFunction, pair: tuple[Tensor, Tensor], setup: Setup, memory: int, device: torch.device
) -> Pairs:
    """Batches as large as the memory allows."""
    first = (pair[0][:1], pair[1][:1])
    check_loss(module, loss, first, device)
    size = setup.batch_size or fitting(module, loss, first, memory, device)
    return list(zip(pair[0].split(size), pair[1].split(size)))


def check_loss(module: nn.Module, loss: LossFunction, pair: tuple[Tensor, Tensor], device: torch.device) -> None:
    """Refuse a loss that is no finite scalar."""
    with eval_mode(module), torch.no_grad():
        value = loss(module(pair[0].to(device)), pair[1].to(device))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise BadSetting("the loss must be one number, the mean over the batch")
    if not bool(torch.isfinite(value)):
        raise BadData(f"the loss of the first sample is {float(value)}: check weights and data")


def fitting(module: nn.Module, loss: LossFunction, one: tuple[Tensor, Tensor], memory: int, device: torch.device) -> int:
    """How many samples fit into half of the memory, from what one sample's forward pass keeps for its gradient."""
    seen = {p.data_ptr() for p in module.parameters()}
    kept = 0

    def keep(t: Tensor) -> Tensor:
        nonlocal kept
        if t.data_ptr() not in seen:
            seen.add(t.data_ptr())
            kept += t.numel() * t.element_size()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with eval_mode(module), exact_arithmetic(device.type), torch.enable_grad(), hooks:
        loss(module(one[0].to(device)), one[1].to(device))
    return max(1, min(LARGEST_BATCH, memory // 2 // (CURVATURE_COPIES * max(1, kept))))
