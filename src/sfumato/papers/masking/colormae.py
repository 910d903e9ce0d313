"""ColorMAE: masks for a masked autoencoder cut from filtered noise, at no cost and without looking at the image.

    green mask: keep the tokens where G_σ1 * W - G_σ2 * W is largest       W white noise, σ1 < σ2 in tokens

Network, loss, ratio and recipe are MAE's; only the sampler changes. Green (band-pass) masks hide evenly spread clusters.

Source: Hinojosa, Liu, Ghanem 2024, "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders", ECCV,
arXiv 2407.13036. The σ of the authors' pattern files are not published; (1, 2) tokens and 64 x 64 patterns are ours.

>>> import torch
>>> from sfumato.papers.masking.colormae import ColorMAE
>>> model = ColorMAE(ColorMAE.Config.small(color="green"))
>>> hidden = model.mask(torch.zeros(2, 3, 32, 32), torch.Generator().manual_seed(0))
>>> hidden.shape, hidden.sum(1).tolist()
(torch.Size([2, 64]), [48, 48])
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.masks import COLORS, NoiseBank, color_noise_mask, mask_difficulty
from sfumato.metrics import radial_spectrum
from sfumato.papers.masking.mae import MAE


class ColorMAE(MAE):
    """MAE under coloured masks, sampled from a bank of noise that is made once from a seed."""

    class Config(MAE.Config):
        """MAE's base preset with green masks."""

        color: Literal["green", "red", "blue", "purple", "white"] = Field("green", description="colour of the noise")
        sigma: float | tuple[float, float] | None = Field(
            None, description="width(s) of the Gaussian filters, tokens; None: 1 (red, blue) or 1 and 2 (green, purple)"
        )
        bank_count: int = Field(3072, gt=0, description="noise images in the bank")
        bank_size: int = Field(64, gt=0, description="side of a noise image, tokens; more than image_size / patch")
        bank_seed: int = Field(0, description="seed of the bank, which checkpoints do not hold")

        @classmethod
        def small(cls, **over: Any) -> Any:
            """MAE's preset for a CPU with a smaller bank."""
            return super().small(**{"bank_count": 512, "bank_size": 32, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c, generator = self.config, torch.Generator().manual_seed(self.config.bank_seed)
        self.bank = NoiseBank(c.color, count=c.bank_count, size=c.bank_size, sigma=c.sigma, generator=generator)

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """A window of the bank for every sample: its largest values are kept, exactly as many as MAE keeps."""
        return self.bank.sample(len(x), self.encoder.grid, self.config.mask_ratio, generator=generator)


# ---- claim A: what the colours do to a mask, without training

SCENES = ("astronaut", "coffee", "chelsea", "camera", "rocket")


def _falls(metric: str, *colors: str) -> Any:
    """The metric falls from colour to colour."""
    return lambda f: all(f[a][metric] > f[b][metric] for a, b in itertools.pairwise(colors))


@claim(
    "The colour of the noise sets the scale of a mask and how hard its holes are to guess",
    Holds("holes are harder to guess under red than green, under green than blue", _falls("difficulty", "red", "green", "blue")),
    Holds("holes are harder to guess under red than white, under white than blue", _falls("difficulty", "red", "white", "blue")),
    Holds(
        "green masks have at least 1.5 times the power of white ones from 0.15 to 0.35 cycles a token",
        lambda f: f["green"]["mid band"] >= 1.5 * f["white"]["mid band"],
    ),
    seeds=range(100, 105),
    note="Difficulty: variance of hidden pixels left unexplained by normalised convolution of the visible ones (1 token wide).",
)
def spectra(lab: Lab) -> Figures:
    """256 masks of each colour, 14 x 14 at 0.75, over grey 112-pixel crops of five photographs."""
    generator, count = lab.generator, lab.steps(256)
    crops = _scene_crops(count, 112, generator)
    white = torch.rand(count, 14, 14, generator=generator)
    figures: Figures = {}
    for color in COLORS:
        mask = color_noise_mask(count, 14, 0.75, color=color, white=white).view(-1, 14, 14)
        low, mid = _bands(mask)
        figures[color] = {"difficulty": float(mask_difficulty(crops, mask).mean()), "low band": low, "mid band": mid}
        lab.picture(color, mask[:8, None].float().repeat_interleave(4, -2).repeat_interleave(4, -1))
        power = radial_spectrum(mask, bins=7).mean(0)
        lab.curve(color, [(r + 0.5) / 14 for r in range(7)], power.tolist(), xlabel="cycles a token", ylabel="power of the mask")
    return figures


def _bands(mask: Tensor) -> tuple[float, float]:
    """Shares of the masks' power below 0.15, and from 0.15 to 0.35 cycles a token."""
    x = mask.double() - mask.double().mean((1, 2), keepdim=True)
    power = torch.fft.fft2(x).abs().square().mean(0)
    f = torch.fft.fftfreq(mask.shape[-1], dtype=torch.float64)
    r = (f[:, None].square() + f.square()).sqrt()
    share = power / power.sum()
    return float(share[r < 0.15].sum()), float(share[(r >= 0.15) & (r < 0.35)].sum())


def _scene_crops(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Grey crops of the five scenes, `[n, 1, size, size]`."""
    from sfumato.data import photo_names, photos

    named = dict(zip(photo_names(), photos("all")))
    return _windows([named[name] for name in SCENES], torch.arange(n) % len(SCENES), size, generator).mean(1, keepdim=True)


# ---- claim B: the representation


@claim(
    "Green masks teach a denser representation than white ones",
    Better("mosaic mIoU", "green", over="white"),
    seeds=range(100, 105),
    note="Expected within noise at this scale: 1000 steps of a network of width 64.",
)
def green_against_white(lab: Lab) -> Figures:
    """MAE on 32-pixel crops, 4-pixel patches; then a linear probe on single tokens of mosaics of photographs."""
    from sfumato.data import photo_crops
    from sfumato.probes import token_probe

    generator = lab.generator
    crops = photo_crops(2048, 32, split="train", generator=generator)
    known = mosaics(lab.steps(400), 32, 4, side="left", generator=generator)
    unknown = mosaics(lab.steps(400), 32, 4, side="right", generator=generator)
    torch.manual_seed(lab.seed)
    untrained = ColorMAE(ColorMAE.Config.small(color="white"))
    models = {"untrained": untrained}
    for color in ("white", "green"):
        model = ColorMAE(ColorMAE.Config.small(color=color))
        model.load_state_dict(copy.deepcopy(untrained.state_dict()))
        models[color] = lab.fit(model, crops, steps=lab.steps(1000))
    lab.picture("mosaics", unknown[0][:8])
    figures: Figures = {}
    for arm, m in models.items():
        score = token_probe(_tokens(m, known[0]), known[1], test=(_tokens(m, unknown[0]), unknown[1]))
        figures[arm] = {"mosaic mIoU": score.miou, "mosaic accuracy": score.accuracy}
    return figures


@torch.no_grad()
def _tokens(model: ColorMAE, x: Tensor) -> Tensor:
    """Patch tokens of whole images, `[N, L, D]`."""
    encoder = model.eval().encoder
    return torch.cat([encoder(model.normalised(part))[:, encoder.prefix :] for part in torch.split(x, 256)])


def mosaics(
    n: int, size: int, patch: int, *, side: str = "left", cells: int = 3, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Images of a few Voronoi cells, each from another photograph, and which photograph each patch shows.

    Args:
        n: number of images.
        size: side in pixels.
        patch: side of a patch in pixels.
        side: the half of the photographs that is shown, "left" or "right": train on one, test on the other.
        cells: Voronoi cells, each of another photograph.
        generator: source of the draws.

    Returns:
        `[n, 3, size, size]` in [0, 1], and classes `[n, (size / patch)²]` at the patches' centres.
    """
    from sfumato.data import photos

    halves = [p[:, :, : p.shape[2] // 2] if side == "left" else p[:, :, p.shape[2] // 2 :] for p in photos("train")]
    which = torch.rand(n, len(halves), generator=generator).topk(cells, 1).indices  # distinct photographs
    seeds = torch.rand(n, cells, 2, generator=generator) * size
    windows = _windows(halves, which.flatten(), size, generator).view(n, cells, 3, size, size)

    def nearest(centres: Tensor) -> Tensor:  # the cell of each point of a square lattice, [n, points]
        points = torch.cartesian_prod(centres, centres)
        return torch.cdist(points.expand(n, -1, -1), seeds).argmin(-1)

    cell = nearest(torch.arange(size) + 0.5).view(n, 1, 1, size, size)
    images = windows.gather(1, cell.expand(-1, 1, 3, -1, -1)).squeeze(1)
    return images, which.gather(1, nearest(torch.arange(patch / 2, size, patch)))


def _windows(images: list[Tensor], which: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """A random window of the named image for each entry of `which`, `[n, 3, size, size]` in [0, 1]."""
    places = torch.rand(len(which), 2, generator=generator)
    out = torch.empty(len(which), 3, size, size)
    for k, image in enumerate(images):
        rows = (which == k).nonzero().squeeze(1)
        y, x = (places[rows] * (torch.tensor(image.shape[1:]) - size + 1)).long().unbind(1)
        out[rows] = image.unfold(1, size, 1).unfold(2, size, 1)[:, y, x].transpose(0, 1).float() / 255
    return out
