"""Optimal Brain Surgeon pruning with an inverse Fisher matrix: the cheapest weights go, the others make up for them.

    ρᵢ = wᵢ² / (2 [F⁻¹]ᵢᵢ),    w ← w + F⁻¹ t  with  tᵢ = −wᵢ / [F⁻¹]ᵢᵢ on the dropped i, else 0,    then wᵢ = 0 exactly

ρᵢ is how much a quadratic loss with Hessian F rises when weight i alone is dropped so. With a diagonal F the others stay.

Source: Hassibi and Stork 1992; with F⁻¹ from m gradients: Frantar, Kurtic, Alistarh, "M-FAC", NeurIPS 2021, Section 4.1.

>>> import torch
>>> from sfumato.optim import StaticInverseFisher
>>> from sfumato.sparsity import obs_prune
>>> twins = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two weights do the same
>>> w, removed = obs_prune(torch.tensor([0.9, 1.0, 1.0]), StaticInverseFisher(twins), 1)
>>> removed.tolist(), [round(v, 2) for v in w.tolist()]
([True, False, False], [0.0, 1.9, 1.0])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sfumato.errors import BadData, BadSetting, nearest
from sfumato.nn.at_rest import eval_mode
from sfumato.nn.flat import flatten_params, unflatten_params
from sfumato.optim.inverse_fisher import StaticInverseFisher


class InverseFisher(Protocol):
    """What pruning asks of an inverse Fisher matrix; `StaticInverseFisher` is one."""

    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹x of `[d]`."""
        ...

    def diag(self) -> Tensor:
        """The diagonal of F⁻¹ `[d]`."""
        ...


def obs_prune(w: Tensor, inv_fisher: InverseFisher, n_drop: int) -> tuple[Tensor, Tensor]:
    """Drop the weights whose loss costs least, and correct the others for all of them at once.

    Args:
        w: `[d]`.
        inv_fisher: F⁻¹ of size d; saliency and correction use the same one.
        n_drop: how many, 0 to d; of equal ones the first.

    Returns:
        The new weights `[d]`, exactly 0 where dropped, and what was dropped (Bool `[d]`, True = removed).

    Raises:
        BadSetting: `n_drop` out of range.
    """
    if not 0 <= n_drop <= len(w):
        raise BadSetting(f"n_drop={n_drop} must be from 0 to {len(w)}, the number of weights")
    weights = w.detach()
    diag = inv_fisher.diag().to(weights)
    dropped = torch.argsort(weights.square() / (2 * diag), stable=True)[:n_drop]
    removed = torch.zeros_like(weights, dtype=torch.bool).index_fill_(0, dropped, True)
    pull = torch.where(removed, -weights / diag, 0)
    return (weights + inv_fisher.mul(pull).to(weights)).masked_fill(removed, 0), removed


