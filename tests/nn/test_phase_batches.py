from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadSetting
from sfumato.nn import batch_to_space, random_subsample_index, space_to_batch, subsample

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "cbsn.npz").items()}


@pytest.mark.parametrize("s", [2, 5])
def test_phases_stand_where_the_reference_has_them(s):
    assert torch.equal(space_to_batch(VECTORS["x"], s), VECTORS[f"s2b_{s}"])


def test_phase_index_order():
    x = torch.rand(3, 2, 6, 9)
    y = space_to_batch(x, 3)
    for i, j, b in [(0, 0, 0), (0, 2, 1), (2, 1, 2)]:
        assert torch.equal(y[(i * 3 + j) * 3 + b], x[b, :, i::3, j::3])


@settings(deadline=None)
@given(s=st.integers(1, 5), b=st.integers(1, 3), c=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4))
def test_batch_to_space_undoes_space_to_batch(s, b, c, h, w):
    x = torch.rand(b, c, s * h, s * w)
    assert torch.equal(batch_to_space(space_to_batch(x, s), s), x)


def test_subsample_matches_the_reference():
    assert torch.equal(subsample(VECTORS["x"], VECTORS["sub_index"], 2), VECTORS["subimage"])


def test_subsample_of_constant_index_is_a_phase_in_every_channel():
    x = torch.rand(2, 3, 8, 6)
    for m in range(4):
        index = torch.full((2, 4, 3), m)
        assert torch.equal(subsample(x, index, 2), x[..., m // 2 :: 2, m % 2 :: 2])


def test_subsample_takes_one_pixel_for_all_channels():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(1, 3, 1, 1) + torch.tensor([0.0, 100.0, 200.0]).view(3, 1, 1)
    y = subsample(x, random_subsample_index(1, (8, 8), 2), 2)
    assert torch.equal(y[:, 1], y[:, 0] + 100)
    assert torch.equal(y[:, 2], y[:, 0] + 200)


def test_subsample_gradient():
    index = random_subsample_index(2, (4, 6), 2)
    x = torch.rand(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: subsample(t, index, 2), x)


def test_index_is_uniform_and_repeatable():
    draws = [random_subsample_index(8, (64, 64), 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (8, 32, 32)
    shares = draws[0].flatten().bincount(minlength=4) / draws[0].numel()
    assert torch.allclose(shares, torch.full((4,), 0.25), atol=0.02)  # 4 standard deviations


@pytest.mark.parametrize(
    "call",
    [
        lambda: space_to_batch(torch.zeros(1, 1, 5, 4), 2),
        lambda: batch_to_space(torch.zeros(5, 1, 2, 2), 2),
        lambda: random_subsample_index(1, (4, 5), 2),
        lambda: subsample(torch.zeros(1, 1, 5, 4), torch.zeros(1, 2, 2).long(), 2),
    ],
)
def test_sides_that_do_not_divide_are_refused(call):
    with pytest.raises(BadSetting):
        call()
