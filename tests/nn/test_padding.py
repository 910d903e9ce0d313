import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sfumato.errors import BadSetting
from sfumato.nn import pad_to_multiple, reflect_pad, tiled_apply


@settings(deadline=None)
@given(h=st.integers(1, 7), w=st.integers(1, 7), pad=st.tuples(*[st.integers(0, 20)] * 4))
def test_reflection_is_that_of_numpy_for_any_size(h, w, pad):
    x = torch.rand(2, 1, h, w)
    left, right, top, bottom = pad
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (top, bottom), (left, right)), mode="reflect")
    assert torch.equal(reflect_pad(x, pad), torch.from_numpy(expected))


@settings(deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), m=st.integers(1, 16))
def test_padding_to_a_multiple_is_undone_by_its_crop(h, w, m):
    x = torch.rand(1, 2, h, w)
    padded, crop = pad_to_multiple(x, m)
    assert [side % m for side in padded.shape[-2:]] == [0, 0]
    assert max(padded.shape[-2] - h, padded.shape[-1] - w) < m
    assert torch.equal(padded[crop], x)


def test_other_modes_of_padding():
    assert pad_to_multiple(torch.ones(1, 1, 3, 3), 4, mode="constant")[0].sum() == 9


def _blur(x):
    """Looks 3 pixels up and down, 4 to the sides, and knows the border by its zero padding."""
    return F.conv2d(
        x,
        torch.linspace(-1, 2, 63, dtype=x.dtype).view(1, 1, 7, 9).expand(x.shape[1], 1, 7, 9),
        padding=(3, 4),
        groups=x.shape[1],
    )


@given(h=st.integers(1, 60), w=st.integers(1, 60), tile=st.integers(9, 40), extra=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_tiles_equal_the_whole_when_the_overlap_covers_what_the_network_sees(h, w, tile, extra):
    x = torch.rand(2, 2, h, w, dtype=torch.float64)
    overlap = min(4 + extra, (tile - 1) // 2)
    sides = []

    def net(t):
        sides.extend(t.shape[-2:])
        return _blur(t)

    assert torch.allclose(tiled_apply(net, x, tile=tile, overlap=overlap), _blur(x), atol=1e-12)
    assert max(sides) <= tile


def test_too_little_overlap_shows():
    x = torch.rand(1, 1, 40, 40, dtype=torch.float64)
    assert not torch.allclose(tiled_apply(_blur, x, tile=16, overlap=2), _blur(x), atol=1e-3)


def test_tiles_of_a_network_that_enlarges():
    x = torch.rand(1, 1, 30, 50, dtype=torch.float64)

    def net(t):
        return F.interpolate(_blur(t), scale_factor=3, mode="nearest")

    assert torch.allclose(tiled_apply(net, x, tile=20, overlap=4, scale=3), net(x), atol=1e-12)


def test_tiles_of_a_strided_network_see_the_same_phases():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2)
    ).double()

    def net(t):
        padded, crop = pad_to_multiple(t, 2)
        return layers(padded)[crop]

    x = torch.rand(1, 1, 61, 75, dtype=torch.float64)
    assert torch.allclose(tiled_apply(net, x, tile=24, overlap=6), net(x), atol=1e-12)


def test_gradients_flow_through_tiles():
    x = torch.rand(1, 1, 30, 30, dtype=torch.float64, requires_grad=True)
    (tiled,) = torch.autograd.grad(tiled_apply(_blur, x, tile=16, overlap=4).square().sum(), x)
    (whole,) = torch.autograd.grad(_blur(x).square().sum(), x)
    assert torch.allclose(tiled, whole)


def test_an_overlap_that_eats_the_tile_is_refused():
    with pytest.raises(BadSetting, match="overlap=8"):
        tiled_apply(_blur, torch.rand(1, 1, 4, 4), tile=16, overlap=8)
