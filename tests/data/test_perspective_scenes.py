import pytest
import torch

from sfumato.data import Batch, digits, open_data, perspective_scenes
from sfumato.data.perspective_scenes import HEIGHTS
from sfumato.errors import BadSetting


def g(seed=0):
    return torch.Generator().manual_seed(seed)


FRAMES = perspective_scenes(64, generator=g())


def test_a_pinhole_camera_made_them():
    there = FRAMES.boxes.isfinite().all(-1)
    assert torch.equal(there, FRAMES.target.isfinite().all(-1))
    assert there.sum(1).min() >= 1
    assert there.sum(1).max() <= 5
    boxes, (z, seen) = FRAMES.boxes[there], FRAMES.target[there].unbind(1)
    height = boxes[:, 3] - boxes[:, 1]
    torch.testing.assert_close(height, boxes[:, 2] - boxes[:, 0], atol=1e-4, rtol=0)
    true = height * z / 72  # metres: one of the ten heights
    assert (true[:, None] - torch.tensor(HEIGHTS)).abs().amin(1).max() < 1e-3
    assert (z >= 4 - 1e-4).all()
    assert (z <= 20 + 1e-4).all()
    assert height.min() >= 6 - 1e-4
    assert height.max() <= 30 + 1e-4
    assert boxes.min() >= 0
    assert boxes.max() <= 64
    assert (seen >= 0.2).all()
    assert (seen <= 1 + 1e-5).all()


def test_near_objects_stand_before_far_ones():
    z = FRAMES.target[..., 0]
    for row in z:
        known = row[row.isfinite()]
        assert (known.diff() <= 0).all()
    hidden = FRAMES.target[..., 1] < 0.95
    nearest = z.nan_to_num(torch.inf).argmin(1)
    assert hidden.any()
    assert not hidden[torch.arange(64), nearest].any()  # nothing is before the nearest


def test_an_object_is_a_digit_in_its_box():
    frame = perspective_scenes(8, objects=(1, 1), noise=0.0, generator=g())
    ground = perspective_scenes(8, objects=(1, 1), noise=0.0, seen=1.0, generator=g())
    assert torch.equal(frame.x, ground.x)
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for image, (x1, y1, x2, y2) in zip(frame.x, frame.boxes[:, 0], strict=True):
        inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
        assert image.mean(0)[inside].max() > image.mean(0)[~inside].max()


def test_train_and_test_share_no_digit():
    train, test = digits()
    assert not (train.x.flatten(1)[:, None] == test.x.flatten(1)[None, :50]).all(-1).any()
    assert not torch.equal(perspective_scenes(2, generator=g()).x, perspective_scenes(2, split="test", generator=g()).x)


def test_settings_that_fit_nothing():
    with pytest.raises(BadSetting, match="objects"):
        perspective_scenes(1, objects=(0, 2))
    with pytest.raises(BadSetting, match="no height"):
        perspective_scenes(1, distance=(50.0, 60.0))


def test_as_a_sample():
    train, test = open_data("sample:scenes"), open_data("sample:scenes", "test")
    assert (len(train), len(test)) == (512, 150)
    assert train.facts.fields == ("x", "index", "target", "boxes")
    assert str(train) == "512 images, boxed objects, 64x64"
    batch = train.gather(torch.tensor([3, 1]))
    one = train[3]
    assert torch.equal(batch.boxes[0].nan_to_num(-1), one.boxes.nan_to_num(-1))
    assert torch.equal(train.select([3]).tensors().boxes.nan_to_num(-1), batch.boxes[:1].nan_to_num(-1))
    assert torch.equal(open_data(batch).tensors().boxes.nan_to_num(-1), batch.boxes.nan_to_num(-1))
    assert isinstance(batch.to("cpu"), Batch)
    assert open_data("sample:scenes", channels=1).tensors().boxes.shape == (512, 5, 4)
