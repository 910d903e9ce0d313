"""What stands between a representation and a contrastive loss: a learned head, a fixed one, and a unit with a threshold.

    learned:      z = W_L ReLU(⋯ ReLU(W_1 h))           fixed:  z_i = h_i κ^(−i),  i = 0 ... d − 1
    thresholded:  σ_b(u) = ReLU(u − b) − ReLU(−u − b)   (0 where |u| ≤ b, slope 1 beyond)

The loss acts on z; the representation that is kept is h. A fixed head says with one number how unequally features count.

Source: Xue et al., "Investigating the Benefits of Projection Head for Representation Learning", ICLR 2024; learned head: Chen
et al., "SimCLR", ICML 2020, section 4.2.

>>> import torch
>>> from sfumato.nn import ProjectionHead, ReweightingHead, SymmetricReLU
>>> ReweightingHead(4, kappa=2.0)(torch.ones(4))
tensor([1.0000, 0.5000, 0.2500, 0.1250])
>>> SymmetricReLU(b=1.0)(torch.tensor([-3.0, 0.5, 3.0])).tolist()
[-2.0, 0.0, 2.0]
>>> ProjectionHead(512, 2048, 128)(torch.zeros(8, 512)).shape
torch.Size([8, 128])
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting


class ProjectionHead(nn.Sequential):
    """Linear layers with ReLU between them, `[..., dim]` to `[..., out]`; no normalisation layers.

    Args:
        dim: width of the representation.
        hidden: width between the layers.
        out: width of what the loss sees.
        layers: linear layers, at least 1.

    Raises:
        BadSetting: fewer than one layer.
    """

    def __init__(self, dim: int, hidden: int, out: int, *, layers: int = 2) -> None:
        if layers < 1:
            raise BadSetting(f"layers={layers}: a projection head has at least 1; for none use torch.nn.Identity")
        widths = [dim, *[hidden] * (layers - 1), out]
        pairs = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(*pairs[:-1])


class ReweightingHead(nn.Module):
    """Feature i divided by κ^i: a head without parameters.

    Its weights stay float32 under autocast. Far features fall below any dtype's range (1.05^−2047 is 4e-44): the loss does not
    see them.

    Args:
        dim: number of features d.
        kappa: κ, at least 1; 1 is no head.
        dtype: of the weights (float64 for tests).

    Raises:
        BadSetting: no feature, or κ below 1 or not finite.
    """

    weight: Tensor

    def __init__(self, dim: int, *, kappa: float = 1.05, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dim < 1 or not 1 <= kappa < math.inf:
            raise BadSetting(f"dim={dim}, kappa={kappa}: dim must be at least 1, kappa at least 1 and finite")
        powers = torch.arange(dim, dtype=torch.float64)
        self.register_buffer("weight", (kappa**-powers).to(dtype))
        self.kappa = kappa

    def forward(self, h: Tensor) -> Tensor:
        """Reweight `[..., dim]`.

        Raises:
            BadData: another number of features.
        """
        if h.shape[-1:] != self.weight.shape:
            raise BadData(f"features of shape {tuple(h.shape)}: the last dimension must be {len(self.weight)}")
        return h * self.weight

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"{len(self.weight)}, kappa={self.kappa:g}"


class SymmetricReLU(nn.Module):
    """A unit that passes only what is larger than its threshold, which it learns: soft thresholding, any shape to the same.

    Args:
        b: the threshold to start from; 0 is the identity.
    """

    def __init__(self, b: float = 0.0) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(float(b)))

    def forward(self, u: Tensor) -> Tensor:
        """σ_b of every number."""
        return F.relu(u - self.b) - F.relu(-u - self.b)
