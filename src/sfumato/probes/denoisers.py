"""What a denoiser looks at, what it leaves behind, in which basis it shrinks, and whether two of them are one function.

    blindness(f, x) = max_p | d f_p / d x_p |,            0: no pixel sees itself (a blind-spot network),
    r(d) = sum_p n_p n_{p+d} / sum_p n_p²,                 autocorrelation of a residual n; white noise: 0 but for d = 0,
    (J + Jᵀ) / 2 = sum_k λ_k e_k e_kᵀ,  J = ∇f(y)          the denoiser's basis at y; of a bias-free f, f(y) = J y.

Sources: blind spots, Krull et al., "Noise2Void", CVPR 2019; autocorrelation by the Wiener-Khinchin theorem; bases and agreement,
Kadkhodaie, Guth, Simoncelli, Mallat, "Generalization in diffusion models arises from geometry-adaptive harmonic representations",
ICLR 2024.

>>> import torch
>>> from sfumato.probes import blindness, denoiser_basis, noise_autocorrelation
>>> cross = torch.tensor([[0.0, 0.25, 0.0], [0.25, 0.0, 0.25], [0.0, 0.25, 0.0]])
>>> blindness(lambda x: torch.nn.functional.conv2d(x, cross[None, None], padding=1), torch.rand(1, 1, 8, 8)).item()
0.0
>>> noise_autocorrelation(torch.randn(4, 3, 64, 64))[0, :2].abs().round(decimals=1)
tensor([1., 0.])
>>> shrink = torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.2]))
>>> denoiser_basis(lambda y: (y.flatten(1) @ shrink).view_as(y), torch.rand(1, 1, 2, 2)).values
tensor([1.0000, 0.5000, 0.2000, 0.0000])
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.diffusion.blind_sampling import sample_blind
from sfumato.errors import BadData, BadSetting
from sfumato.metrics.correlation import closest_correlation, correlation
from sfumato.nn.trace_of_jacobian import draw_probes
from sfumato.probes.krylov import eigs
from sfumato.probes.linear_operator import LinearOperator
from sfumato.probes.operators import InputJacobianOperator


def blindness(net: Callable[[Tensor], Tensor], x: Tensor, *, chunk: int = 64) -> Tensor:
    """The largest influence of any input pixel on the output pixel at the same place, over all pairs of channels.

    One forward pass, then `chunk` output pixels at a time backward: meant for pictures of some dozen pixels a side.

    Args:
        net: `[B, C, H, W]` to `[B, C', H, W]`; samples must not look at each other.
        x: `[B, C, H, W]`, where to look.
        chunk: output pixels per backward pass; memory grows with it.

    Returns:
        Scalar, `max |d f_{c', p} / d x_{c, p}|`; exactly 0 for a blind-spot network.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = net(x)
        outputs = torch.arange(y[0].numel(), device=y.device)
        pixels = y.shape[-2] * y.shape[-1]
        worst = y.new_zeros(())
        for part in outputs.split(chunk):
            pick = torch.zeros(len(part), y[0].numel(), dtype=y.dtype, device=y.device).scatter_(1, part[:, None], 1)
            pick = pick.view(-1, 1, *y.shape[1:]).expand(-1, *y.shape)
            (grad,) = torch.autograd.grad(y, x, pick, retain_graph=True, is_grads_batched=True)
            here = (part % pixels).view(-1, 1, 1, 1).expand(-1, *x.shape[:2], 1)
            worst = torch.maximum(worst, grad.flatten(3).gather(3, here).abs().max())
    return worst.detach()


def noise_autocorrelation(residual: Tensor) -> Tensor:
    """The periodic autocorrelation of what was removed, averaged over samples and channels.

    Args:
        residual: `[B, C, H, W]`, noisy minus restored; its mean is removed per channel.

    Returns:
        `[H, W]`, 1 at lag (0, 0); lag (dy, dx) at `[dy, dx]`, negative lags at the far end.
    """
    centred = residual - residual.mean((-2, -1), keepdim=True)
    power = torch.fft.rfft2(centred).abs().square().mean((0, 1))
    correlation = torch.fft.irfft2(power, s=residual.shape[-2:])
    return correlation / correlation[0, 0]


