"""A data set of images that the engine, a DataLoader or a person's own loop can index: `ImageSet`.

What lies in memory is kept as it was stored (mostly uint8) and becomes float in [0, 1] when it is handed out in a batch, so that
512 MB hold 40,000 images of 64 x 64. Sets are picklable and are only read, so workers of any kind may share them.

>>> import torch
>>> from sfumato.data import open_data
>>> images = open_data((torch.rand(10, 3, 8, 8), torch.arange(10) % 2))
>>> images.facts.classes, images[3].label, images.gather(torch.tensor([4, 2])).x.shape
(('0', '1'), 1, torch.Size([2, 3, 8, 8]))
>>> print(images)
10 images, 2 classes, 8x8
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sfumato.data.batch import Batch, Facts
from sfumato.data.images import unit_float
from sfumato.errors import BadData


class Sample(NamedTuple):
    """One sample: `x` `[C, H, W]` (video `[T, C, H, W]`), uint8 or float in [0, 1]; its class number, target, boxes `[n, 4]`."""

    x: Tensor
    label: int | None = None
    target: Tensor | None = None
    boxes: Tensor | None = None


class Items(Protocol):
    """Where the samples of a set come from."""

    labelled: bool
    paired: bool
    boxed: bool

    def __len__(self) -> int: ...
    def read(self, i: int) -> Sample:
        """Sample `i`, or `BadData` where its file went bad."""
        ...

    def sizes(self) -> Sequence[tuple[int, int]]:
        """(H, W) of the samples, as far as they are known without reading; one for all where all are equal."""
        ...

    def channels(self) -> int:
        """Channels of every sample."""
        ...


class InMemory:
    """Samples in memory: one tensor `[N, ...]`, or a list of tensors of unlike sizes."""

    def __init__(
        self,
        x: Tensor | list[Tensor],
        labels: Tensor | None = None,
        target: Tensor | list[Tensor] | None = None,
        boxes: Tensor | None = None,
    ) -> None:
        self.x, self.labels, self.target, self.boxes = _stacked(x), labels, None if target is None else _stacked(target), boxes
        self.labelled, self.paired, self.boxed = labels is not None, target is not None, boxes is not None

    def __len__(self) -> int:
        return len(self.x)

    def read(self, i: int) -> Sample:
        """Sample `i`; 16 bits as floats, since few transforms know uint16."""
        label = None if self.labels is None else int(self.labels[i])
        target = None if self.target is None else _no_uint16(self.target[i])
        return Sample(_no_uint16(self.x[i]), label, target, None if self.boxes is None else self.boxes[i])

    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the samples: one where they are stacked, none where they are no images."""
        some = self.x[:1] if isinstance(self.x, Tensor) else self.x
        return [(s.shape[-2], s.shape[-1]) for s in some if s.ndim >= 3]

    def channels(self) -> int:
        """Channels of an image, or the length of a vector."""
        shape = self.x[0].shape
        return shape[-3] if len(shape) >= 3 else int(shape.numel())

    def gather(self, index: Tensor) -> Batch | None:
        """Samples at once, without a loop; None where sizes differ."""
        if isinstance(self.x, list) or isinstance(self.target, list):
            return None
        label = None if self.labels is None else self.labels.index_select(0, index)
        target = None if self.target is None else as_unit(self.target.index_select(0, index))
        boxes = None if self.boxes is None else self.boxes.index_select(0, index)
        return Batch(as_unit(self.x.index_select(0, index)), index, label, target, boxes)

    def select(self, rows: Sequence[int]) -> InMemory:
        """Some of the samples, in the given order."""
        index = torch.tensor(rows)
        x, labels, target, boxes = (
            None if v is None else v[index] if isinstance(v, Tensor) else [v[i] for i in rows]
            for v in (self.x, self.labels, self.target, self.boxes)
        )
        return InMemory(x, labels, target, boxes)  # type: ignore[arg-type]


