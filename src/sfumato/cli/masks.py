"""`sfumato show masks`: a page with every mask on a person's own picture."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.cli.console import say
from sfumato.errors import BadSetting

PATCH, LONGEST = 16, 448
"""Pixels: of a patch, and of the picture's longer side where no run says otherwise."""


def show_masks(image: Path | None, out: Path, *, run: Path | None, seed: int) -> None:
    """Write the page.

    Args:
        image: a picture file; None: a photograph that ships with the library.
        out: where the page goes.
        run: a masked model whose own difficulty and attention guide the masks that ask for them.
        seed: of the draws.
    """
    from sfumato.data import photos, read_image
    from sfumato.report import write_mask_report

    picture = photos("train")[0].float() / 255 if image is None else read_image(image).float()
    generator = torch.Generator().manual_seed(seed)
    patch, scores = PATCH, None
    if run is None:
        picture = cropped(shrunk(picture, LONGEST), 2 * PATCH)
    else:
        picture, patch, scores = _by_a_run(run, picture, generator)
    words = ["sfumato", "show", "masks", *(["--image", str(image)] if image else []), *(["--run", str(run)] if run else [])]
    command = shlex.join([*words, "-o", str(out), *(["--seed", str(seed)] if seed else [])])
    say(str(write_mask_report(picture, out, patch=patch, scores=scores, generator=generator, command=command)))


def shrunk(x: Tensor, longest: int) -> Tensor:
    """At most `longest` pixels a side, `[C, H, W]`."""
    scale = longest / max(x.shape[-2:])
    if scale >= 1:
        return x
    size = [max(1, round(side * scale)) for side in x.shape[-2:]]
    return F.interpolate(x[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def cropped(x: Tensor, multiple: int) -> Tensor:
    """The middle of a picture whose sides are multiples of a number; a smaller one is enlarged to it first.

    >>> cropped(torch.rand(3, 100, 70), 32).shape, cropped(torch.rand(1, 20, 40), 32).shape
    (torch.Size([3, 96, 64]), torch.Size([1, 32, 64]))
    """
    if min(x.shape[-2:]) < multiple:
        scale = multiple / min(x.shape[-2:])
        size = [max(multiple, round(side * scale)) for side in x.shape[-2:]]
        x = F.interpolate(x[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    height, width = (side // multiple * multiple for side in x.shape[-2:])
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def _by_a_run(run: Path, picture: Tensor, generator: torch.Generator) -> tuple[Tensor, int, dict[str, tuple[Tensor, str]]]:
    from sfumato.engine import load
    from sfumato.papers.masking.mae import MaskedImageModel

    method = load(run, device="cpu")
    if not isinstance(method, MaskedImageModel):
        raise BadSetting(f"{run} is no masked image model: give one of mae, simmim, colormae, hpm, ...")
    return seen_by(method, picture, generator)


def seen_by(method: Any, picture: Tensor, generator: torch.Generator) -> tuple[Tensor, int, dict[str, tuple[Tensor, str]]]:
    """A picture as a masked image model takes it, its patch in pixels, and scores of its patches by the model, where it has any.

    A convolutional network has no attention; one that hides frequencies or learns no pixels makes no errors of patches.
    """
    if picture.shape[0] != method.channels:
        picture = picture.mean(0, keepdim=True).expand(method.channels, -1, -1)
    x = method.to_size(picture[None])
    method.eval()
    normal = method.normalised(x)
    asked = {
        "hard": (method.patch_errors, "the error of the run's own network where a patch is hidden"),
        "semantic": (method.attention, "the attention of the run's own network"),
    }
    scores: dict[str, tuple[Tensor, str]] = {}
    for name, (of, told) in asked.items():
        with suppress(BadSetting):
            scores[name] = (of(normal, generator)[0], told)
    return x[0], x.shape[-1] // method.encoder.grid[1], scores
