"""Pictures for a page: a tensor becomes a data URI without visible loss; many become one grid.

A picture is kept as PNG (every value as it was) unless that is larger than `limit` bytes; then as WebP of quality 92, if that is
smaller. Small pictures keep their pixels: the page enlarges them without blur.

>>> import torch
>>> from sfumato.report import data_uri, grid
>>> data_uri(torch.rand(3, 8, 8))[:22]
'data:image/png;base64,'
>>> grid(torch.rand(7, 3, 8, 8), cols=4, pad=2).shape
torch.Size([3, 18, 38])
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from sfumato.errors import BadData

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PNG_LIMIT = 1_500_000
TINY = 160
"""Pictures smaller than this are shown with visible pixels."""


ImageLike: TypeAlias = "Tensor | np.ndarray | Image | str | Path | Picture"
"""What can be shown: an image `[C, H, W]` in [0, 1], a PIL image, the path of a file, or a picture that is encoded already."""


class Picture(NamedTuple):
    """An encoded picture: its data URI, and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def tiny(self) -> bool:
        """Whether its pixels should be seen when it is enlarged."""
        return max(self.width, self.height) < TINY


def as_array(image: Any) -> np.ndarray:
    """Bytes `[H, W, 3]` or `[H, W]` of an image `[C, H, W]`, `[1, C, H, W]` or `[H, W]` in [0, 1]; values outside are cut off.

    Args:
        image: a float tensor or array in [0, 1], or a uint8 one; of other than 1, 3 or 4 channels the first are shown.

    Raises:
        BadData: its shape is not that of an image.
    """
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    values = np.asarray(image)
    given = values.shape
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or not values.size:
        raise BadData(f"cannot show an array of shape {tuple(given)} as a picture: give [C, H, W] in [0, 1], or [H, W]")
    if values.shape[0] not in (1, 3, 4):
        values = values[: 1 if values.shape[0] == 2 else 3]
    if values.dtype == bool:
        values = values.astype(np.float32)
    if values.dtype != np.uint8:
        values = np.rint(np.nan_to_num(values.astype(np.float32)).clip(0, 1) * 255).astype(np.uint8)
    return values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))


def encode(image: ImageLike, *, limit: int = PNG_LIMIT, quality: int = 92) -> Picture:
    """An image as a `Picture`: PNG, or WebP of `quality` where the PNG is over `limit` bytes and the WebP is smaller.

    Args:
        image: `[C, H, W]` in [0, 1] (tensor or array), a PIL image, the path of an image file, or a `Picture` (given back).
        limit: bytes; a larger PNG is tried as WebP.
        quality: of the WebP, 0 to 100.

    Raises:
        BadData: not an image, or a file that cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, Picture):
        return image
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                opened.load()
                loaded = opened.copy()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise BadData(f"{image}: not a readable image ({error})") from error
        raw = Path(image).read_bytes()
        if loaded.mode in ("L", "RGB") and raw.startswith(b"\x89PNG") and len(raw) <= limit:
            return _picture(raw, "png", loaded)
        image = loaded
    picture = image if isinstance(image, Image.Image) else Image.fromarray(as_array(image))
    if picture.mode not in ("L", "RGB", "RGBA"):
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    png = _compressed(picture, "png", optimize=picture.width * picture.height < 500_000)
    if len(png) > limit and max(picture.size) <= 16383:  # WebP's largest side
        webp = _compressed(picture, "webp", quality=quality, method=4)
        if len(webp) < len(png):
            return _picture(webp, "webp", picture)
    return _picture(png, "png", picture)


def data_uri(image: ImageLike, *, limit: int = PNG_LIMIT, quality: int = 92) -> str:
    """The data URI of an image `[C, H, W]` in [0, 1]; see `encode`."""
    return encode(image, limit=limit, quality=quality).uri


def _compressed(picture: Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _picture(data: bytes, kind: str, picture: Image) -> Picture:
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", picture.width, picture.height)


def grid(images: Tensor, *, cols: int | None = None, pad: int = 2, fill: float = 1.0) -> Tensor:
    """Many images as one: rows of `cols`, with `pad` pixels of `fill` between them.

    Args:
        images: `[N, C, H, W]`.
        cols: images a row; default: as square as possible, `ceil(sqrt(N))`.
        pad: pixels between neighbours (none at the rim).
        fill: value of the padding and of empty places.

    Returns:
        `[C, rows * (H + pad) - pad, cols * (W + pad) - pad]`.

    Raises:
        BadData: no images, or not four dimensions.
    """
    if images.ndim != 4 or not len(images):
        raise BadData(f"a grid needs images [N, C, H, W], got {tuple(images.shape)}")
    count, channels, height, width = images.shape
    cols = min(cols or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // cols)
    tiles = images.new_full((rows * cols, channels, height + pad, width + pad), fill)
    tiles[:count, :, :height, :width] = images
    whole = tiles.view(rows, cols, *tiles.shape[1:]).permute(2, 0, 3, 1, 4)
    return whole.reshape(channels, rows * (height + pad), cols * (width + pad))[..., : -pad or None, : -pad or None]


def save_grid(images: Tensor, path: str | Path, *, cols: int | None = None, pad: int = 2, fill: float = 1.0) -> Path:
    """Write `grid(images)` as an image file (the suffix decides the format) and return its path."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(as_array(grid(images.detach(), cols=cols, pad=pad, fill=fill))).save(path)
    return path


def split_strips(strips: list[np.ndarray], *, pad: int = 2) -> list[list[np.ndarray]]:
    """The pictures of rows as `torchvision.utils.save_image(x, nrow=len(x))` writes them, parted at their black separators.

    Args:
        strips: bytes `[H, W]` or `[H, W, C]` each; all hold the same number of pictures.
        pad: pixels between and around the pictures.

    Returns:
        The pictures of each strip; whole strips where no separators are found.
    """
    count = min((_pictures_in(strip, pad) for strip in strips), default=1)
    if count < 2:
        return [[strip] for strip in strips]
    parts = []
    for strip in strips:
        step = (strip.shape[1] - pad) // count
        parts.append([strip[pad:-pad, pad + i * step : (i + 1) * step] for i in range(count)])
    return parts


def _pictures_in(strip: np.ndarray, pad: int, most: int = 64) -> int:
    """The largest number of equal pictures whose separators are all black; 1: none."""
    black = (strip.reshape(*strip.shape[:2], -1) == 0).all((0, 2))
    inner = strip.shape[1] - pad
    for count in range(min(most, inner // (pad + 4)), 1, -1):
        step = inner // count
        if inner % count == 0 and all(black[i * step : i * step + pad].all() for i in range(count + 1)):
            return count
    return 1
