"""The layers of a model whose outputs tell something, in the order in which they are called, and what they give for every sample.

>>> import torch
>>> from sfumato.instruments import prepare_subject
>>> from sfumato.instruments.layers import find_layers
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(5, 2))
>>> subject = prepare_subject(net, (torch.randn(10, 3), torch.arange(10) % 2))
>>> [(layer.title, layer.size) for layer in find_layers(subject)]
[('1 (ReLU)', 5), ('output', 2)]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm

from sfumato.errors import BadSetting, nearest
from sfumato.instruments.followed import spread_evenly
from sfumato.instruments.subject import Subject
from sfumato.nn.at_rest import eval_mode, exact_arithmetic

MOST = 16
"""Layers that are looked at where none are named, the output besides."""


@dataclass(frozen=True)
class Layer:
    """A submodule; the name of the output is empty, that of the whole model.

    Args:
        name: as in `named_modules()`.
        title: for a person.
        size: numbers a sample.
    """

    name: str
    title: str
    size: int


@dataclass
class _Call:
    name: str
    module: nn.Module
    given: Any
    gave: Tensor


def find_layers(subject: Subject, wanted: str | None = None) -> list[Layer]:
    """The layers of a model, the output last.

    Args:
        subject: whose module is called once, on two samples.
        wanted: names with commas between them; None: at the finest level of names that has at most `MOST`, without those that
            only feed an activation or a batch normalisation, that change nothing, or that are called more than once.

    Raises:
        BadSetting: a name that is no submodule, or one that gives no tensor with a row for every sample.
    """
    calls = _calls(subject)
    output = calls.pop()
    if wanted is None:
        chosen = _told_apart([c for c in _chosen(calls) if c.gave is not output.gave])
    else:
        chosen = [_named(name.strip(), subject, calls) for name in wanted.split(",")]
    found = [Layer(c.name, f"{c.name} ({type(c.module).__name__})", c.gave[0].numel()) for c in chosen]
    return [*found, Layer("", "output", output.gave[0].numel())]


def read_layers(
    subject: Subject, layers: Sequence[Layer], data: Any, keep: Callable[[Layer, Tensor], Tensor]
) -> dict[str, Tensor]:
    """What layers give for every sample, on the CPU.

    Args:
        subject: whose module is in eval mode meanwhile.
        layers: of `find_layers`.
        data: batches, read once.
        keep: `(layer, values [B, size]) -> [B, kept]`, to keep less of it.

    Returns:
        `[n, kept]` by name.
    """
    rows: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    modules = dict(subject.module.named_modules())

    def noting(layer: Layer) -> Callable[..., None]:
        def note(_module: nn.Module, _given: Any, gave: Tensor) -> None:
            seen[layer.name] = keep(layer, gave.detach().flatten(1)).to("cpu", copy=True)  # what comes next may write over it

        return note

    seen: dict[str, Tensor] = {}
    hooks = [(modules[layer.name], noting(layer)) for layer in layers]
    with _hooked(hooks), eval_mode(subject.module), exact_arithmetic(subject.device.type), torch.no_grad():
        for x, _ in data:
            subject.module(x.to(subject.device))
            for name, values in seen.items():
                rows[name].append(values)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _calls(subject: Subject) -> list[_Call]:
    """Every submodule that was called and gave a row for each of two samples, in the order in which they ended."""
    x = subject.batches[0][0][:2]
    x = x if len(x) == 2 else torch.cat([x, x])
    found: list[_Call] = []

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, given: Any, gave: Any) -> None:
            if isinstance(gave, Tensor) and gave.is_floating_point() and gave.ndim > 1 and len(gave) == 2:
                found.append(_Call(name, module, given[0] if given else None, gave))

        return note

    hooks = [(module, noting(name)) for name, module in subject.module.named_modules()]
    with _hooked(hooks), eval_mode(subject.module), exact_arithmetic(subject.device.type), torch.no_grad():
        subject.module(x.to(subject.device))
    if not found or found[-1].name:
        raise BadSetting(f"{subject.name} gives no numbers for each sample by itself: there are no layers to look at")
    return found


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(name: str, subject: Subject, calls: list[_Call]) -> _Call:
    called = next((c for c in reversed(calls) if c.name == name), None)
    if called is not None:
        return called
    known = [c.name for c in calls]
    if name in dict(subject.module.named_modules()) and name:
        raise BadSetting(f"layer {name!r} is not called, or gives no tensor with a row for every sample")
    near = nearest(name, known) or list(dict.fromkeys(known))[:5]
    raise BadSetting(f"there is no layer {name!r}; did you mean {' or '.join(near)}?")


def _chosen(calls: list[_Call]) -> list[_Call]:
    """Without what only feeds an activation or a batch normalisation, what changes nothing, and what is called again."""
    often = Counter(c.name for c in calls)
    acting = [(i, c.given) for i, c in enumerate(calls) if _acts(c.module) or isinstance(c.module, _BatchNorm)]
    kept = []
    for place, c in enumerate(calls):
        feeds = any(c.gave is given for i, given in acting if i > place)  # one that works in place gives back what it was given
        bare = not _acts(c.module) and next(c.module.parameters(), None) is None
        same = bare and isinstance(c.given, Tensor) and _equal(c.given, c.gave)
        if often[c.name] == 1 and not feeds and not same:
            kept.append(c)
    return kept


def _acts(module: nn.Module) -> bool:
    """Whether it is an activation function, applied entry by entry."""
    return type(module).__module__ == activation.__name__ and not isinstance(module, (nn.MultiheadAttention, nn.Softmax))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten()))


def _told_apart(calls: list[_Call]) -> list[_Call]:
    """At the finest level of names with at most `MOST` of them; a level that has more even so is thinned."""
    depths = [c.name.count(".") + 1 for c in calls]
    level: list[_Call] = []
    for depth in range(max(depths, default=0), 0, -1):
        level = [c for c, d in zip(calls, depths) if d == depth or (d < depth and not any(c.module.children()))]
        if 0 < len(level) <= MOST:
            return level
    return spread_evenly(level, MOST)
