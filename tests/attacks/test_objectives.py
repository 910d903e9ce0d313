import pytest
import torch
import torch.nn.functional as F

from sfumato.attacks import cross_entropy, kl_shift, margin, margin_shift, mse
from sfumato.attacks.objectives import as_objective
from sfumato.errors import BadSetting
from sfumato.losses import margins


def case(n=4):
    g = torch.Generator().manual_seed(0)
    clean, logits = (torch.randn(6, n, generator=g, dtype=torch.float64) for _ in range(2))
    return clean, logits, torch.randint(n, (6,), generator=g)


def test_one_number_a_sample_that_grows_as_the_model_gets_worse():
    clean, logits, y = case()
    for objective in (cross_entropy, margin, margin_shift(clean), kl_shift(clean)):
        assert objective(logits, y).shape == (6,)
    right = 20 * F.one_hot(y, 4).double()
    assert (cross_entropy(right, y) < cross_entropy(-right, y)).all()
    assert (margin(right, y) == -20).all()
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)
    assert mse(torch.ones(2, 3, 4), torch.zeros(2, 3, 4)).tolist() == [1, 1]


def test_shifts_measure_from_the_clean_prediction():
    clean, logits, y = case()
    assert (margin_shift(clean)(clean, y) == 0).all()
    torch.testing.assert_close(margin_shift(clean)(logits, y), (margins(logits, y) - margins(clean, y)).norm(dim=1))
    assert (margin_shift(clean)(logits + 3, y) - margin_shift(clean)(logits, y)).abs().max() < 1e-12
    p, q = clean.softmax(1), logits.softmax(1)
    torch.testing.assert_close(kl_shift(clean)(logits, None), (p * (p / q).log()).sum(1))


@pytest.mark.parametrize("objective", [cross_entropy, margin, margin_shift(case()[0]), kl_shift(case()[0])])
def test_gradients(objective):
    _, logits, y = case()
    assert torch.autograd.gradcheck(lambda h: objective(h, y), logits.requires_grad_())


def test_names():
    assert as_objective("ce") is cross_entropy
    assert as_objective(mse) is mse
    with pytest.raises(BadSetting, match="did you mean margin"):
        as_objective("margn")
