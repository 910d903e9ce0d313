"""Losses of distillation between transformers: which tokens attend to which, and what the tokens hold.

    relation:  R = softmax(q kᵀ / √d) of every head;   loss = mean over samples, heads and rows of KL(R_teacher ‖ R_student)
    values:    the same with R = softmax(v vᵀ / √d)
    features:  smooth L1 (quadratic below β) between the student's features and the teacher's, each of these first brought to
               mean 0 and variance 1

The teacher gets no gradient. A relation of fewer tokens is taken by gathering q, k and v first: cut out of a finished softmax,
rows no longer sum to 1.

Sources: Wang et al., "MiniLM", NeurIPS 2020 (attention and value relations); Ren et al., "TinyMIM", CVPR 2023 (for masked
autoencoders); Wei et al., "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation", 2022.

>>> import torch
>>> from sfumato.losses import feature_distill, relation_kl
>>> q, k = torch.randn(2, 1, 4, 16, 8).unbind()  # 4 heads, 16 tokens
>>> relation_kl(q, k, q, k).item()
0.0
>>> feature_distill(torch.zeros(1, 16, 8), torch.randn(1, 16, 8), beta=1e9).item() < 1e-8  # half a square over beta
True
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadData, BadSetting


def relation_kl(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *, scale: float | None = None) -> Tensor:
    """How far the student's attention is from the teacher's: KL(teacher ‖ student), a mean over samples, heads and queries.

    Args:
        q_s: student's queries `[..., n, d]`, such as `[B, heads, n, d]`.
        k_s: student's keys `[..., m, d]`.
        q_t: teacher's queries `[..., n, d']`; not given a gradient.
        k_t: teacher's keys `[..., m, d']`.
        scale: of the scores q kᵀ; None: 1 / √d, of each its own.

    Returns:
        A scalar, not negative, at least float32 (under autocast, too).

    Raises:
        BadData: other heads or tokens than the teacher's.
    """
    with torch.autocast(q_s.device.type, enabled=False):
        student, teacher = _log_relation(q_s, k_s, scale), _log_relation(q_t.detach(), k_t.detach(), scale)
        if student.shape != teacher.shape:
            raise BadData(f"relations {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher differ")
        return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()


def value_relation_kl(v_s: Tensor, v_t: Tensor) -> Tensor:
    """The same for how tokens' values resemble each other: softmax(v vᵀ / √d).

    Args:
        v_s: student's values `[..., n, d]`.
        v_t: teacher's values `[..., n, d']`; not given a gradient.

    Returns:
        A scalar, as `relation_kl`.

    Raises:
        BadData: other heads or tokens than the teacher's.
    """
    return relation_kl(v_s, v_s, v_t, v_t)


def feature_distill(student: Tensor, teacher: Tensor, *, whiten: bool = True, beta: float = 2.0) -> Tensor:
    """Smooth L1 distance of features.

    Args:
        student: `[..., D]`, already as wide as the teacher's.
        teacher: `[..., D]`; not given a gradient.
        whiten: bring every feature vector of the teacher to mean 0 and variance 1 (layer norm without weights, eps 1e-5), so
            that teachers are learned alike whatever the size of their features.
        beta: where the loss turns from quadratic to linear; positive.

    Returns:
        A scalar, the mean over all numbers, at least float32 (under autocast, too).

    Raises:
        BadData: another shape than the teacher's.
        BadSetting: a beta that is not positive.
    """
    if student.shape != teacher.shape:
        raise BadData(f"features {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher differ")
    if not beta > 0:
        raise BadSetting(f"beta={beta}: it must be positive")
    with torch.autocast(student.device.type, enabled=False):
        target = _at_least_float32(teacher.detach())
        if whiten:
            target = F.layer_norm(target, target.shape[-1:])
        return F.smooth_l1_loss(_at_least_float32(student), target, beta=beta)


def _log_relation(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (_at_least_float32(q) @ _at_least_float32(k).mT * scale).log_softmax(-1)


def _at_least_float32(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
