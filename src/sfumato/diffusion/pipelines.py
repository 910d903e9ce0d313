"""Pipelines of diffusers: opened from a folder or the hub, and told as settings where they draw pixels.

>>> from types import SimpleNamespace
>>> from diffusers import DDPMScheduler
>>> from sfumato.nn import small_unet
>>> told = facts_of_pipeline(SimpleNamespace(unet=small_unet(8, 1, width=8, mults=(1, 2)), scheduler=DDPMScheduler()))
>>> told["schedule"], told["predict"], told["image_size"]
('linear', 'eps', 8)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sfumato.diffusion.predictions import read_schedule
from sfumato.diffusion.schedules import beta_schedule
from sfumato.errors import BadCheckpoint

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
"""Diffusers' names of what `beta_schedule` makes."""


def open_pipeline(source: str | Path) -> Any:
    """A pipeline of diffusers.

    Args:
        source: a folder with its weights (safetensors), or the name of one on the hub (then diffusers downloads it).

    Raises:
        BadCheckpoint: there is none.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        return DiffusionPipeline.from_pretrained(str(source), use_safetensors=True)
    except Exception as error:  # a download can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"no pipeline of diffusers at {source} ({reason}): give a folder with model_index.json") from None
    finally:
        logging.enable_progress_bar()


def unet_of(settings: dict[str, Any]) -> nn.Module:
    """A UNet2DModel by diffusers' description of it, with new weights.

    Raises:
        BadCheckpoint: it describes none.
    """
    from diffusers import UNet2DModel

    try:
        return cast(nn.Module, UNet2DModel.from_config(settings))
    except Exception as error:  # diffusers checks these in many places
        raise BadCheckpoint(f"unet does not describe a UNet2DModel ({error})") from None


def facts_of_pipeline(pipeline: Any) -> dict[str, Any]:
    """What a model of pixels is, in the words of the settings of `ddpm`.

    Args:
        pipeline: anything with `.unet` and `.scheduler`.

    Returns:
        unet, channels, image_size (pixels), schedule, times, betas, predict.

    Raises:
        BadCheckpoint: it draws latents, attends to a text, knows classes, predicts a variance, draws no squares, or its noise
            grows in another way than those known.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    side = config.get("sample_size")
    side = side[0] if isinstance(side, (tuple, list)) and len(set(side)) == 1 else side
    for wrong, what in (
        (getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None), "it draws latents, not pixels"),
        (type(unet).__name__ != "UNet2DModel", f"its network is a {type(unet).__name__}, not a UNet2DModel"),
        (config.get("num_class_embeds") or config.get("class_embed_type"), "it is told classes"),
        (config["in_channels"] != config["out_channels"], "it gives other channels than it takes"),
        (not isinstance(side, int), f"its pictures are no squares: sample_size={side}"),
        (not hasattr(scheduler, "betas"), f"{type(scheduler).__name__} has no table of betas"),
    ):
        if wrong:
            raise BadCheckpoint(f"this pipeline does not fit: {what}; `apply` takes more kinds")
    betas = scheduler.betas.double()
    kind = _SCHEDULES.get(scheduler.config.get("beta_schedule", ""))
    ends = (scheduler.config.beta_start, scheduler.config.beta_end) if kind != "cosine" else (0.0, 0.999)
    if kind is None or not torch.allclose(beta_schedule(kind, len(betas), *ends), betas, rtol=1e-3):
        raise BadCheckpoint("this pipeline does not fit: its noise grows in no way that is known; `apply` takes more kinds")
    return {
        "unet": config, "channels": config["in_channels"], "image_size": side, "schedule": kind, "times": len(betas),
        "betas": ends, "predict": read_schedule(scheduler)[1],
    }  # fmt: skip
