"""Divergence of a field, the trace of its Jacobian, without the Jacobian.

    div f(x) = tr J = E[zᵀ J z],   E[z zᵀ] = I;      J z exactly ("jvp", "vjp") or as (f(x + h z) - f(x)) / h ("fd")

Signs (Rademacher) have the smaller variance; they are exact where J is diagonal. The estimate can be differentiated in x.

Sources: Hutchinson 1990; for scores: Song et al., "Sliced Score Matching", UAI 2019; for denoisers: Ramani, Blu, Unser,
"Monte-Carlo SURE", 2008 (finite differences).

>>> import torch
>>> from sfumato.nn import divergence
>>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
>>> divergence(lambda x: x**3 / 3, x)  # sum of squares
tensor([ 1., 13.])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.errors import BadData, BadSetting


def divergence(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    probes: int = 1,
    method: str = "jvp",
    h: float | Tensor | None = None,
    probe: str = "rademacher",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the divergence at every sample.

    Args:
        fn: `[B, ...]` to the same shape; samples must not look at each other.
        x: `[B, ...]`, where.
        probes: random probes a sample; the estimates are averaged.
        method: "jvp" (forward mode, one pass a probe), "vjp" (backward mode, for what has no forward mode) or "fd" (finite
            difference: one more call of `fn` a probe).
        h: step of the finite difference, a scalar or `[B]`; None: the root of the machine's epsilon, times 1 + rms(x).
        probe: "rademacher" or "gaussian".
        noise: `[probes, B, ...]`, the probes instead of drawing them.
        generator: source of the draws.

    Returns:
        `[B]`.

    Raises:
        BadSetting: an unknown method or probe, or no probes.
        BadData: probes of another shape than `x`.
    """
    if method not in ("jvp", "vjp", "fd"):
        raise BadSetting(f"there is no method {method!r} for a divergence: use jvp, vjp or fd")
    if noise is None:
        noise = draw_probes((probes, *x.shape), probe, like=x, generator=generator)
    elif noise.shape[1:] != x.shape:
        raise BadData(f"probes of shape {list(noise.shape)} do not fit: {['probes', *x.shape]} is wanted")
    return _quadratic_forms(fn, x, noise.to(x), method, h).mean(0)


def draw_probes(
    shape: Sequence[int], probe: str = "rademacher", *, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Random vectors of covariance I, with the type and device of `like`.

    Args:
        shape: of the result; at least one probe, along the first dimension.
        probe: "rademacher" (signs) or "gaussian".
        like: a tensor.
        generator: source of the draws.

    Returns:
        `shape`.

    Raises:
        BadSetting: an unknown probe, or none.
    """
    if probe not in ("rademacher", "gaussian") or shape[0] < 1:
        raise BadSetting(f"{shape[0]} probes {probe!r}: use one or more of rademacher or gaussian")
    device = like.device if generator is None else generator.device
    if probe == "gaussian":
        z = torch.randn(tuple(shape), dtype=like.dtype, device=device, generator=generator)
    else:
        z = torch.randint(2, tuple(shape), dtype=like.dtype, device=device, generator=generator).mul_(2).sub_(1)
    return z.to(like.device)


def _quadratic_forms(fn: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor, method: str, h: float | Tensor | None) -> Tensor:
    """zᵀ J z of every probe, `[probes, B]`."""
    if method in ("jvp", "vjp"):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode and no second derivative
            if method == "jvp":
                products = [torch.func.jvp(fn, (x,), (z,))[1] for z in noise]
            else:
                pull = torch.func.vjp(fn, x)[1]
                products = [pull(z)[0] for z in noise]
    else:
        if h is None:
            rms = x.detach().flatten(1).square().mean(1).sqrt()
            h = torch.finfo(x.dtype).eps ** 0.5 * (1 + rms)
        step = torch.as_tensor(h, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        start = fn(x)
        products = [(fn(x + step * z) - start) / step for z in noise]
    return (noise * torch.stack(products)).flatten(2).sum(2)
