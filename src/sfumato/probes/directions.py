"""Directions in a latent space: of the largest variance, of the largest effect, of a difference; and one kept off others.

    principal:   X - x̄ = U S Vᵀ, rows of Vᵀ with deviations S / sqrt(N - 1)
    Jacobian:    J = ∂f/∂h = U Σ Vᵀ, rows of Vᵀ: unit moves of h that change f(h) most, by Σ
    attribute:   mean of h with it - mean of h without
    projected:   n - Cᵀ (C Cᵀ)⁻¹ C n, which leaves the attributes C as they are

Source: Haas, Huberman-Spiegelglas, Mulayoff, Graßhof, Brandt, Michaeli, "Discovering Interpretable Directions in the Semantic
Latent Space of Diffusion Models", FG 2024, for the bottleneck of a U-Net (`sfumato.diffusion.record_h`); nothing here is bound
to it.

>>> import torch
>>> from sfumato.probes import jacobian_directions, pca_directions, project_out
>>> a = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
>>> found = jacobian_directions(lambda h: a @ h, torch.zeros(3), k=2)
>>> found.values.round(decimals=3), found.right.abs().round()
(tensor([3., 2.]), tensor([[1., 0., 0.],
        [0., 0., 1.]]))
>>> pca_directions(torch.randn(50, 4, 3), k=2).vectors.shape
torch.Size([2, 4, 3])
>>> project_out(torch.ones(2), torch.tensor([[0.0, 2.0]]))
tensor([1., 0.])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.probes.linear_operator import LinearOperator
from sfumato.probes.operators import InputJacobianOperator
from sfumato.probes.streaming_pca import StreamingPCA


class Directions(NamedTuple):
    """Unit `vectors[k, ...]`, the deviation `stds[k]` of the samples along each (per step: `[k, S]`), and their `mean`."""

    vectors: Tensor
    stds: Tensor
    mean: Tensor

    def scaled(self) -> Tensor:
        """The vectors, one standard deviation long, `[k, ...]`."""
        return self.vectors * self.stds.view(*self.stds.shape, *[1] * (self.vectors.ndim - self.stds.ndim))


class JacobianDirections(NamedTuple):
    """Singular `values[k]`, `right[k, *h.shape]`, `left[k, *f(h).shape]`, and `residuals[k]`: how far Jᵀ left is off."""

    values: Tensor
    right: Tensor
    left: Tensor
    residuals: Tensor


def pca_directions(hs: Tensor | Iterable[Tensor], k: int = 25, *, per_step: bool = False, keep: int | None = None) -> Directions:
    """The directions along which samples vary most.

    Args:
        hs: `[N, ...]`, or batches of such samples that are read once, in the memory of `keep` of them.
        k: how many, at most N - 1.
        per_step: one analysis for each entry along dimension 1 (the steps) instead of one for all of them together; the signs
            agree with those of the first step.
        keep: components kept between batches (see `StreamingPCA`); None: all of a tensor, of a stream the larger of 4 k and 100.

    Returns:
        The largest first; the first number of each vector is positive (per step: of the first step's).

    Raises:
        BadData: no samples.
        BadSetting: more directions than the samples have.
    """
    batches = [hs] if isinstance(hs, Tensor) else hs
    pca: StreamingPCA | None = None
    for batch in batches:
        if pca is None:
            rows = keep or (k if isinstance(hs, Tensor) else max(4 * k, 100))
            pca = StreamingPCA(batch.shape[1:], keep=rows, apart=per_step, dtype=batch.dtype).to(batch.device)
        pca.update(batch)
    if pca is None:
        raise BadData("there are no samples to find directions in")
    vectors, variances = pca.components(k)
    vectors = align_signs(vectors) if per_step else vectors
    return Directions(vectors, variances.sqrt(), pca.mean.view(pca.shape))


def align_signs(vectors: Tensor) -> Tensor:
    """Turn the vectors of later steps so that their inner product with the first step's is positive.

    Args:
        vectors: `[k, S, ...]`: k directions, one vector for each of S steps.

    Returns:
        Like `vectors`, each as it is or negated.
    """
    flat = vectors.flatten(2) if vectors.ndim > 2 else vectors[..., None]
    agree = (flat * flat[:, :1]).sum(-1) >= 0
    return vectors * torch.where(agree, 1, -1).to(vectors).view(*agree.shape, *[1] * (vectors.ndim - 2))


def jacobian_directions(
    f: Callable[[Tensor], Tensor],
    h: Tensor,
    k: int = 3,
    *,
    mask: Tensor | None = None,
    iters: int = 50,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> JacobianDirections:
    """The moves of h that change f(h) most, without writing out the Jacobian J.

    A block Krylov iteration: every step pushes k vectors through J and pulls the images back through Jᵀ, in one batched pass
    each, and takes the best of all that was seen. Power iteration, one vector at a time, ends in the same place later.

    Args:
        f: any differentiable function; a module is run in eval mode.
        h: where to differentiate, any shape.
        k: how many.
        mask: broadcastable to f(h): which outputs count (1 or True) and which do not.
        iters: steps at most; look at `residuals` where they may have been used up.
        tol: stop when every ‖Jᵀ u - σ v‖ is below `tol` times the largest σ.
        generator: for the start.

    Returns:
        The largest first; signs are arbitrary.

    Raises:
        BadSetting: more directions than h or f(h) have dimensions; no step.
        BadData: a mask that hides every output.

    Source: Musco, Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition",
    NeurIPS 2015; the paper's own is power iteration with deflation.
    """
    if mask is not None and not mask.any():
        raise BadData("the mask hides every output, so no direction changes any")
    with torch.no_grad():
        shape = f(h).shape

    def seen(x: Tensor) -> Tensor:
        out = f(x)
        return out if mask is None else out * mask.to(out)

    op = InputJacobianOperator(f if mask is None else seen, h)
    if not 1 <= k <= min(op.shape) or iters < 1:
        raise BadSetting(f"k={k}, iters={iters}: a {op.shape[0]} × {op.shape[1]} Jacobian has 1 to {min(op.shape)} directions")
    values, right, left, residuals = _top_triplets(op, k, iters, tol, generator)
    return JacobianDirections(values, right.T.reshape(k, *h.shape), left.T.reshape(k, *shape), residuals)


def _top_triplets(
    op: LinearOperator, k: int, iters: int, tol: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """σ `[k]`, V `[n, k]`, U `[m, k]`, and ‖Jᵀ u - σ v‖ `[k]`."""
    n = op.shape[1]
    device = op.device if generator is None else generator.device
    block = torch.randn(n, k, generator=generator, device=device, dtype=op.dtype).to(op.device)
    basis = torch.linalg.qr(block).Q
    images = op @ basis
    for i in range(iters):
        u, s, vt = torch.linalg.svd(images, full_matrices=False)
        left, values, right = u[:, :k], s[:k], basis @ vt[:k].T
        gaps = op.T @ left - right * values  # what the basis lacks; orthogonal to it but for rounding
        residuals = gaps.norm(dim=0)
        spare = n - basis.shape[1]
        if i == iters - 1 or not spare or bool((residuals <= tol * values[0]).all()):
            break
        block = gaps[:, :spare]
        for _ in range(2):  # once is not enough in floating point, twice is
            block = block / block.norm(dim=0).clamp_min(torch.finfo(op.dtype).tiny)
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, images = torch.cat([basis, block], 1), torch.cat([images, op @ block], 1)
    return values, right, left, residuals


def attribute_direction(hs_pos: Tensor, hs_neg: Tensor) -> Tensor:
    """The difference of means: from samples without an attribute to samples with it.

    Args:
        hs_pos: with it, `[N, ...]`.
        hs_neg: without, `[M, ...]`.

    Returns:
        `[...]`.

    Raises:
        BadData: no samples on a side, or of unlike shapes.
    """
    if not len(hs_pos) or not len(hs_neg) or hs_pos.shape[1:] != hs_neg.shape[1:]:
        raise BadData(f"a direction needs samples of one shape on both sides, not {list(hs_pos.shape)} and {list(hs_neg.shape)}")
    return hs_pos.mean(0) - hs_neg.mean(0)


def project_out(n: Tensor, others: Tensor, *, joint: bool = True) -> Tensor:
    """A direction without its part along others, so that moving along it leaves what they stand for.

    Args:
        n: the direction, any shape.
        others: `[m, *n.shape]`; they need not be orthogonal to each other.
        joint: orthogonal to all of them; else they are removed one after another, and only the last is sure to be gone.

    Returns:
        Like `n`.

    Raises:
        BadData: others of another shape.
    """
    if others.shape[1:] != n.shape:
        raise BadData(f"the other directions must be [m, {', '.join(map(str, n.shape))}], not {list(others.shape)}")
    flat, rows = n.flatten(), others.flatten(1).to(n)
    if joint:
        # an orthonormal basis of their span; directions that add nothing new (rank) are left out
        _, s, vt = torch.linalg.svd(rows, full_matrices=False)
        span = vt[s > s[:1] * torch.finfo(n.dtype).eps * max(rows.shape)]
        return (flat - span.T @ (span @ flat)).view_as(n)
    for c in rows:
        flat = flat - (flat @ c) / (c @ c) * c
    return flat.view_as(n)
