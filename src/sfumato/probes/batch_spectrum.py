"""How noisy the Hessian of a batch is, and how large a learning rate a training run stands.

    v(B) = E ‖(H_B − H) z‖²,  z a random unit vector

v is the `v` of `spiked_wigner` when the noise is the same in all directions. In small classifiers it is not: a few directions
hold most of it, v is then small, and the noise's own largest eigenvalue (`noise_edge`) tells more.

Source: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size", JMLR 23(173), 2022.

>>> import torch
>>> from sfumato.probes import effective_batch, hessian_noise, max_stable_lr
>>> x = torch.tensor([[1.0], [3.0]])  # squared errors: the Hessian of one sample is 2x²: 2 or 18, and 10 of both
>>> noise = hessian_noise(torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss(), (x, x), batch=1, probes=2, batches=4)
>>> noise.value, effective_batch(1, 2)
(tensor(64.), 2.0)
>>> 0.9 < max_stable_lr(lambda lr: lr < 1, (0.01, 10.0)) <= 1
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn.trace_of_jacobian import draw_probes
from sfumato.probes.functional_model import Data, Selection, as_batches
from sfumato.probes.krylov import eigs
from sfumato.probes.linear_operator import LinearOperator
from sfumato.probes.operators import HessianOperator, LossFunction
from sfumato.probes.stochastic_trace import Estimate


def effective_batch(batch: int, total: int) -> float:
    """The batch drawn with replacement whose mean has the variance of `batch` samples drawn without: B / (1 − B/N).

    Args:
        batch: B, samples a batch, 1 to N.
        total: N, samples of the data set.

    Returns:
        At least `batch`; infinite for the whole data set.

    Raises:
        BadSetting: a batch out of range.
    """
    if not 1 <= batch <= total:
        raise BadSetting(f"batch={batch} must be from 1 to the {total} samples there are")
    return math.inf if batch == total else batch / (1 - batch / total)


def batch_hessians(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    *,
    batch: int,
    batches: int = 16,
    params: Selection = None,
    index: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[HessianOperator, list[HessianOperator]]:
    """The Hessian on all data, and the Hessians of random batches of it.

    Args:
        model: any module; batch norm takes its running statistics.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        data: a pair (inputs, targets), a list of pairs, or a DataLoader; kept in memory, and never more of it differentiated at
            once than its largest pair has.
        batch: samples a batch, drawn without replacement.
        batches: how many batches.
        params: names of parameters, or a predicate on names; None: all trainable ones.
        index: `[batches, batch]` samples of each batch instead of drawing.
        generator: source of the draws.

    Returns:
        The operator H on all data, and one H_B a batch.

    Raises:
        BadSetting: a batch larger than the data, or no batches. BadData: an `index` that does not fit.
    """
    device = next(model.parameters()).device
    given = list(as_batches(data, device))
    x, y = (torch.cat(column) for column in zip(*given))
    at_once = max(len(column) for column, _ in given)
    effective_batch(batch, len(x))  # refuses what cannot be drawn
    if index is None:
        if batches < 1:
            raise BadSetting(f"batches={batches} must be at least 1")
        source = device if generator is None else generator.device
        rows = [torch.randperm(len(x), generator=generator, device=source)[:batch].to(device) for _ in range(batches)]
    elif index.ndim == 2 and index.shape[1] == batch:
        rows = list(index.to(device))
    else:
        raise BadData(f"index is [batches, {batch}], not {list(index.shape)}")
    drawn = [list(zip(x[i].split(at_once), y[i].split(at_once), strict=True)) for i in rows]
    return HessianOperator(model, loss, given, params=params), [
        HessianOperator(model, loss, pairs, params=params) for pairs in drawn
    ]


def hessian_noise(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    *,
    batch: int,
    probes: int = 8,
    batches: int = 16,
    params: Selection = None,
    noise: Tensor | None = None,
    index: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The variance of a batch's Hessian along a random direction, E ‖(H_B − H) z‖².

    Args:
        model, loss, data, batch, batches, params, index: as of `batch_hessians`.
        probes: random directions z, the same for all batches.
        noise: `[probes, d]` directions to use instead of drawing, of any length but 0.
        generator: source of the draws.

    Returns:
        `Estimate(value, stderr, samples)`: v, its standard error (infinite from a single batch or probe), probes times batches.

    Raises:
        BadSetting: a batch larger than the data, or no batches or probes. BadData: an `index` that does not fit.
    """
    whole, parts = batch_hessians(
        model, loss, data, batch=batch, batches=batches, params=params, index=index, generator=generator
    )
    if noise is None:
        like = torch.empty((), dtype=whole.dtype, device=whole.device)
        noise = draw_probes((probes, whole.shape[0]), "gaussian", like=like, generator=generator)
    z = (noise / noise.norm(dim=1, keepdim=True)).T
    return deviation_along(whole @ z, [part @ z for part in parts])


