"""Inference of C-BSN against the read-out of the blind-spot networks before it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from sfumato.nn import ConditionalBlindSpotNet
from sfumato.papers.restoration.cbsn import denoise

COPIES, SHARE = 8, 0.16
"""R3 of AP-BSN: how many copies are made, and the share of pixels that are noisy again in each."""


def one_pass(net: ConditionalBlindSpotNet, noisy: Tensor) -> Run:
    return lambda: denoise(net, noisy)


def shuffled(net: ConditionalBlindSpotNet, noisy: Tensor) -> Run:
    """Blind on the four phases of stride 2, put together again."""
    return lambda: denoise(net, noisy, blind=True, stride=2)


def shuffled_and_averaged(net: ConditionalBlindSpotNet, noisy: Tensor) -> Run:
    """AP-BSN with R3 (Lee et al. 2022): that, then the mean of blind passes over copies with some pixels noisy again."""

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        first, total = denoise(net, noisy, blind=True, stride=2), torch.zeros_like(noisy)
        for _ in range(COPIES):
            again = torch.rand(noisy.shape[-2:], generator=generator) < SHARE
            total += denoise(net, torch.where(again, noisy, first), blind=True)
        return total / COPIES

    return run


def unlike_pictures(ours: Tensor, theirs: Tensor) -> float:
    """0 for finite pictures of one shape in [0, 1]: the read-outs differ by design."""
    fine = ours.shape == theirs.shape and all(bool(((x >= 0) & (x <= 1)).all()) for x in (ours, theirs))
    return 0.0 if fine else float("inf")


@race(
    "C-BSN: one full-resolution pass, against shuffling the pixels and averaging (AP-BSN with R3)",
    "One pass against nine over as many pixels, so the ratio to shuffle and average is near one ninth by construction; shuffling "
    "alone costs about as much as the one pass. The same network, but other pictures: only their shape and range are compared "
    "here; which are better is what the paper's claim measures.",
)
def cbsn(quick: bool) -> Iterator[Heat]:
    """A network of the small preset, untrained: the time does not depend on the weights."""
    size, width = (32, 8) if quick else (128, 16)
    net = built(partial(ConditionalBlindSpotNet, 3, width=width, modules=2))
    noisy = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    lanes = {"sfumato": one_pass, "shuffle": shuffled, "shuffle and average": shuffled_and_averaged}
    yield Heat(
        f"a picture of {size} x {size} pixels, width {width}",
        {name: partial(lane, net, noisy) for name, lane in lanes.items()},
        difference=unlike_pictures,
    )
