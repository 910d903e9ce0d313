import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from sfumato.data import Batch, open_data
from sfumato.errors import BadData

RNG = np.random.default_rng(0)


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"arrays:{path}"


BYTES = RNG.integers(0, 256, (20, 6, 9, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (BYTES, (3, 6, 9)),
        (BYTES.transpose(0, 3, 1, 2), (3, 6, 9)),
        (BYTES[..., 0], (1, 6, 9)),
        (BYTES[..., :1], (1, 6, 9)),
        (BYTES.astype(np.float64) / 255, (3, 6, 9)),
        (BYTES.astype(np.float16) / 255, (3, 6, 9)),
        ((BYTES.astype(np.uint16) * 257), (3, 6, 9)),
        ((BYTES.astype(">u2") * 257), (3, 6, 9)),
        (BYTES > 127, (3, 6, 9)),
        (BYTES.reshape(4, 5, 6, 9, 3), (5, 3, 6, 9)),
    ],
)
def test_arrays_of_every_layout_become_channel_first_floats(tmp_path, array, shape):
    images = open_data(save(tmp_path / "a.npz", images=array))
    batch = images.tensors()
    assert batch.x.shape[1:] == shape
    assert batch.x.dtype == torch.float32
    exact = torch.from_numpy(BYTES.astype(np.float32) / 255 if array.dtype != bool else array.astype(np.float32))
    exact = exact.permute(0, 3, 1, 2)
    exact = exact[:, :1] if shape[0] == 1 else exact
    assert torch.allclose(batch.x.flatten(0, -4) if batch.x.ndim == 5 else batch.x, exact, atol=1e-3)
    assert images.facts.size == (6, 9)


def test_labels_classes_targets_and_hold_out(tmp_path):
    where = save(tmp_path / "a.npz", x=BYTES, y=np.arange(20) % 3, target=BYTES[::-1], classes=np.array(["a", "b", "c"]))
    train, test = open_data(where, holdout=0.3), open_data(where, "test", holdout=0.3)
    assert train.facts.classes == ("a", "b", "c")
    assert train.facts.fields == ("x", "index", "label", "target")
    rows = [int(name) for name in train.names] + [int(name) for name in test.names]
    assert sorted(rows) == list(range(20))
    for images in (train, test):
        batch = images.tensors()
        at = torch.tensor([int(name) for name in images.names])
        assert torch.equal(batch.label, at % 3)
        assert torch.equal((batch.target * 255).round().to(torch.uint8), torch.from_numpy(BYTES[::-1].copy()).movedim(-1, 1)[at])
    assert open_data(save(tmp_path / "b.npz", x=BYTES), "test") is None


def test_own_test_part(tmp_path):
    where = save(tmp_path / "a.npz", x_train=BYTES[:12], y_train=np.arange(12), x_test=BYTES[12:], y_test=np.arange(8))
    assert (len(open_data(where)), len(open_data(where, "test"))) == (12, 8)
    assert torch.equal(open_data(where, "test").tensors().label, torch.arange(8))
    np.save(tmp_path / "plain.npy", BYTES)
    assert len(open_data(tmp_path / "plain.npy")) == 20
    assert len(open_data(str(tmp_path / "a.npz"))) == 12
    assert open_data(where, channels=1).facts.channels == 1


def bad(**arrays):
    return arrays


