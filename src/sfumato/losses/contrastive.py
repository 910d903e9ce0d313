"""Contrastive losses: pull together what belongs together, push the rest apart.

    supervised:  ℓ_i = −mean_{p ∈ P(i)} s_ip + log Σ_{a ≠ i} exp(s_ia),   s_ij = cos(z_i, z_j) / τ,   P(i): others of i's class
    InfoNCE:     the same where P(i) is the other view of sample i
    spectral:    −2 E⟨z, z⁺⟩ + E⟨z, z′⟩²     (z, z⁺: two views of a sample; z, z′: of two samples; no temperature, no norm)

Sources: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2; Chen et al., "A Simple Framework for
Contrastive Learning" (SimCLR), ICML 2020, section 2.1; HaoChen et al., "Provable Guarantees for Self-Supervised Deep Learning
with Spectral Contrastive Loss", NeurIPS 2021, section 3.2.

>>> import torch
>>> from sfumato.losses import info_nce, spectral_contrastive, supervised_contrastive
>>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
>>> supervised_contrastive(z, torch.tensor([0, 0, 1, 1]), temperature=1.0)  # log(1 + 2 exp(-2))
tensor(0.2395)
>>> info_nce(z[::2], z[1::2], temperature=1.0)
tensor(0.2395)
>>> spectral_contrastive(z[::2], z[1::2])  # -2 + 1
tensor(-1.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.losses.masked import masked_mean


def supervised_contrastive(z: Tensor, labels: Tensor, *, temperature: float = 0.5, views: int = 1) -> Tensor:
    """Supervised contrastive loss: the mean over the anchors whose class has another member (0 where there is none).

    Args:
        z: `[V * N, D]`, any length of rows; the views of all samples one after the other: first view of all, second view of all.
        labels: `[N]` class numbers.
        temperature: τ, positive.
        views: V, how many views of each sample there are.

    Returns:
        A scalar, at least float32 (under autocast, too).

    Raises:
        BadSetting: a temperature that is not positive.
        BadData: fewer than two rows, or rows that are not `views` times the labels.
    """
    if not temperature > 0:
        raise BadSetting(f"temperature={temperature}: it must be positive")
    if len(z) != views * len(labels) or len(z) < 2:
        raise BadData(f"{len(z)} rows for {len(labels)} labels and views={views}: give views x labels rows, 2 or more")
    labels = labels.repeat(views)
    positive = labels[:, None] == labels
    positive.fill_diagonal_(False)
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(_at_least_float32(z), dim=1)
        similar = z @ z.T / temperature
        count = positive.sum(1)
        attraction = torch.einsum("ij,ij->i", similar, positive.to(z.dtype)) / count.clamp(min=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        return masked_mean(similar.masked_fill(itself, -torch.inf).logsumexp(1) - attraction, count > 0)


def info_nce(z1: Tensor, z2: Tensor, *, temperature: float = 0.5) -> Tensor:
    """InfoNCE over all 2N views, as in SimCLR (NT-Xent): each must find its other view among the 2N − 1 others.

    Args:
        z1: `[N, D]`, first view of each sample, any length of rows.
        z2: `[N, D]`, second view.
        temperature: τ, positive.

    Returns:
        A scalar, at least float32 (under autocast, too).

    Raises:
        BadSetting: a temperature that is not positive.
        BadData: views of different shapes, or no sample.
    """
    _same_shape(z1, z2, least=1)
    return supervised_contrastive(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device), temperature=temperature, views=2)


def spectral_contrastive(z1: Tensor, z2: Tensor) -> Tensor:
    """Spectral contrastive loss: unbiased for the population loss, as only pairs of different samples are negatives.

    Args:
        z1: `[N, D]`, first view of each sample, N at least 2; rows are not normalised.
        z2: `[N, D]`, second view.

    Returns:
        A scalar, at least float32 (under autocast, too); it may be negative.

    Raises:
        BadData: views of different shapes, or fewer than two samples.
    """
    _same_shape(z1, z2, least=2)
    with torch.autocast(z1.device.type, enabled=False):
        products = _at_least_float32(z1) @ _at_least_float32(z2).T
        own = products.diagonal()
        n = len(products)
        return (products.square().sum() - own.square().sum()) / (n * (n - 1)) - 2 * own.mean()


def _same_shape(z1: Tensor, z2: Tensor, least: int) -> None:
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < least:
        raise BadData(f"views of shapes {tuple(z1.shape)} and {tuple(z2.shape)}: give one shape [N, D], N at least {least}")


def _at_least_float32(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
