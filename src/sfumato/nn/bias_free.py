"""Networks without a constant anywhere: f(c y) = c f(y) for c > 0, hence f(y) = ∇f(y) y.

    training:    x γ / s,   s² = var x + ε over pictures and places, about the mean, which is left in x
    evaluation:  x γ / s̄,   s̄ <- 0.9 s̄ + 0.1 s while training

Convolutions have no bias, normalisation divides and never shifts, and the non-linearity is a ReLU. What such a denoiser does to
one picture is then one matrix, its Jacobian.

Source: Mohan, Kadkhodaie, Simoncelli, Fernandez-Granda, "Robust and Interpretable Blind Image Denoising via Bias-Free
Convolutional Neural Networks", ICLR 2020.

>>> import torch
>>> from sfumato.nn import BFCNN
>>> net, y = BFCNN(1, layers=4, width=8).eval(), torch.randn(1, 1, 9, 7)
>>> torch.allclose(net(10 * y), 10 * net(y), atol=1e-5)
True
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.errors import BadSetting

Gain = Literal["one", "tiny"]


class BiasFreeNorm2d(nn.Module):
    """Divides every channel by its standard deviation; the mean stays.

    Args:
        channels: C.
        momentum: share of the new deviation in the running one.
        eps: under the root, in squared units of the input.
        gain: how γ starts: "one", or "tiny": N(0, 2 / (9 · 64)) cut to ±0.025, as in the released code, with which a deep
            residual network begins near 0 and learns slowly at first.

    Raises:
        BadSetting: another `gain`.
    """

    running_sd: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5, gain: Gain = "one") -> None:
        super().__init__()
        if gain not in ("one", "tiny"):
            raise BadSetting(f"gain={gain!r} is not known: use one or tiny")
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        if gain == "tiny":
            nn.init.normal_(self.weight, std=(2 / 9 / 64) ** 0.5)
            self.weight.data.clamp_(-0.025, 0.025)
        self.register_buffer("running_sd", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same; in training mode by the deviation of this batch."""
        sd = self.running_sd
        if self.training:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            sd = (wide.var((0, 2, 3), correction=0) + self.eps).sqrt()
            with torch.no_grad():
                self.running_sd.lerp_(sd.to(self.running_sd.dtype), self.momentum)
        return x * (self.weight / sd).to(x.dtype).view(-1, 1, 1)


class BFCNN(nn.Sequential):
    """A stack of convolutions of one width without bias, ReLU between them, `BiasFreeNorm2d` on all but the first and last.

    Args:
        channels: of input and output.
        layers: convolutions, at least 2.
        width: channels between them.
        receptive_field: side in pixels of what an output pixel sees, odd, from 5 to `2 layers + 1`: the first convolutions are
            3 x 3, the later ones 1 x 1; None: all are 3 x 3.
        gain: how the gains of the normalisation start, see `BiasFreeNorm2d`.

    Raises:
        BadSetting: fewer than 2 layers, or a receptive field that they do not have.
    """

    def __init__(
        self, channels: int, *, layers: int = 21, width: int = 64, receptive_field: int | None = None, gain: Gain = "one"
    ) -> None:
        field = 2 * layers + 1 if receptive_field is None else receptive_field
        if layers < 2 or field % 2 == 0 or not 5 <= field <= 2 * layers + 1:
            raise BadSetting(f"{layers} layers (2 at least) see an odd number of pixels from 5 to {2 * layers + 1}, not {field}")
        widths = [channels, *[width] * (layers - 1), channels]
        parts: list[nn.Module] = []
        for i, (cin, cout) in enumerate(itertools.pairwise(widths)):
            side = 3 if i < field // 2 else 1
            conv = nn.Conv2d(cin, cout, side, padding=side // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            parts.append(conv)
            if i < layers - 1:
                parts += [BiasFreeNorm2d(cout, gain=gain)] * (i > 0) + [nn.ReLU()]
        super().__init__(*parts)
        self.reach = field // 2
