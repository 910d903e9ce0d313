"""Restore with a diffusion model that was trained without the degradation: sample z from p(z | y), where y = A D(z) + noise.

    S(z_t) = eta |y - A D(ẑ_0)|  +  lam T̂  +  gamma |E(Aᵀy + (I - AᵀA) D(ẑ_0)) - ẑ_0|,      ẑ_0 = E[z_0 | z_t]
    T̂ = uᵀ (s(z_t + h u) - s(z_t)) / h  ≈  tr ∇² log p_t(z_t),    u ~ N(0, I)

"dps" has the first term and follows its gradient once a step. "psld" adds the third: latents must be what the encoder makes of
the decoded picture. "stsl" adds the second to the first: a small trace is a sure ẑ_0, which a first-order method ignores; it
costs one score call more, and is followed several times a step:

    z <- z - ∇S(z)  (inner - 1 times, fresh u each),      z_p = DDIM step from the last ẑ_0 and score - ∇S(z)

so that stsl with lam = 0 and one inner iteration is dps. The norms are not squared. Where the measurement's noise is known,
nothing pulls once the residual is no longer than that noise (the discrepancy principle). A is any
physics of deepinv, E and D any `LatentCodec`; without one the latents are the pictures.

Sources: Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", ICLR 2023 (dps); Rout et al., "Solving
Linear Inverse Problems Provably via Posterior Sampling with Latent Diffusion Models", NeurIPS 2023 (psld); Rout et al., "Beyond
First-Order Tweedie: Solving Inverse Problems using Latent Diffusion", CVPR 2024 (stsl).

>>> import torch
>>> from deepinv.physics import Inpainting
>>> from sfumato.diffusion import Schedule, beta_schedule, sample_posterior
>>> physics = Inpainting((1, 4, 4), mask=torch.eye(4)[None])
>>> grey = lambda z, t: 0 * z + 0.5  # a model that knows one picture
>>> schedule = Schedule(beta_schedule("linear"))
>>> x = sample_posterior(grey, physics.A(torch.full((2, 1, 4, 4), 0.5)), physics, schedule, steps=5, predict="x0")
>>> bool((x - 0.5).abs().max() < 1e-3)
True
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.finite import FiniteTrajectory
from sfumato.diffusion.predictions import Model, convert
from sfumato.diffusion.samplers import Callback, SamplerStep, ddim_mean, ddim_times, draw_step
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadData, BadSetting
from sfumato.nn.latent_codec import IdentityCodec, LatentCodec
from sfumato.nn.trace_of_jacobian import divergence

SOLVERS = {"dps": "first order, in pixels", "psld": "first order, glued to the encoder", "stsl": "with the second-order trace"}
"""Names, and what they are."""


@torch.enable_grad()  # type: ignore[untyped-decorator, unused-ignore]
def sample_posterior(
    model: Model,
    y: Any,
    physics: Any,
    schedule: Schedule,
    *,
    method: str = "stsl",
    codec: LatentCodec | None = None,
    steps: int = 50,
    inner: int | None = None,
    eta: float = 1.0,
    lam: float = 0.02,
    weighting: str = "constant",
    gamma: float = 0.1,
    sigma: float = 0.0,
    ancestral: float = 1.0,
    predict: str = "eps",
    clip: bool = False,
    trace: str = "fd",
    h: float | None = None,
    project: bool = False,
    start: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw pictures that a diffusion model finds likely and that explain measurements.

    It takes `steps * inner` network calls and as many for the trace, each with a backward pass.

    Args:
        model: `model(z_t, t)` with t `[B]` int64; samples must not look at each other.
        y: measurements of B pictures, as the physics makes them.
        physics: `.A(x)`, differentiable, such as deepinv's; without `start`, with "psld" and to `project` also `.A_adjoint(y)`.
        schedule: the tables that the model was trained with.
        method: one of `SOLVERS`.
        codec: between the model's latents and the pictures that the physics takes; None: they are the same.
        steps: noise levels that are visited, 1 to T.
        inner: gradient steps at each level; None: 5 for stsl, else 1.
        eta: length of a gradient step, in latents over pictures: how strongly it is pulled to the measurement.
        lam: weight of the trace, for stsl; a few hundredths of `eta`, a large one harms.
        weighting: of the trace over noise levels: "constant", or "variance", times 1 - abar, for networks, whose traces are
            wild where there is little noise: what is made small is then sqrt(abar) tr ∂ẑ_0/∂z_t, which is at most n.
        gamma: weight of the encoder's term, for psld.
        sigma: standard deviation of the measurement's noise, in its units; 0: explain all of it.
        ancestral: share of the fresh noise in a step, 0 (DDIM) to 1 (DDPM).
        predict: what the model predicts: "eps", "x0", "v" or "score".
        clip: clamp every ẑ_0 to [-1, 1].
        trace: "fd" (finite differences, one score call) or "jvp" (exact along the probe; forward mode).
        h: step of the finite difference; None: `0.05 sqrt(1 - abar) + 0.001`.
        project: end with Aᵀy + (I - AᵀA) x, what was measured as it was: for masks, and rows that are orthonormal.
        start: pictures to begin near, `[B, ...]`; None: Aᵀy. Their latents get the noise of the first level.
        callback: told at each level of the last ẑ_0, before the update.
        generator: source of the draws.

    Returns:
        Pictures `[B, ...]`, as the codec decodes them, not clamped.

    Raises:
        BadSetting: an unknown method or kind, numbers out of range, or a physics that lacks a transpose where it is needed.
        BadData: the physics does not make measurements of this shape.
        Diverged: the model's answer, its gradient or a picture is not finite; the message names the step and the samples.
    """
    inner = (5 if method == "stsl" else 1) if inner is None else inner
    if weighting not in ("constant", "variance"):
        raise BadSetting(f"there is no weighting {weighting!r}: use constant or variance")
    _check(method, inner, ancestral, eta=eta, lam=lam, gamma=gamma, sigma=sigma)
    transposed = start is None or method == "psld" or project
    if transposed and not hasattr(physics, "A_adjoint"):
        raise BadSetting("this physics has no transpose A_adjoint: give start=, leave psld and project out")
    codec = IdentityCodec() if codec is None else codec
    times = ddim_times(schedule, steps)
    with torch.no_grad():
        back: Any = transpose(physics, y) if transposed else None
        z0 = codec.encode(back if start is None else start)
        z = schedule.q_sample(z0, times[0], draw_step(z0, None, 0, generator))
        _check_physics(physics, codec, z, y)
    watch = FiniteTrajectory(
        z,
        steps,
        what="the model's answer or its gradient",
        advice=f"make eta={eta:g} or lam={lam:g} smaller, or check the weights",
    )

    for i, t in enumerate(times):
        for k in range(inner):
            z = z.detach().requires_grad_()
            predicted = _Predicted(model, z, t, schedule, predict, clip)
            pictures = codec.decode(predicted.x0)
            residual = _difference(y, physics.A(pictures))
            loss = eta * (_norms(residual) - sigma * residual.shape[1] ** 0.5).clamp(min=0)
            if method == "stsl" and lam:
                step = 0.05 * (1 - float(schedule.abar[t])) ** 0.5 + 1e-3 if h is None else h
                weight = lam * (1 - float(schedule.abar[t])) if weighting == "variance" else lam
                loss = loss + weight * predicted.trace(trace, step, generator)
            if method == "psld":
                glued = codec.encode(back + pictures - physics.A_adjoint(physics.A(pictures)))
                loss = loss + gamma * _norms(glued - predicted.x0)
            (slope,) = torch.autograd.grad(loss.sum(), z)
            watch(i, predicted.out)
            watch(i, slope)
            z = z.detach()
            if k < inner - 1:
                z = z - slope
        with torch.no_grad():
            if callback is not None:
                callback(SamplerStep(i, z, predicted.x0.detach(), schedule.sigma[t]))
            following = times[i + 1] if i + 1 < steps else None
            moved, variance = ddim_mean(predicted.x0, predicted.eps, t, following, schedule, eta=ancestral)
            if ancestral and following is not None:
                moved = moved + variance.sqrt().to(z.dtype) * draw_step(z, None, 0, generator)
            z = moved - slope
    with torch.no_grad():
        x = codec.decode(watch.end(z))
        return x + back - physics.A_adjoint(physics.A(x)) if project else x


