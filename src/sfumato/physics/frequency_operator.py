"""A frequency mask as physics of deepinv: an operator with closed forms for all that its algorithms ask.

    A = Aᵀ = A² = A⁺ = F⁻¹ (1 - m) F,      prox:  z + γ / (1 + γ) A (y - z)

Source: the corruption of "Masked Frequency Modeling for Self-Supervised Visual Pre-Training", arXiv 2206.07706, without the
clamp.

>>> import torch
>>> from sfumato.masks import frequency_disc
>>> from sfumato.physics import FrequencyMask
>>> physics = FrequencyMask(frequency_disc(16, 4))
>>> x = torch.rand(1, 1, 16, 16)
>>> y = physics(x)
>>> torch.allclose(physics.A(y), y, atol=1e-6), torch.allclose(physics.A_dagger(y), y, atol=1e-6)
(True, True)
"""

from __future__ import annotations

from typing import Any

from deepinv.physics import LinearPhysics
from torch import Tensor

from sfumato.errors import BadSetting
from sfumato.masks.frequency import half_plane
from sfumato.physics.frequency_mask import apply_frequency_mask


class FrequencyMask(LinearPhysics):  # type: ignore[misc]
    """Pictures without the hidden frequencies: an orthogonal projection.

    Args:
        hidden: `[H, W]` or `[B, H, W]` bool, centred, True = removed.
        **settings: of `deepinv.physics.LinearPhysics`, such as `noise_model`.

    Raises:
        BadSetting: a mask that hides k without -k, which is no projection of real pictures.
    """

    hidden: Tensor

    def __init__(self, hidden: Tensor, **settings: Any) -> None:
        super().__init__(**settings)
        check_symmetric(hidden)
        self.register_buffer("hidden", hidden)

    def A(self, x: Tensor, hidden: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`x` `[B, C, H, W]` without the hidden frequencies; a mask given here is kept, as in deepinv."""
        if hidden is not None:
            check_symmetric(hidden)
            self.update_parameters(hidden=hidden, **kwargs)
        return apply_frequency_mask(x, self.hidden, clamp=None)

    def A_adjoint(self, y: Tensor, hidden: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The same as `A`."""
        return self.A(y, hidden, **kwargs)

    def A_dagger(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The picture of smallest norm that gives `y`: `A` again."""
        return self.A(y)

    def prox_l2(self, z: Tensor | float | None, y: Tensor, gamma: float | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The x that minimises `γ/2 |A x - y|² + 1/2 |x - z|²`; z a number: a flat picture."""
        start = z if isinstance(z, Tensor) else y.new_full(y.shape, 0.0 if z is None else float(z))
        return start + gamma / (1 + gamma) * self.A(y - start)


def check_symmetric(hidden: Tensor) -> None:
    """Refuse a mask that hides k without -k."""
    if (half_plane(hidden) == 0.5).any():
        raise BadSetting("a mask of frequencies must hide k and -k together to be a projection, as frequency_disc does")
