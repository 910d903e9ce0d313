"""LMD: a masked autoencoder on the latents of a frozen VAE, whose masks grow from 15 % to 75 % while it trains.

    z = VAE(x),   r = schedule(step),   L = Σ_hidden mean (ẑ - t)² / #hidden,     t = the token's latents, mean 0 and variance 1

A token is 4 x 4 latents of 8 x 8 pixels: 49 tokens where MAE has 196. The latents are the posterior's mean, not scaled; network
and loss are MAE's, on latents for pixels. The ratio is one number a step and depends on the step alone.

**What it costs.** With latents at hand, a step of the paper's network takes a third of MAE's operations. Stable Diffusion's
encoder takes eleven times MAE's whole forward pass; in every step it makes LMD four times *dearer* to train than MAE. The
speed-up needs `sfumato.data.LatentCache`, which encodes once and stores a few views of each picture:

    pictures, method = open_data("my_photos/"), LMD(LMD.Config(vae="FOLDER"))
    method.survey(pictures.gather(i[None]) for i in torch.randperm(len(pictures)))  # reads the VAE, or fits a PCA
    cache = LatentCache(method.codec, pictures, "my_photos.safetensors", views=2, augment=method.augment())
    fit(method, cache)

`codec=pca` (components of patches, found in the training data) needs no weights and is the CPU preset's; `codec=identity` is
pixel space: MAE with a growing ratio. A trained run holds its codec, the VAE's weights too.

Source: "LMD: Faster Image Reconstruction with Latent Masking Diffusion", AAAI 2024, arXiv 2312.07971. Ours: the number of epochs
(100), the linear schedule, positions added where the released decoder subtracts them (a rotation of a fixed code), latents of
the PCA divided by one number so that their mean variance is 1, evaluation and pictures at the last ratio.

>>> import torch
>>> from sfumato.engine import fit
>>> from sfumato.papers.masking.lmd import LMD
>>> lmd = fit(LMD(LMD.Config.small(steps=2)), torch.rand(64, 3, 40, 40), progress=False)
>>> lmd.encode(torch.rand(2, 3, 50, 70)).shape
torch.Size([2, 64])
>>> [int(lmd.mask(torch.zeros(1, 12, 8, 8), torch.Generator(), p).sum()) for p in (0, 1 / 3, 1)]  # of 16 tokens
[3, 8, 12]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.errors import BadData, BadSetting
from sfumato.losses import denormalize_patches, masked_mean, masked_patch_mse
from sfumato.masks import random_mask, ratio_schedule, upsample_mask
from sfumato.method import Batch, Context, Loss
from sfumato.nn import MaskedDecoder, MaskedViTEncoder, patchify, unpatchify
from sfumato.optim import cosine_warmup, lr_for_batch
from sfumato.papers.masking.latents import LatentConfig, LatentImageModel
from sfumato.papers.masking.mae import MAE, SMALL_ENCODER
from sfumato.probes import finetune_probe, multiply_adds


class LMD(LatentImageModel):
    """A masked autoencoder on latents. It trains on pictures, encoded in every step, or on a `LatentCache`."""

    class Config(LatentConfig):
        """The released script: ViT-B on the latents of Stable Diffusion's VAE."""

        steps: int = Field(2_000_000, gt=0, description="optimizer steps; 100 epochs of ImageNet-1k, a number of our choice")
        batch_size: int = Field(64, gt=0, description="samples a step, over all micro-batches and processes")
        clip_norm: float | None = Field(10.0, gt=0, description="largest gradient norm; None: no clipping")
        mask_ratio: float = Field(0.75, ge=0, le=1, description="share of the tokens that is hidden at the end, and in use")
        start_ratio: float = Field(0.15, ge=0, le=1, description="share of the tokens that is hidden at the start")
        schedule: Literal["cosine", "piecewise", "linear"] = Field("cosine", description="how the share grows")
        knee: float = Field(2 / 3, ge=0, le=1, description="share of the training after which mask_ratio is reached")
        middle_ratio: float = Field(0.4, ge=0, le=1, description="share that is hidden on the plateau of schedule=piecewise")
        decoder_dim: int = Field(512, gt=0, description="width of the decoder, a multiple of 4 and of decoder_heads")
        decoder_depth: int = Field(8, gt=0, description="blocks of the decoder")
        decoder_heads: int = Field(16, gt=0, description="attention heads of the decoder")
        optimizer: Literal["adan", "adamw"] = Field("adan", description="the released script's, or its fallback")
        base_lr: float = Field(3e-4, gt=0, description="peak learning rate for 256 samples a step; scaled to batch_size")
        min_lr: float = Field(1e-8, ge=0, description="learning rate at the end")
        weight_decay: float = Field(0.05, ge=0, description="decoupled, not on biases and norms")
        betas: tuple[float, ...] = Field((0.98, 0.92, 0.90), description="three of Adan, two of AdamW")  # type: ignore[assignment]
        warmup: float = Field(0.01, ge=0, lt=1, description="share of the steps over which the learning rate rises: 1 epoch")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Minutes on a CPU: 32-pixel crops as 8 x 8 latents of a PCA, 16 tokens, the family's AdamW."""
            small = {
                **SMALL_ENCODER, "codec": "pca", "reduction": 4, "patch": 2, "decoder_dim": 48, "decoder_depth": 1,
                "decoder_heads": 4, "norm_pix": False, "optimizer": "adamw", "betas": (0.9, 0.95), "warmup": 0.05,
                "clip_norm": None,
            }  # fmt: skip
            return cls(**{**small, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c, side = self.config, self.latent_shape[1]
        if len(c.betas) != (3 if c.optimizer == "adan" else 2):
            raise BadSetting(f"betas={c.betas}: Adan takes three, AdamW two")
        self.encoder = MaskedViTEncoder(side, c.patch, self.latent_shape[0], c.dim, c.depth, c.heads, mlp_ratio=c.mlp_ratio)
        self.decoder = MaskedDecoder(
            c.dim, c.decoder_dim, c.decoder_depth, c.decoder_heads, c.patch**2 * self.latent_shape[0], self.encoder.grid,
            mlp_ratio=c.mlp_ratio,
        )  # fmt: skip

    # ---- the method

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Uniformly random, at the ratio of this moment: equally many in every row, as in MAE."""
        c = self.config
        ratio = ratio_schedule(progress, c.schedule, low=c.start_ratio, high=c.mask_ratio, knee=c.knee, mid=c.middle_ratio)
        return random_mask(len(x), self.encoder.grid, ratio, generator=generator)

    def predict_patches(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Numbers for every token, `[B, L, p²c]`, from the visible ones."""
        return self.decoder(self.encoder(x, hidden), hidden)  # type: ignore[no-any-return]

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Squared error of the hidden tokens' (normalised) latents."""
        target = patchify(x, self.config.patch)
        return masked_patch_mse(self.predict_patches(x, hidden), target, hidden, norm=self.config.norm_pix)

    def predict_image(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The prediction as latents; normalised tokens get their own mean and deviation back."""
        predicted = self.predict_patches(x, hidden)
        if self.config.norm_pix:
            predicted = denormalize_patches(predicted, patchify(x, self.config.patch))
        return unpatchify(predicted, self.config.patch, self.encoder.grid, self.latent_shape[0])

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """Hide as many tokens as this moment asks for, predict them; `ratio` is logged.

        Raises:
            BadData: pictures of another size, which only a loader of one's own gives.
        """
        side, size = self.config.image_size, tuple(batch.x.shape[-2:])
        if size != (side, side) and not self._are_latents(batch.x):
            raise BadData(
                f"pictures are {size[0]} x {size[1]}, the network takes {side} x {side}, or latents "
                f"{' x '.join(map(str, self.latent_shape))}: set image_size, or crop them"
            )
        z = self.normalised(batch.x)
        hidden = self.mask(z, ctx.generator, ctx.progress)
        return Loss(self.loss_of_views(z, hidden), len(batch), {"ratio": hidden.float().mean()})

    def lr_factor(self, progress: float) -> float:
        """A straight rise, then half a cosine down to `min_lr`."""
        c = self.config
        peak = lr_for_batch(c.base_lr, 256, c.batch_size)
        return cosine_warmup(progress, warmup=c.warmup, floor=min(1.0, c.min_lr / peak))

    def optimizers(self) -> dict[str, Optimizer]:
        """Adan, or AdamW, on `decay_groups`."""
        c = self.config
        if c.optimizer == "adamw":
            return super().optimizers()
        from timm.optim import Adan  # type: ignore[attr-defined]

        return {"net": Adan(self.decay_groups(), lr_for_batch(c.base_lr, 256, c.batch_size), betas=c.betas)}


# ---- claim A: the operations of the paper's own networks

SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
}  # fmt: skip
"""Architecture of Stable Diffusion v1's auto-encoder."""


def _forward(model: Any, ratio: float) -> float:
    """1e9 multiply-adds of one picture's forward pass with this share hidden."""
    encoder = model.encoder
    side = [n * encoder.patch for n in encoder.grid]
    hidden = random_mask(1, encoder.grid, ratio, generator=torch.Generator().manual_seed(0))
    return 1e-9 * multiply_adds(lambda: model.predict_patches(torch.zeros(1, encoder.channels, *side), hidden))


def _growing(model: Any, points: int) -> float:
    """The mean of `_forward` over the cosine schedule."""
    ratios = [
        ratio_schedule((k + 0.5) / points, low=model.config.start_ratio, high=model.config.mask_ratio) for k in range(points)
    ]
    return sum(_forward(model, r) for r in ratios) / points


def _hollow(kind: type[Any]) -> Any:
    """A method at the paper's size, all its numbers 0: enough to count."""
    with torch.device("meta"):
        model = kind(kind.Config())
    model.to_empty(device="cpu")
    for t in (*model.parameters(), *model.buffers()):
        t.data.zero_()
    return model


@claim(
    "With cached latents a step takes a third of pixel MAE's operations; with its VAE in every step it takes many times more",
    Holds(
        "with cached latents 2.8 to 3.1 times fewer",
        lambda f: 2.8 <= f["MAE"]["forward, GMAC"] / f["cached latents"]["forward, GMAC"] <= 3.1,
    ),
    Holds(
        "a forward pass with the VAE takes 10 times MAE's or more",
        lambda f: f["VAE in every step"]["forward, GMAC"] >= 10 * f["MAE"]["forward, GMAC"],
    ),
    seeds=range(100, 101),
    note="Counted, not timed, and the same for every seed. A training step is three forward passes, one of the frozen VAE.",
)
def operations(lab: Lab) -> Figures:
    """ViT-B: MAE at 224 pixels and 0.75; LMD on 28 x 28 latents, averaged over its schedule; Stable Diffusion's encoder."""
    from diffusers import AutoencoderKL

    mae, lmd = _hollow(MAE), _hollow(LMD)
    pixels, latents = _forward(mae, mae.config.mask_ratio), _growing(lmd, lab.steps(12))
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**SD_VAE)
        picture = torch.empty(1, 3, 224, 224)
    codec = 1e-9 * multiply_adds(lambda: vae.encode(picture))
    return {
        "MAE": {"forward, GMAC": pixels, "training step, GMAC": 3 * pixels},
        "cached latents": {"forward, GMAC": latents, "training step, GMAC": 3 * latents},
        "VAE in every step": {"forward, GMAC": latents + codec, "training step, GMAC": 3 * latents + codec},
        "cached latents, 0.75 throughout": {"forward, GMAC": (f := _forward(lmd, 0.75)), "training step, GMAC": 3 * f},
    }


# ---- claims B and C: the same network on pixels and on latents, and with a fixed ratio

SMALL: dict[str, Any] = {"channels": 1, "crop_scale": None, "flip": False}


class _Watched:
    """Looks at held-out crops while it trains, and counts the processor's seconds without those of looking."""

    def watch(self, look: Callable[[Any], float], every: int) -> Any:
        self.look, self.every = look, every
        self.seconds = 0.0
        self.since: float | None = None
        self.curve: list[tuple[float, float]] = []
        return self

    def note(self, step: int, total: int) -> None:
        if self.since is not None:
            self.seconds += time.process_time() - self.since
        if step % self.every == 0 or step == total:
            self.curve.append((self.seconds, self.look(self)))
        self.since = time.process_time()

    def steps(self, ctx: Context) -> Any:
        self.note(ctx.step, ctx.total)
        yield from super().steps(ctx)  # type: ignore[misc]
        if ctx.step + 1 == ctx.total:
            self.note(ctx.total, ctx.total)


class _Pixels(_Watched, MAE):
    pass


class _Latents(_Watched, LMD):
    pass


def _crops(n: int, side: str, generator: torch.Generator) -> Batch:
    """Grey 32-pixel crops of one half of the training photographs; the label says of which photograph."""
    from sfumato.data import photos

    size, photographs = 32, photos("train")
    which = torch.randint(len(photographs), (n,), generator=generator)
    places = torch.rand(n, 2, generator=generator)
    x = torch.empty(n, 1, size, size)
    for k, photo in enumerate(photographs):
        half = photo.float().mean(0) / 255
        half = half.tensor_split(2, 1)[side == "right"]
        rows = (which == k).nonzero().squeeze(1)
        at_y, at_x = (places[rows] * (torch.tensor(half.shape) - size + 1)).long().unbind(1)
        x[rows, 0] = half.unfold(0, size, 1).unfold(1, size, 1)[at_y, at_x]
    return Batch(x, torch.arange(n), which)


@torch.no_grad()
def _hidden_psnr(model: Any, x: Tensor, regions: Tensor) -> float:
    """dB of the pixels of hidden regions of 8 x 8, `regions` `[B, 16]`, together."""
    pixels = upsample_mask(regions, 4, 8)
    hidden = F.max_pool2d(pixels.float(), 32 // model.encoder.grid[0]).flatten(1) > 0
    z = model.normalised(x)
    predicted = model.predict_image(z, hidden)
    painted = model.decoded(predicted) if isinstance(model, LMD) else (predicted * model.std + model.mean).clamp(0, 1)
    return float(-10 * masked_mean((painted - x).square(), pixels).log10())


class _Bench:
    """Crops, masks and labels of one seed, and what is measured on them."""

    def __init__(self, lab: Lab) -> None:
        self.lab, generator = lab, lab.generator
        self.train = _crops(lab.steps(2048), "left", generator)
        self.test = _crops(lab.steps(512), "right", generator)
        self.regions = random_mask(len(self.test), 4, 0.75, generator=generator)

    def latents(self, **over: Any) -> tuple[Any, Any, float]:
        """An untrained model that knows its PCA, the cache, and the processor's seconds that both took."""
        from sfumato.data import LatentCache

        torch.manual_seed(self.lab.seed)
        model, started = _Latents(LMD.Config.small(**SMALL, **over)), time.process_time()
        model.survey([self.train])
        cache = LatentCache(model.codec, self.train)
        return model, cache, time.process_time() - started

    def pixels(self, **over: Any) -> Any:
        """An untrained pixel model."""
        torch.manual_seed(self.lab.seed)
        return _Pixels(MAE.Config.small(**SMALL, norm_pix=False, **over))

    def trained(self, model: Any, data: Any, steps: int) -> dict[str, float]:
        """Train, then measure."""
        model.watch(lambda m: _hidden_psnr(m, self.test.x, self.regions), max(1, steps // 12))
        self.lab.fit(model, data, steps=steps)
        return {"hidden PSNR": model.curve[-1][1], "seconds": model.seconds}

    def judged(self, model: Any) -> dict[str, float]:
        """Accuracy after fine-tuning on 100 labels: of which photograph is a crop?"""
        steps = self.lab.steps(100)
        return {"accuracy": finetune_probe(model, self.train, test=self.test, steps=steps, generator=self.lab.generator)}

    def picture(self, name: str, model: Any) -> None:
        """What the model paints into the first test crops."""
        rows = model.preview(Batch(self.test.x[:8], self.test.index[:8]), self.lab.generator)
        self.lab.picture(name, rows["reconstruction"])


@claim(
    "On cached latents the same network reaches pixel MAE's reconstruction in a third of the time, and its features are as good",
    Better("log2 of the seconds to pixel MAE's PSNR", "latents", over="pixels", by=math.log2(3), higher=False),
    Better("accuracy", "latents", over="pixels, two points less"),
    seeds=range(100, 105),
    note="Seconds of the processor until an arm, pixel MAE too, first reaches the PSNR that pixel MAE ends with, looked at 13 "
    "times; fitting and caching included. One that never does counts as pixel MAE's whole time. PSNR is of hidden regions of "
    "8 x 8 pixels, the latents' tokens; pixel MAE trains on its own masks, which serve it better. 'Large patches' is pixel MAE "
    "with as few tokens as the latents, without a codec.",
)
def speed(lab: Lab) -> Figures:
    """Equal steps, 600 of batch 64, on grey 32-pixel crops: 64 tokens of pixels, 16 of a PCA's latents, 16 of pixels."""
    bench, steps = _Bench(lab), lab.steps(600)
    latents, cache, caching = bench.latents()
    arms = {"pixels": bench.pixels(), "latents": latents, "large patches": bench.pixels(patch=8)}
    figures: Figures = {f"{name}, untrained": bench.judged(arms[name]) for name in ("pixels", "latents")}
    for name, model in arms.items():
        figures[name] = bench.trained(model, cache if model is latents else bench.train, steps) | bench.judged(model)
        forward = _growing(model, 12) if model is latents else _forward(model, model.config.mask_ratio)
        figures[name] |= {"tokens": math.prod(model.encoder.grid), "forward, MMAC": 1e3 * forward}
        bench.picture(name, model)
    figures["latents"]["seconds"] += caching
    whole, target = figures["pixels"]["seconds"], figures["pixels"]["hidden PSNR"]
    for name, model in arms.items():
        before = caching if model is latents else 0.0
        reached = next((before + s for s, psnr in model.curve if psnr >= target), whole)
        figures[name]["log2 of the seconds to pixel MAE's PSNR"] = math.log2(reached)
        lab.curve(name, *zip(*((before + s, p) for s, p in model.curve)), xlabel="seconds", ylabel="PSNR of hidden pixels, dB")
    figures["pixels, two points less"] = {"accuracy": figures["pixels"]["accuracy"] - 0.02}
    codec = latents.codec.decode(latents.codec.encode(bench.test.x)).clamp(0, 1)
    error = masked_mean((codec - bench.test.x).square(), upsample_mask(bench.regions, 4, 8))
    figures["codec alone"] = {"hidden PSNR": float(-10 * error.log10()), "seconds": caching}
    return figures


@claim(
    "At equal computation a growing ratio reconstructs better than a fixed one",
    Better("hidden PSNR", "growing", over="fixed"),
    seeds=range(100, 105),
    note="The fixed ratio leaves fewer tokens, so it gets more steps: as many as take equally many multiply-adds. Expected to "
    "help little at this scale, or to hurt: low ratios cost more a step.",
)
def growing(lab: Lab) -> Figures:
    """The latent model of `speed` with the cosine from 0.15 to 0.75, and with 0.75 throughout."""
    bench, steps = _Bench(lab), lab.steps(600)
    figures: Figures = {}
    cosine, cache, _ = bench.latents()
    fixed, _, _ = bench.latents(start_ratio=0.75)
    fixed.load_state_dict(cosine.state_dict())
    times = _growing(cosine, 12) / _forward(fixed, 0.75)
    for name, model, count in (("growing", cosine, steps), ("fixed", fixed, round(times * steps))):
        figures[name] = {**bench.trained(model, cache, count), "steps": count}
        lab.curve(name, *zip(*model.curve), xlabel="seconds", ylabel="PSNR of hidden pixels, dB")
    return figures