class _Predicted:
    """What the model says at z, one call: the clean latents and the noise, with their graph; and the trace, on demand."""

    def __init__(self, model: Model, z: Tensor, t: int, schedule: Schedule, predict: str, clip: bool) -> None:
        self.model, self.z, self.t, self.schedule, self.predict = model, z, t, schedule, predict
        self.out = self._call(z)
        self.x0 = self._as(self.out, z, "x0")
        if clip:
            self.x0 = self.x0.clamp(-1, 1)
            self.eps = convert(self.x0, z, t, schedule, source="x0", target="eps")
        else:
            self.eps = self._as(self.out, z, "eps")

    def trace(self, method: str, h: float, generator: torch.Generator | None) -> Tensor:
        """tr ∇² log p_t by one Gaussian probe, `[B]`, with its graph."""
        known = self._as(self.out, self.z, "score")

        def score(x: Tensor) -> Tensor:
            return known if x is self.z else self._as(self._call(x), x, "score")

        return divergence(score, self.z, method=method, h=h, probe="gaussian", generator=generator)

    def _call(self, z: Tensor) -> Tensor:
        out = self.model(z, torch.full((len(z),), self.t, device=z.device))
        return out if isinstance(out, Tensor) else out.sample

    def _as(self, out: Tensor, z: Tensor, target: str) -> Tensor:
        return convert(out, z, self.t, self.schedule, source=self.predict, target=target)


