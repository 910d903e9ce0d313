"""Frames of a driving data set in KITTI's format, with a box and a distance for every object.

    FOLDER/image_2/*.png, FOLDER/label_2/*.txt  (or both below FOLDER/training)
    FOLDER/velodyne/*.bin and FOLDER/calib/*.txt, where there are any: distances are then measured
    FOLDER/ImageSets/train.txt and val.txt, where there are any: names of the frames of each split

A distance is the depth, in metres along the optical axis, of the nearest surface: of the laser's returns inside the object's 3D
box, the one a tenth of the way from near to far. Without a laser it is that of the centre of the labelled 3D box, which lies up
to half an object farther away; `notes` says so. Boxes of the class DontCare are left out, as are those without a return. A depth
that is not above 0 stands for an unknown one.

Sources: Geiger et al. 2012 (format); Zhu and Fang 2019 (distance from the returns). The split of Chen et al. 2015, 3,712 and
3,769 frames, comes as such lists with most detectors.

>>> import tempfile, torch
>>> from pathlib import Path
>>> from sfumato.data import open_data, write_image
>>> root = Path(tempfile.mkdtemp())
>>> for part in ("image_2", "label_2"):
...     (root / part).mkdir()
>>> write_image(root / "image_2" / "000000.png", torch.rand(3, 30, 90))
>>> line = "Car 0.00 1 -1.6 10 5 40 25 1.5 1.6 3.9 -2.0 1.4 20.0 -1.7"
>>> _ = (root / "label_2" / "000000.txt").write_text(line)
>>> frames = open_data(f"kitti:{root}").tensors()
>>> frames.boxes.tolist(), frames.target[0, 0].tolist()
([[[10.0, 5.0, 40.0, 25.0]]], [20.0, 0.5])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.folders import hold_out, list_images
from sfumato.data.image_files import CACHE_BYTES, Entry, Found, load
from sfumato.data.image_set import ImageSet, InMemory, Items, Sample
from sfumato.errors import BadData
from sfumato.nn.boxes import pad_boxes

VISIBLE = (1.0, 0.5, 0.25, float("nan"))
"""Visible share that stands for KITTI's degrees of occlusion: none, partly, largely, unknown; [our choice]."""


@dataclass(frozen=True)
class Label:
    """The objects of a frame: class names, and `[n, 14]` numbers as KITTI's columns after the class."""

    names: tuple[str, ...]
    numbers: Tensor

    @property
    def boxes(self) -> Tensor:
        """`[n, 4]` xyxy, pixels."""
        return self.numbers[:, 3:7]

    @property
    def values(self) -> Tensor:
        """`[n, 2]`: depth of the 3D box's centre in metres, visible share; NaN: unknown (-1 in a detector's files)."""
        degree = self.numbers[:, 1].long()
        visible = torch.tensor(VISIBLE)[torch.where(degree < 0, 3, degree.clamp(max=3))]
        return torch.stack((self.numbers[:, 12], visible), 1)


