"""Spectra from products alone: Lanczos, extreme eigenpairs, singular triplets, and the density of all eigenvalues.

Lanczos turns a symmetric A and a start q into a small tridiagonal T = QᵀAQ; with T = SΛSᵀ, Σ_k S²₀ₖ f(λₖ) is a Gauss quadrature
for qᵀf(A)q, and its mean over random unit q is tr f(A)/d (stochastic Lanczos quadrature: Ubaru, Chen, Saad 2017; Ghorbani,
Krishnan, Xiao 2019).

>>> import torch
>>> from sfumato.probes import eigs, spectral_density
>>> a = torch.diag(torch.linspace(0, 1, 50, dtype=torch.float64))
>>> eigs(a, 2).values
tensor([1.0000, 0.9796], dtype=torch.float64)
>>> density = spectral_density(a, steps=50, starts=20, generator=torch.Generator().manual_seed(0))
>>> bool((density.expect(torch.square) - a.square().trace() / 50).abs() < 0.05)
True
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.probes.linear_operator import LinearOperator, held

__all__ = ["Density", "Eigenpairs", "Lanczos", "eigs", "lanczos", "smoothed_spectrum", "spectral_density", "svds"]


class Lanczos(NamedTuple):
    """T = tridiag(beta, alpha, beta) and the orthonormal Q `[d, m]` with Qᵀ A Q = T."""

    alpha: Tensor
    beta: Tensor
    basis: Tensor

    def matrix(self) -> Tensor:
        """T, `[m, m]`."""
        return torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes (eigenvalues of T, smallest first) and weights `[m]`: Σ w f(λ) = qᵀ f(A) q for the unit start q."""
        nodes, vectors = torch.linalg.eigh(self.matrix())
        return nodes, vectors[0] ** 2


class Eigenpairs(NamedTuple):
    """`values[k]`, `vectors[d, k]`, and the lengths `residuals[k]` of A v − λ v: each value is that close to a true one."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Density(NamedTuple):
    """An eigenvalue density φ over a grid t (integral 1), and the quadrature `nodes`, `weights` `[starts, m]` behind it."""

    t: Tensor
    phi: Tensor
    nodes: Tensor
    weights: Tensor

    def expect(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of f over the eigenvalues, tr f(A) / d."""
        return (self.weights * fn(self.nodes)).sum(1).mean()

    def cdf(self, t: Tensor) -> Tensor:
        """The share of eigenvalues ≤ t, for each entry of `t`."""
        below = self.nodes.flatten() <= t.reshape(-1, 1)
        return ((below * self.weights.flatten()).sum(1) / len(self.nodes)).view(t.shape)


def lanczos(
    op: LinearOperator | Tensor, steps: int, *, start: Tensor | None = None, generator: torch.Generator | None = None
) -> Lanczos:
    """Tridiagonalise a symmetric operator, with full re-orthogonalisation.

    Args:
        op: symmetric, d × d.
        steps: m; fewer come back when the start spans a smaller invariant subspace.
        start: `[d]`; None: a Gaussian vector.
        generator: for the start.

    Returns:
        `alpha[m]`, `beta[m-1]`, `basis[d, m]`. Memory d · m.
    """
    first = _randn(op, 1, generator) if start is None else start.to(op.device, op.dtype)[:, None]
    alpha, beta, basis = _tridiagonalise(op, first, steps)
    m = int(_length(alpha, beta)[0])
    return Lanczos(alpha[0, :m], beta[0, : m - 1], basis[0, :m].T)