def _difference(y: Any, predicted: Any) -> Tensor:
    """Residuals as rows `[B, M]`; measurements of several sensors (deepinv's TensorList) stand side by side."""
    if isinstance(y, Tensor):
        return (y - predicted).flatten(1)
    return torch.cat([(a - b).flatten(1) for a, b in zip(y, predicted, strict=True)], 1)


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of every sample, `[B]`; its gradient is finite at 0."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _check(method: str, inner: int, ancestral: float, **weights: float) -> None:
    if method not in SOLVERS:
        raise BadSetting(f"there is no solver {method!r}: use {', '.join(SOLVERS)}")
    if inner < 1:
        raise BadSetting(f"inner={inner}: at every noise level one gradient step or more is taken")
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise BadSetting(f"{name}={value:g} must be a number of 0 or more")
    if not 0 <= ancestral <= 1:
        raise BadSetting(f"ancestral={ancestral:g} is no share: give 0 to 1")


def transpose(physics: Any, y: Any) -> Tensor:
    """`Aᵀy`: measurements `y` as pictures `[B, C, H, W]`.

    Raises:
        BadData: measurements that are not of this physics.
    """
    try:
        back: Tensor = physics.A_adjoint(y)
    except _REFUSALS as error:
        raise BadData(f"the physics does not take measurements of shape {_shapes(y)} ({_reason(error)})") from None
    return back


_REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError)
"""How a physics says that a shape does not suit it."""


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _shapes(x: Any) -> list[Any]:
    return list(x.shape) if isinstance(x, Tensor) else [list(part.shape) for part in x]


def _check_physics(physics: Any, codec: LatentCodec, z: Tensor, y: Any) -> None:
    """Refuse a physics that makes something else than y, before anything is computed with it."""
    x = codec.decode(z)
    try:
        made = _shapes(physics.A(x))
    except _REFUSALS as error:
        raise BadData(f"the physics does not take pictures of shape {list(x.shape)} ({_reason(error)})") from None
    if made != _shapes(y):
        raise BadData(f"the physics makes {made} of pictures {list(x.shape)}, but the measurement is {_shapes(y)}")
