"""`sfumato apply` with `--physics`: restore by what a model knows of pictures and by what is known of the degradation."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, create_model

from sfumato.cli.apply import Pictures, channels_of, target_of, with_channels
from sfumato.cli.console import hint, say
from sfumato.cli.degradation import WORDS, degradation
from sfumato.data.images import write_image
from sfumato.engine.loading import configure, parse_settings
from sfumato.errors import BadSetting

PAGE = "before-after.html"
ON_THE_PAGE = 12
"""Pictures that the page shows at most."""


def restore_told(method: Any, pictures: Pictures, out: Path, run: Path, *, physics: str | None, settings: Sequence[str]) -> None:
    """Restored pictures under their own names, and a page that shows them beside what was given."""
    from sfumato.report import Page

    if physics is None:
        raise BadSetting(f"say what degraded the pictures: --physics {WORDS}")
    chosen = _settings(method, settings)
    seed = chosen.pop("seed")
    given = " ".join(f"--set {shlex.quote(pair)}" for pair in settings)
    how = f"{physics}, by {chosen['solver']} in {chosen['steps']} steps" if method.needs_physics else physics
    page = Page("Before and after", subtitle=how, facts={"run": str(run)})
    padded = 0
    for path, name, picture in pictures:
        target = target_of(path, out / name)
        y = picture.float()[None].to(method.device)

        def one(y: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator(y.device).manual_seed(seed)  # the same for each colour that goes by itself
            return method.restore(y, degradation(physics, y), generator=generator, **chosen)

        restored = with_channels(one, y, channels_of(method))[0].cpu()
        write_image(target, restored, like=picture)
        say(str(target))
        padded += any(side % method.stride for side in restored.shape[-2:])
        if pictures.done <= ON_THE_PAGE:
            before = F.interpolate(y, restored.shape[-2:], mode="nearest")[0].cpu()
            page.section(str(name)).slider(before, restored, ("given", "restored"))
    pictures.tell_skipped()
    if padded:
        hint(f"{padded} of {pictures.done} pictures were padded to multiples of {method.stride} pixels, and cropped back")
    again = f"sfumato apply {shlex.quote(str(run))} PICTURE... --physics {shlex.quote(physics)} {given} -o OUT"
    page.section("Again").code(" ".join(again.split()))
    say(f"before and after: {page.write(out / PAGE)}")


def _settings(method: Any, pairs: Sequence[str]) -> dict[str, Any]:
    """What `--set` may say: the settings of `restore`, of a diffusion model `DiffusionPrior`'s, and the seed."""
    from sfumato.diffusion import DiffusionPrior

    restore = DiffusionPrior.restore if method.needs_physics else method.restore
    types, parameters = get_type_hints(restore), inspect.signature(restore).parameters.values()
    fields: dict[str, Any] = {
        p.name: (types[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "generator"
    }
    strict = create_model("Settings", __config__=ConfigDict(extra="forbid"), seed=(int, 0), **fields)
    settings: BaseModel = configure(strict, "paper", parse_settings(list(pairs)))
    return settings.model_dump()
