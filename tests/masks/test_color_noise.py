from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.masks import NoiseBank, color_noise_mask, colored_noise, mask_from_scores, transfer_function

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "colormae.npz")
COLORS = ["red", "blue", "green", "purple"]


def white(n=8, size=32, seed=0):
    return torch.rand(n, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector_sigma(color, s1=float(VECTORS["sigma1"]), s2=float(VECTORS["sigma2"])):
    return {"red": s2, "blue": s1}.get(color, (s1, s2))


def test_colours_complete_each_other():
    w = white()
    both = colored_noise(8, 32, "green", white=w) + colored_noise(8, 32, "purple", white=w)
    assert torch.allclose(both, w, atol=1e-12)
    both = colored_noise(8, 32, "red", sigma=1.5, white=w) + colored_noise(8, 32, "blue", sigma=1.5, white=w)
    assert torch.allclose(both, w, atol=1e-12)


def test_limits():
    w = white()
    assert torch.allclose(colored_noise(8, 32, "red", sigma=0.0, white=w), w, atol=1e-12)
    assert colored_noise(8, 32, "blue", sigma=0.0, white=w).abs().max() < 1e-12
    assert torch.allclose(colored_noise(8, 32, "white", white=w), w, atol=1e-12)
    for color in ("blue", "green"):
        assert colored_noise(8, 32, color, white=w).mean((1, 2)).abs().max() < 1e-12


@pytest.mark.parametrize("color", ["red", "purple", "green", "blue"])
def test_fourier_filter_is_the_spatial_one(color):
    """The stored noise is from a spatial filter, wrapped, cut at 4σ; σ = 1 is wide enough for both forms to agree."""
    from scipy.ndimage import gaussian_filter

    w = white(3, 64)
    low = {s: torch.from_numpy(gaussian_filter(w.numpy(), (0, s, s), mode="wrap", truncate=4)) for s in (1.0, 2.0)}
    green = low[1.0] - low[2.0]
    expected = {"red": low[1.0], "blue": w - low[1.0], "green": green, "purple": w - green}[color]
    assert torch.allclose(colored_noise(3, 64, color, white=w), expected, atol=2e-3)


def test_stored_red_noise_from_the_spatial_filter():
    ours = colored_noise(3, 64, "red", sigma=2.0, white=torch.from_numpy(VECTORS["white"]))
    assert torch.allclose(ours, torch.from_numpy(VECTORS["red"]).double(), atol=2e-3)


@pytest.mark.parametrize("color", COLORS)
def test_official_thresholding(color):
    row, col = VECTORS["crop_row_col"]
    n = int(VECTORS["window"])
    window = torch.from_numpy(VECTORS[color])[:, row : row + n, col : col + n].flatten(1)
    mask = mask_from_scores(window, ratio=float(VECTORS["mask_ratio"]), largest=False)
    assert torch.equal(mask, torch.from_numpy(VECTORS[f"mask_{color}"]).bool())
    strongest = torch.from_numpy(VECTORS[f"keep_{color}"])
    assert torch.equal((~mask).nonzero()[:, 1].view(3, -1), strongest.sort(1).values)


@pytest.mark.parametrize("color", COLORS)
def test_power_is_the_squared_transfer_function(color):
    w = white(256) - 0.5
    noise = colored_noise(256, 32, color, white=w)
    power = [torch.fft.rfft2(x).abs().square().mean(0) for x in (noise, w)]
    gain = transfer_function((32, 32), color).square()
    big = gain > 1e-3
    big[0, 0] = False
    assert (power[0][big] / power[1][big] / gain[big] - 1).abs().max() < 0.05


@pytest.mark.parametrize("color", ["white", *COLORS])
def test_exact_counts_and_determinism(color):
    a, b = (color_noise_mask(16, (10, 14), 0.75, color=color, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert (a.sum(1) == 105).all()
    assert len(a.unique(dim=0)) == 16


@pytest.mark.parametrize("sampler", ["fresh", "bank"])
def test_no_place_is_hidden_more_often(sampler):
    """No border bias: all frequencies within the two-sided 99.9 % limits (Bonferroni over places) of a fair one."""
    from scipy.stats import norm

    n, length, ratio, g = 4000, 64, 0.75, torch.Generator().manual_seed(0)
    if sampler == "fresh":
        mask = color_noise_mask(n, 8, ratio, color="green", generator=g)
    else:
        mask = NoiseBank("green", count=1024, generator=g).sample(n, (8, 8), ratio, generator=g)
    z = (mask.double().mean(0) - ratio) / (ratio * (1 - ratio) / n) ** 0.5
    assert mask.sum() == n * length * ratio
    assert z.abs().max() < norm.ppf(1 - 0.0005 / length)


def test_bank_windows_come_from_the_bank():
    bank = NoiseBank("blue", count=4, size=16, generator=torch.Generator().manual_seed(0))
    windows = bank.windows(32, (5, 7), generator=torch.Generator().manual_seed(1)).view(32, 5, 7)
    places = bank.noise.unfold(1, 5, 1).unfold(2, 7, 1).reshape(-1, 5, 7)  # every unflipped window
    for window in windows:
        flips = [window, window.flip(0), window.flip(1), window.flip(0, 1)]
        assert any((places == f).all((1, 2)).any() for f in flips)


def test_bank_masks_are_windows_thresholded():
    bank = NoiseBank("green", count=8, generator=torch.Generator().manual_seed(0))
    sample, windows = (f(generator=torch.Generator().manual_seed(2)) for f in (
        lambda generator: bank.sample(6, 14, 0.75, generator=generator),
        lambda generator: bank.windows(6, (14, 14), generator=generator),
    ))  # fmt: skip
    assert (sample.sum(1) == 147).all()
    assert (windows.masked_fill(sample, torch.inf).amin(1) > windows.masked_fill(~sample, -torch.inf).amax(1)).all()


def test_bank_adds_nothing_to_the_state():
    assert NoiseBank("green", count=2, size=8).state_dict() == {}


@pytest.mark.parametrize(
    ("color", "sigma"), [("mauve", None), ("red", (1.0, 2.0)), ("green", 1.0), ("green", (2.0, 1.0)), ("blue", -1.0)]
)
def test_refusals(color, sigma):
    with pytest.raises(BadSetting):
        colored_noise(1, 8, color, sigma=sigma)


def test_window_larger_than_the_bank_is_refused():
    with pytest.raises(BadSetting, match="window"):
        NoiseBank("red", count=1, size=8).sample(1, 9, 0.5)
