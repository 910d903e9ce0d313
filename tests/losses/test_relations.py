from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.losses import feature_distill, relation_kl, value_relation_kl

V = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "hybrid-distill.npz").items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b.to(a.dtype).reshape(a.shape), rtol=0, atol=1e-9)


def test_reference_values_and_gradients():
    q, v = V["q_student"].clone().requires_grad_(), V["v_student"].clone().requires_grad_()
    loss_qk = relation_kl(q, V["k_student"], V["q_teacher"], V["k_teacher"])
    loss_vv = value_relation_kl(v, V["v_teacher"])
    close(loss_qk.detach(), V["loss_qk"])
    close(loss_vv.detach(), V["loss_vv"])
    close(torch.autograd.grad(loss_qk, q)[0], V["grad_q"])
    close(torch.autograd.grad(loss_vv, v)[0], V["grad_v"])
    close(feature_distill(V["feat_student"], V["feat_teacher"]), V["loss_feature"])


def test_zero_for_the_teacher_itself_and_never_negative():
    q, k, v = normal(3, 2, 4, 7, 5)
    assert relation_kl(q, k, q, k) == 0
    assert value_relation_kl(v, v) == 0
    assert relation_kl(q, k, v, q) > 0
    assert value_relation_kl(q, v) > 0


def test_what_relations_cannot_see():
    q, k, v, q_t, k_t = normal(5, 2, 3, 6, 4)
    rotation = torch.linalg.qr(normal(4, 4, seed=1))[0]
    close(relation_kl(q @ rotation, k @ rotation, q_t, k_t), relation_kl(q, k, q_t, k_t))
    close(value_relation_kl(v @ rotation, q_t), value_relation_kl(v, q_t))
    close(relation_kl(q, k + normal(4, seed=2), q_t, k_t), relation_kl(q, k, q_t, k_t))  # a row's scores all move alike
    assert (relation_kl(q + 1, k, q_t, k_t) - relation_kl(q, k, q_t, k_t)).abs() > 1e-3


def test_the_mean_is_over_rows_not_over_entries():
    """A teacher that looks at one token and a student that looks everywhere: log n, whatever n."""
    for n in (4, 16):
        sharp = 1e3 * torch.eye(n, dtype=torch.float64)[None, None]
        assert relation_kl(0 * sharp, sharp, sharp, sharp, scale=1.0).item() == pytest.approx(np.log(n), abs=1e-9)


def test_gradients_reach_the_student_alone():
    q, k, q_t, k_t = (t.requires_grad_() for t in normal(4, 1, 2, 3, 4).unbind())
    assert torch.autograd.gradcheck(lambda q, k: relation_kl(q, k, q_t, k_t), (q, k))
    assert torch.autograd.gradcheck(lambda v: value_relation_kl(v, q_t), (k,))
    assert torch.autograd.gradcheck(lambda s: feature_distill(s, q_t), (q,))
    (relation_kl(q, k, q_t, k_t) + value_relation_kl(q, k_t) + feature_distill(q, k_t)).backward()
    assert q.grad is not None
    assert k.grad is not None
    assert q_t.grad is None
    assert k_t.grad is None


def test_heads_of_another_width_have_their_own_scale():
    q, k = normal(2, 1, 2, 5, 4)
    wide = [torch.cat((t, t), -1) * 0.5**0.25 for t in (q, k)]  # doubled scores over a root that grows by root two, taken out
    close(relation_kl(q, k, *wide), torch.zeros(()))


def test_half_precision_is_computed_in_single():
    q, k = normal(2, 1, 2, 5, 4).bfloat16().unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = relation_kl(q, k, k, q)
        features = feature_distill(q, k)
    assert loss.dtype == features.dtype == torch.float32
    close(loss, relation_kl(q.float(), k.float(), k.float(), q.float()))


def test_whitening_takes_out_the_teachers_size():
    s, t = normal(2, 3, 5, 8)
    close(feature_distill(s, 1e3 * t + 7), feature_distill(s, 1e4 * t))  # large against the eps of a layer norm
    assert feature_distill(s, 100 * t, whiten=False) > 10 * feature_distill(s, t, whiten=False)
    close(feature_distill(s, t, whiten=False, beta=1e6) * 2e6, (s - t).square().mean())
    close(feature_distill(s, t, whiten=False, beta=1e-12), (s - t).abs().mean())


def test_what_is_refused():
    with pytest.raises(BadData, match=r"relations \(1, 2, 3, 3\)"):
        relation_kl(*normal(2, 1, 2, 3, 4), *normal(2, 1, 4, 3, 4))
    with pytest.raises(BadData, match="features"):
        feature_distill(normal(2, 3), normal(2, 4))
    with pytest.raises(BadSetting, match="beta"):
        feature_distill(normal(2, 3), normal(2, 3), beta=0)
