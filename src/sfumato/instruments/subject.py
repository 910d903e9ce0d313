"""What a probe looks at, made ready once for every kind: a module, its loss, batches of data on it, and what was done to them.

    L(θ) = (1 / n) Σ loss(module(xᵢ), yᵢ)

A timm model or a plain module keeps its loss apart from its outputs. So does a run of a classifier: its network, on pictures
that are prepared as it prepares them. A run of another method has one loss, its own, with the noise held fixed; its module then
gives losses from batch numbers (`separable` is False, see `own_loss`).

>>> import torch
>>> from sfumato.instruments import prepare_subject
>>> subject = prepare_subject(torch.nn.Linear(3, 2), (torch.randn(10, 3), torch.arange(10) % 2))
>>> subject.loss_name, subject.count, [x.shape for x, _ in subject.batches]
('cross_entropy', 10, [torch.Size([10, 3])])
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from sfumato.data import Batch
from sfumato.engine.options import Options, accelerator
from sfumato.errors import BadData, BadSetting
from sfumato.instruments.batching import Pairs, check_loss, cut, fitting, memory_for
from sfumato.instruments.kinds import Setup
from sfumato.instruments.model_words import load_into, make_timm, open_module, timm_input
from sfumato.instruments.own_loss import OwnLoss
from sfumato.instruments.samples import (
    Samples,
    crop_to,
    draw_samples,
    given_samples,
    is_pairs,
    opened_images,
    opened_samples,
    read,
)
from sfumato.method import Method
from sfumato.nn.at_rest import eval_mode
from sfumato.probes.operators import LossFunction


@runtime_checkable
class ClassifierLike(Protocol):
    """A method whose loss is a criterion of a network's outputs on prepared pictures."""

    network: nn.Module

    def prepare(self, x: Tensor) -> Tensor:
        """Pictures in [0, 1] as the network takes them."""
        ...

    def criterion(self, logits: Tensor, label: Tensor) -> Tensor:
        """The mean loss."""
        ...


