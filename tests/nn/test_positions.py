from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.nn import RelativePositionBias, sincos_2d

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "mae-base.npz")


def test_official_codes():
    codes = sincos_2d(int(VECTORS["sincos_dim"]), int(VECTORS["sincos_grid"]), cls=True, dtype=torch.float64)
    assert torch.allclose(codes, torch.from_numpy(VECTORS["sincos"]), atol=1e-6)


def test_first_row_norms_and_class_row():
    codes = sincos_2d(16, (3, 5), cls=True, dtype=torch.float64)
    assert codes.shape == (16, 16)
    assert (codes[0] == 0).all()
    assert codes[1].tolist() == ([0] * 4 + [1] * 4) * 2
    assert torch.allclose(codes[1:].square().sum(1), torch.full((15,), 8.0).double())


def test_column_first_and_grids_nest():
    codes = sincos_2d(8, (2, 3)).view(2, 3, 8)
    assert torch.equal(codes[0, 1, :4], codes[1, 1, :4])  # the column's half does not see the row
    assert torch.equal(codes[1, 0, 4:], codes[1, 2, 4:])
    assert torch.equal(sincos_2d(8, (5, 7)).view(5, 7, 8)[:2, :3], codes)


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(BadSetting, match="multiple of 4"):
        sincos_2d(6, 4)


def test_relative_bias_depends_on_the_offset_only():
    bias = RelativePositionBias((3, 4), heads=2, cls=False)()
    assert bias.shape == (1, 2, 12, 12)
    at = bias[0].view(2, 3, 4, 3, 4)
    assert torch.equal(at[:, 0, 0, 1, 2], at[:, 1, 1, 2, 3])
    assert len(bias[0, 0].unique()) == 5 * 7


def test_relative_bias_of_visible_tokens_is_a_submatrix():
    module = RelativePositionBias(3, heads=2)
    ids = torch.tensor([[0, 4], [2, 8]])
    rows = torch.tensor([0, 3, 9])
    assert torch.equal(module(ids=ids)[1], module()[0][:, rows[:, None], rows])


def test_relative_bias_is_timms():
    from timm.layers import RelPosBias

    ours, theirs = RelativePositionBias((3, 4), heads=2), RelPosBias((3, 4), 2, prefix_tokens=1)
    with torch.no_grad():
        theirs.relative_position_bias_table.copy_(ours.table)
    # the two name the three entries of the class token in another order; offsets between patches agree
    assert torch.equal(ours()[..., 1:, 1:], theirs.get_bias()[..., 1:, 1:])


def test_relative_bias_on_another_grid_keeps_its_extremes():
    module = RelativePositionBias(3, heads=2)
    other = module(grid=(5, 6))
    assert other.shape == (1, 2, 31, 31)
    assert torch.allclose(other[..., 1, -1], module()[..., 1, -1], atol=1e-6)
    assert torch.allclose(other[..., 0, 0], module()[..., 0, 0])
