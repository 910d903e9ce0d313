"""DMJD: two masked views of each image that hide other places, and visible tokens that predict the target as well.

    L = mean_hidden |x̂ - t|² + θ mean_visible smooth-L1(v̂, t)        t: whitened gradient histograms, or normalised pixels
    learning rate = base · images / 256 · predict / ratio            predict: share of the tokens hidden in some view

Each image is loaded and augmented once; an encoder of visible tokens embeds each of them once a view. The hidden ones are
predicted by a decoder as in MAE, the visible ones by a head without attention straight from the encoder's output. The encoder
is a ViT behind convolutional stages (ConvMAE's), or a plain ViT.

Source: "Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling" 2022, arXiv 2301.00230. More than two views
and drawing the second one for each sample by itself are ours. The official code pairs visible tokens with targets in another
order; here both stand in raster order.

>>> import torch
>>> from sfumato.papers.masking.dmjd import DMJD
>>> model = DMJD(DMJD.Config.small())
>>> x = torch.rand(2, 3, 32, 32)
>>> hidden = model.mask(x, torch.Generator().manual_seed(0))  # all first views, then all second ones
>>> hidden.shape, hidden.view(2, 2, 64).any(0).all().item()
(torch.Size([4, 64]), True)
>>> DMJD(DMJD.Config.small(encoder="convit", target="hog")).encode(x).shape
torch.Size([2, 64])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.errors import BadSetting
from sfumato.losses import masked_mean
from sfumato.masks import as_views, count_hidden, disjoint_masks, random_mask, take_tokens, to_ids
from sfumato.method import Batch, Context
from sfumato.nn import ConvStemViT, MaskedDecoder, MaskedViTEncoder, hog_image, hog_tokens, patchify, unpatchify
from sfumato.optim import lr_for_batch
from sfumato.papers.masking.mae import SMALL_ENCODER, MaskedConfig, MaskedImageModel

ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": partial(F.mse_loss, reduction="none"),
    "smooth_l1": partial(F.smooth_l1_loss, beta=2.0, reduction="none"),
}
"""Error of each number; smooth L1 is d² / 4 below 2, |d| - 1 above."""
PIXEL_EPS = 1e-5
"""Added to the variance of a patch's pixels."""


def predicted_share_lr(base_lr: float, batch: int, predict: float, corrupt: float) -> float:
    """The learning rate of several views: images count by what is predicted of them, not by how often they are shown.

    Args:
        base_lr: rate for 256 images under one mask.
        batch: different images a step.
        predict: share of the tokens that is hidden in some view.
        corrupt: share that each view hides.

    Returns:
        `base_lr · batch / 256 · predict / corrupt`.

    >>> round(predicted_share_lr(6e-4, 512, 1.0, 0.6), 6)
    0.002
    """
    return lr_for_batch(base_lr, 256, batch) * predict / corrupt


class VisibleHead(nn.Sequential):
    """Three linear layers with LayerNorm and GELU between them, then the prediction: `[..., dim]` to `[..., out]`.

    Args:
        dim: width of the encoder's tokens.
        hidden: width of the layers.
        out: numbers predicted for each token.
    """

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        first = nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU()
        second = nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.GELU()
        third = nn.Linear(hidden, hidden), nn.LayerNorm(hidden, elementwise_affine=False)
        super().__init__(*first, *second, *third, nn.Linear(hidden, out))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


