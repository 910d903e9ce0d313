import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from sfumato.data import center_heatmap, cover_boxes, flip_boxes, jitter_boxes
from sfumato.errors import BadData, BadSetting
from sfumato.nn import box_rows, pad_boxes


def g(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_iou_jitter_keeps_the_overlap(iou, seed):
    boxes = torch.tensor([[100.0, 100.0, 160.0, 120.0]], dtype=torch.float64).repeat(50, 1)
    moved = jitter_boxes(boxes, (1000, 1000), mode="iou", iou=iou, generator=g(seed))
    assert (box_iou(moved, boxes).diagonal() >= iou - 1e-9).all()
    if iou < 0.9:
        assert not torch.equal(moved, boxes)


def test_scale_jitter_and_the_border():
    boxes = pad_boxes([torch.tensor([[10.0, 10.0, 30.0, 50.0], [0.0, 0.0, 60.0, 60.0]]), torch.tensor([[5.0, 5.0, 9.0, 9.0]])])
    moved = jitter_boxes(boxes.expand(200, 2, 2, 4), (60, 60), generator=g())
    assert torch.equal(moved.isnan(), boxes.isnan().expand_as(moved))
    side = (moved[..., 2:] - moved[..., :2])[:, 0, 0]
    assert (side / torch.tensor([20.0, 40.0])).aminmax(dim=0).min.min() >= 0.9 - 1e-5
    assert (side / torch.tensor([20.0, 40.0])).max() <= 1.1 + 1e-5
    centre = (moved[:, 0, 0, :2] + moved[:, 0, 0, 2:]) / 2 - torch.tensor([20.0, 30.0])
    assert centre.min() >= -1e-5
    assert centre.max() <= 0.6 + 1e-5
    assert moved.nan_to_num(0).max() <= 60
    assert torch.equal(moved.nan_to_num(0), jitter_boxes(boxes.expand(200, 2, 2, 4), (60, 60), generator=g()).nan_to_num(0))


def test_heatmap():
    boxes = [torch.tensor([[8.0, 10.0, 12.0, 14.0], [9.0, 10.0, 15.0, 14.0], [-3.0, -3.0, 1.0, 1.0]]), torch.empty(0, 4)]
    heat = center_heatmap(boxes, (24, 30))
    assert heat.shape == (2, 1, 24, 30)
    assert (heat[1] == 0).all()
    assert heat[0, 0, 12, 10] == 1  # centres (10, 12), (12, 12) and one outside, (-1, -1)
    assert heat[0, 0, 12, 12] == 1
    assert heat[0, 0, 12, 11].item() == pytest.approx(math.exp(-1 / 8))  # the larger, not the sum
    assert heat[0, 0, 0, 0].item() == pytest.approx(math.exp(-2 / 8))
    assert heat[0, 0, 12, 19] == 0  # 7 pixels away: outside of the square of 13
    assert heat[0, 0, 12, 18].item() == pytest.approx(math.exp(-36 / 8))
    assert torch.equal(center_heatmap(pad_boxes(boxes), (24, 30)), heat)
    with pytest.raises(BadData, match="do not tell how many images"):
        center_heatmap(box_rows(boxes), (24, 30))


def test_an_unknown_jitter_is_refused():
    with pytest.raises(BadSetting, match="'scale' or 'iou'"):
        jitter_boxes(torch.zeros(1, 4), (8, 8), mode="sale")


def test_flipped_boxes():
    boxes = torch.tensor([[1.0, 2.0, 5.0, 8.0], [torch.nan] * 4])
    assert flip_boxes(boxes, 20)[0].tolist() == [15, 2, 19, 8]
    assert torch.equal(flip_boxes(flip_boxes(boxes, 20), 20)[0], boxes[0])
    assert flip_boxes(boxes, 20)[1].isnan().all()


def test_covering_hides_a_share_of_every_box():
    x = torch.zeros(4, 3, 64, 64)
    boxes = torch.tensor([10.0, 20.0, 30.0, 50.0]).expand(4, 6, 4).contiguous()
    boxes[:, 1:] = torch.nan
    covered = cover_boxes(x, boxes, 0.4, generator=g())
    inside = covered[:, 0, 20:50, 10:30] == 0.5
    assert (inside.float().mean((1, 2)) - 0.4).abs().max() < 1e-6
    assert torch.equal(covered[:, 0].sum((1, 2)), inside.sum((1, 2)) * 0.5)
    assert torch.equal(covered, cover_boxes(x, boxes, 0.4, generator=g()))
    assert (cover_boxes(x, boxes, 0.4, value=0.25, generator=g()) == covered / 2).all()
    assert torch.equal(cover_boxes(x, boxes[:, :0], 0.4), x)
