"""WebDataset shards and the Hugging Face hub.

Shards are tar files of images with their labels beside them (`key.jpg`, `key.cls`). Local ones are indexed once and then read at
any place, so they behave like a folder; those behind an address are read through webdataset into memory. A set of the hub is read
through datasets; a name that is a folder is one that `save_to_disk` wrote.

>>> expand_pattern("train-{008..011}.tar")
['train-008.tar', 'train-009.tar', 'train-010.tar', 'train-011.tar']
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from sfumato.data.arrays import Wrapped
from sfumato.data.decoding import decode, first_line
from sfumato.data.folders import hold_out
from sfumato.data.image_files import CACHE_BYTES, Entry, Found, load
from sfumato.data.image_set import ImageSet, to_channels
from sfumato.data.images import IMAGE_SUFFIXES, as_picture
from sfumato.errors import BadData, MissingExtra

# WebDataset


def open_shards(
    pattern: str, split: str = "train", *, channels: int | None = None, holdout: float = 0.1,
    cache_bytes: int = CACHE_BYTES, max_pixels: int | None = None,
) -> ImageSet | None:  # fmt: skip
    """Images of WebDataset shards; those with a `.cls` beside every image are labelled.

    Args:
        pattern: paths or an address, with `{000..009}`, `{a,b}` or (paths) `*`.
        split: "train" or "test".
        channels, cache_bytes, max_pixels: see `image_files.load`.
        holdout: share of labelled images that is given to "test", by a hash of each key.

    Returns:
        The set, or None where nothing is held out.

    Raises:
        BadData: no shard, a damaged one, no image in them; images behind an address that do not fit into memory.
        MissingExtra: an address, and webdataset is not installed.
    """
    shards = expand_pattern(pattern)
    if pattern.startswith("pipe:"):
        raise BadData("wds://pipe: would run a program: fetch the shards first, and give their paths")
    if re.match(r"[a-z0-9+]+:", pattern) and not os.path.exists(shards[0]):
        found = _as_found(_fetched(shards, cache_bytes), pattern)
    else:
        found = _as_found((member for path in _existing(shards) for member in _members(path)), pattern)
    kept, given = hold_out([entry.name for entry in found.entries], holdout if found.labels else 0.0)
    rows = kept if split == "train" else given
    if not rows:
        return None
    return load(found.select(rows), channels=channels, cache_bytes=cache_bytes, max_pixels=max_pixels, where=pattern)


def expand_pattern(pattern: str) -> list[str]:
    """`{000..009}` counts, `{a,b}` chooses; in that order from left to right."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        words = ",".join(f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    return [
        whole for word in words.split(",") for whole in expand_pattern(pattern[: match.start()] + word + pattern[match.end() :])
    ]


class Member(NamedTuple):
    """A member of a shard: an image, or the class number that belongs to one."""

    key: str
    kind: str
    entry: Entry


def _existing(shards: list[str]) -> list[str]:
    """The shards on this machine, `*` and `~` expanded."""
    paths = [path for shard in shards for path in (sorted(glob.glob(os.path.expanduser(shard))) or [shard])]
    for path in paths:
        if not os.path.isfile(path):
            raise BadData(f"{path}: no such shard: check the pattern (numbers are {{000..009}}, choices {{a,b}})")
    return paths


