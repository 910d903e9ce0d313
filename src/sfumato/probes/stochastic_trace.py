"""Trace and diagonal of an operator from random probes: E[z zᵀ] = I, so E[zᵀAz] = tr A and E[z ⊙ Az] = diag A.

Signs (Rademacher) have the smaller variance, 2(‖A‖²_F − Σ A²ᵢᵢ) for symmetric A, against 2‖A‖²_F for Gaussian probes
(Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990).

>>> import torch
>>> from sfumato.probes import hutchinson
>>> trace = hutchinson(torch.diag(torch.arange(5.0)), samples=3)  # a diagonal matrix: exact with any sign vector
>>> trace.value.item(), trace.stderr.item()
(10.0, 0.0)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.nn.trace_of_jacobian import draw_probes
from sfumato.probes.linear_operator import LinearOperator

COLUMNS = 16
"""Probes multiplied at once: enough to fill a GPU, few enough for memory."""


class Estimate(NamedTuple):
    """A stochastic estimate: its value, the standard error of that value (both scalar, or `[d]`), and how many probes it took."""

    value: Tensor
    stderr: Tensor
    samples: int


def hutchinson(
    op: LinearOperator | Tensor,
    *,
    samples: int = 100,
    what: Literal["trace", "diag"] = "trace",
    probe: Literal["rademacher", "gaussian"] = "rademacher",
    rtol: float | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate the trace, or the whole diagonal, of a square operator.

    Args:
        op: an operator or a matrix, d × d.
        samples: probes, at most.
        what: `"trace"`: mean of zᵀAz; `"diag"`: mean of z ⊙ Az.
        probe: how z is drawn.
        rtol: stop early, once the standard error (its norm, for a diagonal) is below `rtol` times the value.
        noise: `[samples, d]` probes to use instead of drawing.
        generator: for the probes.

    Returns:
        `Estimate(value, stderr, samples)`; the standard error of a single probe is infinite.

    Raises:
        BadSetting: on an unknown `what` or `probe`, or no samples. BadData: when `noise` does not fit.
    """
    if what not in ("trace", "diag") or probe not in ("rademacher", "gaussian") or samples < 1:
        raise BadSetting(f"hutchinson: what={what!r}, probe={probe!r}, samples={samples}; allowed: trace or diag, "
                         "rademacher or gaussian, at least 1")  # fmt: skip
    d = op.shape[0]
    if op.shape[1] != d or (noise is not None and noise.shape[1] != d):
        raise BadData(f"hutchinson takes a square operator and noise [samples, d]; the operator is {op.shape[0]} × {op.shape[1]}")
    samples = samples if noise is None else len(noise)
    mean = squares = torch.zeros((), dtype=op.dtype, device=op.device)
    done = 0
    while done < samples:
        count = min(COLUMNS, samples - done)
        z = _draw(op, count, probe, generator) if noise is None else noise[done : done + count].to(op.device, op.dtype).T
        values = z * (op @ z)  # [d, k]
        values = values.sum(0) if what == "trace" else values
        done += count
        # Chan, Golub, LeVeque: means and squared deviations of two sets, joined without cancellation
        shift = values.mean(-1) - mean
        squares = squares + values.var(-1, correction=0) * count + shift**2 * (done - count) * count / done
        mean = mean + shift * count / done
        if rtol is not None and done > 1 and bool(_stderr(squares, done).norm() <= rtol * mean.norm()):
            break
    return Estimate(mean, _stderr(squares, done), done)


def _stderr(squares: Tensor, count: int) -> Tensor:
    return (squares / (count - 1) / count).sqrt() if count > 1 else torch.full_like(squares, torch.inf)


def _draw(op: LinearOperator | Tensor, count: int, probe: str, generator: torch.Generator | None) -> Tensor:
    like = torch.empty((), dtype=op.dtype, device=op.device)
    shape = (count, op.shape[0])  # by rows: the probes do not depend on how many are drawn at once
    return draw_probes(shape, probe, like=like, generator=generator).T
