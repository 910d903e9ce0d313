from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.losses import attention_entropy, attention_mass

VECTORS = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "mto.npz").items()}


def weights(shape=(2, 3, 4, 5), seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_reference_vectors():
    a, hidden = VECTORS["attn_recalibrated"], VECTORS["mask"]
    assert attention_entropy(a, rows=~hidden, normalize=True).item() == pytest.approx(VECTORS["loss_sparsity"].item(), abs=1e-9)
    assert attention_mass(a, hidden, rows=~hidden).item() == pytest.approx(VECTORS["loss_leak"].item(), abs=1e-9)


def test_limits():
    one_hot = torch.eye(4).expand(1, 2, 4, 4)
    assert attention_entropy(one_hot).item() == 0
    assert attention_entropy(torch.full((1, 1, 3, 8), 1 / 8), normalize=True).item() == pytest.approx(1)
    assert attention_mass(one_hot, torch.tensor([[True, False, False, True]])).item() == pytest.approx(0.5)


def test_rows_and_reductions():
    a, rows = weights(), torch.tensor([[True, False, False, True], [False, True, True, True]])
    each = attention_entropy(a, rows=rows, reduction="none")
    by_hand = torch.stack([-(t[:, r] * t[:, r].log()).sum(-1).mean() for t, r in zip(a, rows, strict=True)])
    assert torch.allclose(each, by_hand)
    everything = attention_entropy(a, rows=rows)  # all rows weigh alike: five of eight
    assert torch.allclose(everything, (2 * each[0] + 3 * each[1]) / 5)
    hidden = torch.tensor([[True, False, False, False, True]] * 2)
    assert torch.allclose(attention_mass(a, hidden), a[..., [0, 4]].sum(-1).mean())
    assert attention_mass(a, hidden, rows=torch.zeros(2, 4, dtype=torch.bool)).item() == 0
    with pytest.raises(BadSetting, match="mean or none"):
        attention_mass(a, hidden, reduction="sum")


def test_gradients_are_finite_where_a_softmax_left_zeros():
    scores = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    bias[..., 1] = -torch.inf
    attention_entropy((scores + bias).softmax(-1)).backward()
    assert scores.grad.isfinite().all()
    assert torch.autograd.gradcheck(lambda s: attention_entropy(s.softmax(-1)), scores)
