import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.masks import frequency_disc, half_plane, random_frequency_mask, whole_plane

SIZES = [(8, 8), (7, 9), (6, 5), (1, 4), (2, 2)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("radius", "outer"), [(0, None), (1, None), (2.5, None), (1, 3), (99, None)])
def test_the_disc_is_what_its_formula_says(size, radius, outer):
    hidden = frequency_disc(size, radius, outer)
    for y in range(size[0]):
        for x in range(size[1]):
            d = (y - size[0] // 2) ** 2 + (x - size[1] // 2) ** 2
            assert hidden[y, x].item() == (radius**2 <= d < (outer or 999) ** 2)


def test_limits():
    assert frequency_disc(16, 0).all()
    assert not frequency_disc(16, 16).any()
    assert (~frequency_disc(224, 16)).sum() == sum((y * y + x * x) < 256 for y in range(-16, 17) for x in range(-16, 17))


@pytest.mark.parametrize("size", SIZES)
def test_discs_hide_a_frequency_and_its_mirror_image_together(size):
    """Nyquist rows and columns are their own partners."""
    for hidden in (frequency_disc(size, 1.5), ~frequency_disc(size, 1.5)):
        assert set(half_plane(hidden).unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(whole_plane(half_plane(hidden), size[1]).bool(), hidden)


@pytest.mark.parametrize("size", SIZES)
def test_half_of_the_plane_filters_like_the_whole_for_any_map(size):
    x = torch.randn(2, *size, dtype=torch.float64, generator=generator())
    m = torch.rand(size, dtype=torch.float64, generator=generator(1))
    whole = torch.fft.ifft2(torch.fft.fft2(x) * torch.fft.ifftshift(m)).real
    half = torch.fft.irfft2(torch.fft.rfft2(x) * half_plane(m), s=size)
    torch.testing.assert_close(half, whole, atol=1e-12, rtol=0)


def test_half_of_a_spectrum_becomes_the_whole_one():
    for size in SIZES:
        x = torch.randn(3, *size, dtype=torch.float64, generator=generator())
        whole = torch.fft.fftshift(torch.fft.fft2(x), (-2, -1)).abs()
        torch.testing.assert_close(whole_plane(torch.fft.rfft2(x).abs(), size[1]), whole, atol=1e-12, rtol=0)


def test_random_masks_are_the_disc_or_its_complement_in_their_share():
    disc = frequency_disc((12, 10), 3)
    masks = random_frequency_mask(4000, (12, 10), 3, 0.3, generator=generator())
    low = (masks == disc).all((1, 2))
    assert ((masks == ~disc).all((1, 2)) ^ low).all()
    assert low.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)
    assert (random_frequency_mask(50, 12, 3, 1.0) == frequency_disc(12, 3)).all()
    assert (random_frequency_mask(50, 12, 3, 0.0) == ~frequency_disc(12, 3)).all()
    again = random_frequency_mask(4000, (12, 10), 3, 0.3, generator=generator())
    assert torch.equal(masks, again)
    assert not torch.equal(masks, random_frequency_mask(4000, (12, 10), 3, 0.3, generator=generator(1)))


def test_what_cannot_be_is_refused():
    with pytest.raises(BadSetting, match="radius of 0 or more"):
        frequency_disc(8, -1)
    with pytest.raises(BadSetting, match="from 3 to 2"):
        frequency_disc(8, 3, 2)
    with pytest.raises(BadSetting, match=r"low_pass_share=1\.5"):
        random_frequency_mask(2, 8, 2, 1.5)
