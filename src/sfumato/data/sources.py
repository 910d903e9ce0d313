"""One way to say where data is: `open_data(where)` makes an `ImageSet` of whatever a person has.

| where | what |
|---|---|
| `sample:photos`, `digits`, `faces`, `video` | real data that needs no download |
| `sample:scenes` | drawn frames of digits at known distances, boxed |
| a folder | images in it and below it; sub-folders may be classes, or `train` and `test` (or `val`) |
| a file | one image; the frames of a video; `.npz` and `.npy` arrays; a `.tar` of images |
| `arrays:FILE.npz` | arrays `x` or `images`, and maybe `y` or `labels`, `target`; or `x_train`, `x_test`, ... |
| `arrays:train-images-idx3-ubyte.gz` | MNIST and its like, with the labels and test images that lie beside |
| `pairs:IN:TARGET` | two folders of images with the same names |
| `kitti:FOLDER` | frames and boxed objects with their distances, in KITTI's format |
| `wds://PATTERN` | WebDataset shards, such as `wds://train-{000..009}.tar` |
| `hf://NAME` | a data set of the Hugging Face hub (or one saved by it), maybe `hf://NAME#CONFIG` |
| from Python | tensor `[N, C, H, W]`, list of `[C, H, W]`, `(x, y)`, `Batch`, torch `Dataset` |

Held out for `split="test"`: what the data itself holds out; else, of labelled data, a share chosen by a hash of each name; else
nothing, and the answer is None. Data given from Python is never split: it is all for training.

>>> from sfumato.data import describe, open_data
>>> describe("sample:digits")
'1797 images (497 to test on), 10 classes, 8x8, grey'
>>> len(open_data("sample:digits", "test"))
497
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, overload

import torch

from sfumato.data import samples
from sfumato.data.arrays import given_data, open_arrays
from sfumato.data.folders import find_images, find_pairs
from sfumato.data.image_files import CACHE_BYTES, Entry, Found, load
from sfumato.data.image_set import ImageSet, InMemory, summary, to_channels
from sfumato.data.kitti import open_kitti
from sfumato.data.perspective_scenes import perspective_scenes
from sfumato.data.shards import open_hub, open_shards
from sfumato.data.video_file import VIDEO_SUFFIXES, open_video
from sfumato.errors import BadData, BadSetting, nearest

ALLOWED = (
    "sample:photos|digits|faces|video|scenes, a folder, an image, a video, arrays:FILE.npz, pairs:IN:TARGET, kitti:FOLDER, "
    "wds://PATTERN, hf://NAME"
)
"""The kinds of place, in words for a person."""

_CLIPS = {"train": 200, "test": 40}  # of 8 frames, 64 pixels a side: 20 MB
_SCENES = {"train": 512, "test": 150}  # 64 pixels a side: 8 MB


@overload
def open_data(
    where: Any, split: Literal["train"] = ..., *,
    channels: int | None = ..., holdout: float = ..., cache_mb: float = ..., max_pixels: int | None = ...,
) -> ImageSet: ...  # fmt: skip
@overload
def open_data(
    where: Any, split: str, *,
    channels: int | None = ..., holdout: float = ..., cache_mb: float = ..., max_pixels: int | None = ...,
) -> ImageSet | None: ...  # fmt: skip
def open_data(
    where: Any,
    split: str = "train",
    *,
    channels: int | None = None,
    holdout: float = 0.1,
    cache_mb: float = CACHE_BYTES / 2**20,
    max_pixels: int | None = None,
) -> ImageSet | None:
    """Make a set of images from wherever they are.

    Args:
        where: see the table at the head of this file.
        split: "train" or "test".
        channels: 1 or 3; None: 3 if any image has colours, else 1.
        holdout: share of labelled data that is given to "test" where the data has no test part of its own, 0 to 0.9.
        cache_mb: most memory for pixels, MB; images that do not fit are decoded when they are asked for.
        max_pixels: largest image that is decoded, see `read_image`.

    Returns:
        The set; None where nothing is held out for testing.

    Raises:
        BadData: nothing there, nothing readable there, or values that are no images; the line says what is allowed.
        BadSetting: an argument out of its range.
        MissingExtra: the place needs a package that is not installed.
    """
    if split not in ("train", "test"):
        raise BadSetting(f"split is {split!r}: say 'train' or 'test'")
    if channels not in (None, 1, 3) or not 0 <= holdout <= 0.9:
        raise BadSetting(f"channels={channels}, holdout={holdout}: channels are 1, 3 or None, holdout is 0 to 0.9")
    if not isinstance(where, (str, os.PathLike)):
        if split == "test":
            return None
        return where if isinstance(where, ImageSet) else given_data(where, channels)
    place = os.fspath(where)
    limits: dict[str, Any] = {"channels": channels, "cache_bytes": int(cache_mb * 2**20), "max_pixels": max_pixels}
    if place.startswith("wds://"):
        return open_shards(place.removeprefix("wds://"), split, holdout=holdout, **limits)
    if place.startswith("hf://"):
        return open_hub(place.removeprefix("hf://"), split, holdout=holdout, **limits)
    if place.startswith("sample:"):
        return _open_sample(place.removeprefix("sample:"), split, channels)
    if place.startswith("arrays:"):
        return open_arrays(Path(place.removeprefix("arrays:")).expanduser(), split, channels=channels, holdout=holdout)
    if place.startswith("kitti:"):
        return open_kitti(Path(place.removeprefix("kitti:")).expanduser(), split, holdout=holdout, **limits)
    if place.startswith("pairs:"):
        return load(_pairs(place), where=place, **limits) if split == "train" else None
    return _open_path(Path(place).expanduser(), place, split, holdout, limits)


def describe(where: Any) -> str:
    """One line on what is there: `12 images, 3 classes, 512x512 to 4000x3000, 2 skipped`.

    Raises:
        BadData: as `open_data`.
    """
    return summary(open_data(where), open_data(where, "test"))


def _open_path(path: Path, place: str, split: str, holdout: float, limits: dict[str, Any]) -> ImageSet | None:
    if path.is_dir():
        found = find_images(path, split, holdout)
        return None if found is None else load(found, where=place, **limits)
    if not path.exists():
        kind = re.match(r"([a-z]+):", place)
        close = nearest(kind[1], ("sample", "arrays", "pairs", "kitti", "wds", "hf")) if kind else []
        hint = f"did you mean {close[0]}: ? " if close else ""
        raise BadData(f"{place}: no such folder or file. {hint}Data is one of: {ALLOWED}")
    if path.suffix.lower() in (".npz", ".npy"):
        return open_arrays(path, split, channels=limits["channels"], holdout=holdout)
    if path.suffix.lower() == ".tar":
        return open_shards(str(path), split, holdout=holdout, **limits)
    if split == "test":
        return None
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return open_video(path, channels=limits["channels"], cache_bytes=limits["cache_bytes"])
    return load(Found([Entry(str(path), path.name)]), where=place, **limits)


def _pairs(place: str) -> Found:
    """The two folders of `pairs:IN:TARGET`; a colon may also be part of their names."""
    parts = place.removeprefix("pairs:").split(":")
    for k in range(1, len(parts)):
        inputs, targets = (Path(":".join(half)).expanduser() for half in (parts[:k], parts[k:]))
        if inputs.is_dir() and targets.is_dir():
            return find_pairs(inputs, targets)
    missing = next((p for p in parts if not Path(p).expanduser().is_dir()), place)
    raise BadData(f"{place}: {missing or 'IN'} is no folder: give pairs:IN:TARGET, two folders with images of the same names")


def _open_sample(name: str, split: str, channels: int | None) -> ImageSet:
    kinds: dict[str, Callable[[str], ImageSet]] = {
        "photos": _photos,
        "digits": _digits,
        "faces": _faces,
        "video": _video,
        "scenes": _scenes,
    }
    if name not in kinds:
        close = nearest(name, kinds)
        hint = f"did you mean sample:{close[0]}? " if close else ""
        raise BadData(f"there is no sample:{name}: {hint}Samples are {', '.join(kinds)}")
    images = kinds[name](split)
    if channels is not None and isinstance(images.items, InMemory):
        items, x = images.items, images.items.x
        x = [to_channels(v, channels) for v in x] if isinstance(x, list) else to_channels(x, channels)
        return ImageSet(InMemory(x, items.labels, items.target, items.boxes), classes=images.facts.classes, names=images.names)
    return images


def _photos(split: str) -> ImageSet:
    return ImageSet(InMemory(samples.photos(split)), names=samples.photo_names(split))  # type: ignore[arg-type]


def _digits(split: str) -> ImageSet:
    batch = samples.digits()[split == "test"]
    return ImageSet(InMemory(batch.x, batch.label), classes=[str(i) for i in range(10)])


def _faces(split: str) -> ImageSet:
    batch = samples.faces()[split == "test"]
    return ImageSet(InMemory(batch.x, batch.label), classes=("background", "face"))


@functools.cache
def _video(split: str) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    clips = samples.moving_crops(_CLIPS[split], 8, 64, split=split, generator=generator)  # type: ignore[call-overload]
    return ImageSet(InMemory(clips.mul_(255).round_().to(torch.uint8)))


@functools.cache
def _scenes(split: str) -> ImageSet:
    seed = sorted(_SCENES).index(split)
    frames = perspective_scenes(_SCENES[split], split=split, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return ImageSet(InMemory(frames.x.mul_(255).round_().to(torch.uint8), target=frames.target, boxes=frames.boxes))
