"""`sfumato sample`: draw new pictures with a run that can, and write them as one grid (or one file each into a folder).

With `--keep` more are drawn than are wanted, and those whose trajectories varied most are dropped; a `.gif` shows what was
expected of every picture from step to step; runs that draw points write them into a `.npz` file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.cli.console import bar, hint, say
from sfumato.engine import load
from sfumato.engine.loading import configure
from sfumato.errors import BadData, BadSetting
from sfumato.method import Sampler, TrajectorySampler, capabilities, draws_points

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
BATCH = {True: 20_000, False: 256}
"""What is drawn at once, points or pictures: so the memory is bounded."""
FRAMES, FRAME_MS, LAST_MS = 60, 80, 2000
"""Steps that a .gif shows at most, and how long each and the end stay, in milliseconds."""
SETTINGS = {"steps": "sample_steps", "sampler": "sampler", "eta": "eta", "label": "label", "guidance": "guidance"}
"""Options, and the settings of a run that they stand for."""


def sample(
    run: Path, count: int, out: Path, *, seed: int, device: str, keep: float | None = None, window: str | None = None,
    told: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Draw `count` samples; a name with a suffix is one grid (or arrays), any other a folder. `told`: of `SETTINGS`, or None."""
    if count < 1:
        raise BadSetting(f"-n {count} is no number of pictures: give 1 or more")
    if keep is not None and not 0 < keep <= 1:
        raise BadSetting(f"--keep {keep:g} is not a share above 0 up to 1, such as 0.96")
    if window is not None and keep is None:
        raise BadSetting("--window says over which steps a filter looks: give --keep too, such as --keep 0.96")
    if out.suffix and out.suffix.lower() not in (*PICTURES, ".npz"):
        raise BadSetting(f"{out} is no picture: end it in .png, .jpg, .webp or .gif, in .npz for arrays, or name a folder")
    film = out.suffix.lower() == ".gif"
    if film and keep is not None:
        raise BadSetting("a .gif shows all that is drawn, and --keep drops some: leave one of them out")
    method = load(run, device=device)
    if not isinstance(method, Sampler):
        raise BadSetting(f"{run} cannot sample; it can: {', '.join(capabilities(method)) or 'nothing that commands do'}")
    points = draws_points(method)
    if points and out.suffix.lower() != ".npz":
        raise BadSetting(f"{run} draws points, and {out} is no place for them: end it in .npz")
    _tell(method, run, {name: value for name, value in (told or {}).items() if value is not None})
    if film and not isinstance(method, TrajectorySampler):
        raise BadSetting(f"{run} does not show its steps, so there is no .gif of them: end {out} in .png")
    generator = torch.Generator(method.device).manual_seed(seed)
    frames: list[list[Tensor]] = []
    with torch.inference_mode(), bar("samples", count / (keep or 1)) as advance:
        draw = _told_of_steps(method, advance)
        if keep is not None:
            drawn = _steady(method, draw, run, count, keep, window, BATCH[points], generator)
        else:
            sizes = [min(BATCH[points], count - i) for i in range(0, count, BATCH[points])]
            watch = _watch(frames, method.trajectory_steps) if film and isinstance(method, TrajectorySampler) else None
            drawn = torch.cat([draw(size, generator, callback=watch) for size in sizes])
    _write(drawn.float().cpu(), out, [torch.cat(parts) for parts in zip(*frames)])


def _tell(method: Any, run: Path, told: dict[str, Any]) -> None:
    """Set how a loaded run draws, where it was told."""
    config = method.config
    for name in told:
        if SETTINGS[name] not in type(config).model_fields:
            raise BadSetting(f"--{name} does not go with {run}: it draws in a way of its own")
    chosen = configure(type(config), "paper", {**config.model_dump(), **{SETTINGS[name]: told[name] for name in told}})
    if not getattr(chosen, "conditional", True) and {"label", "guidance"} & set(told):
        raise BadSetting(f"{run} knows no classes, so --label and --guidance say nothing: train it with --set conditional=true")
    if "eta" in told and getattr(chosen, "sampler", "ddim") != "ddim":
        raise BadSetting(f"--eta is of ddim, and {chosen.sampler} takes none: leave it out")
    method.config = chosen
    steps = told.get("steps")
    if steps is not None and isinstance(method, TrajectorySampler) and method.trajectory_steps < steps:
        raise BadSetting(f"--steps {steps}: {run} knows {method.trajectory_steps} noise levels, so it takes no more steps")


