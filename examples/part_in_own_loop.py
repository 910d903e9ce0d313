"""A mask and a loss of sfumato in a training loop of your own, with a network of your own.

    python examples/part_in_own_loop.py
    python examples/part_in_own_loop.py --steps 3000 --color red

A small network learns to paint what a mask hides of handwritten digits. The network and the loop are plain PyTorch; parts take
tensors and give tensors, and know nothing of methods or runs. At the end stands the error on digits that were not trained on,
beside that of normalised convolution, which needs no training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sfumato.data import digits
from sfumato.losses import masked_l1
from sfumato.masks import color_noise_mask, normalized_convolution, upsample_mask

SIZE, PATCH = 16, 2  # side of a picture and of what is hidden at once, in pixels


class Painter(nn.Module):
    """Your own network: it corrects a first guess, and is told what of it is a guess."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=4, dilation=4),
            nn.GELU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, guess: Tensor, hidden: Tensor) -> Tensor:
        """Pictures `[B, 1, H, W]` from guessed ones and the mask `[B, 1, H, W]`."""
        return guess + self.layers(torch.cat((guess, hidden.to(guess.dtype)), 1))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, then report the mean absolute error of hidden pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--color", default="green", help="of the mask: green, red, blue, purple or white")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the picture that is hidden")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)

    def hide(count: int) -> Tensor:  # bool [count, 1, SIZE, SIZE], True = hidden
        grid = (SIZE // PATCH, SIZE // PATCH)
        return upsample_mask(color_noise_mask(count, grid, options.ratio, color=options.color, generator=generator), grid, PATCH)

    net = Painter()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train, test = digits(size=SIZE)  # test.x is float [497, 1, SIZE, SIZE] in [0, 1]
    for _ in range(options.steps):
        x = train.x[torch.randint(len(train), (32,), generator=generator)]
        hidden = hide(len(x))
        loss = masked_l1(net(normalized_convolution(x, hidden, sigma=1.0), hidden), x, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x, hidden = test.x, hide(len(test))
    guess = normalized_convolution(x, hidden, sigma=1.0)
    with torch.no_grad():
        errors = {"guess": float(masked_l1(guess, x, hidden)), "network": float(masked_l1(net(guess, hidden), x, hidden))}
    print(f"hidden pixels are off by {errors['guess']:.4f} when guessed, by {errors['network']:.4f} when painted by the network")
    return errors


if __name__ == "__main__":
    main()
