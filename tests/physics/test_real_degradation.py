import math

import numpy as np
import pytest
import torch
from scipy.special import j1

from sfumato.errors import BadSetting
from sfumato.physics import BLUR_KINDS, gaussian_or_poisson_noise, random_blur_kernel, random_blur_kernels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moments(kernel):
    """Covariance of a kernel taken as a density."""
    line = torch.arange(len(kernel)) - len(kernel) // 2.0
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([(kernel * a * b).sum() for a, b in ((x, x), (x, y), (y, y))])


@pytest.mark.parametrize("kind", BLUR_KINDS)
def test_every_kind_sums_to_one_and_is_point_symmetric(kind):
    kernels = random_blur_kernels(64, kinds={kind: 1.0}, generator=generator())
    assert kernels.shape == (64, 21, 21)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(64))
    torch.testing.assert_close(kernels, kernels.flip(1, 2))
    assert (kernels >= 0).all() == (kind != "sinc")
    round_ones = torch.allclose(kernels, kernels.transpose(1, 2), atol=1e-6)
    assert round_ones == (not kind.endswith("aniso"))


def test_a_gaussian_has_its_width():
    kernel = random_blur_kernel("iso", 21, sigma=(2.0, 2.0), generator=generator())
    torch.testing.assert_close(moments(kernel), torch.tensor([4.0, 0.0, 4.0]), atol=0.02, rtol=0)


def test_an_anisotropic_gaussian_has_both_its_widths_at_a_random_angle():
    angles = []
    for seed in range(40):
        xx, xy, yy = moments(random_blur_kernel("aniso", 31, sigma=(1.0, 3.0), generator=generator(seed)))
        values, vectors = torch.linalg.eigh(torch.stack((xx, xy, xy, yy)).view(2, 2))
        assert 0.9 <= values[0] <= values[1] <= 9.1
        angles.append(math.atan2(vectors[1, 1], vectors[0, 1]) % math.pi)
    assert sum(a < math.pi / 2 for a in angles) in range(8, 33)


@pytest.mark.parametrize(("kind", "at_one"), [("iso", math.exp(-0.5)), ("plateau_iso", 0.5)])
def test_one_width_from_the_middle(kind, at_one):
    kernel = random_blur_kernel(kind, 21, sigma=(2.0, 2.0), generator=generator())
    assert (kernel[10, 12] / kernel[10, 10]).item() == pytest.approx(at_one, rel=1e-5)


def test_exponents_lie_below_one_half_of_the_time():
    """A generalised Gaussian at one and a half widths from its middle: exp(-½ 2.25^β)."""
    kernels = random_blur_kernels(
        2000, kinds={"generalised_iso": 1.0}, sizes=(9,), sigma=(2.0, 2.0), beta=(0.5, 4.0), generator=generator()
    )
    exponent = (-2 * (kernels[:, 4, 7] / kernels[:, 4, 4]).log()).log() / math.log(2.25)
    assert 0.499 <= exponent.min() < 0.51
    assert 3.9 < exponent.max() <= 4.001
    assert (exponent < 1).float().mean().item() == pytest.approx(0.5, abs=0.045)


@pytest.mark.parametrize(("size", "lowest"), [(11, math.pi / 3), (13, math.pi / 5), (21, math.pi / 5)])
def test_a_sinc_is_the_response_of_a_circular_low_pass(size, lowest):
    """2 J₁(ω r) / (ω r) times its middle; ω is read off one pixel to the side, and tells all others."""
    kernels = random_blur_kernels(200, kinds={"sinc": 1.0}, sizes=(size,), generator=generator()).double()
    middle = size // 2
    places = np.linspace(0.1, 3.5, 20_000)
    falling = 2 * j1(places) / places
    one_aside = (kernels[:, middle, middle + 1] / kernels[:, middle, middle]).numpy()
    cutoff = np.interp(one_aside, falling[::-1], places[::-1])
    assert lowest - 1e-3 < cutoff.min() < lowest + 0.1
    assert math.pi - 0.1 < cutoff.max() < math.pi + 1e-3
    y, x = np.mgrid[-middle : middle + 1, -middle : middle + 1]
    r = np.maximum(np.hypot(y, x), 1e-9) * cutoff[:, None, None]
    expected = 2 * j1(r) / r
    np.testing.assert_allclose(kernels.numpy(), expected / expected.sum((1, 2), keepdims=True), atol=1e-4)


