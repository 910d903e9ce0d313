"""A method trained on batches of your own DataLoader: once by `sfumato.fit`, once in a loop written by hand.

    python examples/method_on_own_dataloader.py
    python examples/method_on_own_dataloader.py --data folder_per_class/ --steps 2000

A loader gives images in [0, 1] as `[B, C, H, W]`, `(images, labels)` or `(images, targets)`; here torchvision's ImageFolder, or
crops of photographs where no folder is given. The method is ColorMAE, a masked autoencoder, whose labels are not looked at. `fit`
adds a progress bar, checkpoints, mixed precision and several processes; the loop by hand shows all that a method needs from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import sfumato
from sfumato.data import Batch, photo_crops
from sfumato.method import Context
from sfumato.papers.masking.colormae import ColorMAE

SIZE = 32  # side of a picture in pixels


def own_loader(folder: str | None) -> DataLoader[tuple[Tensor, Tensor]]:
    """Your own data, as you would load it without sfumato."""
    data: Dataset[Any]
    if folder is None:
        data = TensorDataset(photo_crops(512, SIZE, generator=torch.Generator().manual_seed(0)), torch.zeros(512).long())
    else:
        crop = v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), antialias=True)
        data = ImageFolder(folder, v2.Compose([v2.ToImage(), crop, v2.ToDtype(torch.float32, scale=True)]))
    return DataLoader(data, batch_size=min(64, len(data)), shuffle=True, drop_last=True)  # type: ignore[arg-type]


def train_by_hand(method: ColorMAE, loader: DataLoader[tuple[Tensor, Tensor]], steps: int) -> ColorMAE:
    """The loop that `sfumato.fit` saves you; it fits any method whose optimizers take one closure."""
    optimizers = method.optimizers()
    ctx = Context(step=0, total=steps, seed=0, generator=torch.Generator().manual_seed(0), optimizers=optimizers)
    endless: Iterator[tuple[Tensor, Tensor]] = chain.from_iterable(repeat(loader))
    for ctx.step, (x, label) in enumerate(islice(endless, steps)):
        batch = Batch(x, torch.arange(len(x)), label)
        for wanted in method.steps(ctx):  # sets the learning rate of this moment, then asks for a step
            optimizer = optimizers[wanted.optimizer]
            optimizer.zero_grad()
            wanted.losses[0](batch, ctx).value.backward()
            optimizer.step()
    return method.eval()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train twice from the same weights, and report the loss on hidden patches of pictures that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder with one folder of pictures for each class; default: crops of photographs")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    loader = own_loader(options.data)
    config = ColorMAE.Config.small(image_size=SIZE, channels=3, batch_size=loader.batch_size)
    untrained, by_fit, by_hand = ColorMAE(config), ColorMAE(config), ColorMAE(config)
    for method in (by_fit, by_hand):
        method.load_state_dict(untrained.state_dict())

    sfumato.fit(by_fit, loader, steps=options.steps, device="cpu")
    train_by_hand(by_hand, loader, options.steps)

    x = photo_crops(256, SIZE, split="test", generator=torch.Generator().manual_seed(0))
    unseen = Batch(x, torch.arange(len(x)))
    methods = {"untrained": untrained, "by sfumato.fit": by_fit, "by hand": by_hand}
    losses = {name: method.evaluate([unseen])["masked_loss"] for name, method in methods.items()}
    for name, loss in losses.items():
        print(f"{name:>15}: loss {loss:.3f} on hidden patches of unseen photographs")
    print(f"features of 256 photographs: {list(by_fit.encode(x).shape)}")
    return losses


if __name__ == "__main__":
    main()
