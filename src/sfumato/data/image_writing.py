"""A person's own pictures, written back as they were: bit depth, transparency, colour profile and EXIF.

The other half of `sfumato.data.images`: what a method made of a `Picture` goes back into a file of the same kind, so that a
16-bit photograph does not come back with 8 bits and a print profile is not lost.

>>> import tempfile, torch
>>> from sfumato.data import read_image, write_image
>>> path = tempfile.mkdtemp() + "/new.png"
>>> write_image(path, torch.rand(3, 4, 4).mul(65535).to(torch.uint16), bits=16)
>>> read_image(path).pixels.dtype
torch.uint16
"""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.data.images import Picture, unit_float
from sfumato.errors import BadData


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
