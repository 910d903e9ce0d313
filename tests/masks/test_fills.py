import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.masks import color_noise_mask, fill, mask_difficulty, mosaic, normalized_convolution, random_mask, upsample_mask


@pytest.fixture
def scene():
    g = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 16, 16, generator=g), upsample_mask(random_mask(3, 4, 0.5, generator=g), 4, 4)


@pytest.mark.parametrize("how", ["zero", "mean", "color", "noise"])
def test_visible_pixels_stay_and_hidden_ones_are_not_looked_at(scene, how):
    x, hidden = scene
    other = torch.where(hidden, torch.rand_like(x), x)
    a, b = (fill(v, hidden, how=how, generator=torch.Generator().manual_seed(1)) for v in (x, other))
    assert torch.equal(a, b)
    assert torch.equal(torch.where(hidden, 0, a), torch.where(hidden, 0, x))


def test_fill_values(scene):
    x, hidden = scene
    filled = fill(x, hidden, how="color", value=(0.1, 0.2, 0.3))
    assert torch.equal(filled[:, 1][hidden[:, 0]], torch.full((int(hidden.sum()),), 0.2))
    mean = fill(x, hidden, how="mean")
    visible = x[0, 2][~hidden[0, 0]].mean()
    assert torch.allclose(mean[0, 2][hidden[0, 0]], visible.expand(128))
    assert fill(x[:, :1], hidden, how="color")[hidden].unique().item() == pytest.approx((0.485 + 0.456 + 0.406) / 3)


def test_blurred_rim_hides_all_and_fades_two_pixels():
    x, hidden = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hidden[..., 4:12, 4:12] = True
    filled = fill(x, hidden, how="blur_rim", value=1.0)[0, 0]
    assert (filled[4:12, 4:12] == 1).all()
    assert 0 < filled[8, 2] < filled[8, 3] < 1
    assert (filled[8, :2] == 0).all()


def test_mosaic_keeps_block_means_and_is_idempotent():
    x = torch.rand(2, 3, 12, 8, dtype=torch.float64)
    m = mosaic(x, 4)
    assert torch.allclose(torch.nn.functional.avg_pool2d(m, 4), torch.nn.functional.avg_pool2d(x, 4), atol=1e-15)
    assert torch.allclose(mosaic(m, 4), m, atol=1e-15)
    assert torch.equal(mosaic(x, 1), x)
    with pytest.raises(BadSetting):
        mosaic(x, 5)


def test_normalized_convolution_keeps_constants_and_visible_pixels(scene):
    x, hidden = scene
    guess = normalized_convolution(x, hidden, 2.0)
    assert torch.equal(torch.where(hidden, 0, guess), torch.where(hidden, 0, x))
    constant = torch.full_like(x, 0.3)
    assert torch.allclose(normalized_convolution(torch.where(hidden, 9.0, constant), hidden, 2.0), constant, atol=1e-6)


def test_normalized_convolution_against_the_sum():
    x, hidden = torch.rand(1, 1, 9, 9, dtype=torch.float64), torch.rand(1, 1, 9, 9) < 0.5
    y, z = torch.meshgrid(torch.arange(9.0).double(), torch.arange(9.0).double(), indexing="ij")
    r, c = hidden[0, 0].nonzero()[3].tolist()
    weight = torch.exp(-((y - r) ** 2 + (z - c) ** 2) / (2 * 1.5**2)) * ~hidden[0, 0]
    weight = weight * ((y - r).abs() <= 6) * ((z - c).abs() <= 6)
    expected = (weight * x[0, 0]).sum() / weight.sum()
    assert normalized_convolution(x, hidden, 1.5)[0, 0, r, c].item() == pytest.approx(expected.item(), abs=1e-12)


def test_normalized_convolution_out_of_reach_takes_the_mean():
    x, hidden = torch.rand(1, 1, 4, 64), torch.ones(1, 1, 4, 64, dtype=torch.bool)
    hidden[..., :4] = False
    guess = normalized_convolution(x, hidden, 1.0)
    assert guess[0, 0, 0, 60].item() == pytest.approx(x[..., :4].mean().item(), rel=1e-5)


def test_difficulty_limits_and_order():
    g = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 64).expand(32, 1, 64, 64)
    red, blue = (color_noise_mask(32, 8, 0.75, color=c, generator=g).view(32, 8, 8) for c in ("red", "blue"))
    assert mask_difficulty(torch.full((2, 1, 64, 64), 0.5), red[:2]).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert mask_difficulty(ramp, red).mean() > mask_difficulty(ramp, blue).mean()
    assert (mask_difficulty(ramp, blue) >= 0).all()
