"""Data as tensors, whole and on the CPU, with the loss that compares them; nothing here knows the model but by what it eats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data import Batch, ImageSet, open_data
from sfumato.engine.randomness import key
from sfumato.engine.stream import Augmented, collate
from sfumato.errors import BadData, BadSetting
from sfumato.instruments.kinds import Setup
from sfumato.instruments.model_words import named_object
from sfumato.probes.operators import LossFunction

LOSSES: dict[str, LossFunction] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "reconstruction": F.mse_loss}
"""By name; reconstruction compares outputs with the inputs themselves."""
SAMPLES = 512


@dataclass
class Samples:
    """Inputs and targets in one piece, the loss that compares them, and what they were before."""

    inputs: Tensor
    targets: Tensor
    criterion: LossFunction
    loss_name: str
    told: str
    classes: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)

    def outputs(self) -> int | None:
        """How many outputs a model needs for them; None: the data does not say."""
        if self.targets is self.inputs:
            return None
        if self.targets.is_floating_point():
            return self.targets[0].numel()
        return len(self.classes) if self.classes else int(self.targets.max()) + 1


def given_samples(data: Iterable[Any], loss: Any, setup: Setup) -> Samples:
    """The first pairs of a person's own batches."""
    inputs, targets = _collect(data, setup.samples or SAMPLES)
    loss_name, criterion = _loss(loss, labelled=not targets.is_floating_point(), paired=True)
    targets = inputs if loss_name == "reconstruction" else targets
    return Samples(inputs, targets, criterion, loss_name, "pairs of inputs and targets")


def opened_samples(data: Any, loss: Any, setup: Setup, eats: dict[str, Any], seed: int) -> Samples:
    """Samples from a place, of the size that a model needs, and standardised where it is one of timm's."""
    images = opened_images(data, setup.split, eats.get("channels"))
    size = _size(eats, images, setup)
    labelled, paired = images.items.labelled, images.items.paired
    loss_name, criterion = _loss(loss, labelled=labelled, paired=paired)
    whole = read(images, draw_samples(len(images), setup, seed), crop_to((size, size)) if size else None, seed)
    notes, inputs = [], whole.x
    if size is not None and images.facts.size != (size, size):
        notes.append(f"pictures are resized and cut to {size} x {size} pixels")
    if eats and inputs.ndim == 4:
        mean, std = (torch.tensor(eats[part]).view(-1, 1, 1) for part in ("mean", "std"))
        inputs = (inputs - mean) / std
        notes.append("pixels are standardised as timm does for this model")
    order = {"mse": (whole.target, whole.label), "reconstruction": ()}.get(loss_name, (whole.label, whole.target))
    targets = next((t for t in order if t is not None), inputs)
    return Samples(inputs, targets, criterion, loss_name, str(images), images.facts.classes, notes)


def _loss(loss: str | LossFunction | None, *, labelled: bool, paired: bool) -> tuple[str, LossFunction]:
    """The loss's name and the function; refused where the data lacks what it compares with."""
    if loss is None:
        loss = "cross_entropy" if labelled else "mse" if paired else None
    if loss is None:
        raise BadData(
            "this data has neither labels nor targets: give one folder per class, arrays with y or target, pairs:IN:TARGET, "
            "or --loss module:function, which is called with outputs and inputs"
        )
    if callable(loss):
        return getattr(loss, "__name__", type(loss).__name__), loss
    if loss == "cross_entropy" and not labelled:
        raise BadData("cross_entropy needs a label with every sample: give one folder per class, or arrays with y")
    if loss == "mse" and not paired:
        raise BadData("mse needs a target with every sample: give pairs:IN:TARGET, or arrays with target")
    if loss in LOSSES:
        return loss, LOSSES[loss]
    if ":" not in loss:
        raise BadSetting(f"there is no loss {loss!r}: say {', '.join(LOSSES)} or module:function")
    return loss, named_object(loss)


def is_pairs(data: Any) -> bool:
    """Batches as the model takes them, rather than a place or images."""
    if isinstance(data, torch.utils.data.DataLoader):
        return True
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, (tuple, list)) and len(first) == 2 and all(isinstance(t, Tensor) for t in first)


def _collect(data: Iterable[Any], samples: int) -> tuple[Tensor, Tensor]:
    """The first samples of batches, on the CPU."""
    xs, ys, count = [], [], 0
    for x, y in data:
        xs.append(x.detach().cpu())
        ys.append(y.detach().cpu())
        count += len(x)
        if count >= samples:
            break
    if not count:
        raise BadData("the data is empty: give at least one pair (inputs, targets)")
    return torch.cat(xs)[:samples], torch.cat(ys)[:samples]


def opened_images(data: Any, split: str, channels: int | None) -> ImageSet:
    """The split of a place, or a refusal where it has none."""
    images = open_data(data, split, channels=channels if channels in (1, 3) else None)
    if images is None:
        raise BadData("this data has no test part: say split=train")
    return images


def draw_samples(count: int, setup: Setup, seed: int) -> Tensor:
    """Which samples, in random order, so that the first of them are a fair draw too."""
    generator = torch.Generator().manual_seed(key(seed, "probe samples"))
    return torch.randperm(count, generator=generator)[: setup.samples or SAMPLES]


def _size(eats: dict[str, Any], images: ImageSet, setup: Setup) -> int | None:
    """Pixels a side that pictures are brought to; None: they stay as they are."""
    if setup.image_size or not images.items.sizes():
        return setup.image_size
    alike = images.facts.size
    if not eats:
        return None
    return eats["size"] if eats["fixed"] or alike is None or alike[0] != alike[1] or alike[0] > eats["size"] else None


def crop_to(size: tuple[int, int]) -> Callable[..., Any]:
    """The shorter side to the size, then the middle."""
    from torchvision.transforms import v2

    crop: Callable[..., Any] = v2.Compose([v2.Resize(min(size), antialias=True), v2.CenterCrop(size)])
    return crop


def read(images: ImageSet, index: Tensor, transform: Callable[..., Any] | None, seed: int) -> Batch:
    """These samples as one batch, each through the transform."""
    if transform is None:
        return images.gather(index)
    samples = Augmented(images, transform, seed)
    return collate([samples[(0, i)] for i in index.tolist()])
