import json
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torchvision.transforms import v2

from sfumato.data import LatentCache, digits, open_data, photo_crops, write_image
from sfumato.engine.stream import stream
from sfumato.errors import BadData, BadSetting
from sfumato.nn import PatchPCA


class Counting(nn.Module):
    """Halves pictures; remembers how many it has seen."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain, self.seen, self.largest = gain, 0, 0

    def encode(self, x):
        self.seen, self.largest = self.seen + len(x), max(self.largest, len(x))
        assert not torch.is_grad_enabled()
        return self.gain * nn.functional.avg_pool2d(x, 2)


@pytest.fixture(scope="module")
def crops():
    return photo_crops(12, 16, generator=torch.Generator().manual_seed(0))


def flip_or_crop():
    return v2.Compose([v2.RandomCrop(8), v2.RandomHorizontalFlip()])


def test_latents_are_the_codecs_in_half_precision(crops, tmp_path):
    codec = PatchPCA(4, 5, channels=3).fit(crops)
    path = tmp_path / "deep" / "cache.safetensors"
    for cache in (LatentCache(codec, crops), LatentCache(codec, crops, path, batch_size=5), LatentCache.open(path)):
        batch = cache.gather(torch.tensor([7, 0, 11]))
        assert batch.x.dtype == torch.float16
        assert torch.equal(batch.x, codec.encode(crops[[7, 0, 11]]).half())
        assert torch.equal(cache[3].x, codec.encode(crops[3:4])[0].half())
        assert (cache.facts.count, cache.facts.channels, cache.facts.size) == (12, 5, (4, 4))
        assert str(cache) == "12 latents 5x4x4: 1 view of 12 pictures"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_is_written_once_in_pieces_and_then_only_looked_at(crops, tmp_path):
    path, codec = tmp_path / "c.safetensors", Counting()
    LatentCache(codec, crops, path, batch_size=5)
    assert (codec.seen, codec.largest) == (12, 5)
    LatentCache(codec, crops, path, batch_size=5)
    assert codec.seen == 13


def test_the_file_is_plain_safetensors(crops, tmp_path):
    path = tmp_path / "c.safetensors"
    LatentCache(Counting(), (crops, torch.arange(12) % 3), path, dtype=torch.bfloat16)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"latents", "label"}
        latents, label = file.get_tensor("latents"), file.get_tensor("label")
        assert json.loads(file.metadata()["sfumato latents"])["views"] == 1
    assert torch.equal(latents, nn.functional.avg_pool2d(crops, 2).bfloat16())
    assert label.tolist() == [i % 3 for i in range(12)]


def test_views_differ_and_can_be_drawn_again(crops, tmp_path):
    def cache(seed, path=None):
        g = torch.Generator().manual_seed(seed)
        return LatentCache(Counting(), crops, path, views=3, augment=flip_or_crop(), generator=g).tensors().x

    before = torch.get_rng_state()
    first = cache(0)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's randomness is left alone
    assert first.shape == (36, 3, 4, 4)
    assert torch.equal(first, cache(0, tmp_path / "c.safetensors"))
    assert not torch.equal(first, cache(1))
    assert not torch.equal(first[:12], first[12:24])


def test_all_first_views_come_first():
    x, label = torch.rand(5, 1, 4, 4), torch.arange(5)
    cache = LatentCache(Counting(), (x, label), views=2, augment=v2.RandomVerticalFlip(p=0.0), dtype=torch.float32)
    batch = cache.tensors()
    assert batch.label.tolist() == [0, 1, 2, 3, 4] * 2
    assert torch.equal(batch.x[:5], batch.x[5:])
    assert str(cache) == "10 latents 1x2x2: 2 views of 5 pictures"


def test_a_folder_of_unlike_pictures_with_classes(tmp_path):
    for i, (name, side) in enumerate([("ants", 20), ("ants", 31), ("bees", 24)]):
        (tmp_path / "mine" / name).mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / "mine" / name / f"{i}.png", photo_crops(1, side, generator=torch.Generator().manual_seed(i))[0])
    data, path = open_data(tmp_path / "mine", holdout=0.0), tmp_path / "c.safetensors"
    with pytest.raises(BadData, match=r"unlike sizes .*augment="):
        LatentCache(Counting(), data, path)
    assert not path.exists()
    LatentCache(Counting(), data, path, views=2, augment=v2.RandomCrop(16))
    cache = LatentCache.open(path)
    assert cache.facts.classes == ("ants", "bees")
    assert cache.facts.fields == ("x", "index", "label")
    assert [cache[i].label for i in range(6)] == [0, 0, 1] * 2
    assert cache.facts.size == (8, 8)


def test_the_engine_streams_from_it_and_it_can_be_sent_to_workers(tmp_path):
    train, _ = digits()
    cache = LatentCache(Counting(), train.x[:64], tmp_path / "c.safetensors")
    (batch,) = next(stream(cache, None, batch_size=16, start=0, seed=0))
    assert batch.x.shape == (16, 1, 4, 4)
    assert torch.equal(batch.x, cache.tensors().x[batch.index])
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.tensors().x, cache.tensors().x)


def test_what_does_not_fit_the_file_is_refused(crops, tmp_path):
    path = tmp_path / "c.safetensors"
    LatentCache(Counting(), crops, path)
    pca = PatchPCA(2, 3, channels=3).fit(crops)
    for codec, pictures in ((Counting(gain=1.05), crops), (Counting(), crops.flip(0)), (pca, crops)):
        with pytest.raises(BadData, match="another codec or from other pictures: delete it"):
            LatentCache(codec, pictures, path)
    with pytest.raises(BadData, match="holds 1 view of 12 pictures, not 1 view of 7 pictures"):
        LatentCache(Counting(), crops[:7], path)
    with pytest.raises(BadData, match="not 2 views of 12 pictures"):
        LatentCache(Counting(), crops, path, views=2, augment=flip_or_crop())
    with pytest.raises(BadData, match=r"holds torch.float16, not torch.float32: delete it, or give its dtype="):
        LatentCache(Counting(), crops, path, dtype=torch.float32)


def test_damage_and_bad_settings_are_told_in_a_line(crops, tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(BadData, match="no cache of latents there"):
        LatentCache.open(path)
    LatentCache(Counting(), crops, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadData, match="damaged or no cache"):
        LatentCache(Counting(), crops, path)
    with pytest.raises(BadSetting, match="views=2"):
        LatentCache(Counting(), crops, views=2)
    with pytest.raises(BadSetting, match="int8"):
        LatentCache(Counting(), crops, dtype=torch.int8)
    with pytest.raises(BadData, match=r"do not fit into torch\.float16"):
        LatentCache(Counting(gain=1e6), crops)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadData, match=r"cannot write .*MB"):
        LatentCache(Counting(), crops, tmp_path / "file" / "c.safetensors")


def test_a_picture_is_read_once(crops, tmp_path):
    class Own(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return len(crops)

        def __getitem__(self, i):
            self.reads += 1
            return crops[i], i % 2

    own = Own()
    before = [own, open_data(own)][0].reads  # what open_data looks at
    cache = LatentCache(Counting(), own, tmp_path / "c.safetensors", batch_size=5)
    assert own.reads == 2 * before + 12
    assert cache.tensors().label.tolist() == [i % 2 for i in range(12)]


def test_a_failure_leaves_no_file(crops, tmp_path):
    class Failing(Counting):
        def encode(self, x):
            if self.seen >= 8:
                raise RuntimeError("out of memory")
            return super().encode(x)

    with pytest.raises(RuntimeError, match="out of memory"):
        LatentCache(Failing(), crops, tmp_path / "c.safetensors", batch_size=4)
    assert list(tmp_path.iterdir()) == []
