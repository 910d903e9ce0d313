"""M-FAC and perpGrad in a training loop of your own, each beside what it changes.

    python examples/optimizers_in_own_loop.py
    python examples/optimizers_in_own_loop.py --steps 500 --gradients 256

A small network learns handwritten digits in a plain PyTorch loop. `MFAC` takes the place of SGD: the same gradient, times an
inverse Fisher matrix that is made of the last gradients. `PerpGrad` goes around any optimizer, AdamW here: it turns gradients at
right angles to the weights, so that these do not merely grow. Both are torch optimizers with the usual `step()`: `zero_grad`,
schedulers and `state_dict` work as ever.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from sfumato.data import digits
from sfumato.optim import MFAC, PerpGrad


def build() -> nn.Module:
    """Your own network; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train with each; returns the loss, the test accuracy and the growth of the weights by optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each training")
    parser.add_argument(
        "--gradients", type=int, default=64, help="gradients that M-FAC keeps; memory is that of so many networks"
    )
    options = parser.parse_args(arguments)

    train, test = digits()
    assert train.label is not None  # digits have labels
    figures: dict[str, dict[str, float]] = {}
    for name in ("SGD", "M-FAC", "AdamW", "perpGrad, AdamW"):
        net = build()
        params = list(net.parameters())
        optimizer: Optimizer
        if name == "SGD":
            optimizer = SGD(params, lr=0.1)
        elif name == "M-FAC":
            optimizer = MFAC(params, lr=0.1, ngrads=options.gradients, damp=0.1)  # few gradients need more damping than 1024
        else:
            optimizer = AdamW(params, lr=3e-3, weight_decay=0.0)
        if name.startswith("perpGrad"):
            optimizer = PerpGrad(optimizer)

        start = torch.stack([p.detach().norm() for p in params]).norm()
        generator = torch.Generator().manual_seed(0)
        for _ in range(options.steps):
            rows = torch.randint(len(train), (64,), generator=generator)
            loss = nn.functional.cross_entropy(net(train.x[rows]), train.label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        with torch.no_grad():
            loss = nn.functional.cross_entropy(net(train.x), train.label)
            right = (net(test.x).argmax(1) == test.label).float().mean()
        longer = torch.stack([p.detach().norm() for p in params]).norm() / start
        figures[name] = {"loss": float(loss), "accuracy": float(right), "weights": float(longer)}
        print(f"{name:>15}: loss {loss:.4f}, test accuracy {right:.3f}, weights {longer:.3f} times as long as at first")
    return figures


if __name__ == "__main__":
    main()
