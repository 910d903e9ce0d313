"""Means of square blocks, as physics of deepinv whose rows are orthonormal: what a solver needs that projects on measurements.

    A x = s · mean of each s x s block,    Aᵀ m = every m spread over its block, divided by s,    A Aᵀ = I

so that `physics(x) / s` is the small picture.

>>> import torch
>>> from sfumato.physics import BlockMean
>>> physics, x = BlockMean(2), torch.rand(1, 3, 8, 6)
>>> m = physics.A(x)
>>> m.shape, torch.allclose(physics.A(physics.A_adjoint(m)), m)
(torch.Size([1, 3, 4, 3]), True)
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from deepinv.physics import LinearPhysics
from torch import Tensor

from sfumato.errors import BadData, BadSetting


class BlockMean(LinearPhysics):  # type: ignore[misc]
    """A smaller picture by block means, s times as bright.

    Args:
        factor: s, side of a block in pixels.
        **settings: of `deepinv.physics.LinearPhysics`, such as `noise_model`.

    Raises:
        BadSetting: a factor below 1.
    """

    def __init__(self, factor: int, **settings: Any) -> None:
        super().__init__(**settings)
        if factor < 1:
            raise BadSetting(f"factor={factor} is no side of a block: use 1 or more")
        self.factor = factor

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H / s, W / s]`.

        Raises:
            BadData: sides that are no multiples of s.
        """
        if any(side % self.factor for side in x.shape[-2:]):
            raise BadData(f"sides {tuple(x.shape[-2:])} are no multiples of {self.factor}: cut or pad the pictures")
        return F.avg_pool2d(x, self.factor) * self.factor

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """`[B, C, h, w]` to `[B, C, s h, s w]`."""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1) / self.factor

    def A_dagger(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same as `A_adjoint`."""
        return self.A_adjoint(y)
