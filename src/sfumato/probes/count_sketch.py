"""Vectors made short so that their inner products stay what they are, on average: a count sketch.

    (S a)_k = Σ_{i mod w = k} s_i a_i,  s_i = ±1 at random:      E ⟨S a, S b⟩ = ⟨a, b⟩,  variance about (‖a‖² ‖b‖² + ⟨a, b⟩²) / w

One pass over the vector and no matrix, so millions of numbers may come in, and in parts.

Sources: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", 2002; Weinberger et al., "Feature hashing for
large scale multitask learning", ICML 2009. Buckets that take turns, instead of random ones, are ours: signs alone make the mean
right.

>>> import torch
>>> from sfumato.probes import CountSketch
>>> a = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
>>> short = CountSketch(100_000, 4095, generator=torch.Generator().manual_seed(1))(a)
>>> short.shape, bool((short @ short.T / (a @ a.T).diag() - torch.eye(3)).abs().max() < 0.06)
(torch.Size([3, 4095]), True)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting


class CountSketch:
    """A fixed random map from `dim` to `width` numbers.

    Args:
        dim: numbers of a vector that comes in.
        width: of what comes out. Odd ones mix best, since sizes of layers are often even.
        generator: of the signs; they are drawn on its device, at first on the CPU.

    Raises:
        BadSetting: fewer than one number in or out.
    """

    def __init__(self, dim: int, width: int, *, generator: torch.Generator | None = None) -> None:
        if dim < 1 or width < 1:
            raise BadSetting(f"a sketch of {dim} numbers in {width}: both must be at least 1")
        self.dim, self.width = dim, width
        device = "cpu" if generator is None else generator.device
        self._signs = torch.randint(2, (dim,), generator=generator, device=device, dtype=torch.int8) * 2 - 1

    def __call__(self, a: Tensor) -> Tensor:
        """`[..., dim]` to `[..., width]`, of the same type.

        Raises:
            BadData: another number of columns.
        """
        return self.of_parts({"": a}, lead=a.ndim - 1)

    def of_parts(self, parts: Mapping[str, Tensor], *, lead: int) -> Tensor:
        """The sketch of tensors `[*lead, *shape]` laid end to end, without joining them.

        Args:
            parts: tensors with the same first `lead` dimensions.
            lead: how many dimensions are kept.

        Returns:
            `[*lead, width]`.

        Raises:
            BadData: another number of columns in all.
        """
        flat = [part.reshape(*part.shape[:lead], -1) for part in parts.values()]
        count, start = sum(part.shape[-1] for part in flat), 0
        if count != self.dim:
            raise BadData(f"this sketch is of {self.dim:,} numbers, and {count:,} were given")
        self._signs = self._signs.to(flat[0].device)
        total = flat[0].new_zeros(*flat[0].shape[:lead], self.width)
        for part in flat:
            end = start + part.shape[-1]
            total += self._fold(part * self._signs[start:end], start % self.width)
            start = end
        return total

    def _fold(self, a: Tensor, offset: int) -> Tensor:
        """Columns added up in turns, the first of them in bucket `offset`."""
        rows = -(-(a.shape[-1] + offset) // self.width)
        padded = torch.nn.functional.pad(a, (offset, rows * self.width - offset - a.shape[-1]))
        return padded.unflatten(-1, (rows, self.width)).sum(-2)
