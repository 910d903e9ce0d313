"""MoM (DistFormer): metres to every boxed object, regularised by predicting the hidden half of each object's own picture.

    F = backbone(frame);   tokens of a box = RoIAlign(F), 8 x 8;   half of EACH object's tokens hidden, while training
    L = s_d · L_dist(head(attention over the frame's objects(mean of encoded tokens)), metres) + α · s_m · L_mom
    L_mom = Σ w_i (x̂_i - x_i)² / Σ w_i     over hidden cells of the objects' crops; w = 0 for dark and for small objects

Masks lie on tokens of objects, not on pixels of frames: an object of ten pixels is never hidden as a whole. One stage; at the end
nothing is hidden and the decoder is not run. `MoMHead` adds the auxiliary loss to any detector or regressor.

Source: Panariello, Mancusi, Haj Ali, Porrello, Calderara, Cucchiara 2024, "Monocular Per-Object Distance Estimation with Masked
Object Modeling" (first as "DistFormer"), CVIU 2025, arXiv 2401.03191. Defaults are those for KITTI. Our choices: crops by
RoIAlign of the clean frame instead of one resize a box, half-pixel aligned boxes, blocks of the pyramid, a log-variance clamped
to [-10, 10]. Left out: the anchor token, the focal-frequency variant of L_mom, graph networks instead of attention, clips.
Weights are random unless `pretrained` is asked for; the paper starts from ImageNet-22k and a pre-trained ViT-B.

>>> import torch
>>> from sfumato.data import perspective_scenes
>>> from sfumato.engine import fit
>>> from sfumato.papers.masking.masked_object_modeling import MoM
>>> frames = perspective_scenes(16, generator=torch.Generator().manual_seed(0))
>>> mom = fit(MoM(MoM.Config.small(steps=2)), frames, progress=False)
>>> mom.predict_objects(frames.x[:2], frames.boxes[:2]).shape
torch.Size([2, 5])
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.boxes import Boxes, box_rows, center_heatmap, jitter_boxes, pad_boxes, resized_crops
from sfumato.errors import BadData, BadSetting
from sfumato.losses import denormalize_patches, laplace_relative_nll, masked_mean, normalize_patches
from sfumato.masks import mask_from_scores, random_mask, upsample_mask
from sfumato.masks.random_masks import Grid, grid_shape
from sfumato.method import Batch, Context, Loss, Method, MethodConfig, Step
from sfumato.metrics import distance_metrics
from sfumato.nn import MaskedObjectAutoencoder, PyramidBackbone, RoITokens
from sfumato.optim import cosine_warmup, linear_ramp
from sfumato.papers.masking.mae import COLOR_STATISTICS, GREY_STATISTICS

# ---- the auxiliary loss


def object_cells(crops: Tensor, grid: Grid) -> Tensor:
    """Crops cut into the cells that tokens stand for: `[N, C, h, w]` to `[N, L, C · h/rows · w/columns]`, channel first.

    Raises:
        BadData: the cells do not fill the crops.
    """
    (rows, columns), (count, channels, height, width) = grid_shape(grid), crops.shape
    if height % rows or width % columns:
        raise BadData(f"crops of {height} x {width} pixels cannot be cut into {rows} x {columns} cells: both must be multiples")
    cells = crops.reshape(count, channels, rows, height // rows, columns, width // columns).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(count, rows * columns, channels * (height // rows) * (width // columns))


def object_pixels(cells: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """The inverse of `object_cells`: `[N, L, P]` to `[N, C, *size]`."""
    (rows, columns), channels = grid_shape(grid), cells[0].numel() // (size[0] * size[1])
    parts = cells.reshape(len(cells), rows, columns, channels, size[0] // rows, size[1] // columns).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(len(cells), channels, *size)


def masked_object(
    pred: Tensor, crops: Tensor, hidden: Tensor, grid: Grid, *, weights: Tensor | None = None, norm_pix: bool = False
) -> Tensor:
    """L_mom: mean squared error per pixel of the hidden cells, objects weighted.

    Args:
        pred: `[N, L, P]`, pixels of every cell, channel first.
        crops: `[N, C, h, w]`, clean.
        hidden: `[N, L]` bool, True = counted.
        grid: cells along each side.
        weights: `[N]`, not negative; None: equal.
        norm_pix: compare with each cell's pixels at mean 0 and (unbiased) variance 1.

    Returns:
        A scalar; 0 where nothing counts.
    """
    target = object_cells(crops, grid)
    if norm_pix:
        target = normalize_patches(target)
    return masked_mean((pred - target).square().mean(-1), hidden, weight=None if weights is None else weights[:, None])


def object_weights(
    crops: Tensor,
    rows: Tensor,
    *,
    min_brightness: float = 1e-2,
    min_box: float = 25.0,
    weight_dark: float = 0.0,
    weight_small: float = 0.0,
) -> Tensor:
    """What each object counts in L_mom.

    Args:
        crops: `[N, C, h, w]` in [0, 1].
        rows: `[N, 5]`, see `box_rows`.
        min_brightness: mean over pixels of the largest channel below which an object is dark.
        min_box: width or height below which it is small, pixels.
        weight_dark: of dark objects.
        weight_small: of small ones.

    Returns:
        `[N]`: 1, or the weight (for both: the product); 0 for boxes of less than a pixel.
    """
    dark = crops.amax(1).mean((1, 2)) < min_brightness
    side = (rows[:, 3:] - rows[:, 1:3]).amin(1)
    weights = torch.where(dark, weight_dark, 1.0) * torch.where(side < min_box, weight_small, 1.0)
    return torch.where(side < 1, 0.0, weights).to(crops)


class Objects(NamedTuple):
    """What `MoMHead` knows of the objects of a batch, in the order of `rows`.

    Args:
        features: `[N, dim]`, mean of the encoded tokens.
        loss: L_mom; 0 where nothing was reconstructed.
        rows: `[N, 5]`, see `box_rows`.
        crops: `[N, C, h, w]`, or None where they were not needed.
        hidden: `[N, L]` bool, or None where nothing was hidden.
        predicted: `[N, L, P]`, pixels of every cell, or None.
    """

    features: Tensor
    loss: Tensor
    rows: Tensor
    crops: Tensor | None
    hidden: Tensor | None
    predicted: Tensor | None


class MoMHead(nn.Module):
    """Masked object modelling for any network: one vector for every box, and the auxiliary loss while training.

    Args:
        backbone: images `[B, C, H, W]` to features `[B, feature_dim, H / stride, W / stride]`; yours. None: features are given.
        feature_dim: channels of the features.
        stride: pixels of the image for one of the features.
        dim: width of the tokens.
        grid: tokens along each side of an object.
        crop: (height, width) in pixels to which objects are resized; multiples of the grid.
        channels: of the images.
        mask_ratio: share of each object's tokens that is hidden while training.
        norm_pix: predict pixels normalised within each cell.
        visible_weight: of the same loss on visible cells (the paper's 0.001 on MOTSynth).
        hidden_dim: channels inside the projection of the features.
        aligned: see `RoITokens`.
        weighing: arguments of `object_weights`.
        autoencoder: arguments of `MaskedObjectAutoencoder`.

    Example:
        >>> head = MoMHead(nn.Conv2d(3, 8, 3, 4, 1), 8, 4, dim=24, grid=4, crop=(16, 16), weighing={"min_box": 2})
        >>> objects = head(torch.rand(2, 3, 32, 32), [torch.tensor([[2.0, 3.0, 20.0, 30.0]]), torch.empty(0, 4)])
        >>> objects.features.shape, bool(objects.loss > 0)  # add objects.loss to your own
        (torch.Size([1, 24]), True)
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        feature_dim: int,
        stride: int,
        *,
        dim: int = 768,
        grid: Grid = 8,
        crop: tuple[int, int] = (120, 120),
        channels: int = 3,
        mask_ratio: float = 0.5,
        norm_pix: bool = False,
        visible_weight: float = 0.0,
        hidden_dim: int = 256,
        aligned: bool = True,
        weighing: dict[str, float] | None = None,
        autoencoder: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        rows, columns = grid_shape(grid)
        if crop[0] % rows or crop[1] % columns:
            raise BadSetting(f"crop={crop} is no multiple of the grid {rows} x {columns}: every token stands for whole pixels")
        self.backbone, self.stride, self.grid, self.crop = backbone, stride, (rows, columns), crop
        self.mask_ratio, self.norm_pix, self.visible_weight = mask_ratio, norm_pix, visible_weight
        self.weighing = dict(weighing or {})
        self.tokens = RoITokens(feature_dim, dim, self.grid, hidden=hidden_dim, aligned=aligned)
        cell = (crop[0] // rows, crop[1] // columns)
        self.autoencoder = MaskedObjectAutoencoder(dim, self.grid, cell=cell, channels=channels, **(autoencoder or {}))

    def draw_mask(self, count: int, *, device: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """`[count, L]` bool: of each object the ⌊ratio · L⌋ tokens with the smallest noise."""
        device = generator.device if generator is not None else device
        noise = torch.rand(count, self.grid[0] * self.grid[1], generator=generator, device=device)
        return mask_from_scores(noise, ratio=self.mask_ratio, largest=False, rule="hide_floor")

    def forward(
        self,
        x: Tensor,
        boxes: Boxes,
        *,
        features: Tensor | None = None,
        crops: Tensor | None = None,
        hidden: Tensor | None = None,
        reconstruct: bool = True,
        generator: torch.Generator | None = None,
    ) -> Objects:
        """One vector a box; in training mode, or under a given mask, with L_mom.

        Args:
            x: `[B, C, H, W]`; in [0, 1] unless `crops` are given.
            boxes: xyxy in pixels of `x`: padded `[B, n, 4]`, a list of `[n, 4]`, or rows `[N, 5]`.
            features: of `x`, instead of calling the backbone.
            crops: clean ones `[N, C, h, w]`, where `x` is not what is to be predicted.
            hidden: `[N, L]` bool; None: drawn in training mode, else nothing is hidden.
            reconstruct: predict the hidden cells and compute the loss.
            generator: source of the mask.

        Raises:
            BadData: features that do not have the stride.
        """
        rows = box_rows(boxes).to(x)
        if features is None:
            if self.backbone is None:
                raise BadData("this head has no backbone: give features=")
            features = self.backbone(x)
        if any(abs(f * self.stride - s) >= self.stride for f, s in zip(features.shape[-2:], x.shape[-2:])):
            raise BadData(
                f"features are {list(features.shape[-2:])}: stride {self.stride} of {list(x.shape[-2:])} is something else"
            )
        tokens = self.tokens(features, rows, (x.shape[-2], x.shape[-1]))
        if hidden is None and self.training:
            hidden = self.draw_mask(len(rows), device=x.device, generator=generator)
        encoded = self.autoencoder.encode(tokens, hidden)
        loss, predicted = encoded.new_zeros(()), None
        if hidden is not None and reconstruct:
            crops = resized_crops(x, rows, self.crop) if crops is None else crops
            predicted = self.autoencoder.decode(encoded, hidden)
            weights = object_weights(crops, rows, **self.weighing)
            settings: dict[str, Any] = {"weights": weights, "norm_pix": self.norm_pix}
            loss = masked_object(predicted, crops, hidden, self.grid, **settings)
            if self.visible_weight:
                loss = loss + self.visible_weight * masked_object(predicted, crops, ~hidden, self.grid, **settings)
        return Objects(encoded.mean(1), loss, rows, crops, hidden, predicted)


# ---- the network


class ObjectSetAttention(nn.Module):
    """The objects of a frame look at each other: x' = LN(x + MHA(x)), out = LN(x + FFN(x')); the second sum adds x, not x'.

    All objects of a batch are attended to at once under a mask that keeps frames apart: nothing is padded.

    Args:
        dim: width.
        heads: attention heads.
    """

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, frame: Tensor) -> Tensor:
        """`[N, dim]` and the number of each object's frame `[N]`, to `[N, dim]`."""
        if not len(x):
            return x
        apart = frame[:, None] != frame[None]
        attended, _ = self.attention(x[None], x[None], x[None], attn_mask=apart, need_weights=False)
        out: Tensor = self.norm2(x + self.feed(self.norm(x + attended[0])))
        return out


class ValueClippedAdamW(torch.optim.AdamW):
    """AdamW on gradients of which each entry is clipped to [-clip, clip], inside the closure."""

    def __init__(self, params: Any, *, clip: float | None = None, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.clip = clip

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step."""

        def clipped() -> Any:
            loss = closure() if closure is not None else None
            if self.clip is not None:
                nn.utils.clip_grad_value_([p for group in self.param_groups for p in group["params"]], self.clip)
            return loss

        return super().step(clipped)


class MoM(Method):
    """Distances of boxed objects, with masked object modelling as the auxiliary task."""

    class Config(MethodConfig):
        """KITTI: 375 x 1242 pixels, 150 epochs of 3,712 frames."""

        steps: int = Field(34_800, gt=0, description="optimizer steps; 150 epochs of KITTI")
        batch_size: int = Field(16, gt=0, description="frames a step, over all micro-batches and processes (the paper's 4 x 4)")
        clip_value: float | None = Field(1.0, gt=0, description="largest absolute entry of a gradient; None: no clipping")
        backbone: Literal["convnext_tiny", "convnext_small", "convnext_base", "resnet34", "conv"] = Field(
            "convnext_base", description="what sees the frame; conv: two convolutions, for small pictures"
        )
        pretrained: bool = Field(False, description="download weights: ImageNet's for the backbone, MAE's ViT-B where dim is 768")
        channels: int | None = Field(None, gt=0, description="channels of a frame; None: as the data has")
        use_centers: bool = Field(True, description="a further channel with a bump at the centre of every box")
        grid: int = Field(8, gt=0, description="tokens along each side of an object")
        crop: tuple[int, int] = Field((120, 120), description="height and width to which objects are resized, pixels")
        aligned: bool = Field(True, description="RoIAlign with half-pixel alignment; the authors' code has none")
        roi_dim: int = Field(256, gt=0, description="channels inside the projection of an object's features")
        dim: int = Field(768, gt=0, description="width of the tokens and the encoder, a multiple of all heads")
        encoder_depth: int = Field(6, gt=0, description="blocks of the encoder")
        encoder_heads: int = Field(12, gt=0, description="attention heads of the encoder")
        decoder_dim: int = Field(768, gt=0, description="width of the decoder, a multiple of decoder_heads")
        decoder_depth: int = Field(2, ge=0, description="blocks of the decoder")
        decoder_heads: int = Field(8, gt=0, description="attention heads of the decoder")
        token_std: float = Field(1.0, gt=0, description="deviation of the first positions and mask token")
        attention_heads: int = Field(4, ge=0, description="heads of the attention between objects; 0: none")
        head_dim: int = Field(1024, gt=0, description="width before the output")
        box_geometry: bool = Field(False, description="append the box's place and log-size to its features (ours)")
        output: Literal["linear", "exp"] = Field("linear", description="metres, or their logarithm (ours), is what is put out")
        mask_ratio: float = Field(0.5, ge=0, lt=1, description="share of each object's tokens that is hidden in training")
        alpha: float = Field(20.0, ge=0, description="weight of the reconstruction; 0: the decoder is not run")
        distance_loss: Literal["smooth_l1", "gaussian", "laplace"] = Field(
            "smooth_l1", description="gaussian, laplace: the network also predicts a spread"
        )
        distance_warmup: tuple[float, float] = Field(
            (10 / 150, 20 / 150), description="shares of the steps between which the weight of the distance rises from 0"
        )
        mom_warmup: float = Field(0.0, ge=0, le=1, description="share of the steps over which that of the reconstruction rises")
        norm_pix: bool = Field(False, description="predict pixels normalised within each cell")
        visible_weight: float = Field(0.0, ge=0, description="weight of the loss on visible cells over that on hidden ones")
        min_brightness: float = Field(1e-2, ge=0, description="brightness below which an object is dark, 0 to 1")
        min_box: float = Field(25.0, ge=0, description="height or width below which an object is small, pixels")
        weight_dark: float = Field(0.0, ge=0, description="weight of dark objects in the reconstruction")
        weight_small: float = Field(0.0, ge=0, description="weight of small objects in the reconstruction")
        lr: float = Field(5e-5, gt=0, description="peak learning rate")
        min_lr: float = Field(1e-6, ge=0, description="lowest learning rate of a cosine")
        weight_decay: float = Field(2e-5, ge=0, description="AdamW's, on all weights")
        schedule: Literal["restarts", "cosine"] = Field("restarts", description="cosines from the peak, or one after a rise")
        restarts: int = Field(150, gt=0, description="cosines in a training; the paper's: one an epoch")
        warmup: float = Field(0.3, ge=0, lt=1, description="share of the steps over which the rate rises, for schedule=cosine")
        flip: bool = Field(True, description="mirror half of the frames; off for digits and letters")
        jitter: Literal["none", "scale", "iou"] = Field("none", description="noise on the boxes while training")
        jitter_iou: float = Field(0.5, gt=0, le=1, description="least overlap with the true box, for jitter=iou")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """A minute on a CPU: frames of 64 pixels, 4 x 4 tokens an object."""
            return cls(**{**SMALL, **over})

        @classmethod
        def nuscenes(cls, **over: Any) -> Self:
            """NuScenes, 450 x 600 pixels, 25 epochs; say the steps of your split."""
            preset: dict[str, Any] = {
                "backbone": "convnext_small", "batch_size": 8, "alpha": 10.0, "min_box": 5.0, "weight_decay": 1e-5,
                "decoder_heads": 12, "restarts": 25, "distance_loss": "gaussian", "distance_warmup": (0.0, 0.0),
            }  # fmt: skip
            return cls(**{**preset, **over})

        @classmethod
        def motsynth(cls, **over: Any) -> Self:
            """MOTSynth pedestrians, 720 x 1280 pixels, 100 epochs; say the steps of your split."""
            preset: dict[str, Any] = {
                "backbone": "convnext_small", "batch_size": 8, "alpha": 10.0, "crop": (128, 64), "min_box": 0.0, "lr": 1e-4,
                "weight_decay": 1e-5, "clip_value": 2.0, "restarts": 100, "distance_loss": "gaussian",
                "distance_warmup": (0.0, 0.1), "visible_weight": 1e-3, "decoder_heads": 12,
            }  # fmt: skip
            return cls(**{**preset, **over})

    needs: ClassVar[tuple[str, ...]] = ("x", "target", "boxes")
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        channels = c.channels or 3
        mean, std = COLOR_STATISTICS if channels == 3 else GREY_STATISTICS
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        backbone = PyramidBackbone(c.backbone, channels + c.use_centers, pretrained=c.pretrained)
        self.head = MoMHead(
            backbone, backbone.out_channels, backbone.stride, dim=c.dim, grid=c.grid, crop=c.crop, channels=channels,
            mask_ratio=c.mask_ratio, norm_pix=c.norm_pix, visible_weight=c.visible_weight, hidden_dim=c.roi_dim,
            aligned=c.aligned,
            weighing={name: getattr(c, name) for name in ("min_brightness", "min_box", "weight_dark", "weight_small")},
            autoencoder={
                name: getattr(c, name)
                for name in ("encoder_depth", "encoder_heads", "decoder_dim", "decoder_depth", "decoder_heads", "token_std")
            },
        )  # fmt: skip
        self.attention = ObjectSetAttention(c.dim, c.attention_heads) if c.attention_heads else None
        outputs = 1 if c.distance_loss == "smooth_l1" else 2
        self.regressor = nn.Sequential(nn.Linear(c.dim + 4 * c.box_geometry, c.head_dim), nn.Linear(c.head_dim, outputs))
        if c.pretrained and c.dim == 768:
            import timm

            self.head.autoencoder.load_vit(timm.create_model("vit_base_patch16_224.mae", pretrained=True))

    # ---- training

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Which tokens of each object are hidden: `[N, L]` bool, for crops `[N, C, h, w]`."""
        return self.head.draw_mask(len(x), generator=generator)

    def mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Which tokens to hide; arguments as for `own_mask`."""
        return self.own_mask(x, generator, progress)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The distance's loss over objects whose distance is known, and the reconstruction over all."""
        c = self.config
        x, boxes, target = self._moved(batch, ctx.generator)
        rows = box_rows(boxes)
        crops = resized_crops(x, rows, c.crop)
        hidden = self.mask(crops, ctx.generator, ctx.progress) if c.mask_ratio else None
        objects = self._objects(x, boxes, rows, crops=crops, hidden=hidden, reconstruct=c.alpha > 0)
        output = self._output(objects, (x.shape[-2], x.shape[-1]))
        distance = self.distance_criterion(output, target[boxes.isfinite().all(-1)][:, 0])
        s_d = linear_ramp(ctx.progress, start=c.distance_warmup[0], end=c.distance_warmup[1])
        s_m = linear_ramp(ctx.progress, end=c.mom_warmup)
        value = s_d * distance + c.alpha * s_m * objects.loss
        return Loss(value, max(1, len(rows)), {"distance": distance.detach(), "reconstruction": objects.loss.detach()})

    def distance_criterion(self, output: Tensor, metres: Tensor) -> Tensor:
        """The loss of outputs `[N, 1 or 2]` (metres, and a log-spread) against distances `[N]`; NaN ones do not count."""
        known = metres.isfinite()
        y, mean, kind = torch.where(known, metres, 1.0), output[:, 0], self.config.distance_loss
        if kind == "smooth_l1":
            values = F.smooth_l1_loss(mean, y, reduction="none")
        else:
            spread = output[:, 1].clamp(-10, 10)
            if kind == "gaussian":
                values = F.gaussian_nll_loss(mean, y, spread.exp(), reduction="none")
            else:
                values = laplace_relative_nll(mean, y, spread, reduction="none")
        return masked_mean(values, known)

    def _moved(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Frames, boxes and what is known of them, mirrored and jittered."""
        x, boxes, target = *_boxed(batch), batch.target
        if target is None:
            raise BadData("distances are learned from a target with every box, [B, n, 1 or more]: metres first, NaN: not known")
        c, width = self.config, x.shape[-1]
        if c.flip:
            flip = torch.rand(len(x), 1, generator=generator, device=generator.device).to(x.device) < 0.5
            x = torch.where(flip[..., None, None], x.flip(-1), x)
            x1, y1, x2, y2 = boxes.unbind(-1)
            boxes = torch.where(flip[..., None], torch.stack((width - x2, y1, width - x1, y2), -1), boxes)
        if c.jitter != "none":
            boxes = jitter_boxes(boxes, (x.shape[-2], width), mode=c.jitter, iou=c.jitter_iou, generator=generator)
        return x, boxes, target if target.ndim == 3 else target[..., None]

    def _objects(self, x: Tensor, boxes: Tensor, rows: Tensor, **settings: Any) -> Objects:
        seen = (x - self.mean) / self.std
        if self.config.use_centers:
            seen = torch.cat((seen, center_heatmap(boxes, (x.shape[-2], x.shape[-1])).to(seen)), 1)
        objects: Objects = self.head(seen, rows, **settings)
        return objects

    def _output(self, objects: Objects, size: tuple[int, int]) -> Tensor:
        """Metres (and a log-spread) of every object, `[N, 1 or 2]`."""
        features = objects.features
        if self.attention is not None:
            features = self.attention(features, objects.rows[:, 0])
        if self.config.box_geometry:
            features = torch.cat((features, _geometry(objects.rows, size).to(features)), 1)
        output: Tensor = self.regressor(features)
        if self.config.output == "exp":
            output = torch.cat((output[:, :1].clamp(max=10).exp(), output[:, 1:]), 1)
        return output

    def lr_factor(self, progress: float) -> float:
        """The learning rate over its peak."""
        c = self.config
        floor = min(1.0, c.min_lr / c.lr)
        if c.schedule == "cosine":
            return cosine_warmup(progress, warmup=c.warmup, floor=floor)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress * c.restarts % 1)))

    def steps(self, ctx: Context) -> Any:
        """One step of AdamW at this moment's learning rate."""
        ctx.scale_lr(self.lr_factor(ctx.progress))
        yield Step("net", (self.loss,))

    def optimizers(self) -> dict[str, Optimizer]:
        """AdamW with gradients clipped by value."""
        c = self.config
        return {"net": ValueClippedAdamW(self.parameters(), clip=c.clip_value, lr=c.lr, weight_decay=c.weight_decay, fused=True)}

    # ---- use

    def predict_objects(self, x: Tensor, boxes: Boxes) -> Tensor:
        """Distances of boxed objects.

        Args:
            x: `[B, C, H, W]` in [0, 1].
            boxes: `[B, n, 4]` xyxy in pixels of `x`, rows of NaN where there are fewer; or a list with `[n, 4]` for each image.

        Returns:
            `[B, n]` metres, NaN where there is no box.
        """
        padded = (boxes if isinstance(boxes, Tensor) else pad_boxes(boxes)).to(x)
        rows = box_rows(padded)
        output = self._output(self._objects(x, padded, rows, reconstruct=False), (x.shape[-2], x.shape[-1]))
        metres = x.new_full(padded.shape[:2], torch.nan)
        metres[padded.isfinite().all(-1)] = output[:, 0].to(metres)
        return metres

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures of `distance_metrics`; and the error of the reconstruction, beside that of each crop's mean colour."""
        generator = torch.Generator(self.device).manual_seed(0)
        found: list[Tensor] = []
        errors = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in batches:
            x, boxes = _boxed(batch)
            there = boxes.isfinite().all(-1)
            if batch.target is not None:
                target = batch.target if batch.target.ndim == 3 else batch.target[..., None]
                seen = target[there][:, 1] if target.shape[-1] > 1 else torch.full_like(target[there][:, 0], torch.nan)
                found.append(torch.stack((self.predict_objects(x, boxes)[there], target[there][:, 0], seen)))
            if self.config.alpha and self.config.mask_ratio:
                ours, plain, count = self.reconstruction_errors(x, boxes, generator)
                errors += torch.stack((ours * count, plain * count, count)).double()
        figures: dict[str, float] = {}
        if found:
            pred, true, seen = torch.cat(found, 1).unbind()
            known = true.isfinite()
            if bool(known.any()):
                figures = distance_metrics(pred[known], true[known], seen[known])
                figures = {name: value for name, value in figures.items() if not math.isnan(value)}
        if errors[2] > 0:
            ours, plain = (errors[:2] / errors[2]).tolist()
            figures |= {"reconstruction_error": ours, "mean_color_error": plain}
        return figures

    @torch.no_grad()
    def reconstruction_errors(self, x: Tensor, boxes: Boxes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """L_mom in pixels under a fresh mask, the same for each crop's mean colour, and how many objects count in them."""
        padded = (boxes if isinstance(boxes, Tensor) else pad_boxes(boxes)).to(x)
        rows = box_rows(padded)
        crops = resized_crops(x, rows, self.config.crop)
        hidden = self.mask(crops, generator)
        objects = self._objects(x, padded, rows, crops=crops, hidden=hidden)
        weights = object_weights(crops, rows, **self.head.weighing)
        settings: dict[str, Any] = {"hidden": hidden, "grid": self.head.grid, "weights": weights}
        plain = object_cells(crops.mean((2, 3), keepdim=True).expand_as(crops), self.head.grid)
        ours = masked_object(self._pixels(objects), crops, **settings)
        return ours, masked_object(plain, crops, **settings), weights.sum()

    def _pixels(self, objects: Objects) -> Tensor:
        """Predicted cells in [0, 1]: normalised ones get their own mean and deviation back."""
        assert objects.predicted is not None and objects.crops is not None  # noqa: PT018
        if not self.config.norm_pix:
            return objects.predicted
        return denormalize_patches(objects.predicted, object_cells(objects.crops, self.head.grid))

    @torch.no_grad()
    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Up to eight objects, what is left of them, and visible cells with predicted hidden ones."""
        x, boxes = _boxed(batch)
        rows = box_rows(boxes)
        if not len(rows) or not self.config.mask_ratio:
            return {"picture": x}
        crops = resized_crops(x, rows, self.config.crop)
        hidden = self.mask(crops, generator)
        objects = self._objects(x, boxes, rows, crops=crops, hidden=hidden)
        cells, predicted, gone = object_cells(crops, self.head.grid), self._pixels(objects), hidden[..., None]
        shown = {"object": cells, "masked": torch.where(gone, 0.5, cells), "reconstruction": torch.where(gone, predicted, cells)}
        return {name: object_pixels(v[:8], self.head.grid, self.config.crop).clamp(0, 1) for name, v in shown.items()}


SMALL: dict[str, Any] = {
    "steps": 600, "batch_size": 8, "backbone": "conv", "use_centers": False, "grid": 4, "crop": (16, 16), "roi_dim": 48,
    "dim": 48, "encoder_depth": 2, "encoder_heads": 4, "decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 4,
    "head_dim": 64, "token_std": 0.02, "box_geometry": True, "output": "exp", "alpha": 10.0, "distance_warmup": (0.0, 0.0),
    "min_box": 1.0, "lr": 2e-3, "weight_decay": 1e-2, "schedule": "cosine", "flip": False,
}  # fmt: skip


def _boxed(batch: Batch) -> tuple[Tensor, Tensor]:
    if batch.boxes is None:
        raise BadData("distances are those of boxed objects: give kitti:FOLDER, sample:scenes, or a Batch with boxes [B, n, 4]")
    return batch.x, batch.boxes


def _geometry(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre and log-size of each box over the frame's: `[N, 4]`."""
    frame = rows.new_tensor([size[1], size[0]])
    side = (rows[:, 3:] - rows[:, 1:3]).clamp(min=1) / frame
    return torch.cat(((rows[:, 1:3] + rows[:, 3:]) / (2 * frame), side.log()), 1)


# ---- the claims

ARMS: dict[str, dict[str, float]] = {
    "base": {"mask_ratio": 0.0, "alpha": 0.0},
    "mask only": {"mask_ratio": 0.5, "alpha": 0.0},
    "MoM": {"mask_ratio": 0.5, "alpha": 10.0},
}
TRAIN_FRAMES, TEST_FRAMES, EPOCHS = 192, 150, 40
"""So many that the base recognises digits: with 64 frames it is no better than a guess from the boxes alone (0.34)."""
SHARE = "occluded AbsRel, base = 1"


@claim(
    "Masked object modelling makes distances more robust to occlusion than the same network without it",
    Better(SHARE, "MoM", over="base", by=0.03, higher=False),
    seeds=range(100, 105),
    note="Two fifths of every object covered by grey. Masking alone and clean accuracy are reported, not judged.",
)
def occlusion(lab: Lab) -> Figures:
    """192 drawn frames of digits at 4 to 20 m, 40 epochs; three arms from the same weights on the same frames."""
    train, test = _scenes(lab)
    assert test.boxes is not None
    hidden = Batch(cover(test.x, test.boxes, 0.4, generator=lab.generator), test.index, target=test.target, boxes=test.boxes)
    lab.picture("covered", hidden.x[:8])
    figures: Figures = {}
    for arm, model in _trained(lab, train, ARMS).items():
        figures[arm] = {"AbsRel": model.evaluate([test])["abs_rel"], "occluded AbsRel": model.evaluate([hidden])["abs_rel"]}
    for found in figures.values():
        found[SHARE] = found["occluded AbsRel"] / figures["base"]["occluded AbsRel"]
    return figures


@claim(
    "What is hidden of unseen objects is predicted better than by their mean colour",
    Better("squared error", "MoM", over="mean colour", higher=False),
    seeds=range(100, 105),
    note="The mean colour is that of the whole crop, hidden cells included.",
)
def reconstruction(lab: Lab) -> Figures:
    """The MoM arm of `occlusion` after 10 epochs, on test frames under fresh masks."""
    train, test = _scenes(lab)
    model = _trained(lab, train, {"MoM": ARMS["MoM"]}, epochs=10)["MoM"]
    assert test.boxes is not None
    ours, plain, _ = model.reconstruction_errors(test.x, test.boxes, lab.generator)
    for name, pictures in model.preview(Batch(test.x[:4], test.index[:4], boxes=test.boxes[:4]), lab.generator).items():
        lab.picture(name, pictures)
    return {"MoM": {"squared error": float(ours)}, "mean colour": {"squared error": float(plain)}}


def _scenes(lab: Lab) -> tuple[Batch, Batch]:
    """Frames to train and to test on; a few of each where the budget is small."""
    from sfumato.data import perspective_scenes

    generator = lab.generator
    train = perspective_scenes(max(16, lab.steps(TRAIN_FRAMES)), split="train", generator=generator)
    return train, perspective_scenes(max(16, lab.steps(TEST_FRAMES)), split="test", generator=generator)


def _trained(lab: Lab, train: Batch, arms: dict[str, dict[str, float]], *, epochs: int = EPOCHS) -> dict[str, MoM]:
    torch.manual_seed(lab.seed)
    first = MoM(MoM.Config.small()).state_dict()
    models: dict[str, MoM] = {}
    for arm, settings in arms.items():
        model = MoM(MoM.Config.small(**settings))
        model.load_state_dict(copy.deepcopy(first))
        models[arm] = lab.fit(model, train, steps=lab.steps(epochs * TRAIN_FRAMES // model.config.batch_size))
    return models


def cover(x: Tensor, boxes: Tensor, share: float, *, generator: torch.Generator | None = None) -> Tensor:
    """A grey strip over a share of every box, from one of its four sides.

    Args:
        x: `[B, C, H, W]` in [0, 1].
        boxes: `[B, n, 4]` xyxy in pixels, rows of NaN where there is none.
        share: covered share of each box's area, by its own strip; others' may cover more.
        generator: source of the sides.

    Returns:
        Like `x`.
    """
    side = torch.randint(4, boxes.shape[:2], generator=generator)
    first, last = boxes[..., :2], boxes[..., 2:]
    reach = (last - first) * share
    axis = torch.nn.functional.one_hot(side % 2, 2).bool()  # x or y
    begins = torch.where(axis & (side >= 2)[..., None], last - reach, first)
    ends = torch.where(axis & (side < 2)[..., None], first + reach, last)
    return torch.where(_inside(torch.cat((begins, ends), -1), x.shape[-2:]).any(1, keepdim=True), 0.5, x)


def _inside(boxes: Tensor, size: Any) -> Tensor:
    """Pixels whose centre lies in each box, `[B, n, H, W]` bool."""
    y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in size)
    x1, y1, x2, y2 = (v[..., None] for v in boxes.unbind(-1))
    return ((y >= y1) & (y < y2))[..., :, None] & ((x >= x1) & (x < x2))[..., None, :]


@claim(
    "Masks of objects never hide an object as a whole; masks of frames do, the smaller the more often",
    Holds(
        "frame masks hide more of the objects smaller than a patch than of larger ones",
        lambda f: f["frame masks"]["hidden, small"] > f["frame masks"]["hidden, large"],
    ),
    Holds(
        "object masks hide no object as a whole",
        lambda f: f["object masks"]["hidden, small"] == 0 == f["object masks"]["hidden, large"],
    ),
    Holds("object masks leave 32 of 64 cells of every object", lambda f: f["object masks"]["least visible"] == 0.5),
    seeds=range(100, 105),
    note="A count without training: frames of 64 pixels, patches of 16, half of them hidden.",
)
def whole_objects(lab: Lab) -> Figures:
    """Shares of boxed objects of which nothing is left to see, under both kinds of mask at the same ratio."""
    from sfumato.data import perspective_scenes

    generator = lab.generator
    frames = perspective_scenes(lab.steps(400), generator=generator)
    assert frames.boxes is not None
    inside = _inside(frames.boxes, frames.x.shape[-2:])
    there = frames.boxes.isfinite().all(-1)
    seen = ~upsample_mask(random_mask(len(frames), 4, 0.5, rule="hide_floor", generator=generator), 4, 16)
    visible = ((inside & seen).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1))[there]
    small = (frames.boxes[..., 3] - frames.boxes[..., 1])[there] < 16
    head = MoMHead(None, 1, 1, dim=24, grid=8, crop=(8, 8))
    kept = 1 - head.draw_mask(int(there.sum()), generator=generator).float().mean(1)
    return {
        arm: {
            "hidden, small": float((share[small] == 0).float().mean()),
            "hidden, large": float((share[~small] == 0).float().mean()),
            "least visible": float(share.min()),
        }
        for arm, share in (("frame masks", visible), ("object masks", kept))
    }
