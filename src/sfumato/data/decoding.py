"""Picture files of any kind to arrays, as they were stored; what `read_image` stands on.

Pillow reads most kinds. It keeps 8 bits of a 16-bit colour PNG and knows no TIFF of colour floats, so torchvision reads the first
and tifffile every TIFF of more than 8 bits. Nothing is decoded before the header is checked against the pixel limit, and only
formats that decode without outside programs are opened (no EPS, no PDF). Whatever a decoder makes of a damaged file becomes one
line of `BadData`.

>>> import tempfile, numpy as np, PIL.Image
>>> path = tempfile.mkdtemp() + "/grey.png"
>>> PIL.Image.fromarray(np.zeros((2, 3), np.uint8)).save(path)
>>> decode(path).array.shape, header(path)
((2, 3, 1), Header(channels=1, height=2, width=3))
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BadData, BadSetting, SfumatoError

MAX_PIXELS = 200_000_000
"""Largest picture that is decoded (width times height), unless `max_pixels=` or SFUMATO_MAX_PIXELS says otherwise."""

Source = str | os.PathLike[str] | bytes

_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "AVIF", "BMP", "GIF", "PPM", "JPEG2000")
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIC_HEADS = (b"ftyphei", b"ftyphev", b"ftypmif")
_ORIENTATION = 0x0112
# What EXIF of a TIFF is about the scene; its other tags describe the file's own layout and must not travel.
_TIFF_EXIF = {271, 272, 305, 306, 315, 33432, 34665, 34853}


class Header(NamedTuple):
    """What a file says of its picture before it is decoded (upright, without alpha)."""

    channels: int
    height: int
    width: int


class Stored(NamedTuple):
    """An upright array `[H, W, C]` of uint8 or uint16, C = 1 to 4, and what the file says of it (see `Picture`)."""

    array: np.ndarray
    icc: bytes | None
    exif: bytes | None
    values: tuple[float, float] | None
    notes: list[str]


def decode(source: Source, max_pixels: int | None = None, *, name: str | None = None) -> Stored:
    """Decode a picture, from its file or from the bytes of one; of animations and stacks the first frame.

    Args:
        source: path, or the bytes of a file.
        max_pixels: see `MAX_PIXELS`.
        name: what errors call it; None: the path.

    Raises:
        BadData: missing, empty, truncated, not an image, of an unsupported kind, or larger than the limit.
    """
    with _opened(source, name) as (file, head):
        image = _open(file, head)
        _check_size(_size(image, file), max_pixels)
        notes: list[str] = []
        if getattr(image, "is_animated", False) and image.format != "MPO":  # type: ignore[union-attr]
            notes.append("several frames or pages: the first one is used")
        array, turned, icc = _decode(file, head, image, notes)
        orientation, exif = (1, None) if image is None else _exif(image)  # Pillow has turned a TIFF, and says so, only now
        array, values = _as_stored(_upright(array, turned or orientation), notes)
        if array.shape[-1] > 4:
            raise BadData(f"{array.shape[-1]} channels: pictures have 1 (grey) or 3 (RGB), and maybe alpha")
        return Stored(array, icc, exif, values, notes)


def header(source: Source, max_pixels: int | None = None, *, name: str | None = None) -> Header:
    """Channels and upright size, from the first bytes of a file. Arguments as `decode`.

    Raises:
        BadData: as `decode`, as far as the header shows it.
    """
    with _opened(source, name) as (file, head):
        image = _open(file, head)
        height, width = _size(image, file)
        _check_size((height, width), max_pixels)
        if image is None:
            with _tiff_page(file) as page:
                return Header(1 if page.samplesperpixel < 3 else 3, height, width)
        channels = 1 if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") else 3
        turned = image.format != "TIFF" and _exif(image)[0] >= 5  # Pillow gives a TIFF's size upright
        return Header(channels, width, height) if turned else Header(channels, height, width)


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextlib.contextmanager
def _opened(source: Source, name: str | None) -> Iterator[tuple[BinaryIO, bytes]]:
    """The open file and its first bytes; whatever a decoder makes of a damaged file becomes `BadData`."""
    name = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(32)
            file.seek(0)
            if not head:
                raise BadData("empty file (0 bytes): remove it or copy it again")
            yield file, head
    except BadData as error:
        raise BadData(f"{name}: {error}") from None
    except (SfumatoError, MemoryError):
        raise
    except FileNotFoundError:
        raise BadData(f"{name}: no such file: check the path") from None
    except (IsADirectoryError, PermissionError) as error:
        raise BadData(f"{name}: cannot be read ({error.strerror}): give a file that may be read") from None
    except Exception as error:  # decoders raise anything on damaged files: SyntaxError, struct.error, RuntimeError, ...
        raise BadData(f"{name}: truncated or damaged image ({first_line(error)}): repair or remove it") from None


@functools.cache
def _openers() -> dict[str, tuple[Any, Any]]:
    Image.init()
    return {name: Image.OPEN[name] for name in _FORMATS if name in Image.OPEN}


def _open(file: BinaryIO, head: bytes) -> Image.Image | None:
    """The picture, not yet decoded; None for a TIFF that only tifffile knows.

    Not `Image.open`: its pixel limit is one number for the whole process, and ours is an argument.
    """
    for factory, accept in _openers().values():
        if accept(head[:16]) is True:
            try:
                image: Image.Image = factory(file, "")
                return image
            except (SyntaxError, KeyError):
                if head[:4] in _TIFF_HEADS:
                    return None
                raise
    kind = "HEIC pictures are not read" if head[4:11] in _HEIC_HEADS else "not an image"
    raise BadData(f"{kind}: use PNG, JPEG, TIFF, WebP, AVIF, BMP, GIF, PNM or JPEG 2000")


def _size(image: Image.Image | None, file: BinaryIO) -> tuple[int, int]:
    """Height and width as stored, before anything is decoded."""
    if image is not None:
        return image.height, image.width
    with _tiff_page(file) as page:
        return page.imagelength, page.imagewidth


def _check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    if max_pixels is None:
        setting = os.environ.get("SFUMATO_MAX_PIXELS", str(MAX_PIXELS))
        if not setting.isdigit():
            raise BadSetting(f"SFUMATO_MAX_PIXELS is {setting!r}: say a number of pixels, such as {MAX_PIXELS}")
        max_pixels = int(setting)
    height, width = size
    if height * width > max_pixels:
        raise BadData(
            f"{width} x {height} is {height * width / 1e6:.0f} million pixels, the limit is {max_pixels / 1e6:g}: make it"
            f" smaller, or raise the limit with SFUMATO_MAX_PIXELS={height * width}"
        )


def _exif(image: Image.Image) -> tuple[int, bytes | None]:
    """Orientation (1 to 8), and the block to write back with the orientation set to upright."""
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        if image.format == "TIFF":
            for tag in set(exif) - _TIFF_EXIF:
                del exif[tag]
        if not len(exif):
            return 1, None
        exif[_ORIENTATION] = 1
        return (orientation if orientation in range(1, 9) else 1), exif.tobytes()
    except Exception:  # a damaged EXIF block is no reason to refuse good pixels
        return 1, None


def _decode(
    file: BinaryIO, head: bytes, image: Image.Image | None, notes: list[str]
) -> tuple[np.ndarray, int | None, bytes | None]:
    """Pixels, the orientation where Pillow does not know it, and the profile that the pixels speak of."""
    if head[:4] in _TIFF_HEADS and (image is None or max(image.tag_v2.get(258, (1,))) > 8):  # type: ignore[attr-defined]
        return _decode_tiff(file, image, notes)
    assert image is not None  # only a TIFF may be unknown to Pillow
    if head[12:16] == b"IHDR" and head[24] == 16:
        return _decode_png16(file), None, image.info.get("icc_profile")
    array, icc = _decode_pillow(image, notes)
    return array, None, icc


def _decode_pillow(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, bytes | None]:
    """Any mode of Pillow as grey, grey + alpha, RGB or RGBA (or one channel of floats or integers)."""
    mode, icc = image.mode, image.info.get("icc_profile")
    if mode in ("RGB", "L") and "transparency" not in image.info:
        return np.array(image), icc
    if mode.startswith(("I", "F")):
        array = np.array(image)  # a 16-bit PNM comes as 32-bit integers
        return (array.astype(np.uint16) if mode.startswith("I;16") or (image.format == "PPM" and mode == "I") else array), icc
    if mode == "LAB":
        raise BadData("its colours are CIE L*a*b*: convert it to RGB")
    if mode == "CMYK":
        notes.append("CMYK made RGB")
        return np.array(_cmyk_to_rgb(image, icc)), None
    if mode in ("1", "P", "PA"):
        notes.append("black and white made 8-bit grey" if mode == "1" else "palette made RGB")
    grey = mode in ("1", "L", "LA", "La")
    return np.array(image.convert(("L" if grey else "RGB") + ("A" if image.has_transparency_data else ""))), icc


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """By the picture's own profile where it has one, else by Pillow's formula."""
    from PIL import ImageCms

    if icc:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            profiles = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image.convert("RGB")
    return image.convert("RGB")


def _decode_png16(file: BinaryIO) -> np.ndarray:
    """16-bit PNG `[H, W, C]`: Pillow would keep 8 bits of a colour one."""
    from torchvision.io import ImageReadMode, decode_png

    file.seek(0)
    stored = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    pixels: Tensor = decode_png(stored, ImageReadMode.UNCHANGED)
    return pixels.permute(1, 2, 0).numpy()


@contextlib.contextmanager
def _tiff_page(file: BinaryIO) -> Iterator[Any]:
    import tifffile

    file.seek(0)
    with tifffile.TiffFile(file) as stack:
        yield stack.pages.first


def _decode_tiff(file: BinaryIO, image: Image.Image | None, notes: list[str]) -> tuple[np.ndarray, int | None, bytes | None]:
    """A TIFF of more than 8 bits, or one that Pillow does not know."""
    with _tiff_page(file) as page:
        orientation, icc = (page.tags[tag].value if tag in page.tags else None for tag in (_ORIENTATION, 34675))
        try:
            array = page.asarray()
        except (KeyError, ValueError) as error:
            if "imagecodecs" not in str(error):
                raise
            if image is None:
                raise BadData("its compression needs one more package: pip install imagecodecs, or save it plain") from None
            if image.mode.startswith("RGB"):
                notes.append("compressed 16-bit TIFF read with 8 bits (pip install imagecodecs to keep 16)")
            array, icc = _decode_pillow(image, notes)
            return array, None, icc
        if page.axes == "SYX":
            array = np.moveaxis(array, 0, -1)
        elif page.axes not in ("YX", "YXS"):
            raise BadData(f"its axes are {page.axes}: save it as one plane of grey or RGB")
        if page.photometric == 0 and array.dtype.kind == "u":  # white is zero
            array = np.iinfo(array.dtype).max - array
        return array, orientation, icc


def _as_stored(array: np.ndarray, notes: list[str]) -> tuple[np.ndarray, tuple[float, float] | None]:
    """8- and 16-bit pixels as they are; others as 16 bits, with what 0 and 1 stand for."""
    if array.dtype in (np.uint8, np.uint16):
        return array, None
    if array.dtype.kind == "b":
        notes.append("black and white made 8-bit grey")
        return array.astype(np.uint8) * 255, None
    if array.dtype.kind not in "iuf":
        raise BadData(f"its values are {array.dtype}: save it as 8 or 16 bits, or as floats")
    if not np.isfinite(array).all():
        raise BadData("holds NaN or infinite values: replace them by numbers")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    notes.append("float or wide integer values read with 16 bits" + ("" if (low, high) == (0, 1) else ", scaled to their range"))
    unit = (array.astype(np.float64) - low) / (high - low or 1)
    return np.rint(unit * 65535).astype(np.uint16), (low, high if high > low else low + 1)


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 5 to 8 exchange the axes, then rows and columns are mirrored."""
    array = array[..., None] if array.ndim == 2 else array
    array = array.swapaxes(0, 1) if orientation >= 5 else array
    array = array[::-1] if orientation in (3, 4, 7, 8) else array
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array