def open_kitti(
    folder: Path,
    split: str = "train",
    *,
    holdout: float = 0.1,
    channels: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    max_pixels: int | None = None,
) -> ImageSet | None:
    """Frames with `boxes` `[n, 4]` and `target` `[n, 2]` (distance in metres, visible share), rows of NaN filled up.

    Frames of other sizes than most are cut, or filled with black, at the right and the bottom: the camera's geometry stays.

    Args:
        folder: see the head of this file.
        split: "train", "test" or "all".
        holdout: share of the frames that is given to "test" where there are no lists, by a hash of each name.
        channels: 1 or 3; None: as stored.
        cache_bytes: most memory for pixels.
        max_pixels: largest image that is decoded.

    Returns:
        The set, or None where nothing is held out.

    Raises:
        BadData: no frames to train on, or a label file that is none.
    """
    root = next((p for p in (folder, folder / "training") if (p / "image_2").is_dir()), None)
    if root is None or not (root / "label_2").is_dir():
        raise BadData(f"{folder}: a KITTI folder holds image_2/ and label_2/ (or training/ with both); this one does not")
    images, skipped = list_images(root / "image_2")
    stems: dict[str, str] = {}
    for name in images:
        if stems.setdefault(Path(name).stem, name) != name:
            skipped.append((name, f"has the label of {stems[Path(name).stem]}"))
    labelled = [stem for stem in stems if (root / "label_2" / f"{stem}.txt").is_file()]
    skipped += [(stems[stem], "has no file in label_2") for stem in stems if stem not in set(labelled)]
    if not labelled:
        raise BadData(f"{folder}: no image of image_2 has a label of the same name in label_2")
    chosen = _of_split(root, labelled, split, holdout)
    if not chosen and split == "train":
        raise BadData(f"{folder}: no image with a label belongs to the training split: check ImageSets/train.txt, or remove it")
    if not chosen:
        return None
    labels = {stem: read_label(root / "label_2" / f"{stem}.txt") for stem in chosen}
    found = Found([Entry(images[stems[s]], stems[s]) for s in chosen], skipped=skipped)
    frames = load(found, channels=channels, cache_bytes=cache_bytes, max_pixels=max_pixels, where=f"kitti:{folder}")
    stems_kept = [Path(name).stem for name in frames.names]
    laser = all((root / "velodyne" / f"{s}.bin").is_file() and (root / "calib" / f"{s}.txt").is_file() for s in stems_kept)
    sizes = Counter(frames.items.sizes()).most_common()
    items = _Frames(frames.items, [labels[s] for s in stems_kept], sizes[0][0], root if laser else None, stems_kept)
    notes = [*frames.notes, "distances are those of the laser's returns" if laser else NO_LASER]
    if len(sizes) > 1:
        notes.append(f"{sum(count for _, count in sizes[1:])} frames are cut or filled to {sizes[0][0][1]}x{sizes[0][0][0]}")
    kept = items.in_memory() if frames.in_memory else items
    return ImageSet(kept, names=frames.names, skipped=frames.skipped, notes=notes)


NO_LASER = "no velodyne/ and calib/ for every frame: distances are those of the labelled 3D boxes' centres, not of their surfaces"


def read_label(path: Path) -> Label:
    """The objects of a label file, without those of the class DontCare.

    Raises:
        BadData: unreadable, or a line that is not a class and at least 14 numbers.
    """
    names, numbers = [], []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: cannot be read ({error}): check the file") from None
    for i, line in enumerate(lines):
        words = line.split()
        if not words or words[0] == "DontCare":
            continue
        try:
            numbers.append([float(word) for word in words[1:15]])
        except ValueError:
            numbers.append([])
        if len(numbers[-1]) < 14:
            raise BadData(f"{path}: line {i + 1} is no object of KITTI's format (a class and 14 numbers): repair or remove it")
        names.append(words[0])
    return Label(tuple(names), torch.tensor(numbers).view(-1, 14))