def joint_errors(
    predicted: Tensor,
    visible: Tensor | None,
    target: Tensor,
    hidden: Tensor,
    *,
    masked_error: str = "l2",
    visible_error: str = "smooth_l1",
) -> tuple[Tensor, Tensor]:
    """The errors of both branches; the loss is the first plus θ times the second.

    Args:
        predicted: `[B, L, d]`, the decoder's; counted where hidden.
        visible: `[B, n, d]`, the visible head's, in raster order; None: no such branch.
        target: `[B, L, d]`.
        hidden: `[B, L]` bool, True = hidden, equally many in each row.
        masked_error: "l2" or "smooth_l1" (β = 2) for hidden tokens.
        visible_error: the same for visible ones.

    Returns:
        Mean over hidden tokens, and mean over visible ones (0 without that branch).
    """
    masked = masked_mean(ERRORS[masked_error](predicted, target).mean(-1), hidden)
    if visible is None:
        return masked, masked.new_zeros(())
    seen = take_tokens(target, to_ids(hidden, n_keep=visible.shape[1])[0])
    return masked, ERRORS[visible_error](visible, seen).mean()


class DMJD(MaskedImageModel):
    """Disjoint masked views, a decoder for what is hidden, and a head that makes visible tokens predict the same target."""

    encoder: MaskedViTEncoder | ConvStemViT  # type: ignore[assignment]

    class Config(MaskedConfig):
        """ConViT-B with gradient histograms, 400 epochs of ImageNet-1k."""

        steps: int = Field(1_000_000, gt=0, description="optimizer steps; 400 epochs of ImageNet-1k")
        batch_size: int = Field(512, gt=0, description="different images a step, each shown `views` times")
        encoder: Literal["convit", "vit"] = Field(
            "convit", description="convit: a ViT behind convolutional stages; vit: a plain one, which timm loads"
        )
        depth: int = Field(11, gt=0, description="transformer blocks of the encoder; ViT-B has 12")
        stem_dims: tuple[int, int] = Field((256, 384), description="convit: channels of the two convolutional stages")
        stem_blocks: tuple[int, int] = Field((2, 2), description="convit: blocks of the two convolutional stages")
        stem_mlp_ratio: float = Field(8.0, gt=0, description="convit: hidden width of the stages' MLPs over their channels")
        decoder_dim: int = Field(512, gt=0, description="width of the decoder, a multiple of 4 and of decoder_heads")
        decoder_depth: int = Field(8, gt=0, description="blocks of the decoder")
        decoder_heads: int = Field(16, gt=0, description="attention heads of the decoder")
        target: Literal["hog", "pixels"] = Field(
            "hog", description="what is predicted: whitened gradient histograms, or pixels normalised within each patch"
        )
        hog_cell: int | None = Field(None, gt=0, description="side of a histogram's cell, pixels; None: half a patch")
        mask_ratio: float = Field(0.6, gt=0, le=1, description="share of the mask units that a view hides")
        mask_unit: int = Field(32, gt=0, description="side of a mask unit, pixels; a multiple of patch")
        views: int = Field(2, ge=1, description="masked views of each image; predict / mask_ratio, rounded up, reach predict")
        predict: float = Field(1.0, gt=0, le=1, description="share of the units that some view hides; at least mask_ratio")
        disjoint: bool = Field(True, description="views hide different units; off: drawn independently, the control")
        theta: float = Field(1.0, ge=0, description="weight of the visible tokens' error (θ); 0: no such branch")
        visible_dim: int = Field(512, gt=0, description="width of the visible tokens' head")
        masked_error: Literal["l2", "smooth_l1"] = Field("l2", description="error of hidden tokens; smooth L1 with β = 2")
        visible_error: Literal["l2", "smooth_l1"] = Field("smooth_l1", description="error of visible tokens")
        base_lr: float = Field(
            6e-4, gt=0, description="peak learning rate for 256 images; scaled to batch_size and by predict / mask_ratio"
        )
        crop_scale: tuple[float, float] | None = Field(
            (0.5, 1.0), description="area of a random crop over the image's, from and to; None: images are taken whole"
        )

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Minutes on a CPU: a plain ViT, 32-pixel crops, 64 patches, normalised pixels; peak learning rate 2e-3."""
            settings: dict[str, Any] = {
                **SMALL_ENCODER, "encoder": "vit", "target": "pixels", "base_lr": 4.8e-3, "mask_unit": 8, "visible_dim": 48,
                "decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 4, "stem_dims": (16, 32), "stem_blocks": (1, 1),
            }  # fmt: skip
            return cls(**{**settings, **over})

        @classmethod
        def large(cls, **over: Any) -> Self:
            """ConViT-L."""
            sizes = {"dim": 1024, "depth": 23, "heads": 16, "stem_dims": (384, 768), "clip_norm": 3.0}
            return cls(**{**sizes, **over})

        @classmethod
        def vit(cls, **over: Any) -> Self:
            """ViT-B/16."""
            return cls(**{"encoder": "vit", "depth": 12, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        shape: tuple[Any, ...] = (c.image_size, c.patch, self.channels, c.dim, c.depth, c.heads)
        if c.encoder == "vit":
            self.encoder = MaskedViTEncoder(*shape, mlp_ratio=c.mlp_ratio)
        else:
            stem = {"stem_dims": c.stem_dims, "stem_blocks": c.stem_blocks, "stem_mlp_ratio": c.stem_mlp_ratio}
            self.encoder = ConvStemViT(*shape, mlp_ratio=c.mlp_ratio, **stem)
        self.cell = c.hog_cell or max(1, c.patch // 2)
        self._check()
        numbers = c.patch**2 * self.channels if c.target == "pixels" else (c.patch // self.cell) ** 2 * 9 * self.channels
        self.decoder = MaskedDecoder(
            c.dim, c.decoder_dim, c.decoder_depth, c.decoder_heads, numbers, self.encoder.grid,
            cls=bool(self.encoder.prefix), mlp_ratio=c.mlp_ratio,
        )  # fmt: skip
        self.visible_head = VisibleHead(c.dim, c.visible_dim, numbers) if c.theta else None

    def _check(self) -> None:
        """Settings that contradict each other, before a long training finds out."""
        c = self.config
        rows, columns = self.encoder.grid
        unit = c.mask_unit // c.patch
        if c.mask_unit % c.patch or rows % unit or columns % unit:
            raise BadSetting(f"mask_unit={c.mask_unit} must be a multiple of patch={c.patch} and a divisor of the image's side")
        if c.predict < c.mask_ratio:
            raise BadSetting(f"predict={c.predict} is below mask_ratio={c.mask_ratio}: one view already hides more")
        units = rows * columns // unit**2
        if count_hidden(units, c.mask_ratio) == units:
            raise BadSetting(f"mask_ratio={c.mask_ratio} hides all {units} units of {c.mask_unit} pixels: lower one of the two")
        if c.target == "hog" and c.patch % self.cell:
            raise BadSetting(f"hog_cell={self.cell} must be a divisor of patch={c.patch}")

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Disjoint views (or independent ones) of units of patches, `[V B, L]`, all first views first."""
        c, grid = self.config, self.encoder.grid
        unit = c.mask_unit // c.patch
        if c.disjoint:
            masks = disjoint_masks(len(x), grid, c.mask_ratio, views=c.views, predict=c.predict, unit=unit, generator=generator)
            return masks.flatten(0, 1)
        return disjoint_masks(c.views * len(x), grid, c.mask_ratio, views=1, unit=unit, generator=generator)[0]

    def target(self, x: Tensor) -> Tensor:
        """What is to be predicted of normalised images, `[B, L, d]`."""
        c = self.config
        if c.target == "hog":
            return hog_tokens(x * self.std + self.mean, c.patch, cell=self.cell)  # of the picture as it was taken
        patches = patchify(x, c.patch)
        return F.layer_norm(patches, patches.shape[-1:], eps=PIXEL_EPS)

    def errors(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean error of the hidden tokens, and of the visible ones (0 without that branch), of normalised images.

        Args:
            x: `[B, C, H, W]`.
            hidden: `[V B, L]` bool, all first views first; the target of an image is made once.
        """
        c = self.config
        z = self.encoder(x, hidden)
        visible = None if self.visible_head is None else self.visible_head(z[:, self.encoder.prefix :])
        target = as_views(self.target(x), hidden)
        return joint_errors(
            self.decoder(z, hidden), visible, target, hidden, masked_error=c.masked_error, visible_error=c.visible_error
        )

    def errors_under(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The decoder's error of each token, as the loss has it: of histograms or normalised pixels, `[B, L]`."""
        predicted = self.decoder(self.encoder(x, hidden), hidden)
        return ERRORS[self.config.masked_error](predicted, self.target(x)).mean(-1)

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The error of the hidden tokens plus θ times that of the visible ones."""
        masked, visible = self.errors(x, hidden)
        return masked + self.config.theta * visible

    def loss_of_views(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The same: what views share is done once in it."""
        return self.masked_loss(x, hidden)

    def predict_image(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The prediction as an image: pixels with their patch's own mean and deviation, or histograms drawn as lines."""
        c, grid = self.config, self.encoder.grid
        predicted = self.decoder(self.encoder(x, hidden), hidden)
        if c.target == "hog":
            return self.normalised(hog_image(predicted, c.patch, grid, cell=self.cell))
        var, mean = torch.var_mean(patchify(x, c.patch), -1, correction=0, keepdim=True)
        return unpatchify(predicted * (var + PIXEL_EPS).sqrt() + mean, c.patch, grid, self.channels)

    def optimizers(self) -> dict[str, Optimizer]:
        """AdamW as in MAE, at the rate of `predicted_share_lr`."""
        c = self.config
        optimizers = super().optimizers()
        share = min(c.predict, c.views * c.mask_ratio)
        for group in optimizers["net"].param_groups:
            group["lr"] = predicted_share_lr(c.base_lr, c.batch_size, share, c.mask_ratio)
        return optimizers

    def timm_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The plain ViT for timm, see `MaskedViTEncoder.timm_weights`.

        Raises:
            BadSetting: the other encoder, which timm has not.
        """
        if isinstance(self.encoder, MaskedViTEncoder):
            return self.encoder.timm_weights()
        raise BadSetting("timm has no ViT behind convolutional stages: train with encoder=vit to export it")


# ---- the claims

DIGITS: dict[str, Any] = {
    "steps": 400, "image_size": 8, "patch": 2, "mask_unit": 2, "channels": 1, "theta": 0.0, "crop_scale": None, "flip": False,
}  # fmt: skip
ONE_VIEW = {"views": 1, "base_lr": 8e-3}  # a peak of 2e-3, as in all arms
QUARTERS = (25, 50, 75, 100)


class _Watched(DMJD):
    """Notes how well it predicts hidden tokens of held-out images after each quarter of the training."""

    def watch(self, x: Tensor, hidden: Tensor) -> None:
        self.held_out = self.normalised(x), hidden
        self.noted: list[float] = []

    def steps(self, ctx: Context) -> Any:
        yield from super().steps(ctx)
        if 4 * (ctx.step + 1) // ctx.total > 4 * ctx.step // ctx.total:
            with torch.no_grad():
                self.noted.append(float(self.errors(*self.held_out)[0]))


def _trained(lab: Lab, train: Batch, test: Batch, **settings: Any) -> _Watched:
    """One arm; all start from the same weights and load the same images in the same order."""
    torch.manual_seed(lab.seed)
    model = _Watched(_Watched.Config.small(**{**DIGITS, **settings}))
    model.watch(test.x, random_mask(len(test), model.encoder.grid, model.config.mask_ratio, generator=lab.generator))
    trained: _Watched = lab.fit(model, train.x, steps=max(4, lab.steps(DIGITS["steps"])))
    return trained


def _losses(model: _Watched) -> dict[str, float]:
    return {f"hidden loss at {q} %": loss for q, loss in zip(QUARTERS, model.noted, strict=True)}


def _draw(lab: Lab, arms: dict[str, _Watched]) -> None:
    for name, model in arms.items():
        lab.curve(name, QUARTERS, model.noted, xlabel="share of the training, %", ylabel="loss of hidden tokens, held out")


@claim(
    "At equally many loaded images, two disjoint views predict hidden tokens better than one view does, all along the training",
    *(Better(f"hidden loss at {q} %", "disjoint views", over="one view", higher=False) for q in QUARTERS),
    seeds=range(100, 105),
    note="Two views take twice the computation of one for each loaded image; the claim is about images, not about time.",
)
def disjoint_views(lab: Lab) -> Figures:
    """Digits 8 x 8, 2-pixel patches, 60 % hidden, normalised pixels; 400 steps of 64 images."""
    from sfumato.data import digits

    train, test = digits(seed=lab.seed)
    arms = {
        "one view": _trained(lab, train, test, **ONE_VIEW),
        "disjoint views": _trained(lab, train, test),
    }
    _draw(lab, arms)
    shown = Batch(test.x[:8], test.index[:8])
    lab.picture("reconstruction", arms["disjoint views"].preview(shown, lab.generator)["reconstruction"])
    return {name: _losses(model) for name, model in arms.items()}


@claim(
    "Disjoint views hide every token, independent ones do not; at the same cost they predict hidden tokens better",
    Holds("two disjoint views hide every token of every image", lambda f: f["disjoint views"]["coverage"] == 1),
    Holds(
        "two independent views hide 1 - 0.375² = 0.859 of the tokens, up to 0.01",
        lambda f: abs(f["independent views"]["coverage"] - (1 - 0.375**2)) < 0.01,
    ),
    Better("hidden loss at 100 %", "disjoint views", over="independent views", higher=False),
    seeds=range(100, 105),
    note="The strict test of disjointness: two views in both arms. A small difference is expected. Of 16 tokens a view keeps 6.",
)
def disjoint_against_independent(lab: Lab) -> Figures:
    """The same training; coverage over 2048 pairs of masks."""
    from sfumato.data import digits

    train, test = digits(seed=lab.seed)
    arms = {
        "independent views": _trained(lab, train, test, disjoint=False),
        "disjoint views": _trained(lab, train, test),
    }
    _draw(lab, arms)
    blank = torch.zeros(2048, 1, 8, 8)
    return {
        name: {**_losses(m), "coverage": float(m.mask(blank, lab.generator).view(2, 2048, -1).any(0).float().mean())}
        for name, m in arms.items()
    }


@claim(
    "Making visible tokens predict the target too improves the representation that disjoint views learn",
    Better("linear probe", "disjoint views + distillation", over="disjoint views"),
    seeds=range(100, 105),
    note="Logistic regression on averaged tokens after 400 steps. So short a training need not beat the untrained encoder, whose "
    "figure stands beside it; that on standardised features, which does not depend on their scale, is shown and not judged.",
)
def joint_distillation(lab: Lab) -> Figures:
    """The same training with θ = 1 and with θ = 0."""
    from sfumato.data import digits
    from sfumato.probes import extract_features, linear_probe

    train, test = digits(seed=lab.seed)
    assert train.label is not None and test.label is not None  # noqa: PT018
    labels = train.label, test.label
    torch.manual_seed(lab.seed)
    untrained = DMJD(DMJD.Config.small(**DIGITS))
    arms = {
        "disjoint views": _trained(lab, train, test),
        "disjoint views + distillation": _trained(lab, train, test, theta=1.0),
    }
    _draw(lab, arms)

    def probe(model: DMJD) -> dict[str, float]:
        known, unknown = extract_features(model, train), (extract_features(model, test), labels[1])
        return {
            "linear probe": linear_probe(known, labels[0], test=unknown),
            "standardised probe": linear_probe(known, labels[0], test=unknown, scaler="standard"),
        }

    figures: Figures = {"untrained": probe(untrained)}
    for name, model in arms.items():
        figures[name] = {**probe(model), "hidden loss at 100 %": model.noted[-1]}
    return figures
