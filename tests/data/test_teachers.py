import pytest
import torch

from sfumato.data import single_index
from sfumato.errors import BadData, BadSetting


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_scales_of_inputs_and_labels():
    x, y, beta = single_index(20, 20_000, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(20).double() / 20, rtol=0, atol=0.003)
    ratio = float(beta @ beta) / 20
    assert float(y.mean()) == pytest.approx(ratio / 2, rel=0.05)
    assert float(y.var()) == pytest.approx(ratio**2 / 2, rel=0.1)


def test_degrees_and_draws():
    white = torch.randn(50, 6, generator=seeded(1))
    beta = torch.randn(6, generator=seeded(2))
    for degree, factor in ((1, 1), (2, 2), (3, 6)):
        x, y, same = single_index(6, 50, degree=degree, beta=beta, white=white)
        assert torch.equal(same, beta)
        torch.testing.assert_close(x, white / 6**0.5)
        torch.testing.assert_close(y, (x @ beta) ** degree / factor)
    first, again, other = (single_index(6, 9, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    held_out = single_index(6, 9, beta=first.beta, generator=seeded(5))
    torch.testing.assert_close(held_out.y, (held_out.x @ first.beta) ** 2 / 2)


def test_refusals():
    with pytest.raises(BadSetting, match="at least 1"):
        single_index(3, 4, degree=0)
    with pytest.raises(BadData, match=r"beta is \[3\]"):
        single_index(3, 4, beta=torch.ones(4))
    with pytest.raises(BadData, match=r"white \[4, 3\]"):
        single_index(3, 4, white=torch.ones(3, 4))