FLOATS = RNG.random((5, 1, 4, 4))
NAN = FLOATS.copy()
NAN[2, 0, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": NAN}, "x holds 1 values that are NaN or infinite"),
        ({"x": FLOATS * np.inf}, "NaN or infinite"),
        ({"x": FLOATS * 255}, r"x holds floats from .* to 25\d.*: divide by 255 .*, or give uint8"),
        ({"x": FLOATS * 2 - 1}, r"x holds floats from -.*: bring them to \[0, 1\]"),
        ({"x": (FLOATS * 255).astype(np.int64)}, "x is int64: images are uint8"),
        ({"x": FLOATS[:0]}, "x is empty"),
        ({"x": np.zeros(5)}, r"x is float64 \[5\]: images are"),
        ({"x": np.array(["a", "b"])}, "images are"),
        ({"z": FLOATS}, r"no array named x or images \(it has: z\)"),
        ({"x": FLOATS, "y": np.arange(4)}, r"y is int64 \[4\]: labels are whole numbers \[5\]"),
        ({"x": FLOATS, "y": np.arange(5) / 2}, "labels are whole numbers"),
        ({"x": FLOATS, "y": np.arange(5) - 2}, "y goes down to -2"),
        ({"x": FLOATS, "y": np.arange(5), "classes": np.array(["a"])}, "labels go up to 4, but there are 1 class names"),
        ({"x": FLOATS, "target": FLOATS[:3]}, "5 images and 3 targets"),
        ({"x": np.array([{"an": "object"}])}, "never unpickled"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_way_out(tmp_path, arrays, words):
    with pytest.raises(BadData, match=words) as error:
        open_data(save(tmp_path / "a.npz", **arrays))
    assert str(error.value).startswith(str(tmp_path / "a.npz"))
    assert "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    save(tmp_path / "a.npz", x=BYTES)
    body = (tmp_path / "a.npz").read_bytes()
    for name, data in {"cut.npz": body[: len(body) // 2], "empty.npz": b"", "text.npz": b"hello, not an array"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadData, match=name):
            open_data(f"arrays:{tmp_path / name}")


# From Python


def test_tensors_lists_and_pairs_are_all_for_training():
    x, y = torch.rand(10, 3, 8, 8), torch.arange(10) % 4
    images = open_data((x, y))
    assert len(images) == 10
    assert images.facts.classes == ("0", "1", "2", "3")
    assert torch.equal(images.gather(torch.tensor([7, 2])).label, torch.tensor([3, 2]))
    assert open_data((x, y), "test") is None
    assert torch.equal(open_data(x).tensors().x, x)
    assert open_data(x.double()).tensors().x.dtype == torch.float64
    assert torch.equal(open_data((x, 1 - x)).tensors().target, 1 - x)
    assert torch.equal(open_data(TensorDataset(x, y)).tensors().label, y)
    assert open_data((x.numpy(), y.tolist())).facts.classes == images.facts.classes
    unequal = open_data([torch.rand(3, 8, 8), torch.rand(3, 5, 9), np.zeros((4, 4, 3), np.uint8)])
    assert unequal.facts.size is None
    assert unequal[2].x.shape == (3, 4, 4)
    assert open_data([torch.rand(8, 8)] * 3).tensors().x.shape == (3, 1, 8, 8)
    assert open_data(x, channels=1).facts.channels == 1


def test_vectors_are_taken_as_they_are():
    x = torch.randn(10, 5) * 40
    images = open_data((x, torch.arange(10)))
    assert images.facts.size is None
    assert images.facts.channels == 5
    assert torch.equal(images.tensors().x, x)
    assert str(images) == "10 samples, 10 classes"
    tokens = open_data((torch.arange(20).view(10, 2), torch.arange(10)))
    assert tokens.tensors().x.dtype == torch.int64


def test_a_batch_is_taken_as_it_is_but_for_nan():
    field = torch.randn(4, 1, 8, 8) * 3
    batch = Batch(field, torch.arange(4), target=field * 2)
    images = open_data(batch)
    assert torch.equal(images.tensors().x, field)
    assert torch.equal(images[1].target, field[1] * 2)
    with pytest.raises(BadData, match="x holds 1 values"):
        open_data(Batch(field.clone().index_fill_(0, torch.tensor(0), 0).flatten().index_fill_(0, torch.tensor(3), float("nan"))
                        .view_as(field), torch.arange(4)))  # fmt: skip


def test_rounding_just_outside_the_range_is_clipped():
    x = torch.tensor([-1e-6, 1 + 1e-6]).expand(2, 1, 2, 2)
    assert open_data(x).tensors().x.unique().tolist() == [0, 1]


class Pictures(Dataset):
    classes = ("cat", "dog")

    def __init__(self, kind="pil"):
        self.kind = kind

    def __len__(self):
        return 30

    def __getitem__(self, i):
        if i >= 30:
            raise IndexError
        array = np.full((5, 7, 3), i, np.uint8)
        x = {"pil": Image.fromarray(array), "tensor": torch.from_numpy(array).permute(2, 0, 1), "array": array}[self.kind]
        return x, i % 2


@pytest.mark.parametrize("kind", ["pil", "tensor", "array"])
def test_a_torch_dataset_of_ones_own(kind):
    images = open_data(Pictures(kind))
    assert images.facts.classes == ("cat", "dog")
    assert images.facts.size == (5, 7)
    assert (int(images[9].x[0, 0, 0]), images[9].label) == (9, 1)
    batch = images.gather(torch.tensor([9, 4]))
    assert batch.x[:, 0, 0, 0].tolist() == pytest.approx([9 / 255, 4 / 255])
    assert batch.label.tolist() == [1, 0]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.full((2, 3, 4, 4), float("nan")), "x holds 96 values"),
        (torch.rand(2, 3, 4, 4) * 255, "divide by 255"),
        (torch.randn(2, 3, 4, 4), r"bring them to \[0, 1\]"),
        (torch.rand(3, 4, 4), r"images are \[N, C, H, W\]"),
        (torch.rand(2, 8, 8, 3), r"channels last: give x.movedim\(-1, -3\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), "uint8"),
        ([], "an empty list"),
        ([torch.rand(3, 4, 4), torch.rand(3, 4, 4) * 9], r"x\[1\] holds floats"),
        ((torch.rand(2, 3, 4, 4), torch.arange(3)), r"labels are whole numbers \[2\]"),
        ((torch.rand(2, 3, 4, 4), torch.rand(3, 3, 4, 4)), "2 images and 3 targets"),
        (Stream(), "give it to fit in a DataLoader"),
        ({"x": 1}, "cannot make data of a dict"),
    ],
)
def test_what_is_no_data_is_refused_with_the_way_out(data, words):
    with pytest.raises(BadData, match=words):
        open_data(data)