def laser_distances(points: Tensor, label: Label, rectify: Tensor) -> Tensor:
    """Depth of each object's nearest surface, from the returns inside its 3D box.

    Args:
        points: `[P, 3]`, metres, in the laser's coordinates.
        label: of the frame.
        rectify: `[3, 4]`, from the laser's to the rectified camera's coordinates (`R0_rect · Tr_velo_to_cam`).

    Returns:
        `[n]` metres: the return at a tenth of the way from the nearest to the farthest; NaN without returns.

    Reference:
        Zhu and Fang 2019, section 3.3.
    """
    height, width, length, x, y, z, turn = label.numbers[:, 7:14].to(points).unbind(1)
    camera = points @ rectify[:, :3].T.to(points) + rectify[:, 3].to(points)
    camera = camera[camera[:, 2] > 0]
    dx, dy, dz = (camera[None, :, k] - v[:, None] for k, v in enumerate((x, y, z)))  # [n, P]
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    along, across = cos * dx - sin * dz, sin * dx + cos * dz
    inside = (along.abs() <= length[:, None] / 2) & (across.abs() <= width[:, None] / 2) & (dy <= 0) & (dy >= -height[:, None])
    depth = torch.where(inside, camera[:, 2], torch.inf).sort(1).values
    count = inside.sum(1)
    if not camera.shape[0]:
        return torch.full_like(z, torch.nan)
    chosen = depth.gather(1, (count // 10)[:, None])[:, 0]
    return torch.where(count > 0, chosen, torch.nan)


def read_scan(path: Path) -> Tensor:
    """Returns of a laser, `[P, 3]` metres in its own coordinates.

    Raises:
        BadData: no rows of four numbers, such as a file that was not copied to its end.
    """
    numbers = np.fromfile(path, np.float32)
    if len(numbers) % 4 or path.stat().st_size % 4:
        raise BadData(f"{path}: no scan of rows of four numbers (x, y, z, reflectance): the file is damaged, copy it again")
    return torch.from_numpy(numbers.reshape(-1, 4)[:, :3])


def read_calibration(path: Path) -> Tensor:
    """`[3, 4]`: from the laser's coordinates to those of the rectified camera.

    Raises:
        BadData: R0_rect or Tr_velo_to_cam is missing.
    """
    rows = {key.strip(): values for key, _, values in (line.partition(":") for line in path.read_text().splitlines())}
    try:
        rotation, laser = (torch.tensor([float(v) for v in rows[key].split()]) for key in ("R0_rect", "Tr_velo_to_cam"))
        return rotation.view(3, 3) @ laser.view(3, 4)
    except (KeyError, ValueError, RuntimeError):
        raise BadData(f"{path}: R0_rect (9 numbers) and Tr_velo_to_cam (12 numbers) are needed: repair the file") from None


class _Frames:
    """Frames brought to one size, with their boxes and what is known of them."""

    labelled, paired, boxed = False, True, True

    def __init__(self, items: Items, labels: Sequence[Label], size: tuple[int, int], root: Path | None, stems: list[str]) -> None:
        self.items, self.labels, self.size, self.root, self.stems = items, labels, size, root, stems
        self.most = max(1, max(len(label.names) for label in labels))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Sample:
        """Frame `i`, cut or filled; objects outside of it, or without a return where there is a laser, have no box."""
        (height, width), label = self.size, self.labels[i]
        x = self.items.read(i).x
        x = F.pad(x, (0, max(0, width - x.shape[2]), 0, max(0, height - x.shape[1])))[:, :height, :width]
        values = label.values
        if self.root is not None:
            points = read_scan(self.root / "velodyne" / f"{self.stems[i]}.bin")
            values[:, 0] = laser_distances(points, label, read_calibration(self.root / "calib" / f"{self.stems[i]}.txt"))
        boxes = label.boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        good = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if self.root is not None:
            good = good & values[:, 0].isfinite()
        values[:, 0] = torch.where(values[:, 0] > 0, values[:, 0], torch.nan)
        padded = (pad_boxes([torch.where(good[:, None], v, torch.nan)], length=self.most)[0] for v in (boxes, values))
        boxes, values = padded
        return Sample(x, target=values, boxes=boxes)

    def sizes(self) -> list[tuple[int, int]]:
        """One for all."""
        return [self.size]

    def channels(self) -> int:
        """Channels of every frame."""
        return self.items.channels()

    def in_memory(self) -> InMemory:
        """All frames at once."""
        samples = [self.read(i) for i in range(len(self))]
        boxes, target = (
            torch.stack([v for v in values if v is not None]) for values in zip(*((s.boxes, s.target) for s in samples))
        )
        return InMemory([s.x for s in samples], target=target, boxes=boxes)


def _of_split(root: Path, stems: list[str], split: str, holdout: float) -> list[str]:
    if split == "all":
        return stems
    lists = {"train": root / "ImageSets" / "train.txt", "test": root / "ImageSets" / "val.txt"}
    if not all(path.is_file() for path in lists.values()):
        lists = {name: root.parent / "ImageSets" / path.name for name, path in lists.items()}
    if all(path.is_file() for path in lists.values()):
        wanted = set(lists[split].read_text().split())
        return [stem for stem in stems if stem in wanted]
    kept, given = hold_out(stems, holdout)
    return [stems[i] for i in (kept if split == "train" else given)]
