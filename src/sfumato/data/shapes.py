"""Drawn pictures whose rules are known: three shapes in three columns, discs, and images with smooth edges.

    columns: triangle | square | pentagon, each there or not, at most once
    C^alpha: two backgrounds on either side of a contour; |spectrum| of both falls as |f|^-alpha

Sources: Aithal et al., "Understanding Hallucinations in Diffusion Models through Mode Interpolation", NeurIPS 2024 (simple
shapes); Kadkhodaie, Guth, Simoncelli, Mallat, "Generalization in diffusion models arises from geometry-adaptive harmonic
representations", ICLR 2024 (discs, C^alpha).

>>> import torch
>>> from sfumato.data import c_alpha_images, find_shapes, simple_shapes
>>> g = torch.Generator().manual_seed(0)
>>> images, present = simple_shapes(100, generator=g)
>>> images.shape, bool(present.any(1).all())
(torch.Size([100, 1, 64, 64]), True)
>>> bool(find_shapes(images).off_support.any())
False
>>> c_alpha_images(4, 16, 2.0, generator=g).shape
torch.Size([4, 1, 16, 16])
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData, BadSetting


def simple_shapes(
    n: int, size: int = 64, *, p: float = 0.5, area: float = 60.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """White shapes on black: a triangle in the left column, a square in the middle, a pentagon in the right one.

    Each is there with probability p, at a uniformly random place of its column; empty pictures do not occur.

    Args:
        n: number of pictures.
        size: side in pixels; a column is `size // 3` wide, what is left over stays black.
        p: probability of each shape, above 0 to 1.
        area: of each shape in pixels, about (their edges are drawn, too).
        generator: source of the draws.

    Returns:
        Pictures `[n, 1, size, size]`, 0 or 1, and `[n, 3]` bool: which shapes are there.

    Raises:
        BadSetting: shapes that do not fit into their column, or another p.
    """
    if not 0 < p <= 1:
        raise BadSetting(f"p={p} is not a probability above 0")
    u = _uniform((n, 7), generator)
    stamps, cell = _stamps(area).to(u.device), size // 3
    side = stamps.shape[-1]
    if side > cell:
        raise BadSetting(f"shapes of area {area} need columns of {side} pixels, size={size} gives {cell}: draw larger pictures")
    with torch.device(u.device):
        kinds = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)[1:]  # all but the empty one
        chance = torch.where(kinds, p, 1 - p).prod(1)
        kind = torch.searchsorted(chance.cumsum(0) / chance.sum(), u[:, 0].contiguous()).clamp(max=len(kinds) - 1)
        present = kinds[kind]
        extent = torch.stack([stamps.any(2).sum(1), stamps.any(1).sum(1)], 1)  # height and width of each shape
        free = torch.tensor([3 * cell, cell]) - extent + 1
        corner = (u[:, 1:].view(n, 3, 2) * free).long()
        rows = corner[..., 0, None, None] + torch.arange(side)[:, None]
        columns = (corner[..., 1] + cell * torch.arange(3))[..., None, None] + torch.arange(side)
        # a stamp may hang over where it is black: a margin takes that
        canvas = torch.zeros(n, size + side, size + side)
        canvas.index_put_(
            (torch.arange(n)[:, None, None, None], rows, columns),
            (stamps & present[..., None, None]).to(canvas),
            accumulate=True,
        )
    return canvas[:, None, :size, :size].contiguous(), present


class ShapesFound(NamedTuple):
    """What stands in pictures of simple shapes.

    Args:
        counts: `[n, 3, 3]`, how many of each shape (triangle, square, pentagon) stand in each column, by their left edge.
        unknown: `[n]`, how many connected pieces look like none of them.
    """

    counts: Tensor
    unknown: Tensor

    @property
    def off_support(self) -> Tensor:
        """`[n]` bool: a shape more than once in the picture, or in a column that is not its own; broken pieces do not count."""
        own = torch.eye(3, dtype=torch.bool, device=self.counts.device)
        return (self.counts.masked_fill(own, 0).sum((1, 2)) > 0) | (self.counts.sum(2) > 1).any(1)


def find_shapes(images: Tensor, *, area: float = 60.0, overlap: float = 0.7) -> ShapesFound:
    """Look for the shapes of `simple_shapes` in pictures that a model drew.

    Connected white pieces (above 1/2; corners connect) are compared with each shape, laid on at the piece's upper left corner.

    Args:
        images: `[n, 1, size, size]` in [0, 1].
        area: of a shape in pixels, as they were drawn with.
        overlap: intersection over union from which a piece is a shape.

    Returns:
        On the CPU.
    """
    import numpy as np
    from scipy.ndimage import label

    white = images[:, 0].detach().cpu() > 0.5
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = True  # pieces of one picture do not connect to the next
    labels, count = label(white.numpy(), structure=within)
    stamps, cell = _stamps(area), images.shape[-1] // 3
    side = stamps.shape[-1]
    n, y, x = white.nonzero().unbind(1)
    piece = torch.from_numpy(labels)[n, y, x].long() - 1
    of, top, left = (torch.full((count,), 10**6).scatter_reduce(0, piece, v, "amin") for v in (n, y, x))
    dy, dx = y - top[piece], x - left[piece]
    inside = (dy < side) & (dx < side)
    hit = stamps[:, dy.clamp(max=side - 1), dx.clamp(max=side - 1)] & inside
    both = torch.zeros(3, count, dtype=torch.long).index_add_(1, piece, hit.long())
    union = piece.bincount(minlength=count) + stamps.sum((1, 2))[:, None] - both
    shared, kind = (both / union).max(0) if count else (torch.zeros(0), torch.zeros(0, dtype=torch.long))
    known = shared >= overlap
    column = (left // cell).clamp(max=2)
    counts = torch.zeros(len(white) * 9, dtype=torch.long)
    counts.index_add_(0, (9 * of + 3 * kind + column)[known], torch.ones(int(known.sum()), dtype=torch.long))
    return ShapesFound(counts.view(-1, 3, 3), of[~known].bincount(minlength=len(white)))


def discs(n: int, size: int, *, u: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """One uniform disc on a uniform ground: five numbers a picture.

    The radius is uniform from a tenth to three tenths of the side, the centre where the whole disc is inside, both grey levels
    on [0, 1]. The edge is a ramp one pixel wide, so that pictures move smoothly with their numbers.

    Args:
        n: number of pictures.
        size: side in pixels.
        u: `[n, 5]`, uniform on [0, 1), instead of drawing it: radius, centre (y, x), disc, ground.
        generator: source of the draws.

    Returns:
        `[n, 1, size, size]` in [0, 1].
    """
    u = _given_uniform((n, 5), u, generator)
    radius = size * (0.1 + 0.2 * u[:, 0])
    centre = radius[:, None] + u[:, 1:3] * (size - 2 * radius)[:, None]
    pixel = torch.arange(size, device=u.device, dtype=u.dtype) + 0.5
    dy, dx = (pixel - c[:, None] for c in centre.unbind(1))
    distance = (dy[:, :, None].square() + dx[:, None].square()).sqrt()
    inside = (radius[:, None, None] - distance + 0.5).clamp(0, 1)
    disc, ground = u[:, 3:].T[..., None, None]
    return torch.lerp(ground, disc, inside)[:, None]


def c_alpha_images(
    n: int,
    size: int,
    alpha: float,
    *,
    beta: float | None = None,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Two smooth regions that meet at a smooth contour.

    Args:
        n: number of pictures.
        size: side in pixels.
        alpha: smoothness of the contour.
        beta: smoothness of the two regions; None: `alpha`.
        u: `[n, size + 2 * size**2 + 3]`, uniform on [0, 1), instead of drawing it: contour, the two regions, least grey of the
            bright one, largest grey of the dark one, and which of them lies on top.
        generator: source of the draws.

    Returns:
        `[n, 1, size, size]` in [0, 1].

    Raises:
        BadData: `u` of another shape.
    """
    u = _given_uniform((n, size + 2 * size**2 + 3), u, generator)
    line, plane, levels = u.split([size, 2 * size**2, 3], 1)
    regions = smooth_noise(plane.view(n, 2, size, size), alpha if beta is None else beta)
    low, high = regions.amin((2, 3), keepdim=True), regions.amax((2, 3), keepdim=True)
    regions = (regions - low) / (high - low).clamp(min=torch.finfo(u.dtype).tiny)
    floor, ceiling, order = (level[:, None, None] for level in levels.unbind(1))
    bright, dark = floor + (1 - floor) * regions[:, 0], ceiling * regions[:, 1]
    top = order < 0.5
    height = (size * smooth_noise(line, alpha, dims=1)).round() + size // 2
    above = (torch.arange(size, device=u.device)[:, None] < height[:, None]).to(u.dtype)
    above = F.avg_pool2d(F.pad(above[:, None], (0, 1, 0, 1), mode="replicate"), 2, 1)[:, 0]
    return torch.lerp(torch.where(top, dark, bright), torch.where(top, bright, dark), above)[:, None]