class DenoiserBasis(NamedTuple):
    """Eigenpairs of the symmetric part of a Jacobian J at one picture, largest first, and how far J is from symmetric.

    Args:
        values: `[k]`, λ: what is kept of each pattern.
        vectors: `[k, C, H, W]`, the patterns e, of length 1.
        residuals: `[k]`, lengths of S e - λ e; each value is that close to a true one.
        trace: Σ λ over all of them, the effective rank; an estimate where the matrix was not written out.
        asymmetry: ‖J - Jᵀ‖ / ‖J‖ (Frobenius), 0 to 2; likewise.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    trace: Tensor
    asymmetry: Tensor

    @property
    def symmetric_share(self) -> Tensor:
        """Share of ‖J‖² that the symmetric part holds, 1 - asymmetry² / 4."""
        return 1 - self.asymmetry.square() / 4

    def coefficients(self, x: Tensor) -> Tensor:
        """<x, e_k> of pictures `[B, C, H, W]`: `[B, k]`."""
        return x.flatten(1) @ self.vectors.flatten(1).T


def denoiser_basis(
    f: Callable[[Tensor], Tensor],
    y: Tensor,
    k: int | None = None,
    *,
    method: Literal["auto", "dense", "lanczos"] = "auto",
    block: int = 2,
    probes: int = 32,
    tol: float = 1e-6,
    max_iter: int = 1000,
    chunk: int | None = 64,
    generator: torch.Generator | None = None,
) -> DenoiserBasis:
    """The patterns in which a denoiser shrinks one picture, and by how much.

    Args:
        f: `[1, C, H, W]` to the same shape, or a module (taken in eval mode).
        y: `[1, C, H, W]`, noisy.
        k: how many; None: all n = C · H · W, which needs the matrix.
        method: "dense": all of J, n backward passes and n² numbers; "lanczos": block Lanczos on products with J and Jᵀ, memory
            n · (2k + 4 block); "auto": dense where all are asked for.
        block: products taken at once by "lanczos".
        probes: random signs that its trace and asymmetry are estimated from.
        tol: it stops when every residual is below this share of the largest |λ|.
        max_iter: products at most.
        chunk: columns differentiated at once.
        generator: source of the draws.

    Returns:
        `DenoiserBasis`.

    Raises:
        BadData: more than one picture, or a function that changes the shape.
        BadSetting: an unknown method, all of a basis without the matrix, or a matrix that is too large to write out.
    """
    n = y.numel()
    if y.shape[:1] != (1,):
        raise BadData(f"a basis belongs to one picture: give [1, C, H, W], not {list(y.shape)}")
    if method not in ("auto", "dense", "lanczos") or (k is None and method == "lanczos") or not 1 <= (n if k is None else k) <= n:
        raise BadSetting(f"method={method!r}, k={k}: use auto, dense or lanczos, and for the last a number of vectors up to {n}")
    jacobian = InputJacobianOperator(f, y, chunk=chunk)
    if jacobian.shape[0] != n:
        raise BadData(f"a denoiser gives pictures of the shape it takes; this one makes {jacobian.shape[0]} numbers of {n}")
    if method == "dense" or k is None:
        with jacobian.held():
            j = jacobian.T.dense().T  # by rows: backward passes are the cheaper ones
        symmetric = (j + j.T) / 2
        values, vectors = (t.flip(-1)[..., :k] for t in torch.linalg.eigh(symmetric))
        residuals = (symmetric @ vectors - vectors * values).norm(dim=0)
        trace, asymmetry = j.trace(), (j - j.T).norm() / j.norm()
    else:
        found = eigs(_SymmetricPart(jacobian), k, tol=tol, max_iter=max_iter, block=min(block, n), generator=generator)
        order = found.values.argsort(descending=True)
        values, vectors, residuals = found.values[order], found.vectors[:, order], found.residuals[order]
        z = draw_probes((probes, n), like=y, generator=generator).T
        forward, back = jacobian @ z, jacobian.T @ z
        trace, asymmetry = (z * forward).sum(0).mean(), (forward - back).norm() / forward.norm()
    return DenoiserBasis(values, vectors.T.reshape(-1, *y.shape[1:]), residuals, trace, asymmetry)


class _SymmetricPart(LinearOperator):
    """(A + Aᵀ) / 2."""

    def __init__(self, a: LinearOperator) -> None:
        super().__init__(a.shape, a.dtype, a.device, a.chunk)
        self._a = a

    @property
    def T(self) -> LinearOperator:
        """Symmetric: itself."""
        return self

    def held(self) -> AbstractContextManager[None]:
        """Of A."""
        return self._a.held()

    def _product(self, v: Tensor) -> Tensor:
        return (self._a @ v + self._a.T @ v) / 2


class Agreement(NamedTuple):
    """How near two denoisers are to being one function.

    Args:
        variance: mean of |a(y) - b(y)|² a number: the variance between models.
        error: mean of |a(y) - x|² and |b(y) - x|².
        pairs: `[samples]`, correlation of what both draw from the same start with the same noise.
        closest: `[2, samples]`, correlation of each draw with the nearest picture that its own denoiser was trained on.
        drawn: `[2, samples, C, H, W]`, the draws.
    """

    variance: Tensor
    error: Tensor
    pairs: Tensor
    closest: Tensor
    drawn: Tensor

    @property
    def disagreement(self) -> Tensor:
        """variance / error: 0 for one function, about 2 for two whose errors have nothing in common."""
        return self.variance / self.error


Denoiser = Callable[[Tensor], Tensor]
Draw = Callable[[Denoiser, Tensor, torch.Generator], Tensor]


@torch.no_grad()
def agreement(
    a: Denoiser,
    b: Denoiser,
    x: Tensor,
    sigma: float,
    *,
    samples: int = 0,
    train: tuple[Tensor, Tensor] | None = None,
    mean: float = 0.5,
    draw: Draw | None = None,
    chunk: int = 256,
    generator: torch.Generator | None = None,
) -> Agreement:
    """Compare two blind denoisers, of disjoint training sets as a rule, on pictures that neither has seen.

    Args:
        a, b: `[B, C, H, W]` to the same; in eval mode.
        x: `[B, C, H, W]`, clean test pictures; both get the same noise.
        sigma: its standard deviation.
        samples: pictures that both draw, from the same start with the same noise.
        train: what a and b were trained on, to find the nearest of; None: `closest` is empty.
        mean: of the start `mean + z`.
        draw: `draw(denoiser, start, generator)`; None: `sample_blind` with its own settings.
        chunk: pictures at once.
        generator: source of the draws; None: seed 0.

    Returns:
        `Agreement`.
    """
    g = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    y = x + sigma * torch.randn(x.shape, generator=g, device=x.device, dtype=x.dtype)
    one, two = (torch.cat([f(part) for part in y.split(chunk)]) for f in (a, b))
    error = ((one - x).square().mean() + (two - x).square().mean()) / 2
    start = mean + torch.randn((samples, *x.shape[1:]), generator=g, device=x.device, dtype=x.dtype)
    state, drawn = g.get_state(), []
    for f in (a, b) if samples else ():
        g.set_state(state)
        drawn.append(draw(f, start, g) if draw is not None else sample_blind(f, start, generator=g))
    both = torch.stack(drawn) if drawn else x.new_zeros(2, 0, *x.shape[1:])
    pairs = correlation(both[0], both[1]).diagonal()
    closest = x.new_zeros(2, 0)
    if train is not None and samples:
        closest = torch.stack([closest_correlation(d, t.to(d)) for d, t in zip(both, train, strict=True)])
    return Agreement((one - two).square().mean(), error, pairs, closest, both)
