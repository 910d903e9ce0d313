import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.losses import nonnegative_score_matching


def exponential(n, rate=2.0, columns=3):
    g = torch.Generator().manual_seed(0)
    return -torch.rand(n, columns, generator=g, dtype=torch.float64).clamp(min=1e-300).log() / rate


def test_the_formula_on_a_score_whose_derivative_is_known():
    x = exponential(50)
    value = nonnegative_score_matching(lambda x: -(x**2), x, reduction="none")
    expected = (0.5 * x**6 - 2 * x**3 - 2 * x**3).sum(1)  # (x s)² / 2 + 2 x s + x² s'
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(nonnegative_score_matching(lambda x: -(x**2), x), expected.mean())


def test_it_is_the_explicit_error_up_to_a_constant():
    """Exponential data, score -2: the difference to E |x s - x (-2)|² / 2 is the same for every model."""
    x = exponential(100_000, columns=1)

    def constant(model):
        explicit = (x * (model(x) + 2)).square().sum(1).mean() / 2
        return (nonnegative_score_matching(model, x) - explicit).item()

    found = [constant(model) for model in (lambda x: 0 * x - 1, lambda x: 0 * x - 4, lambda x: -x - 1, lambda x: 1 / (1 + x))]
    assert found == pytest.approx([-1.0] * 4, abs=0.03)  # -E (2 x)² / 2


def test_a_rate_is_learned():
    x, rate = exponential(5_000), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([rate], 0.2)
    for _ in range(60):
        optimizer.zero_grad()
        nonnegative_score_matching(lambda x: 0 * x - rate, x).backward()
        optimizer.step()
    assert rate.item() == pytest.approx(2.0, rel=0.05)


def test_gradients_probes_and_modes():
    x = exponential(4) + 0.1
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def loss(weight, **over):
        signs = torch.tensor([[1.0, 1, 1], [1, -1, 1]]).view(2, 1, 3).expand(2, 4, 3)
        return nonnegative_score_matching(lambda x: torch.tanh(x @ weight), x, noise=signs, **over)

    assert torch.autograd.gradcheck(loss, (weight,))
    torch.testing.assert_close(loss(weight), loss(weight, method="vjp"))
    a, b, c = (
        nonnegative_score_matching(lambda x: torch.tanh(x @ weight), x, probes=2, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 3)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    with pytest.raises(BadSetting, match="mean or none"):
        loss(weight, reduction="sum")
