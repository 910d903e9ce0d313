"""Small real data that needs no download: photographs, digits, faces and moving crops, for examples, tests and claims.

Photographs and faces ship inside scikit-image's wheel, digits inside scikit-learn's. Everything is uint8 as stored or float in
[0, 1], and every draw is made from `generator` (or `seed`), so that two machines see the same pixels.

A moving crop looks at the photograph through a similarity that changes at a constant rate: the pixel p (from the centre of the
crop) of frame t shows the photograph at `c_t + s_t R(a_t) p`.

Sources: scikit-image data registry (van der Walt et al. 2014); UCI optical digits, Alpaydin and Kaynak 1998 (as
`sklearn.datasets.load_digits`); Labeled Faces in the Wild, Huang et al. 2007 (100 faces and 100 non-faces).

>>> import torch
>>> from sfumato.data import digits, photo_crops
>>> photo_crops(4, 32, generator=torch.Generator().manual_seed(0)).shape
torch.Size([4, 3, 32, 32])
>>> train, test = digits()
>>> train.x.shape, len(test)
(torch.Size([1300, 1, 8, 8]), 497)
"""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.errors import BadSetting

Split = Literal["train", "test", "all"]

PHOTOS: dict[str, tuple[str, ...]] = {
    "train": ("astronaut", "coffee", "rocket", "brick", "grass", "hubble_deep_field", "camera"),
    "test": ("chelsea", "coins", "gravel"),
}
"""Names of the photographs (functions of `skimage.data`) in each split."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_LARGEST_ZOOM = 0.7  # log of about 2: looking from farther away would alias


def photo_names(split: Split = "all") -> tuple[str, ...]:
    """Names of the photographs of a split, in the order of `photos`."""
    if split == "all":
        return PHOTOS["train"] + PHOTOS["test"]
    if split not in PHOTOS:
        raise BadSetting(f"split of photographs is {split!r}: say 'train', 'test' or 'all'")
    return PHOTOS[split]


def photos(split: Split = "train") -> list[Tensor]:
    """Ten photographs and textures: seven to train on, three to test on.

    Args:
        split: "train", "test" or "all" (train first).

    Returns:
        uint8 tensors `[3, H, W]`, 300 to 1000 pixels a side; grey ones have three equal channels.

    Raises:
        BadSetting: the split is none of the three.

    Example:
        >>> [tuple(p.shape) for p in photos("test")]
        [(3, 300, 451), (3, 303, 384), (3, 512, 512)]
    """
    return [_photo(name).clone() for name in photo_names(split)]


def photo_crops(
    n: int, size: int, *, split: Split = "train", gray: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Random square windows of the photographs; every photograph, and every place in it, is as likely as the others.

    Args:
        n: number of crops.
        size: side in pixels, at most 400 ("train") or 300 (else).
        split: the photographs to cut from; "train" and "test" share none.
        gray: one channel (BT.601 luma) instead of three.
        generator: source of the draws.

    Returns:
        `[n, 3 or 1, size, size]` float in [0, 1].

    Raises:
        BadSetting: `size` does not fit into the smallest photograph.
    """
    images = [_photo(name) for name in photo_names(split)]
    _check_size(size, images)
    which, u = _draw_places(n, len(images), generator)
    crops = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for k, image in enumerate(images):
        rows = (which == k).nonzero().squeeze(1)
        free = torch.tensor(image.shape[1:]) - size + 1
        y, x = (u[rows] * free).long().unbind(1)
        windows = image.unfold(1, size, 1).unfold(2, size, 1)  # a view [3, H', W', size, size]
        crops[rows] = windows[:, y, x].transpose(0, 1)
    result = crops.float().div_(255)
    return _gray(result) if gray else result


def digits(train: int = 1300, size: int = 8, seed: int = 0) -> tuple[Batch, Batch]:
    """The 1,797 handwritten digits, shuffled by `seed` and split.

    Args:
        train: number of training digits, 1 to 1796; the rest is the test set.
        size: side in pixels; the digits are 8 x 8, other sizes are resampled (bilinear).
        seed: of the shuffle.

    Returns:
        Training and test batch: `x` `[N, 1, size, size]` float in [0, 1], `label` 0 to 9, `index` 0 to N - 1.

    Raises:
        BadSetting: `train` leaves no digit on one side.
    """
    x, label = _digits()
    return _split(_resized(x, size), label, train, seed)


