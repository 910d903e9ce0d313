import multiprocessing
import pickle
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sfumato.data import Batch, describe, open_data, read_image
from sfumato.errors import BadData, BadSetting

RNG = np.random.default_rng(0)


def picture(path, height=6, width=9, channels=3, level=None):
    """A random picture, or one of a single level, in a file."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    pixels = RNG.integers(0, 256, shape) if level is None else np.full(shape, level)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def keep_samples(samples):
    return [s.x for s in samples]


# Samples


@pytest.mark.parametrize(
    ("name", "sizes", "classes", "shape"),
    [
        ("photos", (7, 3), None, None),
        ("digits", (1300, 497), 10, (1, 8, 8)),
        ("faces", (150, 50), 2, (1, 25, 25)),
        ("video", (200, 40), None, (8, 3, 64, 64)),
    ],
)
def test_samples(name, sizes, classes, shape):
    train, test = open_data(f"sample:{name}"), open_data(f"sample:{name}", "test")
    assert (len(train), len(test)) == sizes
    assert train.facts.count == sizes[0]
    assert (train.facts.classes and len(train.facts.classes)) == classes
    assert ("label" in train.facts.fields) == (classes is not None)
    if shape is not None:
        assert train[0].x.shape == shape
        assert train.facts.size == shape[-2:]
        assert train.facts.channels == shape[-3]
        batch = train.gather(torch.tensor([3, 1]))
        assert batch.x.shape == (2, *shape)
        assert batch.x.min() >= 0
        assert batch.x.max() <= 1
        assert batch.x.std() > 0.05
    else:
        assert train.facts.size is None
        assert train.names[0] == "astronaut"
        with pytest.raises(BadData, match="unlike sizes"):
            train.tensors()


def test_samples_with_other_channels():
    assert open_data("sample:digits", channels=3).tensors().x.shape == (1300, 3, 8, 8)
    assert {s.x.shape[0] for s in open_data("sample:photos", channels=1)} == {1}


# Folders


def test_folder_of_images_nested_mixed_and_with_odd_names(tmp_path):
    picture(tmp_path / "b ünïcode – 写真.png", 6, 9)
    picture(tmp_path / "a" / "deep er" / "x.jpg", 7, 5)
    picture(tmp_path / "grey.PNG", channels=1)
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / ".cache" / "y.png")
    picture(tmp_path / "__MACOSX" / "z.png")
    (tmp_path / "._x.jpg").write_bytes(b"macOS resource fork")
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    images = open_data(str(tmp_path))
    names = ["a/deep er/x.jpg", unicodedata.normalize("NFC", "b ünïcode – 写真.png"), "grey.PNG"]
    assert images.names == names
    assert images.skipped == [("phone.HEIC", ".heic is not read: convert it to PNG, JPEG or TIFF")]
    assert images.facts.channels == 3
    assert images.facts.size is None
    assert images.facts.fields == ("x", "index")
    assert images.notes == ["1 of 3 images: grey repeated to 3 channels"]
    grey = images[2].x
    assert grey.dtype == torch.uint8
    assert torch.equal(grey[0], grey[2])
    assert torch.equal(images[1].x, read_image(tmp_path / "b ünïcode – 写真.png").pixels)
    assert open_data(tmp_path, "test") is None
    assert describe(tmp_path) == "3 images, 5x7 to 9x6, 1 skipped"


def test_grey_folder_stays_grey_unless_told(tmp_path):
    picture(tmp_path / "a.png", channels=1, level=51)
    picture(tmp_path / "b.png", channels=1, level=204)
    images = open_data(tmp_path)
    assert images.facts.channels == 1
    assert images.tensors().x.flatten(1).mean(1).tolist() == pytest.approx([0.2, 0.8])
    assert open_data(tmp_path, channels=3).tensors().x.shape == (2, 3, 6, 9)
    assert describe(tmp_path) == "2 images, 9x6, grey"
    picture(tmp_path / "c.png", level=100)
    images = open_data(tmp_path, channels=1)
    assert images.notes == ["1 of 3 images: colour made grey"]
    assert images[2].x.unique().tolist() == [100]


def labelled(tmp_path, count=40, classes=("cat", "dog", "owl")):
    for c, name in enumerate(classes):
        for i in range(count):
            picture(tmp_path / name / f"{i:03d}.png", 4, 4, level=10 * c + 1)
    return tmp_path


def test_classes_are_sub_folders_and_a_share_is_held_out_for_good(tmp_path):
    train, test = (open_data(labelled(tmp_path), split, holdout=0.2) for split in ("train", "test"))
    assert train.facts.classes == ("cat", "dog", "owl")
    assert not set(train.names) & set(test.names)
    assert len(train) + len(test) == 120
    assert 12 <= len(test) <= 36
    for images in (train, test):
        batch = images.tensors()
        assert torch.equal((batch.x[:, 0, 0, 0] * 255).round().long(), batch.label * 10 + 1)
        assert images[0].label == int(batch.label[0])
    before = set(test.names)
    picture(tmp_path / "cat" / "new.png", 4, 4)
    assert before <= set(open_data(tmp_path, "test", holdout=0.2).names) <= before | {"cat/new.png"}
    assert len(open_data(tmp_path, holdout=0.0)) == 121
    assert open_data(tmp_path, "test", holdout=0.0) is None
    assert describe(tmp_path).startswith("121 images (")
    assert "3 classes" in describe(tmp_path)


def test_moving_the_folder_does_not_change_the_split(tmp_path):
    before = open_data(labelled(tmp_path / "here"), "test").names
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert open_data(tmp_path / "there", "test").names == before


def test_loose_images_or_a_single_sub_folder_are_no_classes(tmp_path):
    picture(tmp_path / "cat" / "a.png")
    assert open_data(tmp_path).facts.classes is None
    picture(tmp_path / "dog" / "a.png")
    assert open_data(tmp_path).facts.classes == ("cat", "dog")
    picture(tmp_path / "loose.png")
    assert open_data(tmp_path).facts.classes is None


@pytest.mark.parametrize("test_name", ["test", "val", "Validation"])
def test_split_folders(tmp_path, test_name):
    for name, number in {"train/a": 3, "train/b": 2, f"{test_name}/a": 1, f"{test_name}/b": 2, f"{test_name}/new": 1}.items():
        for i in range(number):
            picture(tmp_path / name / f"{i}.png")
    train, test = open_data(tmp_path), open_data(tmp_path, "test")
    assert (len(train), len(test)) == (5, 3)
    assert train.facts.classes == test.facts.classes == ("a", "b")
    assert [s.label for s in test] == [0, 1, 1]
    assert test.skipped == [(f"{test_name}/new/0.png", "its class is not among those of train/")]


def test_split_folders_without_classes(tmp_path):
    for name in ("train/1.png", "train/2.png", "test/3.png"):
        picture(tmp_path / name)
    assert open_data(tmp_path).names == ["train/1.png", "train/2.png"]
    assert open_data(tmp_path, "test").names == ["test/3.png"]
    assert describe(tmp_path) == "3 images (1 to test on), 9x6"


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train/1.png", "bus/2.png", "test/3.png"):
        picture(tmp_path / name)
    assert open_data(tmp_path, holdout=0.0).facts.classes == ("bus", "test", "train")


def test_unreadable_images_are_skipped_counted_and_named(tmp_path):
    good = picture(tmp_path / "good.png", 40, 40)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:500])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no picture at all, but long enough to look at")
    images = open_data(tmp_path)
    assert images.names == ["good.png"]
    assert [name for name, _ in images.skipped] == ["cut.png", "empty.jpg", "text.png"]
    assert "truncated" in images.skipped[0][1]
    assert not any(name in reason for name, reason in images.skipped)
    assert str(images) == "1 image, 40x40, 3 skipped"
    good.unlink()
    with pytest.raises(BadData, match=r"none of its 3 images can be read; cut\.png: truncated"):
        open_data(tmp_path)


def test_links_in_a_circle_end(tmp_path):
    picture(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert len(open_data(tmp_path)) == 1


def test_files_without_a_suffix_count_when_they_are_pictures(tmp_path):
    picture(tmp_path / "x.png").rename(tmp_path / "x")
    (tmp_path / "LICENSE").write_text("free")
    assert open_data(tmp_path).names == ["x"]


def test_sixteen_bit_folder_keeps_its_depth(tmp_path):
    pixels = RNG.integers(0, 65536, (2, 6, 9)).astype(np.uint16)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    images = open_data(tmp_path)
    exact = torch.from_numpy(pixels.astype(np.float64) / 65535).unsqueeze(1)
    assert torch.allclose(images.tensors().x.double(), exact, atol=1e-7)
    assert images[1].x.dtype == torch.float32
    uncached = open_data(tmp_path, cache_mb=0)
    assert torch.equal(uncached[1].x, images[1].x)


# Larger than memory


@pytest.mark.parametrize("paired", [False, True])
def test_what_does_not_fit_into_memory_is_read_when_asked_for_and_is_the_same(tmp_path, paired):
    for i in range(5):
        picture(tmp_path / "in" / f"{i}.png", channels=3 if i else 1)
        picture(tmp_path / "out" / f"{i}.png")
    where = f"pairs:{tmp_path / 'in'}:{tmp_path / 'out'}" if paired else tmp_path / "in"
    inside, outside = open_data(where), open_data(where, cache_mb=0)
    assert type(inside.items) is not type(outside.items)
    assert inside.facts == outside.facts
    assert inside.notes == outside.notes
    a, b = inside.gather(torch.tensor([4, 0, 2])), outside.gather(torch.tensor([4, 0, 2]))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.index, b.index)
    assert (torch.equal(a.target, b.target)) if paired else a.target is b.target is None


def test_an_image_that_goes_bad_later_is_replaced_by_the_next_and_counted(tmp_path, monkeypatch):
    for i in range(4):
        picture(tmp_path / f"{i}.png", 30, 30, level=i)
    monkeypatch.setattr("sfumato.data.image_files.DECODED_AT_OPENING", 2)
    body = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(body[:60])  # its header is good: it is found when it is decoded
    images = open_data(tmp_path, cache_mb=0)
    assert len(images) == 4
    assert int(images[3].x.max()) == 0
    assert int(images[-1].x.max()) == 0
    assert [name for name, _ in images.skipped] == ["3.png"]
    for i in range(3):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(BadData, match="none of the 4 images can be read any more"):
        images[0]


# Other places


def test_single_image(tmp_path):
    path = picture(tmp_path / "a: b.png")
    assert len(open_data(str(path))) == 1
    assert open_data(str(path), "test") is None
    assert describe(path) == "1 image, 9x6"


def test_pairs_match_by_stem_and_report_who_is_alone(tmp_path):
    left, right = tmp_path / "in: noisy", tmp_path / "clean"
    for name in ("a.png", "b.jpg", "sub/c.png", "alone.png"):
        picture(left / name, level=10)
    for name in ("a.png", "b.png", "sub/c.png", "lonely.png", "c.png"):
        picture(right / name, level=200)
    images = open_data(f"pairs:{left}:{right}")
    assert images.names == ["a.png", "b.jpg", "sub/c.png"]
    assert [name for name, _ in images.skipped] == ["alone.png", "c.png", "lonely.png"]
    assert "has no partner" in images.skipped[0][1]
    assert images.facts.fields == ("x", "index", "target")
    sample = images[2]
    assert (int(sample.x.max()), int(sample.target.min())) == (10, 200)
    batch = images.tensors()
    assert batch.target.shape == batch.x.shape == (3, 3, 6, 9)
    assert str(images) == "3 pairs, 9x6, 3 skipped"
    (right / "a.png").write_bytes(b"no picture")
    assert open_data(f"pairs:{left}:{right}").names == ["b.jpg", "sub/c.png"]
    with pytest.raises(BadData, match=r"no image of .* has a partner"):
        open_data(f"pairs:{left}:{picture(tmp_path / 'other' / 'z.png').parent}")
    with pytest.raises(BadData, match="is no folder: give pairs:IN:TARGET"):
        open_data(f"pairs:{left}")


def test_pairs_may_differ_in_size_as_in_super_resolution(tmp_path):
    picture(tmp_path / "low" / "a.png", 5, 5)
    picture(tmp_path / "high" / "a.png", 10, 10)
    batch = open_data(f"pairs:{tmp_path}/low:{tmp_path}/high").tensors()
    assert (batch.x.shape[-1], batch.target.shape[-1]) == (5, 10)


# What is refused


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("sample:photo", r"no sample:photo: did you mean sample:photos\? Samples are photos, digits, faces, video"),
        ("sample:", "Samples are photos"),
        ("smaple:photos", "no such folder or file. did you mean sample: .*Data is one of: sample:photos"),
        ("{tmp}/missing", "missing: no such folder or file. Data is one of: .*a folder"),
        ("{tmp}/empty", "no images in this folder"),
        ("{tmp}/texts", "no images in this folder.*1 of kinds that are not read, such as a.heic"),
        ("{tmp}/texts/a.txt", r"a\.txt.*not an image"),
        ("arrays:{tmp}/missing.npz", "no such file"),
        ("wds://{tmp}/missing-{{000..003}}.tar", r"missing-000\.tar: no such shard"),
        (3.5, "cannot make data of a float"),
    ],
)
def test_every_wrong_place_is_told_in_one_line(tmp_path, where, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    (tmp_path / "texts" / "a.heic").write_text("no picture")
    with pytest.raises(BadData, match=words) as error:
        open_data(where.format(tmp=tmp_path) if isinstance(where, str) else where)
    assert "\n" not in str(error.value)


def test_wrong_arguments():
    with pytest.raises(BadSetting, match="say 'train' or 'test'"):
        open_data("sample:digits", "val")
    with pytest.raises(BadSetting, match="channels=2"):
        open_data("sample:digits", channels=2)
    with pytest.raises(BadSetting, match="holdout=1"):
        open_data("sample:digits", holdout=1)


# Workers


@pytest.mark.parametrize("cache_mb", [512, 0])
def test_a_set_travels_to_workers(tmp_path, cache_mb):
    images = open_data(labelled(tmp_path, 3), holdout=0.0, cache_mb=cache_mb)
    copy = pickle.loads(pickle.dumps(images))
    assert copy.facts == images.facts
    assert torch.equal(copy.tensors().x, images.tensors().x)
    loader = DataLoader(images, 4, num_workers=1, multiprocessing_context="fork", collate_fn=keep_samples)
    seen = torch.stack([x for xs in loader for x in xs])
    assert torch.equal(seen, torch.stack([s.x for s in images]))


@pytest.mark.slow
def test_a_set_travels_to_spawned_workers(tmp_path):
    images = open_data(labelled(tmp_path, 3), holdout=0.0)
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(images, 4, num_workers=1, multiprocessing_context=context, collate_fn=list)
    assert torch.equal(torch.stack([s.x for xs in loader for s in xs]), torch.stack([s.x for s in images]))


def test_a_set_passes_through():
    images = open_data("sample:digits")
    assert open_data(images) is images
    batch = images.tensors()
    assert isinstance(batch, Batch)
    assert torch.equal(open_data(batch).tensors().x, batch.x)


def test_a_selection_is_a_set_of_its_own(tmp_path):
    whole = open_data("sample:digits")
    some = whole.select([5, 3])
    assert some.facts.count == 2
    assert some.facts.classes == whole.facts.classes
    assert torch.equal(some.tensors().x, whole.gather(torch.tensor([5, 3])).x)
    assert some.tensors().label.tolist() == [whole[5].label, whole[3].label]
    photos = open_data("sample:photos").select([2])
    assert torch.equal(photos[0].x, open_data("sample:photos")[2].x)
    for i in range(3):
        Image.new("L", (5, 4 + i), 100 * i).save(tmp_path / f"{i}.png")
    on_disk = open_data(tmp_path, cache_mb=0).select([2, 0])
    assert [s.x.shape[-2] for s in (on_disk[0], on_disk[1])] == [6, 4]
    assert on_disk.names == ["2.png", "0.png"]
    with pytest.raises(BadData, match="at least one"):
        whole.select([])
