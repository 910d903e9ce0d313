"""What gates on the weights of a U-Net cost: MaskedUNet over the U-Net that it wraps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from sfumato.nn import small_unet
from sfumato.sparsity import MaskedUNet


def masked(unet: nn.Module, by: str) -> nn.Module:
    """At their beginning gates are all 1; free ones are put there."""
    return MaskedUNet(unet, by=by, logit=5.0)


def call(net: nn.Module, x: Tensor, t: Tensor) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = net(x, t).sample
        return out

    return run


def learn(net: nn.Module, x: Tensor, t: Tensor) -> Run:
    """Forward and backward: of the masks, or of the U-Net's own weights where they learn."""

    def run() -> Tensor:
        net.zero_grad()
        loss: Tensor = net(x, t).sample.square().mean()
        loss.backward()
        return loss.detach()

    return run


@race(
    "MaskUNet: gates by sample and time on the attention weights of the way up, over the U-Net without",
    "Every gated weight is drawn, stretched and multiplied once a picture: that cost grows with weights times pictures, the "
    "layers' own with weights times pixels, so few pixels are the dearest case. Free gates are shared by the batch and cost one "
    "product a weight. Beside learning the masks stands learning all weights of the U-Net: masks need no gradients of the "
    "weights, and none below the way up.",
)
def masked_unet(quick: bool) -> Iterator[Heat]:
    """The same output, as no gate is 0 at the beginning."""
    width, sides, batch = (16, (8,), 4) if quick else (64, (16, 32), 16)
    for side in sides:
        make = partial(built, partial(small_unet, side, 3, width=width, mults=(1, 2, 2), attn_at=(1, 2)))
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(batch, 3, side, side, generator=generator), torch.arange(batch) * 50
        nets = {"sfumato": masked(make(), "sample"), "free gates": masked(make(), "free"), "bare": make()}
        size = f"{batch} pictures of {side} x {side} pixels, width {width}"
        yield Heat(f"a call, {size}", {name: partial(call, net.eval(), x, t) for name, net in nets.items()}, tolerance=1e-4)
        both = {name: partial(learn, nets[name], x, t) for name in ("sfumato", "bare")}
        yield Heat(f"a gradient, {size}", both, tolerance=1e-4)
