"""A person's own pictures: read as they are, written back as they were.

`read_image` gives upright pixels `[C, H, W]` (grey or RGB, 8 or 16 bits) and keeps beside them what `write_image` needs to give
the picture back: alpha, colour profile, EXIF, and the range of values of a scientific TIFF. What had to be converted stands in
`notes`, to be told once. A file that cannot be trusted (truncated, not an image, larger than the pixel limit) is refused with
one line before memory is spent on it. A 16-bit photograph does not come back with 8 bits, nor without its colour profile.

>>> import tempfile, torch
>>> from sfumato.data import read_image, write_image
>>> path = tempfile.mkdtemp() + "/grey.png"
>>> write_image(path, torch.full((1, 2, 3), 0.5))
>>> picture = read_image(path)
>>> picture.pixels.shape, picture.pixels.dtype, round(float(picture.float().max()), 2)
(torch.Size([1, 2, 3]), torch.uint8, 0.5)
"""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.data.decoding import Header, Stored, decode, header
from sfumato.errors import BadData

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".tif", ".tiff", ".webp", ".avif"),
    *(".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx"),
)
"""Suffixes of the pictures that `read_image` reads; it looks at the content, not at the suffix."""


@dataclass(frozen=True)
class Picture:
    """A picture as it was stored, upright.

    Args:
        pixels: `[C, H, W]`, C = 1 or 3, uint8 or uint16.
        alpha: `[1, H, W]` of the same type, where the file has transparency.
        icc: colour profile, as stored.
        exif: EXIF block, its orientation set to upright.
        values: what 0 and 1 of `float()` stand for, in a file of floats or wide integers.
        notes: conversions that were made, to be told to the person once.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    values: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of a stored value: 8 or 16."""
        return 8 * self.pixels.element_size()

    def float(self) -> Tensor:
        """The pixels as float32 `[C, H, W]` in [0, 1]."""
        return unit_float(self.pixels)


def unit_float(pixels: Tensor) -> Tensor:
    """uint8 or uint16 as float32 in [0, 1]; floats as float32."""
    return pixels.float() if pixels.is_floating_point() else torch.div(pixels, torch.iinfo(pixels.dtype).max)


