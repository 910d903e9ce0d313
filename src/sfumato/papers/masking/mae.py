"""MAE: hide three quarters of an image's patches, encode the rest, regress the hidden pixels. The base of the masking family.

    L = Σ_hidden mean_pixels (x̂ - t)² / #hidden,     t = the patch's pixels, mean 0 and variance 1

Source: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

>>> import torch
>>> from sfumato.engine import fit
>>> from sfumato.papers.masking.mae import MAE
>>> mae = fit(MAE(MAE.Config.small(steps=2)), torch.rand(64, 3, 40, 40), progress=False)
>>> mae.encode(torch.rand(2, 3, 50, 70)).shape
torch.Size([2, 64])

A variant of MAE overrides `own_mask`; one with another network is a `MaskedImageModel` with a `predict_image` and `masked_loss`
of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from sfumato.claim import Better, Figures, Lab, claim
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.losses import denormalize_patches, masked_patch_mse
from sfumato.masks import SCORED, as_views, fill, named_mask, random_mask, upsample_mask
from sfumato.method import Batch, Context, Loss, Method, MethodConfig, Step
from sfumato.nn import MaskedDecoder, MaskedViTEncoder, eval_mode, patchify, run_blocks, unpatchify
from sfumato.optim import cosine_warmup, lr_for_batch

COLOR_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's channels; their rounded averages stand in for images that are not RGB."""
GREY_STATISTICS = ((0.449,), (0.226,))


SMALL_ENCODER: dict[str, Any] = {
    "steps": 1000, "batch_size": 64, "image_size": 32, "patch": 4, "dim": 64, "depth": 3, "heads": 4, "base_lr": 8e-3,
}  # fmt: skip
"""What the CPU presets of the family share; the peak learning rate is 2e-3."""


MaskName = Literal[
    "own", "random", "block", "white", "red", "blue", "green", "purple", "disjoint", "progressive", "hard", "semantic"
]
MASK_SETTING = "which patches are hidden: own, as the paper does, or a mask of another (sfumato show masks)"


class MaskedConfig(MethodConfig):
    """What every masked model of the family can be set to; lengths in pixels, shares of 1."""

    image_size: int = Field(224, gt=0, description="side of the training crop, pixels")
    patch: int = Field(16, gt=0, description="side of a patch, pixels")
    channels: int | None = Field(None, gt=0, description="channels of an image; None: as the data has")
    dim: int = Field(768, gt=0, description="width of the encoder, a multiple of 4 and of heads")
    depth: int = Field(12, gt=0, description="blocks of the encoder")
    heads: int = Field(12, gt=0, description="attention heads of the encoder")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLPs over the block's width")
    mask_ratio: float = Field(0.75, ge=0, le=1, description="share of the patches that is hidden")
    mask: MaskName = Field("own", description=MASK_SETTING)
    base_lr: float = Field(1.5e-4, gt=0, description="peak learning rate for 256 samples a step; scaled to batch_size")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's, not on biases and norms")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    crop_scale: tuple[float, float] | None = Field(
        (0.2, 1.0), description="area of a random crop over the image's, from and to; None: images are taken whole"
    )
    flip: bool = Field(True, description="mirror half of the images; off for digits and letters")