def test_sizes_are_equally_likely_and_kinds_in_their_shares():
    kernels = random_blur_kernels(4000, generator=generator())
    reach = (kernels != 0).any(1).sum(1)
    # a narrow Gaussian rounds to 0 far out, so sizes are counted where tails are long
    plateaus = random_blur_kernels(4000, kinds={"plateau_iso": 1.0}, generator=generator())
    size = (plateaus != 0).any(1).sum(1)
    assert size.unique().tolist() == list(range(7, 22, 2))
    assert size.bincount()[7::2].tolist() == pytest.approx([500] * 8, abs=4 * 21)
    assert reach.max() == 21
    ringing = (kernels.amin((1, 2)) < 0).float().mean().item()
    assert ringing == pytest.approx(0.1, abs=4 * (0.09 / 4000) ** 0.5 + 0.005)


def test_repeatable_and_refusals():
    assert torch.equal(random_blur_kernels(8, generator=generator()), random_blur_kernels(8, generator=generator()))
    assert not torch.equal(random_blur_kernels(8, generator=generator()), random_blur_kernels(8, generator=generator(1)))
    with pytest.raises(BadSetting, match="'box' is not known"):
        random_blur_kernel("box", 7)
    with pytest.raises(BadSetting, match="odd sizes"):
        random_blur_kernel("iso", 8)


def test_gaussian_noise_has_its_strength_and_colour():
    x = torch.full((400, 3, 24, 24), 0.5)
    noise = gaussian_or_poisson_noise(x, gaussian_share=1.0, generator=generator()) - x
    deviation = noise[:, 0].std((1, 2)) * 255
    assert 0.8 < deviation.min() < 3
    assert 27 < deviation.max() < 32
    assert deviation.mean().item() == pytest.approx(15.5, abs=1.7)
    gray = (noise[:, 0] == noise[:, 1]).all((1, 2)) & (noise[:, 0] == noise[:, 2]).all((1, 2))
    assert gray.float().mean().item() == pytest.approx(0.4, abs=0.1)
    colored = noise[~gray]
    assert abs((colored[:, 0] * colored[:, 1]).mean() / colored.square().mean()) < 0.02


def test_shot_noise_grows_with_brightness():
    """A picture of two values counts 2 photons at full brightness: variance x / 2 times the squared scale."""
    x = torch.full((200, 1, 32, 32), 0.2)
    x[..., 16:] = 0.8
    out = gaussian_or_poisson_noise(x, gaussian_share=0.0, poisson_scale=(0.1, 0.1), gray_share=0.0, generator=generator())
    variance = (out - x).square().mean((0, 1, 2))
    assert variance[:16].mean().item() == pytest.approx(0.01 * 0.2 / 2, rel=0.05)
    assert variance[16:].mean().item() == pytest.approx(0.01 * 0.8 / 2, rel=0.1)  # less what is clamped


def test_both_kinds_of_noise_in_their_shares_clamped_and_repeatable():
    x = torch.zeros(2000, 3, 4, 4)  # no photons, no shot noise
    x[:, :, 0] = 1
    out = gaussian_or_poisson_noise(x, generator=generator())
    assert 0 <= out.min() < out.max() <= 1
    gaussian = (out[:, :, 1:] != 0).any((1, 2, 3)).float().mean().item()
    assert gaussian == pytest.approx(0.5, abs=0.045)
    assert torch.equal(out, gaussian_or_poisson_noise(x, generator=generator()))
