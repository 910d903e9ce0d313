from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData
from sfumato.metrics import closest_correlation, correlation, distinct

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "harmonic-bases.npz").items()}


def _g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_of_the_reference():
    assert torch.allclose(correlation(V["set1"], V["set2"]), V["corr"], rtol=0, atol=1e-9)
    assert torch.allclose(correlation(V["set1"], V["set2"], centre=False), V["cos"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_closest_of_a_set(chunk):
    a, b = torch.rand(5, 2, 6, 6, generator=_g()), torch.rand(7, 2, 6, 6, generator=_g(1))
    assert torch.allclose(closest_correlation(a, b, chunk=chunk), correlation(a, b).amax(1), atol=1e-6)
    patches = closest_correlation(a, b, patch=3, chunk=chunk)
    assert patches.shape == (5, 4)
    corner = correlation(a[:, :, 3:, :3], b[:, :, 3:, :3]).amax(1)
    assert torch.allclose(patches[:, 2], corner, atol=1e-6)
    quilt = torch.cat([b[:1, :, :3], b[4:5, :, 3:]], 2)  # of patches of the set, though no picture of it
    assert closest_correlation(quilt, b).item() < 0.99
    assert torch.allclose(closest_correlation(quilt, b, patch=3), torch.ones(1, 4), atol=1e-6)


def test_blank_pictures_correlate_with_nothing():
    x = torch.cat([torch.full((1, 1, 4, 4), 0.5), torch.rand(1, 1, 4, 4)])
    assert correlation(x, x)[0].tolist() == [0, 0]


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_doubles_are_told_from_what_came_first(chunk):
    x = torch.rand(4, 1, 30, 30, generator=_g())
    x = torch.cat([x, 1 - 0.5 * x[1:2], x[3:] + 0.01 * torch.rand(1, 1, 30, 30, generator=_g(1))])
    assert distinct(x, chunk=chunk).tolist() == [True] * 4 + [False] * 2
    assert distinct(x, size=40, chunk=chunk).tolist() == [True] * 4 + [False] * 2
    assert distinct(x, threshold=1.0).all()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(BadData, match="one size"):
        correlation(torch.rand(2, 1, 3, 3), torch.rand(2, 1, 4, 4))
    with pytest.raises(BadData, match="at least one"):
        closest_correlation(torch.rand(2, 1, 3, 3), torch.rand(0, 1, 3, 3))
    with pytest.raises(BadData, match="do not fit"):
        closest_correlation(torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3), patch=4)
