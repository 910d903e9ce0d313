"""From a data set to the micro-batches of a step. The position is one number, so there is nothing to save.

Sample number p of a training is sample `perm_e[p mod n]` of epoch `e = p div n`; the permutation is keyed by (seed, epoch), its
augmentation by (seed, epoch, index). Step s of global batch B takes p = sB ... (s+1)B - 1, cut into equal micro-batches over
accumulation and processes, so 2 processes see what 1 process with accumulation 2 sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sfumato.data.arrays import checked
from sfumato.data.image_set import as_unit
from sfumato.engine.randomness import key
from sfumato.errors import BadData, BadSetting
from sfumato.method import Batch

Key = tuple[int, int]
"""(epoch, index) of a sample."""


class Order(Sampler[list[Key]]):
    """The keys of every micro-batch of this process, from a step on, without end."""

    def __init__(self, count: int, *, batch_size: int, accumulate: int, rank: int, world: int, start: int, seed: int) -> None:
        if batch_size % (accumulate * world):
            raise BadSetting(
                f"batch_size={batch_size} cannot be cut into {accumulate} micro-batches on {world} processes: "
                f"set it to a multiple of {accumulate * world}"
            )
        self.count, self.batch_size, self.parts = count, batch_size, accumulate * world
        self.accumulate, self.rank, self.world, self.start, self.seed = accumulate, rank, world, start, seed
        self._permutation = lru_cache(2)(self._permute)

    def _permute(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        order: list[int] = torch.randperm(self.count, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[list[Key]]:
        micro, step = self.batch_size // self.parts, self.start
        while True:
            for i in range(self.accumulate):
                first = step * self.batch_size + (i * self.world + self.rank) * micro
                keys = [divmod(p, self.count) for p in range(first, first + micro)]
                yield [(epoch, self._permutation(epoch)[i]) for epoch, i in keys]
            step += 1


class Augmented(Dataset[Any]):
    """A data set whose samples are augmented with randomness keyed by (seed, epoch, index)."""

    def __init__(self, data: Any, augment: Callable[..., Any] | None, seed: int) -> None:
        self.data, self.augment, self.seed = data, augment, seed

    def __getitem__(self, at: Key) -> tuple[Tensor, int, int | None, Tensor | None, Tensor | None]:
        epoch, index = at
        sample = self.data[index]
        x, target, boxes = sample.x, sample.target, sample.boxes
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(key(self.seed, "augment", epoch, index))
                if target is None and boxes is None:
                    x = self.augment(x)
                else:
                    from torchvision.tv_tensors import BoundingBoxes, Image

                    if boxes is None:
                        x, target = self.augment(Image(x), Image(target))
                    else:  # the target is of the boxes: numbers, which do not move
                        size = (x.shape[-2], x.shape[-1])
                        x, boxes = self.augment(Image(x), BoundingBoxes(boxes, format="XYXY", canvas_size=size))
        boxes = None if boxes is None else boxes.as_subclass(Tensor)
        return unit(x), index, sample.label, None if target is None else unit(target), boxes


def unit(x: Tensor) -> Tensor:
    """Pixels in [0, 1], as a plain tensor."""
    return as_unit(x.as_subclass(Tensor))


def collate(samples: list[tuple[Tensor, int, int | None, Tensor | None, Tensor | None]]) -> Batch:
    """Stack samples; images of unlike sizes are refused with the way out."""
    xs, index, labels, *others = zip(*samples)
    if len({x.shape for x in xs}) > 1:
        sizes = sorted({f"{x.shape[-1]}x{x.shape[-2]}" for x in xs})[:4]
        raise BadData(f"the images have unlike sizes ({', '.join(sizes)}, ...) and this method does not crop: resize them first")
    label = None if labels[0] is None else torch.tensor(labels)
    target, boxes = (None if values[0] is None else torch.stack(values) for values in others)
    return Batch(torch.stack(xs), torch.tensor(index), label, target, boxes)


Stream = Iterator[list[Batch]]


def stream(
    data: Any,
    augment: Callable[..., Any] | None,
    *,
    batch_size: int,
    start: int,
    seed: int,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Stream:
    """The micro-batches of step `start`, then of the next, without end."""
    order = Order(len(data), batch_size=batch_size, accumulate=accumulate, rank=rank, world=world, start=start, seed=seed)
    if augment is None and getattr(data, "in_memory", False) and _stacked(data):
        batches: Iterable[Batch] = (data.gather(torch.tensor([i for _, i in keys])) for keys in order)
    else:
        batches = DataLoader(
            Augmented(data, augment, seed),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            persistent_workers=workers > 0,
        )
    it = iter(batches)
    while True:
        yield [next(it) for _ in range(accumulate)]


def _stacked(data: Any) -> bool:
    """Whether the samples are of one shape and lie in one tensor, so that a batch is one look-up: pictures, or vectors."""
    return data.facts.size is not None or isinstance(getattr(getattr(data, "items", None), "x", None), Tensor)


def stream_loader(loader: Iterable[Any], *, start: int, accumulate: int = 1) -> Stream:
    """The same from a person's own DataLoader, see `read_loader`, begun again whenever it ends."""

    def endless() -> Iterator[Batch]:
        seen = 0
        while True:
            before = seen
            for batch in read_loader(loader, seen):
                yield batch
                seen += len(batch)
            if seen == before:
                raise BadData("the loader is empty" if not seen else "the loader cannot be read twice: give a DataLoader")

    it = endless()
    for _ in range(start * accumulate):
        next(it)
    while True:
        yield [next(it) for _ in range(accumulate)]


