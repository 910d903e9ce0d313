import pytest
import torch
from skimage.restoration import denoise_nl_means, denoise_wavelet

from sfumato.cli.demo.classical import rms, tuned_nl_means, tuned_wavelet
from sfumato.data import photo_crops


def _pair(channels, size=48):
    generator = torch.Generator().manual_seed(0)
    clean = photo_crops(1, size, gray=channels == 1, generator=generator)[0]
    return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean


def _decibels(x, clean):
    return -20 * torch.tensor(rms(x, clean)).log10().item()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tuned", [tuned_wavelet, tuned_nl_means])
def test_cleaner_than_before_and_settings_that_give_it_again(tuned, channels):
    noisy, clean = _pair(channels)
    restored, settings, decibels = tuned(noisy, clean)
    assert restored.shape == clean.shape
    assert 0 <= restored.min() <= restored.max() <= 1
    assert decibels == pytest.approx(_decibels(restored, clean), abs=1e-4)
    assert decibels > _decibels(noisy, clean) + 2
    x = noisy.permute(1, 2, 0).numpy()
    if tuned is tuned_wavelet:
        again = denoise_wavelet(x, convert2ycbcr=channels == 3, channel_axis=-1, rescale_sigma=True, **settings)
    else:
        again = denoise_nl_means(x, fast_mode=True, channel_axis=-1, **settings)
    assert torch.allclose(torch.from_numpy(again).view(x.shape).permute(2, 0, 1).clamp(0, 1).float(), restored, atol=1e-6)


def test_nothing_on_the_defaults_beats_the_tuned_settings():
    noisy, clean = _pair(3)
    x = noisy.permute(1, 2, 0).numpy()
    for default, tuned in [
        (denoise_wavelet(x, channel_axis=-1), tuned_wavelet),
        (denoise_nl_means(x, channel_axis=-1), tuned_nl_means),
    ]:
        y = torch.from_numpy(default).permute(2, 0, 1).clamp(0, 1)
        assert tuned(noisy, clean)[2] >= _decibels(y, clean)
