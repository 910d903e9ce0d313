"""Act 2: masked autoencoders under white, green and red masks, one short equal budget each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.cli.console import hint
from sfumato.data import photo_crops, photo_names, photos
from sfumato.engine import Run, Trainer, build
from sfumato.engine.options import Options
from sfumato.engine.stream import as_data
from sfumato.method import Batch
from sfumato.papers.masking.colormae import ColorMAE
from sfumato.papers.masking.mae import MAE

STEPS = 450
HELD_OUT = (("chelsea", 100, 140), ("chelsea", 165, 205), ("coins", 120, 100), ("gravel", 200, 200))
"""Photograph, top and left of the crops that are shown: an eye, fur, a coin's rim, stones."""
ARMS: dict[str, tuple[type[MAE], dict[str, Any]]] = {
    "white": (MAE, {}),
    "green": (ColorMAE, {"color": "green"}),
    "red": (ColorMAE, {"color": "red"}),
}


def act(page: Any, out: Path, pace: float, seed: int) -> None:
    """Train one autoencoder a colour; show masks, reconstructions and losses."""
    data = as_data(photo_crops(2048, 32, split="train", generator=torch.Generator().manual_seed(seed)))
    held_out = crops(32)
    steps = max(10, round(STEPS * pace))
    curves, pictures, rows = {}, {}, []
    for name, (kind, settings) in ARMS.items():
        hint(f"{name} masks")
        method = build(
            kind, data.facts, preset="small", settings={**settings, "steps": steps, "norm_pix": False}, seed=seed, device="cpu"
        )
        run = Run.create(out / "runs", kind.__name__.lower())
        run.write_config(
            {"slug": kind.__name__.lower(), "data": "sample:photos", "settings": method.config.model_dump(mode="json")}
        )
        with run.lock():
            Trainer(method, data, Options(seed=seed, device="cpu", log_every=5), run=run).train()
        logged = [m for m in run.metrics() if "loss" in m]
        curves[name] = ([m["step"] for m in logged], [m["loss"] for m in logged])
        shown = method.preview(Batch(held_out, torch.arange(len(held_out))), torch.Generator().manual_seed(seed))
        pictures[name] = shown
        rows.append([name, logged[-1]["seconds"], curves[name][1][-1]])
    page.section(
        "What a masked autoencoder makes of three kinds of mask",
        intro=(
            "Three quarters of each 32x32 crop are hidden and must be painted in. White masks are MAE's (He et al. 2021); green "
            "and red ones come from filtered noise (ColorMAE, ECCV 2024): the same count of hidden patches, spread in clusters "
            f"(green) or in large blobs (red). The three networks are alike and had the same {len(data)} crops of sample "
            f"photographs and {steps} steps; the crops below come from photographs they never saw. Look at how much harder red "
            "blobs are to fill than white specks."
        ),
    )
    labels = {"picture": "picture"} | {f"{name}: {row}": row for name in pictures for row in ("masked", "reconstruction")}
    first = next(iter(pictures.values()))
    from sfumato.report import curves as plot
    from sfumato.report import grid

    strip: dict[str, Tensor] = {}
    for label, row in labels.items():
        source = first if row == "picture" else pictures[label.split(":")[0]]
        strip[label] = grid(source[row], cols=len(held_out))
    page.pictures(strip, caption="Held-out crops, what each network saw, and what it made of it.", cols=1)
    page.figure(
        plot(curves, xlabel="step", ylabel="loss on hidden patches", smooth=9),
        caption="The losses are not a contest: each is measured on its own masks, and clustered masks are harder.",
    )
    page.table(rows, columns=["mask", "seconds", "last loss"])


def crops(side: int) -> Tensor:
    """The crops of `HELD_OUT`, `[4, 3, side, side]` in [0, 1]."""
    whole = dict(zip(photo_names("test"), photos("test")))
    return torch.stack([whole[name][:, top : top + side, left : left + side].float() / 255 for name, top, left in HELD_OUT])
