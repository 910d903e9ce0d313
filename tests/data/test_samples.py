import pytest
import torch
import torch.nn.functional as F

from sfumato.data import digits, faces, moving_crops, photo_crops, photo_names, photos
from sfumato.errors import BadSetting


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_photos_are_uint8_colour_and_the_splits_share_none():
    train, test, both = photos("train"), photos("test"), photos("all")
    assert (len(train), len(test), len(both)) == (7, 3, 10)
    assert all(p.dtype == torch.uint8 and p.shape[0] == 3 and min(p.shape[1:]) >= 300 for p in both)
    assert not set(photo_names("train")) & set(photo_names("test"))
    assert torch.equal(both[6][0], both[6][2])  # camera: grey, repeated
    with pytest.raises(BadSetting, match="'train', 'test' or 'all'"):
        photos("val")


def test_photos_given_out_do_not_share_memory_with_later_ones():
    photos("test")[0].zero_()
    assert photos("test")[0].any()


@pytest.mark.parametrize("gray", [False, True])
def test_every_crop_is_a_window_of_a_photograph_of_its_split(gray):
    crops = photo_crops(20, 24, split="test", gray=gray, generator=seeded())
    assert crops.shape == (20, 1 if gray else 3, 24, 24)
    weights = torch.tensor([0.299, 0.587, 0.114])
    for crop in crops:
        found = False
        for photo in photos("test"):
            pixels = photo / 255.0
            pixels = torch.einsum("chw,c->hw", pixels, weights)[None] if gray else pixels
            corners = (pixels[:, :-23, :-23] - crop[:, :1, :1]).abs().amax(0) < 1e-5
            for y, x in corners.nonzero().tolist():
                found = found or torch.allclose(pixels[:, y : y + 24, x : x + 24], crop, atol=1e-5)
        assert found


def test_crops_are_reproducible_spread_over_photos_and_in_range():
    a, b = (photo_crops(200, 16, generator=seeded(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, photo_crops(200, 16, generator=seeded(2)))
    assert 0 <= a.min() < 0.05
    assert 0.95 < a.max() <= 1
    assert len({round(float(c.mean()), 4) for c in a}) > 150


def test_crops_that_do_not_fit_are_refused():
    assert photo_crops(1, 300, split="test").shape[-1] == 300
    with pytest.raises(BadSetting, match="1 to 300"):
        photo_crops(1, 301, split="test")


def test_digits_split_and_are_what_scikit_learn_has():
    from sklearn.datasets import load_digits

    train, test = digits(1200)
    assert train.x.shape == (1200, 1, 8, 8)
    assert len(test) == 597
    assert torch.equal(train.index, torch.arange(1200))
    assert torch.equal(test.index, torch.arange(597))
    raw = load_digits()
    both = torch.cat((train.x, test.x)).mul(16).long().flatten(1)
    labels = torch.cat((train.label, test.label))
    ours = sorted(zip(labels.tolist(), both.tolist(), strict=True))
    assert ours == sorted(zip(raw.target.tolist(), raw.data.astype(int).tolist(), strict=True))
    assert not torch.equal(digits(seed=1)[0].label, digits(seed=0)[0].label)
    assert torch.equal(digits(seed=1)[0].x, digits(seed=1)[0].x)
    assert digits(size=16)[0].x.shape[-2:] == (16, 16)
    with pytest.raises(BadSetting, match="1797"):
        digits(train=1797)


def test_faces_have_both_labels_and_are_disjoint():
    train, test = faces()
    assert train.x.shape == (150, 1, 25, 25)
    assert len(test) == 50
    assert int(train.label.sum() + test.label.sum()) == 100
    assert train.x.min() >= 0
    assert train.x.max() <= 1
    # faces resemble each other more than pieces of background do
    x, label = torch.cat((train.x, test.x)).flatten(1), torch.cat((train.label, test.label))
    faces_, rest = x[label == 1], x[label == 0]
    assert faces_.var(0).mean() < rest.var(0).mean()


def test_moving_crops_move_as_their_flow_says():
    clips, flow = moving_crops(6, 4, 48, velocity=1.5, flow=True, generator=seeded(3))
    assert clips.shape == (6, 4, 3, 48, 48)
    assert flow.shape == (6, 3, 2, 48, 48)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    here = torch.stack((x, y), -1)
    there = here + flow.flatten(0, 1).permute(0, 2, 3, 1)
    grid = (there * 2 + 1) / 48 - 1
    warped = F.grid_sample(clips[:, 1:].flatten(0, 1), grid, "bicubic", align_corners=False)
    inside = (there > 1).all(-1) & (there < 46).all(-1)
    before = clips[:, :-1].flatten(0, 1)
    still = (clips[:, 1:].flatten(0, 1) - before).abs().mean(1)[inside].mean()
    error = (warped - before).abs().mean(1)[inside].mean()
    assert error < 0.25 * still
    assert flow.abs().amax() <= 3 * 1.5 * 1.2  # three motions of at most `velocity` each (and their small products)


def test_pans_alone_have_constant_flow_of_at_most_the_velocity():
    _, flow = moving_crops(8, 3, 16, velocity=2.0, flow=True, motions=("pan",), generator=seeded())
    assert torch.allclose(flow, flow[..., :1, :1].expand_as(flow), atol=1e-5)
    assert flow.abs().max() <= 2
    assert flow.abs().max() > 1


def test_moving_crops_without_motion_stand_still_and_match_the_photograph():
    clips = moving_crops(3, 5, 20, velocity=0.0, split="test", generator=seeded())
    assert torch.allclose(clips, clips[:, :1].expand_as(clips), atol=1e-6)
    assert torch.equal(clips, moving_crops(3, 5, 20, velocity=0.0, split="test", generator=seeded()))
    assert clips.min() >= 0
    assert clips.max() <= 1


def test_fast_long_clips_reflect_at_the_border_instead_of_failing():
    clips = moving_crops(4, 40, 64, velocity=12.0, split="test", generator=seeded())
    assert torch.isfinite(clips).all()
    assert clips.flatten(2).std(2).min() > 1e-3
    with pytest.raises(BadSetting, match="'pan', 'zoom' or 'rotate'"):
        moving_crops(1, 2, 8, motions=("shake",))
