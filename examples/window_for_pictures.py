"""Over which steps does a sampler betray a picture that could not be? A network learns simple shapes, of which each stands at
most once and in a column of its own; pictures that break this are counted, and every window of the chain is asked to tell them.

    python examples/window_for_pictures.py
    python examples/window_for_pictures.py --steps 5000 --samples 2000 --sample-steps 250

The window is chosen by half of the samples and judged by the other half; beside it stands how well the number of white pixels
tells, because two triangles are more than one. For your own pictures replace `find_shapes` by what you find wrong with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import sfumato
from sfumato.data import find_shapes, simple_shapes
from sfumato.diffusion import ScannedWindows, scan_windows
from sfumato.papers.diffusion.ddpm import DDPM

AREA = 30.0
"""Pixels of a shape: in pictures of 32 pixels a column is 10 wide."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, draw, count; returns the AUC of every tenth of the chain, of the window chosen, and of the white pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of training, 64 pictures each")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--sampler", default="ddpm", choices=["ddim", "ddpm"])
    parser.add_argument("--sample-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    run = train(options.steps, options.seed)
    run.config = run.config.model_copy(update={"sampler": options.sampler, "sample_steps": options.sample_steps})
    scan = draw(run, options.samples, options.seed)
    found = find_shapes(scan.samples, area=AREA)
    bad = found.off_support
    print(f"{int(bad.sum())} of {len(bad)} pictures could not be; {int((found.unknown > 0).sum())} hold a broken shape")
    return judge(scan, bad)


def train(steps: int, seed: int) -> DDPM:
    """A small U-Net on 5000 pictures."""
    images, _ = simple_shapes(5000, 32, area=AREA, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    run = DDPM(DDPM.Config.small(channels=1, image_size=32, width=16, mults=(1, 2, 4)))
    sfumato.fit(run, images, steps=steps, seed=seed)
    return run


@torch.no_grad()
def draw(run: DDPM, samples: int, seed: int) -> ScannedWindows:
    """Samples, and their variance over all windows between twentieths of the chain."""
    generator = torch.Generator().manual_seed(seed)
    slices = min(20, run.trajectory_steps)
    return scan_windows(run.sample, samples, steps=run.trajectory_steps, slices=slices, batch=125, generator=generator)


def judge(scan: ScannedWindows, bad: torch.Tensor) -> dict[str, float]:
    """Tell, and return, how well windows and white pixels find the bad ones."""
    steps = scan.windows[-1][1]
    half = torch.arange(len(bad)) % 2 == 0
    chooses, judges = (ScannedWindows(scan.samples[part], scan.windows, scan.variance[:, part]) for part in (half, ~half))
    auc = dict(zip(scan.windows, scan.auc(bad).tolist()))
    shown = [w for w in auc if w[1] - w[0] == steps // 10 and w[0] % (steps // 10) == 0]
    told = {f"steps {low} to {high} of {steps}": auc[low, high] for low, high in [*shown, scan.windows[-1]]}
    if bad[half].any() and not bad[half].all():
        best = chooses.best(bad[half])
        unseen = judges.auc(bad[~half])[scan.windows.index(best)]
        told[f"chosen, steps {best[0]} to {best[1]}"] = float(unseen)
    white = (scan.samples > 0.5).flatten(1).sum(1)
    told["white pixels"] = float(ScannedWindows(scan.samples, [(0, steps)], white[None]).auc(bad)[0])
    for name, value in told.items():
        print(f"{name:24} AUC {value:.3f}")
    return told


if __name__ == "__main__":
    main()
