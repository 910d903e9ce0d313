"""Curvature of any module over a data set, by matrix-vector products only.

H v = ∇²L v (Pearlmutter 1994), G v = (1/n) Σ Jᵢᵀ ∇²ℓᵢ Jᵢ v (generalised Gauss-Newton, Schraudolph 2002),
E v = (1/n) Σ gᵢ gᵢᵀ v (empirical Fisher: given labels; Fisher: labels drawn from the model). L = (1/n) Σ ℓᵢ over all samples,
so unequal batches weigh what they should.

>>> import torch
>>> from sfumato.probes import HessianOperator
>>> x, y = torch.randn(20, 3), torch.randn(20, 1)
>>> net = torch.nn.Linear(3, 1, bias=False)
>>> hessian = HessianOperator(net, torch.nn.MSELoss(), [(x[:12], y[:12]), (x[12:], y[12:])])
>>> torch.allclose(hessian.dense(), 2 * x.T @ x / 20, atol=1e-5)
True
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from sfumato.errors import BadData
from sfumato.nn.flat import flatten_params, unflatten_params
from sfumato.probes.functional_model import Data, FunctionalModel, Selection, as_batches, as_inputs, eval_mode, exact_arithmetic
from sfumato.probes.linear_operator import LinearOperator

LossFunction = Callable[[Tensor, Tensor], Tensor]
Point = dict[str, Tensor]


class _Differentiating(LinearOperator):
    """Products by forward-mode derivatives, or by reverse mode alone where a module has no forward rule."""

    forward_mode = True

    def _either(self, forward: Callable[[], Tensor], reverse: Callable[[], Tensor]) -> Tensor:
        if not self.forward_mode:
            return reverse()
        try:
            return forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            product = reverse()  # an error that is not about forward mode comes again, from here
            self.forward_mode = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"no forward-mode derivative here, products take reverse mode: {reason}", stacklevel=2)
            return product

    def _map(self, one: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        if len(rows) == 1:
            return one(rows[0])[None]
        return vmap(one, chunk_size=self.chunk)(rows)

    def _push(self, f: Callable[[Point], Tensor], at: Point, rows: Tensor) -> Tensor:
        """J v for the rows v of `[k, d]` -> `[k, outputs]`."""

        def forward() -> Tensor:
            return self._map(lambda v: jvp(f, (at,), (unflatten_params(v, at),))[1].reshape(-1), rows)

        def reverse() -> Tensor:
            leaves, out = _graph(f, at)
            w = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, leaves, w, create_graph=True, materialize_grads=True)  # linear in w: Jᵀ w
            return torch.stack([_along(pulled, [w], unflatten_params(v, leaves)) for v in rows])

        return self._either(forward, reverse)

    def _pull(self, f: Callable[[Point], Tensor], at: Point, rows: Tensor) -> Tensor:
        """Jᵀ u for the rows u of `[k, outputs]` -> `[k, d]`."""

        def forward() -> Tensor:
            out, pull = vjp(f, at)  # type: ignore[misc]
            return self._map(lambda u: flatten_params(pull(u.reshape(out.shape))[0]), rows)

        def reverse() -> Tensor:
            leaves, out = _graph(f, at)
            return torch.stack([_along([out], leaves, [u.view_as(out)]) for u in rows])

        return self._either(forward, reverse)


def _graph(f: Callable[[Point], Tensor], at: Point) -> tuple[list[Tensor], Tensor]:
    """The value of `f` with a plain graph, and the leaves of that graph."""
    with torch.enable_grad():
        leaves = {name: t.detach().requires_grad_() for name, t in at.items()}
        return list(leaves.values()), f(leaves)


def _along(heads: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """∂⟨heads, directions⟩/∂leaves, flat; heads without a graph are constants."""
    pairs = [(h, d) for h, d in zip(heads, directions, strict=True) if h.requires_grad]
    if not pairs:
        return torch.cat([torch.zeros_like(t).reshape(-1) for t in leaves])
    outputs, along = [h for h, _ in pairs], [d for _, d in pairs]
    return flatten_params(torch.autograd.grad(outputs, leaves, along, retain_graph=True, materialize_grads=True))


class _OverData(_Differentiating):
    """A symmetric d × d average over the samples of a data set; see `HessianOperator` for the arguments."""

    per_sample = False

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        data: Data,
        *,
        params: Selection = None,
        chunk: int | None = None,
        bn: Literal["eval", "batch"] = "eval",
        generator: torch.Generator | None = None,
    ) -> None:
        self.function = FunctionalModel(model, params=params, bn=bn, per_sample=self.per_sample)
        self.loss, self.data = loss, data
        theta = flatten_params(self.function.theta())
        super().__init__((len(theta), len(theta)), theta.dtype, theta.device, chunk)

    @property
    def T(self) -> LinearOperator:
        """Symmetric: itself."""
        return self

    def _product(self, v: Tensor) -> Tensor:
        total, count = torch.zeros_like(v.T), 0
        with self.function.at_rest():
            theta = self.function.theta()
            for x, y in as_batches(self.data, self.device):
                total += self._on_batch(theta, x, y, v.T) * len(x)
                count += len(x)
        if not count:
            raise BadData("the probe's data is empty")
        return total.T / count

    def _transposed_product(self, v: Tensor) -> Tensor:
        return self._product(v)

    def _on_batch(self, theta: Point, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """The operator of one batch on the rows of `[k, d]`."""
        raise NotImplementedError


class HessianOperator(_OverData):
    """The Hessian ∇²L of a mean loss; symmetric, not definite.

    A product with one vector runs reverse over reverse, the fastest way for one. Several columns run forward over reverse, all
    (or `chunk`) at once; with `forward_mode = False` on the operator they run reverse over reverse too, one after the other on
    one graph: the same numbers in less memory, and on a CPU slower only for many columns.

    Args:
        model: any module; its present weights are read at every product, and nothing of it is changed.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        data: a pair (inputs, targets), a list of pairs, or a DataLoader; read once per product, and equal at every reading.
        params: names of parameters, or a predicate on names; None: all trainable ones, in the order of `named_parameters`.
        chunk: columns worked on at once; None: all that are given.
        bn: `"eval"`: running statistics; `"batch"`: differentiate through the statistics of each batch.
        generator: seeds operators that draw (`FisherOperator`).

    Reference: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
    """

    _kept: list[tuple[list[Tensor], Sequence[Tensor]]] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it is open, weights and data do not change, and of a single batch the graph of the gradient is kept.

        A product with one vector is then one backward pass, in the memory that any product takes. Over several batches nothing
        is kept.
        """
        single = isinstance(self.data, Sequence) and (len(self.data) == 1 or isinstance(self.data[0], Tensor))
        if not single or self._kept is not None:
            yield
            return
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def _gradient(self, value: Callable[[Point], Tensor], theta: Point) -> tuple[list[Tensor], Sequence[Tensor]]:
        """The leaves and the gradient with its graph: the kept ones, if there are any."""
        if self._kept:
            return self._kept[0]
        leaves, out = _graph(value, theta)
        made = leaves, torch.autograd.grad(out, leaves, create_graph=True, materialize_grads=True)
        if self._kept is not None:
            self._kept.append(made)
        return made

    def _on_batch(self, theta: Point, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        def value(t: Point) -> Tensor:
            return self.loss(self.function(t, x), y)

        def forward() -> Tensor:
            return self._map(lambda v: flatten_params(jvp(grad(value), (theta,), (unflatten_params(v, theta),))[1]), rows)

        def reverse() -> Tensor:
            leaves, grads = self._gradient(value, theta)
            return torch.stack([_along(grads, leaves, unflatten_params(v, leaves)) for v in rows])

        return reverse() if len(rows) == 1 else self._either(forward, reverse)


class GGNOperator(_OverData):
    """The generalised Gauss-Newton matrix (1/n) Σ Jᵢᵀ ∇²ℓᵢ Jᵢ; positive semi-definite where the loss is convex in the outputs.

    With cross-entropy on logits it is the Fisher information itself. Arguments as in `HessianOperator`.

    Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.
    """

    def _on_batch(self, theta: Point, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        def outputs(t: Point) -> Tensor:
            return self.function(t, x)

        with torch.no_grad():
            out = outputs(theta)
        slope = grad(lambda o: self.loss(o, y))
        pushed = self._push(outputs, theta, rows)
        curved = self._map(lambda u: jvp(slope, (out,), (u.view_as(out),))[1].reshape(-1), pushed)
        return self._pull(outputs, theta, curved)


class EmpiricalFisherOperator(_OverData):
    """The second moment (1/n) Σ gᵢ gᵢᵀ of per-sample gradients with the *given* labels.

    Not the Fisher information, and far from an optimum not close to it. Arguments as in `HessianOperator`.

    Reference: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for natural gradient descent", 2019.
    """

    per_sample = True

    def _on_batch(self, theta: Point, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        def losses(t: Point) -> Tensor:  # [n]
            return vmap(lambda o, target: self.loss(o[None], target[None]))(self.function(t, x), y)

        return self._pull(losses, theta, self._push(losses, theta, rows) / len(x))


class FisherOperator(EmpiricalFisherOperator):
    """The Fisher information of a classifier, by Monte Carlo: one label per sample, drawn from the model's own softmax.

    The labels are a function of the seed alone, so the operator is one fixed matrix; its mean over seeds is `GGNOperator`
    with cross-entropy. Arguments as in `HessianOperator`; outputs are logits, classes in dimension 1; targets are not read.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, data: Data, **settings: Any) -> None:
        super().__init__(model, loss, data, **settings)
        generator = settings.get("generator")
        source = torch.Generator() if generator is None else generator
        self._seed = int(torch.randint(2**31, (), generator=source, device=source.device))

    def _product(self, v: Tensor) -> Tensor:
        self._draws = torch.Generator(self.device).manual_seed(self._seed)
        return super()._product(v)

    def _on_batch(self, theta: Point, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            share = self.function(theta, x).softmax(1).movedim(1, -1)  # [n, ..., classes]
        labels = torch.multinomial(share.reshape(-1, share.shape[-1]), 1, generator=self._draws).view(share.shape[:-1])
        return super()._on_batch(theta, x, labels, rows)


class JacobianOperator(_Differentiating):
    """∂ outputs / ∂ parameters over a data set: (samples · outputs) × d, samples in the order of the data.

    Args:
        model: any module; samples are kept apart, so batch normalisation takes its running statistics.
        data: inputs `[n, ...]`, a list of them or of pairs, or a DataLoader that does not shuffle.
        params: names of parameters, or a predicate on names; None: all trainable ones.
        chunk: columns worked on at once; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Tensor | Iterable[Any],
        *,
        params: Selection = None,
        chunk: int | None = None,
    ) -> None:
        self.function, self.data = FunctionalModel(model, params=params), data
        theta = self.function.theta()
        first = next(iter(theta.values()))
        with self.function.at_rest(), torch.no_grad():
            outputs = sum(self.function(theta, x).numel() for x in as_inputs(data, first.device))
        flat = flatten_params(theta)
        super().__init__((outputs, len(flat)), flat.dtype, flat.device, chunk)

    def _product(self, v: Tensor) -> Tensor:
        with self.function.at_rest():
            theta, inputs = self.function.theta(), as_inputs(self.data, self.device)
            return torch.cat([self._push(partial(self.function, x=x), theta, v.T) for x in inputs], 1).T

    def _transposed_product(self, u: Tensor) -> Tensor:
        total, start = torch.zeros(u.shape[1], self.shape[1], dtype=self.dtype, device=self.device), 0
        with self.function.at_rest():
            theta = self.function.theta()
            for x in as_inputs(self.data, self.device):
                with torch.no_grad():
                    count = self.function(theta, x).numel()
                total += self._pull(partial(self.function, x=x), theta, u[start : start + count].T)
                start += count
        return total.T


class InputJacobianOperator(_Differentiating):
    """∂ fn(x) / ∂x at one input, all entries of `x` and of the result taken as vectors: outputs × inputs.

    Args:
        fn: a function of one tensor, or a module (taken in eval mode).
        x: where to differentiate, any shape.
        chunk: columns worked on at once; None: all.
    """

    _kept: tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]] | None = None

    def __init__(self, fn: Callable[[Tensor], Tensor], x: Tensor, *, chunk: int | None = None) -> None:
        self.fn, self.x = fn, x.detach()
        with self._at_rest(), torch.no_grad():
            self._out = torch.empty_like(fn(self.x), device="meta")
        super().__init__((self._out.numel(), x.numel()), x.dtype, x.device, chunk)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it is open, the function does not change, and the graph of its one evaluation is kept.

        A product is then one backward pass: with the transpose, through the function; with the matrix itself, through that pass,
        which is linear. A function that cannot be differentiated twice is evaluated anew for every product.
        """
        if self._kept is not None or not self.forward_mode:
            yield
            return
        with self._resting():
            out, back = vjp(self.fn, self.x)  # type: ignore[misc]
            with suppress(RuntimeError):
                _, forth = vjp(lambda u: back(u)[0], torch.zeros_like(out))  # type: ignore[misc]
                self._kept = back, forth
        try:
            yield
        finally:
            self._kept = None

    @contextmanager
    def _resting(self) -> Iterator[None]:
        with self._at_rest(), exact_arithmetic(self.device.type), torch.no_grad():
            yield

    def _at_rest(self) -> AbstractContextManager[None]:
        if isinstance(self.fn, nn.Module):
            return eval_mode(self.fn)
        return nullcontext()

    def _product(self, v: Tensor) -> Tensor:
        with self._resting():
            if self._kept is not None:
                return self._map(lambda row: self._kept[1](row.view(self.x.shape))[0].reshape(-1), v.T).T  # type: ignore[index]
            return self._push(self._at, {"x": self.x}, v.T).T

    def _transposed_product(self, u: Tensor) -> Tensor:
        with self._resting():
            if self._kept is not None:
                return self._map(lambda row: self._kept[0](row.view(self._out.shape))[0].reshape(-1), u.T).T  # type: ignore[index]
            return self._pull(self._at, {"x": self.x}, u.T).T

    def _at(self, point: Point) -> Tensor:
        return self.fn(point["x"])
