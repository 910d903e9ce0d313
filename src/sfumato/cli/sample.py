"""`sfumato sample`: draw new pictures with a run that can, and write them as one grid (or one file each into a folder)."""

from __future__ import annotations

from pathlib import Path

import torch

from sfumato.cli.console import say
from sfumato.engine import load
from sfumato.errors import BadSetting
from sfumato.method import Sampler, capabilities


def sample(run: Path, count: int, out: Path, *, seed: int, device: str) -> None:
    """Draw `count` pictures; a name with a suffix is one grid, any other a folder."""
    from torchvision.utils import save_image

    if count < 1:
        raise BadSetting(f"-n {count} is no number of pictures: give 1 or more")
    if out.suffix and out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise BadSetting(f"{out} is no picture: end it in .png, .jpg or .webp, or name a folder")
    method = load(run, device=device)
    if not isinstance(method, Sampler):
        raise BadSetting(f"{run} cannot sample; it can: {', '.join(capabilities(method)) or 'nothing that commands do'}")
    with torch.inference_mode():
        drawn = method.sample(count, torch.Generator(method.device).manual_seed(seed)).float().cpu()
    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_image(drawn, out, nrow=max(1, round(count**0.5)))
        return say(str(out))
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(drawn):
        save_image(image, out / f"{i:0{len(str(count - 1))}d}.png")
    say(f"{out}  ({count} pictures)")
