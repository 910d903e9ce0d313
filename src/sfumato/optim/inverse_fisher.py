"""The inverse of a damped empirical Fisher matrix, times vectors, without ever holding the matrix (M-FAC).

    F = λI + (1/m) Σ gᵢ gᵢᵀ,    F⁻¹x = ( x − Gᵀ (mλI + GGᵀ)⁻¹ G x ) / λ,    F⁻¹gᵣ = m Gᵀ (mλI + GGᵀ)⁻¹ eᵣ

with the m gradients as rows of G `[m, d]` (Woodbury). `StaticInverseFisher` is for gradients that are all there, and gives the
diagonal too: O(dm²) once, O(dm) a product. `SlidingInverseFisher` keeps the last m gradients: O(dm + m³) a gradient.

Source: Frantar, Kurtic, Alistarh, "M-FAC", NeurIPS 2021, Sections 3.1 and 3.2; there the same products come from m rank-one
(Sherman-Morrison) updates.

>>> import torch
>>> from sfumato.optim import StaticInverseFisher
>>> grads, x = torch.randn(3, 50), torch.randn(50)
>>> fisher = 0.1 * torch.eye(50) + grads.T @ grads / 3
>>> torch.allclose(StaticInverseFisher(grads, damp=0.1).mul(fisher @ x), x, atol=1e-4)
True
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.nn.at_rest import exact_arithmetic

Solver = Literal["woodbury", "sequential"]

_AT_ONCE = 2**22
"""Numbers that are worked on at once where a wider type or another device is needed."""

_NOT_FINITE = "a gradient is not finite, or its squared norm overflows"


class StaticInverseFisher:
    """F⁻¹ for given gradients, whole or block by block along the diagonal.

    Setting up works in float64, a slice at a time; what is kept is a root R with F⁻¹ = I/λ − RᵀR/λ, or F⁻¹ = RᵀR where blocks
    are no wider than m.

    Args:
        grads: `[m, d]`, one gradient a row; not changed, and not needed any more afterwards.
        damp: λ, positive.
        block: width of the blocks, the last may be narrower; 1: the diagonal of F alone; None: all of F.
        storage: `"device"`: R `[min(m, block), d]` stays where `grads` is; `"cpu"`: in host memory, and products fetch it in
            slices to where `x` is.

    Raises:
        BadSetting: damp or block out of range, or an unknown storage.
        BadData: `grads` is no real matrix, is empty, or has a value that is not finite.
    """

    def __init__(
        self, grads: Tensor, *, damp: float = 1e-5, block: int | None = None, storage: Literal["device", "cpu"] = "device"
    ) -> None:
        _check_damp(damp)
        if storage not in ("device", "cpu"):
            raise BadSetting(f"storage={storage!r} must be 'device' or 'cpu'")
        if block is not None and block < 1:
            raise BadSetting(f"block={block} must be at least 1, or None for the whole matrix")
        if grads.ndim != 2 or not grads.numel() or not grads.is_floating_point():
            raise BadData(f"gradients must be a real matrix [m, d], not {tuple(grads.shape)} of {grads.dtype}")
        m, self.d = grads.shape
        self.damp, width = damp, min(block or self.d, self.d)
        blocks, narrow = -(-self.d // width), width <= m
        kept = torch.promote_types(grads.dtype, torch.float32)
        place = torch.device("cpu") if storage == "cpu" else grads.device
        self._root = torch.empty(min(m, width), blocks, width, dtype=kept, device=place)
        self._diag = torch.empty(blocks, width, dtype=kept, device=place)
        self._plain, self._sign = (0.0, 1.0) if narrow else (1 / damp, -1 / damp)
        at_once = max(1, _AT_ONCE // (m * width))
        with torch.no_grad(), exact_arithmetic(grads.device.type):
            for first in range(0, blocks, at_once):
                here = slice(first, min(first + at_once, blocks))
                part = grads.detach()[:, here.start * width : here.stop * width]
                if missing := (here.stop - here.start) * width - part.shape[1]:
                    part = F.pad(part, (0, missing))  # weights that do not exist: λ on the diagonal, and nothing else
                part = part.unflatten(1, (-1, width)).transpose(0, 1)  # [blocks, m, width]
                fill = self._fill_narrow if narrow else self._fill_wide
                fill(part, self._root[:, here].transpose(0, 1), self._diag[here])
        if not bool(self._diag.isfinite().all()):
            raise BadData(_NOT_FINITE)

    def _fill_narrow(self, grads: Tensor, root: Tensor, diag: Tensor) -> None:
        """Blocks `[n, m, width]` with width ≤ m: the inverse of the block's own Cholesky factor."""
        exact = _widened(grads)
        factor = _factor(exact.mT @ exact / grads.shape[1], self.damp)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(root.shape[-1]).to(factor), upper=False)
        root.copy_(inverse)
        diag.copy_(inverse.square().sum(-2))

    def _fill_wide(self, grads: Tensor, root: Tensor, diag: Tensor) -> None:
        """Blocks `[n, m, width]` with width > m: R = L⁻¹G with LLᵀ = mλI + GGᵀ."""
        m = grads.shape[1]
        factor = _factor(_gram(grads), m * self.damp)
        columns = max(1, _AT_ONCE // (len(grads) * m))
        for g, r, dg in zip(grads.split(columns, -1), root.split(columns, -1), diag.split(columns, -1), strict=True):
            exact = _widened(g)
            whitened = torch.linalg.solve_triangular(factor, exact, upper=False)
            r.copy_(whitened)
            least = 1 / (self.damp + exact.square().mean(-2))  # [F⁻¹]ᵢᵢ ≥ 1/Fᵢᵢ: rounding may not go below
            dg.copy_(((1 - whitened.square().sum(-2)) / self.damp).clamp_min(least))

    @torch.no_grad()
    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹x of a vector `[d]` or of the columns of `[d, k]`; O(dm) each, in the type of the gradients (at least float32).

        Raises:
            BadData: `x` has another length.
        """
        _check_length(x, self.d)
        rank, blocks, width = self._root.shape
        columns = x.reshape(self.d, -1).to(self._root.dtype)
        blocked = F.pad(columns, (0, 0, 0, blocks * width - self.d)).view(blocks, width, -1)
        out = self._plain * blocked
        rows = rank if self._root.device == x.device else max(1, _AT_ONCE // (blocks * width))
        with exact_arithmetic(x.device.type):
            for part in self._root.split(rows):
                r = part.to(x.device).transpose(0, 1)  # [blocks, rows, width]
                out.baddbmm_(r.mT, r @ blocked, alpha=self._sign)
        return out.view(blocks * width, -1)[: self.d].reshape(x.shape)

    def diag(self) -> Tensor:
        """The diagonal of F⁻¹, `[d]`, every entry in (0, 1/λ]."""
        return self._diag.flatten()[: self.d]

    def entry(self, i: Tensor | int, j: Tensor | int) -> Tensor:
        """Single entries of F⁻¹ at rows `i` and columns `j` (numbers, or tensors of one shape); O(m) each.

        Raises:
            BadData: an index outside 0 to d − 1.
        """
        place = self._root.device
        row, column = torch.broadcast_tensors(torch.as_tensor(i, device=place), torch.as_tensor(j, device=place))
        both = torch.stack([row, column])
        if bool(((both < 0) | (both >= self.d)).any()):
            raise BadData(f"entries of a {self.d} x {self.d} matrix have indices from 0 to {self.d - 1}")
        flat, width = self._root.flatten(1), self._root.shape[-1]
        value = self._sign * (flat[:, row] * flat[:, column]).sum(0)
        value = value * (row // width == column // width)  # other blocks: 0
        return torch.where(row == column, self._diag.flatten()[row], value)


class SlidingInverseFisher:
    """F⁻¹ over the last m gradients, one at a time into a ring.

    The divisor is m from the first gradient on: as long as the window fills, F = λI + (1/m) Σ over those seen.

    Args:
        m: gradients kept.
        d: length of each.
        damp: λ, positive.
        solver: how (mλI + GGᵀ)⁻¹ is applied. `"woodbury"`: Cholesky factor; `"sequential"`: elimination without pivots, row by
            row as in the paper, for comparison.
        dtype: what gradients are stored in: float64, float32 or bfloat16. Sums are float32 or wider, GGᵀ is float64.
        device: where they are stored.

    Attributes:
        grads: `[m, d]`, gradient t in row t mod m.
        gram: `[m, m]`, GGᵀ.
        count: gradients seen.

    Raises:
        BadSetting: sizes, damp, solver or dtype out of range, or a window that does not fit into memory.
    """

    def __init__(
        self,
        m: int,
        d: int,
        *,
        damp: float,
        solver: Solver = "woodbury",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if m < 1 or d < 1:
            raise BadSetting(f"a window of {m} gradients of {d} weights: both must be at least 1")
        if dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise BadSetting(f"a window holds float64, float32 or bfloat16, not {dtype}")
        place = torch.empty(0, device=device).device
        self._adopt(_window(m, d, dtype, place), torch.zeros(m, m, dtype=_wide(place), device=place), 0, damp, solver)

    @classmethod
    def over(cls, grads: Tensor, gram: Tensor, count: int, *, damp: float, solver: Solver = "woodbury") -> SlidingInverseFisher:
        """Go on with a window's attributes, as they were saved; nothing is copied."""
        window = cls.__new__(cls)
        window._adopt(grads, gram, count, damp, solver)
        return window

    def _adopt(self, grads: Tensor, gram: Tensor, count: int, damp: float, solver: Solver) -> None:
        _check_damp(damp)
        if solver not in ("woodbury", "sequential"):
            raise BadSetting(f"solver={solver!r} must be 'woodbury' or 'sequential'")
        self.grads, self.gram, self.count, self.damp, self.solver = grads, gram, count, damp, solver
        self._factored: Tensor | None = None

    @torch.no_grad()
    def update(self, g: Tensor) -> None:
        """Take in a gradient `[d]`; the oldest of m makes room.

        Raises:
            BadData: `g` has another length, or a value or norm that is not finite; the window is then as before.
        """
        m, d = self.grads.shape
        if g.shape != (d,):
            raise BadData(f"the window holds gradients of {d} weights, not {tuple(g.shape)}")
        slot, n = self.count % m, min(self.count + 1, m)
        stored = g.to(self.grads)
        with exact_arithmetic(self.grads.device.type):
            row = stored.to(_sum_type(stored.dtype))
            if not bool(row.dot(row).isfinite()):
                raise BadData(_NOT_FINITE)
            self.grads[slot] = stored
            products = _times(self.grads[:n], row).to(self.gram)
        self.gram[slot, :n] = products
        self.gram[:n, slot] = products
        self.count += 1
        self._factored = None

    @torch.no_grad()
    def refresh(self, count: int) -> None:
        """After `grads` was filled by hand: `count` gradients were seen, and GGᵀ is made anew, O(dm²)."""
        self.count, self._factored = count, None
        with exact_arithmetic(self.grads.device.type):
            self.gram.copy_(_gram(self.grads))

    @torch.no_grad()
    def mul(self, x: Tensor) -> Tensor:
        """F⁻¹x of a vector `[d]` or of the columns of `[d, k]`; two passes over the window.

        Raises:
            BadData: `x` has another length.
        """
        _check_length(x, self.grads.shape[1])
        filled = self.grads[: self.count]
        x = x.to(_sum_type(self.grads.dtype))
        if not len(filled):
            return x / self.damp
        with exact_arithmetic(x.device.type):
            inner = self._solve(_times(filled, x).to(self.gram))
            return (x - _combined(filled, inner.to(x.dtype))) / self.damp

    @torch.no_grad()
    def update_mul(self, g: Tensor) -> Tensor:
        """`update(g)`, then F⁻¹g `[d]`: two passes in all.

        F⁻¹g is a combination of the window's rows, without the difference of near numbers, divided by λ, that `mul` makes. Where
        gradients are so alike that rounding decides how they combine, the directions in which they differ are left out.

        Raises:
            BadData: as `update`.
        """
        self.update(g)
        m = len(self.grads)
        with exact_arithmetic(self.grads.device.type):
            latest = torch.zeros(min(self.count, m), dtype=self.gram.dtype, device=self.gram.device)
            latest[(self.count - 1) % m] = m
            total = _sum_type(self.grads.dtype)
            weights = self._solve(latest, resolution=16 * torch.finfo(total).eps)
            return _combined(self.grads[: self.count], weights.to(total))

    def _solve(self, b: Tensor, resolution: float = 0.0) -> Tensor:
        """(mλI + GGᵀ)⁻¹ b over the filled rows, b `[n]` or `[n, k]`; directions below `resolution` of the largest left out."""
        n, shift = len(b), len(self.grads) * self.damp
        gram, columns = self.gram[:n, :n], b.reshape(n, -1)
        if self.solver == "sequential":
            return _eliminated(gram, shift, columns).view_as(b)
        if self._factored is None:
            self._factored = _factor(gram, shift)
        pivots = self._factored.diagonal().square()
        if resolution and bool(pivots.min() < resolution * pivots.max()):
            values, vectors = torch.linalg.eigh(gram)
            kept = values > resolution * values[-1]
            basis = vectors[:, kept]
            return (basis / (values[kept] + shift) @ (basis.mT @ columns)).view_as(b)
        return torch.cholesky_solve(columns, self._factored).view_as(b)


def _eliminated(gram: Tensor, shift: float, b: Tensor) -> Tensor:
    """(GGᵀ + shift·I)⁻¹ b by the paper's recursion: gradient i leaves, to all later ones, what it does not explain itself."""
    upper, pivots = gram.clone(), torch.empty_like(gram[0])
    for i in range(len(upper)):
        pivots[i] = shift + upper[i, i]
        rest = upper[i, i + 1 :]
        upper[i + 1 :, i + 1 :] -= torch.outer(rest, rest / pivots[i])
    unit = (upper / pivots[:, None]).triu(1)
    y = torch.linalg.solve_triangular(unit.mT, b, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(unit, y / pivots[:, None], upper=True, unitriangular=True)


def _factor(gram: Tensor, shift: float) -> Tensor:
    """Cholesky factor of `gram + shift·I`, batched; eigenvalues that rounding made negative count as zero.

    A Gram matrix of float32 gradients is off by 1e-7 of its size, which can be more than `shift`.
    """
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if bool(failed.any()):
        if not bool(gram.isfinite().all()):
            raise BadData(_NOT_FINITE)
        values, vectors = torch.linalg.eigh(gram)
        least = values[..., -1:] * torch.finfo(gram.dtype).eps * len(gram[0])
        values = (values.clamp_min(0) + shift).maximum(least)
        factor = torch.linalg.cholesky((vectors * values.unsqueeze(-2)) @ vectors.mT)
    return factor


def _gram(grads: Tensor) -> Tensor:
    """GGᵀ of `[..., m, d]` in float64, a slice of columns at a time."""
    columns = max(1, _AT_ONCE // grads[..., 0].numel())
    parts = (_widened(part) for part in grads.split(columns, -1))
    first = next(parts)
    total = first @ first.mT
    for part in parts:
        total += part @ part.mT
    return total


def _times(grads: Tensor, x: Tensor) -> Tensor:
    """G x with sums in the type of `x`; narrower gradients are widened a slice of columns at a time."""
    if grads.dtype == x.dtype:
        return grads @ x
    columns = max(1, _AT_ONCE // len(grads))
    pairs = zip(grads.split(columns, 1), x.split(columns), strict=True)
    return torch.stack([part.to(x.dtype) @ piece for part, piece in pairs]).sum(0)


def _combined(grads: Tensor, weights: Tensor) -> Tensor:
    """Gᵀ c in the type of the weights `[n]` or `[n, k]`."""
    if grads.dtype == weights.dtype:
        return grads.T @ weights
    columns = max(1, _AT_ONCE // len(grads))
    return torch.cat([part.T.to(weights.dtype) @ weights for part in grads.split(columns, 1)])


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _widened(t: Tensor) -> Tensor:
    return t.to(_wide(t.device))


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_damp(damp: float) -> None:
    if not damp > 0:
        raise BadSetting(f"damp={damp} must be positive: without it the matrix of few gradients has no inverse")


def _check_length(x: Tensor, d: int) -> None:
    if x.ndim not in (1, 2) or len(x) != d:
        raise BadData(f"the inverse Fisher takes [{d}] or [{d}, k], not {tuple(x.shape)}")


def _window(m: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    needed, free = m * d * dtype.itemsize, _free_bytes(device)
    if needed > free:
        raise BadSetting(
            f"a window of {m:,} gradients of {d:,} weights takes {needed:,} bytes as {str(dtype).removeprefix('torch.')}, "
            f"and {free:,} are free on {device}: keep fewer (ngrads), or store them as bfloat16"
        )
    return torch.zeros(m, d, dtype=dtype, device=device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return int(psutil.virtual_memory().available)
