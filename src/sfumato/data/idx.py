"""IDX files: the format of MNIST, Fashion-MNIST, KMNIST and EMNIST, plain or gzipped.

A header says the type of the numbers and the sides of the array, the numbers follow, big-endian. Of images the labels, and of
training images the test images, lie beside: `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, `t10k-...`.

Source: Yann LeCun, Corinna Cortes, Christopher Burges, "The MNIST database of handwritten digits".

>>> import tempfile
>>> file = Path(tempfile.mkdtemp()) / "t10k-images-idx3-ubyte"
>>> _ = file.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 7, 9]))
>>> read_idx(file)
array([[[7, 9]]], dtype=uint8)
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from sfumato.errors import BadData

_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_GZIP = b"\x1f\x8b"


def is_idx(path: Path) -> bool:
    """Whether a file is named as IDX files are."""
    return path.suffix not in (".npz", ".npy") and ("-idx" in path.name or ".idx" in path.name)


def read_idx(path: Path) -> np.ndarray:
    """The array in one file.

    Raises:
        BadData: a file that cannot be read, or is no such file, or is cut off.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == _GZIP else content
    except FileNotFoundError:
        raise BadData(f"{path}: no such file: check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadData(f"{path}: cannot be read ({error}): copy it again") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES:
        raise BadData(f"{path}: not an IDX file, its first bytes are {content[:4].hex(' ')}: give one, or .npz")
    kind, start = np.dtype(_TYPES[content[2]]), 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) != start + math.prod(shape) * kind.itemsize:
        raise BadData(f"{path}: {len(content)} bytes are not an array {list(shape)} of {kind}: copy it again")
    return np.frombuffer(content, kind, offset=start).reshape(shape)


def read_idx_set(path: Path) -> dict[str, np.ndarray]:
    """Images with what lies beside them.

    Returns:
        `x`, and `y` where there are labels; of a file of training images with its test images beside it `x_train`, `x_test`, ...
    """
    others = (path.with_name(path.name.replace("train", name)) for name in ("t10k", "test"))
    test = next((other for other in others if other != path and other.is_file()), None)
    return _labelled(path, "") if test is None else _labelled(path, "_train") | _labelled(test, "_test")


def _labelled(path: Path, suffix: str) -> dict[str, np.ndarray]:
    found = {f"x{suffix}": read_idx(path)}
    labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels != path and labels.is_file():
        found[f"y{suffix}"] = read_idx(labels)
    return found
