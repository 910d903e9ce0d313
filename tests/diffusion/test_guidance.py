import math

import pytest
import torch

from sfumato.diffusion import Schedule, beta_schedule, classifier_free_guidance, convert, drop_condition, sample_ddim
from sfumato.nn import small_unet

SCHEDULE = Schedule(beta_schedule("linear"))


def _net():
    torch.manual_seed(0)
    return small_unet(8, 1, width=8, mults=(1, 2), classes=4, null_class=True).double().eval()


def _noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 4.0])
def test_it_is_the_rule_with_the_halves_computed_apart(scale):
    net, x, t, cond = _net(), _noise(3, 1, 8, 8), torch.tensor([5, 400, 990]), torch.tensor([0, 3, 2])
    null = torch.tensor([4])
    with torch.no_grad():
        found = classifier_free_guidance(net, cond, null, scale=scale)(x, t)
        told, untold = net(x, t, cond).sample, net(x, t, null.expand(3)).sample
    assert torch.allclose(found, untold + scale * (told - untold), atol=1e-12)
    assert (told - untold).abs().max() > 1e-3


@pytest.mark.parametrize("target", ["x0", "v", "score"])
def test_guided_noise_is_guided_anything(target):
    x, t, cond, null = _noise(2, 1, 8, 8), torch.tensor([30, 700]), torch.tensor([1.0, 2.0]), torch.tensor([0.0])
    eps = lambda x, t, c: c.view(-1, 1, 1, 1) * x.sin()  # noqa: E731
    other = lambda x, t, c: convert(eps(x, t, c), x, t, SCHEDULE, source="eps", target=target)  # noqa: E731
    a = convert(classifier_free_guidance(eps, cond, null, scale=2.5)(x, t), x, t, SCHEDULE, source="eps", target=target)
    assert torch.allclose(a, classifier_free_guidance(other, cond, null, scale=2.5)(x, t), atol=1e-9)


def test_one_pass_where_one_is_enough():
    calls = []
    net = lambda x, t, c: calls.append(len(x)) or x  # noqa: E731
    for scale in (0.0, 1.0, 2.0):
        classifier_free_guidance(net, torch.tensor([1, 2]), torch.tensor([0]), scale=scale)(
            torch.ones(2, 1), torch.tensor([1, 1])
        )
    classifier_free_guidance(net, torch.tensor([1, 2]), None, scale=2.0)(torch.ones(2, 1), torch.tensor([1, 1]))
    assert calls == [2, 2, 4, 2]


def test_guided_samples_of_normals_lie_where_the_guided_score_says():
    """Classes N(m, 1) among all N(0, s²), so that the guided flow is affine."""
    m, s, scale = 1.0, 2.0, 3.0

    def eps(x, t, c):
        abar = SCHEDULE.abar[t].view(-1, 1)
        mean, var = (c * m).view(-1, 1), torch.where(c > 0, 1.0, s**2).view(-1, 1)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * var + 1 - abar)

    x = _noise(4001, 1)
    x[0] = 0  # the flow is affine: the mean goes where this point goes
    drawn = sample_ddim(classifier_free_guidance(eps, torch.ones(4001), torch.zeros(1), scale=scale), x, SCHEDULE, steps=1000)
    middle, spread = drawn[0].item(), drawn[1:].std().item()
    assert drawn[1:].mean().item() == pytest.approx(middle, abs=4 * spread / math.sqrt(4000))
    assert middle > 1.2 * m  # beyond the class, away from the middle of all
    assert spread < 0.9  # and less diverse than the class


def test_conditions_are_dropped_at_their_rate_and_by_the_generator():
    cond, null = torch.arange(20_000), torch.tensor([-1])
    a, b = (drop_condition(cond, null, 0.1, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert (a < 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(a[a >= 0], cond[a >= 0])
    text = drop_condition(torch.ones(100, 3, 2), torch.zeros(1, 3, 2), 0.5, generator=torch.Generator().manual_seed(0))
    assert set(text.flatten(1).sum(1).tolist()) == {0.0, 6.0}
