import math

import numpy as np
import pytest
import torch

from sfumato.data import open_data, write_image
from sfumato.data.kitti import Label, laser_distances, read_label
from sfumato.engine.stream import Augmented, collate
from sfumato.errors import BadData

CAR = "Car 0.00 {occluded} -1.6 {x1} 5 {x2} 25 1.5 1.6 4.0 {x} 1.5 {z} {turn}"


def car(x1=10, x2=40, occluded=0, x=0.0, z=20.0, turn=0.0):
    return CAR.format(**locals())


def folder(root, frames, size=(30, 90)):
    """Frames {name: lines}, in a KITTI folder."""
    for part in ("image_2", "label_2"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for i, (name, lines) in enumerate(frames.items()):
        h, w = size if isinstance(size, tuple) else size[i]
        write_image(root / "image_2" / f"{name}.png", torch.full((3, h, w), 0.5 + 0.1 * i))
        (root / "label_2" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_frames_boxes_and_distances(tmp_path):
    lines = {"0": [car(), car(50, 70, occluded=2, z=8.0), "DontCare -1 -1 -10 1 1 5 5 -1 -1 -1 -1000 -1000 -1000 -10"], "1": []}
    data = open_data(f"kitti:{folder(tmp_path / 'training', lines).parent}", holdout=0.0)
    assert data.facts.fields == ("x", "index", "target", "boxes")
    assert data.facts.size == (30, 90)
    assert any("no velodyne/" in note for note in data.notes)
    batch = data.tensors()
    assert batch.boxes.shape == (2, 2, 4)
    assert batch.boxes[0].tolist() == [[10, 5, 40, 25], [50, 5, 70, 25]]
    assert batch.boxes[1].isnan().all()
    assert batch.target[0].tolist() == [[20.0, 1.0], [8.0, 0.25]]


def test_other_sizes_are_cut_or_filled_at_the_right_and_the_bottom(tmp_path):
    frames = {"0": [car()], "1": [car()], "2": [car(60, 95)], "3": [car(91, 99)]}
    root = folder(tmp_path, frames, [(30, 90), (30, 90), (28, 80), (33, 100)])
    for cache_mb in (512, 1e-4):  # in memory, and decoded when asked for
        data = open_data(f"kitti:{root}", holdout=0.0, cache_mb=cache_mb)
        assert data.in_memory == (cache_mb == 512)
        assert "2 frames are cut or filled to 90x30" in data.notes
        batch = data.tensors()
        assert batch.x.shape == (4, 3, 30, 90)
        assert (batch.x[2, :, 28:] == 0).all()
        assert (batch.x[2, :, :28, :80] > 0.5).all()
        assert batch.boxes[2, 0].tolist() == [60, 5, 90, 25]
        assert batch.boxes[3].isnan().all()  # nothing of it is left
        assert batch.target[3].isnan().all()


def test_splits_by_list_and_by_hash(tmp_path):
    root = folder(tmp_path, {f"{i:03}": [car()] for i in range(30)})
    train, test = open_data(f"kitti:{root}", holdout=0.3), open_data(f"kitti:{root}", "test", holdout=0.3)
    assert not set(train.names) & set(test.names)
    assert len(train) + len(test) == 30
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text("000\n001\n")
    (root / "ImageSets" / "val.txt").write_text("005\n")
    assert open_data(f"kitti:{root}").names == ["000.png", "001.png"]
    assert open_data(f"kitti:{root}", "test").names == ["005.png"]
    (root / "ImageSets" / "val.txt").write_text("777\n")
    assert open_data(f"kitti:{root}", "test") is None
    (root / "ImageSets" / "train.txt").write_text("777\n")  # of another data set
    with pytest.raises(BadData, match=r"belongs to the training split: check ImageSets/train.txt"):
        open_data(f"kitti:{root}")


def test_two_images_of_one_name_have_one_label(tmp_path):
    root = folder(tmp_path, {"0": [car()], "1": [car()]})
    write_image(root / "image_2" / "0.bmp", torch.rand(3, 30, 90))
    data = open_data(f"kitti:{root}", holdout=0.0)
    assert len(data) == 2
    assert [why for _, why in data.skipped if "label of" in why]


def test_unknown_distances_keep_their_box(tmp_path):
    batch = open_data(f"kitti:{folder(tmp_path, {'0': [car(z=-1000)]})}", holdout=0.0).tensors()
    assert batch.boxes[0, 0].tolist() == [10, 5, 40, 25]
    assert math.isnan(batch.target[0, 0, 0])


def test_the_laser_measures_the_nearest_surface(tmp_path):
    """A car of 4 m, 20 m ahead, seen from behind (turned by 90 degrees: its length lies along the axis): from 18 to 22 m."""
    root = folder(tmp_path, {"0": [car(z=20.0, turn=math.pi / 2), car(50, 70, x=30.0)]})
    depth = torch.linspace(18.05, 21.95, 40)  # the laser's x is ahead, y to the left, z up
    points = torch.stack((depth, torch.zeros(40), torch.full((40,), -1.0), torch.ones(40)), 1)
    outside = torch.tensor([[15.0, 0, -1, 1], [18.2, 1.5, -1, 1], [18.1, 0, 5.0, 1]])
    (root / "velodyne").mkdir()
    (root / "calib").mkdir()
    torch.cat((points, outside)).numpy().astype(np.float32).tofile(root / "velodyne" / "0.bin")
    calibration = "P0: 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
    (root / "calib" / "0.txt").write_text(calibration)
    data = open_data(f"kitti:{root}", holdout=0.0)
    batch = data.tensors()
    assert batch.target[0, 0, 0].item() == pytest.approx(depth[4].item())  # a tenth of 40 returns from the nearest
    assert batch.boxes[0, 1].isnan().all()  # no return: left out
    assert any("laser" in note for note in data.notes)
    (root / "calib" / "0.txt").write_text("R0_rect: 1 0\n")
    with pytest.raises(BadData, match="Tr_velo_to_cam"):
        open_data(f"kitti:{root}", holdout=0.0)
    scan = root / "velodyne" / "0.bin"
    scan.write_bytes(scan.read_bytes()[:-6])  # a copy that broke off
    with pytest.raises(BadData, match="damaged, copy it again"):
        open_data(f"kitti:{root}", holdout=0.0)


def test_degrees_of_occlusion(tmp_path):
    lines = [car().split() for _ in range(5)]
    for line, degree in zip(lines, ("0", "1", "2", "3", "-1"), strict=True):
        line[2] = degree
    (tmp_path / "a.txt").write_text("\n".join(" ".join(line) for line in lines))
    visible = read_label(tmp_path / "a.txt").values[:, 1]
    assert visible[:3].tolist() == [1, 0.5, 0.25]
    assert visible[3:].isnan().all()  # unknown


def test_no_returns_at_all(tmp_path):
    (tmp_path / "a.txt").write_text(car())
    label = read_label(tmp_path / "a.txt")
    eye = torch.eye(3, 4)
    assert laser_distances(torch.empty(0, 3), label, eye).isnan().all()
    assert laser_distances(torch.ones(5, 3), Label((), torch.empty(0, 14)), eye).shape == (0,)


def test_bad_folders(tmp_path):
    with pytest.raises(BadData, match="image_2/ and label_2/"):
        open_data(f"kitti:{tmp_path}")
    root = folder(tmp_path, {"0": ["Car 1 2 3"]})
    with pytest.raises(BadData, match="line 1 is no object"):
        open_data(f"kitti:{root}")
    (root / "label_2" / "0.txt").unlink()
    with pytest.raises(BadData, match="has a label"):
        open_data(f"kitti:{root}")


def test_augmentation_moves_boxes_with_the_frame(tmp_path):
    from torchvision.transforms import v2

    data = open_data(f"kitti:{folder(tmp_path, {'0': [car()], '1': []})}", holdout=0.0)
    batch = collate([Augmented(data, v2.RandomHorizontalFlip(1.0), 0)[0, i] for i in range(2)])
    assert batch.boxes[0, 0].tolist() == [50, 5, 80, 25]
    assert batch.boxes[1].isnan().all()
    assert type(batch.boxes) is torch.Tensor
    assert batch.target[0, 0, 0] == 20
