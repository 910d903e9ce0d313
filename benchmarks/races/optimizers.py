"""A step of AdaHessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Heat, Lane, Run, race
from sfumato.nn.flat import flatten_params
from sfumato.optim import AdaHessian

SEED = 2147483647
"""timm's own seed of its signs."""
SETTINGS: dict[str, Any] = {"lr": 0.1, "eps": 1e-8}


def mlp(width: int) -> nn.Module:
    layers = [m for cin in (784, width, width) for m in (nn.Linear(cin, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convnet(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for cin, cout in ((3, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(cin, cout, 3, stride=1 + (cout > cin > 3), padding=1), nn.GroupNorm(4, cout), nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def trained(net: nn.Module, step: Callable[[Callable[[], Tensor]], Any], batch: tuple[Tensor, Tensor]) -> Run:
    """One step; gives the weights after it."""
    x, y = batch
    params = list(net.parameters())

    def run() -> list[Tensor]:
        step(lambda: nn.functional.cross_entropy(net(x), y))
        return params

    return run


def ours(make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], *, given: bool = False) -> Run:
    """`given`: the signs that the peers draw."""
    net = built(make)
    noise = None
    if given:
        generator = torch.Generator().manual_seed(SEED)
        signs = {n: torch.randint(2, p.shape, generator=generator) * 2.0 - 1.0 for n, p in net.named_parameters()}
        noise = flatten_params(signs)[None]
    optimizer = AdaHessian(net.parameters(), block=None, noise=noise, **SETTINGS)
    return trained(net, optimizer.step, batch)


def theirs(module: str, make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor]) -> Run:
    """As their documentation says: gradients with a graph, then a step."""
    if module == "timm":
        from timm.optim import Adahessian as Peer
    else:
        from pytorch_optimizer import AdaHessian as Peer
    net = built(make)
    optimizer = Peer(net.parameters(), **SETTINGS)
    torch.manual_seed(SEED)  # pytorch_optimizer draws from the global generator

    def step(loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward(create_graph=True)
        optimizer.step()

    return trained(net, step, batch)


def difference_of_updates(start: Tensor, ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative one over all weights: updates differ by many orders of magnitude."""
    a, b = (flatten_params(weights).detach() for weights in (ours, theirs))
    return float(((a - b).abs() / (b - start).abs().clamp_min(1e-6)).max())


@race(
    "AdaHessian step: forward, gradient, one Hessian-vector product, update",
    "All do the same two passes through the graph, which is most of the step; ours draws all signs at once and updates all "
    "weights in fused passes, as pytorch_optimizer does, where timm goes weight by weight.",
)
def adahessian(quick: bool) -> Iterator[Heat]:
    """The same signs give the same update of every weight; the timed lanes draw their own, one sign vector a step."""
    generator = torch.Generator().manual_seed(0)
    width, thin, size = (128, 8, 16) if quick else (2048, 32, 32)
    labels = torch.randint(10, (64,), generator=generator)
    cases = {
        "fully connected": (partial(mlp, width), torch.rand(64, 784, generator=generator)),
        "convolutional": (partial(convnet, thin), torch.rand(64, 3, size, size, generator=generator)),
    }
    for name, (make, x) in cases.items():
        batch = (x, labels)
        start = flatten_params(built(make)).detach()
        peers: dict[str, Lane] = {m: partial(theirs, m, make, batch) for m in ("pytorch_optimizer", "timm")}
        yield Heat(
            f"{name}, {len(start) / 1e6:.2g} M weights, batch 64",
            {"sfumato": partial(ours, make, batch), **peers},
            checks={"sfumato": partial(ours, make, batch, given=True), **peers},
            tolerance=5e-3,  # where a weight's curvature nearly cancels, its update carries float32's rounding a thousandfold
            difference=partial(difference_of_updates, start),
        )
