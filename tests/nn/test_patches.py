from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BadData, BadSetting
from sfumato.nn import fold_patches, patchify, unfold_patches, unpatchify

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "mae-base.npz")


@settings(max_examples=30, deadline=None)
@given(
    b=st.integers(1, 3),
    c=st.integers(1, 4),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    p=st.integers(1, 4),
    order=st.sampled_from(["hwc", "chw"]),
)
def test_inverse_to_the_bit(b, c, h, w, p, order):
    x = torch.rand(b, c, h * p, w * p)
    t = patchify(x, p, order=order)
    assert t.shape == (b, h * w, p * p * c)
    assert torch.equal(unpatchify(t, p, (h, w), c, order=order), x)


def test_a_pixel_lands_where_the_definition_says():
    b, c, h, w, p = 2, 3, 2, 5, 4
    i, j, a, d, ch = 1, 3, 2, 1, 2
    x = torch.zeros(b, c, h * p, w * p)
    x[1, ch, i * p + a, j * p + d] = 1
    assert patchify(x, p).nonzero().tolist() == [[1, i * w + j, (a * p + d) * c + ch]]
    assert patchify(x, p, order="chw").nonzero().tolist() == [[1, i * w + j, (ch * p + a) * p + d]]


def test_official_patches():
    patches = patchify(torch.from_numpy(VECTORS["images"]), int(VECTORS["patch"]))
    assert torch.allclose(patches.float(), torch.from_numpy(VECTORS["patches"]), atol=1e-6)


def test_channel_first_rows_are_a_convolution():
    x, conv = torch.rand(2, 3, 8, 12), torch.nn.Conv2d(3, 5, 4, 4)
    rows = torch.nn.functional.linear(patchify(x, 4, order="chw"), conv.weight.flatten(1), conv.bias)
    assert torch.allclose(rows, conv(x).flatten(2).transpose(1, 2), atol=1e-5)


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(BadData, match="multiples"):
        patchify(torch.rand(1, 3, 9, 8), 4)
    with pytest.raises(BadData, match="grid"):
        unpatchify(torch.rand(1, 6, 48), 4, (2, 2), 3)
    with pytest.raises(BadSetting, match="order"):
        patchify(torch.rand(1, 3, 8, 8), 4, order="cwh")


@settings(max_examples=30, deadline=None)
@given(h=st.integers(3, 9), w=st.integers(3, 9), k=st.sampled_from([1, 2, 3]), pad=st.booleans())
def test_overlapping_windows_fold_back(h, w, k, pad):
    if pad and k == 2:
        return
    x = torch.rand(2, 3, h, w, dtype=torch.float64)
    windows = unfold_patches(x, k, pad=pad)
    assert torch.allclose(fold_patches(windows, (h, w)), x, atol=1e-14)
    line = torch.linspace(0.2, 1, k, dtype=torch.float64)
    assert torch.allclose(fold_patches(windows, (h, w), window=line[:, None] * line), x, atol=1e-14)


def test_windows_are_those_of_torch_unfold():
    x = torch.rand(2, 3, 6, 7)
    rows = torch.nn.functional.unfold(x, 3).transpose(1, 2)
    assert torch.equal(unfold_patches(x, 3).flatten(2), rows)


def test_window_weights_average_disagreeing_patches():
    p = torch.zeros(1, 2, 1, 1, 2)[..., :1]  # two 1 x 1 windows
    p[0, 1] = 1
    assert fold_patches(p, (1, 2)).tolist() == [[[[0, 1]]]]
    windows = torch.stack((torch.zeros(1, 2, 2), torch.ones(1, 2, 2)))[None]  # they share the middle column of 2 x 3
    assert fold_patches(windows, (2, 3)).tolist() == [[[[0, 0.5, 1]] * 2]]
    weighted = fold_patches(windows, (2, 3), window=torch.tensor([[3.0, 1.0], [3.0, 1.0]]))
    assert weighted[0, 0, 0].tolist() == [0, 0.75, 1]


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(BadData):
        unfold_patches(torch.rand(1, 1, 4, 4), 5)
    with pytest.raises(BadSetting):
        unfold_patches(torch.rand(1, 1, 4, 4), 2, pad=True)
    with pytest.raises(BadData):
        fold_patches(torch.rand(1, 7, 1, 2, 2), (4, 4))
