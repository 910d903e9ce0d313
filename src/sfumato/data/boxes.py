"""Changes to boxed objects and what is known of them: noise on boxes, covers over objects, a map of their centres.

    IoU jitter:  each side moves by side · U(-e, e),  e = min((1 - √q) / 2, (1 / √q - 1) / 2):  IoU with the old box is at least q

Source: Panariello et al. 2024, "Monocular per-object distance estimation with Masked Object Modeling", arXiv 2401.03191 (noise on
boxes and the map of centres; official code `utils/bboxes.py`).

>>> import torch
>>> from sfumato.data import center_heatmap, cover_boxes, jitter_boxes
>>> boxes = torch.tensor([[[0.0, 0.0, 8.0, 4.0], [2.0, 2.0, 6.0, 6.0]]])
>>> jitter_boxes(boxes, (16, 16), mode="iou").shape, center_heatmap(boxes, (16, 16)).shape
(torch.Size([1, 2, 4]), torch.Size([1, 1, 16, 16]))
>>> int((cover_boxes(torch.zeros(1, 3, 16, 16), boxes[:, :1], 0.5) > 0).sum())  # half of 8 x 4 pixels, three channels
48
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.nn.boxes import Boxes, box_rows, pad_boxes, pixels_in_boxes


def jitter_boxes(
    boxes: Tensor,
    size: tuple[int, int],
    *,
    mode: str = "scale",
    offset: float = 0.01,
    scale: tuple[float, float] = (0.9, 1.1),
    iou: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sloppy boxes, as a detector would give them.

    Args:
        boxes: `[..., 4]` xyxy in pixels; rows of NaN stay.
        size: (H, W) of the image; boxes are cut at its border.
        mode: "scale": both axes are scaled about the centre and the box is moved by up to `offset` of the image; "iou": each
            side moves on its own, so that the box keeps at least `iou` in common with the old one (before it is cut).
        offset: largest shift to the right and down, share of the image's sides.
        scale: smallest and largest factor of each axis.
        iou: least intersection over union, above 0 to 1.
        generator: source of the draws.

    Returns:
        Like `boxes`.

    Raises:
        BadSetting: an unknown mode, or an `iou` out of its range.
    """
    if mode not in ("scale", "iou") or not 0 < iou <= 1:
        raise BadSetting(f"mode={mode!r}, iou={iou}: the mode is 'scale' or 'iou', iou is above 0 and at most 1")
    device = boxes.device if generator is None else generator.device
    u = torch.rand(boxes.shape, generator=generator, device=device).to(boxes)
    first, last = boxes[..., :2], boxes[..., 2:]
    side = last - first
    frame = boxes.new_tensor([size[1], size[0]])
    if mode == "scale":
        centre = (first + last) / 2 + frame * offset * u[..., :2]
        half = side / 2 * (scale[0] + (scale[1] - scale[0]) * u[..., 2:])
        moved = torch.cat((centre - half, centre + half), -1)
    else:
        e = min((1 - iou**0.5) / 2, (iou**-0.5 - 1) / 2)
        moved = boxes + torch.cat((side, side), -1) * e * (2 * u - 1)
    return torch.minimum(moved.clamp(min=0), torch.cat((frame, frame)))


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes `[..., 4]` xyxy of an image of a width in pixels, after it was mirrored left to right."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((width - x2, y1, width - x1, y2), -1)


def cover_boxes(
    x: Tensor, boxes: Tensor, share: float, *, value: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """A plain strip over a share of every box, from one of its four sides.

    Args:
        x: `[B, C, H, W]`.
        boxes: `[B, n, 4]` xyxy in pixels, rows of NaN where there is none.
        share: covered share of each box's area, by its own strip; others' may cover more.
        value: of the strips; grey for pictures in [0, 1].
        generator: source of the sides.

    Returns:
        Like `x`.
    """
    device = boxes.device if generator is None else generator.device
    side = torch.randint(4, boxes.shape[:2], generator=generator, device=device).to(boxes.device)
    first, last = boxes[..., :2], boxes[..., 2:]
    reach = (last - first) * share
    axis = torch.nn.functional.one_hot(side % 2, 2).bool()  # x or y
    begins = torch.where(axis & (side >= 2)[..., None], last - reach, first)
    ends = torch.where(axis & (side < 2)[..., None], first + reach, last)
    strips = pixels_in_boxes(torch.cat((begins, ends), -1), (x.shape[-2], x.shape[-1]))
    return torch.where(strips.any(1, keepdim=True), value, x)


def center_heatmap(boxes: Boxes, size: tuple[int, int], *, sigma: float = 2.0) -> Tensor:
    """A map with a Gaussian bump at the centre of each box; where bumps overlap, the larger value counts.

    Args:
        boxes: padded `[B, n, 4]`, or a list with `[n, 4]` for each image.
        size: (H, W) of the map.
        sigma: width of a bump, pixels; it is cut off at a square of ⌊6.25 σ⌋ pixels (made odd).

    Returns:
        `[B, 1, H, W]` in [0, 1], 1 at the pixel that holds a centre.

    Raises:
        BadData: rows, which do not tell how many images there are.
    """
    if isinstance(boxes, Tensor) and boxes.ndim == 2:
        raise BadData("a map of centres needs boxes [B, n, 4] or a list: rows [N, 5] do not tell how many images there are")
    padded = boxes if isinstance(boxes, Tensor) else pad_boxes(boxes)
    rows, (height, width) = box_rows(padded), size
    reach = (int(6.25 * sigma) | 1) // 2
    d = torch.arange(-reach, reach + 1, device=rows.device)
    bump = torch.exp(-d.square() / (2 * sigma**2)).to(rows.dtype)
    x, y = ((rows[:, k] + rows[:, k + 2]).div(2).floor().long()[:, None] + d for k in (1, 2))  # [N, side]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    place = (rows[:, 0].long()[:, None, None] * height + y[:, :, None]) * width + x[:, None]
    values = (bump[:, None] * bump).expand_as(inside)
    flat = rows.new_zeros(len(padded) * height * width)
    return flat.scatter_reduce(0, place[inside], values[inside], "amax").view(-1, 1, height, width)
