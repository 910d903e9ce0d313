"""Labels that a known function gives to Gaussian inputs.

    single index:  y = (β·x)^k / k!,   x ~ N(0, I/D),   β ~ N(0, I)

Source: single-index models are textbook; this one, with k = 2: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition
from Lazy to Rich Training Dynamics", ICLR 2024.

>>> import torch
>>> from sfumato.data import single_index
>>> x, y, beta = single_index(30, 100, generator=torch.Generator().manual_seed(0))
>>> x.shape, torch.allclose(y, (x @ beta) ** 2 / 2)
(torch.Size([100, 30]), True)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting


class SingleIndex(NamedTuple):
    """Inputs `[P, D]`, labels `[P]`, and the direction `[D]` that they depend on."""

    x: Tensor
    y: Tensor
    beta: Tensor


def single_index(
    dims: int,
    samples: int,
    *,
    degree: int = 2,
    beta: Tensor | None = None,
    white: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> SingleIndex:
    """Gaussian inputs of length about 1, with labels that are a power of their coordinate along one direction.

    Args:
        dims: D, numbers of an input.
        samples: P.
        degree: k, at least 1.
        beta: `[D]`, the direction instead of drawing one: give that of the training set to draw a test set.
        white: `[P, D]` standard normal numbers to make the inputs of instead of drawing.
        dtype: of what is drawn.
        generator: source of the draws: the direction first, then the inputs.

    Returns:
        `SingleIndex(x, y, beta)`; a drawn direction has length about √D, so β·x is about standard normal.

    Raises:
        BadSetting: a degree below 1. BadData: `beta` or `white` of another shape.
    """
    if degree < 1:
        raise BadSetting(f"degree={degree} must be at least 1")
    device = None if generator is None else generator.device
    if beta is None:
        beta = torch.randn(dims, dtype=dtype, device=device, generator=generator)
    if white is None:
        white = torch.randn(samples, dims, dtype=dtype, device=device, generator=generator)
    if beta.shape != (dims,) or white.shape != (samples, dims):
        raise BadData(f"beta is [{dims}] and white [{samples}, {dims}], not {list(beta.shape)} and {list(white.shape)}")
    x = white / math.sqrt(dims)
    return SingleIndex(x, (x @ beta.to(x)) ** degree / math.factorial(degree), beta)
