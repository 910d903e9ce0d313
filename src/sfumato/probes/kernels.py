"""What a kernel between samples says of a task: how well they are aligned, how far the kernel moved, what it predicts.

    alignment  yᵀ K y / (‖K‖ ‖y‖²),     velocity  ‖K_t − K_0‖ / ‖K_0‖,     regression  K(x, X) (K(X, X) + λI)⁻¹ y
    similarity  ⟨K, K′⟩ / (‖K‖ ‖K′‖), which no scale changes

Sources: Cortes, Mohri, Rostamizadeh, "Algorithms for learning kernels based on centered alignment", JMLR 2012; as measures
of feature learning: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics", ICLR
2024; similarity of representations: Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited",
ICML 2019.

>>> import torch
>>> from sfumato.probes import kernel_alignment, kernel_regression, kernel_similarity, kernel_velocity
>>> y = torch.tensor([1.0, -1.0, 2.0])
>>> k = torch.outer(y, y)
>>> kernel_alignment(k, y, centre="none").item(), kernel_velocity(3 * k, k).item()
(1.0, 2.0)
>>> round(kernel_similarity(3 * k, k).item(), 4)
1.0
>>> kernel_regression(torch.eye(3), y, torch.eye(3), ridge=1.0)
tensor([ 0.5000, -0.5000,  1.0000])
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.nn.psd_sqrt import psd_power


def kernel_alignment(k: Tensor, y: Tensor, *, centre: Literal["both", "rows", "none"] = "both") -> Tensor:
    """How much of a kernel points along the labels: ⟨K, yyᵀ⟩ / (‖K‖ ‖yyᵀ‖).

    Args:
        k: `[n, n]`, symmetric.
        y: labels `[n]` or `[n, c]`.
        centre: "both": labels, rows and columns of K have mean 0 (centred kernel alignment); "rows": labels, and K minus the
            mean over its rows, one side only, as in the authors' code; "none": as given.

    Returns:
        Scalar, -1 to 1; at least 0 for a kernel without negative eigenvalues, 1 for K ∝ yyᵀ.

    Raises:
        BadSetting: another `centre`. BadData: shapes that do not belong together.
    """
    if centre not in ("both", "rows", "none"):
        raise BadSetting(f"centre={centre!r} must be 'both', 'rows' or 'none'")
    if k.ndim != 2 or k.shape[0] != k.shape[1] or len(y) != len(k):
        raise BadData(f"a kernel is [n, n] with n labels; these are {list(k.shape)} and {list(y.shape)}")
    y = y.reshape(len(y), -1).to(k)
    if centre != "none":
        y = y - y.mean(0)
        k = k - k.mean(0)
    if centre == "both":
        k = k - k.mean(1, keepdim=True)
    return (y * (k @ y)).sum() / (k.norm() * (y.T @ y).norm())


def kernel_similarity(k: Tensor, other: Tensor) -> Tensor:
    """How alike two kernels on the same samples are but for their scale: the cosine of both, rows and columns centred (CKA).

    Args:
        k, other: `[n, n]`, symmetric.

    Returns:
        Scalar, -1 to 1; at least 0 for kernels without negative eigenvalues.

    Raises:
        BadData: shapes that do not belong together.
    """
    if k.ndim != 2 or k.shape[0] != k.shape[1] or other.shape != k.shape:
        raise BadData(f"two kernels on the same samples are both [n, n], not {list(k.shape)} and {list(other.shape)}")
    a, b = (t - t.mean(0) - t.mean(1, keepdim=True) + t.mean() for t in (k, other.to(k)))
    return (a * b).sum() / (a.norm() * b.norm())


def kernel_velocity(k: Tensor, k0: Tensor) -> Tensor:
    """How far a kernel has moved from `k0`, of the same shape, relative to its size: 0 in lazy training, 1 and more in rich."""
    return (k - k0).norm() / k0.norm()


def kernel_regression(k_train: Tensor, y: Tensor, k_test: Tensor, *, ridge: float = 0.0) -> Tensor:
    """What regression with a fixed kernel predicts: where a linearised network that starts at 0 ends.

    Args:
        k_train: `[n, n]` between training samples, positive semi-definite.
        y: their labels, `[n]` or `[n, c]`.
        k_test: `[m, n]` between test and training samples.
        ridge: λ, at least 0; at 0 directions that the kernel lacks are left out (the least-norm solution).

    Returns:
        Predictions, `[m]` or `[m, c]`.

    Raises:
        BadSetting: a ridge below 0. BadData: shapes that do not belong together.
    """
    if ridge < 0:
        raise BadSetting(f"ridge={ridge:g} must be at least 0")
    n = len(y)
    if k_train.shape != (n, n) or k_test.shape[1:] != (n,):
        raise BadData(f"kernels are [{n}, {n}] and [m, {n}] for {n} labels, not {list(k_train.shape)} and {list(k_test.shape)}")
    inverse = psd_power(k_train + ridge * torch.eye(n, dtype=k_train.dtype, device=k_train.device), power=-1.0)
    return k_test @ (inverse @ y.to(k_train))
