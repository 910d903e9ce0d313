"""What it costs to wrap an optimizer or a loss, and class statistics of features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built, mlp
from sfumato.optim import PerpGrad, gradient_norm_penalty
from sfumato.probes import nc1


def training_step(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer], width: int, batch: int) -> Run:
    """Forward, backward and update of a fully connected network."""
    net = built(partial(mlp, width))
    optimizer = wrap(torch.optim.AdamW(net.parameters(), 1e-4))
    x, y = torch.rand(batch, 784), torch.randint(10, (batch,))

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return run


@race(
    "perpGrad: a whole training step with gradients at right angles to the weights, over the step without",
    "The projection reads every weight and gradient a few times, whatever the batch, while forward and backward grow with it: "
    "in a fully connected network each weight is used once a sample, so this is the dearest case.",
)
def perpgrad(quick: bool) -> Iterator[Heat]:
    """The lanes do different things by design; the limit is the 3 % that we aim at."""
    width, batches = (64, (32,)) if quick else (2048, (64, 512))
    for batch in batches:
        lanes = {"perpGrad(AdamW)": partial(training_step, PerpGrad, width, batch)}
        lanes["AdamW"] = partial(training_step, lambda optimizer: optimizer, width, batch)
        count = sum(p.numel() for p in mlp(width).parameters())
        yield Heat(
            f"{count / 1e6:.2g} M weights, batch {batch}", lanes, free=("AdamW",), limit=None if quick else 1.03, memory=False
        )


def output_of(width: int, batch: int) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    net = built(partial(mlp, width))
    x = torch.rand(batch, 784, generator=torch.Generator().manual_seed(0))
    return list(net.parameters()), lambda: net(x).mean()


def finite_difference(width: int, batch: int, r: float) -> Run:
    params, output = output_of(width, batch)

    def closure() -> None:
        for p in params:
            p.grad = None
        output().backward()

    return lambda: gradient_norm_penalty(closure, params, r)[1]


def double_backward(width: int, batch: int, r: float) -> Run:
    params, output = output_of(width, batch)

    def run() -> list[Tensor]:
        grads = torch.autograd.grad(output(), params, create_graph=True)
        norm = torch.stack([g.norm() for g in grads]).norm()
        return list(torch.autograd.grad(norm, params, materialize_grads=True))

    return run


@race(
    "IGNITE's penalty: the gradient of a gradient norm, by a finite difference against differentiating twice",
    "Two plain passes against one pass, its graph, and a pass through that graph: about the same arithmetic. The finite "
    "difference holds a copy of the weights and a second gradient instead of the graph, which is more where weights outweigh "
    "activations; it works where a layer has no second derivative.",
)
def gradient_norm(quick: bool) -> Iterator[Heat]:
    """Equal to 2 % at a small step r: the error is of order r."""
    width, batch = (64, 32) if quick else (1024, 128)
    settings = (width, batch, 1e-3)
    yield Heat(
        f"3 layers of {width}, batch {batch}",
        {"sfumato": partial(finite_difference, *settings), "double backward": partial(double_backward, *settings)},
        tolerance=0.02,
    )


def features(n: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % k
    return torch.randn(n, d, dtype=torch.float64, generator=g) + torch.randn(k, d, dtype=torch.float64, generator=g)[
        labels
    ], labels


def our_nc1(n: int, d: int, k: int) -> Run:
    return partial(nc1, *features(n, d, k))


def outer_products(n: int, d: int, k: int) -> Run:
    """The textbook: all outer products of a class at once, a d by d matrix, its pseudo-inverse."""
    x, labels = features(n, d, k)

    def run() -> Tensor:
        means = torch.stack([x[labels == c].mean(0) for c in range(k)])
        within = torch.zeros(d, d, dtype=x.dtype)
        for c in range(k):
            apart = x[labels == c] - means[c]
            within += (apart[:, :, None] @ apart[:, None, :]).sum(0)
        between = (means - x.mean(0)).T @ (means - x.mean(0)) / k
        return torch.trace(within / n @ torch.linalg.pinv(between)) / k

    return run


@race(
    "NC1, the collapse of features onto class means",
    "Ours measures the spread in the K directions that the means span, without a d by d matrix; the textbook makes one of every "
    "sample.",
)
def collapse(quick: bool) -> Iterator[Heat]:
    """Equal to 1e-6."""
    size = (200, 32, 4) if quick else (1000, 512, 10)
    lanes = {"sfumato": partial(our_nc1, *size), "outer products": partial(outer_products, *size)}
    yield Heat(f"{size[0]:,} samples, {size[1]} features, {size[2]} classes", lanes, tolerance=1e-6)
