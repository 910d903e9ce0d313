"""Two masks compared fairly: equal budget, the same first weights and batches for both, several seeds, and an interval.

    python examples/compare_two_masks.py
    python examples/compare_two_masks.py --steps 1000 --seeds 10 --color red

For each seed a small network learns to paint what random masks hide of handwritten digits, and another what coloured masks hide.
Both are judged on digits that they did not see, under masks that neither was trained with: whole blocks. Seeds are paired, so
what counts is the difference within each; its 95 % interval says whether the seeds show one. An interval that holds zero shows
none, whichever mean is the smaller.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sfumato.claim import Interval, paired_interval
from sfumato.data import digits
from sfumato.losses import masked_l1
from sfumato.masks import block_mask, color_noise_mask, fill, random_mask

GRID, RATIO = (8, 8), 0.5  # pixels along each side (a token is a pixel here), share that is hidden


def build(width: int = 32) -> nn.Module:
    """Painted digits `[B, 1, H, W]` from a picture with holes and the mask, `[B, 2, H, W]`."""
    layers: list[nn.Module] = [nn.Conv2d(2, width, 3, padding=1), nn.GELU()]
    for reach in (2, 4):
        layers += [nn.Conv2d(width, width, 3, padding=reach, dilation=reach), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))


def error(net: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of hidden pixels under masks `[B, L]`."""
    hidden = mask.view(-1, 1, *GRID)
    return masked_l1(net(torch.cat((fill(x, hidden), hidden.to(x.dtype)), 1)), x, hidden)


def trained(mask: Callable[[int, torch.Generator], Tensor], x: Tensor, steps: int, seed: int) -> nn.Module:
    """A network whose weights, batches and mask noise depend on the seed alone."""
    torch.manual_seed(seed)
    net, generator = build(), torch.Generator().manual_seed(seed)
    batches = torch.randint(len(x), (steps, 32), generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for rows in batches:
        loss = error(net, x[rows], mask(len(rows), generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def main(arguments: Sequence[str] | None = None) -> tuple[list[dict[str, float]], Interval]:
    """Run all seeds; returns the errors of each, and the interval of the difference, coloured minus random."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--color", default="green", help="green, red, blue or purple")
    options = parser.parse_args(arguments)

    masks: dict[str, Callable[[int, torch.Generator], Tensor]] = {
        "random": lambda n, generator: random_mask(n, GRID, RATIO, generator=generator),
        options.color: lambda n, generator: color_noise_mask(n, GRID, RATIO, color=options.color, generator=generator),
    }
    figures = []
    for seed in range(options.seeds):
        train, test = digits(seed=seed)
        blocks = block_mask(len(test), GRID, RATIO, generator=torch.Generator().manual_seed(seed))
        nets = {name: trained(mask, train.x, options.steps, seed) for name, mask in masks.items()}
        with torch.no_grad():
            figures.append({name: float(error(net, test.x, blocks)) for name, net in nets.items()})
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures[-1].items()))

    interval = paired_interval([f[options.color] - f["random"] for f in figures])
    shown = "a difference" if interval.low > 0 or interval.high < 0 else "no difference"
    print(f"{options.color} minus random: {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]: {shown} shown")
    return figures, interval


if __name__ == "__main__":
    main()