class Selected:
    """Some samples of others, in the given order."""

    def __init__(self, items: Items, rows: Sequence[int]) -> None:
        self.items, self.rows = items, list(rows)
        self.labelled, self.paired, self.boxed = items.labelled, items.paired, items.boxed

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> Sample:
        """Sample `i` of the selection."""
        return self.items.read(self.rows[i])

    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the samples, as far as they are known."""
        known = self.items.sizes()
        return [known[i] for i in self.rows] if len(known) == len(self.items) else list(known)

    def channels(self) -> int:
        """Channels of every sample."""
        return self.items.channels()


class ImageSet(Dataset[Sample]):
    """A map-style data set of images, labelled images, pairs or clips.

    Args:
        items: where the samples come from.
        classes: class names in label order.
        names: file names (or keys, or numbers) of the samples.
        skipped: (name, reason) of what was found and could not be used; files that go bad later are added (each worker
            process of a DataLoader has its own list).
        notes: conversions, to be told once.
    """

    def __init__(
        self,
        items: Items,
        *,
        classes: Sequence[str] | None = None,
        names: Sequence[str] = (),
        skipped: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.items = items
        self.names = list(names) or [str(i) for i in range(len(items))]
        self.skipped, self.notes = list(skipped), list(notes)
        sizes = set(items.sizes())
        self.facts = Facts(
            count=len(items),
            channels=items.channels(),
            size=sizes.pop() if len(sizes) == 1 else None,
            classes=None if classes is None else tuple(classes),
            fields=("x", "index") + ("label",) * (items.labelled) + ("target",) * items.paired + ("boxes",) * items.boxed,
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        for at in (*range(i, len(self)), *range(i)):  # the next readable one stands in for a file that went bad
            try:
                return self.items.read(at)
            except BadData as error:
                reason = (self.names[at], str(error).removeprefix(f"{self.names[at]}: "))
                if reason not in self.skipped:
                    self.skipped.append(reason)
        raise BadData(f"none of the {len(self)} images can be read any more; the last one: {self.skipped[-1][1]}")

    @property
    def in_memory(self) -> bool:
        """Whether samples lie decoded in memory, so that loading processes would gain nothing."""
        return hasattr(self.items, "gather")

    def gather(self, index: Tensor) -> Batch:
        """The samples at `index` `[B]` as one batch on the CPU; no loop over samples where they lie in memory.

        Raises:
            BadData: the images have unlike sizes.
        """
        index = index.cpu()
        fast = getattr(self.items, "gather", None)
        batch: Batch | None = fast(index) if fast else None
        return batch or self._gather_one_by_one(index)

    def tensors(self) -> Batch:
        """The whole set as one batch, images as floats in [0, 1].

        Raises:
            BadData: the images have unlike sizes.
        """
        return self.gather(torch.arange(len(self)))

    def select(self, rows: Sequence[int]) -> ImageSet:
        """The samples at these positions, in their order, as a set of their own.

        Raises:
            BadData: no positions.
        """
        if not len(rows):
            raise BadData("a set of images needs at least one: give positions to select")
        items = self.items.select(rows) if isinstance(self.items, InMemory) else Selected(self.items, rows)
        return ImageSet(items, classes=self.facts.classes, names=[self.names[i] for i in rows])

    def __str__(self) -> str:
        return summary(self)

    def _gather_one_by_one(self, index: Tensor) -> Batch:
        samples = [self[i] for i in index.tolist()]
        x = [as_unit(s.x) for s in samples]
        target = [as_unit(s.target) for s in samples if s.target is not None]
        if len({t.shape for t in x}) > 1 or len({t.shape for t in target}) > 1:
            sizes = sorted({f"{t.shape[-1]}x{t.shape[-2]}" for t in x + target})
            raise BadData(f"the images have unlike sizes ({', '.join(sizes[:4])}): crop or resize them to one size")
        label = torch.tensor([s.label for s in samples]) if self.items.labelled else None
        boxes = [s.boxes for s in samples if s.boxes is not None]
        return Batch(torch.stack(x), index, label, torch.stack(target) if target else None, torch.stack(boxes) if boxes else None)


def summary(train: ImageSet, test: ImageSet | None = None) -> str:
    """One line: how many images, of what size, and what was skipped."""
    sets = [train] if test is None else [train, test]
    facts, count = train.facts, sum(len(s) for s in sets)
    sizes = sorted({size for s in sets for size in s.items.sizes()}, key=lambda size: (size[0] * size[1], size))
    ends = dict.fromkeys(f"{w}x{h}" for h, w in (sizes[:1] + sizes[-1:]))
    skipped = {one for s in sets for one in s.skipped}
    pairs = train.items.paired and not train.items.boxed
    kind = ("pair" if pairs else "image" if sizes else "sample") + "s" * (count != 1)
    parts = [
        f"{count} {kind}" + (f" ({len(test)} to test on)" if test else ""),
        f"{len(facts.classes)} classes" if facts.classes else "",
        "boxed objects" if train.items.boxed else "",
        " to ".join(ends),
        "grey" if facts.channels == 1 and sizes else "",
        f"{len(skipped)} skipped" if skipped else "",
    ]
    return ", ".join(part for part in parts if part)


def as_unit(x: Tensor) -> Tensor:
    """Stored pixels (uint8, uint16) as floats in [0, 1]; anything else as it is."""
    return unit_float(x) if x.dtype in (torch.uint8, torch.uint16) else x


def to_channels(pixels: Tensor, channels: int) -> Tensor:
    """`[..., C, H, W]` with `channels` channels: grey is repeated, colour becomes BT.601 luma, of the same type."""
    if pixels.shape[-3] == channels:
        return pixels
    if pixels.shape[-3] == 1:
        return torch.cat([pixels] * channels, -3)
    r, g, b = pixels.float().unbind(-3)
    grey = (0.299 * r + 0.587 * g + 0.114 * b).unsqueeze(-3)
    return grey if pixels.is_floating_point() else grey.round().to(pixels.dtype)


def _no_uint16(x: Tensor) -> Tensor:
    return unit_float(x) if x.dtype == torch.uint16 else x


def _stacked(x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(x, Tensor) or len({(t.shape, t.dtype) for t in x}) > 1:
        return x
    return torch.stack(x)
