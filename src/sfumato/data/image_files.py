"""Encoded images, whole files or members of a tar, checked and made a set: in memory where they fit.

When the pixels fit into memory, or when there are few files, every image is decoded at once: a damaged one is found before
training starts and is skipped. Of others the headers are checked, and each is decoded when it is asked for.

>>> import tempfile, torch
>>> from sfumato.data import write_image
>>> path = tempfile.mkdtemp() + "/a.png"
>>> write_image(path, torch.rand(3, 4, 5))
>>> load(Found([Entry(path, "a.png")])).facts.size
(4, 5)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sfumato.data.decoding import Header, decode, header
from sfumato.data.image_set import ImageSet, InMemory, Items, Sample, to_channels
from sfumato.data.images import Picture, as_picture
from sfumato.errors import BadData

CACHE_BYTES = 512 * 2**20
"""Most memory that the pixels of a set take, unless told otherwise."""

DECODED_AT_OPENING = 2000
"""Up to so many images are decoded when a set is opened, even when they do not fit into memory."""

Out = TypeVar("Out")


class Entry(NamedTuple):
    """Where the bytes of an image are: a whole file, a stretch of one (a member of a tar), or here."""

    path: str
    name: str
    offset: int = 0
    size: int | None = None
    data: bytes | None = None

    def stored_bytes(self) -> int:
        """Bytes of the image as it is stored; 0 for a file that is gone."""
        if self.data is not None:
            return len(self.data)
        return self.size if self.size is not None else os.path.getsize(self.path) if os.path.exists(self.path) else 0

    def source(self) -> str | bytes:
        """A path, or the bytes."""
        if self.data is not None:
            return self.data
        if self.size is None:
            return self.path
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise BadData(f"{self.name}: {self.path} cannot be read ({error.strerror}): check the file") from None


@dataclass
class Found:
    """Images of a folder, before any is opened."""

    entries: list[Entry]
    labels: list[int] | None = None
    classes: tuple[str, ...] | None = None
    targets: list[Entry] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def select(self, rows: Sequence[int]) -> Found:
        """Some of the images, in the given order."""
        labels, targets = (None if v is None else [v[i] for i in rows] for v in (self.labels, self.targets))
        return Found([self.entries[i] for i in rows], labels, self.classes, targets, self.skipped)  # type: ignore[arg-type]


class OnDisk:
    """Samples that are decoded whenever they are asked for."""

    boxed = False

    def __init__(self, found: Found, headers: list[Header], channels: int, max_pixels: int | None) -> None:
        self.found, self.headers, self.max_pixels = found, headers, max_pixels
        self.labelled, self.paired = found.labels is not None, found.targets is not None
        self._channels = channels

    def __len__(self) -> int:
        return len(self.found.entries)

    def read(self, i: int) -> Sample:
        """Decode sample `i`; 16 bits as floats."""
        found = self.found
        x, target = (None if e is None else self._pixels(e[i]) for e in (found.entries, found.targets))
        assert x is not None
        return Sample(x, None if found.labels is None else found.labels[i], target)

    def _pixels(self, entry: Entry) -> Tensor:
        picture = _decode(entry, self.max_pixels)
        return to_channels(picture.pixels if picture.bits == 8 else picture.float(), self._channels)

    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each sample."""
        return [(h.height, h.width) for h in self.headers]

    def channels(self) -> int:
        """Channels that every sample is brought to."""
        return self._channels


