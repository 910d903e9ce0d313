"""How far one distribution is from another, in closed form.

    KL(N(m, v) ‖ N(0, 1)) = (m² + v - 1 - ln v) / 2

Source: Kingma, Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B.

>>> import torch
>>> from sfumato.losses import gaussian_kl
>>> gaussian_kl(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), reduction="none")
tensor([0.0000, 0.5000])
"""

from __future__ import annotations

from torch import Tensor

from sfumato.errors import BadSetting


def gaussian_kl(mean: Tensor, var: Tensor, *, dim: int | tuple[int, ...] | None = None, reduction: str = "mean") -> Tensor:
    """Kullback-Leibler divergence of a Gaussian from the standard normal, in nats; of many, each number by itself.

    Args:
        mean: any shape.
        var: like `mean`, the variance, at least 0 (at 0 the divergence is infinite).
        dim: dimensions of one Gaussian with independent numbers: they are summed; None: none is.
        reduction: "mean", "sum" or "none", over what is left.

    Returns:
        A scalar, or like `mean` without `dim`; 0 only where the mean is 0 and the variance 1.

    Raises:
        BadSetting: an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise BadSetting(f"there is no reduction {reduction!r}: use mean, sum or none")
    values = (mean.square() + var - 1 - var.log()) / 2
    values = values if dim is None else values.sum(dim)
    return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()
