from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.losses import denormalize_patches, masked_l1, masked_mean, masked_patch_mse, normalize_patches, weighted_l1
from sfumato.masks import random_mask
from sfumato.nn import patchify

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "mae-base.npz").items()}


def case(b=2, n=6, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(b, n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return pred, target, random_mask(b, n, 0.5, generator=g)[:, :n]


@pytest.mark.parametrize(("norm", "name"), [(True, "loss_norm"), (False, "loss_raw")])
def test_official_loss(norm, name):
    target = patchify(VECTORS["images"], int(VECTORS["patch"]))
    loss = masked_patch_mse(VECTORS["pred"], target, VECTORS["mask"].bool(), norm=norm)
    assert loss.item() == pytest.approx(VECTORS[name].item(), abs=1e-9)


def test_visible_patches_do_not_count_and_have_no_gradient():
    pred, target, hidden = case()
    pred.requires_grad_()
    loss = masked_patch_mse(pred, target, hidden)
    changed = torch.where(hidden[..., None], pred, pred + 7)
    assert torch.equal(masked_patch_mse(changed, target, hidden), loss)
    (grad,) = torch.autograd.grad(loss, pred)
    assert (grad[~hidden] == 0).all()
    assert (grad[hidden] != 0).all()


def test_loss_gradients():
    pred, target, hidden = case()
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_patch_mse(p, target, hidden), pred)
    weight = torch.rand(2, 6, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: masked_mean(p, hidden[..., None], weight=weight), pred)
    assert torch.autograd.gradcheck(lambda t: normalize_patches(t), pred)


def test_per_patch_values_average_to_the_loss():
    pred, target, hidden = case()
    each = masked_patch_mse(pred, target, hidden, reduction="none")
    assert each.shape == (2, 6)
    assert (each[~hidden] == 0).all()
    assert torch.allclose(each[hidden].mean(), masked_patch_mse(pred, target, hidden))


def test_normalised_patches_have_mean_zero_and_unbiased_variance_one():
    t = torch.rand(3, 4, 48, dtype=torch.float64)
    z = normalize_patches(t)
    assert z.mean(-1).abs().max() < 1e-6
    assert (z.var(-1) - 1).abs().max() < 1e-4
    assert torch.allclose(denormalize_patches(z, t), t, atol=1e-12)
    assert torch.allclose(denormalize_patches(z, 2 * t + 1), 2 * t + 1, atol=1e-5)  # by the statistics of what it is given


def test_a_flat_patch_becomes_zero_with_a_finite_gradient():
    t = torch.full((1, 1, 12), 0.7, requires_grad=True)
    z = normalize_patches(t)
    assert z.abs().max() < 1e-3
    assert torch.autograd.grad(z.square().sum(), t)[0].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), low=st.floats(0.1, 2))
def test_masked_means_are_ratios_of_sums(seed, low):
    pred, target, hidden = case(seed=seed)
    weight = torch.rand_like(pred) + low
    h = hidden[..., None]
    assert torch.allclose(masked_mean(pred, h, weight=weight), (pred * weight * h).sum() / (weight * h).sum())
    assert torch.allclose(masked_l1(pred, target, h), (pred - target)[hidden].abs().mean())
    both = weighted_l1(pred, target, 10.0 * h + 0.0 * ~h)
    assert torch.allclose(both, 10 * (pred - target)[hidden].abs().sum() / pred.numel())


def test_masked_l1_over_pixels_counts_channels():
    pred, target = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    hidden = torch.tensor([[[[True, False], [False, False]]]])
    assert masked_l1(pred, 2 * target, hidden).item() == 2


def test_nothing_hidden_gives_zero_and_values_that_do_not_count_may_be_anything():
    pred = torch.tensor([[float("nan"), 2.0]], requires_grad=True)
    loss = masked_mean(pred, torch.tensor([[False, True]]))
    assert loss.item() == 2
    assert torch.autograd.grad(loss, pred)[0].tolist() == [[0, 1]]
    assert masked_mean(pred.detach(), torch.zeros(1, 2, dtype=torch.bool)).item() == 0
