"""The masked methods, each as small as it goes, and what they eat: what must hold for every one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sfumato import catalogue
from sfumato.data import perspective_scenes
from sfumato.engine.loading import configure

SHAPE: dict[str, Any] = {"channels": 3, "image_size": 16, "patch": 4, "crop_scale": None, "flip": False}
TINY = {**SHAPE, "dim": 16, "depth": 2, "heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}

SLUGS: dict[str, dict[str, Any]] = {
    "mae": {**TINY, **DECODER},
    "simmim": {**TINY, "mask_unit": 8},
    "colormae": {**TINY, **DECODER},
    "hpm": {**TINY, **DECODER},
    "mfm": {**TINY},
    "dmjd": {**TINY, **DECODER},
    "mto": {**TINY},
    "hybrid-distill": {**TINY, "depth": 3},
    "spark": {**SHAPE, "image_size": 32, "decoder_width": 16, "sync_norm": False},
    "lmd": {**TINY, **DECODER},
    "masked-object-modeling": {"dim": 16, "decoder_dim": 16, "roi_dim": 8, "head_dim": 8, "flip": False, "jitter": "none"},
}
"""Slugs, and the settings that make their presets for a CPU smaller and free of chance but for the mask."""


def build(slug: str, **over: Any) -> Any:
    """The method of 8 samples a step, at the weights of seed 0."""
    kind = catalogue.load_method(slug)
    have = kind.Config.model_fields
    settings = {k: v for k, v in {**SLUGS[slug], "batch_size": 8, **over}.items() if k in have}
    torch.manual_seed(0)
    method = kind(configure(kind.Config, "small", settings), **_teachers(slug))
    if slug == "spark":
        _rest(method, pictures(slug))
    return method


def _rest(method: nn.Module, x: torch.Tensor) -> None:
    """Let batch norms keep the statistics of `x` for good: what they do to a batch is no mean over its samples."""
    norms = [norm for norm in method.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # all of what is seen, not a moving average
    with torch.no_grad():
        method.predict_image(x, torch.zeros(len(x), 16, dtype=torch.bool))
    for norm in norms:
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign, misc, assignment]


def _teachers(slug: str) -> dict[str, Any]:
    if slug != "hybrid-distill":
        return {}
    return {"relation_teacher": build("mae", depth=3), "feature_teacher": build("mae", dim=24, heads=3)}


def pictures(slug: str, dtype: torch.dtype = torch.float32) -> Any:
    """Sixteen pictures of the side that `build` wants; for boxes, frames with theirs."""
    generator = torch.Generator().manual_seed(0)
    if slug == "masked-object-modeling":
        frames = perspective_scenes(16, generator=generator)
        return replace(frames, x=frames.x.to(dtype), target=frames.target.to(dtype), boxes=frames.boxes.to(dtype))
    side = SLUGS[slug]["image_size"]
    return torch.rand(16, 3, side, side, generator=generator).to(dtype)
