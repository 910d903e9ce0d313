"""Linear regression on Gaussian inputs, with a known teacher.

    y = w̄·x + ε,      x ~ N(0, I/N),   w̄ ~ N(0, SNR),   ε ~ N(0, 1)

so that labels without noise have variance SNR. Source: textbook; in these units as Advani, Saxe, Sompolinsky 2020.

>>> import torch
>>> from sfumato.data import linear_teacher
>>> x, y, weight = linear_teacher(200, 100, snr=4.0, generator=torch.Generator().manual_seed(0))
>>> x.shape, y.shape, weight.shape
(torch.Size([100, 200]), torch.Size([100]), torch.Size([200]))
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting


class LinearTeacher(NamedTuple):
    """Inputs `[P, N]`, labels `[P]`, and the teacher's weights `[N]`."""

    x: Tensor
    y: Tensor
    weight: Tensor


def linear_teacher(
    dims: int,
    samples: int,
    *,
    snr: float,
    weight: Tensor | None = None,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> LinearTeacher:
    """Draw a teacher and samples of it.

    Args:
        dims: N, numbers of an input.
        samples: P.
        snr: variance of a weight of the teacher; the noise has variance 1.
        weight: `[N]`, a teacher instead of drawing one: give that of the training set to draw a test set.
        noise: `[P]`, of the labels, instead of drawing it.
        dtype: of what is drawn.
        generator: of the teacher, the inputs and the noise, in this order.

    Raises:
        BadSetting: an SNR that is not positive. BadData: `weight` or `noise` of another shape.
    """
    if not snr > 0:
        raise BadSetting(f"snr={snr} must be positive")
    device = None if generator is None else generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    weight = math.sqrt(snr) * normal(dims) if weight is None else weight
    x = normal(samples, dims) / math.sqrt(dims)
    noise = normal(samples) if noise is None else noise
    if weight.shape != (dims,) or noise.shape != (samples,):
        raise BadData(f"weight is [{dims}] and noise [{samples}], not {list(weight.shape)} and {list(noise.shape)}")
    return LinearTeacher(x, x @ weight + noise, weight)
