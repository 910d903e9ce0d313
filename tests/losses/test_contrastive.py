import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadData, BadSetting
from sfumato.losses import info_nce, spectral_contrastive, supervised_contrastive

V = np.load(Path(__file__).parents[1] / "vectors" / "projection-head.npz")
Z, LABELS = torch.from_numpy(V["z"]), torch.from_numpy(V["labels"])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_reference_value_and_gradient():
    z = Z.clone().requires_grad_()
    loss = supervised_contrastive(z, LABELS, temperature=float(V["temperature"]), views=int(V["n_views"]))
    torch.testing.assert_close(loss.detach(), torch.tensor(float(V["supcon"].item()), dtype=z.dtype), rtol=0, atol=1e-10)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, torch.from_numpy(V["supcon_grad"]), rtol=0, atol=1e-10)


def test_antipodes_have_a_closed_form_and_scale_with_the_temperature():
    z, labels = normal(1, 5).repeat(8, 1) * torch.tensor([1.0, -1.0] * 4)[:, None], torch.tensor([0, 1] * 4)
    for t in (0.1, 0.5, 2.0):  # 3 others of the class at 1/t, 4 of the other class at -1/t
        expected = math.log(3 + 4 * math.exp(-2 / t))
        assert float(supervised_contrastive(z, labels, temperature=t)) == pytest.approx(expected, abs=1e-12)


def test_lengths_do_not_count():
    stretched = Z * torch.linspace(0.1, 9, len(Z), dtype=Z.dtype)[:, None]
    torch.testing.assert_close(supervised_contrastive(stretched, LABELS), supervised_contrastive(Z, LABELS))


def test_a_class_of_one_is_no_anchor_but_a_negative():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    z = normal(6, 4).requires_grad_()
    loss = supervised_contrastive(z, labels)
    s = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.5
    rows = []
    for i in range(5):
        others = [j for j in range(6) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        rows.append(s[i, others].logsumexp(0) - s[i, positives].mean())
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    (grad,) = torch.autograd.grad(loss, z)
    assert grad.isfinite().all()
    assert grad[5].abs().max() > 0
    alone = supervised_contrastive(z, torch.arange(6))
    (grad,) = torch.autograd.grad(alone, z)
    assert float(alone.detach()) == float(grad.abs().max()) == 0.0


def test_views_are_more_members_of_a_class():
    both = supervised_contrastive(Z, LABELS[:6], views=2)
    torch.testing.assert_close(both, supervised_contrastive(Z, torch.cat([LABELS[:6]] * 2)))


def test_info_nce_is_cross_entropy_to_the_other_view():
    z1, z2 = normal(5, 3), normal(5, 3, seed=1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    torch.testing.assert_close(info_nce(z1, z2, temperature=0.3), expected)


def test_spectral_loss_is_unbiased_for_the_linear_population():
    """x has strengths phi, each view adds noise s: E = -2 tr(A C+) + tr(A C A C)."""
    phi, s = torch.tensor([1.5, 1.0, 0.5]).double(), torch.tensor([0.3, 0.8, 0.2]).double()
    w = normal(2, 3)
    losses = []
    for seed in range(30):
        x = phi * normal(500, 3, seed=seed)
        views = [(x + s * normal(500, 3, seed=1000 * k + seed)) @ w.T for k in (1, 2)]
        losses.append(spectral_contrastive(*views))
    a, both, own = w.T @ w, (phi**2 + s**2).diag(), (phi**2).diag()
    expected = (a @ both @ a @ both - 2 * a @ own).trace()
    found = torch.stack(losses)
    assert abs(found.mean() - expected) < 4 * found.std() / 30**0.5
    assert found.std() / 30**0.5 < 0.05 * abs(expected)


def test_gradients():
    z1, z2 = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: supervised_contrastive(z, torch.tensor([0, 0, 1, 2])), z1)
    assert torch.autograd.gradcheck(info_nce, (z1, z2))
    assert torch.autograd.gradcheck(spectral_contrastive, (z1, z2))


def test_low_temperatures_and_low_precision():
    assert supervised_contrastive(Z.float(), LABELS, temperature=1e-3).isfinite()
    exact = supervised_contrastive(Z.bfloat16().double(), LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        found = supervised_contrastive(Z.bfloat16(), LABELS), info_nce(Z[:6].float(), Z[6:].float())
        spectral = spectral_contrastive(Z[:6].float(), Z[6:].float())
    assert all(f.dtype == torch.float32 for f in (*found, spectral))
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(spectral.double(), spectral_contrastive(Z[:6], Z[6:]), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(BadSetting, match="temperature=0"):
        supervised_contrastive(Z, LABELS, temperature=0)
    with pytest.raises(BadData, match="12 rows for 12 labels and views=2"):
        supervised_contrastive(Z, LABELS, views=2)
    with pytest.raises(BadData, match="1 rows"):
        supervised_contrastive(Z[:1], LABELS[:1])
    with pytest.raises(BadData, match="at least 1"):
        info_nce(Z[:0], Z[:0])
    with pytest.raises(BadData, match=r"\(12, 6\) and \(11, 6\)"):
        spectral_contrastive(Z, Z[1:])
    with pytest.raises(BadData, match="at least 2"):
        spectral_contrastive(Z[:1], Z[:1])