def faces(train: int = 150, size: int = 25, seed: int = 0) -> tuple[Batch, Batch]:
    """100 grey faces (label 1) and 100 windows of background (label 0), shuffled by `seed` and split.

    Args:
        train: number of training pictures, 1 to 199; the rest is the test set.
        size: side in pixels; the pictures are 25 x 25, other sizes are resampled (bilinear).
        seed: of the shuffle.

    Returns:
        Training and test batch: `x` `[N, 1, size, size]` float in [0, 1], `label`, `index` 0 to N - 1.

    Raises:
        BadSetting: `train` leaves no picture on one side.
    """
    x, label = _faces()
    return _split(_resized(x, size), label, train, seed)


@overload
def moving_crops(
    n: int, frames: int, size: int, *, velocity: float = ..., split: Split = ..., flow: Literal[False] = ...,
    motions: tuple[str, ...] = ..., generator: torch.Generator | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def moving_crops(
    n: int, frames: int, size: int, *, velocity: float = ..., split: Split = ..., flow: Literal[True],
    motions: tuple[str, ...] = ..., generator: torch.Generator | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def moving_crops(
    n: int, frames: int, size: int, *, velocity: float = 1.0, split: Split = "train", flow: bool = False,
    motions: tuple[str, ...] = ("pan", "zoom", "rotate"), generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Clips of a camera that pans, zooms and turns over the photographs at constant rates.

    Each motion moves the edge of the picture by at most `velocity` pixels a frame (each axis of the pan, too); a zoom ends at
    twofold; a path too long for its photograph is reflected at the border.

    Args:
        n: number of clips.
        frames: frames a clip, T.
        size: side in pixels.
        velocity: largest speed of each motion, pixels per frame; drawn uniformly from `[-velocity, velocity]`.
        split: the photographs to look at.
        flow: return the true flow too.
        motions: any of "pan", "zoom", "rotate".
        generator: source of the draws.

    Returns:
        `[n, T, 3, size, size]` float in [0, 1]; with `flow=True` also `[n, T - 1, 2, size, size]`, (dx, dy) in pixels: what
        stands at pixel p of frame t stands at p + flow in frame t + 1.

    Raises:
        BadSetting: `size` does not fit into the smallest photograph, or an unknown motion.
    """
    images = [_photo(name) for name in photo_names(split)]
    _check_size(size, images)
    if unknown := set(motions) - {"pan", "zoom", "rotate"}:
        raise BadSetting(f"unknown motion {sorted(unknown)[0]!r}: say 'pan', 'zoom' or 'rotate'")
    which, u = _draw_places(n, len(images), generator)
    rates = (_uniform((n, 4), generator) * 2 - 1) * velocity
    rates = rates * torch.tensor([m in motions for m in ("pan", "pan", "zoom", "rotate")])
    time = torch.arange(frames) - (frames - 1) / 2
    shift = rates[:, None, :2] * time[:, None]  # [n, T, 2], pixels, (x, y)
    zoom, angle = (rates[:, None, 2:] * (2 / size) * time[:, None]).unbind(-1)
    zoom = zoom * (_LARGEST_ZOOM / zoom.abs().amax(1, keepdim=True)).clamp(max=1)
    matrix = _similarity(zoom.exp(), angle)  # [n, T, 2, 2]
    clips = torch.empty(n, frames, 3, size, size)
    for k, image in enumerate(images):
        rows = (which == k).nonzero().squeeze(1)
        if len(rows):
            clips[rows] = _look(image, u[rows], shift[rows], matrix[rows], size)
    return (clips, _flow(shift, matrix, size)) if flow else clips


def _look(image: Tensor, u: Tensor, shift: Tensor, matrix: Tensor, size: int) -> Tensor:
    """What clips with one photograph see: `u` in [0, 1)^2 places the path where as much of it as possible is inside."""
    h, w = image.shape[1:]
    half = (size - 1) / 2
    reach = shift.abs() + (matrix.abs().sum(-1) * half)  # farthest corner of each frame from the path's middle
    low = torch.minimum(reach.amax(1), torch.tensor([(w - 1) / 2, (h - 1) / 2]))
    centre = low + u.flip(-1) * (torch.tensor([w - 1.0, h - 1.0]) - 2 * low)
    p = torch.einsum("ntij,hwj->nthwi", matrix, _pixels(size)) + (centre[:, None] + shift)[:, :, None, None]
    grid = (p * 2 + 1) / torch.tensor([w, h]) - 1  # the pixel centres of align_corners=False
    n, t = shift.shape[:2]
    seen = F.grid_sample(  # one photograph, all views at once: the frames stand below each other in the grid
        image[None].float().div(255), grid.reshape(1, n * t * size, size, 2), "bicubic", "reflection", align_corners=False
    )
    return seen.view(3, n, t, size, size).permute(1, 2, 0, 3, 4).clamp(0, 1)


def _flow(shift: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Where each pixel of a frame goes in the next one, minus where it is: `[n, T - 1, 2, size, size]`."""
    p = _pixels(size)
    seen = torch.einsum("ntij,hwj->nthwi", matrix[:, :-1], p) - (shift[:, 1:] - shift[:, :-1])[:, :, None, None]
    there = torch.einsum("ntij,nthwj->nthwi", torch.linalg.inv(matrix[:, 1:]), seen)
    return (there - p).permute(0, 1, 4, 2, 3).contiguous()


def _similarity(scale: Tensor, angle: Tensor) -> Tensor:
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)


def _pixels(size: int) -> Tensor:
    """`[size, size, 2]`: (x, y) of each pixel, from the middle of the picture."""
    line = torch.arange(size) - (size - 1) / 2
    return torch.stack((line.expand(size, size), line[:, None].expand(size, size)), -1)


def _draw_places(n: int, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """For each of `n` crops: which of `count` photographs, and a place in it as (y, x) in [0, 1)."""
    u = _uniform((n, 3), generator)
    return (u[:, 0] * count).long().clamp_(max=count - 1), u[:, 1:]


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform numbers on the CPU, drawn wherever the generator lives."""
    return torch.rand(shape, generator=generator, device=generator.device if generator else "cpu").cpu()


def _check_size(size: int, images: list[Tensor]) -> None:
    largest = min(min(i.shape[1:]) for i in images)
    if not 1 <= size <= largest:
        raise BadSetting(f"crops of {size} pixels do not fit: the smallest photograph allows 1 to {largest}")


def _gray(x: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, dtype=x.dtype)
    return torch.einsum("nchw,c->nhw", x, weights).unsqueeze(1).clamp_(0, 1)


def _resized(x: Tensor, size: int) -> Tensor:
    if size == x.shape[-1]:
        return x
    if size < 1:
        raise BadSetting(f"pictures of {size} pixels: the side must be 1 or more")
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)


def _split(x: Tensor, label: Tensor, train: int, seed: int) -> tuple[Batch, Batch]:
    if not 0 < train < len(x):
        raise BadSetting(f"train={train}: there are {len(x)} samples, so say 1 to {len(x) - 1} (the rest is for testing)")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    halves = (order[:train], order[train:])
    first, second = (Batch(x[i], torch.arange(len(i)), label[i]) for i in halves)
    return first, second


@functools.cache
def _photo(name: str) -> Tensor:
    """`[3, H, W]` uint8, shared: never written to."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)().copy())
    return (pixels.expand(3, *pixels.shape) if pixels.ndim == 2 else pixels.permute(2, 0, 1)).contiguous()


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float().div_(16).unsqueeze(1), torch.from_numpy(data.target).long()


@functools.cache
def _faces() -> tuple[Tensor, Tensor]:
    import skimage.data

    pixels = skimage.data.lfw_subset()  # type: ignore[no-untyped-call]
    x = torch.from_numpy(pixels).float().unsqueeze(1)
    return x, (torch.arange(len(x)) < 100).long()  # the faces come first
