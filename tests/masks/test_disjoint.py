import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadSetting
from sfumato.masks import count_hidden, disjoint_masks, grid_partition, random_mask

VECTORS = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "dmjd.npz").items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def official_noise(noise, permuted_visible, permuted_hidden, new, n_hidden):
    """Scores that make the second view's choice the official one: lists in the order of the first view's noise."""
    order = noise.argsort(1)
    n_keep = noise.shape[1] - n_hidden
    visible, hidden = order[:, :n_keep], order[:, n_keep:]
    chosen = torch.cat((visible[:, permuted_visible[:new]], hidden[:, permuted_hidden[: n_hidden - new]]), 1)
    return torch.stack((noise, torch.zeros_like(noise).scatter_(1, chosen, 1.0)))


@pytest.mark.parametrize(("kind", "grid", "unit"), [("rand", 14, 1), ("block", 14, 2)])
def test_the_official_masks_come_out(kind, grid, unit):
    noise = VECTORS["rand_noise" if kind == "rand" else "block_noise"]
    length = noise.shape[1]
    visible, hidden = VECTORS[f"{kind}_perm_visible"], VECTORS[f"{kind}_perm_masked"]
    scores = official_noise(noise, visible, hidden, int(0.4 * length), count_hidden(length, 0.6))
    masks = disjoint_masks(2, grid, 0.6, unit=unit, noise=scores)
    assert torch.equal(masks.flatten(0, 1), VECTORS[f"{kind}_mask"].bool())
    assert masks.any(0).float().mean(1).tolist() == VECTORS[f"{kind}_coverage"].tolist() == [1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.floats(0.05, 0.95), st.floats(0, 1), st.integers(1, 5), st.integers(0, 99))
def test_counts_overlap_and_coverage(rows, columns, ratio, more, views, seed):
    length, predict = rows * columns, ratio + more * (1 - ratio)
    n = count_hidden(length, ratio)
    masks = disjoint_masks(3, (rows, columns), ratio, views=views, predict=predict, generator=generator(seed))
    assert masks.shape == (views, 3, length)
    assert (masks.sum(-1) == n).all()
    covered = masks.any(0).sum(-1)
    assert (covered <= max(n, int(predict * length) + 1)).all()
    if views > 1:
        extra = int(min(predict - ratio, ratio) * length)
        assert (masks[:2].any(0).sum(-1) == n + extra).all()
        assert (masks[:2].all(0).sum(-1) == n - extra).all()
    if predict == 1 and views * ratio >= 1:
        assert (covered == length).all()


def test_two_views_cover_everything_from_one_half_on():
    for ratio in (0.5, 0.6, 0.75, 0.9, 1.0):
        assert disjoint_masks(4, 7, ratio, generator=generator()).any(0).all()


@pytest.mark.parametrize("ratio", [0.3, 0.25, 1 / 3])
def test_enough_views_cover_everything(ratio):
    masks = disjoint_masks(4, (7, 5), ratio, views=math.ceil(1 / ratio), generator=generator())
    assert masks.any(0).all()
    fewer = disjoint_masks(4, (7, 5), ratio, views=math.ceil(1 / ratio) - 1, generator=generator())
    assert not fewer.any(0).all(-1).any()


def test_where_nothing_more_is_predicted_the_views_are_alike():
    masks = disjoint_masks(3, 8, 0.6, views=3, predict=0.6, generator=generator())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_the_first_view_is_the_random_mask_and_the_others_are_as_random():
    masks = disjoint_masks(4000, 4, 0.6, views=3, generator=generator())
    assert torch.equal(masks[0], random_mask(4000, 4, 0.6, generator=generator()))
    deviation = (masks.float().mean(1) - 10 / 16).abs()
    assert deviation.max() < 4.5 * (10 / 16 * 6 / 16 / 4000) ** 0.5
    assert torch.equal(masks, disjoint_masks(4000, 4, 0.6, views=3, generator=generator()))
    repeats = (masks[0] & masks[1]).float().mean(0)  # the second view's hidden tokens that were hidden before: 4 of 16
    assert (repeats - 4 / 16).abs().max() < 4.5 * (3 / 16 / 4000) ** 0.5


def test_units_are_hidden_as_a_whole():
    masks = disjoint_masks(3, (4, 8), 0.6, unit=2, generator=generator())
    units = masks.view(6, 2, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(units.all(-1), units.any(-1))
    assert (units.all(-1).flatten(1).sum(1) == count_hidden(8, 0.6)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": 3}, "divisor"),
        ({"views": 0}, "one view"),
        ({"predict": 0.5}, "ratio <= predict <= 1"),
        ({"predict": 1.2}, "ratio <= predict <= 1"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(BadSetting, match=message):
        disjoint_masks(1, 8, 0.6, **settings)


@pytest.mark.parametrize(
    ("size", "parts", "cell"), [(64, 4, 8), ((12, 20), 3, 4), ((30, 31), 3, 8), (8, 16, 2), (5, 1, 2), (2, 4, 1)]
)
def test_a_partition_hides_every_pixel_once_in_whole_cells(size, parts, cell):
    height, width = (size, size) if isinstance(size, int) else size
    masks = grid_partition(size, parts, cell, generator=generator())
    assert masks.shape == (parts, 1, height, width)
    assert torch.equal(masks.sum(0), torch.ones(1, height, width, dtype=torch.long))
    corners = masks[:, 0, ::cell, ::cell]
    assert torch.equal(corners.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width], masks[:, 0])
    counts = corners.sum((1, 2))
    assert counts.max() - counts.min() <= 1


def test_a_partition_is_random_and_repeats_with_its_generator():
    a, b, c = (grid_partition(64, 4, 8, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(("parts", "cell", "message"), [(5, 4, "take 1 to 4"), (0, 4, "take 1 to 4"), (2, 0, "at least 1 pixel")])
def test_partitions_that_cannot_be_are_refused(parts, cell, message):
    with pytest.raises(BadSetting, match=message):
        grid_partition(8, parts, cell)