def read_loader(loader: Iterable[Any], seen: int = 0) -> Iterator[Batch]:
    """What a person's own loader gives, once through.

    Args:
        loader: gives images `[B, C, H, W]`, `(images, labels)`, `(images, targets)` (labels are whole numbers, targets floats) or
            a `Batch`, which is taken as it is.
        seen: samples that were read before; they number the next ones.

    Raises:
        BadData: it gives something else, or the first images are none (see `checked`).
    """
    for i, item in enumerate(loader):
        batch = item if isinstance(item, Batch) else _as_batch(item, seen, check=i == 0)
        seen += len(batch)
        yield batch


def _as_batch(item: Any, seen: int, check: bool) -> Batch:
    pair = isinstance(item, (tuple, list)) and len(item) > 0
    x, y = (item[0], item[1] if len(item) > 1 else None) if pair else (item, None)
    if not isinstance(x, Tensor) or not isinstance(y, (Tensor, type(None))):
        kinds = ", ".join(type(v).__name__ for v in item) if pair else type(item).__name__
        raise BadData(
            f"the loader gives {kinds}: let it give images [B, C, H, W], (images, labels), (images, targets) or a "
            "sfumato.data.Batch; a collate_fn can do that"
        )
    target = y if y is not None and y.is_floating_point() else None
    return Batch(
        unit(checked(x, "x of the loader") if check else x),
        torch.arange(seen, seen + len(x)),
        label=y if target is None else None,
        target=None if target is None else unit(target),
    )


def as_data(data: Any) -> Any:
    """A data set from whatever a person gave; loaders and data sets of ours stay as they are."""
    if hasattr(data, "facts") or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        return data
    from sfumato.data import open_data

    return open_data(data)


def epoch(
    data: Any, batch_size: int, augment: Callable[..., Any] | None = None, seed: int = 0, order: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Every sample once, in order or in the one given; a batch ends early where the next image has another size."""
    if not hasattr(data, "__getitem__"):
        yield from read_loader(data)
        return
    samples = Augmented(data, augment, seed)
    batch: list[Any] = []
    for i in range(len(data)) if order is None else order:
        sample = samples[(0, i)]
        if batch and (len(batch) == batch_size or sample[0].shape != batch[0][0].shape):
            yield collate(batch)
            batch = []
        batch.append(sample)
    if batch:
        yield collate(batch)
