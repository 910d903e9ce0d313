"""The leading eigenvectors of a denoiser's Jacobian, by products alone, against the whole matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from sfumato.data import c_alpha_images
from sfumato.diffusion import sqrt_uniform_sigma
from sfumato.nn import PlainUNet
from sfumato.probes import denoiser_basis

Denoiser = Callable[[Tensor], Tensor]


def trained(steps: int) -> Denoiser:
    """A blind bias-free denoiser after a few steps: its eigenvalues fall, as those of a fresh network do not."""
    net = built(partial(PlainUNet, 1, 1, (16, 32, 64), norm="bias_free", up="transposed"))
    optimizer, generator = torch.optim.Adam(net.parameters(), 2e-3), torch.Generator().manual_seed(0)
    x = c_alpha_images(32 * steps, 16, 2.0, generator=generator)
    for part in x.split(32):
        z = sqrt_uniform_sigma(len(part), generator=generator).view(-1, 1, 1, 1) * torch.randn(part.shape, generator=generator)
        optimizer.zero_grad()
        (net(part + z) - z).square().mean().backward()
        optimizer.step()
    net.eval().double().requires_grad_(False)
    return lambda y: y - net(y)


def kept(values: Tensor, vectors: Tensor, y: Tensor) -> list[Tensor]:
    """Eigenvalues, and the picture in the leading patterns: what does not depend on their signs."""
    return [values, (values * (vectors @ y.flatten())) @ vectors]


def by_products(f: Denoiser, y: Tensor, k: int) -> Run:
    def run() -> list[Tensor]:
        basis = denoiser_basis(f, y, k, method="lanczos", probes=1, tol=1e-7, generator=torch.Generator().manual_seed(0))
        return kept(basis.values, basis.vectors.flatten(1), y)

    return run


def by_matrix(f: Denoiser, y: Tensor, k: int, at_once: bool) -> Run:
    """torch's own Jacobian, all rows at once or one after the other, then its symmetric part's eigenvectors."""

    def run() -> list[Tensor]:
        j = torch.autograd.functional.jacobian(f, y, vectorize=at_once).view(y.numel(), y.numel())
        values, vectors = torch.linalg.eigh((j + j.T) / 2)
        return kept(values.flip(0)[:k], vectors.flip(1)[:, :k].T, y)

    return run


@race(
    "Jacobian of a denoiser: its leading eigenvectors by block Lanczos, against the whole matrix by autograd",
    "Ours takes products with J and its transpose, two at once, and holds a few dozen vectors and one picture's graph; the "
    "matrix needs a backward pass for every pixel. All rows at once are one call that holds the gradients of all of them: memory "
    "is what products save there. One row after the other holds least, as long as n² numbers are few. Time follows where a "
    "picture has more pixels than Lanczos takes products, which it has not at 16 x 16.",
)
def jacobian(quick: bool) -> Iterator[Heat]:
    """Eigenvalues, and the picture in their eigenvectors, equal to 1e-5; double precision."""
    f, k = trained(60 if quick else 300), 8
    for side in (16,) if quick else (16, 32):
        generator = torch.Generator().manual_seed(1)
        x = c_alpha_images(1, side, 2.0, generator=generator).double()
        y = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        lanes = {
            "sfumato": partial(by_products, f, y, k),
            "autograd, at once": partial(by_matrix, f, y, k, True),
            "autograd, row by row": partial(by_matrix, f, y, k, False),
        }
        yield Heat(f"{k} eigenvectors of a picture of {side} x {side} pixels", lanes, tolerance=1e-5)
