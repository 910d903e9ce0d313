"""What the engine hands to a method: one typed `Batch`, and the `Facts` about the data that it comes from.

>>> import torch
>>> from sfumato.data import Batch
>>> batch = Batch(x=torch.zeros(4, 3, 8, 8), index=torch.arange(4))
>>> len(batch), batch.label is None
(4, True)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Args:
        x: inputs; images are `[B, C, H, W]` in [0, 1], video `[B, T, C, H, W]`.
        index: `[B]`, the position of each sample in its data set (long).
        label: `[B]`, class numbers (long), where the data has classes.
        target: what `x` should become, `[B, C, H, W]`, where the data is paired; of boxes what is known, `[B, n, K]`.
        boxes: `[B, n, 4]`, xyxy in pixels of `x`, where objects are boxed; rows of NaN where an image has fewer than n.
    """

    x: Tensor
    index: Tensor
    label: Tensor | None = None
    target: Tensor | None = None
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (no copy where it is already there)."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if value is not None:
                values[name] = value.to(device, non_blocking=True)
        return Batch(**values)


@dataclass(frozen=True)
class Facts:
    """What is known of a data set before it is read; settings left at None take their value from here.

    Args:
        count: number of samples.
        channels: channels of an image.
        size: `(H, W)` when all images share it, else None.
        classes: class names in label order, or None.
        fields: the `Batch` fields that the data fills.
    """

    count: int
    channels: int
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    fields: tuple[str, ...] = ("x", "index")
