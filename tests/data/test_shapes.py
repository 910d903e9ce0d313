from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from sfumato.data import c_alpha_images, discs, find_shapes, simple_shapes
from sfumato.data.shapes import smooth_noise
from sfumato.errors import BadData, BadSetting

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "harmonic-bases.npz").items()}


def _g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_shapes_stand_in_their_columns_once():
    images, present = simple_shapes(300, generator=_g())
    assert images.shape == (300, 1, 64, 64)
    assert set(images.unique().tolist()) == {0, 1}
    columns = images[:, 0, :63, :63].unflatten(2, (3, 21))
    pixels = columns.sum((1, 3))
    assert torch.equal(pixels > 0, present)
    assert images[..., 63:].sum() == images[..., 63:, :].sum() == 0
    for column, (low, high) in enumerate([(63, 67), (64, 64), (68, 72)]):
        drawn = pixels[:, column][present[:, column]]
        assert low <= drawn.min() == drawn.max() <= high
    for image, there in zip(images[:40, 0], present):
        assert label(image)[1] == there.sum()


def test_shapes_come_as_often_as_said_and_anywhere():
    images, present = simple_shapes(4000, p=0.3, generator=_g())
    shares = present.float().mean(0)
    assert torch.allclose(shares, torch.tensor(0.3 / (1 - 0.7**3)), atol=0.03)  # given that there is one
    squares = images[present[:, 1], 0, :63, 21:42]
    seen = squares.mean(0)
    assert (seen > 0).all()  # every place of the column
    corner = squares.flatten(1).argmax(1)
    rows, columns = corner // 21, corner % 21
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 55, 0, 13)
    assert rows.float().mean().item() == pytest.approx(27.5, abs=1.5)
    assert torch.equal(images[:5], simple_shapes(4000, p=0.3, generator=_g())[0][:5])
    assert simple_shapes(3, p=1.0)[1].all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(BadSetting, match="larger pictures"):
        simple_shapes(1, 24)
    with pytest.raises(BadSetting, match="p=0"):
        simple_shapes(1, p=0)


def test_discs_have_five_numbers():
    u = torch.tensor([[0.5, 0.5, 0.5, 0.9, 0.2], [0.0, 0.0, 1.0, 0.1, 0.6]], dtype=torch.float64)
    first, second = discs(2, 40, u=u)[:, 0]
    assert first[20, 20] == 0.9
    assert first[0, 0] == 0.2
    share = (first - 0.2).mean() / 0.7
    assert share.item() == pytest.approx(np.pi * 0.2**2, rel=0.01)  # radius: a fifth of the side
    assert second[:8, -8:].min() == pytest.approx(0.1)
    assert second[20:].unique() == pytest.approx(0.6)
    u = u[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda u: discs(1, 12, u=u), u)
    assert discs(5, 16, generator=_g()).shape == (5, 1, 16, 16)
    with pytest.raises(BadData, match=r"\[3, 5\]"):
        discs(3, 8, u=u)


def test_contour_and_background_of_the_reference():
    alpha = V["alpha"].item()
    assert torch.allclose(smooth_noise(V["u1"].double(), alpha, dims=1), V["contour"], rtol=0, atol=1e-7)  # the reference's
    assert torch.allclose(smooth_noise(V["u2"].double(), alpha), V["background"], rtol=0, atol=1e-7)  # draws are float32
    assert torch.allclose(smooth_noise(V["u1"], alpha, dims=1), V["contour"].float(), rtol=0, atol=1e-5)


def test_spectrum_falls_with_the_power():
    u = torch.rand(4000, 32, generator=_g(), dtype=torch.float64)
    before, after = (torch.fft.rfft(x).abs() for x in (2 * u - 1, smooth_noise(u, 1.5, dims=1)))
    k = torch.arange(1, 17, dtype=torch.float64)
    assert torch.allclose((after / before)[:, 1:], k**-1.5, rtol=1e-6)


def test_a_flat_contour_parts_two_regions():
    """Every draw at its middle: the contour lies in the middle, both regions are flat, hence at their lower ends."""
    size = 16
    u = torch.full((2, size + 2 * size**2 + 3), 0.5, dtype=torch.float64)
    u[:, -3], u[1, -1] = 0.7, 0.1
    dark_on_top, bright_on_top = c_alpha_images(2, size, 2.0, u=u)[:, 0]
    column = torch.zeros(size, dtype=torch.float64)
    column[8:], column[7] = 0.7, 0.35  # the edge is a mean of two pixels
    assert torch.allclose(dark_on_top, column[:, None].expand(size, size))
    assert torch.allclose(bright_on_top, 0.7 - column[:, None].expand(size, size))


def test_smooth_images():
    x = c_alpha_images(50, 32, 2.0, beta=3.0, generator=_g())
    assert x.shape == (50, 1, 32, 32)
    assert 0 <= x.min() < x.max() <= 1
    assert torch.equal(x, c_alpha_images(50, 32, 2.0, beta=3.0, generator=_g()))
    top, bottom = x[:, 0, :4].mean((1, 2)), x[:, 0, -4:].mean((1, 2))
    assert 10 < (top > bottom).sum() < 40  # either lies on top
    with pytest.raises(BadData, match="shape"):
        c_alpha_images(1, 8, 2.0, u=torch.rand(1, 8))


def test_shapes_are_found_where_they_were_drawn():
    images, present = simple_shapes(200, generator=_g())
    found = find_shapes(0.1 + 0.8 * images)
    assert torch.equal(found.counts, torch.diag_embed(present.long()))
    assert not found.unknown.any()
    assert not found.off_support.any()
    small, there = simple_shapes(50, 32, area=20, generator=_g())
    assert torch.equal(find_shapes(small, area=20).counts.sum(2) > 0, there)


def test_what_breaks_the_rules_is_off_support():
    images, present = simple_shapes(300, generator=_g())
    full = images[present.all(1)][:1]
    moved = torch.cat([full[..., 21:42], full[..., :21], full[..., 42:]], 3)  # square and triangle change columns
    doubled = full.clone()
    doubled[..., 21:42] = full[..., :21]
    smeared = full.clone()
    smeared[..., 5:12, :20] = 1
    found = find_shapes(torch.cat([full, moved, doubled, smeared, 0 * full]))
    assert found.off_support.tolist() == [False, True, True, False, False]
    assert found.counts[2].sum(1).tolist() == [2, 0, 1]
    assert found.unknown.tolist() == [0, 0, 0, 1, 0]
    assert find_shapes(torch.zeros(2, 1, 64, 64)).counts.sum() == 0


def test_noise_does_not_hide_a_shape():
    images, present = simple_shapes(60, generator=_g())
    noisy = images + 0.15 * torch.randn(images.shape, generator=_g(1))
    found = find_shapes(noisy)
    assert torch.equal(found.counts.diagonal(dim1=1, dim2=2) > 0, present)
