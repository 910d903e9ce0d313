"""Boxes around objects: ragged boxes in a rectangular tensor, crops of one size, the pixels inside.

    padded:  [B, n, 4] xyxy in pixels, rows of NaN where an image has fewer than n objects
    rows:    [N, 5] (image, x1, y1, x2, y2), the real boxes of all images, as `torchvision.ops.roi_align` takes them

Source: He et al. 2017, "Mask R-CNN" (RoIAlign).

>>> import torch
>>> from sfumato.nn import box_rows, pad_boxes, pixels_in_boxes, resized_crops
>>> padded = pad_boxes([torch.tensor([[0.0, 0.0, 8.0, 4.0], [2.0, 2.0, 6.0, 6.0]]), torch.empty(0, 4)])
>>> padded.shape, box_rows(padded)[:, 0].tolist(), pixels_in_boxes(padded, (16, 16)).sum((2, 3)).tolist()
(torch.Size([2, 2, 4]), [0.0, 0.0], [[32, 16], [0, 0]])
>>> resized_crops(torch.rand(2, 3, 16, 16), padded, (10, 5)).shape
torch.Size([2, 3, 10, 5])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import BadData

Boxes = Tensor | Sequence[Tensor]
"""Padded boxes `[B, n, 4]`, rows `[N, 5]`, or a list with `[n, 4]` for each image; xyxy in pixels of the image."""


def pad_boxes(boxes: Sequence[Tensor], *, length: int | None = None) -> Tensor:
    """Ragged rows in one tensor; what is missing is NaN.

    Args:
        boxes: `[n, D]` for each image (D = 4 for boxes; any D for what belongs to them).
        length: rows an image; None: as many as the fullest image has.

    Returns:
        `[B, length, D]`.

    Raises:
        BadData: no images, or an image with more rows than `length`.
    """
    if not len(boxes):
        raise BadData("boxes of no image: give a list with one tensor [n, 4] an image")
    padded = torch.nn.utils.rnn.pad_sequence(list(boxes), batch_first=True, padding_value=torch.nan)
    most = padded.shape[1]
    if length is None or length == most:
        return padded
    if length < most:
        raise BadData(f"an image has {most} boxes, more than length={length}")
    return torch.cat((padded, padded.new_full((len(padded), length - most, padded.shape[2]), torch.nan)), 1)


def box_rows(boxes: Boxes) -> Tensor:
    """The real boxes of all images below each other.

    Args:
        boxes: padded, a list, or rows already (returned as they are).

    Returns:
        `[N, 5]`: number of the image, x1, y1, x2, y2; in the order of images, then of boxes.

    Raises:
        BadData: another shape.
    """
    padded = boxes if isinstance(boxes, Tensor) else pad_boxes(boxes)
    if padded.ndim == 2 and padded.shape[1] == 5:
        return padded
    if padded.ndim != 3 or padded.shape[2] != 4:
        raise BadData(f"boxes are {list(padded.shape)}: give [B, n, 4], xyxy in pixels, or a list with [n, 4] for each image")
    there = padded.isfinite().all(-1)
    return torch.cat((there.nonzero()[:, :1].to(padded.dtype), padded[there]), 1)


def resized_crops(images: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """What is inside each box, resized to one size.

    A pixel of the result is the mean of bilinear samples over its area (`roi_align` with as many samples as pixels): antialiased
    where the box shrinks, bilinear where it grows.

    Args:
        images: `[B, C, H, W]`.
        boxes: see `Boxes`; sides shorter than a pixel are taken as one pixel.
        size: (height, width) of the crops.

    Returns:
        `[N, C, height, width]`.
    """
    from torchvision.ops import roi_align

    rows = box_rows(boxes).to(images)
    first, last = rows[:, :3], torch.maximum(rows[:, 3:], rows[:, 1:3] + 1)
    crops: Tensor = roi_align(images, torch.cat((first, last), 1), size, aligned=True)
    return crops


def pixels_in_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels whose centre lies in each box.

    Args:
        boxes: `[B, n, 4]` xyxy in pixels; none lies in a row of NaN.
        size: (H, W) of the image.

    Returns:
        `[B, n, H, W]` bool.
    """
    y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in size)
    x1, y1, x2, y2 = (v[..., None] for v in boxes.unbind(-1))
    return ((y >= y1) & (y < y2))[..., :, None] & ((x >= x1) & (x < x2))[..., None, :]


def box_geometry(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a box is and how large: centre and log-side over the image's.

    Args:
        boxes: `[..., 4]` xyxy in pixels; sides shorter than a pixel count as one.
        size: (H, W) of the image.

    Returns:
        `[..., 4]`: x, y, log width, log height.
    """
    first, last, frame = boxes[..., :2], boxes[..., 2:], boxes.new_tensor([size[1], size[0]])
    return torch.cat(((first + last) / (2 * frame), ((last - first).clamp(min=1) / frame).log()), -1)
