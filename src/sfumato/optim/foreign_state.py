"""Refuse a saved optimizer of other parameters in one line, before anything is loaded.

torch compares how many parameters a group has, and not their shapes: a state of another model would be taken over and break a
later step, or silently train on.

>>> import torch
>>> from sfumato.optim import AdaHessian
>>> small, large = (AdaHessian([torch.zeros(n, requires_grad=True)]) for n in (2, 3))
>>> small.param_groups[0]["params"][0].sum().square().backward(create_graph=True); small.step()
>>> large.load_state_dict(small.state_dict())
Traceback (most recent call last):
sfumato.errors.BadCheckpoint: the saved optimizer is of other parameters: exp_avg of number 0 is [2], the parameter [3]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sfumato.errors import BadCheckpoint

SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_hessian_sq", "momentum_buffer", "removed")
"""Entries of a parameter's state that have its shape."""


def refuse_foreign_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Compare a saved state with an optimizer's parameters.

    Args:
        optimizer: that would take it over.
        saved: what `state_dict()` of another gave.

    Raises:
        BadCheckpoint: groups of other sizes, or entries of other shapes.
    """
    theirs, ours = ([len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups))
    if theirs != ours:
        raise BadCheckpoint(f"the saved optimizer is of other parameters: groups of {theirs}, here of {ours}")
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for place, (number, p) in enumerate(zip(numbers, params, strict=True)):
        for name, value in saved["state"].get(number, {}).items():
            if name in SHAPED and isinstance(value, Tensor) and value.shape != p.shape:
                raise BadCheckpoint(
                    f"the saved optimizer is of other parameters: {name} of number {place} is {list(value.shape)}, "
                    f"the parameter {list(p.shape)}"
                )
