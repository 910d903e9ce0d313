"""Encoded images, whole files or members of a tar, checked and made a set: in memory where they fit.

All headers are looked at first. When the pixels fit into memory, or when there are few files, every image is decoded at once, in
a few threads: a damaged one is found before training starts and is skipped. The rest is decoded when it is asked for.

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
    skipped = list(found.skipped)
    headers, rows = _each(lambda entry: header(entry.source(), max_pixels, name=entry.name), found, skipped, where)
    found = found.select(rows)
    channels = channels or max(h.channels for pair in headers for h in pair)
    fits = sum(channels * h.height * h.width for pair in headers for h in pair) <= cache_bytes
    notes = [_channel_note([pair[0].channels for pair in headers], channels)]
    items: Items
    if fits or len(rows) <= DECODED_AT_OPENING:

        def check(entry: Entry) -> tuple[Tensor, tuple[str, ...]]:
            picture = _decode(entry, max_pixels)
            return to_channels(picture.pixels, channels) if fits else torch.empty(0), picture.notes

        decoded, rows = _each(check, found, skipped, where)
        found, headers = found.select(rows), [headers[i] for i in rows]
        counts = Counter(note for pair in decoded for _, some in pair for note in some)
        notes += [f"{count} of {len(rows)} images: {note}" for note, count in counts.items()]
        x, *target = ([pixels for pixels, _ in side] for side in zip(*decoded, strict=True))
    if fits:
        items = InMemory(x, None if found.labels is None else torch.tensor(found.labels), target[0] if target else None)
    else:
        items = OnDisk(found, [pair[0] for pair in headers], channels, max_pixels)
    names = [entry.name for entry in found.entries]
    return ImageSet(items, classes=found.classes, names=names, skipped=skipped, notes=[note for note in notes if note])


def _each(
    look: Callable[[Entry], Out], found: Found, skipped: list[tuple[str, str]], where: str
) -> tuple[list[tuple[Out, ...]], list[int]]:
    """Look at every image (and its target) in a few threads: what was seen, and which rows are good."""

    def safe(entry: Entry) -> Out | BadData:
        try:
            return look(entry)
        except BadData as error:
            return error

    sides = [side for side in (found.entries, found.targets) if side is not None]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        seen = list(zip(*(pool.map(safe, side) for side in sides), strict=True))
    rows = [i for i, row in enumerate(seen) if not any(isinstance(value, BadData) for value in row)]
    for row, *entries in zip(seen, *sides, strict=True):
        bad = [(e.name, str(v).removeprefix(f"{e.name}: ")) for v, e in zip(row, entries, strict=True) if isinstance(v, BadData)]
        skipped += bad[:1]
    if not rows:
        name, reason = skipped[len(found.skipped)] if len(skipped) > len(found.skipped) else skipped[-1]
        raise BadData(f"{where}: none of its {len(seen)} images can be read; the first is {name}: {reason}")
    return [seen[i] for i in rows], rows


def _decode(entry: Entry, max_pixels: int | None) -> Picture:
    return as_picture(decode(entry.source(), max_pixels, name=entry.name))


def _channel_note(stored: list[int], channels: int) -> str:
    other = sum(c != channels for c in stored)
    change = "grey repeated to 3 channels" if channels == 3 else "colour made grey"
    return f"{other} of {len(stored)} images: {change}" if other else ""
