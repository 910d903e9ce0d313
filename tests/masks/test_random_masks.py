import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadSetting
from sfumato.masks import count_hidden, mask_from_scores, random_mask

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "mae-base.npz")


def test_counts_of_the_four_rules():
    assert count_hidden(196, 0.75) == 147
    assert count_hidden(100, 0.9) == 91  # int(100 * (1 - 0.9)) is 9: the truncation is part of the rule
    assert count_hidden(49, 0.6) == 30
    assert count_hidden(49, 0.6, rule="keep_round") == 29
    assert count_hidden(49, 0.6, rule="hide_floor") == 29
    assert count_hidden(36, 0.6, rule="hide_ceil") == 22


@given(
    n=st.integers(0, 500), ratio=st.floats(0, 1), rule=st.sampled_from(["keep_floor", "keep_round", "hide_floor", "hide_ceil"])
)
def test_counts_are_within_one_of_the_share(n, ratio, rule):
    hidden = count_hidden(n, ratio, rule=rule)
    assert 0 <= hidden <= n
    assert abs(hidden - n * ratio) <= 1 + 1e-6


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 9), ratio=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_row_hides_the_same_exact_number(batch, h, w, ratio, seed):
    mask = random_mask(batch, (h, w), ratio, generator=torch.Generator().manual_seed(seed))
    assert mask.shape == (batch, h * w)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == h * w - int(h * w * (1 - ratio))).all()


def test_official_mask():
    noise = torch.from_numpy(VECTORS["noise"])
    mask = random_mask(2, 4, float(VECTORS["mask_ratio"]), noise=noise)
    assert torch.equal(mask, torch.from_numpy(VECTORS["mask"]).bool())


def test_same_generator_same_mask_and_other_seed_other_mask():
    masks = [random_mask(4, 8, 0.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_every_token_is_hidden_equally_often():
    n, ratio = 2000, 0.75
    frequency = random_mask(n, 4, ratio, generator=torch.Generator().manual_seed(0)).double().mean(0)
    assert (frequency - ratio).abs().max() < 4 * math.sqrt(ratio * (1 - ratio) / n)


def test_scores_largest_smallest_and_invariance():
    scores = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    mask = mask_from_scores(scores, n_hidden=7)
    assert scores[mask].view(6, 7).amin(1).gt(scores[~mask].view(6, 13).amax(1)).all()
    assert torch.equal(mask, mask_from_scores(-scores, n_hidden=7, largest=False))
    assert torch.equal(mask, mask_from_scores(scores.exp() * 3 + 1, n_hidden=7))
    assert torch.equal(mask, ~mask_from_scores(scores, n_hidden=13, largest=False))


def test_scores_with_a_graph_give_a_mask():
    assert mask_from_scores(torch.randn(2, 8, requires_grad=True), ratio=0.5).sum() == 8


WRONG = [{}, {"ratio": 0.5, "n_hidden": 2}, {"ratio": 1.5}, {"n_hidden": 9}, {"ratio": 0.5, "rule": "x"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_refusals(wrong):
    with pytest.raises(BadSetting):
        mask_from_scores(torch.rand(2, 8), **wrong)
