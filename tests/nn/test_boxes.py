import math

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadData
from sfumato.nn import box_geometry, box_rows, pad_boxes, pixels_in_boxes, resized_crops

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


def test_pixels_are_in_the_box_that_holds_their_centre():
    inside = pixels_in_boxes(torch.tensor([[[1.4, 0.0, 3.6, 2.0], [torch.nan] * 4, [2.0, 1.0, 2.4, 9.0]]]), (3, 5))
    assert inside[0].sum((1, 2)).tolist() == [6, 0, 0]
    assert inside[0, 0, :2, 1:4].all()


def test_the_geometry_of_a_box():
    found = box_geometry(torch.tensor([[10.0, 20.0, 30.0, 20.0]]), (40, 80))
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.5, math.log(0.25), math.log(1 / 40)]]))  # a side of 0 counts as 1
