"""What the engine costs over a loop that a person writes for one method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Heat, Lane, Run, race
from sfumato.data import Batch, photo_crops
from sfumato.engine import Options, Trainer
from sfumato.masks import random_mask
from sfumato.method import Context
from sfumato.papers.masking.mae import MAE

SIZE = 64
"""Samples a step, over all processes; as many as the data has, so that every loop averages over the same samples."""


class Plain(MAE):
    """MAE without augmentation, and one mask a step for all samples: the loss then does not depend on their order."""

    def augment(self) -> None:
        return None

    def mask(self, batch_size: int, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        fixed = torch.Generator().manual_seed(int(1e6 * progress))
        return random_mask(1, self.encoder.grid, self.config.mask_ratio, generator=fixed).expand(batch_size, -1)


def method() -> Plain:
    """The same weights every time."""
    torch.manual_seed(0)
    return Plain(Plain.Config.small(channels=3, batch_size=SIZE))


def losses(method: Plain, images: Tensor, steps: int) -> list[float]:
    """The loss under 8 masks after a training: what the loops have to agree on."""
    x = method.normalised(images)
    with torch.no_grad():
        return [float(method.masked_loss(x, method.mask(x, torch.Generator(), k / 8))) for k in range(8)]


def engine(images: Tensor, steps: int) -> Run:
    """Checks, keyed noise and logging included."""

    def run() -> list[float]:
        trained: Any = Trainer(method(), images, Options(device="cpu", workers=0), steps=steps).train(show=False)
        return losses(trained, images, steps)

    return run


def bare(images: Tensor, steps: int) -> Run:
    """A loop in ten lines."""

    def run() -> list[float]:
        net = method()
        optimizer = net.optimizers()["net"]
        ctx = Context(0, steps, 0, torch.Generator().manual_seed(0), {"net": optimizer})
        for _ in range(steps):
            index = torch.randperm(len(images))[:SIZE]
            ctx.scale_lr(net.lr_factor(ctx.progress))
            loss = net.loss(Batch(images[index], index), ctx).value
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            ctx.step += 1
        return losses(net, images, steps)

    return run


class Forward(torch.nn.Module):
    """A loss as a forward pass, which DDP wraps."""

    def __init__(self, net: Plain, ctx: Context) -> None:
        super().__init__()
        self.net, self.ctx = net, ctx

    def forward(self, batch: Batch) -> Tensor:
        return self.net.loss(batch, self.ctx).value


def accelerate_loop(images: Tensor, steps: int) -> Run:
    """accelerate as its documentation has it: a prepared model in DDP, a prepared loader, `backward`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def run() -> list[float]:
        net = method()
        plain = net.optimizers()["net"]
        ctx = Context(0, steps, 0, torch.Generator().manual_seed(0), {"net": plain})
        data = torch.utils.data.TensorDataset(images, torch.arange(len(images)))
        loader = torch.utils.data.DataLoader(data, SIZE // accelerator.num_processes, shuffle=True)
        model, optimizer, loader = accelerator.prepare(Forward(net, ctx), plain, loader)
        while ctx.step < steps:
            for x, index in loader:
                ctx.scale_lr(net.lr_factor(ctx.progress))
                loss = model(Batch(x, index))
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                ctx.step += 1
                if ctx.step == steps:
                    break
        return losses(net, images, steps)

    return run


def pictures() -> Tensor:
    return photo_crops(SIZE, 32, generator=torch.Generator().manual_seed(0))


def against(peers: dict[str, Callable[[Tensor, int], Run]], steps: int) -> Heat:
    images = pictures()
    lanes: dict[str, Lane] = {name: partial(loop, images, steps) for name, loop in {"sfumato": engine, **peers}.items()}
    return Heat(f"MAE of the small preset, {SIZE} samples a step", lanes, per=steps, tolerance=1e-3, memory=False)


@race(
    "The engine over a bare loop, in one process",
    "The engine checks the loss, seeds the noise of every step and can stop and resume; a bare loop does none of it, so a ratio "
    "a little above 1 is the price.",
)
def engine_bare(quick: bool) -> Iterator[Heat]:
    """Equal losses after the training to 1e-3: the samples are summed in another order."""
    yield against({"bare loop": bare}, 5 if quick else 20)


@race(
    "The engine over accelerate's own loop in DDP, two processes on the CPU",
    "The engine sums all gradients in one reduction after the backward pass, as losses are weighted and may be called again. "
    "DDP sums buckets while that pass is still running, which pays with large networks and slow links.",
    processes=2,
)
def engine_processes(quick: bool) -> Iterator[Heat]:
    """The same samples, half in each process, so the same losses; the number of processes is asserted."""
    heat = against({"accelerate": accelerate_loop}, 5 if quick else 20)
    from accelerate import Accelerator

    world = Accelerator(cpu=True).num_processes
    if world != 2:
        raise RuntimeError(f"{world} processes were started instead of 2: nothing to compare")
    yield heat
