from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.feature import hog as skimage_hog

from sfumato.data import photo_crops
from sfumato.errors import BadData, BadSetting
from sfumato.nn import hog, hog_image, hog_tokens

VECTORS = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "dmjd.npz").items()}


def images(n=2, size=(16, 24), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_official_histograms_and_tokens():
    x = VECTORS["hog_images"].double() / 255
    torch.testing.assert_close(hog(x), VECTORS["hog"].double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(F.layer_norm(hog(x), (9,)), VECTORS["hog_whitened"].double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(hog_tokens(x, 16), VECTORS["hog_tokens"].double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bins", "cell"), [(9, 8), (6, 4)])
def test_scikit_image_agrees_up_to_its_normalisation(bins, cell):
    x = photo_crops(2, 32, gray=True, generator=torch.Generator().manual_seed(0)).double()
    ours = hog(x, bins=bins, cell=cell)[:, 0]
    for image, histogram in zip(x[:, 0], ours, strict=True):
        theirs = skimage_hog(
            image.numpy() * 255, orientations=bins, pixels_per_cell=(cell, cell), cells_per_block=(1, 1), block_norm="L1",
            feature_vector=False,
        )  # fmt: skip
        normalised = histogram / (histogram.sum(-1, keepdim=True) + 1e-5)
        np.testing.assert_allclose(normalised.numpy(), theirs[:, :, 0, 0], atol=1e-6)


def test_edges_fall_into_the_bin_of_their_gradient():
    x = torch.zeros(3, 1, 8, 8)
    x[0, ..., 4:] = 1  # gradient to the right: 0 degrees
    x[1, :, 4:] = 1  # downwards: 90 degrees, in the fifth bin
    x[2] = 0.3  # flat
    h = hog(x).view(3, 9)
    assert h.argmax(1)[:2].tolist() == [0, 4]
    assert (h > 0).sum(1).tolist() == [1, 1, 0]
    assert torch.allclose(h.sum(1), torch.tensor([255 * 16 / 64, 255 * 16 / 64, 0.0]))


def test_opposite_edges_differ_only_when_signed():
    x = torch.zeros(2, 1, 8, 8)
    x[0, ..., 4:], x[1, ..., :4] = 1, 1
    assert torch.equal(hog(x)[0], hog(x)[1])
    assert hog(x, bins=18, signed=True).view(2, 18).argmax(1).tolist() == [0, 9]
    mirrored = images().flip(-1)
    assert not torch.allclose(hog(images()), hog(mirrored).flip(3))


def test_bins_sum_to_the_mean_magnitude_and_scale_with_the_image():
    x = images()
    g = 255 * torch.stack((F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1)), F.pad(x[..., 2:] - x[..., :-2], (1, 1))))
    torch.testing.assert_close(hog(x).sum(-1), F.avg_pool2d(torch.hypot(*g), 8))
    torch.testing.assert_close(hog(0.3 * x), 0.3 * hog(x))
    torch.testing.assert_close(hog_tokens(0.3 * x, 8), hog_tokens(x, 8), atol=1e-5, rtol=1e-5)


def test_tokens_are_cells_of_a_patch_in_raster_order():
    x = images(size=(16, 32))
    tokens, cells = hog_tokens(x, 16, whiten=False), hog(x)
    assert tokens.shape == (2, 2, 108)
    one = tokens.view(2, 2, 2, 2, 9, 3)  # image, patch, cell row, cell column, bin, channel
    assert torch.equal(one[1, 1, 1, 0, :, 2], cells[1, 2, 1, 2])
    whitened = hog_tokens(x, 16).view(2, 2, 4, 9, 3)
    assert whitened.mean(3).abs().max() < 1e-9
    torch.testing.assert_close(whitened.var(3, correction=0), torch.ones(2, 2, 4, 3).double(), atol=1e-3, rtol=0)


def test_gradient_flows_through_magnitudes_and_is_finite_on_flat_images():
    x = images(1, (8, 8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: hog(t, cell=4), x, eps=1e-9, atol=1e-3)
    flat = torch.full((1, 1, 8, 8), 0.5, requires_grad=True)
    hog(flat).sum().backward()
    assert torch.equal(flat.grad, torch.zeros_like(flat))


def test_drawn_lines_run_along_the_edge():
    x = torch.zeros(2, 1, 16, 16)
    x[0, ..., 6:], x[1, :, 6:] = 1, 1
    tokens = hog_tokens(x, 16)
    drawn = hog_image(tokens, 16, 1)
    assert drawn.shape == (2, 1, 16, 16)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    vertical, horizontal = drawn[0, 0, :8, :8], drawn[1, 0, :8, :8]
    assert vertical.std(1).mean() > 2 * vertical.std(0).mean()  # bright along a column (the first bin's middle: 10 degrees off)
    assert horizontal.std(0).mean() > 3 * horizontal.std(1).mean()
    assert (drawn[:, 0, 8:, 8:] == 0).all(), "flat cells stay dark"


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadData, match="cells of 8"):
        hog(torch.rand(1, 1, 12, 16))
    with pytest.raises(BadData, match="patches of 16"):
        hog_tokens(torch.rand(1, 1, 24, 16), 16)
    with pytest.raises(BadSetting, match="divisor"):
        hog_tokens(torch.rand(1, 1, 24, 24), 12)
    with pytest.raises(BadData, match="grid of 3 x 3"):
        hog_image(torch.rand(1, 4, 36), 16, 3)
