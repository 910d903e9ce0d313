"""The classical denoisers beside which the demo shows C-BSN, with an advantage that nobody has in practice.

Their settings are chosen by PSNR against the clean picture, the best of a grid: what comes out is the most that wavelet
thresholding (Chang et al. 2000; Donoho and Johnstone 1994) and non-local means (Buades et al. 2005; the fast form of Darbon et
al. 2008) of scikit-image can do on this grid.

>>> import torch
>>> from sfumato.cli.demo.classical import tuned_wavelet
>>> clean = torch.linspace(0, 1, 64).expand(3, 64, 64)
>>> noisy = clean + 0.1 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
>>> restored, settings, decibels = tuned_wavelet(noisy, clean)
>>> sorted(settings), decibels > 25
(['method', 'sigma', 'wavelet'], True)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Settings = dict[str, Any]
Outcome = tuple[Tensor, Settings, float]
"""The restored picture `[C, H, W]` in [0, 1], the settings that gave it, and its PSNR in dB."""


def tuned_wavelet(noisy: Tensor, clean: Tensor) -> Outcome:
    """The best wavelet shrinkage: kind of wavelet, rule of the threshold, assumed noise; in YCbCr where there is colour.

    Args:
        noisy: `[C, H, W]`.
        clean: the same without noise, in [0, 1].

    Returns:
        Restored picture, settings, PSNR.
    """
    from skimage.restoration import denoise_wavelet

    x, color = _channels_last(noisy), len(noisy) == 3
    levels = rms(noisy, clean) * np.geomspace(0.2, 5, 14)
    grid = itertools.product(["db1", "db2", "sym4", "coif2"], ["BayesShrink", "VisuShrink"], levels)

    def restore(settings: Settings) -> NDArray[np.float32]:
        return denoise_wavelet(x, convert2ycbcr=color, channel_axis=-1, rescale_sigma=True, **settings)  # type: ignore[no-any-return]

    return _best(restore, ({"wavelet": w, "method": m, "sigma": float(s)} for w, m, s in grid), clean)


def tuned_nl_means(noisy: Tensor, clean: Tensor) -> Outcome:
    """The best non-local means: cut-off and assumed noise on a grid, then the sizes of the patch and of the window.

    Args:
        noisy: `[C, H, W]`.
        clean: the same without noise, in [0, 1].

    Returns:
        Restored picture, settings, PSNR.
    """
    from skimage.restoration import denoise_nl_means

    x, noise = _channels_last(noisy), rms(noisy, clean)

    def restore(settings: Settings) -> NDArray[np.float32]:
        return denoise_nl_means(x, fast_mode=True, channel_axis=-1, **settings)  # type: ignore[no-any-return]

    grid = itertools.product([0.35, 0.5, 0.7, 0.85, 1.0, 1.2], [0.0, 0.7, 1.0])
    levels = [{"h": h * noise, "sigma": s * noise, "patch_size": 7, "patch_distance": 11} for h, s in grid]
    first = _best(restore, levels, clean)
    sizes = [(5, 11), (7, 7), (9, 11), (9, 15), (11, 13)]
    others = [{**first[1], "patch_size": p, "patch_distance": d} for p, d in sizes]
    return max(first, _best(restore, others, clean), key=lambda outcome: outcome[2])


def rms(noisy: Tensor, clean: Tensor) -> float:
    """Root mean square of the noise."""
    return float((noisy - clean).square().mean().sqrt())


def _best(restore: Callable[[Settings], NDArray[np.float32]], grid: Iterable[Settings], clean: Tensor) -> Outcome:
    best: Outcome | None = None
    for settings in grid:
        pixels = torch.from_numpy(restore(settings)).view(*clean.shape[1:], len(clean))  # scikit-image may drop a lone channel
        restored = pixels.permute(2, 0, 1).to(clean.dtype).clamp(0, 1)
        decibels = float(-10 * (restored - clean).square().mean().log10())
        if best is None or decibels > best[2]:
            best = restored.contiguous(), settings, decibels
    assert best is not None
    return best


def _channels_last(x: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(x.permute(1, 2, 0).numpy(), dtype=np.float32)
