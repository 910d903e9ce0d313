"""Arrays and tensors as data sets: `.npz` and IDX files, and what is given from Python.

Images are uint8, uint16 or floats in [0, 1]; floats that are none (0 to 255, standardised, NaN) are refused with the way out,
because a method cannot see the mistake and would train on it. Vectors `[N, D]` are taken as they are.

>>> import torch
>>> given_data(torch.rand(4, 1, 8, 8)).facts.size
(8, 8)
>>> given_data(torch.full((4, 1, 8, 8), 200.0))
Traceback (most recent call last):
sfumato.errors.BadData: x holds floats from 200 to 200: divide by 255 to bring them to [0, 1], or give uint8
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from sfumato.data.batch import Batch
from sfumato.data.decoding import first_line
from sfumato.data.folders import hold_out
from sfumato.data.idx import is_idx, read_idx_set
from sfumato.data.image_set import ImageSet, InMemory, Sample, to_channels
from sfumato.errors import BadData

_NAMES = {"x": ("x", "images", "image", "data", "arr_0"), "y": ("y", "labels", "label"), "target": ("target", "targets")}


# Files


def open_arrays(path: Path, split: str = "train", *, channels: int | None = None, holdout: float = 0.1) -> ImageSet | None:
    """A `.npz` (or `.npy`, or IDX) file of images; nothing in it is ever unpickled.

    Args:
        path: the file: `x` or `images` `[N, H, W]`, `[N, C, H, W]`, `[N, H, W, C]`, or clips with a T after N, or vectors
            `[N, D]`; maybe `y` or `labels` `[N]`, `target` (like `x`, or numbers `[N]`, `[N, K]`), `classes` (names); or
            `x_train`, `y_train`, `x_test`, `y_test`. Of an IDX file see `sfumato.data.idx.read_idx_set`.
        split: "train" or "test".
        channels: 1 or 3; None: as stored.
        holdout: share of labelled arrays without `x_test` that is given to "test".

    Returns:
        The set, or None where nothing is held out.

    Raises:
        BadData: missing or damaged file, no images in it, wrong type, range or shape.
    """
    stored = _read(path)
    own_test = any(f"{name}_test" in stored for name in _NAMES["x"])
    found = {field: _pick(stored, names, f"_{split}") for field, names in _NAMES.items()}
    if found["x"] is None or (own_test and not found["x"][0].endswith(split)):
        raise BadData(f"{path}: has no array named x or images (it has: {', '.join(stored) or 'none'}): save the images as x")
    if found["target"] is not None and found["target"][1].ndim == 1:  # one number a sample
        found["target"] = (found["target"][0], found["target"][1][:, None])
    x, target = (None if f is None else as_images(f[1], f"{path}: {f[0]}") for f in (found["x"], found["target"]))
    assert x is not None
    labels = None if found["y"] is None else as_labels(found["y"][1], len(x), f"{path}: {found['y'][0]}")
    _check_targets(x, target, f"{path}: ")
    classes = _class_names(labels, stored.get("classes"), path)
    names = [str(i) for i in range(len(x))]
    if not own_test:
        kept, given = hold_out(names, holdout if labels is not None else 0.0)
        rows = kept if split == "train" else given
        if not rows:
            return None
        x, labels, target = (None if v is None else v[rows] for v in (x, labels, target))
        names = [names[i] for i in rows]
    x, target = (_with_channels(v, channels) for v in (x, target))
    return ImageSet(InMemory(x, labels, target), classes=classes, names=names)


def _read(path: Path) -> dict[str, np.ndarray]:
    if is_idx(path):
        return read_idx_set(path)
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            return {"x": file}
        with file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise BadData(f"{path}: no such file: check the path") from None
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise BadData(f"{path}: holds Python objects, which are never unpickled: save plain arrays by numpy.savez") from None
        raise BadData(
            f"{path}: not a file of numpy arrays ({first_line(error)}): save one by numpy.savez(path, x=images)"
        ) from None
    except Exception as error:  # zipfile, zlib and numpy each have their own errors for a damaged file
        raise BadData(f"{path}: truncated or damaged ({first_line(error)}): save or copy it again") from None


def _pick(stored: dict[str, np.ndarray], names: Sequence[str], suffix: str) -> tuple[str, np.ndarray] | None:
    """The first array of these names: of the split, else of the whole."""
    wanted = [name + end for end in (suffix, "") for name in names]
    return next(((name, stored[name]) for name in wanted if name in stored), None)


def _class_names(labels: Tensor | None, names: Any, where: object) -> tuple[str, ...] | None:
    if labels is None:
        return None
    count = int(labels.max()) + 1
    if names is None:
        return tuple(str(i) for i in range(count))
    if len(names) < count:
        raise BadData(f"{where}: labels go up to {count - 1}, but there are {len(names)} class names: name every class")
    return tuple(str(name) for name in names)


# From Python


def given_data(data: Any, channels: int | None = None) -> ImageSet:
    """What a person gives from Python as a set: all of it.

    Args:
        data: images `[N, C, H, W]` (tensor or array), a list of images `[C, H, W]` of any sizes, `(x, y)` with y the labels
            (integers) or the targets (floats), a `Batch` (taken as it is: any finite values), or a map-style torch `Dataset`.
        channels: 1 or 3; None: as given.

    Raises:
        BadData: wrong type, range or shape.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors if len(data.tensors) > 1 else data.tensors[0]
    if isinstance(data, Dataset):
        return ImageSet(Wrapped(data), classes=getattr(data, "classes", None))
    x: Any
    labels, target, boxes = None, None, None
    if isinstance(data, Batch):
        x, labels, target, boxes = data.x.detach().cpu(), data.label, data.target, data.boxes
        _check_finite(x, "x")
        labels, target, boxes = (None if v is None else v.detach().cpu() for v in (labels, target, boxes))
    else:
        x, y = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
        x = _images_or_list(x, "x")
        if _is_whole(y):
            labels = as_labels(y, len(x), "y")
        elif y is not None:
            target = _images_or_list(y, "y")
            _check_targets(x, target, "")
    x, target = _with_channels(x, channels), target if boxes is not None else _with_channels(target, channels)
    return ImageSet(InMemory(x, labels, target, boxes), classes=_class_names(labels, None, "y"))


