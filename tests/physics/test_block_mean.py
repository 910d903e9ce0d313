import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadData, BadSetting
from sfumato.physics import BlockMean


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_rows_are_orthonormal_and_the_adjoint_is_one(factor):
    physics, x = BlockMean(factor), torch.randn(2, 3, 6, 12, dtype=torch.float64)
    m = torch.randn(2, 3, 6 // factor, 12 // factor, dtype=torch.float64)
    assert torch.allclose(physics.A(physics.A_adjoint(m)), m)
    assert torch.allclose((physics.A(x) * m).sum(), (x * physics.A_adjoint(m)).sum())
    assert torch.allclose(physics(x) / factor, F.avg_pool2d(x, factor))
    assert torch.allclose(physics.A_dagger(physics(x)), physics.A_adjoint(physics(x)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadData, match="multiples of 3"):
        BlockMean(3).A(torch.rand(1, 1, 6, 7))
    with pytest.raises(BadSetting, match="factor=0"):
        BlockMean(0)
