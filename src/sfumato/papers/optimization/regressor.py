"""A regressor: pictures to numbers, or degraded pictures to clean ones; the base for losses on values and on pairs.

L(θ) = mean of (f_θ(x) − y)² (or of |f_θ(x) − y|) over all values. Not a paper. With `outputs` it is the classifier's network
with another head; without, a plain residual stack of convolutions, f_θ(x) = x + g_θ(x), for pictures of any size.

>>> import torch
>>> from sfumato.data import Batch
>>> from sfumato.papers.optimization.regressor import Regressor
>>> method = Regressor(Regressor.Config.small(channels=3))
>>> noisy, clean = torch.rand(2, 3, 16, 24), torch.rand(2, 3, 16, 24)
>>> method.loss(Batch(noisy, torch.arange(2), target=clean), None).value.shape, method.restore(noisy).shape
(torch.Size([]), torch.Size([2, 3, 16, 24]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.errors import BadData, BadSetting
from sfumato.method import Batch, Context, Loss
from sfumato.papers.optimization.classifier import OptimizerName, Supervised, SupervisedConfig, build_network


class ConvStack(nn.Module):
    """g in x + g(x): `depth` convolutions of 3 x 3 pixels with `width` channels between them."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [channels] + [width] * (depth - 1)
        layers = [m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(width, channels, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden maps, averaged: `[B, width]`."""
        maps: Tensor = self.body(x)
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        correction: Tensor = self.head(self.body(x))
        return correction


class Regressor(Supervised):
    """Pictures to a vector of numbers, or to pictures, by least squares."""

    class Config(SupervisedConfig):
        outputs: int | None = Field(None, gt=0, description="numbers to predict for a picture; None: a picture (paired data)")
        criterion: Literal["mse", "l1"] = Field("mse", description="squared or absolute difference")
        width: int = Field(64, gt=0, description="channels between convolutions, for pictures")
        depth: int = Field(12, gt=1, description="convolutions, for pictures")
        optimizer: OptimizerName = Field(
            "adamw", description="what trains the weights; perpgrad: AdamW on gradients at right angles to them"
        )
        augment: bool = Field(False, description="random crops and flips while training")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """A small network for a CPU."""
            return cls(**{"model": "conv", "width": 24, "depth": 5, "steps": 300, "batch_size": 16, **over})

        def largest_size(self) -> int:
            """Crops of 64 pixels, for pictures."""
            return 64 if self.outputs is None else super().largest_size()

    needs: ClassVar[tuple[str, ...]] = ("x", "target")
    carried: ClassVar[tuple[str, ...]] = (*Supervised.carried, "outputs", "width", "depth")

    def build(self) -> nn.Module:
        """The classifier's network with other outputs, or the stack for pictures."""
        if self.config.outputs is not None:
            return build_network(self.config, self.config.outputs)
        if self.config.channels is None:
            raise BadSetting("channels is not set, and there is no data to take it from: say channels=3 (colour) or 1 (grey)")
        return ConvStack(self.config.channels, self.config.width, self.config.depth)

    def prepare(self, x: Tensor) -> Tensor:
        """Pictures as the network takes them; their size is kept when pictures are to come out."""
        return super().prepare(x) if self.config.outputs is not None else (x - self.mean) / self.std

    def predict(self, x: Tensor) -> Tensor:
        """Values `[B, outputs]`, or pictures `[B, C, H, W]`."""
        prediction: Tensor = self.network(self.prepare(x))
        return prediction if self.config.outputs is not None else x + prediction

    def restore(self, inputs: Tensor, physics: Any = None) -> Tensor:
        """Clean pictures, in [0, 1]."""
        if self.config.outputs is not None:
            raise BadSetting("this run predicts numbers, not pictures: ask it to predict")
        return self.predict(inputs).clamp(0, 1)

    def augment(self) -> Callable[..., Any] | None:
        """As the classifier's; where pictures are to come out they are cut, never resized."""
        if self.config.outputs is not None or not (self.config.augment or self.config.crop):
            return super().augment()
        from torchvision.transforms import v2

        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if self.config.augment else []
        cut: Callable[..., Any] = v2.Compose([v2.RandomCrop(self.size, pad_if_needed=True, padding_mode="reflect"), *flips])
        return cut

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """Mean squared (or absolute) difference."""
        prediction, target = self.predict(batch.x), self._target(batch)
        measure = F.mse_loss if self.config.criterion == "mse" else F.l1_loss
        return Loss(measure(prediction, target), len(batch))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean squared error, and for pictures the peak signal-to-noise ratio in dB."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            total += F.mse_loss(self.predict(batch.x), self._target(batch)) * len(batch)
            count += len(batch)
        mse = float(total) / max(1, count)
        return {"mse": mse} if self.config.outputs is not None else {"mse": mse, "psnr": -10 * float(torch.tensor(mse).log10())}

    @torch.no_grad()
    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Input, prediction and target, where they are pictures."""
        if self.config.outputs is not None:
            return {"pictures": batch.x}
        return {"input": batch.x, "prediction": self.restore(batch.x), "target": self._target(batch)}

    def _target(self, batch: Batch) -> Tensor:
        if batch.target is None:
            raise BadData("a regressor needs a target with every picture: give pairs:INPUTS:TARGETS, or arrays with a target")
        target = batch.target if batch.target.ndim > 1 else batch.target[:, None]
        if self.config.outputs is None and target.ndim != 4:
            raise BadSetting(f"the targets are {target.shape[1]} numbers for each picture: say outputs={target.shape[1]}")
        if self.config.outputs is not None and target.shape[1:] != (self.config.outputs,):
            raise BadSetting(f"outputs={self.config.outputs}, but the targets are {list(target.shape[1:])}")
        return target
