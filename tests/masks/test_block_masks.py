import math

import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.masks import block_mask, random_mask


@pytest.mark.parametrize(("grid", "unit", "ratio"), [(14, 2, 0.6), ((4, 8), 2, 0.5), (6, 3, 0.3), (4, 4, 1.0), (4, 1, 0.25)])
def test_units_are_whole_and_counted_by_the_ceiling(grid, unit, ratio):
    mask = block_mask(5, grid, ratio, unit=unit, generator=torch.Generator().manual_seed(0))
    h, w = (grid, grid) if isinstance(grid, int) else grid
    units = mask.view(5, h // unit, unit, w // unit, unit).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(units.all(-1), units.any(-1))
    assert (units.all(-1).flatten(1).sum(1) == math.ceil(h * w / unit**2 * ratio)).all()


def test_unit_of_one_is_the_random_mask():
    noise = torch.rand(2, 16)
    assert torch.equal(block_mask(2, 4, 0.5, unit=1, noise=noise), random_mask(2, 4, 0.5, noise=noise))


def test_generator_decides():
    a, b = (block_mask(3, 8, 0.6, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


def test_units_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(BadSetting, match="divisor"):
        block_mask(1, 7, 0.5)