def deviation_along(whole: Tensor, parts: Sequence[Tensor]) -> Estimate:
    """What `hessian_noise` measures, from products that are there already: the mean of ‖(H_B − H) z‖².

    Args:
        whole: H z for unit directions z, `[d, probes]`.
        parts: H_B z for the same directions, one `[d, probes]` a batch.

    Returns:
        `Estimate(value, stderr, samples)` as `hessian_noise`.

    Raises:
        BadSetting: no batches.
    """
    if not parts:
        raise BadSetting("the noise of no batches: give at least one product")
    squares = torch.stack([(part - whole).square().sum(0) for part in parts])  # [batches, probes]
    error = _error(squares.mean(1)).square() + _error(squares.mean(0)).square()  # batches and directions both vary
    return Estimate(squares.mean(), error.sqrt(), squares.numel())


def noise_edge(
    model: nn.Module,
    loss: LossFunction,
    data: Data,
    *,
    batch: int,
    batches: int = 16,
    params: Selection = None,
    index: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The largest eigenvalue of the noise of a batch's Hessian, E λ_max(H_B − H), by Lanczos.

    Noise that is equal in all directions has its edge at 2√v; an edge far above that means noise in few directions.

    Args:
        model, loss, data, batch, batches, params, index, generator: as of `batch_hessians`.

    Returns:
        `Estimate(value, stderr, samples)`: the mean edge, its standard error (infinite from a single batch), batches.

    Raises:
        BadSetting, BadData: as `hessian_noise`.
    """
    whole, parts = batch_hessians(
        model, loss, data, batch=batch, batches=batches, params=params, index=index, generator=generator
    )
    edges = torch.stack([eigs(_Difference(part, whole), 1, tol=1e-3, generator=generator).values[0] for part in parts])
    return Estimate(edges.mean(), _error(edges), len(edges))


def max_stable_lr(train_fn: Callable[[float], bool], bracket: tuple[float, float], *, factor: float = 1.1) -> float:
    """The largest learning rate that still trains, by bisection of its logarithm.

    Args:
        train_fn: trains at a rate and says whether that went well; say what that means (a usual choice: the loss is finite and
            below 0.9 of the first one after a few hundred steps), and begin at the same weights and order every time.
        bracket: a rate that trains and one that does not; an end is tried only when all others went the same way.
        factor: stop when the rate that fails is at most this factor above the one that trains, more than 1.

    Returns:
        The largest rate that was found to train. log₂(log(high/low) / log(factor)) runs, rounded up.

    Raises:
        BadSetting: a bracket that does not enclose the rate, or a factor of 1 or less.
    """
    low, high = bracket
    if not 0 < low < high < math.inf or factor <= 1:
        raise BadSetting(f"bracket={bracket} must be two rising positive rates, and factor={factor} above 1")
    while high > factor * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if train_fn(middle) else (low, middle)
    if high == bracket[1] and train_fn(high):
        raise BadSetting(f"even a rate of {high:g} trains: raise the upper end of the bracket")
    if low == bracket[0] and not train_fn(low):
        raise BadSetting(f"even a rate of {low:g} does not train: lower the lower end of the bracket")
    return low


class _Difference(LinearOperator):
    """A − B of two symmetric operators."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        super().__init__(a.shape, a.dtype, a.device)
        self._a, self._b = a, b

    def _product(self, v: Tensor) -> Tensor:
        return self._a @ v - self._b @ v

    def _transposed_product(self, v: Tensor) -> Tensor:
        return self._product(v)


def _error(values: Tensor) -> Tensor:
    """Standard error of the mean of `[n]`."""
    return values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[0], torch.inf)
