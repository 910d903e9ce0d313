"""A method's own loss as a module, with its noise held: batch number to loss, a pure function of the weights.

f(θ; b) = ℓ_b(θ) w_b B / (n_b W): ℓ_b is the method's loss on batch b (a mean over w_b items, such as hidden pixels), n_b its
samples, W = Σ w_b, B = Σ n_b. The mean over samples, which every probe takes, is then the weighted mean that training minimises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.engine.randomness import key, seed_everything
from sfumato.errors import BadSetting
from sfumato.method import Batch, Context, Loss, Method


class OwnLoss(nn.Module):
    """`forward(numbers [B])`, all of them the number of one batch, gives that batch's loss `[B]`.

    Args:
        method: whose `loss` it is; its schedules stand at the end of the training.
        batches: on the CPU.
        seed: of the noise, which is the same at every call.

    Raises:
        BadSetting: a method that has no single loss.
    """

    def __init__(self, method: Method, batches: Sequence[Batch], seed: int = 0) -> None:
        if type(method).loss is Method.loss:
            raise BadSetting(
                f"{type(method).__name__} trains by several losses, and a probe takes one: probe its network by module:factory"
            )
        super().__init__()
        self.method = method
        self._held = _Held(batches, seed)

    def forward(self, numbers: Tensor) -> Tensor:
        """`[B]` equal batch numbers to `[B]` equal losses."""
        loss, held = self._loss(int(numbers[0])), self._held
        share = loss.weight * held.samples / (len(numbers) * self.total_weight())
        value = loss.value * torch.as_tensor(share, dtype=loss.value.dtype, device=loss.value.device)
        return value.expand(len(numbers))

    @property
    def batches(self) -> list[Batch]:
        """The samples as the method trains on them, on the CPU."""
        return self._held.batches

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The data of a probe: the number of its batch for every sample, twice."""
        numbers = [torch.full((len(b),), i) for i, b in enumerate(self._held.batches)]
        return [(n, n) for n in numbers]

    def first(self, batches: int) -> OwnLoss:
        """The same over the first batches only; the method is shared."""
        return OwnLoss(self.method, self._held.batches[:batches], self._held.seed)

    def drawn(self, parts: Sequence[Tensor], noise: int) -> OwnLoss:
        """The same over batches of these samples, numbered over all batches, with noise of their own; the method is shared."""
        held = self._held
        whole = [_joined([getattr(b, name) for b in held.batches]) for name in ("x", "index", "label", "target")]
        rows = [Batch(*(None if t is None else t[rows] for t in whole)) for rows in parts]  # type: ignore[arg-type]
        return OwnLoss(self.method, rows, key(held.seed, "drawn", noise))

    def total_weight(self) -> float:
        """Σ w_b, found once: with the noise held it is a constant."""
        held = self._held
        if held.weight is None:
            with torch.no_grad():
                held.weight = sum(float(self._loss(i).weight) for i in range(len(held.batches)))
        return held.weight

    def _loss(self, number: int) -> Loss:
        method, held = self.method, self._held
        device, steps = method.device, method.config.steps
        noise = key(held.seed, "probe", number)
        generator = torch.Generator(device).manual_seed(noise)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_everything(noise, device)
            return Loss(*method.loss(held.batches[number].to(device), Context(steps - 1, steps, held.seed, generator)))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if any(p is None for p in parts) else torch.cat([p for p in parts if p is not None])


class _Held:
    """Batches and constants; a copy of the module shares them."""

    def __init__(self, batches: Sequence[Batch], seed: int) -> None:
        self.batches, self.seed = list(batches), seed
        self.samples = sum(map(len, self.batches))
        self.weight: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self
