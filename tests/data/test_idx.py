import gzip

import numpy as np
import pytest

from sfumato.data import open_data
from sfumato.data.idx import read_idx, read_idx_set
from sfumato.errors import BadData

CODES = {"u1": 8, "i1": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}


def _idx(array, code):
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, CODES[code], array.ndim]) + shape + array.astype(code).tobytes()


def _write(folder, name, array, code="u1", packed=True):
    content = _idx(array, code)
    (folder / name).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("packed", [True, False])
def test_every_type_comes_back(tmp_path, code, packed):
    array = np.arange(24).reshape(2, 3, 4)
    _write(tmp_path, "some-idx3-ubyte", array, code, packed)
    assert (read_idx(tmp_path / "some-idx3-ubyte") == array).all()


def test_training_images_bring_labels_and_test_images(tmp_path):
    rng = np.random.default_rng(0)
    x, t = (rng.integers(0, 256, (n, 5, 6)) for n in (20, 7))
    _write(tmp_path, "train-images-idx3-ubyte.gz", x)
    _write(tmp_path, "train-labels-idx1-ubyte.gz", np.arange(20) % 3)
    _write(tmp_path, "t10k-images-idx3-ubyte.gz", t)
    _write(tmp_path, "t10k-labels-idx1-ubyte.gz", np.arange(7) % 3)
    place = f"arrays:{tmp_path}/train-images-idx3-ubyte.gz"
    train, test = open_data(place), open_data(place, "test")
    assert (len(train), len(test), train.facts.classes, train.facts.size) == (20, 7, ("0", "1", "2"), (5, 6))
    assert (train[4].x.numpy()[0] == x[4]).all()
    assert (test[4].x.numpy()[0] == t[4]).all()
    assert test[4].label == 1
    alone = read_idx_set(tmp_path / "t10k-images-idx3-ubyte.gz")  # named alone it is taken alone
    assert {k: len(v) for k, v in alone.items()} == {"x": 7, "y": 7}


def test_images_alone_have_no_labels(tmp_path):
    _write(tmp_path, "images.idx3", np.zeros((4, 3, 3)))
    data = open_data(f"arrays:{tmp_path}/images.idx3")
    assert len(data) == 4
    assert data.facts.classes is None


WHOLE = _idx(np.arange(48).reshape(3, 4, 4), "u1")


# Named, as a test's name must not hold what differs from run to run: gzip writes the hour into its files.
@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"PK\x03\x04....", "not an IDX file", id="zip"),
        pytest.param(b"", "not an IDX file", id="empty"),
        pytest.param(WHOLE[:-1], r"are not an array \[3, 4, 4\]", id="short"),
        pytest.param(gzip.compress(WHOLE)[:-9], "copy it again", id="gzip-short"),
        pytest.param(b"\x1f\x8bnothing", "copy it again", id="gzip-header"),
        pytest.param(gzip.compress(WHOLE)[:10] + b"\xff" * 40, "copy it again", id="gzip-damaged"),
    ],
)
def test_other_and_damaged_files_are_told(tmp_path, content, told):
    (tmp_path / "x-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(BadData, match=told):
        open_data(f"arrays:{tmp_path}/x-idx3-ubyte.gz")
    with pytest.raises(BadData, match="no such file"):
        open_data(f"arrays:{tmp_path}/y-idx3-ubyte.gz")
