"""C-BSN: denoise pictures whose noise is spatially correlated, from noisy pictures alone, in one full-resolution pass.

One network f with a switchable blind spot. Blind, on the phases of a picture (S2B_5 makes the noise nearly white), it learns what
is clean; seeing, at full resolution, it is pulled towards the noisy picture and, at randomly sub-sampled places D_m, towards
what it says blindly about the sub-sampled picture ("downsampled invariance"):

    L = | B2S_5 f_blind(S2B_5 x) - x | + r · ( | f(x) - x | + lambda · | D_m f(x) - stopgrad f_blind(D_m x) | ),

all means over pixels, x the noisy picture with mean 0 and standard deviation 1 a channel, r rising from 0 to 1.

Source: Yeong Il Jang, Keuntek Lee, Gu Yong Park, Seyun Kim, Nam Ik Cho, "Self-supervised Image Denoising with Downsampled
Invariance Loss and Conditional Blind-Spot Network", ICCV 2023 (arXiv 2304.09507), section 3 and the released settings.

>>> import torch
>>> from sfumato.papers.restoration.cbsn import CBSN
>>> method = CBSN(CBSN.Config(width=8, modules=1, channels=3))
>>> method.restore(torch.rand(1, 3, 33, 47)).shape
torch.Size([1, 3, 33, 47])
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from typing_extensions import Self

from sfumato.claim import Better, Figures, Lab, claim
from sfumato.errors import BadSetting
from sfumato.method import Batch, Context, Loss, Method, MethodConfig, Result, Step
from sfumato.metrics import psnr
from sfumato.nn import (
    ConditionalBlindSpotNet,
    batch_to_space,
    pad_to_multiple,
    random_subsample_index,
    reflect_pad,
    space_to_batch,
    subsample,
    tiled_apply,
)
from sfumato.optim import linear_ramp

__all__ = ["CBSN", "DownsampledInvariance", "correlated_photos", "denoise", "denoise_unclamped", "local_statistics", "normalise"]


def normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean 0 and standard deviation 1 for every channel of every picture; a flat one is not blown up.

    Args:
        x: `[B, C, H, W]`.

    Returns:
        `(x - mean) / std`, the mean and the standard deviation `[B, C, 1, 1]`, the latter at least `1 / sqrt(H W)`.
    """
    std, mean = torch.std_mean(x, (-2, -1), correction=0, keepdim=True)
    std = std.clamp_min((x.shape[-2] * x.shape[-1]) ** -0.5)
    return (x - mean) / std, mean, std


