import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.physics import correlated_noise

LINE = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
BINOMIAL = torch.outer(LINE, LINE)


def _draw(shape, kernel, sigma=0.15, seed=0):
    return correlated_noise(shape, sigma, kernel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_standard_deviation_is_sigma_whatever_the_scale_of_the_kernel(scale):
    assert _draw((4, 1, 512, 512), BINOMIAL * scale).std().item() == pytest.approx(0.15, rel=0.01)


def test_covariance_is_the_autocorrelation_of_the_kernel():
    n = _draw((4, 1, 512, 512), BINOMIAL, 1.0)
    for (dy, dx), expected in {(0, 1): 2 / 3, (0, 2): 1 / 6, (1, 1): 4 / 9, (0, 3): 0.0, (2, 1): 1 / 9}.items():
        assert (n * n.roll((dy, dx), (-2, -1))).mean().item() == pytest.approx(expected, abs=0.01)


def test_periodic_and_equal_to_a_sum_of_shifts():
    white = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    kernel = torch.rand(4, 3, dtype=torch.float64)  # an even side too
    expected = sum(kernel[i, j] * white.roll((1 - i, 1 - j), (-2, -1)) for i in range(4) for j in range(3))
    noise = correlated_noise(white.shape, 2.0, kernel, white=white)
    assert torch.allclose(noise, 2 * expected / kernel.square().sum().sqrt())


def test_one_tap_is_white_noise():
    white = torch.randn(1, 4, 4)
    assert torch.allclose(correlated_noise((1, 4, 4), 1.0, torch.full((1, 1), 3.0), white=white), white)


def test_sigma_may_differ_between_samples():
    noise = _draw((2, 1, 256, 256), BINOMIAL, torch.tensor([0.1, 0.2]).view(2, 1, 1, 1))
    assert noise.std((1, 2, 3)).tolist() == pytest.approx([0.1, 0.2], rel=0.03)


def test_repeatable():
    assert torch.equal(_draw((1, 8, 8), BINOMIAL), _draw((1, 8, 8), BINOMIAL))
    assert not torch.equal(_draw((1, 8, 8), BINOMIAL), _draw((1, 8, 8), BINOMIAL, seed=1))


def test_kernels_that_cannot_be_are_refused():
    with pytest.raises(BadSetting, match="does not fit"):
        _draw((1, 2, 8), BINOMIAL)
    with pytest.raises(BadSetting, match="zero"):
        _draw((1, 8, 8), BINOMIAL * 0)
