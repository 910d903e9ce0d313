"""Masks cut from filtered noise: their colour says at which scale hidden and visible tokens alternate.

With W white noise and G_σ a Gaussian filter (σ in tokens, periodic; Ĝ_σ(f) = exp(-2π²σ²|f|²)):

    red   G_σ * W                      low-pass   large holes
    blue  W - G_σ * W                  high-pass  evenly spread holes
    green G_σ1 * W - G_σ2 * W          band-pass  evenly spread clusters
    purple W - (G_σ1 * W - G_σ2 * W)   band-stop  fine and coarse mixed

The mask keeps the tokens where the noise is largest and hides the others: an exact number, and no image is looked at.

Source: Hinojosa et al. 2024, "ColorMAE", section 3. The σ of the authors' pattern files are not published; ours are settings.

>>> import torch
>>> from sfumato.masks import NoiseBank, color_noise_mask
>>> g = torch.Generator().manual_seed(0)
>>> color_noise_mask(2, (14, 14), 0.75, color="green", generator=g).sum(1).tolist()
[147, 147]
>>> bank = NoiseBank("green", count=64, generator=g)
>>> bank.sample(8, (14, 14), 0.75, generator=g).shape
torch.Size([8, 196])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sfumato.errors import BadSetting
from sfumato.masks.random_masks import Grid, count_hidden, grid_shape, mask_from_scores, uniform

COLORS = ("white", "red", "blue", "green", "purple")
"""Colours of noise."""
Sigma = float | tuple[float, float] | None

_SIGMA = {"red": (1.0,), "blue": (1.0,), "green": (1.0, 2.0), "purple": (1.0, 2.0), "white": ()}


def _sigmas(color: str, sigma: Sigma) -> tuple[float, ...]:
    """One width for red and blue, two for green and purple; None: the defaults."""
    if color not in COLORS:
        raise BadSetting(f"color {color!r} is not known: {', '.join(COLORS)}")
    default = _SIGMA[color]
    if sigma is None or not default:
        return default
    widths = tuple(map(float, sigma)) if isinstance(sigma, (tuple, list)) else (float(sigma),)
    increasing = len(widths) == 1 or widths[0] < widths[1]
    if len(widths) != len(default) or min(widths) < 0 or not increasing:
        wanted = "one width" if len(default) == 1 else "two widths, the smaller first"
        raise BadSetting(f"{color} noise takes {wanted} in tokens, not sigma={sigma}")
    return widths


def transfer_function(
    size: tuple[int, int], color: str, *, sigma: Sigma = None, device: torch.device | str | None = None
) -> Tensor:
    """What a colour's filter multiplies each frequency by: real, between 0 and 1.

    Args:
        size: (rows, columns) of the noise.
        color: "white", "red", "blue", "green" or "purple".
        sigma: width(s) of the Gaussians in tokens; None: 1 (red, blue) or (1, 2) (green, purple).
        device: of the result.

    Returns:
        `[rows, columns // 2 + 1]` float64, for `torch.fft.rfft2`.

    Raises:
        BadSetting: an unknown colour, or widths that do not suit it.
    """
    widths = _sigmas(color, sigma)
    fy = torch.fft.fftfreq(size[0], device=device, dtype=torch.float64)[:, None]
    fx = torch.fft.rfftfreq(size[1], device=device, dtype=torch.float64)
    low = [torch.exp(-2 * (math.pi * s) ** 2 * (fy.square() + fx.square())) for s in widths]
    if color == "red":
        return low[0]
    if color == "blue":
        return 1 - low[0]
    if color == "green":
        return low[0] - low[1]
    if color == "purple":
        return 1 - (low[0] - low[1])
    return torch.ones(size[0], size[1] // 2 + 1, device=device, dtype=torch.float64)


def colored_noise(
    batch: int,
    size: Grid,
    color: str = "green",
    *,
    sigma: Sigma = None,
    white: Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniform white noise, filtered on the torus in Fourier space.

    Args:
        batch: number of noise images.
        size: tokens along each side.
        color: "white", "red", "blue", "green" or "purple".
        sigma: width(s) of the Gaussians in tokens, see `transfer_function`.
        white: `[B, h, w]`; given, it is filtered and nothing is drawn.
        device: of the noise; None: the generator's.
        generator: source of the white noise.

    Returns:
        `[B, h, w]`.

    Reference:
        Hinojosa et al. 2024, section 3.2. O(h w log(h w)) an image.
    """
    shape = grid_shape(size)
    if white is None:
        white = uniform((batch, *shape), device=device, generator=generator)
    gain = transfer_function(shape, color, sigma=sigma, device=white.device).to(white.dtype)
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=shape)
    return filtered


