import math

import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.masks import colored_noise
from sfumato.metrics import band_energy, radial_spectrum


def wave(size, cycles, amplitude=1.0):
    line = torch.arange(size, dtype=torch.float64)
    return amplitude * torch.cos(2 * math.pi * cycles / size * line).expand(1, 1, size, size)


def test_a_wave_lies_in_its_ring_with_its_energy():
    x = wave(32, 6)  # f = 0.1875
    power = radial_spectrum(x, bins=8)[0]
    assert power.argmax() == 3
    assert power[[0, 1, 2, 4, 5, 6, 7]].max() < 1e-20
    assert radial_spectrum(2 * x, bins=8)[0, 3] == pytest.approx(4 * power[3].item())


def test_white_noise_is_flat_at_its_variance_and_offsets_do_not_count():
    x = 0.5 * torch.randn(256, 2, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power = radial_spectrum(x, bins=6).mean(0)
    assert (power - 0.25).abs().max() < 0.02
    assert torch.allclose(radial_spectrum(x + 3, bins=6), radial_spectrum(x, bins=6))


def test_parseval_within_the_circle():
    """A red image has nearly all its variance within the circle: rings times their sizes give it back."""
    x = colored_noise(4, 32, "red", sigma=2.0, generator=torch.Generator().manual_seed(0)).double()
    f = torch.fft.fftfreq(32, dtype=torch.float64)
    r = (f[:, None] ** 2 + f**2).sqrt()
    sizes = torch.tensor([((r >= k / 16) & (r < (k + 1) / 16) | (k == 7) & (r == 0.5)).sum() for k in range(8)])
    sizes[0] -= 1  # the mean belongs to no ring
    total = (radial_spectrum(x, bins=8) * sizes).sum(1)
    variance = (x - x.mean((1, 2), keepdim=True)).square().sum((1, 2))
    assert torch.allclose(total, variance, rtol=1e-3)


def test_masks_are_accepted():
    assert radial_spectrum(torch.rand(2, 8, 8) < 0.5, bins=3).shape == (2, 3)


def test_band_energy_of_two_waves():
    x, ref = wave(32, 2) + wave(32, 10, 0.5), wave(32, 2) + wave(32, 10)
    assert band_energy(x, ref, 0.0).item() == pytest.approx((1 + 0.25) / 2)
    assert band_energy(x, ref, 0.2).item() == pytest.approx(0.25)
    assert band_energy(x, ref, 0.0, high=0.2).item() == pytest.approx(1)


def test_the_highest_frequency_counts():
    nyquist = wave(16, 8)
    assert radial_spectrum(nyquist, bins=4)[0, 3] > 0
    assert band_energy(nyquist, nyquist, 0.4).item() == pytest.approx(1)


def test_refusals():
    x = torch.rand(1, 1, 8, 8)
    with pytest.raises(BadSetting):
        radial_spectrum(x, bins=0)
    with pytest.raises(BadSetting):
        band_energy(x, x, 0.3, high=0.2)
    with pytest.raises(BadData):
        band_energy(x, x[..., :4], 0.1)
    with pytest.raises(BadData, match="no frequency"):
        band_energy(x, x, 0.01, high=0.02)
