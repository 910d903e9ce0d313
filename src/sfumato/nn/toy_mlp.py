"""A small residual network for diffusion on points of a line or plane.

    h = W x;   a block: h <- h + W_2 s(LN(W_1 s(LN(h)) + V e(t)));   out = W' LN(h)

with s a leaky ReLU and e(t) a learned map of sinusoids of the time.

Source: the toy network of Aithal, Maini, Lipton, Kolter, "Understanding Hallucinations in Diffusion Models through Mode
Interpolation", NeurIPS 2024.

>>> import torch
>>> from sfumato.nn import ToyDenoiser
>>> ToyDenoiser(2, width=32)(torch.randn(5, 2), torch.tensor([0, 1, 10, 100, 999])).shape
torch.Size([5, 2])
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadSetting

_SLOPE = 0.02


class ToyDenoiser(nn.Module):
    """`net(x, t)`: points `[B, dim]` at times t (`[B]` or a scalar) to `[B, dim]`, such as their noise.

    Args:
        dim: coordinates of a point.
        width: hidden units, at least 4.
        layers: residual blocks.

    Raises:
        BadSetting: a width without room for the sinusoids.
    """

    def __init__(self, dim: int, *, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        if width < 4:
            raise BadSetting(f"width={width} is too narrow for the embedding of the time: use 4 or more")
        self.width = width
        self.enter = nn.Linear(dim, width, bias=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(_SLOPE))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """See the class."""
        from diffusers.models.embeddings import get_timestep_embedding

        waves = get_timestep_embedding(t.to(x.device).expand(len(x)), self.width, downscale_freq_shift=1)
        e = self.time(waves.to(self.enter.weight.dtype))
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, e)
        out: Tensor = self.leave(h)
        return out


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.time = nn.Linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        inner = self.first(F.leaky_relu(self.norm1(h), _SLOPE)) + self.time(e)
        out: Tensor = h + self.second(F.leaky_relu(self.norm2(inner), _SLOPE))
        return out
