from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadData
from sfumato.masks import as_views, random_mask, take_tokens, to_ids, upsample_mask

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "mae-base.npz")


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 4), side=st.integers(1, 7), ratio=st.floats(0, 1), seed=st.integers(0, 99))
def test_ids_are_the_stable_argsort_of_the_mask(batch, side, ratio, seed):
    mask = random_mask(batch, side, ratio, generator=torch.Generator().manual_seed(seed))
    keep, restore = to_ids(mask)
    order = mask.long().argsort(dim=1, stable=True)
    assert torch.equal(keep, order[:, : keep.shape[1]])
    assert torch.equal(restore, order.argsort(dim=1))
    assert keep.shape[1] == (~mask[0]).sum()
    for told, found in zip(to_ids(mask, n_keep=keep.shape[1]), (keep, restore), strict=True):
        assert torch.equal(told, found)


def test_round_trip_puts_tokens_back():
    mask = random_mask(3, 5, 0.6, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(3, 25, 4)
    keep, restore = to_ids(mask)
    visible = take_tokens(tokens, keep)
    full = take_tokens(torch.cat((visible, torch.zeros(3, 15, 4)), 1), restore)
    assert torch.equal(full, tokens * ~mask[..., None])
    assert torch.equal(full[~mask], visible.flatten(0, 1))


def test_official_kept_tokens_up_to_their_order():
    keep, _ = to_ids(torch.from_numpy(VECTORS["mask"]).bool())
    ours = take_tokens(torch.from_numpy(VECTORS["tokens"]), keep)
    theirs = torch.from_numpy(VECTORS["tokens_kept"])
    ids = torch.from_numpy(VECTORS["ids_restore"]).argsort(1)[:, : theirs.shape[1]]  # theirs come in the order of the noise
    assert torch.equal(ours, take_tokens(theirs, ids.argsort(1)))


def test_take_tokens_is_gather_forwards_and_backwards():
    tokens = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 5], [3, 3], [1, 2]])
    expected = tokens.gather(1, ids[..., None].expand(-1, -1, 5))
    assert torch.equal(take_tokens(tokens, ids), expected)
    assert torch.autograd.gradcheck(lambda t: take_tokens(t, ids), tokens)
    assert torch.autograd.gradgradcheck(lambda t: take_tokens(t, ids), tokens)


def test_nothing_and_everything_hidden():
    keep, restore = to_ids(torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(keep, torch.arange(4).expand(2, 4))
    assert torch.equal(keep, restore)
    keep, restore = to_ids(torch.ones(2, 4, dtype=torch.bool))
    assert keep.shape == (2, 0)
    assert torch.equal(restore, torch.arange(4).expand(2, 4))


def test_uneven_rows_are_refused():
    with pytest.raises(BadData, match="unlike"):
        to_ids(torch.tensor([[True, False], [True, True]]))


def test_upsampled_mask_is_the_kronecker_product():
    mask = random_mask(2, (2, 3), 0.5, generator=torch.Generator().manual_seed(0))
    pixels = upsample_mask(mask, (2, 3), 4)
    assert pixels.shape == (2, 1, 8, 12)
    assert pixels.dtype == torch.bool
    for b in range(2):
        assert torch.equal(pixels[b, 0].long(), torch.kron(mask[b].view(2, 3).long(), torch.ones(4, 4, dtype=torch.long)))


def test_views_stand_one_after_the_other():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    views = as_views(x, torch.zeros(6, 5, dtype=torch.bool))
    assert torch.equal(views, x.repeat(3, 1, 1, 1))
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert as_views(x, torch.zeros(2, 5)) is x
