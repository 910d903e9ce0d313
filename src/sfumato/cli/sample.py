"""`sfumato sample`: draw new pictures with a run that can, and write them as one grid (or one file each into a folder).

With `--keep` more are drawn than are wanted, and those whose trajectories varied most are dropped; runs that draw points write
them into a `.npz` file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.cli.console import hint, say
from sfumato.engine import load
from sfumato.errors import BadSetting
from sfumato.method import Sampler, TrajectorySampler, capabilities, draws_points

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = {True: 20_000, False: 256}
"""What is drawn at once, points or pictures: so the memory is bounded."""


def sample(
    run: Path, count: int, out: Path, *, seed: int, device: str, keep: float | None = None, window: str | None = None
) -> None:
    """Draw `count` samples; a name with a suffix is one grid (or arrays), any other a folder."""
    if count < 1:
        raise BadSetting(f"-n {count} is no number of pictures: give 1 or more")
    if keep is not None and not 0 < keep <= 1:
        raise BadSetting(f"--keep {keep:g} is not a share above 0 up to 1, such as 0.96")
    if window is not None and keep is None:
        raise BadSetting("--window says over which steps a filter looks: give --keep too, such as --keep 0.96")
    if out.suffix and out.suffix.lower() not in (*PICTURES, ".npz"):
        raise BadSetting(f"{out} is no picture: end it in .png, .jpg or .webp, in .npz for arrays, or name a folder")
    method = load(run, device=device)
    if not isinstance(method, Sampler):
        raise BadSetting(f"{run} cannot sample; it can: {', '.join(capabilities(method)) or 'nothing that commands do'}")
    points = draws_points(method)
    if points and out.suffix.lower() != ".npz":
        raise BadSetting(f"{run} draws points, and {out} is no place for them: end it in .npz")
    generator = torch.Generator(method.device).manual_seed(seed)
    with torch.inference_mode():
        if keep is None:
            sizes = [min(BATCH[points], count - i) for i in range(0, count, BATCH[points])]
            drawn = torch.cat([method.sample(size, generator) for size in sizes])
        else:
            drawn = _steady(method, run, count, keep, window, BATCH[points], generator)
    _write(drawn.float().cpu(), out)


def _steady(
    method: Any, run: Path, count: int, keep: float, window: str | None, batch: int, generator: torch.Generator
) -> Tensor:
    """The steadiest of more samples, and a line on what was dropped."""
    from sfumato.diffusion import last_steps, parse_window, sample_filtered

    if not isinstance(method, TrajectorySampler):
        raise BadSetting(f"{run} does not show its steps, so nothing can be said of their variance: leave out --keep")
    steps = method.trajectory_steps
    low, high = last_steps(steps) if window is None else parse_window(window, steps)
    found = sample_filtered(method.sample, count, window=(low, high), keep=keep, batch=batch, generator=generator)
    dropped = len(found.dropped)
    told = f"drew {count + dropped}, dropped the {dropped} whose expected end varied most over steps {low} to {high} of {steps}"
    if dropped:
        told += f" (variance {found.dropped_variance.min():.3g} and more; kept: median {found.variance.median():.3g})"
    hint(told)
    return found.samples


def _write(drawn: Tensor, out: Path) -> None:
    from torchvision.utils import save_image

    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    count = len(drawn)
    if out.suffix.lower() == ".npz":
        np.savez(out, x=drawn.numpy())
        return say(f"{out}  ({count} samples as x, {list(drawn.shape)})")
    if out.suffix:
        save_image(drawn, out, nrow=max(1, round(count**0.5)))
        return say(str(out))
    for i, image in enumerate(drawn):
        save_image(image, out / f"{i:0{len(str(count - 1))}d}.png")
    say(f"{out}  ({count} pictures)")
