from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData
from sfumato.losses import masked_object_focal, masked_object_mse, object_cells, object_pixels, object_weights
from sfumato.masks import mask_from_scores

V = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "masked-object-modeling.npz").items()}


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def official():
    """Mask and predictions of all cells, as the official code drew them."""
    hidden = mask_from_scores(V["mask_noise"], ratio=V["mask_ratio"].item(), largest=False, rule="hide_floor")
    pred = torch.zeros(4, 16, 75)
    for index, values in ((V["masked_idx"], V["pred"]), (V["visible_idx"], V["pred_visible"])):
        pred.scatter_(1, index[..., None].expand(-1, -1, 75), values)
    return pred, hidden


def test_official_loss_and_mask():
    pred, hidden = official()
    assert torch.equal(hidden, torch.zeros(4, 16, dtype=torch.bool).scatter(1, V["masked_idx"], True))
    settings = {"weights": V["weights"]}
    assert masked_object_mse(pred, V["crops"], hidden, 4, **settings).item() == pytest.approx(V["mom_loss"].item(), rel=1e-5)
    visible = 1e-3 * masked_object_mse(pred, V["crops"], ~hidden, 4, **settings).item()
    assert visible == pytest.approx(V["mom_loss_visible"].item(), rel=1e-5)
    normed = masked_object_mse(pred, V["crops"], hidden, 4, norm_pix=True, **settings).item()
    assert normed == pytest.approx(V["mom_loss_normpix"].item(), rel=1e-5)


def test_official_focal_loss():
    order = torch.cat((V["masked_idx"], V["visible_idx"]), 1)[..., None].expand(-1, -1, 75)  # hidden cells came as drawn
    crops = object_pixels(object_cells(V["crops"], 4).gather(1, order), 4, (20, 20))
    pred, hidden = torch.cat((V["pred"], V["pred_visible"]), 1), torch.zeros(4, 16, dtype=torch.bool)
    hidden[:, :8] = True
    assert masked_object_focal(pred, crops, hidden, 4).item() == pytest.approx(V["focal_freq"].item(), rel=1e-5)
    only = masked_object_focal(pred, crops, hidden, 4, weights=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert 0 < only < 1
    assert masked_object_focal(object_cells(crops, 4), crops, hidden, 4) == 0
    assert masked_object_focal(pred, crops, torch.zeros_like(hidden), 4) == 0
    hidden[0, 0] = False
    with pytest.raises(BadData, match="unlike numbers"):
        masked_object_focal(pred, crops, hidden, 4)


def test_official_weights():
    side = torch.where(V["big_enough"], 30.0, 10.0)
    rows = torch.stack((torch.zeros(4), torch.zeros(4), torch.zeros(4), side, torch.full((4,), 40.0)), 1)
    assert torch.equal(object_weights(V["crops"], rows), V["weights"])
    softer = object_weights(V["crops"], rows, weight_dark=0.5, weight_small=0.25)
    assert softer.tolist() == [0.5, 1, 1, 0.25]
    degenerate = rows.clone()
    degenerate[1, 3] = 0.5
    assert object_weights(V["crops"], degenerate, min_box=0, min_brightness=0).tolist() == [1, 0, 1, 1]


def test_cells_are_those_of_the_crop():
    crops = torch.rand(2, 3, 8, 12, generator=g())
    cells = object_cells(crops, (4, 3))
    assert cells.shape == (2, 12, 3 * 2 * 4)
    assert torch.equal(cells[1, 2 * 3 + 1], crops[1, :, 4:6, 4:8].flatten())
    assert torch.equal(object_pixels(cells, (4, 3), (8, 12)), crops)
    with pytest.raises(BadData, match="multiples"):
        object_cells(crops, (3, 3))


def test_loss_of_known_predictions():
    crops, hidden = torch.rand(3, 3, 8, 8, generator=g(), dtype=torch.float64), torch.rand(3, 16, generator=g()) < 0.5
    cells = object_cells(crops, 4)
    assert masked_object_mse(cells, crops, hidden, 4) == 0
    means = cells.mean(-1, keepdim=True).expand_as(cells)
    expected = cells.var(-1, unbiased=False)[hidden].mean()
    torch.testing.assert_close(masked_object_mse(means, crops, hidden, 4), expected)
    assert masked_object_mse(means, crops, torch.zeros_like(hidden), 4) == 0  # an empty set
    assert masked_object_mse(means, torch.ones_like(crops), hidden, 4, norm_pix=True).isfinite()


def test_objects_without_weight_have_no_loss_and_no_gradient():
    crops = torch.rand(3, 3, 8, 8, generator=g())
    pred = torch.rand(3, 16, 12, generator=g(1), requires_grad=True)
    hidden = torch.ones(3, 16, dtype=torch.bool)
    (grad,) = torch.autograd.grad(masked_object_mse(pred, crops, hidden, 4, weights=torch.tensor([0.0, 1.0, 0.0])), pred)
    assert (grad[[0, 2]] == 0).all()
    assert (grad[1] != 0).all()
    assert masked_object_mse(pred, crops, hidden, 4, weights=torch.zeros(3)) == 0