@dataclass
class Subject:
    """A model on data.

    Args:
        name: as a person would say it.
        module: inputs to outputs; in eval mode, its parameters at the weights to be probed.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        loss_name: as a person would say it.
        batches: pairs (inputs, targets) on the CPU, to be read again and again.
        device: where the module is.
        memory: bytes that a probe may take.
        owner: what the person gave: a `Method`, a timm model or a module.
        separable: outputs and targets are apart, so that a Gauss-Newton matrix and gradients of samples exist.
        classes: class names, where the data has labels.
        pictures: the samples as the owner takes them, where these are not the inputs of `batches`: read anew, not augmented.
        notes: what was done to model and data, a sentence each.
        facts: of model and data, for a table.
    """

    name: str
    module: nn.Module
    loss: LossFunction
    loss_name: str
    batches: Pairs
    device: torch.device
    memory: int
    owner: nn.Module
    separable: bool = True
    classes: tuple[str, ...] | None = None
    pictures: Callable[[], Batch] | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Samples."""
        return sum(len(x) for x, _ in self.batches)

    @property
    def norms(self) -> list[_BatchNorm]:
        """Batch normalisations with running statistics."""
        return [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    @property
    def eval_note(self) -> list[str]:
        """For a kind that leaves batch norm in eval mode: the sentence that says so."""
        count = len(self.norms)
        return [f"batch norm takes its running statistics (layers in eval mode: {count})"] if count else []

    def first(self, samples: int) -> Subject:
        """The same on fewer samples (on whole batches, where the loss is a method's own); itself where there are no more."""
        if samples >= self.count:
            return self
        if isinstance(self.module, OwnLoss):
            module = self.module.first(max(1, samples // len(self.batches[0][0])))
            return replace(self, module=module, batches=module.pairs())
        x, y = (torch.cat(parts)[:samples] for parts in zip(*self.batches, strict=True))
        size = len(self.batches[0][0])
        return replace(self, batches=list(zip(x.split(size), y.split(size), strict=True)))

    def layer(self, name: str) -> str:
        """The name of a layer or a parameter as the person knows it."""
        return name if self.separable else name.removeprefix("method.")


def prepare_subject(
    model: nn.Module | str | os.PathLike[str],
    data: Any,
    setup: Setup | None = None,
    *,
    loss: str | LossFunction | None = None,
    usual_loss: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    seed: int = 0,
    draw: int = 0,
) -> Subject:
    """Make a model and data ready to be probed.

    Args:
        model: `timm:NAME`, `module:factory`, a run folder, or a module (copied when it must move to another device).
        data: as `open_data` takes it; or pairs (inputs, targets) as the model takes them: a list of them, or a DataLoader.
        setup: which samples, and how much memory.
        loss: `cross_entropy`, `mse`, `reconstruction` (squared distance from the inputs), `module:function` or a function
            `(outputs, targets) -> mean`; None: by the data (labels: cross-entropy, targets: mean squared error). A run brings its
            own.
        usual_loss: what None means for a plain module, whatever the data.
        weights: a file of weights for a timm model or a factory.
        device: `auto`, `cpu`, `cuda`, ...; None: where a given module is, else `auto`.
        seed: of the samples that are drawn, of random weights and of a method's noise.
        draw: added to the seed of random weights, so that two models of one name differ.

    Raises:
        BadSetting: an unknown model or loss, or one that does not suit the data.
        BadData: no data, or data without the labels or targets that the loss needs.
        BadCheckpoint: weights that do not fit.
    """
    setup = setup or Setup()
    found = open_module(model, seed + draw)
    if isinstance(found, Method):
        if weights is not None:
            raise BadSetting("a run has its own weights: leave out --weights, or give a timm model or module:factory")
        if loss is not None:
            raise BadSetting("a run has its own loss: leave out --loss, or probe its network by module:factory")
    place = _device(device, found)
    if found is not None and next(found.parameters()).device != place:
        found = copy.deepcopy(found) if isinstance(model, nn.Module) else found
        found = found.to(place)
    if isinstance(found, Method):
        subject = _of_method(found, str(model), data, setup, seed)
    else:
        subject = _of_module(found, model, data, setup, place, (loss or usual_loss, weights, seed, draw))
    drops = sum(isinstance(m, _DropoutNd) and m.p > 0 for m in subject.module.modules())
    subject.notes += [f"dropout is off (layers: {drops})"] if drops else []
    subject.facts |= {
        "parameters": sum(p.numel() for p in subject.module.parameters() if p.requires_grad),
        "loss": subject.loss_name, "samples": subject.count, "batch": len(subject.batches[0][0]), "device": str(subject.device),
    }  # fmt: skip
    if not subject.facts["parameters"]:
        raise BadSetting(f"{subject.name} has no trainable parameter: set requires_grad on what is to be probed")
    return subject


def prepare_run(model: nn.Module | str | os.PathLike[str], *, device: str | None = None) -> Subject:
    """A run as it is, for a kind that looks at no data: there are no batches.

    Args:
        model: a run folder, or a method.
        device: `auto`, `cpu`, `cuda`, ...; None: where a given method is, else `auto`.

    Raises:
        BadSetting: no run. BadCheckpoint: a folder that is no run.
    """
    found = open_module(model)
    if not isinstance(found, Method):
        raise BadSetting(f"{model if isinstance(model, str) else type(model).__name__} is no run: give the folder of one")
    place = _device(device, found)
    if found.device != place:
        found = (copy.deepcopy(found) if isinstance(model, nn.Module) else found).to(place)
    title = type(found).__name__
    facts: dict[str, Any] = {
        "model": f"{title} run",
        "run": title if isinstance(model, nn.Module) else str(model),
        "data": "its own samples",
    }
    facts |= {"parameters": sum(p.numel() for p in found.parameters()), "device": str(place)}
    return Subject(
        name=str(facts["run"]), module=found, loss=_mean, loss_name="none", batches=[], device=place, memory=0, owner=found,
        separable=False, facts=facts,
    )  # fmt: skip


def _device(device: str | None, found: nn.Module | None) -> torch.device:
    if found is not None and next(found.parameters(), None) is None:
        raise BadSetting(f"{type(found).__name__} has no parameters: there is nothing to probe")
    if device is None and found is not None:
        return next(found.parameters()).device
    place: torch.device = accelerator(Options(device=device or "auto")).device
    return place


# Runs of methods


def _of_method(method: Method, name: str, data: Any, setup: Setup, seed: int) -> Subject:
    title = type(method).__name__
    name = title if name.startswith(f"{title}(") else name  # the module itself was given
    images = opened_images(data, setup.split, getattr(method.config, "channels", None))
    missing = next((f for f in method.needs if f not in images.facts.fields), None)
    if missing is not None:
        wanted = {"label": "one folder per class, or arrays with y", "target": "pairs:IN:TARGET, or arrays with target"}
        raise BadData(f"{title} needs a {missing} with every sample, and this data has none: give {wanted[missing]}")
    index = draw_samples(len(images), setup, seed)
    memory, device = memory_for(setup, method.device), method.device
    facts = {"model": f"{title} run", "run": name, "data": str(images)}
    size = getattr(method, "size", (setup.image_size or getattr(method.config, "image_size", None) or 224,) * 2)
    whole_pictures = crop_to(size) if images.items.sizes() and not images.facts.size else None
    common: dict[str, Any] = {
        "device": device,
        "memory": memory,
        "owner": method,
        "facts": facts,
        "classes": images.facts.classes,
        "pictures": lambda: read(images, index, whole_pictures, seed),
    }
    if isinstance(method, ClassifierLike):
        whole = read(images, index, whole_pictures, seed)
        assert whole.label is not None
        with torch.no_grad():
            x = torch.cat([method.prepare(part.to(device)).cpu() for part in whole.x.split(64)])
        pairs = cut(method.network, method.criterion, (x, whole.label), setup, memory, device)
        loss_name = str(getattr(method.config, "loss", "cross_entropy"))
        return Subject(name=name, module=method.network, loss=method.criterion, loss_name=loss_name, batches=pairs, **common)
    whole = read(images, index, method.augment() or whole_pictures, seed)  # unlike sizes make no batch
    size = min(setup.batch_size or method.config.batch_size, len(whole))
    if setup.batch_size is None:
        one = OwnLoss(method, [_part(whole, slice(0, 1))], seed)
        size = min(size, fitting(one, _mean, one.pairs()[0], memory, device))
    parts = [_part(whole, slice(i, i + size)) for i in range(0, len(whole), size)]
    module = OwnLoss(method, parts, seed)
    check_loss(module, _mean, module.pairs()[0], device)
    notes = ["the loss is the method's own, its noise drawn once and held, its schedules at the end of training"]
    return Subject(
        name=name, module=module, loss=_mean, loss_name="the method's own", batches=module.pairs(), separable=False,
        notes=notes, **common,
    )  # fmt: skip


def _mean(losses: Tensor, _: Tensor) -> Tensor:
    return losses.mean()


def _part(batch: Batch, rows: slice) -> Batch:
    label, target = (None if v is None else v[rows] for v in (batch.label, batch.target))
    return Batch(batch.x[rows], batch.index[rows], label, target)


# Plain modules and timm models


def _of_module(
    found: nn.Module | None, model: Any, data: Any, setup: Setup, device: torch.device, chosen: tuple[Any, Any, int, int]
) -> Subject:
    loss, weights, seed, draw = chosen
    name = type(model).__name__ if isinstance(model, nn.Module) else os.fspath(model)
    eats = timm_input(name.removeprefix("timm:")) if found is None else {}
    samples = given_samples(data, loss, setup) if is_pairs(data) else opened_samples(data, loss, setup, eats, seed)
    notes = samples.notes
    if found is None:
        outputs = samples.outputs()
        found = make_timm(name.removeprefix("timm:"), outputs, setup.image_size if eats["fixed"] else None, seed + draw)
        notes += [f"the last layer was built anew with {outputs} outputs, for this data"] if outputs else []
        notes += ["the weights are random (give --weights FILE for trained ones)"] if weights is None else []
    if weights is not None:
        notes += load_into(found, Path(weights))
    found = found.to(device)
    pair = _lined_up(found, samples, device)
    memory = memory_for(setup, device)
    fresh = "random" if eats else "as given" if isinstance(model, nn.Module) else "as the factory made them"
    return Subject(
        name=name, module=found, loss=samples.criterion, loss_name=samples.loss_name, device=device, memory=memory, owner=found,
        batches=cut(found, samples.criterion, pair, setup, memory, device), classes=samples.classes, notes=notes,
        facts={"model": name, "weights": str(weights or fresh), "data": samples.told},
    )  # fmt: skip


def _lined_up(module: nn.Module, samples: Samples, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets as the model's type and shape want them; a model that does not suit the data is refused."""
    kind = next(p.dtype for p in module.parameters())
    inputs, targets = (t.to(kind) if t.is_floating_point() else t for t in (samples.inputs, samples.targets))
    outputs = _forward(module, inputs[:2], device)
    if samples.loss_name == "cross_entropy":
        most = max(len(samples.classes or ()), int(targets.max()) + 1)
        if outputs.ndim < 2 or outputs.shape[1] < most:
            raise BadSetting(f"the model gives {list(outputs.shape[1:])} outputs a sample, and the data has {most} classes")
    elif samples.loss_name in ("mse", "reconstruction"):
        if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
            targets = targets[..., None]
        if outputs.shape[1:] != targets.shape[1:]:
            raise BadSetting(f"the model gives {list(outputs.shape[1:])} a sample, and the targets are {list(targets.shape[1:])}")
    return inputs, targets


def _forward(module: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    shape = "x".join(map(str, x.shape[1:]))
    try:
        with eval_mode(module), torch.no_grad():
            outputs = module(x.to(device))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadSetting(
            f"the model does not take inputs of {shape} ({reason}): image_size=N brings pictures to another size"
        ) from error
    if not isinstance(outputs, Tensor):
        raise BadSetting(
            f"the model gives a {type(outputs).__name__}, and a probe takes a tensor: wrap it in a module that picks one"
        )
    return outputs