def load(
    found: Found,
    *,
    channels: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    max_pixels: int | None = None,
    where: str = "data",
) -> ImageSet:
    """Check the images and make them a set: in memory where they fit, else decoded when asked for.

    Args:
        found: from `find_images` or `find_pairs`.
        channels: 1 or 3; None: 3 if any image has colours, else 1.
        cache_bytes: most memory that the pixels may take.
        max_pixels: see `read_image`.
        where: what errors call the place.

    Raises:
        BadData: no image can be read.
    """
    found, seen = _look_at_all(found, _Look(len(found.entries), cache_bytes, max_pixels), where)
    channels = channels or max(one.header.channels for row in seen for one in row)
    items: Items = OnDisk(found, [row[0].header for row in seen], channels, max_pixels)
    if sum(channels * one.header.height * one.header.width for row in seen for one in row) <= cache_bytes:
        columns = [[one.pixels for one in column if one.pixels is not None] for column in zip(*seen, strict=True)]
        if all(len(column) == len(seen) for column in columns):  # 16 bits take twice the room
            x, *target = ([to_channels(pixels, channels) for pixels in column] for column in columns)
            labels = None if found.labels is None else torch.tensor(found.labels)
            items = InMemory(x, labels, target[0] if target else None)
    names = [entry.name for entry in found.entries]
    return ImageSet(items, classes=found.classes, names=names, skipped=found.skipped, notes=_notes(seen, channels))


class Seen(NamedTuple):
    """What one look at an image gave."""

    header: Header
    notes: tuple[str, ...] = ()
    pixels: Tensor | None = None


class _Look:
    """Decodes images and keeps their pixels as long as there is room; then only as many as are checked at opening."""

    def __init__(self, count: int, room: int, max_pixels: int | None) -> None:
        self.few, self.room, self.max_pixels = count <= DECODED_AT_OPENING, room, max_pixels

    def __call__(self, entry: Entry) -> Seen | BadData:
        try:
            if self.room < 0 and not self.few:
                return Seen(header(entry.source(), self.max_pixels, name=entry.name))
            picture = _decode(entry, self.max_pixels)
        except BadData as error:
            return error
        self.room -= picture.pixels.nbytes
        channels, height, width = picture.pixels.shape
        return Seen(Header(channels, height, width), picture.notes, picture.pixels if self.room >= 0 else None)


def _look_at_all(found: Found, look: _Look, where: str) -> tuple[Found, list[tuple[Seen, ...]]]:
    """The images that can be read (with their targets) and what was seen of them; the others join the skipped ones."""
    sides = [found.entries] if found.targets is None else [found.entries, found.targets]
    rows = list(zip(*(_map(look, side) for side in sides), strict=True))
    good: dict[int, tuple[Seen, ...]] = {}
    bad = []
    for i, row in enumerate(rows):
        good[i] = tuple(one for one in row if isinstance(one, Seen))
        if len(good[i]) < len(row):
            del good[i]
            bad += [(side[i].name, str(one)) for side, one in zip(sides, row, strict=True) if isinstance(one, BadData)]
    bad = [(name, reason.removeprefix(f"{name}: ")) for name, reason in bad]
    if not good:
        count = f"none of its {len(rows)} images can be read; {bad[0][0]}: " if len(rows) > 1 else ""
        raise BadData(f"{where}: {count}{bad[0][1]}")
    kept = found.select(list(good))
    kept.skipped = [*found.skipped, *bad]
    return kept, list(good.values())


def _map(look: Callable[[Entry], Out], entries: list[Entry]) -> list[Out]:
    """In a few threads where the images are large enough to gain by it."""
    if sum(entry.stored_bytes() for entry in entries[:16]) < 16 * 50_000:
        return [look(entry) for entry in entries]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(look, entries))


def _decode(entry: Entry, max_pixels: int | None) -> Picture:
    return as_picture(decode(entry.source(), max_pixels, name=entry.name))


def _notes(seen: list[tuple[Seen, ...]], channels: int) -> list[str]:
    """What was converted, and how often."""
    counts = Counter(note for row in seen for one in row for note in one.notes)
    other = sum(row[0].header.channels != channels for row in seen)
    if other:
        counts["grey repeated to 3 channels" if channels == 3 else "colour made grey"] = other
    return [f"{count} of {len(seen)} images: {note}" for note, count in counts.items()]
