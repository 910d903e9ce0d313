"""Small tasks with an exact rule and all the data one wants: modular arithmetic, parity of a few bits, and three that sum to 0.

    modular:  (a, b) ↦ a ∘ b mod p        parity:  x ↦ x_1 ⊕ … ⊕ x_k        match-3:  i ↦ [∃ j, k: t_i + t_j + t_k ≡ 0 mod M]

They show late generalisation (grokking) and what an architecture can express.

Sources: Power et al. 2022, "Grokking" (modular arithmetic); Barak et al. 2022, "Hidden Progress in Deep Learning" (parity);
Sanford, Hsu, Telgarsky 2023, "Representational Strengths and Limitations of Transformers" (match-3).

>>> import torch
>>> from sfumato.data import modular
>>> train, test = modular(5, "add", generator=torch.Generator().manual_seed(0))
>>> train.x.shape, len(test)
(torch.Size([10, 10]), 15)
>>> a, b = train.x[0].view(2, 5).argmax(1)
>>> bool((a + b) % 5 == train.label[0])
True
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.batch import Batch
from sfumato.errors import BadSetting


def modular(
    p: int = 113,
    op: Literal["add", "sub", "mul"] = "add",
    *,
    train_fraction: float = 0.4,
    generator: torch.Generator | None = None,
) -> tuple[Batch, Batch]:
    """All pairs (a, b) of numbers below `p` with a ∘ b mod p as their class, split at random.

    Args:
        p: the modulus, at least 2; it is the number of classes.
        op: ∘: "add", "sub" or "mul".
        train_fraction: share of the p² pairs to train on, above 0 and below 1 (rounded down).
        generator: of the split.

    Returns:
        Train and test: `x` `[N, 2p]`, the two numbers one-hot side by side, `label` `[N]`, and `index` `[N]` = a p + b.

    Raises:
        BadSetting: a setting out of its range.
    """
    if p < 2:
        raise BadSetting(f"p={p} must be at least 2")
    if op not in ("add", "sub", "mul"):
        raise BadSetting(f"op {op!r} is not known: add, sub or mul")
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).unbind(1)
    result = {"add": a + b, "sub": a - b, "mul": a * b}[op] % p
    x = F.one_hot(torch.stack([a, b], 1), p).flatten(1).float()
    return _split(x, result, train_fraction, generator)


def sparse_parity(
    k: int = 3,
    noise: int = 40,
    *,
    samples: int = 2000,
    train_fraction: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Batch, Batch]:
    """Random bits, of which the first few decide: is the number of ones among them odd?

    Args:
        k: bits that decide, at least 1.
        noise: bits that do not.
        samples: number of samples, train and test together.
        train_fraction: share of them to train on, above 0 and below 1 (rounded down).
        generator: of the bits and the split.

    Returns:
        Train and test: `x` `[N, k + noise]` of -1 (for 0) and 1, and `label` `[N]`, 0 (even) or 1 (odd).

    Raises:
        BadSetting: a setting out of its range.
    """
    if k < 1 or noise < 0:
        raise BadSetting(f"k={k} and noise={noise} must be at least 1 and 0")
    bits = torch.randint(2, (samples, k + noise), generator=generator)
    return _split(bits * 2.0 - 1, bits[:, :k].sum(1) % 2, train_fraction, generator)


def match3(
    batch: int, n: int, modulus: int, *, distinct: bool = False, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sequences of random numbers; a token is marked when two tokens complete it to a sum that the modulus divides.

    Args:
        batch: number of sequences, B.
        n: tokens in each.
        modulus: M, at least 2.
        distinct: the three must stand at three different places; else a token may be taken again.
        generator: of the tokens.

    Returns:
        Tokens `[B, n]` from 0 to M - 1, and marks `[B, n]`, 0 or 1, both long.

    Raises:
        BadSetting: a modulus below 2.
    """
    if modulus < 2:
        raise BadSetting(f"modulus={modulus} must be at least 2")
    tokens = torch.randint(modulus, (batch, n), generator=generator)
    return tokens, match3_labels(tokens, modulus, distinct=distinct)


def match3_labels(tokens: Tensor, modulus: int, *, distinct: bool = False) -> Tensor:
    """The marks of `match3` for given tokens `[B, n]` from 0 to `modulus` - 1: `[B, n]`, long.

    Pairs are counted by their sum, with a circular convolution: n log M work a sequence, and no table of triples.
    """
    counts = _counts(tokens, modulus)
    pairs = torch.fft.irfft(torch.fft.rfft(counts).square(), modulus).round()  # ordered pairs (j, k) with each sum, j = k too
    wanted = -tokens % modulus
    found = pairs.gather(1, wanted)
    if distinct:  # inclusion and exclusion: j = i, k = i, j = k; any two of them together mean i = j = k
        doubles = _counts(2 * tokens % modulus, modulus)
        same = (2 * tokens % modulus == wanted).long()
        found = found - (2 * counts.gather(1, (wanted - tokens) % modulus) + doubles.gather(1, wanted) - 2 * same)
    return (found > 0.5).long()


def _counts(tokens: Tensor, modulus: int) -> Tensor:
    """How often each number occurs, `[B, M]`, float64."""
    zeros = torch.zeros(len(tokens), modulus, dtype=torch.float64, device=tokens.device)
    return zeros.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.float64))


def _split(x: Tensor, label: Tensor, train_fraction: float, generator: torch.Generator | None) -> tuple[Batch, Batch]:
    if not 0 < train_fraction < 1:
        raise BadSetting(f"train_fraction={train_fraction} must be above 0 and below 1")
    order, cut = torch.randperm(len(x), generator=generator), int(train_fraction * len(x))
    train, test = (Batch(x[rows], rows, label[rows]) for rows in (order[:cut], order[cut:]))
    return train, test
