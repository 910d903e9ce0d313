"""A module as a pure function of its parameters, at rest: eval mode, no autocast, exact arithmetic, buffers untouched.

f: (θ, x) ↦ outputs, with θ the chosen trainable parameters; everything else of the module is a constant.

>>> import torch
>>> from sfumato.probes.functional_model import FunctionalModel
>>> net = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout())
>>> f = FunctionalModel(net, params=["0.bias"])
>>> with f.at_rest():
...     theta = f.theta()
...     y = f(theta, torch.ones(3, 2))
>>> y.shape, list(theta), net.training
(torch.Size([3, 1]), ['0.bias'], True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from sfumato.errors import BadData, BadSetting, nearest
from sfumato.nn.at_rest import eval_mode as eval_mode
from sfumato.nn.at_rest import exact_arithmetic as exact_arithmetic

Selection = Iterable[str] | Callable[[str], bool] | None
"""Which parameters: their names, a predicate on names, or None for all trainable ones."""

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
"""One pair (inputs, targets), a list of pairs, or a DataLoader that gives pairs."""


class FunctionalModel:
    """`f(theta, x)` for a module.

    Args:
        model: any module; it is never changed.
        params: which of its trainable parameters make up θ.
        bn: `"eval"`: batch normalisation with running statistics; `"batch"`: through the statistics of the batch.
        per_sample: the caller needs samples to be separate, which batch statistics make impossible.

    Raises:
        BadSetting: on unknown parameter names, an empty selection, or batch statistics where samples must be separate.
    """

    def __init__(
        self, model: nn.Module, *, params: Selection = None, bn: Literal["eval", "batch"] = "eval", per_sample: bool = False
    ) -> None:
        if bn not in ("eval", "batch"):
            raise BadSetting(f"bn={bn!r} must be 'eval' or 'batch'")
        self.model, self.bn = model, bn
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        if per_sample and bn == "batch" and self._norms:
            raise BadSetting("per-sample quantities do not exist through batch statistics: use bn='eval'")
        self.names = _chosen_names(model, params)

    def theta(self) -> dict[str, Tensor]:
        """The present values of the chosen parameters, without graph or copy."""
        return {name: self.model.get_parameter(name).detach() for name in self.names}

    def __call__(self, theta: dict[str, Tensor], x: Tensor) -> Tensor:
        """The module's output at other values of the chosen parameters (tied ones follow); the rest carries no graph."""
        rest = {name: p.detach() for name, p in self.model.named_parameters() if name not in theta}
        output: Tensor = functional_call(self.model, {**rest, **theta}, (x,))
        return output

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within it the module is in eval mode (see `bn`) and arithmetic is exact; mode and switches are restored."""
        tracking = [(m, m.track_running_stats) for m in self._norms]
        with eval_mode(self.model), exact_arithmetic(self.model.get_parameter(self.names[0]).device.type):
            try:
                if self.bn == "batch":
                    for m in self._norms:
                        m.training, m.track_running_stats = True, False  # batch statistics; running ones are left alone
                yield
            finally:
                for m, track in tracking:
                    m.track_running_stats = track


def _chosen_names(model: nn.Module, params: Selection) -> list[str]:
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if callable(params):
        names = [name for name in trainable if params(name)]
    elif params is None:
        names = trainable
    else:
        asked = set(params)
        for name in asked - set(trainable):
            raise BadSetting(f"no trainable parameter {name!r}; nearest: {', '.join(nearest(name, trainable)) or trainable[:3]}")
        names = [name for name in trainable if name in asked]
    if not names:
        raise BadSetting("no trainable parameter was chosen: check `params` and requires_grad")
    return names


def as_batches(data: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of `data`, on a device.

    Raises:
        BadData: when `data` can be read only once, or does not give pairs of equal length.
    """
    single = isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
    for pair in _readings([data] if single else data):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and len(pair[0]) == len(pair[1])):
            raise BadData("a probe takes pairs (inputs, targets) of equal length")
        yield pair[0].to(device, non_blocking=True), pair[1].to(device, non_blocking=True)


def as_inputs(data: Any, device: torch.device) -> Iterator[Tensor]:
    """The inputs of `data` (a tensor, a list of tensors or of pairs, a DataLoader), on a device."""
    for item in _readings([data] if isinstance(data, Tensor) else data):
        yield (item[0] if isinstance(item, (tuple, list)) else item).to(device, non_blocking=True)


def _readings(data: Any) -> Any:
    if iter(data) is data:
        raise BadData("a probe reads its data many times: give a list or a DataLoader, not an iterator")
    return data