class Wrapped:
    """A person's own map-style data set; it is asked anew every time, since it may augment."""

    boxed = False

    def __init__(self, data: Any) -> None:
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise BadData(f"{type(data).__name__} cannot be indexed: give it to fit in a DataLoader")
        if not len(data):
            raise BadData(f"{type(data).__name__} is empty: give at least one image")
        self.data = data
        self.seen = [self.read(i) for i in sorted({round(k * (len(data) - 1) / 15) for k in range(16)})]
        self.labelled, self.paired = self.seen[0].label is not None, self.seen[0].target is not None

    def __len__(self) -> int:
        return len(self.data)

    def read(self, i: int) -> Sample:
        """Item `i`: an image, or an image with its label or target; tensors, arrays `[H, W, C]` or PIL images."""
        item = self.data[i]
        x, y = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) >= 2 else (item, None)
        x = _image(x)
        if y is None:
            return Sample(x)
        whole = isinstance(y, int) or (_is_whole(y) and np.ndim(y) == 0)
        return Sample(x, int(y)) if whole else Sample(x, None, _image(y))

    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the sixteen samples that were looked at."""
        return [(s.x.shape[-2], s.x.shape[-1]) for s in self.seen if s.x.ndim >= 3]

    def channels(self) -> int:
        """Channels of the first sample."""
        shape = self.seen[0].x.shape
        return shape[-3] if len(shape) >= 3 else int(shape.numel())


# Checks


def as_images(value: Any, name: str) -> Tensor:
    """Images `[N, C, H, W]`, clips `[N, T, C, H, W]` or vectors `[N, D]` from an array; see `open_arrays` for its shapes.

    Raises:
        BadData: wrong type, range or shape; the line starts with `name`.
    """
    array = np.asarray(value)
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    if array.dtype.kind not in "uif" or not 2 <= array.ndim <= 5:
        raise BadData(f"{name} is {array.dtype} {list(array.shape)}: images are [N, H, W], [N, C, H, W] or [N, H, W, C]")
    array = array.astype(np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("="))
    x = torch.from_numpy(np.ascontiguousarray(array))
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim > 3 and x.shape[-3] not in (1, 3) and x.shape[-1] in (1, 3):
        x = x.movedim(-1, -3).contiguous()
    return checked(x, name)


def as_labels(value: Any, count: int, name: str) -> Tensor:
    """Class numbers `[N]` (long) from whole numbers `[N]` or `[N, 1]`.

    Raises:
        BadData: not whole, negative, or not one for each image.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "uib" or array.size != count or array.shape[:1] != (count,):
        raise BadData(f"{name} is {array.dtype} {list(array.shape)}: labels are whole numbers [{count}], one for each image")
    labels = torch.from_numpy(array.reshape(-1).astype(np.int64))
    if len(labels) and int(labels.min()) < 0:
        raise BadData(f"{name} goes down to {int(labels.min())}: labels count from 0")
    return labels


