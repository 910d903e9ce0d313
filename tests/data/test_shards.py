import io
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import describe, open_data
from sfumato.data.shards import expand_pattern
from sfumato.errors import BadData, MissingExtra


def encoded(level, form="PNG", size=(5, 7)):
    body = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(body, form)
    return body.getvalue()


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path):
    for s in range(3):
        members = []
        for i in range(10):
            members += [(f"dir/{i:02d}.png", encoded(10 * s + i)), (f"dir/{i:02d}.cls", str(i % 4).encode())]
        shard(tmp_path / f"set-{s:03d}.tar", [*members, ("dir/._junk.png", b"resource fork"), ("readme.txt", b"hello")])
    return tmp_path


def test_patterns():
    assert expand_pattern("a-{1,20}-{08..10}.tar") == [f"a-{w}-{n}.tar" for w in ("1", "20") for n in ("08", "09", "10")]
    assert expand_pattern("{0..2}") == ["0", "1", "2"]
    assert expand_pattern("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("pattern", ["set-{000..002}.tar", "set-*.tar", "set-{000,001,002}.tar"])
def test_local_shards_behave_like_a_labelled_folder(shards, pattern):
    images = open_data(f"wds://{shards}/{pattern}", holdout=0.0)
    assert images.facts.classes == ("0", "1", "2", "3")
    assert images.facts.size == (5, 7)
    batch = images.tensors()
    assert (batch.x[:, 0, 0, 0] * 255).round().tolist() == list(range(30))
    assert batch.label.tolist() == [i % 10 % 4 for i in range(30)]
    assert images.names[11] == "set-001.tar/dir/01"
    assert images.skipped == []


def test_a_share_is_held_out_and_large_sets_stay_on_disk(shards):
    where = f"wds://{shards}/set-{{000..002}}.tar"
    train, test = open_data(where, holdout=0.3), open_data(where, "test", holdout=0.3)
    assert len(train) + len(test) == 30
    assert 2 <= len(test) <= 18
    assert not set(train.names) & set(test.names)
    outside = open_data(where, holdout=0.3, cache_mb=0)
    assert torch.equal(outside.tensors().x, train.tensors().x)
    assert torch.equal(outside.tensors().label, train.tensors().label)
    assert describe(where).startswith("30 images (")


def test_a_tar_is_a_place_of_its_own_and_labels_are_optional(tmp_path):
    path = shard(tmp_path / "plain.tar", [("a.jpg", encoded(9, "JPEG")), ("b.jpg", encoded(9, "JPEG"))])
    images = open_data(path)
    assert len(images) == 2
    assert images.facts.classes is None
    assert open_data(path, "test") is None


def test_bad_members_are_skipped_and_named(tmp_path):
    members = [
        *(("a.png", encoded(1)), ("a.cls", b"0\n")),
        *(("b.png", encoded(2)[:45]), ("b.cls", b"1")),
        *(("c.png", encoded(3)), ("c.cls", b"cat")),
        *(("d.png", encoded(4)), ("d.json", b"{}")),
    ]
    images = open_data(f"wds://{shard(tmp_path / 's.tar', members)}")
    assert images.names == ["s.tar/a"]
    assert sorted(name for name, _ in images.skipped) == ["s.tar/b", "s.tar/c", "s.tar/d"]
    assert dict(images.skipped)["s.tar/c"] == "its .cls is no whole number"


@pytest.mark.parametrize(
    ("body", "words"), [(b"hello", "truncated, compressed or no tar"), (None, "truncated, compressed or no tar")]
)
def test_damaged_shards_are_refused(tmp_path, body, words):
    path = shard(tmp_path / "s.tar", [("a.png", bytes(5000)), ("b.png", encoded(2))])
    path.write_bytes(path.read_bytes()[:3000] if body is None else body)
    with pytest.raises(BadData, match=words) as error:
        open_data(f"wds://{path}")
    assert str(error.value).startswith(str(path))


def test_shards_without_images_and_pipes(tmp_path):
    with pytest.raises(BadData, match="no images in these shards"):
        open_data(f"wds://{shard(tmp_path / 's.tar', [('a.txt', b'x')])}")
    with pytest.raises(BadData, match="would run a program"):
        open_data("wds://pipe:cat x.tar")


def test_addresses_are_read_through_webdataset(shards, monkeypatch):
    pytest.importorskip("webdataset")
    where = f"wds://file:{shards}/set-{{000..001}}.tar"
    images = open_data(where, holdout=0.0)
    local = open_data(f"wds://{shards}/set-{{000..001}}.tar", holdout=0.0)
    assert torch.equal(images.tensors().x, local.tensors().x)
    assert torch.equal(images.tensors().label, local.tensors().label)
    assert images.names == local.names
    with pytest.raises(BadData, match="more than 0 MB: fetch the shards first"):
        open_data(where, cache_mb=1e-4)
    with pytest.raises(BadData, match="check the address"):
        open_data(f"wds://file:{shards}/missing.tar")


@pytest.mark.parametrize(
    ("where", "package"), [("wds://https://example.org/a.tar", "webdataset"), ("hf://owner/name", "datasets")]
)
def test_missing_extras_are_named(monkeypatch, where, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package}: pip install 'sfumato\[data\]'"):
        open_data(where)


@pytest.mark.parametrize("own_test", [False, True])
def test_a_saved_hub_data_set(tmp_path, own_test):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [{"bytes": encoded(i), "path": None} for i in range(30)], "label": [i % 2 for i in range(30)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    whole = datasets.DatasetDict({"train": table, "test": table.select(range(3))}) if own_test else table
    whole.save_to_disk(tmp_path / "saved")
    where = f"hf://{tmp_path / 'saved'}"
    train, test = open_data(where), open_data(where, "test")
    assert train.facts.classes == ("cat", "dog")
    assert (len(train), len(test)) == (30, 3) if own_test else len(train) + len(test) == 30
    batch = test.tensors()
    assert torch.equal((batch.x[:, 0, 0, 0] * 255).round().long() % 2, batch.label)
    outside = open_data(where, cache_mb=0)
    assert torch.equal(outside.gather(torch.tensor([5, 1])).x, train.gather(torch.tensor([5, 1])).x)
    assert outside[5].label == train[5].label
    table.remove_columns("img").save_to_disk(tmp_path / "no")
    with pytest.raises(BadData, match=r"no column of images \(it has: label\)"):
        open_data(f"hf://{tmp_path / 'no'}")
