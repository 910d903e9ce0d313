"""The page of `sfumato show masks`: every mask of this library on one picture, at several ratios.

>>> import pathlib, tempfile, torch
>>> from sfumato.report import write_mask_report
>>> write_mask_report(torch.rand(3, 64, 64), pathlib.Path(tempfile.mkdtemp()) / "masks.html").name
'masks.html'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import BadData
from sfumato.masks import NAMED_MASKS, fill, frequency_disc, named_mask, upsample_mask
from sfumato.nn import patchify
from sfumato.physics import apply_frequency_mask
from sfumato.report.page import Page

RATIOS = (0.4, 0.6, 0.75, 0.9)
PROGRESS = (0.0, 1 / 3, 2 / 3, 1.0)
RADII = (4, 8, 16, 32)
"""Of the discs that are cut from the spectrum: cycles over a picture of 224 pixels."""


def write_mask_report(
    picture: Tensor,
    path: str | Path,
    *,
    patch: int = 16,
    ratios: Sequence[float] = RATIOS,
    scores: Mapping[str, tuple[Tensor, str]] | None = None,
    generator: torch.Generator | None = None,
    command: str | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        picture: `[C, H, W]` in [0, 1], its sides multiples of the patch; of two, for the mask of blocks.
        patch: side of a patch, pixels.
        ratios: hidden shares to show, 0 to 1.
        scores: for the masks that look at the picture, `{"hard": (scores [L], what they are), "semantic": ...}`; what is not
            given is from the picture alone, see `picture_scores`.
        generator: source of the draws.
        command: how to make the page again, to be shown.

    Raises:
        BadData: sides that patches do not fill.
    """
    height, width = picture.shape[-2:]
    if height % patch or width % patch:
        raise BadData(f"a picture of {height} x {width} pixels is not filled by patches of {patch}: crop it")
    grid = (height // patch, width // patch)
    scores = {**picture_scores(picture, patch), **(scores or {})}
    page = Page("Masks", subtitle=f"{height} x {width} pixels, {grid[0]} x {grid[1]} patches of {patch}")
    page.section("The picture").pictures({"nothing hidden": picture})

    def shown(name: str, ratio: float, progress: float = 1.0) -> list[Tensor]:
        """The picture under a mask, one for each view."""
        score = scores[name][0][None] if name in scores else None
        hidden = named_mask(name, 1, grid, ratio, scores=score, progress=progress, generator=generator)
        return [fill(picture[None], upsample_mask(h[None], grid, patch), how="color", value=0.5)[0] for h in hidden]

    for name, told in NAMED_MASKS.items():
        odd = name == "block" and any(n % 2 for n in grid)
        section = page.section(
            name, intro=_told(name, told, scores) + odd * " Not here: they do not fill an odd number of patches."
        )
        if odd:
            continue
        if name == "progressive":
            section.pictures({f"{p:.0%} of the training": shown(name, 0.75, p)[0] for p in PROGRESS})
        elif name == "disjoint":
            views = {r: shown(name, r) for r in (0.5, 0.75)}
            section.pictures({f"{r:.0%}, view {i + 1}": v for r, both in views.items() for i, v in enumerate(both)})
        else:
            section.pictures({f"{r:.0%}": shown(name, r)[0] for r in ratios})
    page.section("frequency", intro="Parts of the spectrum, not patches (`train mfm`): a disc of low frequencies, or all but it.")
    for which, low in (("without its high frequencies", True), ("without its low frequencies", False)):
        page.pictures({f"{which}, radius {r}": _filtered(picture, r, low) for r in RADII})
    if command:
        page.section("Again").code(command, "To make this page again.")
    return page.write(path)


def picture_scores(picture: Tensor, patch: int) -> dict[str, tuple[Tensor, str]]:
    """Scores from a picture alone, where no network is asked: detail for `hard`, rare colours for `semantic`.

    Args:
        picture: `[C, H, W]` in [0, 1].
        patch: side of a patch, pixels.

    Returns:
        For each mask its scores `[L]` and what they are.
    """
    patches = patchify(picture[None], patch)[0]
    colour = patches.view(len(patches), patch * patch, -1).mean(1)
    return {
        "hard": (patches.var(1), "the variance within a patch, as no network is asked"),
        "semantic": (
            (colour - colour.mean(0)).square().sum(1) + 1e-6,
            "how unlike the rest a patch's colour is, as no network is asked",
        ),
    }


def _told(name: str, told: str, scores: Mapping[str, tuple[Tensor, str]]) -> str:
    words = f"{told[:1].upper()}{told[1:]}."
    return f"{words} Here by {scores[name][1]}." if name in scores else words


def _filtered(picture: Tensor, radius: int, low: bool) -> Tensor:
    """The picture without the frequencies beyond a radius (`low`), or without those within it."""
    size = (picture.shape[-2], picture.shape[-1])
    beyond = frequency_disc(size, radius * min(size) / 224)
    return apply_frequency_mask(picture[None], (beyond if low else ~beyond)[None])[0]
