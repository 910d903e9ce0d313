"""MFM: hide frequencies instead of patches, and predict the spectrum that is missing.

    x_c = clamp( Re F⁻¹( (1 - m) F(x) ), 0, 1 ),   m = 1 at hidden frequencies: beyond a disc (low-pass), or inside (high-pass)
    L = Σ_hidden |F(x̂) - F(x)| / #hidden,          F orthonormal, of each channel; x̂ = head( encoder(x_c) ), x normalised

The input is an ordinary picture, blurred or all edges: no mask token and no second network, so it teaches convolutional
networks as it does transformers. Three restoration tasks, super-resolution, deblurring and denoising, are baselines with the
same head; they count the whole spectrum.

Source: "Masked Frequency Modeling for Self-Supervised Visual Pre-Training", ICLR 2023, arXiv 2206.07706. Its radius is 16 at
224 pixels; in proportion for other sizes is ours, and so is the small convolutional network.

>>> import torch
>>> from sfumato.papers.masking.mfm import MFM
>>> model = MFM(MFM.Config.small(network="small"))
>>> x = torch.rand(2, 3, 32, 32)
>>> hidden = model.mask(x, torch.Generator().manual_seed(0))
>>> hidden.shape, model.predict_image(model.normalised(x), hidden).shape, model.encode(x).shape
(torch.Size([2, 32, 32]), torch.Size([2, 3, 32, 32]), torch.Size([2, 64]))
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.errors import BadSetting
from sfumato.losses import frequency_loss
from sfumato.masks import frequency_disc, random_frequency_mask
from sfumato.method import Batch, Context, Loss
from sfumato.nn import MaskedConvEncoder, MaskedDecoder, MaskedViTEncoder, PixelShuffleHead, reflect_pad, unpatchify
from sfumato.optim import cosine_warmup
from sfumato.papers.masking.mae import SMALL_ENCODER, MaskedConfig, MaskedImageModel
from sfumato.physics import apply_frequency_mask, gaussian_or_poisson_noise, random_blur_kernels


class MFM(MaskedImageModel):
    """Frequencies from frequencies, for a vision transformer or a convolutional network."""

    class Config(MaskedConfig):
        """ViT-B, 300 epochs of ImageNet-1k."""

        mask_ratio: ClassVar[None] = None  # type: ignore[misc]  # a disc is hidden, not a share of the patches
        mask: ClassVar[str] = "own"  # type: ignore[misc]
        steps: int = Field(187_500, gt=0, description="optimizer steps; 300 epochs of ImageNet-1k")
        batch_size: int = Field(2048, gt=0, description="samples a step, over all micro-batches and processes")
        clip_norm: float | None = Field(3.0, gt=0, description="largest gradient norm; None: no clipping")
        warmup: float = Field(0.0667, ge=0, lt=1, description="share of the steps over which the learning rate rises")
        final_lr: float = Field(0.0083, ge=0, le=1, description="learning rate at the end over its peak")
        network: str = Field("vit", description="vit, small (three stages, a CPU's) or a convolutional network of timm")
        positions: str = Field("learned", pattern="^(learned|sincos)$", description="how a vit's tokens know their place")
        decoder_depth: int = Field(0, ge=0, description="blocks of a decoder between a vit and the head")
        decoder_dim: int = Field(512, gt=0, description="width of the decoder, a multiple of 4 and of decoder_heads")
        decoder_heads: int = Field(16, gt=0, description="attention heads of the decoder")
        corruption: Literal["frequency", "super_resolution", "deblur", "denoise"] = Field(
            "frequency", description="what the network undoes; all but frequency are baselines"
        )
        target: Literal["masked", "normal"] | None = Field(
            None, description="frequencies that count: masked, or normal (all); None: masked for frequency, else normal"
        )
        radius: float | None = Field(
            None, ge=0, description="of the disc, cycles a picture; None: 16 at 224 pixels, in proportion, at least 2"
        )
        outer_radius: float | None = Field(None, gt=0, description="a low-pass keeps frequencies from here on; None: hides all")
        low_pass_share: float | None = Field(
            None, ge=0, le=1, description="share of low-passed pictures, the others are high-passed; None: 0.5 (vit) or 0.3"
        )
        scale: int = Field(8, gt=1, description="of super_resolution: how many times smaller a picture is made, each side")
        power: float = Field(1.0, gt=0, description="of the distance of two spectra in the loss")
        focal: bool = Field(False, description="weigh frequencies by their distance")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Minutes on a CPU: 32-pixel crops, a disc of radius 3."""
            return cls(**{**SMALL_ENCODER, "radius": 3.0, **over})

        @classmethod
        def resnet50(cls, **over: Any) -> Self:
            """ResNet-50."""
            return cls(**{"network": "resnet50", **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        if c.corruption != "frequency" and c.target == "masked":
            raise BadSetting(f"corruption={c.corruption} removes no set of frequencies: leave target at none, or say normal")
        self.masked = c.corruption == "frequency" and c.target != "normal"
        self.vit = c.network == "vit"
        self.decoder: MaskedDecoder | None = None
        if self.vit:
            self.encoder = MaskedViTEncoder(
                c.image_size, c.patch, self.channels, c.dim, c.depth, c.heads, mlp_ratio=c.mlp_ratio, positions=c.positions
            )
        else:
            if c.decoder_depth:
                raise BadSetting(f"decoder_depth={c.decoder_depth}: a decoder stands behind network=vit, not behind {c.network}")
            own = {"dim": c.dim} if c.network == "small" else {}
            convnet = MaskedConvEncoder(c.network, c.image_size, self.channels, scales=1, model_settings=own, sparse=False)
            self.encoder = convnet  # type: ignore[assignment]
        if c.decoder_depth:
            numbers = c.patch**2 * self.channels
            self.decoder = MaskedDecoder(
                c.dim, c.decoder_dim, c.decoder_depth, c.decoder_heads, numbers, self.encoder.grid, mlp_ratio=c.mlp_ratio
            )
            self.decoder.mask_token.requires_grad_(False)  # nothing is hidden from it
        else:
            self.head = PixelShuffleHead(self.encoder.dim, self.encoder.patch, self.channels)

    # ---- the corruption

    @property
    def radius(self) -> float:
        """Of the disc, in cycles a picture."""
        c = self.config
        return c.radius if c.radius is not None else max(2.0, 16 * c.image_size / 224)

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Which frequencies are hidden, `[B, H, W]` bool, centred: unlike its relatives' masks, not of patches."""
        c = self.config
        share = c.low_pass_share if c.low_pass_share is not None else 0.5 if self.vit else 0.3
        size = (x.shape[-2], x.shape[-1])
        return random_frequency_mask(len(x), size, self.radius, share, outer=c.outer_radius, device=x.device, generator=generator)

    def patch_errors(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Of no use here.

        Raises:
            BadSetting: always.
        """
        raise BadSetting("MFM hides frequencies, not patches: it has no errors of patches")

    def corrupt(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """What the network gets to see of pictures.

        Args:
            x: `[B, C, H, W]` in [0, 1].
            generator: source of the draw.
            progress: share of the training that is done.

        Returns:
            Pictures like `x`, and which of their frequencies were removed, `[B, H, W]`, or None.
        """
        kind = self.config.corruption
        if kind == "frequency":
            hidden = self.mask(x, generator, progress)
            return apply_frequency_mask(x, hidden), hidden
        if kind == "super_resolution":
            return _smaller_and_back(x, self.config.scale), None
        if kind == "deblur":
            return _blurred(x, random_blur_kernels(len(x), device=x.device, generator=generator).to(x.dtype)), None
        return gaussian_or_poisson_noise(x, generator=generator), None

    # ---- the network

    def reconstruct(self, seen: Tensor) -> Tensor:
        """What the network makes of corrupted pictures `[B, C, H, W]` in [0, 1]: normalised ones."""
        x = self.normalised(seen)
        if not self.vit:
            return self.head(self.encoder(x)[-1])  # type: ignore[no-any-return]
        patch = self.encoder.patch
        tokens, grid = self.encoder(x), (x.shape[-2] // patch, x.shape[-1] // patch)
        if self.decoder is None:
            return self.head(tokens[:, self.encoder.prefix :], grid=grid)  # type: ignore[no-any-return]
        nothing = torch.zeros(len(x), grid[0] * grid[1], dtype=torch.bool, device=x.device)
        return unpatchify(self.decoder(tokens, nothing), patch, grid, self.channels, order="chw")

    def predict_image(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What the network makes of normalised pictures without the hidden frequencies `[B, H, W]`."""
        return self.reconstruct(apply_frequency_mask(x * self.std + self.mean, hidden))

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Distance of the spectra at the hidden frequencies `[B, H, W]` (of all, with target=normal)."""
        return self._distance(self.predict_image(x, hidden), x, hidden)

    def _distance(self, predicted: Tensor, x: Tensor, hidden: Tensor | None) -> Tensor:
        c = self.config
        counted = hidden if self.masked else None
        return frequency_loss(predicted, x, counted, power=c.power, weight="focal" if c.focal else None)

    # ---- training

    def lr_factor(self, progress: float) -> float:
        """A straight rise, then half a cosine down to `final_lr`."""
        return cosine_warmup(progress, warmup=self.config.warmup, floor=self.config.final_lr)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """Corrupt, reconstruct, compare spectra: a mean over the hidden frequencies of all samples, or over samples."""
        return self._loss(batch.x, ctx.generator, ctx.progress)

    def _loss(self, x: Tensor, generator: torch.Generator, progress: float) -> Loss:
        seen, hidden = self.corrupt(x, generator, progress)
        value = self._distance(self.reconstruct(seen), self.normalised(x), hidden)
        weight = hidden.sum().clamp(min=1) if self.masked and hidden is not None else len(x)
        return Loss(value, weight)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss on held-out images, corrupted in the same way every time."""
        generator = torch.Generator(self.device).manual_seed(0)
        total = count = 0.0
        for batch in batches:
            value, weight, _ = self._loss(self.to_size(batch.x), generator, 1.0)
            total, count = total + float(value) * float(weight), count + float(weight)
        return {"masked_loss" if self.masked else "spectrum_loss": total / count} if count else {}

    # ---- use

    @torch.no_grad()
    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, what the network sees of them, and what it makes of that: only what was hidden, where only that counts."""
        picture = self.to_size(batch.x)
        seen, hidden = self.corrupt(picture, generator)
        made = self.reconstruct(seen) * self.std + self.mean
        if self.masked and hidden is not None:
            kept = apply_frequency_mask(picture, hidden, clamp=None)
            made = kept + apply_frequency_mask(made, ~hidden, clamp=None)
        return {"picture": picture, "corrupted": seen, "reconstruction": made.clamp(0, 1)}


def _smaller_and_back(x: Tensor, scale: int) -> Tensor:
    """Bicubic down and up again, clamped after each."""
    height, width = x.shape[-2:]
    size = (max(1, height // scale), max(1, width // scale))
    small = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)


def _blurred(x: Tensor, kernels: Tensor) -> Tensor:
    """Each picture under its kernel `[B, s, s]`, mirrored at the border."""
    batch, channels, height, width = x.shape
    reach = kernels.shape[-1] // 2
    padded = reflect_pad(x, (reach, reach, reach, reach)).reshape(1, batch * channels, height + 2 * reach, width + 2 * reach)
    weight = kernels.repeat_interleave(channels, 0)[:, None]
    return F.conv2d(padded, weight, groups=batch * channels).view_as(x).clamp(0, 1)


# ---- claim A: the representation, of both networks

NETWORKS = {"ViT": "vit", "CNN": "small"}
BASELINES: dict[str, dict[str, Any]] = {"whole spectrum": {"target": "normal"}, "denoising": {"corruption": "denoise"}}


@claim(
    "Predicting masked frequencies of unlabelled digits helps, with 100 labels, a vision transformer and a convolutional network",
    Better("ViT accuracy", "MFM", over="untrained"),
    Better("CNN accuracy", "MFM", over="untrained"),
    seeds=range(100, 105),
    note="Fine-tuned on the same 100 digits from the same first weights. The whole spectrum as a target, and denoising, are "
    "shown for the convolutional network: differences between pretexts are expected within noise at this scale. On development "
    "seeds that network reached 0.89 untrained and gained 0.01 from MFM, within noise; the transformer gained 0.1 from 0.5.",
)
def few_labels(lab: Lab) -> Figures:
    """Digits 8 x 8, a disc of radius 2, half of them low-passed; then 150 steps on 100 labels."""
    from sfumato.data import digits
    from sfumato.probes import finetune_probe

    train, test = digits(seed=lab.seed)
    shared = {"image_size": 8, "patch": 2, "channels": 1, "radius": 2.0, "low_pass_share": 0.5, "crop_scale": None, "flip": False}
    figures: Figures = {arm: {} for arm in ("MFM", "untrained", *BASELINES)}
    for kind, network in NETWORKS.items():
        torch.manual_seed(lab.seed)
        models = {"untrained": MFM(MFM.Config.small(network=network, **shared))}
        for arm, task in {"MFM": {}, **(BASELINES if kind == "CNN" else {})}.items():
            start = MFM(MFM.Config.small(network=network, **shared, **task))
            start.load_state_dict(copy.deepcopy(models["untrained"].state_dict()))
            models[arm] = lab.fit(start, train.x, steps=lab.steps(1000))
        shown = models["MFM"].preview(Batch(test.x[:8], test.index[:8]), lab.generator)
        lab.picture(f"{kind} corrupted and reconstruction", torch.cat((shown["corrupted"], shown["reconstruction"])))
        for arm, model in models.items():
            accuracy = finetune_probe(model, train, test=test, steps=lab.steps(150), generator=lab.generator)
            figures[arm][f"{kind} accuracy"] = accuracy
    return figures


# ---- claim B: what the two filters leave, without training

SCENES = ("astronaut", "coffee", "chelsea", "camera", "rocket")
TEXTURES = ("brick", "grass", "gravel")


@claim(
    "A disc of radius 16 at 224 pixels holds most of a natural picture; low-passed and high-passed, it adds up to itself",
    Holds(
        "low-passed + high-passed = the picture before clamping, to 1e-12", lambda f: all(f[a]["remainder"] < 1e-12 for a in f)
    ),
    Holds("more than 80 % of the variance of scenes lies inside the disc", lambda f: f["scenes"]["inside"] > 0.8),
    seeds=range(100, 105),
    note="224-pixel crops of five photographs; textures are shown beside them, and have no need to hold.",
)
def energy_split(lab: Lab) -> Figures:
    """Crops of photographs of scenes and of textures through both filters, in double precision."""
    figures: Figures = {}
    for arm, names in (("scenes", SCENES), ("textures", TEXTURES)):
        x = _crops(names, lab.steps(8), 224, lab.generator)
        hidden = frequency_disc(224, 16)
        low, high = (apply_frequency_mask(x, m, clamp=None) for m in (hidden, ~hidden))
        inside = low.var((2, 3), correction=0).mean(1) / x.var((2, 3), correction=0).mean(1)
        figures[arm] = {"inside": float(inside.mean()), "remainder": float((low + high - x).abs().max())}
        mid_grey = high + 0.5  # a high-passed picture has mean 0
        lab.picture(arm, torch.cat([t[:: lab.steps(8)] for t in (x, low, mid_grey)]))
    return figures


def _crops(names: tuple[str, ...], each: int, size: int, generator: torch.Generator) -> Tensor:
    """Random windows of the named photographs, `[names * each, 3, size, size]`, double precision in [0, 1]."""
    from sfumato.data import photo_names, photos

    named = dict(zip(photo_names(), photos("all")))
    crops = []
    for name in names:
        windows = named[name].unfold(1, size, 1).unfold(2, size, 1)
        y, x = (torch.rand(each, 2, generator=generator) * torch.tensor(windows.shape[1:3])).long().unbind(1)
        crops.append(windows[:, y, x].transpose(0, 1))
    return torch.cat(crops).double() / 255
