"""A matrix that is known only by its products: `A @ v`, `A.T @ u`, and nothing of size n².

Everything in this room that takes an operator takes a tensor as well: both have `@`, `.T`, `.shape`, `.dtype`, `.device`.

>>> import torch
>>> from sfumato.probes import LinearOperator
>>> class Scale(LinearOperator):
...     def __init__(self, d):
...         super().__init__((d, d), torch.float64, torch.device("cpu"))
...     def _product(self, v):
...         return 3 * v
>>> (Scale(2) @ torch.ones(2, dtype=torch.float64)).tolist(), Scale(2).dense().diag().tolist()
([3.0, 3.0], [3.0, 3.0])
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting

if TYPE_CHECKING:
    import scipy.sparse.linalg

DENSE_LIMIT = 10_000
"""Rows or columns up to which `dense()` is allowed: 800 MB in float64."""


class LinearOperator:
    """An m × n matrix A. Subclasses define the two products with `[n, k]` and `[m, k]` columns.

    Args:
        shape: (m, n).
        dtype: of the vectors it takes and gives.
        device: where they live.
        chunk: how many columns are worked on at once; None: all that are given.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, chunk: int | None = None) -> None:
        if chunk is not None and chunk < 1:
            raise BadSetting(f"chunk={chunk} must be at least 1")
        self.shape, self.dtype, self.device, self.chunk = shape, dtype, device, chunk

    def _product(self, v: Tensor) -> Tensor:
        """A v: `[n, k]` -> `[m, k]`."""
        raise NotImplementedError

    def _transposed_product(self, v: Tensor) -> Tensor:
        """Aᵀ v: `[m, k]` -> `[n, k]`."""
        raise NotImplementedError

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[1]:
            raise BadData(f"a {self.shape[0]} × {self.shape[1]} operator takes [{self.shape[1]}] or [{self.shape[1]}, k], "
                          f"not {list(v.shape)}")  # fmt: skip
        columns = v.detach().to(self.device, self.dtype)
        return self._product(columns) if v.ndim == 2 else self._product(columns[:, None])[:, 0]

    @property
    def T(self) -> LinearOperator:
        """The transpose, as an operator."""
        return _Transposed(self)

    def held(self) -> AbstractContextManager[None]:
        """While it is open the matrix does not change, so an operator may keep what its products have in common."""
        return nullcontext()

    def dense(self) -> Tensor:
        """The matrix itself, `[m, n]`, for tests and toys.

        Raises:
            BadSetting: when a side is longer than 10 000.
        """
        if max(self.shape) > DENSE_LIMIT:
            raise BadSetting(f"a {self.shape[0]} × {self.shape[1]} matrix is too large to write out (limit {DENSE_LIMIT})")
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return torch.cat([self @ columns for columns in eye.split(self.chunk or 64, 1)], 1)  # type: ignore[no-untyped-call]

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator over numpy arrays, for `scipy.sparse.linalg` (`eigsh`, `svds`, `cg`, …)."""
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def product(operator: LinearOperator) -> Any:
            return lambda v: (operator @ torch.from_numpy(v)).cpu().numpy()

        forward, back = product(self), product(self.T)
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return ScipyOperator(self.shape, matvec=forward, rmatvec=back, matmat=forward, rmatmat=back, dtype=dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device})"


def held(op: LinearOperator | Tensor) -> AbstractContextManager[None]:
    """`op.held()`, of a matrix too."""
    return op.held() if isinstance(op, LinearOperator) else nullcontext()


class _Transposed(LinearOperator):
    def __init__(self, operator: LinearOperator) -> None:
        super().__init__((operator.shape[1], operator.shape[0]), operator.dtype, operator.device, operator.chunk)
        self._operator = operator

    def _product(self, v: Tensor) -> Tensor:
        return self._operator._transposed_product(v)

    def _transposed_product(self, v: Tensor) -> Tensor:
        return self._operator._product(v)

    @property
    def T(self) -> LinearOperator:
        return self._operator
