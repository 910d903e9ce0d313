"""diffusers' UNet2DModel of classes that may be left out: what classifier-free guidance needs.

Source: Jonathan Ho, Tim Salimans, "Classifier-Free Diffusion Guidance", NeurIPS 2021 workshop (arXiv 2207.12598), section 3.2.

>>> import torch
>>> from sfumato.nn import small_unet
>>> net = small_unet(8, 1, width=8, mults=(1, 2), classes=10, null_class=True).eval()
>>> x, t = torch.rand(2, 1, 8, 8), torch.tensor([3, 500])
>>> torch.equal(net(x, t).sample, net(x, t, torch.tensor([10, 10])).sample)
True
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor


class ClassUNet2DModel(UNet2DModel):  # type: ignore[misc]
    """A UNet2DModel whose last class says nothing: it is the one of pictures that come without."""

    config: Any

    @property
    def null_class(self) -> int:
        """Number of the class that says nothing."""
        return int(self.config.num_class_embeds) - 1

    def forward(self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True) -> Any:
        """As UNet2DModel; without `class_labels` the pictures are of no known class."""
        if class_labels is None:
            class_labels = torch.full((len(sample),), self.null_class, device=sample.device)
        return super().forward(sample, timestep, class_labels, return_dict)  # type: ignore[misc]