def color_noise_mask(
    batch: int,
    grid: Grid,
    ratio: float,
    *,
    color: str = "green",
    sigma: Sigma = None,
    white: Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Filter fresh noise for every mask; keep the tokens where it is largest.

    Args:
        batch: number of masks.
        grid: tokens along each side; the noise is periodic on it.
        ratio: hidden share, 0 to 1.
        color: "white", "red", "blue", "green" or "purple".
        sigma: width(s) of the Gaussians in tokens, see `transfer_function`.
        white: `[B, rows, columns]`; given, it is filtered and nothing is drawn.
        device: of the mask; None: the generator's.
        generator: source of the noise.

    Returns:
        `[B, L]` bool, True = hidden.
    """
    noise = colored_noise(batch, grid, color, sigma=sigma, white=white, device=device, generator=generator)
    return mask_from_scores(noise.flatten(1), ratio=ratio, largest=False)


class NoiseBank(nn.Module):
    """Noise made once; a mask is a random window of it, randomly flipped. The buffer is not part of the `state_dict`.

    Unlike the official sampler, which takes one crop and one flip for a whole bank and pattern b for sample b, every mask has
    a pattern, place and flips of its own.

    Args:
        color: "white", "red", "blue", "green" or "purple".
        count: number of noise images.
        size: their side in tokens, larger than any grid.
        sigma: width(s) of the Gaussians in tokens, see `transfer_function`.
        generator: source of the noise.

    Raises:
        BadSetting: an unknown colour, or widths that do not suit it.

    Reference:
        Hinojosa et al. 2024, section 3.3; official code `masking_generator`.
    """

    noise: Tensor

    def __init__(
        self,
        color: str = "green",
        *,
        count: int = 3072,
        size: int = 64,
        sigma: Sigma = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.color, self.count, self.size = color, count, size
        self.register_buffer("noise", colored_noise(count, size, color, sigma=sigma, generator=generator), persistent=False)

    def sample(self, batch: int, grid: Grid, ratio: float, *, generator: torch.Generator | None = None) -> Tensor:
        """Masks from random windows: the noise's largest tokens are kept.

        Args:
            batch: number of masks.
            grid: tokens along each side, at most the bank's size.
            ratio: hidden share, 0 to 1.
            generator: of the choice of pattern, place and flips.

        Returns:
            `[B, L]` bool, True = hidden, on the bank's device.

        Raises:
            BadSetting: the grid is larger than the bank.
        """
        rows, columns = grid_shape(grid)
        if max(rows, columns) > self.size:
            raise BadSetting(f"a bank of {self.size} x {self.size} tokens has no window of {rows} x {columns}")
        windows = self.windows(batch, (rows, columns), generator=generator)
        return _hide_smallest(windows, ratio)

    def windows(self, batch: int, grid: tuple[int, int], *, generator: torch.Generator | None = None) -> Tensor:
        """Random windows of the noise, `[B, rows * columns]`, each flipped along either side with probability 1/2."""
        rows, columns = grid
        u = uniform((5, batch), device=self.noise.device, generator=generator)
        limits = u.new_tensor([self.count, self.size - rows + 1, self.size - columns + 1, 2, 2])
        which, top, left, flip_y, flip_x = (u * limits[:, None]).long().unbind()
        y = torch.arange(rows, device=u.device)
        x = torch.arange(columns, device=u.device)
        y = torch.where(flip_y[:, None] == 1, rows - 1 - y, y) + top[:, None]
        x = torch.where(flip_x[:, None] == 1, columns - 1 - x, x) + left[:, None]
        index = ((which * self.size)[:, None, None] + y[:, :, None]) * self.size + x[:, None, :]
        return self.noise.view(-1)[index.view(batch, -1)]


def _hide_smallest(scores: Tensor, ratio: float) -> Tensor:
    return mask_from_scores(scores, n_hidden=count_hidden(scores.shape[1], ratio), largest=False)
