import pytest
import torch

from sfumato.data import linear_teacher
from sfumato.errors import BadData, BadSetting


def test_variances():
    x, y, weight = linear_teacher(300, 400, snr=4.0, generator=torch.Generator().manual_seed(0))
    assert float(300 * x.var()) == pytest.approx(1, rel=0.02)
    assert float(weight.var()) == pytest.approx(4, rel=0.3)
    assert float((y - x @ weight).var()) == pytest.approx(1, rel=0.3)


def test_draws_may_be_given():
    weight, noise = torch.ones(5), torch.zeros(7)
    x, y, same = linear_teacher(5, 7, snr=1.0, weight=weight, noise=noise, dtype=torch.float32)
    assert same is weight
    torch.testing.assert_close(y, x.sum(1))
    again = linear_teacher(5, 7, snr=1.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.y, linear_teacher(5, 7, snr=1.0, generator=torch.Generator().manual_seed(3)).y)


def test_refusals():
    with pytest.raises(BadSetting, match="snr"):
        linear_teacher(5, 7, snr=0.0)
    with pytest.raises(BadData, match=r"noise \[7\]"):
        linear_teacher(5, 7, snr=1.0, noise=torch.zeros(5))