def read_image(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> Picture:
    """Read one picture: PNG, JPEG, TIFF, WebP, AVIF, BMP, GIF, PNM or JPEG 2000; of animations and stacks the first frame.

    Args:
        path: the file.
        max_pixels: largest width x height that is decoded; None: SFUMATO_MAX_PIXELS, or 200 million.

    Returns:
        A `Picture`.

    Raises:
        BadData: missing, empty, truncated, not an image, of an unsupported kind, or larger than the limit.
    """
    return as_picture(decode(path, max_pixels))


def as_picture(stored: Stored) -> Picture:
    """What was decoded, as tensors with the alpha apart."""
    array, icc, exif, values, notes = stored
    planes = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    if len(planes) in (1, 3):
        return Picture(planes, None, icc, exif, values, tuple(notes))
    notes.append("transparency set aside (written back to PNG, TIFF and WebP)")
    return Picture(planes[:-1], planes[-1:], icc, exif, values, tuple(notes))


def read_header(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> Header:
    """Channels and upright size of a picture, read from the first bytes of its file.

    Raises:
        BadData: as `read_image`, as far as the header shows it.
    """
    return header(path, max_pixels)


def write_image(path: str | os.PathLike[str], x: Tensor, like: Picture | None = None, *, bits: int | None = None) -> None:
    """Write pixels to a file, as `like` was stored: its bit depth, alpha, colour profile and EXIF where the format has them.

    The file is written aside and renamed, so that no half picture is left behind.

    Args:
        path: .png, .tif (8, 16 bits; a TIFF keeps float values), .jpg (quality 95, 4:4:4), .webp, .avif, .bmp, .ppm, .pgm;
            missing folders are made.
        x: `[C, H, W]`, C = 1 or 3: float in [0, 1] (clipped), or uint8 or uint16.
        like: the picture that `x` was made from; its alpha is resampled to the size of `x`.
        bits: 8 or 16 (PNG and TIFF only); None: those of `like`, else 8.

    Raises:
        BadData: non-finite values, an unknown suffix, or a place that cannot be written to.
    """
    path = Path(path)
    if x.ndim != 3 or len(x) not in (1, 3):
        raise ValueError(f"a picture is [1 or 3, H, W], not {list(x.shape)}")
    x = unit_float(x.detach().cpu())
    if not torch.isfinite(x).all():
        raise BadData(f"{path}: the picture to write holds NaN or infinite values; nothing was written")
    save = _WRITERS.get(path.suffix.lower())
    if save is None:
        raise BadData(f"{path}: cannot write {path.suffix or 'a file without suffix'}: say {', '.join(sorted(_WRITERS))}")
    like = like or Picture(torch.empty(0, dtype=torch.uint8))
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(aside, x, like, bits or like.bits)
        os.replace(aside, path)
    except OSError as error:
        raise BadData(f"{path}: cannot be written ({error.strerror or error}): choose another place or free some space") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _write_pillow(path: Path, x: Tensor, like: Picture, bits: int, *, format: str, alpha: bool = False, **options: Any) -> None:
    image = Image.fromarray(_levels(x, like, 8, alpha))
    if like.exif and not (format == "JPEG" and len(like.exif) > 65_500):  # what one JPEG segment holds
        options["exif"] = like.exif
    image.save(path, format=format, icc_profile=_profile(like, len(x)), **options)


def _write_png(path: Path, x: Tensor, like: Picture, bits: int) -> None:
    if bits == 8:
        return _write_pillow(path, x, like, 8, format="PNG", alpha=True)
    import png

    array = _levels(x, like, 16, True)
    height, width, depth = *array.shape[:2], array.size // (array.shape[0] * array.shape[1])
    body = io.BytesIO()
    writer = png.Writer(width, height, greyscale=depth < 3, alpha=depth in (2, 4), bitdepth=16)
    writer.write_packed(body, (row.tobytes() for row in array.astype(">u2")))
    stored = body.getvalue()
    with open(path, "wb") as file:
        file.write(stored[:33])  # the signature and IHDR; pypng has no words for the two chunks that follow
        if icc := _profile(like, len(x)):
            png.write_chunk(file, b"iCCP", b"icc\0\0" + zlib.compress(icc))
        if like.exif:
            png.write_chunk(file, b"eXIf", like.exif.removeprefix(b"Exif\0\0"))
        file.write(stored[33:])


def _write_tiff(path: Path, x: Tensor, like: Picture, bits: int) -> None:
    if bits == 8:
        return _write_pillow(path, x, like, 8, format="TIFF", alpha=True, compression="tiff_deflate")
    import tifffile

    array = _levels(x, like, 16, True)
    if like.values is not None:
        low, high = like.values
        array = x.double().mul(high - low).add(low).float().permute(1, 2, 0).squeeze(-1).numpy()
    tifffile.imwrite(
        path, array, photometric="rgb" if len(x) == 3 else "minisblack", compression="zlib", metadata=None,
        extrasamples=["unassalpha"] if array.ndim == 3 and array.shape[-1] in (2, 4) else None, iccprofile=_profile(like, len(x)),
    )  # fmt: skip


def _levels(x: Tensor, like: Picture, bits: int, alpha: bool) -> np.ndarray:
    """`[H, W]` or `[H, W, C]` of the wanted bits, with the alpha of `like` where it is wanted."""
    if alpha and like.alpha is not None:
        mask = unit_float(like.alpha)
        if mask.shape[1:] != x.shape[1:]:
            mask = F.interpolate(mask[None], x.shape[1:], mode="bilinear", antialias=True)[0]
        x = torch.cat((x, mask))
    levels = x.clamp(0, 1).mul(2**bits - 1).round().permute(1, 2, 0).numpy().astype(np.uint8 if bits == 8 else np.uint16)
    return levels[..., 0] if len(x) == 1 else levels


def _profile(like: Picture, channels: int) -> bytes | None:
    """The colour profile, unless it speaks of another number of channels."""
    return like.icc if like.icc and like.icc[16:20] == {1: b"GRAY", 3: b"RGB "}[channels] else None


_WRITERS: dict[str, Callable[[Path, Tensor, Picture, int], None]] = {
    ".png": _write_png,
    **dict.fromkeys((".tif", ".tiff"), _write_tiff),
    **dict.fromkeys((".jpg", ".jpeg"), partial(_write_pillow, format="JPEG", quality=95, subsampling=0)),
    ".webp": partial(_write_pillow, format="WEBP", alpha=True, quality=95),
    ".avif": partial(_write_pillow, format="AVIF", alpha=True, quality=90, subsampling="4:4:4"),
    ".bmp": partial(_write_pillow, format="BMP"),
    **dict.fromkeys((".ppm", ".pgm"), partial(_write_pillow, format="PPM")),
}

WRITABLE_SUFFIXES = tuple(_WRITERS)
"""Suffixes that `write_image` writes."""
