import pytest
import torch
from torch import nn

from sfumato.attacks import cross_entropy, cw_l2, fgsm, margin, margin_shift, mse, pgd
from sfumato.errors import BadSetting


def linear(n=2, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, d, generator=g, dtype=torch.float64)
    return weight, lambda x: x.flatten(1) @ weight.T


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()


def pictures(b=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, 3, 2, 2, generator=g, dtype=torch.float64), torch.randint(3, (b,), generator=g)


@pytest.mark.parametrize("init", ["uniform", "tiny"])
def test_linear_model_reaches_the_closed_form_in_linf(init):
    weight, model = linear()
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    objective = margin_shift(model(x))
    attacked = pgd(model, x, y, eps=0.1, objective=objective, init=init, clip=None, generator=torch.Generator().manual_seed(1))
    largest = 0.1 * (weight[0] - weight[1]).abs().sum()
    torch.testing.assert_close(objective(model(attacked), y), largest.expand(5), atol=1e-6, rtol=0)


def test_linear_model_reaches_the_closed_form_in_l2():
    weight, model = linear()
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    attacked = pgd(model, x, y, eps=0.1, steps=60, norm="l2", objective="margin", clip=None)
    gain = margin(model(attacked), y) - margin(model(x), y)
    torch.testing.assert_close(gain, (0.1 * (weight[0] - weight[1]).norm()).expand(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 7])
def test_stays_in_the_ball_and_the_range(norm, steps):
    x, y = pictures()
    attacked = pgd(net(), x, y, eps=0.3, steps=steps, step_size=0.2, norm=norm)
    change = (attacked - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= 0.3 + 1e-12
    assert size.min() > 0
    assert 0 <= attacked.min() < attacked.max() <= 1
    assert attacked.shape == x.shape
    assert not attacked.requires_grad


@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_it_climbs_and_leaves_the_model_alone(objective):
    model, (x, y) = net(), pictures()
    goal = {"ce": cross_entropy, "margin": margin}[objective]
    with torch.no_grad():  # as in an evaluation
        attacked = pgd(model, x, y, eps=0.1, objective=objective)
        assert (goal(model(attacked), y) > goal(model(x), y)).all()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_target_that_is_a_picture():
    x, _ = pictures()
    attacked = pgd(lambda v: v**2, x, x**2, eps=0.1, objective="mse", init="tiny")
    assert (mse(attacked**2, x**2) > 1e-3).all()


def test_restarts_keep_the_best_of_each_sample():
    model, (x, y) = net(), pictures()
    noise = 2 * torch.rand(3, *x.shape, dtype=torch.float64) - 1
    once = [margin(model(pgd(model, x, y, eps=0.2, steps=1, objective="margin", noise=n)), y) for n in noise]
    best = pgd(model, x, y, eps=0.2, steps=1, objective="margin", restarts=3, noise=noise)
    torch.testing.assert_close(margin(model(best), y), torch.stack(once).amax(0))
    assert len({int(i) for i in torch.stack(once).argmax(0)}) > 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_generator_determines_the_start(norm):
    model, (x, y) = net(), pictures()
    first, again, other = (
        pgd(model, x, y, eps=0.2, steps=0, norm=norm, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_starts():
    model, (x, y) = net(), pictures()
    assert torch.equal(pgd(model, x, y, eps=0.2, steps=0, init="zero"), x)
    assert 0 < (pgd(model, x, y, eps=0.2, steps=0, init="tiny", clip=None) - x).abs().max() <= 1e-3
    assert torch.equal(pgd(model, x, y, eps=0.0), x)
    stuck = pgd(model, x, y, eps=0.2, init="zero", objective=margin_shift(model(x).detach()))
    assert torch.equal(stuck, x), "a shift has no slope at x, and no NaN either"


def test_l2_starts_fill_the_ball():
    x = torch.full((4000, 3), 0.5, dtype=torch.float64)
    start = pgd(lambda v: v, x, None, eps=0.1, steps=0, norm="l2", generator=torch.Generator().manual_seed(0)) - x
    inside = (start.norm(dim=1) < 0.05).double().mean()
    assert inside.item() == pytest.approx(1 / 8, abs=0.02)


def test_fgsm_is_one_step_along_the_sign():
    weight, model = linear()
    x, y = torch.full((1, 6), 0.5, dtype=torch.float64), torch.tensor([0])
    torch.testing.assert_close(fgsm(model, x, y, eps=0.1), x + 0.1 * (weight[1] - weight[0]).sign())
    assert fgsm(model, x, y, eps=0.7).amax() == 1


def test_cw_finds_the_nearest_point_beyond_a_linear_boundary():
    weight, model = linear(seed=1)
    x = torch.full((1, 6), 0.5, dtype=torch.float64)
    y = model(x).argmax(1)
    attacked = cw_l2(model, x, y, c=5.0, steps=300, clip=(-3.0, 4.0))  # the range is not in the way
    assert model(attacked).argmax(1) != y
    distance = -margin(model(x), y) / (weight[0] - weight[1]).norm()
    assert distance.item() <= (attacked - x).norm().item() <= 1.1 * distance.item() + 1e-3
    assert torch.equal(cw_l2(model, x, y, c=1e-6, steps=5), x), "no success: the input itself"


def test_bad_settings_are_told():
    x, y = pictures()
    bad = [
        ({"norm": "l1"}, "linf or l2"),
        ({"init": "one"}, "uniform, zero or tiny"),
        ({"eps": -1}, "eps=-1"),
        ({"restarts": 0}, "0"),
    ]
    for settings, message in bad:
        with pytest.raises(BadSetting, match=message):
            pgd(net(), x, y, **{"eps": 0.1, **settings})
