"""Folders of images as a person has them: nested, mixed, with odd names and a few broken files.

What a folder says by its shape: sub-folders `train` and `test` (or `val`) are splits, one sub-folder per class gives labels. A
labelled folder without a test split gives away a share of its images, chosen by a hash of each path: the same images on every
machine and after every addition.

>>> kept, given = hold_out([f"cat/{i}.png" for i in range(1000)], 0.1)
>>> len(kept) + len(given), 80 < len(given) < 120
(1000, True)
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from sfumato.data.decoding import header
from sfumato.data.image_files import Entry, Found
from sfumato.data.images import IMAGE_SUFFIXES
from sfumato.errors import BadData

UNREADABLE = (
    *(".heic", ".heif", ".hif", ".jxl", ".exr", ".hdr", ".psd", ".svg", ".eps", ".pdf", ".tga", ".ico", ".dng", ".cr2"),
    *(".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pcx", ".dds", ".xcf", ".fits", ".dcm"),
)
"""Suffixes of pictures that are counted as skipped; files with other suffixes are no pictures and are not mentioned."""

_TEST_NAMES = ("test", "val", "valid", "validation")


def find_images(root: Path, split: str, holdout: float) -> Found | None:
    """The images of a folder that belong to a split; None where nothing is held out to test on.

    Args:
        root: the folder.
        split: "train" or "test".
        holdout: share of a labelled folder without a test split that is given to "test".

    Raises:
        BadData: there is no image in the folder.
    """
    paths, skipped = list_images(root)
    parts = {name: name.split("/") for name in paths}
    train, test = _split_folders(parts.values())
    below = 1 if train else 0  # levels of the path that name the split
    in_train = [name for name in paths if not train or parts[name][0] == train]
    in_test = [name for name in paths if test and parts[name][0] == test]
    classes = _classes([parts[name][below:] for name in in_train])
    if not test and classes:
        kept, given = hold_out(in_train, holdout)
        in_train, in_test = [in_train[i] for i in kept], [in_train[i] for i in given]
    chosen = in_train if split == "train" else in_test
    if classes:
        number = {name: i for i, name in enumerate(classes)}
        strange = [name for name in chosen if parts[name][below] not in number]
        skipped += [(name, f"its class is not among those of {train}/") for name in strange]
        chosen = [name for name in chosen if parts[name][below] in number]
    if not chosen:
        return None
    labels = [number[parts[name][below]] for name in chosen] if classes else None
    return Found([Entry(paths[name], name) for name in chosen], labels, classes, skipped=skipped)


def find_pairs(inputs: Path, targets: Path) -> Found:
    """Images of two folders that have the same name, whatever their suffix; those without a partner are skipped.

    Raises:
        BadData: no image has a partner.
    """
    (left, skipped), (right, more) = list_images(inputs), list_images(targets)
    partner = {_stem(name): name for name in sorted(right, reverse=True)}
    both = [name for name in left if _stem(name) in partner]
    if not both:
        first = next(iter(left))
        raise BadData(f"no image of {inputs} has a partner of the same name in {targets}: {first}, for one, has none")
    taken = {partner[_stem(name)] for name in both}
    skipped = [*skipped, *more, *((n, f"has no partner in {targets}") for n in left if _stem(n) not in partner)]
    skipped += [(n, f"has no partner in {inputs}") for n in right if n not in taken]
    entries = [Entry(left[name], name) for name in both]
    partners = [partner[_stem(name)] for name in both]
    return Found(entries, targets=[Entry(right[name], name) for name in partners], skipped=skipped)


def list_images(root: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """{name: path} of the images below a folder, in order of their names, and (name, reason) of other pictures.

    A name is the path below the folder with `/`, composed as Unicode NFC, so that it is the same on every system.
    """
    found: dict[str, str] = {}
    skipped = []
    seen = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else [d for d in below if not d.startswith(".") and d != "__MACOSX"]
        if real in seen:  # a link that leads back
            continue
        seen.add(real)
        inner = Path(folder).relative_to(root)
        for file in files:
            path, suffix = os.path.join(folder, file), os.path.splitext(file)[1].lower()
            if file.startswith(".") or not os.path.isfile(path):
                continue
            name = unicodedata.normalize("NFC", (inner / file).as_posix())
            if suffix in IMAGE_SUFFIXES or (not suffix and _is_image(path)):
                found[name] = path
            elif suffix in UNREADABLE:
                skipped.append((name, f"{suffix} is not read: convert it to PNG, JPEG or TIFF"))
    if not found:
        others = f"; {len(skipped)} of kinds that are not read, such as {skipped[0][0]}" if skipped else ""
        raise BadData(f"{root}: no images in this folder or below it (PNG, JPEG, TIFF, WebP, BMP, GIF, ...){others}")
    return dict(sorted(found.items())), sorted(skipped)


def hold_out(names: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Positions to keep and to hold out: about `share` of the names, by a hash of each name alone."""
    drawn = [
        int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") for name in names
    ]
    given = [i for i, number in enumerate(drawn) if number < share * 2**64]
    kept = [i for i, number in enumerate(drawn) if number >= share * 2**64]
    return (kept, given) if kept else (given, [])


def _split_folders(parts: Iterable[list[str]]) -> tuple[str | None, str | None]:
    """Names of the sub-folders of the splits, where the folder holds nothing but splits."""
    tops = {p[0] if len(p) > 1 else "" for p in parts}
    lower = {top.lower(): top for top in tops}
    if "train" not in lower or not set(lower) <= {"train", *_TEST_NAMES}:
        return None, None
    return lower["train"], next((lower[name] for name in _TEST_NAMES if name in lower), None)


def _classes(parts: list[list[str]]) -> tuple[str, ...] | None:
    """Names of the sub-folders, where there are two or more and every image lies in one."""
    names = sorted({p[0] for p in parts})
    return tuple(names) if len(names) >= 2 and all(len(p) > 1 for p in parts) else None


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _is_image(path: str) -> bool:
    try:
        header(path)
    except BadData:
        return False
    return True
