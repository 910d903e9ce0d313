"""Act 1: a photograph with spatially correlated noise, restored by C-BSN trained on it alone, beside two classical denoisers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.cli.console import hint
from sfumato.cli.demo.classical import tuned_nl_means, tuned_wavelet
from sfumato.data import photos, read_image, write_image
from sfumato.engine import Run, Trainer, build
from sfumato.engine.options import Options
from sfumato.engine.stream import as_data
from sfumato.metrics import psnr
from sfumato.papers.restoration.cbsn import CBSN
from sfumato.physics import correlated_noise

SIGMA = 0.12
LONGEST = 512
MINUTES = 1.4


def act(page: Any, photo: Path | None, out: Path, pace: float, seed: int) -> None:
    """Degrade, restore three ways, and show them side by side."""
    clean = shrink(load(photo), LONGEST)
    line = torch.tensor([1.0, 2.0, 1.0])
    noise = correlated_noise(clean.shape, SIGMA, torch.outer(line, line), generator=torch.Generator().manual_seed(seed))
    noisy = (clean + noise).clamp(0, 1)
    write_image(out / "noisy.png", noisy)
    seconds: dict[str, float] = {}
    restored: dict[str, Tensor] = {}

    began = time.monotonic()
    method, run = train_on(noisy, out, pace, seed)
    restored["C-BSN"] = method.restore(noisy[None])[0]
    seconds["C-BSN"] = time.monotonic() - began
    settings = {"C-BSN": f"{run.metrics()[-1]['step']} steps on the noisy photograph alone"}
    for name, tuned in (("wavelet", tuned_wavelet), ("non-local means", tuned_nl_means)):
        hint(f"tuning the {name} denoiser against the clean photograph")
        began = time.monotonic()
        restored[name], chosen, _ = tuned(noisy, clean)
        seconds[name] = time.monotonic() - began
        settings[name] = ", ".join(f"{k} = {v:.3g}" if isinstance(v, float) else f"{k} = {v}" for k, v in chosen.items())
    for name, image in restored.items():
        write_image(out / f"restored-{name.replace(' ', '-')}.png", image)

    page.section(
        "A photograph, restored by a network that saw nothing else",
        intro=(
            f"Noise with a standard deviation of {SIGMA:g} (on a scale of 0 to 1), correlated between neighbouring pixels as in "
            "a camera, was added to the photograph. C-BSN (Jang et al., ICCV 2023) learned from that one noisy picture: no clean "
            "picture, no other picture. The two classical denoisers had an advantage that nobody has in practice: their settings "
            "were chosen against the clean photograph."
        ),
    )
    page.slider(noisy, restored, labels=("noisy", ""), reference=clean, reference_label="the clean photograph",
                caption="Drag the divider; choose a restoration above.")  # fmt: skip
    rows = [["noisy", float(psnr(noisy[None], clean[None])), ssim(noisy, clean), "-", ""]]
    rows += [
        [n, float(psnr(x[None], clean[None])), ssim(x, clean), f"{seconds[n]:.0f} s", settings[n]] for n, x in restored.items()
    ]
    page.table(rows, columns=["", "PSNR (dB)", "SSIM", "time", "settings"], highlight={"PSNR (dB)": "max", "SSIM": "max"})
    top, left, side = detail(clean)
    cut = (slice(None), slice(top, top + side), slice(left, left + side))
    page.pictures(
        {name: x[cut] for name, x in {"noisy": noisy, **restored, "clean": clean}.items()},
        caption="The same detail of each; a click opens them zoomed in step.",
    )
    page.text(f"The trained network is a run like any other: `sfumato apply {run.path} PICTURE -o OUT`.")


def train_on(noisy: Tensor, out: Path, pace: float, seed: int) -> tuple[Any, Run]:
    """C-BSN's small preset, trained on one noisy picture."""
    data = as_data([noisy])
    method = build(CBSN, data.facts, preset="small", seed=seed, device="cpu")
    run = Run.create(out / "runs", "cbsn")
    run.write_config(
        {"slug": "cbsn", "data": str((out / "noisy.png").resolve()), "settings": method.config.model_dump(mode="json")}
    )
    with run.lock():
        Trainer(method, data, Options(seed=seed, device="cpu"), minutes=MINUTES * pace, run=run).train()
    return method, run


def load(photo: Path | None) -> Tensor:
    """A person's picture, or the astronaut, `[3, H, W]` in [0, 1]."""
    if photo is None:
        return photos("train")[0].float() / 255
    x = read_image(photo).float()
    return x if x.shape[0] == 3 else x.expand(3, -1, -1)


def shrink(x: Tensor, longest: int) -> Tensor:
    """At most `longest` pixels a side, so that a few minutes suffice; smaller pictures stay as they are."""
    scale = longest / max(x.shape[-2:])
    if scale >= 1:
        return x
    hint(f"the photograph is shown at {scale:.0%} of its size, so that a minute or two of training suffices")
    size = [max(1, round(s * scale)) for s in x.shape[-2:]]
    return torch.nn.functional.interpolate(x[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def detail(clean: Tensor, side: int = 128) -> tuple[int, int, int]:
    """Top, left and side of the square with most fine structure (largest sum of gradients)."""
    side = min(side, *clean.shape[-2:])
    grey = clean.mean(0)
    energy = torch.zeros_like(grey)
    energy[1:] += grey.diff(dim=0).abs()
    energy[:, 1:] += grey.diff(dim=1).abs()
    sums = torch.nn.functional.avg_pool2d(energy[None, None], side, stride=8)[0, 0]
    row, col = divmod(int(sums.argmax()), sums.shape[1])
    return 8 * row, 8 * col, side


def ssim(x: Tensor, clean: Tensor) -> float:
    """Structural similarity."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(x.numpy(), clean.numpy(), channel_axis=0, data_range=1.0))
