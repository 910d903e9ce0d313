import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from sfumato.data import box_rows, center_heatmap, jitter_boxes, pad_boxes, resized_crops
from sfumato.errors import BadData, BadSetting

RAGGED = [torch.tensor([[1.0, 2.0, 5.0, 8.0]]), torch.empty(0, 4), torch.tensor([[0.0, 0.0, 3.0, 3.0], [2.0, 1.0, 9.0, 4.0]])]


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_padded_boxes_and_rows():
    padded = pad_boxes(RAGGED)
    assert padded.shape == (3, 2, 4)
    assert padded.isnan().any(-1).sum() == 3
    rows = box_rows(padded)
    assert rows[:, 0].tolist() == [0, 2, 2]
    assert torch.equal(rows[:, 1:], torch.cat(RAGGED))
    assert torch.equal(box_rows(RAGGED), rows)
    assert box_rows(rows) is rows
    assert pad_boxes(RAGGED, length=5).shape == (3, 5, 4)
    assert box_rows(pad_boxes([torch.empty(0, 4)] * 2)).shape == (0, 5)


def test_bad_boxes_are_refused():
    with pytest.raises(BadData, match="more than length=1"):
        pad_boxes(RAGGED, length=1)
    with pytest.raises(BadData, match="no image"):
        pad_boxes([])
    with pytest.raises(BadData, match=r"\[B, n, 4\]"):
        box_rows(torch.zeros(3, 4))
    with pytest.raises(BadSetting, match="'scale' or 'iou'"):
        jitter_boxes(torch.zeros(1, 4), (8, 8), mode="sale")


def test_crops_of_whole_pixels_are_the_pixels():
    x = torch.rand(3, 3, 12, 12, generator=g())
    boxes = [torch.tensor([[2.0, 3.0, 6.0, 11.0]]), torch.empty(0, 4), torch.tensor([[4.0, 4.0, 12.0, 8.0]])]
    torch.testing.assert_close(resized_crops(x, boxes[:2], (8, 4))[0], x[0, :, 3:11, 2:6])
    shrunk = resized_crops(x, boxes, (4, 4))  # antialiased: means of whole cells
    torch.testing.assert_close(shrunk[1], F.avg_pool2d(x[2, :, 4:8, 4:12], (1, 2)))
    assert resized_crops(x, [torch.empty(0, 4)] * 3, (4, 4)).shape == (0, 3, 4, 4)


def test_crops_of_degenerate_boxes_are_finite():
    crops = resized_crops(torch.rand(1, 1, 8, 8), [torch.tensor([[3.0, 3.0, 3.0, 2.0]])], (4, 4))
    assert crops.isfinite().all()


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