def _told_of_steps(method: Any, advance: Callable[[float], None]) -> Callable[..., Tensor]:
    """How a run draws, with a bar that moves on with every step, or, where steps are not shown, with every batch."""

    def draw(n: int, generator: torch.Generator, *, callback: Callable[[Any], None] | None = None) -> Tensor:
        if not isinstance(method, TrajectorySampler):
            drawn = method.sample(n, generator)
            advance(n)
            return drawn

        def see(step: Any) -> None:
            advance(n / method.trajectory_steps)
            if callback is not None:
                callback(step)

        return method.sample(n, generator, callback=see)

    return draw


def _watch(frames: list[list[Tensor]], steps: int) -> Callable[[Any], None]:
    """A callback that adds a list to `frames` for every batch: the expected pictures of some steps, as bytes."""
    every = -(-steps // FRAMES)

    def see(step: Any) -> None:
        if step.step == 0:
            frames.append([])
        if step.step % every == 0:
            frames[-1].append(((step.x0 + 1) / 2).clamp(0, 1).mul(255).round().byte().cpu())

    return see


def _steady(
    method: Any,
    draw: Callable[..., Tensor],
    run: Path,
    count: int,
    keep: float,
    window: str | None,
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    """The steadiest of more samples, and a line on what was dropped."""
    from sfumato.diffusion import default_window, parse_window, sample_filtered

    if not isinstance(method, TrajectorySampler):
        raise BadSetting(f"{run} does not show its steps, so nothing can be said of their variance: leave out --keep")
    steps = method.trajectory_steps
    low, high = default_window(steps, points=draws_points(method)) if window is None else parse_window(window, steps)
    found = sample_filtered(draw, count, window=(low, high), keep=keep, batch=batch, generator=generator)
    dropped = len(found.dropped)
    told = f"drew {count + dropped}, dropped the {dropped} whose expected end varied most over steps {low} to {high} of {steps}"
    if dropped:
        told += f" (variance {found.dropped_variance.min():.3g} and more; kept: median {found.variance.median():.3g})"
    hint(told)
    return found.samples


def _write(drawn: Tensor, out: Path, film: list[Tensor]) -> None:
    """The samples; `film`: for a .gif what was expected of them from step to step, uint8."""
    from torchvision.utils import save_image

    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    count = len(drawn)
    if out.suffix.lower() == ".npz":
        np.savez(out, x=drawn.numpy())
        return say(f"{out}  ({count} samples as x, {list(drawn.shape)})")
    if drawn.shape[1] not in (1, 3):
        raise BadData(f"these are pictures of {drawn.shape[1]} channels, for which {out} has no place: end it in .npz")
    nrow = max(1, round(count**0.5))
    if film:
        _animate([*film, drawn.mul(255).round().byte()], out, nrow)
        return say(f"{out}  ({len(film)} of the steps, then the {count} pictures)")
    if out.suffix:
        save_image(drawn, out, nrow=nrow)
        return say(str(out))
    for i, image in enumerate(drawn):
        save_image(image, out / f"{i:0{len(str(count - 1))}d}.png")
    say(f"{out}  ({count} pictures)")


def _animate(frames: list[Tensor], out: Path, nrow: int) -> None:
    """One grid after another; the last stays."""
    from PIL import Image
    from torchvision.utils import make_grid

    first, *others = (Image.fromarray(make_grid(f, nrow=nrow).permute(1, 2, 0).numpy()) for f in frames)
    durations = [FRAME_MS] * len(others) + [LAST_MS]
    first.save(out, save_all=True, append_images=others, duration=durations, loop=0)
