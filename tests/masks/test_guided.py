from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from sfumato.errors import BadData, BadSetting
from sfumato.masks import hard_mask, mask_from_scores, random_mask, weighted_mask

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "hpm.npz")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(n=32, length=20, seed=1):
    return torch.randn(n, length, generator=seeded(seed))


# ---- hard masks


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.75, 1.0])
def test_exact_counts_and_the_hardest_are_always_hidden(share, ratio):
    s = scores()
    hidden = hard_mask(s, ratio, share, generator=seeded())
    n = 20 - int(20 * (1 - ratio))
    assert (hidden.sum(1) == n).all()
    assert hidden[mask_from_scores(s, n_hidden=int(n * share))].all()


def test_without_a_hard_share_it_is_the_random_mask_of_the_same_draw():
    at_random = random_mask(32, (4, 5), 0.75, generator=seeded())
    for share in (0.0, 0.05):  # 0.05 of 15 tokens: none
        assert torch.equal(hard_mask(scores(), 0.75, share, generator=seeded()), at_random)


def test_all_hard_is_the_top_of_the_scores_whatever_is_drawn():
    s = scores()
    assert torch.equal(hard_mask(s, 0.75, 1.0, generator=seeded(3)), mask_from_scores(s, ratio=0.75))


def test_the_rest_is_uniform_over_what_is_left():
    """A chi-squared test of how often each of the 15 tokens that are not forced is hidden."""
    s = torch.arange(20.0).expand(4000, -1)
    hidden = hard_mask(s, 0.5, 0.5, generator=seeded())
    assert hidden[:, 15:].all()
    assert chisquare(hidden[:, :15].sum(0).numpy()).pvalue > 1e-3
    assert len(hidden.unique(dim=0)) > 2000


def test_rows_are_drawn_apart_and_draws_repeat():
    s = scores()
    a, b = hard_mask(s, 0.5, 0.3, generator=seeded(5)), hard_mask(s, 0.5, 0.3, generator=seeded(5))
    assert torch.equal(a, b)
    assert not torch.equal(a, hard_mask(s, 0.5, 0.3, generator=seeded(6)))
    same = hard_mask(s[:1].expand(32, -1), 0.5, 0.3, generator=seeded())
    assert len(same.unique(dim=0)) > 20


def test_only_the_order_counts():
    s = scores().double()
    a, b = (hard_mask(t, 0.5, 0.5, generator=seeded()) for t in (s, s.exp() * 7 - 3))
    assert torch.equal(a, b)


@pytest.mark.parametrize("epoch", VECTORS["epochs"].tolist())
def test_frequencies_of_the_official_sampler(epoch):
    """400 draws there, 2000 here, at the share of their epoch: counts, what is forced, and how often each token is hidden."""
    s, ratio = torch.from_numpy(VECTORS["loss_pred"]), float(VECTORS["mask_ratio"])
    share = 0.5 * (epoch + 1) / int(VECTORS["total_epochs"])
    draws = torch.stack([hard_mask(s, ratio, share, generator=seeded(i)) for i in range(2000)])
    (n_hidden,) = set(VECTORS[f"n_mask_e{epoch}"].astype(int).tolist())
    assert (draws.sum(-1) == n_hidden).all()
    forced = mask_from_scores(s, n_hidden=int(n_hidden * share))
    assert torch.from_numpy(VECTORS[f"hard_e{epoch}"]).bool()[forced].all()
    assert (draws.float().mean(0) - torch.from_numpy(VECTORS[f"freq_e{epoch}"])).abs().max() < 0.1


def test_refusals_of_hard_masks():
    with pytest.raises(BadSetting, match="hard_share"):
        hard_mask(scores(), 0.5, 1.5)
    with pytest.raises(BadData, match="not a number"):
        hard_mask(torch.tensor([[0.0, torch.nan]]), 0.5, 0.5)


# ---- weighted masks


def test_weighted_masks_follow_the_law_without_replacement():
    """Two of four tokens: how often each pair is drawn, against p_i p_j (1 / (1 - p_i) + 1 / (1 - p_j))."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    n = 20000
    hidden = weighted_mask(p.expand(n, -1), 0.5, generator=seeded())
    assert (hidden.sum(1) == 2).all()
    pairs = torch.combinations(torch.arange(4))
    i, j = pairs.unbind(1)
    expected = p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j]))
    found = (hidden[:, i] & hidden[:, j]).sum(0)
    assert expected.sum().item() == pytest.approx(1.0)
    assert chisquare(found.numpy(), (n * expected).numpy()).pvalue > 1e-3


def test_odds_need_no_sum_and_zeros_are_hidden_last():
    p = torch.tensor([[0.0, 5.0, 0.0, 1.0, 2.0]])
    for seed in range(20):
        assert weighted_mask(p, 0.6, generator=seeded(seed)).tolist() == [[False, True, False, True, True]]
        assert weighted_mask(p, 0.8, generator=seeded(seed))[0, [1, 3, 4]].all()
    a, b = (weighted_mask(q, 0.4, generator=seeded()) for q in (p, 1e-30 * p))
    assert torch.equal(a, b)


def test_equal_odds_are_uniform():
    hidden = weighted_mask(torch.ones(4000, 10), 0.3, generator=seeded())
    assert (hidden.sum(1) == 3).all()
    assert chisquare(hidden.sum(0).numpy()).pvalue > 1e-3


def test_the_rule_says_how_many():
    p = torch.ones(1, 7)
    assert [int(weighted_mask(p, 0.5, rule).sum()) for rule in ("hide_floor", "hide_ceil", "keep_floor")] == [3, 4, 4]


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_refusals_of_weighted_masks(bad):
    with pytest.raises(BadData, match="odds"):
        weighted_mask(torch.tensor([[1.0, bad]]), 0.5)