def smooth_noise(u: Tensor, alpha: float, *, dims: int = 2) -> Tensor:
    """Uniform noise on [-1, 1] whose spectrum is multiplied by |k|^-alpha; k in periods a picture, the mean's gain is 1.

    Args:
        u: uniform on [0, 1), `[..., size]` or, for two dimensions, `[..., size, size]`.
        alpha: smoothness.
        dims: 1 or 2.

    Returns:
        Like `u`.
    """
    size, where = u.shape[-1], tuple(range(-dims, 0))
    k = torch.fft.fftfreq(size, 1 / size, device=u.device, dtype=u.dtype)
    distance = k.abs() if dims == 1 else (k[:, None].square() + k.square()).sqrt()
    gain = distance.clamp(min=1) ** -alpha
    return torch.fft.ifftn(torch.fft.fftn(2 * u - 1, dim=where) * gain, dim=where).real


def _stamps(area: float) -> Tensor:
    """Triangle, square and pentagon of about this area, each in the top left corner of a square: `[3, s, s]` bool."""
    import numpy as np
    from PIL import Image, ImageDraw

    triangle = math.floor((4 * area / 3**0.5) ** 0.5)  # the side
    square = math.floor(area**0.5)
    radius = math.floor((4 * area / (5 * (5 + 2 * 5**0.5)) ** 0.5) ** 0.5)
    angles = [math.pi * (2 * i / 5 - 0.5) for i in range(5)]
    outlines = (
        [(0.0, triangle * 3**0.5 / 2), (triangle, triangle * 3**0.5 / 2), (triangle / 2, 0.0)],
        [(0.0, 0.0), (square, 0.0), (square, square), (0.0, square)],
        [(radius * (1 + math.cos(a)), radius * (1 + math.sin(a))) for a in angles],
    )
    side = max(triangle, square, 2 * radius) + 2
    stamps = []
    for outline in outlines:
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).polygon(outline, fill=1)
        drawn = torch.from_numpy(np.asarray(image).astype(bool))
        top, left = (int(drawn.any(axis).nonzero()[0]) for axis in (1, 0))
        stamps.append(drawn.roll((-top, -left), (0, 1)))
    whole = torch.stack(stamps)
    used = max(int(whole.any(0).any(axis).sum()) for axis in (0, 1))
    return whole[:, :used, :used]


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device if generator is not None else None)


def _given_uniform(shape: tuple[int, ...], u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if u is None:
        return _uniform(shape, generator)
    if u.shape != shape:
        raise BadData(f"the draws must have shape {list(shape)}, not {list(u.shape)}")
    return u
