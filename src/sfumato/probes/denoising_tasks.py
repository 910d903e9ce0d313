"""How hard each time of a diffusion is, told from the data alone: how fast noisy marginals change, what a linear map denoises.

    KL(p_{t-1} || p_t),    p_t the distribution of x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

For Gaussian data with variances λ and mean m on the principal axes, v_t = abar_t λ + 1 - abar_t and r = v_{t-1} / v_t, it is
½ Σ (r - 1 - ln r + (sqrt(abar_{t-1}) - sqrt(abar_t))² m² / v_t), and the best linear guess of the noise errs by the mean of
abar_t λ / v_t.

Sources: Kim, Go, Kwon, Kim, "Denoising Task Difficulty-based Curriculum for Training Diffusion Models", ICLR 2025 (the
divergence). Ours: both estimators, and that neighbouring marginals are made with the same noise. Estimators that assume no form,
such as those by nearest neighbours, err by far more than neighbouring times differ.

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule
>>> from sfumato.probes import marginal_kl
>>> kl = marginal_kl(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) / 3, Schedule(beta_schedule("linear")))
>>> kl.shape, bool(kl[100] > kl[400] > kl[800])
(torch.Size([999]), True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadData, BadSetting

ESTIMATORS = ("gaussian", "exact")


@torch.no_grad()
def marginal_kl(
    data: Tensor,
    schedule: Schedule,
    *,
    estimator: str = "gaussian",
    space: Callable[[Tensor], Tensor] | None = None,
    times: Sequence[int] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Relative entropy of neighbouring times.

    Args:
        data: clean samples `[n, ...]`, in the range that they are diffused in (pictures customarily in [-1, 1]).
        schedule: its tables.
        estimator: "gaussian" takes samples, or their features, for a Gaussian of their moments; "exact" takes the n samples for
            the whole distribution, so that every marginal is a mixture of n Gaussians (the divergence of two is a mean over one
            draw from each of them).
        space: `space(x_t)` gives features `[n, d]`; None: the data itself. Not for "exact". Their moments are those of one
            draw; what its noise adds outweighs the divergence at high noise.
        times: t of each pair, 1 to T - 1; None: all of them.
        noise: standard normal, like `data`, instead of drawing it.
        generator: source of the noise, on the data's device; nothing is drawn for "gaussian" without a space.

    Returns:
        `[len(times)]` or `[T - 1]` float64, in nats.

    Raises:
        BadSetting: an unknown estimator, a space for "exact", or a time without a predecessor.
        BadData: too few samples for the estimator.
    """
    times = range(1, len(schedule)) if times is None else times
    if estimator not in ESTIMATORS:
        raise BadSetting(f"there is no estimator {estimator!r}: use {', '.join(ESTIMATORS)}")
    if estimator == "exact" and space is not None:
        raise BadSetting("densities are known exactly in the space of the data only: use gaussian, or leave out space")
    if any(not 1 <= t < len(schedule) for t in times):
        raise BadSetting(f"times are 1 to {len(schedule) - 1}: each is compared with the one before it")
    if len(data) < 2:
        raise BadData(f"a distribution takes 2 samples or more, not {len(data)}")
    if estimator == "gaussian" and space is None:
        return _of_gaussians(*principal_variances(data), schedule, times)
    if noise is None:
        noise = torch.randn(data.shape, generator=generator, device=data.device, dtype=data.dtype)
    if space is None:
        return _of_mixtures(data.flatten(1).double(), noise.flatten(1).double(), schedule, times)
    found: list[Tensor] = []
    known: dict[int, Tensor] = {}
    for t in times:
        known = {u: known[u] if u in known else space(schedule.q_sample(data, u, noise)).flatten(1).double() for u in (t - 1, t)}
        found.append(_of_moments(known[t - 1], known[t]))
    return torch.stack(found).cpu()


def principal_variances(data: Tensor) -> tuple[Tensor, Tensor]:
    """Variances on the principal axes, largest first, and the mean there.

    Args:
        data: `[n, ...]`, at least 2 samples of D numbers.

    Returns:
        Two `[D]` float64 on the CPU; directions that the samples do not span have variance 0, and their part of the mean is
        gathered in the first of them (its length).
    """
    x = data.flatten(1).double().cpu()
    mean = x.mean(0)
    _, scale, axes = torch.linalg.svd(x - mean, full_matrices=False)
    variances, along = mean.new_zeros(len(mean)), mean.new_zeros(len(mean))
    rank = len(scale)
    variances[:rank], along[:rank] = scale.square() / (len(x) - 1), axes @ mean
    if rank < len(mean):
        along[rank] = (mean - axes.T @ along[:rank]).norm()
    return variances, along


