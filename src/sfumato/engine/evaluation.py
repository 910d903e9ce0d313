"""A method on data that it is not trained on now: its figures and its pictures."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from sfumato.engine.randomness import key
from sfumato.engine.stream import epoch
from sfumato.errors import Diverged
from sfumato.method import Batch, Method


@torch.no_grad()
def evaluate(method: Method, held_out: Any) -> dict[str, float]:
    """A method's figures on held-out data; leaves it in eval mode."""
    batches = epoch(held_out, method.config.batch_size)
    return method.eval().evaluate(batch.to(method.device) for batch in batches)


@torch.no_grad()
def preview(method: Method, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
    """A method's pictures of a batch, in [0, 1] on the CPU, with the same noise every time; leaves it in eval mode.

    A sampler that breaks off early in a training gives none, with a warning: that is no reason to stop the training.
    """
    generator = torch.Generator(method.device).manual_seed(key(seed, "preview"))
    try:
        pictures = method.eval().preview(batch.to(method.device), generator)
    except Diverged as error:
        warnings.warn(f"no pictures: {error}", stacklevel=2)
        return {}
    return {name: images.float().clamp(0, 1).cpu() for name, images in pictures.items()}
