import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadData, BadSetting
from sfumato.losses import pairwise_ranking, ranking

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "hpm.npz").items()}


def drawn(rows=3, n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, n, generator=g, dtype=torch.float64) for _ in range(2))


def test_the_official_loss_and_gradient():
    """There 1e-6 stands inside each logarithm, which takes a little from the steepest slopes; row 0 holds a tie."""
    pred = VECTORS["bce_pred"].clone().requires_grad_(True)
    loss = pairwise_ranking(pred, VECTORS["bce_target"])
    assert loss.item() == pytest.approx(VECTORS["relative_loss"].item(), rel=2e-5)
    (grad,) = torch.autograd.grad(loss, pred)
    assert torch.allclose(grad, VECTORS["relative_grad"], atol=2e-6, rtol=0)


def test_the_definition_by_loops():
    pred, target = drawn()
    target[0, 1] = target[0, 4]
    costs = [
        -F.logsigmoid(pred[b, i] - pred[b, j]).item()
        for b in range(3) for i in range(7) for j in range(7) if target[b, i] > target[b, j]
    ]  # fmt: skip
    assert len(costs) == 3 * 21 - 1
    assert pairwise_ranking(pred, target).item() == pytest.approx(sum(costs) / len(costs), abs=1e-12)


def test_only_differences_and_the_order_count():
    pred, target = drawn()
    loss = pairwise_ranking(pred, target)
    assert torch.allclose(loss, pairwise_ranking(pred + 5, target))
    assert torch.equal(loss, pairwise_ranking(pred, (3 * target).exp() - 8))
    assert not torch.allclose(loss, pairwise_ranking(pred, -target))


def test_limits():
    _, target = drawn()
    rank = target.argsort(1).argsort(1).double()
    assert pairwise_ranking(200 * rank, target).item() < 1e-12
    assert pairwise_ranking(torch.zeros_like(target), target).item() == pytest.approx(math.log(2), abs=1e-15)
    assert pairwise_ranking(-10 * rank, target) > 10


def test_gradients():
    pred, target = drawn()
    pred.requires_grad_(True)
    target.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: pairwise_ranking(s, target), pred)
    assert torch.autograd.gradgradcheck(lambda s: pairwise_ranking(s, target), pred)
    grad, to_target = torch.autograd.grad(pairwise_ranking(pred, target), (pred, target), allow_unused=True)
    assert grad.sum(1).abs().max() < 1e-15
    assert to_target is None


def test_ties_make_no_pair():
    pred = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    target = torch.tensor([[3.0, 3.0], [1.0, 0.0]])
    loss = pairwise_ranking(pred, target)
    assert loss.item() == pytest.approx(math.log(1 + math.e))
    assert (torch.autograd.grad(loss, pred)[0][0] == 0).all()
    nothing = pairwise_ranking(pred, torch.zeros(2, 2))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, pred)[0] == 0).all()
    assert pairwise_ranking(torch.zeros(2, 0), torch.zeros(2, 0)) == 0


def test_without_reduction_a_number_a_row():
    pred, target = drawn()
    each = pairwise_ranking(pred, target, reduction="none")
    assert torch.allclose(each, torch.stack([pairwise_ranking(p[None], t[None]) for p, t in zip(pred, target, strict=True)]))
    assert torch.allclose(each.mean(), pairwise_ranking(pred, target))  # equally many pairs a row


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_long_rows_in_blocks_give_the_same(monkeypatch, reduction):
    pred, target = drawn(rows=2, n=50)
    pred.requires_grad_(True)
    whole = pairwise_ranking(pred, target, reduction=reduction)
    grad = torch.autograd.grad(whole.sum(), pred)[0]
    monkeypatch.setattr(ranking, "WHOLE", 20)  # blocks of 8 rows
    blocks = pairwise_ranking(pred, target, reduction=reduction)
    assert torch.allclose(whole, blocks, atol=1e-14)
    assert torch.allclose(grad, torch.autograd.grad(blocks.sum(), pred)[0], atol=1e-14)


def test_half_precision_is_computed_in_single():
    pred, target = drawn()
    loss = pairwise_ranking(pred.bfloat16(), target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pairwise_ranking(pred.bfloat16().float(), target))
    assert pairwise_ranking(pred, target).dtype == torch.float64


def test_refusals():
    with pytest.raises(BadSetting, match="reduction"):
        pairwise_ranking(torch.zeros(1, 2), torch.zeros(1, 2), reduction="sum")
    with pytest.raises(BadData, match=r"\(1, 2\) and targets \(2, 2\)"):
        pairwise_ranking(torch.zeros(1, 2), torch.zeros(2, 2))
