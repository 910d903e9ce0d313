import pytest
import torch

from sfumato.errors import BadData
from sfumato.nn import RoITokens


def test_a_linear_field_is_read_at_the_middle_of_every_cell():
    """Features = the image's x at their middle: a cell's sample is the x of the cell's own middle."""
    stride, size = 4, (32, 48)
    x = (torch.arange(12, dtype=torch.float64) + 0.5) * stride
    features = x.expand(2, 1, 8, 12)
    cut = RoITokens(1, 4, grid=(2, 4), hidden=3).double()
    boxes = [torch.empty(0, 4), torch.tensor([[8.0, 6.0, 40.0, 26.0], [10.0, 10.0, 18.0, 20.0]], dtype=torch.float64)]
    seen = cut.sample(features, boxes, size)
    assert seen.shape == (2, 1, 2, 4)
    for k, (x1, _, x2, _) in enumerate(boxes[1]):
        middle = x1 + (torch.arange(4, dtype=torch.float64) + 0.5) * (x2 - x1) / 4
        torch.testing.assert_close(seen[k, 0], middle.expand(2, 4), atol=1e-5, rtol=0)
    shifted = RoITokens(1, 4, grid=(2, 4), hidden=3, aligned=False).double().sample(features, boxes, size)
    torch.testing.assert_close(shifted, seen + stride / 2)  # half a pixel of the features


def test_an_image_without_boxes_leaves_the_others_alone():
    cut, features = RoITokens(5, 6, grid=3, hidden=4), torch.rand(3, 5, 8, 8)
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.empty(0, 4), torch.tensor([[4.0, 4.0, 30.0, 20.0]])]
    tokens = cut(features, boxes, (32, 32))
    assert tokens.shape == (2, 9, 6)
    torch.testing.assert_close(tokens[1:], cut(features[2:], boxes[2:], (32, 32)))
    assert cut(features, [torch.empty(0, 4)] * 3, (32, 32)).shape == (0, 9, 6)


def test_features_of_another_image_are_refused():
    with pytest.raises(BadData, match="boxes are in pixels of the image"):
        RoITokens(1, 4)(torch.rand(1, 1, 8, 8), [torch.ones(1, 4)], (32, 64))