class MaskedImageModel(Method):
    """Pixels from context: what MAE, SimMIM and their relatives share. Subclasses bring an encoder and three functions."""

    Config = MaskedConfig
    mean: Tensor
    std: Tensor
    encoder: MaskedViTEncoder

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.channels: int = self.config.channels or 3
        mean, std = COLOR_STATISTICS if self.channels == 3 else GREY_STATISTICS
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    # ---- what a subclass says

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Which patches the paper hides.

        Args:
            x: normalised images `[B, C, H, W]`, for masks that look at them.
            generator: source of the draw.
            progress: share of the training that is done, for masks that grow harder.

        Returns:
            `[B, L]` bool, or `[V B, L]` for V views of each image, all first views first.
        """
        raise NotImplementedError

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The loss of normalised images `[B, C, H, W]` under a mask `[B, L]`: a mean over samples."""
        raise NotImplementedError

    def loss_of_views(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The same under masks `[V B, L]`; for methods that do once what the views of an image share, such as the target."""
        return self.masked_loss(as_views(x, hidden), hidden)

    def predict_image(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What the network expects to see everywhere, as normalised images `[B, C, H, W]`."""
        raise NotImplementedError

    def lr_factor(self, progress: float) -> float:
        """The learning rate over its peak."""
        return cosine_warmup(progress, warmup=self.config.warmup)

    # ---- training

    def mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Which patches to hide: the paper's own mask, or the one that the settings name; all else as for `own_mask`."""
        name, c = self.config.mask, self.config
        if name == "own":
            return self.own_mask(x, generator, progress)
        scores = {"hard": self.patch_errors, "semantic": self.attention}[name](x, generator) if name in SCORED else None
        return named_mask(name, len(x), self.encoder.grid, c.mask_ratio, scores=scores, progress=progress, generator=generator)

    def evaluation_mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """As `mask` at the end of the training; uniformly random where that would follow the network, to compare networks."""
        if self.config.mask in SCORED:
            return random_mask(len(x), self.encoder.grid, self.config.mask_ratio, generator=generator)
        return self.mask(x, generator)

    @torch.no_grad()
    def patch_errors(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """How wrong the network is on each patch while it is hidden, by `errors_under`: `[B, L]`.

        Every patch is hidden once, in one of two complementary halves: two forward passes, in eval mode.
        """
        half = random_mask(len(x), self.encoder.grid, 0.5, generator=generator)
        with eval_mode(self):
            return torch.where(half, self.errors_under(x, half), self.errors_under(x, ~half))

    def errors_under(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The error of each patch under a mask `[B, L]`: the mean square of its pixels', or that of a method's own target.

        Returns:
            `[B, L]`, of which the hidden patches matter.
        """
        return patchify((self.predict_image(x, hidden) - x).square(), self.encoder.patch).mean(-1)

    @torch.no_grad()
    def attention(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """How much each patch is attended to in the last block, by the class token where there is one: `[B, L]`, mean of heads.

        In eval mode; all blocks but the last keep their fused attention.

        Raises:
            BadSetting: an encoder without attention.
        """
        del generator  # nothing is drawn
        if not isinstance(self.encoder, MaskedViTEncoder):
            raise BadSetting(f"mask=semantic asks for attention, and a {type(self.encoder).__name__} has none: take another mask")
        blocks, prefix = self.encoder.blocks, self.encoder.prefix
        with eval_mode(self.encoder):
            z, bias = self.encoder.embed(x)
            z, _, _ = run_blocks(blocks[:-1], z, bias=bias)
            _, _, maps = run_blocks(blocks[-1:], z, bias=bias, attention=True)
        last = maps[0].mean(1)
        return last[:, 0, prefix:] if prefix else last.mean(1)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """Draw a mask, predict what it hides.

        Raises:
            BadData: pictures of another size, which only a loader of one's own gives.
        """
        (height, width), side = batch.x.shape[-2:], self.config.image_size
        if (height, width) != (side, side):
            raise BadData(f"pictures are {height} x {width}, the network takes {side} x {side}: set image_size, or crop them")
        x = self.normalised(batch.x)
        hidden = self.mask(x, ctx.generator, ctx.progress)
        return Loss(self.loss_of_views(x, hidden), len(batch))

    def steps(self, ctx: Context) -> Any:
        """One step of AdamW at this moment's learning rate."""
        ctx.scale_lr(self.lr_factor(ctx.progress))
        yield Step("net", (self.loss,))

    def optimizers(self) -> dict[str, Optimizer]:
        """AdamW on `decay_groups`."""
        c = self.config
        rate = lr_for_batch(c.base_lr, 256, c.batch_size)
        return {"net": torch.optim.AdamW(self.decay_groups(), rate, betas=c.betas, fused=True)}

    def decay_groups(self) -> list[dict[str, Any]]:
        """Biases, norms, mask tokens and position tables without weight decay, then everything else with it."""
        from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

        plain = [n for n, _ in self.named_parameters() if n.endswith(("mask_token", "pos_embed", "position_bias.table"))]
        groups: list[dict[str, Any]] = param_groups_weight_decay(self, self.config.weight_decay, no_weight_decay_list=plain)
        return groups

    def augment(self) -> Callable[..., Any] | None:
        """A random crop, bicubic, and a random flip."""
        from torchvision.transforms import InterpolationMode, v2

        c, steps = self.config, []
        if c.crop_scale is not None:
            crop = v2.RandomResizedCrop(c.image_size, scale=c.crop_scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
            steps += [crop, v2.Lambda(_clamp_floats)]
        if c.flip:
            steps.append(v2.RandomHorizontalFlip())
        return v2.Compose(steps) if steps else None

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Start with the encoder of another masked model, and with all that is named and shaped alike."""
        if not isinstance(previous, MaskedImageModel):
            raise BadCheckpoint(f"{cls.__name__} starts from a masked image model, not from a {type(previous).__name__} run")
        method = cls(config)
        if type(method.encoder) is not type(previous.encoder):
            kinds = [type(m.encoder).__name__ for m in (previous, method)]
            raise BadCheckpoint(f"the run's encoder is a {kinds[0]}, this one is a {kinds[1]}: start from one of the same kind")
        try:
            method.encoder.load_state_dict(previous.encoder.state_dict())
        except RuntimeError:
            ours, theirs = method.encoder.settings, previous.encoder.settings
            unlike = [f"{k}={theirs[k]}" for k in ours if ours[k] != theirs[k]]
            raise BadCheckpoint(f"the run's encoder has other settings: use {', '.join(unlike)}") from None
        own, theirs = method.core.state_dict(), previous.core.state_dict()
        alike = {k: v for k, v in theirs.items() if isinstance(v, Tensor) and k in own and v.shape == own[k].shape}
        method.core.load_state_dict(alike, strict=False)
        return method

    @property
    def core(self) -> nn.Module:
        """Where encoder, decoder, head and mask token have the names of the family: here, or in what a method wraps."""
        return self

    # ---- use

    def encode(self, x: Tensor) -> Tensor:
        """Features of images of any size: short side resized, centre cropped, patch tokens averaged.

        Args:
            x: `[B, C, H, W]` in [0, 1].

        Returns:
            `[B, dim]`.
        """
        return self.encoder.features(self.normalised(self.to_size(x)))

    def timm_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The encoder for timm, see `MaskedViTEncoder.timm_weights`; its inputs are normalised with ImageNet's statistics."""
        return self.encoder.timm_weights()

    @torch.no_grad()
    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, what is left of them, and visible pixels with predicted hidden ones."""
        picture = self.to_size(batch.x)
        x = self.normalised(picture)
        hidden = self.mask(x, generator)[: len(x)]
        pixels = upsample_mask(hidden, self.encoder.grid, self.encoder.patch)
        predicted = self.predict_image(x, hidden) * self.std + self.mean
        return {
            "picture": picture,
            "masked": fill(picture, pixels, how="color", value=0.5),
            "reconstruction": torch.where(pixels, predicted, picture).clamp(0, 1),
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss on held-out images, under masks that are the same every time and for every checkpoint."""
        generator = torch.Generator(self.device).manual_seed(0)
        total = count = 0.0
        for batch in batches:
            x = self.normalised(self.to_size(batch.x))
            hidden = self.evaluation_mask(x, generator)
            total += float(self.loss_of_views(x, hidden)) * len(batch)
            count += len(batch)
        return {"masked_loss": total / count} if count else {}

    def normalised(self, x: Tensor) -> Tensor:
        """Images in [0, 1] with ImageNet's mean and deviation taken out."""
        return (x - self.mean) / self.std

    def to_size(self, x: Tensor) -> Tensor:
        """Images of any size as the network takes them: the short side resized, the middle cut out."""
        return _fitted(x, self.config.image_size)


class MAE(MaskedImageModel):
    """A masked autoencoder: the encoder sees a quarter of the patches, a small decoder the holes too."""

    class Config(MaskedConfig):
        """The base preset, 800 epochs of ImageNet-1k."""

        steps: int = Field(250_000, gt=0, description="optimizer steps; 800 epochs of ImageNet-1k")
        batch_size: int = Field(4096, gt=0, description="samples a step, over all micro-batches and processes")
        decoder_dim: int = Field(512, gt=0, description="width of the decoder, a multiple of 4 and of decoder_heads")
        decoder_depth: int = Field(8, gt=0, description="blocks of the decoder")
        decoder_heads: int = Field(16, gt=0, description="attention heads of the decoder")
        norm_pix: bool = Field(True, description="predict pixels normalised within each patch")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Minutes on a CPU: 32-pixel crops, 64 patches, 0.2 million weights."""
            return cls(**{**SMALL_ENCODER, "decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 4, **over})

        @classmethod
        def large(cls, **over: Any) -> Self:
            """ViT-L/16."""
            return cls(**{"dim": 1024, "depth": 24, "heads": 16, **over})

        @classmethod
        def huge(cls, **over: Any) -> Self:
            """ViT-H/14."""
            return cls(**{"dim": 1280, "depth": 32, "heads": 16, "patch": 14, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        self.encoder = MaskedViTEncoder(c.image_size, c.patch, self.channels, c.dim, c.depth, c.heads, mlp_ratio=c.mlp_ratio)
        numbers = c.patch**2 * self.channels
        self.decoder = MaskedDecoder(
            c.dim, c.decoder_dim, c.decoder_depth, c.decoder_heads, numbers, self.encoder.grid, mlp_ratio=c.mlp_ratio
        )

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Uniformly random, exactly L - floor(L (1 - ratio)) a sample."""
        return random_mask(len(x), self.encoder.grid, self.config.mask_ratio, generator=generator)

    def predict_patches(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Numbers for every patch, `[B, L, p²C]`, from the visible ones."""
        return self.decoder(self.encoder(x, hidden), hidden)  # type: ignore[no-any-return]

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Squared error of the hidden patches' (normalised) pixels."""
        return self.loss_of_prediction(self.predict_patches(x, hidden), x, hidden)

    def loss_of_prediction(self, predicted: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
        """The same of numbers for every patch, `[B, L, p²C]`."""
        return masked_patch_mse(predicted, patchify(x, self.config.patch), hidden, norm=self.config.norm_pix)

    def predict_image(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The prediction as an image; normalised pixels get their patch's own mean and deviation back."""
        return self.image_of_prediction(self.predict_patches(x, hidden), x)

    def image_of_prediction(self, predicted: Tensor, x: Tensor) -> Tensor:
        """Numbers for every patch as an image."""
        c = self.config
        if c.norm_pix:
            predicted = denormalize_patches(predicted, patchify(x, c.patch))
        return unpatchify(predicted, c.patch, self.encoder.grid, self.channels)


def _fitted(x: Tensor, size: int) -> Tensor:
    """Images of any size to `size` x `size`: the short side resized, the middle cut out."""
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x
    scale = size / min(height, width)
    resized = (max(size, round(height * scale)), max(size, round(width * scale)))
    x = F.interpolate(x, resized, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    return x[..., top : top + size, left : left + size]


def _clamp_floats(x: Tensor) -> Tensor:
    """Bicubic crops of float images overshoot; whole numbers saturate by themselves."""
    return x.clamp(0, 1) if x.is_floating_point() else x


# ---- the claim


@claim(
    "MAE pre-training on unlabelled digits helps when only 100 labels are known",
    Better("accuracy", "pre-trained", over="from scratch", by=0.05),
    seeds=range(100, 105),
    note="Both arms start from the same weights and fine-tune on the same 100 digits in the same order.",
)
def few_labels(lab: Lab) -> Figures:
    """Digits 8 x 8, 2-pixel patches, 60 % hidden, raw pixels; then 150 steps on 100 labels."""
    from sfumato.data import digits
    from sfumato.probes import extract_features, finetune_probe, linear_probe

    train, test = digits(seed=lab.seed)
    assert train.label is not None and test.label is not None  # noqa: PT018
    labels = train.label, test.label
    settings = {
        "image_size": 8,
        "patch": 2,
        "channels": 1,
        "mask_ratio": 0.6,
        "norm_pix": False,
        "crop_scale": None,
        "flip": False,
    }
    torch.manual_seed(lab.seed)
    scratch = MAE(MAE.Config.small(**settings))
    trained = lab.fit(copy.deepcopy(scratch), train.x, steps=lab.steps(1000))
    lab.picture("reconstruction", trained.preview(Batch(test.x[:8], test.index[:8]), lab.generator)["reconstruction"])

    def judged(model: MAE) -> dict[str, float]:
        known, unknown = extract_features(model, train), extract_features(model, test)
        return {
            "accuracy": finetune_probe(model, train, test=test, steps=lab.steps(150), generator=lab.generator),
            "linear probe": linear_probe(known, labels[0], test=(unknown, labels[1])),
        }

    return {"pre-trained": judged(trained), "from scratch": judged(scratch)}