def linear_denoising_loss(variances: Tensor, schedule: Schedule, *, predict: str = "eps", sigma_data: float = 0.5) -> Tensor:
    """Mean squared error of the best linear denoiser (Wiener's), which sees nothing of the data but mean and covariance.

    Args:
        variances: `[D]` of the data, such as from `principal_variances`.
        schedule: its tables.
        predict: "eps", "x0" or "v": what the error is of; or "edm": that of x0, weighted as `sfumato.diffusion.edm_loss` does.
        sigma_data: standard deviation of the clean data, for "edm".

    Returns:
        `[T]` float64, a mean over the D numbers; for "eps" at most 1, what guessing no noise gives.

    Raises:
        BadSetting: an unknown prediction.
    """
    if predict not in ("eps", "x0", "v", "edm"):
        raise BadSetting(f"there is no denoising loss of {predict!r}: use eps, x0, v or edm")
    power = variances.double()
    of_x0 = [(power * (1 - a) / (a * power + 1 - a)).mean(1) for a in schedule.abar[:, None].split(_rows(len(power)))]
    snr = schedule.snr
    return torch.cat(of_x0) * {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1, "edm": snr + sigma_data**-2}[predict]


def _rows(d: int) -> int:
    """Times worked on at once: pictures of many pixels would fill the memory."""
    return max(1, (1 << 22) // d)


def _of_gaussians(variances: Tensor, mean: Tensor, schedule: Schedule, times: Sequence[int]) -> Tensor:
    found = []
    for t in torch.as_tensor(list(times)).split(_rows(len(mean))):
        abar, before = schedule.abar[t, None], schedule.abar_prev[t, None]
        less = before * schedule.betas[t, None]  # before - abar, without cancellation
        after = abar * variances + 1 - abar
        more = less * (variances - 1) / after  # r - 1
        shift = less / (before.sqrt() + abar.sqrt())
        found.append(((more - more.log1p()) + shift.square() * mean.square() / after).sum(1) / 2)
    return torch.cat(found)


def _of_mixtures(x: Tensor, noise: Tensor, schedule: Schedule, times: Sequence[int]) -> Tensor:
    """One draw from every Gaussian of p_{t-1}; all distances follow from two matrices of inner products."""
    gram, cross, d = x @ x.T, noise @ x.T, x.shape[1]
    squares, between, length = gram.diagonal(), cross.diagonal(), noise.square().sum(1)
    found = []
    for t in times:
        after, before = float(schedule.abar[t]), float(schedule.abar_prev[t])
        signal, level = math.sqrt(before), math.sqrt(1 - before)
        inner = signal * gram + level * cross
        own = before * squares + 2 * signal * level * between + (1 - before) * length

        def log_density(abar: float, inner: Tensor = inner, own: Tensor = own) -> Tensor:
            distance = own[:, None] - 2 * math.sqrt(abar) * inner + abar * squares
            return torch.logsumexp(distance / (-2 * (1 - abar)), 1) - d / 2 * math.log(1 - abar)

        log_ratio = log_density(after) - log_density(before)
        # The ratio of two densities is 1 on average: where it stays near 1, adding ratio - 1 takes nearly all noise away.
        near = log_ratio.std() < 1
        found.append(torch.where(near, log_ratio.expm1() - log_ratio, -log_ratio).mean())
    return torch.stack(found).cpu()


def _of_moments(a: Tensor, b: Tensor) -> Tensor:
    """KL of two Gaussians with the moments of features `[n, d]`."""
    n, d = a.shape
    if n <= d:
        raise BadData(f"{n} samples have no full covariance of {d} features: give more samples, or fewer features")
    root = torch.linalg.cholesky_ex(torch.cov(b.T).reshape(d, d))
    if int(root.info):
        raise BadData("the features have a direction without variance: leave it out of the space")
    inside = torch.linalg.solve_triangular(root.L, torch.cov(a.T).reshape(d, d), upper=False)
    whitened = torch.linalg.solve_triangular(root.L, inside.T, upper=False)
    shift = torch.linalg.solve_triangular(root.L, (a.mean(0) - b.mean(0))[:, None], upper=False)
    values = torch.linalg.eigvalsh((whitened + whitened.T) / 2)
    return (values - 1 - values.log()).sum() / 2 + shift.square().sum() / 2