def _members(path: str) -> Iterator[Member]:
    """What lies in a tar, without reading the images."""
    shard = os.path.basename(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isfile():
                    yield _member(info.name, shard, Entry(path, info.name, info.offset_data, info.size))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadData(
            f"{path}: truncated, compressed or no tar ({first_line(error)}): copy it again, or unpack it with gunzip"
        ) from None


def _member(name: str, shard: str, entry: Entry) -> Member:
    """`dir/key.ext`: the key ends at the first dot of the file name, as webdataset has it."""
    folder, file = os.path.split(name)
    stem, _, kind = file.partition(".")
    key = f"{shard}/{os.path.join(folder, stem)}"
    return Member(key, f".{kind.lower()}" if stem else "", entry._replace(name=key))


def _fetched(urls: list[str], limit: int) -> Iterator[Member]:
    """What lies in shards behind an address, read once, in order; at most `limit` bytes."""
    try:
        import webdataset
    except ImportError:
        raise MissingExtra("wds:// over the network needs webdataset: pip install 'sfumato[data]'") from None
    total = 0
    try:
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            shard = os.path.basename(str(sample.get("__url__", "")))
            for kind, data in sample.items():
                if kind.startswith("__"):
                    continue
                total += len(data)
                if total > limit:
                    raise BadData(f"{urls[0]}: more than {limit >> 20} MB: fetch the shards first, and give their paths")
                yield _member(f"{sample['__key__']}.{kind}", shard, Entry("", "", data=data))
    except (OSError, ValueError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise BadData(f"{urls[0]}: cannot be read ({first_line(error)}): check the address and the network") from None


def _as_found(members: Iterator[Member], where: str) -> Found:
    """One image for each key, with its label where every image has one."""
    images: dict[str, Entry] = {}
    classes: dict[str, int] = {}
    skipped = []
    for key, kind, entry in members:
        if os.path.splitext(kind)[1] in IMAGE_SUFFIXES or kind in IMAGE_SUFFIXES:
            images.setdefault(key, entry)
        elif kind == ".cls":
            number = entry.source()
            if isinstance(number, bytes) and number.strip().isdigit():
                classes[key] = int(number)
            else:
                skipped.append((key, "its .cls is no whole number"))
    if not images:
        raise BadData(f"{where}: no images in these shards (members are named KEY.jpg or KEY.png, and KEY.cls)")
    if not classes:
        return Found(list(images.values()), skipped=skipped)
    known = {key for key, _ in skipped}
    skipped += [(key, "has no .cls") for key in images if key not in classes and key not in known]
    keys = [key for key in images if key in classes]
    labels = [classes[key] for key in keys]
    return Found([images[key] for key in keys], labels, tuple(str(i) for i in range(max(labels) + 1)), skipped=skipped)


# Hugging Face


def open_hub(
    name: str,
    split: str = "train",
    *,
    channels: int | None = None,
    holdout: float = 0.1,
    cache_bytes: int = CACHE_BYTES,
    max_pixels: int | None = None,
) -> ImageSet | None:
    """A data set of the hub, or a folder that `save_to_disk` wrote; its first image column, and its class label.

    Args:
        name: `owner/name` or `owner/name#config`, or the folder.
        split: "train", or "test": the set's own test or validation split, else a share of labelled images.
        channels, holdout, cache_bytes, max_pixels: as `open_shards`.

    Returns:
        The set, or None where nothing is held out.

    Raises:
        BadData: it cannot be loaded, or has no images.
        MissingExtra: datasets is not installed.
    """
    rows, own_test = _hub_rows(name, split)
    if rows is None:
        return None
    import datasets

    image = next((column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise BadData(f"hf://{name}: has no column of images (it has: {', '.join(rows.features)})")
    label = next((c for c, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    rows = rows.cast_column(image, datasets.Image(decode=False))
    if not own_test:
        kept, given = hold_out([str(i) for i in range(len(rows))], holdout if label else 0.0)
        rows = rows.select(kept if split == "train" else given)
    if not len(rows):
        return None
    classes = tuple(rows.features[label].names) if label else None
    if rows.data.nbytes <= cache_bytes:
        entries = [_hub_entry(cell, i) for i, cell in enumerate(rows[image])]
        found = Found(entries, list(rows[label]) if label else None, classes)
        return load(found, channels=channels, cache_bytes=cache_bytes, max_pixels=max_pixels, where=f"hf://{name}")
    return ImageSet(Wrapped(HubRows(rows, image, label, channels, max_pixels)), classes=classes)


def _hub_rows(name: str, split: str) -> tuple[Any, bool]:
    """The rows of a split (None: there are none), and whether the set has a test split of its own."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("hf:// needs datasets: pip install 'sfumato[data]'") from None
    path, _, config = name.partition("#")
    try:
        whole = datasets.load_from_disk(path) if os.path.isdir(path) else datasets.load_dataset(path, config or None)
    except Exception as error:  # the hub, the network and Arrow each have their own
        raise BadData(f"hf://{name}: cannot be loaded ({first_line(error)}): check the name and the network") from None
    if not isinstance(whole, dict):
        return whole, False
    test = next((whole[s] for s in ("test", "validation", "valid", "val") if s in whole), None)
    train = whole.get("train", next(iter(whole.values())))
    return (train, test is not None) if split == "train" or test is None else (test, True)


def _hub_entry(cell: dict[str, Any], i: int) -> Entry:
    name = f"row {i}"
    return Entry(cell["path"] or "", name, data=cell["bytes"])


class HubRows:
    """Rows that are decoded when they are asked for."""

    def __init__(self, rows: Any, image: str, label: str | None, channels: int | None, max_pixels: int | None) -> None:
        self.rows, self.image, self.label, self.channels, self.max_pixels = rows, image, label, channels, max_pixels
        if channels is None:
            self.channels = self[0][0].shape[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int | None]:
        row = self.rows[i]
        entry = _hub_entry(row[self.image], i)
        picture = as_picture(decode(entry.source(), self.max_pixels, name=entry.name))
        pixels = picture.pixels if picture.bits == 8 else picture.float()
        return to_channels(pixels, self.channels or len(pixels)), row[self.label] if self.label else None
