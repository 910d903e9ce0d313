from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData
from sfumato.masks import frequency_disc, random_frequency_mask
from sfumato.physics import apply_frequency_mask

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "mfm.npz").items()}


def pictures(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_official_corruption():
    """Their map says 1 = kept."""
    size, radius = VECTORS["images"].shape[-2:], VECTORS["radius1"].item()
    disc = frequency_disc(tuple(size), radius, VECTORS["radius2"].item())
    assert torch.equal(~disc, VECTORS["low_pass"].bool())
    hidden = torch.stack((disc, ~disc))
    assert torch.equal(~hidden, VECTORS["mask"].bool())
    torch.testing.assert_close(apply_frequency_mask(VECTORS["images"], hidden), VECTORS["corrupted"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (15, 13), (8, 11)])
def test_an_orthogonal_projection_and_its_complement(size):
    x, y = pictures(2, 3, *size), pictures(2, 3, *size, seed=1)
    hidden = frequency_disc(size, 3)

    def project(t, m=hidden):
        return apply_frequency_mask(t, m, clamp=None)

    torch.testing.assert_close(project(x) + project(x, ~hidden), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(project(project(x)), project(x), atol=1e-12, rtol=0)
    assert (project(x) * y).sum().item() == pytest.approx((x * project(y)).sum().item(), abs=1e-10)


def test_a_mask_without_symmetry_gives_the_real_part():
    x = pictures(2, 3, 8, 9)
    hidden = pictures(2, 8, 9) > 0.5
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), (-2, -1)) * ~hidden[:, None]
    whole = torch.fft.ifft2(torch.fft.ifftshift(spectrum, (-2, -1)))
    assert whole.imag.abs().max() > 1e-2
    torch.testing.assert_close(apply_frequency_mask(x, hidden, clamp=None), whole.real, atol=1e-12, rtol=0)


def test_each_picture_has_its_own_mask():
    x = pictures(5, 3, 16, 16).float()
    hidden = random_frequency_mask(5, 16, 3, generator=torch.Generator().manual_seed(3))
    together = apply_frequency_mask(x, hidden)
    for i in range(5):
        torch.testing.assert_close(together[i], apply_frequency_mask(x[i : i + 1], hidden[i])[0])


def test_limits_and_clamp():
    x = pictures(1, 1, 8, 8)
    torch.testing.assert_close(apply_frequency_mask(x, frequency_disc(8, 99)), x)
    assert not apply_frequency_mask(x, frequency_disc(8, 0)).any()
    high = apply_frequency_mask(x, ~frequency_disc(8, 2), clamp=None)
    assert high.min() < -0.1
    assert high.mean().abs() < 1e-12  # frequency 0 is hidden
    assert torch.equal(apply_frequency_mask(x, ~frequency_disc(8, 2)), high.clamp(0, 1))


def test_half_precision_is_computed_in_single():
    x = pictures(1, 3, 12, 12)  # no power of two
    low = apply_frequency_mask(x.bfloat16(), frequency_disc(12, 3))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), apply_frequency_mask(x, frequency_disc(12, 3)), atol=1e-2, rtol=0)


def test_gradients():
    x = pictures(1, 1, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: apply_frequency_mask(t, frequency_disc((6, 5), 2), clamp=None), x)


@pytest.mark.parametrize("shape", [(8, 9), (3, 8, 8), (2, 1, 8, 8), (64,)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(BadData, match="does not fit pictures"):
        apply_frequency_mask(torch.rand(2, 3, 8, 8), torch.ones(shape, dtype=torch.bool))
