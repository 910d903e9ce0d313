"""`sfumato edit`: move pictures along a direction that a run has found, and write them as a strip: a row a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import catalogue
from sfumato.cli.console import hint, progress, say
from sfumato.data.images import read_image
from sfumato.engine import Run, load
from sfumato.engine.loading import configure, preset_for
from sfumato.errors import BadSetting
from sfumato.method import Editor, Method, Sampler, capabilities

FINDER = "h-space-directions"
"""What looks for directions in a run that has none."""

STRENGTHS = {"pca": "-3,0,3", "jacobian": "-50,0,50", "attribute": "-1,0,1"}
"""What is shown of each kind of direction; their units differ."""

BATCH = 32
"""Pictures drawn at once while directions are found."""


def edit(
    run: Path,
    out: Path,
    direction: str,
    strength: str | None,
    kind: str,
    *,
    image: Path | None,
    mask: Path | None,
    without: Sequence[str],
    count: int,
    samples: int,
    seed: int,
    device: str,
) -> None:
    """Find directions where the run has none, edit, write the strip."""
    if kind not in STRENGTHS:
        raise BadSetting(f"--kind {kind} is not known: {', '.join(STRENGTHS)}")
    strengths = numbers(strength or STRENGTHS[kind])
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BadSetting(f"{out} is no picture: end it in .png, .jpg or .webp")
    if count < 1 or samples < 2:
        raise BadSetting(f"-n {count} and --samples {samples} must be at least 1 and 2")
    if image is not None and image.resolve() == out.resolve():
        raise BadSetting(f"{out} would overwrite its own input; give another name with -o")
    loaded = load(run, device=device)
    method: Any = loaded if isinstance(loaded, Editor) else found_in(loaded, run, samples if kind == "pca" else 0, seed)
    generator = torch.Generator(method.device).manual_seed(seed)
    classes = (Run(run).config.get("classes") if run.is_dir() else None) or []
    rows = method.edit(
        numbered(direction, classes) if kind == "attribute" else direction,
        strengths,
        kind=kind,
        images=None if image is None else fitted(image, method),
        n=count,
        mask=None if mask is None else (fitted(mask, method).mean(1, keepdim=True) > 0.5),
        without=[numbered(other, classes) for other in without],
        generator=generator,
    ).cpu()
    from sfumato.report.pictures import save_grid

    save_grid(rows.flatten(0, 1).float(), out, cols=len(strengths))
    told = " ".join([kind, direction, *(["without", ", ".join(without)] if without else [])])
    say(f"{out}  ({len(rows)} x {len(strengths)} pictures: {told}, {', '.join(f'{s:g}' for s in strengths)})")


def found_in(model: Method, run: Path, samples: int, seed: int) -> Method:
    """The method that edits, its directions found in another run's model."""
    kind = catalogue.load_method(FINDER)
    if not isinstance(model, Sampler):
        able = ", ".join(capabilities(model)) or "nothing that commands do"
        raise BadSetting(f"{run} cannot be edited: give a run of {FINDER} or ddpm; it can: {able}")
    config = configure(kind.Config, preset_for("auto", str(model.device)), {"batch_size": min(BATCH, max(1, samples))})
    finder: Any = kind.init_from(config, model)
    generator = torch.Generator(model.device).manual_seed(seed + 1)  # not the pictures that are edited
    for _ in progress(list(range(math.ceil(samples / config.batch_size))), "directions"):
        finder.look(generator)
    if samples:
        hint(f"keep directions for later: sfumato train {FINDER} --data WHERE --init {run}")
    editor: Method = finder.eval()
    return editor


def numbers(text: str) -> list[float]:
    """`"-3,0,3"` as numbers."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise BadSetting(f"--strength {text} is no list of numbers, such as -3,0,3")
    return found


def numbered(direction: str, classes: Sequence[str]) -> str:
    """`A` or `A:B` with the names of classes replaced by their numbers."""
    words = direction.split(":")
    for word in words:
        if classes and word not in classes and not word.isdecimal():
            raise BadSetting(f"there is no class {word!r} in {direction!r}: {', '.join(classes)}")
    return ":".join(str(classes.index(word)) if word in classes else word for word in words)


def fitted(path: Path, method: Any) -> Tensor:
    """A picture as the method draws them: `[1, C, H, W]`, its middle square resized, grey or in colour."""
    from torchvision.transforms.v2.functional import center_crop, resize

    picture = read_image(path)
    for note in picture.notes:
        hint(f"{path}: {note}")
    x, (channels, *size) = picture.float()[None], method.picture_shape
    side = min(x.shape[-2:])
    if x.shape[-2:] != tuple(size):
        hint(f"{path}: cut to a square and resized to {size[1]} x {size[0]}")
        x = resize(center_crop(x, [side, side]), size, antialias=True).clamp(0, 1)
    if channels == 1:
        x = x.mean(1, keepdim=True)
    return x.expand(-1, channels, -1, -1).to(method.device)