class MFACPruner:
    """Prunes a network in steps; each takes new gradients of the weights that are left.

    Between calls of `step` the network may be trained; call `enforce` after each optimizer step, or use `MFAC(sparse=True)`, so
    that what is removed stays zero.

    Args:
        model: any module; in eval mode while gradients are taken.
        params: names of the parameters to prune, all together; None: the weights of linear and convolution layers.
        loss: `(outputs, targets) -> scalar`, the mean over a batch.
        data: a pair (inputs, targets), from which random batches are drawn, or batches as pairs (a list, a DataLoader), taken
            as they come, again and again.
        ngrads: m, gradients that make up F, one of each batch.
        batch: samples a gradient, where batches are drawn.
        block: width of F's blocks along the diagonal; 1: a diagonal Fisher; None: all of it.
        damp: λ, positive.
        recomputations: R, steps from one sparsity to the next, density falling by equal factors.
        generator: draws the batches.

    Attributes:
        removed: what was removed so far, by name (Bool, True = removed).

    Raises:
        BadSetting: unknown or frozen parameters, or numbers out of range.
        BadData: no data.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[str] | None,
        loss: Callable[[Tensor, Tensor], Tensor],
        data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
        *,
        ngrads: int = 64,
        batch: int = 32,
        block: int | None = 128,
        damp: float = 1e-5,
        recomputations: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        if min(ngrads, batch, recomputations) < 1:
            raise BadSetting(f"ngrads={ngrads}, batch={batch} and recomputations={recomputations} must be at least 1")
        self.model, self.loss, self.data, self.generator = model, loss, data, generator
        self.ngrads, self.batch, self.block, self.damp, self.recomputations = ngrads, batch, block, damp, recomputations
        self._weights = _chosen(model, params)
        self.removed = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in self._weights.items()}

    @property
    def sparsity(self) -> float:
        """Share of the weights that is removed, 0 to 1."""
        flat = flatten_params(self.removed)
        return int(flat.sum()) / len(flat)

    @torch.no_grad()
    def enforce(self) -> None:
        """Set what is removed to zero again."""
        for name, w in self._weights.items():
            w.masked_fill_(self.removed[name], 0)

    def step(self, to_sparsity: float) -> dict[str, Tensor]:
        """Prune until that share of all weights is removed; returns `removed`.

        Raises:
            BadSetting: a sparsity that is not from the present one to below 1.
            BadData: a gradient is not finite.
        """
        start = self.sparsity
        half_a_weight = 0.5 / sum(w.numel() for w in self._weights.values())
        if not start - half_a_weight <= to_sparsity < 1:
            raise BadSetting(f"to_sparsity={to_sparsity} must be at least {start:.4g}, where the network is, and below 1")
        self.enforce()
        for part in range(1, self.recomputations + 1):
            density = (1 - start) * ((1 - to_sparsity) / (1 - start)) ** (part / self.recomputations)
            self._prune_to(density)
        return self.removed

    @torch.no_grad()
    def _prune_to(self, density: float) -> None:
        removed, w = flatten_params(self.removed), flatten_params(self._weights)
        kept = (~removed).nonzero().squeeze(1)
        n_drop = len(kept) - round(density * len(w))
        if n_drop <= 0:
            return
        inverse = StaticInverseFisher(self._gradients(kept, w.dtype), damp=self.damp, block=self.block)
        w[kept], removed[kept] = obs_prune(w[kept], inverse, n_drop)
        for name, piece in unflatten_params(w, self._weights).items():
            self._weights[name].copy_(piece)
        self.removed = unflatten_params(removed, self.removed)

    def _gradients(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradients of `ngrads` batches at the weights that are left, `[m, d]`."""
        weights = list(self._weights.values())
        rows = torch.empty(self.ngrads, len(kept), dtype=dtype, device=kept.device)
        with eval_mode(self.model), torch.enable_grad():
            for row, (x, y) in zip(rows, islice(self._batches(), self.ngrads), strict=True):
                value = self.loss(self.model(x.to(kept.device)), y.to(kept.device))
                grads = torch.autograd.grad(value, weights, materialize_grads=True)
                row.copy_(flatten_params(grads)[kept])
        return rows

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """At least `ngrads` batches: every round through the data gives one or more."""
        for _ in range(self.ngrads):
            if isinstance(self.data, tuple) and isinstance(self.data[0], Tensor):
                yield from self._drawn(*self.data)
            else:
                yield from cast(Iterable[tuple[Tensor, Tensor]], self.data)
        raise BadData("no batch to take a gradient of: the data is empty, or an iterator that has ended")

    def _drawn(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, min(self.batch, len(inputs)))
        order = torch.randperm(len(inputs), generator=self.generator)
        for rows in order[: len(order) // size * size].view(-1, size):
            yield inputs[rows], targets[rows]


def _chosen(model: nn.Module, params: Iterable[str] | None) -> dict[str, nn.Parameter]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params is None:
        layers = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd))}
        chosen = {name: p for name, p in trainable.items() if id(p) in layers}
        if not chosen:
            raise BadSetting("the model has no linear or convolution layer that trains: name the parameters to prune")
        return chosen
    for name in (names := list(params)):
        if name not in trainable:
            near = nearest(name, trainable) or list(trainable)[:3]
            raise BadSetting(f"no trainable parameter {name!r}; nearest: {', '.join(near)}")
    if not names:
        raise BadSetting("no parameter to prune was named; None means all weights of linear and convolution layers")
    return {name: trainable[name] for name in names}