class DownsampledInvariance(nn.Module):
    """The loss of C-BSN for any network with a `blind` switch (see the top of the file).

    Args:
        lmbda: weight of the invariance term against the self term.
        stride_blind: stride of the phases that the blind term is trained on; 1: the picture itself.
        stride_inv: side of the cells of the random sub-sampling.
        ramp: share of the training after which both non-blind terms count fully; infinite: never (the blind term alone).
    """

    def __init__(self, *, lmbda: float = 2.0, stride_blind: int = 5, stride_inv: int = 2, ramp: float = 0.4) -> None:
        super().__init__()
        self.lmbda, self.stride_blind, self.stride_inv, self.ramp = lmbda, stride_blind, stride_inv, ramp

    def forward(
        self,
        net: Callable[..., Tensor],
        x: Tensor,
        progress: float,
        *,
        index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch.

        Args:
            net: `net(x, blind=bool)`, pictures to pictures of the same shape.
            x: `[B, C, H, W]`, normalised noisy pictures; sides divisible by both strides.
            progress: share of the training that is done, 0 to 1.
            index: `[B, H / stride_inv, W / stride_inv]`, the pixels that D_m keeps, instead of drawing them.
            generator: source of the draws.

        Returns:
            The loss, and its terms to log.
        """
        s, m = self.stride_blind, self.stride_inv
        blind = (batch_to_space(net(space_to_batch(x, s), blind=True), s) - x).abs().mean()
        r = linear_ramp(progress, end=self.ramp)
        if r == 0:
            return blind, {"blind": blind.detach()}
        if index is None:
            index = random_subsample_index(len(x), (x.shape[-2], x.shape[-1]), m, device=x.device, generator=generator)
        with torch.no_grad():
            target = net(subsample(x, index, m), blind=True)
        y = net(x, blind=False)
        self_term = (y - x).abs().mean()
        inv_term = (subsample(y, index, m) - target).abs().mean()
        logs = {"blind": blind.detach(), "self": self_term.detach(), "inv": inv_term.detach()}
        return blind + r * (self_term + self.lmbda * inv_term), logs


def local_statistics(x: Tensor, window: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation around every pixel, under a Gaussian as wide as a patch of side `window`.

    The Gaussian's deviation is `window / 4`; it costs O(window / 4) a pixel and mirrors the border.

    Args:
        x: `[B, C, H, W]`.
        window: side in pixels.

    Returns:
        Mean and standard deviation (at least `1 / window`), both `[B, C, H, W]` and smooth.
    """
    at = torch.arange(-int(0.75 * window), int(0.75 * window) + 1, dtype=x.dtype, device=x.device)
    gaussian = torch.exp(-8 * (at / window).square())
    gaussian, reach = gaussian / gaussian.sum(), len(at) // 2

    def blur(t: Tensor) -> Tensor:
        t = reflect_pad(t, (reach,) * 4).flatten(0, 1)[:, None]
        t = nn.functional.conv2d(nn.functional.conv2d(t, gaussian[None, None, None]), gaussian[None, None, :, None])
        return t.view_as(x)

    mean = blur(x)
    return mean, blur((blur(x.square()) - mean.square()).clamp_min(0).sqrt()).clamp_min(1 / window)


@torch.no_grad()
def denoise(
    net: ConditionalBlindSpotNet, noisy: Tensor, *, blind: bool = False, stride: int = 1, window: float | None = None
) -> Tensor:
    """Restore whole pictures; seeing, at full resolution, it is the paper's inference, the others are the read-outs it beats.

    Args:
        net: trained.
        noisy: `[B, C, H, W]` in [0, 1], H and W at least 1.
        blind: whether the blind spot is on.
        stride: of the phases that the network is applied to; 1: full resolution.
        window: normalise by the statistics around each pixel, as wide as a patch of this side; None: by those of the picture.

    Returns:
        `[B, C, H, W]` in [0, 1].
    """
    return denoise_unclamped(net, noisy, blind=blind, stride=stride, window=window).clamp(0, 1)


def denoise_unclamped(
    net: ConditionalBlindSpotNet, noisy: Tensor, *, blind: bool = False, stride: int = 1, window: float | None = None
) -> Tensor:
    """The same, differentiable and of any range."""
    if window is None:
        x, mean, std = normalise(noisy)
    else:
        mean, std = local_statistics(noisy, window)
        x = (noisy - mean) / std
    x, crop = pad_to_multiple(reflect_pad(x, (_BORDER,) * 4), stride)
    y = tiled_apply(partial(net, blind=blind), space_to_batch(x, stride), overlap=net.reach)
    y = batch_to_space(y, stride)[crop][..., _BORDER:-_BORDER, _BORDER:-_BORDER]
    return y * std + mean


_BORDER = 32  # mirrored pixels around a picture at inference, of the released code


class AtLeast(v2.Transform):
    """Mirror the border of pictures that are smaller than `size` pixels a side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One picture `[C, H, W]`."""
        down, right = (max(0, self.size - side) for side in inpt.shape[-2:])
        if not (down or right):
            return inpt
        padded = reflect_pad(inpt, (right // 2, right - right // 2, down // 2, down - down // 2))
        return tv_tensors.wrap(padded, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else padded


class CBSN(Method):
    """Jang et al. 2023. Trains on noisy pictures, restores pictures of any size."""

    class Config(MethodConfig):
        """Defaults: the paper's, for SIDD-Medium."""

        steps: int = Field(500_000, gt=0, description="optimizer steps")
        batch_size: int = Field(4, gt=0, description="patches a step")
        channels: int | None = Field(None, gt=0, description="channels of a picture; None: those of the data")
        width: int = Field(128, gt=0, description="channels of the hidden layers (C)")
        modules: int = Field(9, ge=0, description="dilated modules in each branch (N)")
        patch: int = Field(240, gt=0, description="side of a training patch in pixels; a multiple of both strides")
        lr: float = Field(1e-4, gt=0, description="Adam's learning rate at the start")
        decay: float = Field(0.5, gt=0, le=1, description="factor on the learning rate at every decay")
        decay_every: float = Field(0.2, gt=0, description="share of the training between two decays")
        lmbda: float = Field(2.0, ge=0, description="weight of the invariance term (lambda)")
        stride_blind: int = Field(5, gt=0, description="stride of the phases of the blind term, pixels; 1: full resolution")
        stride_inv: int = Field(2, gt=0, description="side of the cells of the random sub-sampling, pixels")
        ramp: float = Field(0.4, ge=0, description="share of the training over which the non-blind terms rise")
        window: int | None = Field(
            None, gt=0, description="side of the window of the mean and deviation at inference, pixels; None: the whole picture"
        )
        blind_only: bool = Field(False, description="the blind term alone, read out blindly: the baselines BSN and AP-BSN")

        @model_validator(mode="after")
        def _whole_cells(self) -> Self:
            for stride in (self.stride_blind, self.stride_inv):
                if self.patch % stride:
                    raise BadSetting(f"patch={self.patch} is not a multiple of the stride {stride}")
            return self

        @classmethod
        def small(cls, **over: Any) -> Self:
            """One photograph on two cores in about a minute and a half.

            A small network trained on small patches must see patch-like pictures: it is restored with local statistics (the
            paper's test pictures are 256 pixels a side, hardly larger than its patches).
            """
            over = {"steps": 2500, "batch_size": 2, "width": 16, "modules": 2, "patch": 60, "lr": 4e-3, "window": 60, **over}
            return cls(**over)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        self.net = ConditionalBlindSpotNet(c.channels or 3, width=c.width, modules=c.modules)
        self.objective = DownsampledInvariance(
            lmbda=c.lmbda,
            stride_blind=c.stride_blind,
            stride_inv=c.stride_inv,
            ramp=float("inf") if c.blind_only else c.ramp,
        )

    def augment(self) -> Callable[..., Any]:
        """A random patch in one of its eight orientations."""
        size = self.config.patch
        turns = [v2.RandomRotation((angle, angle)) for angle in (0, 90, 180, 270)]
        return v2.Compose([AtLeast(size), v2.RandomCrop(size), v2.RandomChoice(turns), v2.RandomHorizontalFlip()])

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """L on patches, each normalised by itself."""
        x, _, _ = normalise(batch.x)
        value, logs = self.objective(self.net, x, ctx.progress, generator=ctx.generator)
        return Loss(value, len(batch), logs)

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """Adam with a staircase of learning rates."""
        decays = int(ctx.progress / self.config.decay_every + 1e-9)  # 0.6 / 0.2 is a little less than 3
        ctx.scale_lr(self.config.decay**decays)
        yield Step("net", (self.loss,))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam, as in the paper."""
        return {"net": torch.optim.Adam(self.net.parameters(), self.config.lr)}

    def restore(self, inputs: Tensor, physics: Any = None) -> Tensor:
        """Remove the noise.

        Args:
            inputs: `[B, C, H, W]` in [0, 1], any height and width.
            physics: not used: the noise was learned.

        Returns:
            `[B, C, H, W]` in [0, 1].
        """
        return denoise(self.net, inputs, blind=self.config.blind_only, window=self.config.window)

    def denoise(self, y: Tensor, sigma: float | None = None) -> Tensor:
        """The same, differentiable and not clamped; whatever noise there is counts as the one that was learned."""
        return denoise_unclamped(self.net, y, blind=self.config.blind_only, window=self.config.window)

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy patches and what becomes of them."""
        return {"noisy": batch.x, "restored": self.restore(batch.x)}

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean PSNR in dB against the clean pictures, where the data has them."""
        values = [psnr(self.restore(b.x), b.target) for b in batches if b.target is not None]
        return {"psnr": torch.cat(values).mean().item()} if values else {}


def correlated_photos(sigma: float, kernel: Tensor, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Four grey photographs at half resolution, clean and with correlated noise: lists of `[1, H, W]`, sides multiples of 10."""
    from sfumato.data import photo_names, photos
    from sfumato.physics import correlated_noise

    windows = {"camera": (512, 512), "astronaut": (512, 512), "coffee": (400, 600), "chelsea": (300, 450)}
    whole = dict(zip(photo_names("all"), photos("all")))
    clean = []
    for name, (h, w) in windows.items():
        grey = v2.functional.rgb_to_grayscale(whole[name].float() / 255)[:, :h:2, :w:2]
        clean.append(grey[:, : grey.shape[1] // 10 * 10, : grey.shape[2] // 10 * 10])
    return clean, [c + correlated_noise(c.shape, sigma, kernel, generator=generator) for c in clean]


_SMALL = {"channels": 1, "width": 16, "modules": 2, "patch": 60, "batch_size": 3, "lr": 2e-3, "decay": 0.3, "decay_every": 0.7}
_ARMS: dict[str, dict[str, Any]] = {
    "BSN": {"stride_blind": 1, "blind_only": True},
    "PD": {"stride_blind": 5, "blind_only": True},
    "C-BSN": {},
}


@claim(
    "On correlated noise, C-BSN's plain full-resolution pass beats a blind-spot network, and every blind read-out of itself and "
    "of a blind-spot network trained on phases (PD, as in AP-BSN)",
    Better("PSNR", "C-BSN", over="BSN", by=1.5),
    Better("PSNR", "C-BSN", over="best blind read-out", by=0.3),
    Better("PSNR", "BSN, white noise", over="noisy, white noise", by=1.5),
    seeds=range(100, 105),
    note="Four grey photographs, noise 0.15 filtered with [1 2 1] x [1 2 1]; trained on the noisy photographs that are restored. "
    "The last condition is a check of the baseline: without correlation it must work. The close one is PD read out blindly at "
    "stride 2, AP-BSN's own way: 21.0 dB on average, where C-BSN has 21.1.",
)
def correlated_noise_claim(lab: Lab) -> Figures:
    """Three nets of one architecture and one budget, read out in every way that the paper discusses."""
    line = torch.tensor([1.0, 2.0, 1.0])
    clean, noisy = correlated_photos(0.15, torch.outer(line, line), lab.generator)
    _, white = correlated_photos(0.15, torch.ones(1, 1), lab.generator)
    figures: Figures = {"noisy": _score(clean, noisy), "noisy, white noise": _score(clean, white)}
    nets = {name: _fit(lab, noisy, **settings) for name, settings in _ARMS.items()}
    figures["C-BSN"] = _score(clean, [denoise(nets["C-BSN"], n[None])[0] for n in noisy])
    figures["BSN"] = _score(clean, [denoise(nets["BSN"], n[None], blind=True)[0] for n in noisy])
    read_outs = {}
    for name in ("PD", "C-BSN"):
        for stride in (1, 2, 5):
            restored = [denoise(nets[name], n[None], blind=True, stride=stride)[0] for n in noisy]
            read_outs[f"{name}, blind, stride {stride}"] = _score(clean, restored)
    best = max(read_outs.values(), key=lambda metrics: metrics["PSNR"])
    on_white = _fit(lab, white, **_ARMS["BSN"])
    figures["BSN, white noise"] = _score(clean, [denoise(on_white, n[None], blind=True)[0] for n in white])
    return {**figures, **read_outs, "best blind read-out": best}


def _fit(lab: Lab, noisy: list[Tensor], **settings: Any) -> ConditionalBlindSpotNet:
    """A trained network: 700 steps at this lab's budget."""
    torch.manual_seed(lab.seed)  # all arms begin at the same weights
    method = CBSN(CBSN.Config(**{**_SMALL, **settings}))
    inside = [0.3 + 0.4 * n for n in noisy]  # [0, 1] holds all of the noise, and normalised patches stay the same
    return lab.fit(method, inside, steps=lab.steps(700)).net


def _score(clean: list[Tensor], restored: list[Tensor]) -> dict[str, float]:
    return {"PSNR": float(torch.cat([psnr(r[None], c[None]) for r, c in zip(restored, clean)]).mean())}