def spectral_density(
    op: LinearOperator | Tensor,
    *,
    steps: int = 100,
    starts: int = 1,
    grid: int = 10_000,
    sigma2: float = 1e-5,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Density:
    """The density of all eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

    φ(t) = mean over starts of Σ_k w_k N(t; λ_k, σ²), with σ² = `sigma2` · max(1, λ_max − λ_min).

    Args:
        op: symmetric, d × d.
        steps: Lanczos steps m for each start.
        starts: random sign vectors to average over.
        grid: points of t, from 0.01 below the smallest to 0.01 above the largest node (means over starts).
        sigma2: relative *variance* of the Gaussian that smooths a node.
        noise: `[starts, d]` start vectors to use instead of drawing.
        generator: for the starts.

    Reference: Yao, Gholami, Keutzer, Mahoney, "PyHessian", 2020, whose defaults these are.
    """
    if noise is None:
        device = op.device if generator is None else generator.device
        noise = torch.randint(2, (starts, op.shape[0]), generator=generator, device=device).mul_(2).sub_(1)
    first = noise.to(op.device, op.dtype).T
    at_once = max(1, 2**28 // (max(1, op.shape[0]) * min(steps, op.shape[0])))  # 2 GB of basis in float64
    parts = [_quadrature(op, columns, steps) for columns in torch.split(first, at_once, 1)]
    width = max(nodes.shape[1] for nodes, _ in parts)
    nodes = torch.cat([_widen(nodes, width) for nodes, _ in parts])
    weights = torch.cat([_widen(weights, width) for _, weights in parts])
    used = weights > 0
    low = nodes.masked_fill(~used, torch.inf).amin(1).mean()
    high = nodes.masked_fill(~used, -torch.inf).amax(1).mean()
    t = torch.linspace(0, 1, grid, dtype=op.dtype, device=op.device) * (high - low + 0.02) + low - 0.01
    variance = sigma2 * (high - low).clamp_min(1)
    phi = smoothed_spectrum(nodes, weights, t, variance).sum(0)
    return Density(t, phi / torch.trapezoid(phi, t), nodes, weights)


def smoothed_spectrum(nodes: Tensor, weights: Tensor, t: Tensor, variance: Tensor | float) -> Tensor:
    """Quadratures as densities: Σ_k w_k N(t; λ_k, variance) for each start.

    Args:
        nodes: `[starts, m]`.
        weights: `[starts, m]`; unused places have weight 0.
        t: `[grid]`.
        variance: of the Gaussian that smooths a node.

    Returns:
        `[starts, grid]`, each with the integral of its weights.
    """
    scale = (2 * torch.pi * torch.as_tensor(variance, dtype=t.dtype, device=t.device)) ** 0.5
    rows = [torch.exp(-((t[:, None] - row) ** 2) / (2 * variance)) @ weight for row, weight in zip(nodes, weights, strict=True)]
    return torch.stack(rows) / scale


def eigs(
    op: LinearOperator | Tensor,
    k: int,
    *,
    which: Literal["LA", "SA", "LM"] = "LA",
    tol: float = 1e-6,
    max_iter: int = 1000,
    block: int = 1,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs of a symmetric operator, by (block) Lanczos with thick restarts.

    Args:
        op: symmetric, d × d.
        k: how many.
        which: `"LA"`: largest, `"SA"`: smallest, `"LM"`: largest absolute value (of an indefinite Hessian the second of these
            is often its most negative eigenvalue).
        tol: stop when every residual ‖Av − λv‖ is below `tol` times the largest |λ|.
        max_iter: products with the operator at most; look at `residuals` when it may have been reached.
        block: vectors multiplied at once. More than one suits an operator that is fast on several columns, and eigenvalues that
            repeat or crowd; it takes more products in all.
        generator: for the start.

    Returns:
        `Eigenpairs`, best first. Memory d · max(2k + 1, 20), and of a block three blocks more. An eigenvalue that repeats more
        often than `block` can be found fewer times than it occurs.

    Reference: Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", 2000; for blocks: Golub and
    Underwood, "The block Lanczos method for computing eigenvalues", 1977.
    """
    d = op.shape[0]
    if which not in ("LA", "SA", "LM") or not 1 <= k <= d or not 1 <= block <= d:
        raise BadSetting(f"eigs: which={which!r}, k={k}, block={block}; allowed: LA, SA, LM and 1 to {d}")
    size = min(max(2 * k + 1, 20) + (3 * block if block > 1 else 0), d)
    basis = torch.zeros(d, size + block, dtype=op.dtype, device=op.device)
    basis[:, :block] = _orthonormal(_randn(op, block, generator))[0]
    projected = torch.zeros(size + block, size + block, dtype=op.dtype, device=op.device)
    kept, products = 0, 0
    with held(op):
        while True:
            first = kept + -(-(max(kept, 2 * k) + 5 - kept) // block) * block  # whole blocks up to every look
            for start, stop in itertools.pairwise([kept, *range(first, size, -(-5 // block) * block), size]):
                _extend(op, basis, projected, start, stop, block, generator)
                products += stop - start
                square = projected[:stop, :stop]
                values, s = torch.linalg.eigh((square + square.T) / 2)
                order = _order(values, which)
                values, s = values[order], s[:, order]
                leaving = projected[stop : stop + block, :stop] @ s  # how far A leads out of the basis
                converged = bool((leaving[:, :k].norm(dim=0) <= max(tol, torch.finfo(op.dtype).eps) * values.abs().max()).all())
                if converged or stop == d or products >= max_iter:
                    vectors = torch.linalg.qr(basis[:, :stop] @ s[:, :k])[0]
                    images = op @ vectors
                    values = (vectors * images).sum(0)
                    return Eigenpairs(values, vectors, (images - vectors * values).norm(dim=0))
            kept = min(k + (size - k) // 2, size - block)
            basis[:, : kept + block] = torch.cat([basis[:, :size] @ s[:, :kept], basis[:, size:]], 1)
            projected.zero_()
            projected.diagonal()[:kept] = values[:kept]
            projected[kept : kept + block, :kept] = leaving[:, :kept]
            projected[:kept, kept : kept + block] = leaving[:, :kept].T


def svds(op: LinearOperator | Tensor, k: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets of an m × n operator, from the eigenpairs of AᵀA or AAᵀ, whichever is smaller.

    Args:
        op: any operator with both products.
        k: how many.
        generator: for the start.

    Returns:
        `U[m, k]`, `S[k]` (largest first), `V[n, k]` with A ≈ U diag(S) Vᵀ. Singular values below √eps of the largest are noise.
    """
    wide = op.shape[0] < op.shape[1]
    a = op.T if wide else op
    right = eigs(_Gram(a), k, tol=1e-9, generator=generator).vectors
    images = a @ right
    values = images.norm(dim=0)
    order = values.argsort(descending=True)
    values, right, left = values[order], right[:, order], images[:, order] / values[order].clamp_min(torch.finfo(op.dtype).tiny)
    return (right, values, left) if wide else (left, values, right)


class _Gram(LinearOperator):
    """AᵀA."""

    def __init__(self, a: LinearOperator | Tensor) -> None:
        super().__init__((a.shape[1], a.shape[1]), a.dtype, a.device)
        self._a = a

    def _product(self, v: Tensor) -> Tensor:
        return self._a.T @ (self._a @ v)

    def _transposed_product(self, v: Tensor) -> Tensor:
        return self._product(v)


def _randn(op: LinearOperator | Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    device = op.device if generator is None else generator.device
    return torch.randn(op.shape[0], count, dtype=op.dtype, device=device, generator=generator).to(op.device)


def _order(values: Tensor, which: str) -> Tensor:
    return (values.abs() if which == "LM" else values).argsort(descending=which != "SA")


def _tridiagonalise(op: LinearOperator | Tensor, first: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """`alpha[s, m]`, `beta[s, m]` (the last leads out), `basis[s, m, d]` for starts `[d, s]` in lock-step, without a sync."""
    d, s = first.shape
    if op.shape[0] != op.shape[1] or d != op.shape[0]:
        raise BadData(f"Lanczos takes a square operator and starts of its size; got {op.shape[0]} × {op.shape[1]} and {d}")
    m = min(steps, d)
    basis = first.new_zeros(s, m, d)
    alpha, beta = first.new_zeros(s, m), first.new_zeros(s, m)
    q = first.T / first.norm(dim=0)[:, None]
    with held(op):
        for i in range(m):
            basis[:, i] = q
            w = (op @ q.T).T
            alpha[:, i] = (w * q).sum(1)
            seen = basis[:, : i + 1]
            for _ in range(2):  # once is not enough in floating point, twice is (Parlett)
                w = w - torch.einsum("smd,sm->sd", seen, torch.einsum("smd,sd->sm", seen, w))
            beta[:, i] = w.norm(dim=1)
            q = w / beta[:, i : i + 1].clamp_min(torch.finfo(op.dtype).tiny)
    return alpha, beta, basis


def _length(alpha: Tensor, beta: Tensor) -> Tensor:
    """How many steps of each start were taken before its Krylov space was exhausted."""
    scale = torch.cummax(torch.maximum(alpha.abs(), beta), 1).values
    exhausted = beta <= torch.finfo(alpha.dtype).eps ** 0.5 * scale
    exhausted[:, -1] = True
    return torch.argmax(exhausted.int(), dim=1) + 1


def _quadrature(op: LinearOperator | Tensor, first: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights `[s, m]` of the Gauss quadrature of each start; unused places have weight 0."""
    alpha, beta, _ = _tridiagonalise(op, first, steps)
    nodes, weights = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for i, m in enumerate(_length(alpha, beta).tolist()):
        nodes[i, :m], weights[i, :m] = Lanczos(alpha[i, :m], beta[i, : m - 1], alpha).quadrature()
    return nodes, weights


def _widen(rows: Tensor, width: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(len(rows), width - rows.shape[1])], 1)


def _extend(
    op: LinearOperator | Tensor, basis: Tensor, projected: Tensor, start: int, stop: int, block: int,
    generator: torch.Generator | None,
) -> None:  # fmt: skip
    """Grow an orthonormal basis and QᵀAQ in place, from column `start` to `stop`.

    Column j times A leads to column j + block: that many columns stand ready to be multiplied.
    """
    eps, d = torch.finfo(op.dtype).eps, basis.shape[0]
    spare = _randn(op, stop - start, generator)
    for j in range(start, stop, block):
        end = min(j + block, stop)
        ready, now = j + block, slice(j, end)
        seen = basis[:, :ready]
        w = op @ basis[:, now]
        scale, h = w.norm(dim=0), torch.zeros_like(projected[:ready, now])
        for _ in range(2):
            more = seen.T @ w
            w = w - seen @ more
            h += more
        q, lengths = _orthonormal(w)
        exhausted = lengths <= eps**0.75 * scale
        q = torch.where(exhausted, spare[:, j - start : end - start], q)  # an invariant subspace: go on from a new direction
        for _ in range(2):
            q = q / q.norm(dim=0).clamp_min(torch.finfo(op.dtype).tiny)
            q = q - seen @ (seen.T @ q)
        q = _orthonormal(q)[0][:, : max(0, d - ready)]  # there are no more than d
        new = slice(ready, ready + q.shape[1])
        basis[:, new] = q
        projected[:ready, now], projected[now, :ready] = h, h.T
        out = (q.T @ w).masked_fill(exhausted, 0)
        projected[new, now], projected[now, new] = out, out.T


def _orthonormal(w: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that span the same, and how long each was beside those before it."""
    if w.shape[1] == 1:
        length = w.norm(dim=0)
        return w / length.clamp_min(torch.finfo(w.dtype).tiny), length
    q, r = torch.linalg.qr(w)
    return q, r.diagonal().abs()