def _images_or_list(value: Any, name: str) -> Any:
    """Checked images: one tensor, or a list of tensors `[C, H, W]`."""
    if isinstance(value, Tensor):
        x = value.detach().cpu()
        if x.ndim in (0, 1, 3):
            raise BadData(f"{name} is a tensor {list(x.shape)}: images are [N, C, H, W], clips [N, T, C, H, W], vectors [N, D]")
        if x.ndim > 3 and x.shape[-3] > 4 and x.shape[-1] in (1, 3):
            raise BadData(f"{name} is {list(x.shape)}, channels last: give {name}.movedim(-1, -3)")
        return checked(x, name)
    if isinstance(value, np.ndarray):
        return as_images(value, name)
    if isinstance(value, (list, tuple)) and len(value):
        return [checked(_image(v), f"{name}[{i}]") for i, v in enumerate(value)]
    raise BadData(
        f"cannot make data of {'an empty' if value == [] else 'a'} {type(value).__name__}: give a tensor [N, C, H, W],"
        " a list of tensors [C, H, W], (x, y), a Batch or a torch Dataset"
    )


def _image(value: Any) -> Tensor:
    """One image `[C, H, W]` from a tensor, an array (channels last) or a PIL image."""
    if not isinstance(value, Tensor):
        array = np.array(value)
        if array.dtype.kind not in "uif" or array.ndim not in (1, 2, 3, 4):
            raise BadData(f"{type(value).__name__} is no image: give tensors [C, H, W], arrays [H, W, C] or PIL images")
        value = torch.from_numpy(array)
        value = value.movedim(-1, -3).contiguous() if array.ndim > 2 and array.shape[-1] in (1, 3, 4) else value
    image: Tensor = value.detach()
    return image.unsqueeze(0) if image.ndim == 2 else image


def checked(x: Tensor, name: str) -> Tensor:
    """Images in a type and a range that methods may rely on; vectors only finite.

    Raises:
        BadData: they are not; the line starts with `name` and says what to do.
    """
    if not x.numel():
        raise BadData(f"{name} is empty: give at least one image")
    _check_finite(x, name)
    if x.ndim < 3 or x.dtype in (torch.uint8, torch.uint16):
        return x
    if not x.is_floating_point():
        raise BadData(f"{name} is {str(x.dtype).removeprefix('torch.')}: images are uint8 (0 to 255) or floats in [0, 1]")
    low, high = float(x.min()), float(x.max())
    if low < -1e-3 or high > 1 + 1e-3:
        fix = "divide by 255 to bring them to [0, 1], or give uint8" if low >= 0 and 2 < high <= 255 else "bring them to [0, 1]"
        raise BadData(f"{name} holds floats from {low:.4g} to {high:.4g}: {fix}")
    return x.clamp(0, 1) if low < 0 or high > 1 else x


def _check_finite(x: Tensor, name: str) -> None:
    if x.is_floating_point() and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise BadData(f"{name} holds {bad} values that are NaN or infinite: replace or drop them")


def _is_whole(y: Any) -> bool:
    kind = "f" if isinstance(y, Tensor) and y.is_floating_point() else np.asarray(y).dtype.kind if y is not None else "O"
    return kind in "uib"


def _check_targets(x: Any, target: Any, where: str) -> None:
    if target is not None and len(target) != len(x):
        raise BadData(f"{where}{len(x)} images and {len(target)} targets: give one target for each image")


def _with_channels(x: Any, channels: int | None) -> Any:
    """Tensor or list of tensors with that many channels; vectors and None as they are."""
    if isinstance(x, list):
        return [_with_channels(v, channels) for v in x]
    return x if x is None or channels is None or x.ndim < 3 else to_channels(x, channels)
