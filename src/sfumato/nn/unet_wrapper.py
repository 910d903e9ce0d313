"""A module in the place of a U-Net, which it holds: whatever it does not have itself it takes from there.

So a wrapped U-Net can be the `unet` of a pipeline of diffusers, which asks it for its `config`, `dtype` and `device`.

>>> from sfumato.nn import UNetWrapper, small_unet
>>> class Negated(UNetWrapper):
...     def forward(self, *args, **kwargs):
...         return -self.unet(*args, **kwargs).sample
>>> Negated(small_unet(8, 1, width=8, mults=(1, 2))).config.in_channels
1
"""

from __future__ import annotations

from typing import Any

from torch import nn


class UNetWrapper(nn.Module):
    """Base class.

    Args:
        unet: a U-Net of diffusers, or another wrapper of one; its parameters are this one's too.
    """

    unet: Any

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "unet":  # not there yet, while it is made or copied
                raise
            return getattr(self.unet, name)
