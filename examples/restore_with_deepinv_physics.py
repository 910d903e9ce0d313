"""A restorer trained by sfumato as the denoiser of a plug-and-play reconstruction by deepinv.

    python examples/restore_with_deepinv_physics.py
    python examples/restore_with_deepinv_physics.py --physics inpaint --data photo.jpg --steps 2000

The restorer learns one thing, to take white noise out of crops of photographs. deepinv knows how the picture was measured
(blurred, or half of its pixels lost) and alternates between what the measurement says and what the denoiser thinks likely. One
denoiser so serves every physics of deepinv. Peak signal-to-noise ratios in dB are printed before and after.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import deepinv
import torch
from torch import Tensor, nn

import sfumato
from sfumato.data import photo_crops, read_image, unit_float
from sfumato.method import Restorer
from sfumato.papers.optimization.regressor import Regressor

NOISE = 0.03  # standard deviation of the noise of the measurement


class AsDenoiser(nn.Module):
    """A restorer, called as deepinv calls its denoisers; it was trained on noise of all levels and need not be told which."""

    def __init__(self, restorer: Restorer) -> None:
        super().__init__()
        self.restorer = restorer

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """Pictures `[B, C, H, W]` without noise."""
        return self.restorer.restore(x)


def measured_by(kind: str, size: tuple[int, ...]) -> deepinv.physics.LinearPhysics:
    """How the picture is measured, with noise."""
    noise = deepinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(1))
    if kind == "inpaint":
        return deepinv.physics.Inpainting(size, mask=0.5, noise_model=noise, rng=torch.Generator().manual_seed(2))
    kernel = deepinv.physics.functional.gaussian_blur(sigma=(1.5, 1.5))
    return deepinv.physics.BlurFFT(size, filter=kernel, noise_model=noise)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train the denoiser, measure a picture, restore it; returns the PSNRs in dB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--physics", default="blur", choices=("blur", "inpaint"))
    parser.add_argument("--data", help="a clean picture to measure and restore; default: a crop of a photograph")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the denoiser")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    clean = photo_crops(1000, 32, generator=generator)
    level = 0.2 * torch.rand(len(clean), 1, 1, 1, generator=generator)
    noisy = clean + level * torch.randn(clean.shape, generator=generator)
    pairs = sfumato.data.Batch(noisy, torch.arange(len(clean)), target=clean)
    denoiser = Regressor(Regressor.Config.small(channels=3, steps=options.steps))
    sfumato.fit(denoiser, pairs, device="cpu")

    if options.data:
        x = unit_float(read_image(options.data).pixels)[None]
    else:
        x = photo_crops(1, 128, split="test", generator=torch.Generator().manual_seed(4))
    physics = measured_by(options.physics, tuple(x.shape[1:]))
    psnr = deepinv.metric.PSNR()
    with torch.no_grad():
        y = physics(x)
        alone = denoiser.restore(y)
        restored = deepinv.optim.DPIR(sigma=NOISE, denoiser=AsDenoiser(denoiser))(y, physics).clamp(0, 1)
    figures = {"measured": float(psnr(y, x)), "denoiser alone": float(psnr(alone, x)), "plug-and-play": float(psnr(restored, x))}
    for name, value in figures.items():
        print(f"{name:>14}: {value:.2f} dB")
    return figures


if __name__ == "__main__":
    main()
