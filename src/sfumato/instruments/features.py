"""Features of whatever a person gave, as a whole and of single places, and the same network with nothing learned.

A method gives what its `encode` gives; a timm model what its classifier would read; any other module what its last linear layer
is given, or its output where it has none. Single places are patch tokens, or the cells of the last map.

>>> import torch
>>> from sfumato.instruments import prepare_subject
>>> from sfumato.instruments.features import FeatureReader
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> subject = prepare_subject(net, (torch.randn(10, 3), torch.arange(10) % 2))
>>> FeatureReader(subject).read([torch.randn(5, 3)]).whole.shape
torch.Size([5, 8])
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.data import Batch
from sfumato.instruments.model_words import make_timm
from sfumato.instruments.subject import Subject
from sfumato.method import Method
from sfumato.nn.at_rest import eval_mode
from sfumato.nn.masked_vit import MaskedViTEncoder


class Features(NamedTuple):
    """Features `[N, D]` of samples, and `[N, L, D']` of single places, where the model has any; on the CPU, in float32."""

    whole: Tensor
    places: Tensor | None


class FeatureReader:
    """Reads features of the subject's model, or of another in its place."""

    def __init__(self, subject: Subject, owner: nn.Module | None = None) -> None:
        self.owner: Any = owner or subject.owner
        self.device = subject.device
        self._layer, self._given = self._watched()

    def _watched(self) -> tuple[nn.Module | None, bool]:
        """The layer whose output (or, second, input) is wanted besides the result."""
        if isinstance(self.owner, Method):
            encoder = getattr(self.owner, "encoder", None)
            return (encoder.norm, False) if isinstance(encoder, MaskedViTEncoder) else (None, False)
        if _of_timm(self.owner):
            return None, False
        return next((m for m in reversed(list(self.owner.modules())) if isinstance(m, nn.Linear)), None), True

    def read(self, inputs: Iterable[Tensor]) -> Features:
        """Over batches of inputs, as the model's owner takes them; at rest, without gradients."""
        parts = []
        seen: list[Tensor] = []
        handle = None
        if self._layer is not None:
            take = (lambda _, given, __: seen.append(given[0])) if self._given else (lambda _, __, out: seen.append(out))
            handle = self._layer.register_forward_hook(take)
        try:
            with eval_mode(self.owner), torch.no_grad():
                for x in inputs:
                    seen.clear()
                    whole, places = self._one(x.to(self.device), seen)
                    parts.append(Features(whole.flatten(1).float().cpu(), None if places is None else places.float().cpu()))
        finally:
            if handle is not None:
                handle.remove()
        found = [part.places for part in parts if part.places is not None]
        return Features(torch.cat([part.whole for part in parts]), torch.cat(found) if found else None)

    def _one(self, x: Tensor, seen: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        owner = self.owner
        if isinstance(owner, Method):
            whole = owner.encode(x)  # type: ignore[operator]
            return whole, seen[-1][:, owner.encoder.prefix :] if seen else None  # type: ignore[union-attr, index]
        if _of_timm(owner):
            places = owner.forward_features(x)
            whole = owner.forward_head(places, pre_logits=True)
            if places.ndim == 4:
                last = places.shape[-1] == owner.num_features != places.shape[1]  # Swin keeps its channels there
                return whole, places.flatten(1, 2) if last else places.flatten(2).mT
            return whole, places[:, getattr(owner, "num_prefix_tokens", 0) :] if places.ndim == 3 else None
        out = owner(x)
        return (seen[-1] if seen else out), None


def _of_timm(module: Any) -> bool:
    return callable(getattr(module, "forward_features", None)) and callable(getattr(module, "forward_head", None))


def samples_of(subject: Subject) -> Batch:
    """All samples, as the model's owner takes them; with labels, where they have classes."""
    if subject.pictures is not None:
        return subject.pictures()
    x, y = (torch.cat(parts) for parts in zip(*subject.batches, strict=True))
    return Batch(x, torch.arange(len(x)), label=None if y.is_floating_point() or y.ndim != 1 else y)


def untrained_twin(subject: Subject, seed: int) -> tuple[nn.Module, list[str]]:
    """The same network with fresh random weights, and what is not as fresh as it should be, a sentence each."""
    owner = subject.owner
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if isinstance(owner, Method):
            return type(owner)(owner.config).to(subject.device), []
        if subject.name.startswith("timm:"):
            size = getattr(getattr(owner, "patch_embed", None), "img_size", None)
            fixed = int(size[0]) if isinstance(size, (tuple, list)) else None
            return make_timm(subject.name.removeprefix("timm:"), _outputs(owner), fixed, seed).to(subject.device), []
        twin = copy.deepcopy(owner)
        kept = 0
        for module in twin.modules():
            own = sum(1 for _ in module.parameters(recurse=False))
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            elif own:
                kept += own
    return twin, [f"the untrained network keeps {kept} parameters that their layers cannot draw anew"] if kept else []


def _outputs(owner: nn.Module) -> int | None:
    count = getattr(owner, "num_classes", None)
    return int(count) if count else None
