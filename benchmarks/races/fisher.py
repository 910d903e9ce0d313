"""Products with an inverse empirical Fisher matrix (M-FAC), against the dense formula and a loop over gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from sfumato.optim import SlidingInverseFisher, StaticInverseFisher

DAMP = 1e-2


def gradients(m: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, d, dtype=dtype, generator=torch.Generator().manual_seed(0))


def window(m: int, d: int, dtype: torch.dtype = torch.float32) -> Run:
    """One more gradient into a full window, and its product."""
    grads = gradients(m, d, dtype)
    sliding = SlidingInverseFisher(m, d, damp=DAMP, dtype=dtype)
    sliding.grads.copy_(grads)
    sliding.refresh(m)
    newest = grads.flip(0)[0].clone()
    return lambda: sliding.update_mul(newest)


def turned(m: int, d: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The window's gradients as they come to stand: each run the newest takes the place of the oldest."""
    grads, step = gradients(m, d, dtype), 0
    newest = grads.flip(0)[0].clone()
    while True:
        grads[step % m] = newest
        step += 1
        yield grads


def loop(m: int, d: int, dtype: torch.dtype = torch.float32) -> Run:
    """Sherman and Morrison's formula, gradient by gradient, which needs all products anew: O(d m²)."""
    windows, newest = turned(m, d, dtype), gradients(m, d, dtype).flip(0)[0].clone()

    def run() -> Tensor:
        grads = next(windows)
        known: list[tuple[Tensor, Tensor]] = []

        def product(x: Tensor) -> Tensor:
            y = x / DAMP
            for inverse, pivot in known:
                y = y - inverse * (inverse @ x) / pivot
            return y

        for i in range(len(grads)):
            v = grads[i]
            inverse = product(v)
            known.append((inverse, m + v @ inverse))
        return product(newest)

    return run


def dense(m: int, d: int, dtype: torch.dtype = torch.float32) -> Run:
    """The matrix itself: O(d³)."""
    windows, newest = turned(m, d, dtype), gradients(m, d, dtype).flip(0)[0].clone()

    def run() -> Tensor:
        grads = next(windows)
        return torch.linalg.solve(grads.T @ grads / m + DAMP * torch.eye(d, dtype=dtype), newest)

    return run


@race(
    "M-FAC: one more gradient into a full window, and the inverse Fisher matrix times it",
    "Ours passes twice over the window and solves an m by m system; a loop over gradients makes m²/2 products of length d, the "
    "dense formula a d by d matrix. The last two heats are no rivals: twice the weights, or twice the gradients, take twice the "
    "time, up to the m³ of the small system.",
)
def sliding_fisher(quick: bool) -> Iterator[Heat]:
    """Equal products to 1e-6 in float64."""
    wide, m, narrow = (2000, 8, 100) if quick else (100_000, 64, 1500)
    exact = partial(window, m, wide, torch.float64), partial(loop, m, wide, torch.float64)
    yield Heat(
        f"{wide:,} weights, {m} gradients", {"sfumato": exact[0], "loop over gradients": exact[1]}, tolerance=1e-6, memory=False
    )
    small = partial(window, m, narrow, torch.float64), partial(dense, m, narrow, torch.float64)
    yield Heat(
        f"{narrow:,} weights, {m} gradients", {"sfumato": small[0], "dense matrix": small[1]}, tolerance=1e-6, memory=False
    )
    large = 4 * wide
    for name, more in (("weights", (m, 2 * large)), ("gradients", (2 * m, large))):
        lanes = {f"twice the {name}": partial(window, *more), f"{large:,} weights, {m} gradients": partial(window, m, large)}
        yield Heat(f"twice the {name}", lanes, free=tuple(lanes), limit=None if quick else 2.3, memory=False)


def static(m: int, d: int) -> Run:
    grads, x = gradients(m, d, torch.float64), gradients(1, d, torch.float64)[0]
    return lambda: StaticInverseFisher(grads, damp=DAMP).mul(x)


def static_dense(m: int, d: int) -> Run:
    grads, x = gradients(m, d, torch.float64), gradients(1, d, torch.float64)[0]
    return lambda: torch.linalg.inv(grads.T @ grads / m + DAMP * torch.eye(d, dtype=torch.float64)) @ x


@race(
    "M-FAC's static matrix: setup, and one product",
    "O(d m²) against O(d³): the advantage grows with the square of weights over gradients.",
)
def static_fisher(quick: bool) -> Iterator[Heat]:
    """Equal products to 1e-6 in float64."""
    m, d = (16, 200) if quick else (128, 1500)
    yield Heat(
        f"{d:,} weights, {m} gradients", {"sfumato": partial(static, m, d), "dense inverse": partial(static_dense, m, d)},
        tolerance=1e-6,
    )  # fmt: skip
