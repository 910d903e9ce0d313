"""Encode pictures once, train on their latents many times: a data set of latents, in a file or in memory.

    row v · N + i of the cache  =  encode( view v of picture i ),      all first views first

A frozen auto-encoder costs more than the small network that is trained behind it, and gives the same numbers in every epoch. The
price is that augmentation is drawn once: `views` of each picture are stored, in half precision (28 x 28 x 4 latents: 6.3 kB).

The file is safetensors: written in one pass in constant memory, moved into place when it is whole, and mapped into memory when
it is read, so that caches larger than the memory can be used.

Source: "LMD: Faster Image Reconstruction with Latent Masking Diffusion", AAAI 2024, arXiv 2312.07971, whose speed needs it.

>>> import tempfile, torch
>>> from sfumato.data import LatentCache
>>> class Half:
...     def encode(self, x):
...         return torch.nn.functional.avg_pool2d(x, 2)
>>> path = f"{tempfile.mkdtemp()}/latents.safetensors"
>>> print(LatentCache(Half(), torch.rand(10, 3, 8, 8), path))
10 latents 3x4x4: 1 view of 10 pictures
>>> LatentCache.open(path).gather(torch.tensor([4, 2])).x.shape  # another day, without the pictures
torch.Size([2, 3, 4, 4])
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from sfumato.data.image_set import ImageSet, InMemory, Sample, as_unit
from sfumato.data.sources import open_data
from sfumato.errors import BadData, BadSetting

_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # as safetensors calls them


class PictureEncoder(Protocol):
    """Pictures `[B, C, H, W]` in [0, 1] to latents `[B, c, h, w]`, such as a `LatentCodec`."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents of pictures."""


class LatentCache(ImageSet):
    """The latents of a set of pictures, as a set of its own: `x` of a sample is `[c, h, w]`, of a batch `[B, c, h, w]`.

    An epoch of the cache is `views` epochs of the pictures. Labels are kept.

    Args:
        codec: what encodes; it stays on its device.
        dataset: the pictures: a folder, a tensor, ..., see `open_data`.
        path: a file, `.safetensors`. Where it exists nothing is encoded but its first row, to see that it was made from the same.
            None: the latents stay in memory.
        views: how often each picture is stored, each time augmented anew.
        augment: transform of one picture `[C, H, W]`; its draws (from torch's global generator) are keyed by `generator`.
        batch_size: pictures that are encoded at a time.
        workers: processes that read and augment pictures.
        dtype: in which latents are stored: float16, bfloat16 or float32.
        generator: source of the augmentations' seeds; None: seed 0, so that a cache can be recognised.

    Raises:
        BadData: no pictures, pictures of unlike sizes without an `augment` that cuts them, latents that do not fit into `dtype`,
            a file that is damaged or was made from other pictures, by another codec or other views.
        BadSetting: several views without augmentation, another type.
    """

    def __init__(
        self,
        codec: PictureEncoder,
        dataset: Any,
        path: str | Path | None = None,
        *,
        views: int = 1,
        augment: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 64,
        workers: int = 0,
        dtype: torch.dtype = torch.float16,
        generator: torch.Generator | None = None,
    ) -> None:
        if views < 1 or (views > 1 and augment is None):
            raise BadSetting(f"views={views}: say 1, or give augment= so that views differ")
        if dtype not in _TYPES:
            raise BadSetting(f"latents are stored as {', '.join(str(t) for t in _TYPES)}, not as {dtype}")
        pictures = open_data(dataset)
        rows = _Views(pictures, views, augment, generator or torch.Generator().manual_seed(0))
        facts = {"views": views, "classes": pictures.facts.classes}
        if path is None:
            parts, labels = zip(*_encoded(codec, rows, batch_size, workers, dtype))
            self._serve(torch.cat(parts), torch.cat(labels), facts)
            return
        file = Path(path)
        known = file.exists()
        if not known:
            _write(file, _encoded(codec, rows, batch_size, workers, dtype), len(rows), facts)
        self._serve(*_read(file))
        if known:
            self._recognise(codec, rows, dtype, file)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """A cache that was written before, without its pictures and its codec.

        Raises:
            BadData: no cache there, or a damaged one.
        """
        cache = cls.__new__(cls)
        cache._serve(*_read(Path(path)))
        return cache

    def _serve(self, latents: Tensor, labels: Tensor, facts: dict[str, Any]) -> None:
        super().__init__(InMemory(latents, labels if len(labels) else None), classes=facts["classes"])
        self.views: int = facts["views"]

    def _recognise(self, codec: PictureEncoder, rows: _Views, dtype: torch.dtype, path: Path) -> None:
        """Refuse a file of other latents: another type, other counts, or another first row."""
        if (len(self), self.views) != (len(rows), rows.views):
            have, want = _count(len(self), self.views), _count(len(rows), rows.views)
            raise BadData(f"{path} holds {have}, not {want}: delete it or give another path")
        stored = self[0].x
        if stored.dtype != dtype:
            raise BadData(f"{path} holds {stored.dtype}, not {dtype}: delete it, or give its dtype=")
        first = next(_encoded(codec, rows, 1, 0, dtype))[0][0]
        # chips differ in the last bits; another codec, picture or crop does in the first
        if first.shape != stored.shape or (first.float() - stored.float()).norm() > 0.02 * stored.float().norm() + 1e-3:
            raise BadData(f"{path} was made by another codec or from other pictures: delete it or give another path")

    def __str__(self) -> str:
        return f"{len(self)} latents {'x'.join(map(str, self[0].x.shape))}: {_count(len(self), self.views)}"


def _count(rows: int, views: int) -> str:
    pictures = rows // views
    return f"{views} view{'s' * (views != 1)} of {pictures} picture{'s' * (pictures != 1)}"


class _Views(Dataset[Sample]):
    """Every view of every picture, with its label, in the order of the cache."""

    def __init__(
        self, pictures: ImageSet, views: int, augment: Callable[[Tensor], Tensor] | None, generator: torch.Generator
    ) -> None:
        self.pictures, self.views, self.augment = pictures, views, augment
        self.seeds = torch.randint(2**62, (views * len(pictures),), generator=generator, device=generator.device).cpu()

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, row: int) -> Sample:
        x, label, *_ = self.pictures[row % len(self.pictures)]
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(self.seeds[row]))
                x = self.augment(x)
        return Sample(as_unit(x.as_subclass(Tensor)), label)


def _stacked(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Pictures, and their labels or none."""
    pictures = [s.x for s in samples]
    if len({p.shape for p in pictures}) > 1:
        sizes = sorted({f"{p.shape[-1]}x{p.shape[-2]}" for p in pictures})[:4]
        raise BadData(
            f"the pictures have unlike sizes ({', '.join(sizes)}, ...): give augment= a transform that cuts them to one"
        )
    return torch.stack(pictures), torch.tensor([s.label for s in samples if s.label is not None], dtype=torch.long)


def _encoded(
    codec: PictureEncoder, rows: _Views, batch_size: int, workers: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """The latents and labels, a batch at a time, on the CPU."""
    weight = next((t for t in (*codec.parameters(), *codec.buffers())), None) if isinstance(codec, nn.Module) else None
    for x, label in DataLoader(rows, batch_size, num_workers=workers, collate_fn=_stacked, generator=torch.Generator()):
        with torch.no_grad():
            z = codec.encode(x if weight is None else x.to(weight.device)).to("cpu", dtype)
        if not torch.isfinite(z).all():
            raise BadData(f"latents do not fit into {dtype} or are not finite: try dtype=torch.float32, check the codec")
        yield z, label


# ---- the file: latents, then labels; safetensors' own writer wants all of it in memory


def _write(path: Path, batches: Iterator[tuple[Tensor, Tensor]], rows: int, facts: dict[str, Any]) -> None:
    z, label = next(batches)
    size, labels = z[0].nbytes * rows, [label]
    ends = [0, size, size + label[:1].nbytes * rows]
    head = {
        "__metadata__": {"sfumato latents": json.dumps(facts)},
        "latents": {"dtype": _TYPES[z.dtype], "shape": [rows, *z.shape[1:]], "data_offsets": ends[:2]},
        "label": {"dtype": "I64", "shape": [rows * min(1, len(label))], "data_offsets": ends[1:]},
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + _bytes(z))
            for z, label in batches:
                file.write(_bytes(z))
                labels.append(label)
            file.write(_bytes(torch.cat(labels)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise BadData(
            f"cannot write {path} ({error}): it takes {ends[2] / 2**20:.0f} MB, free them or choose another path"
        ) from None
    finally:
        with suppress(OSError):
            aside.unlink()


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def _read(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Latents (mapped, not read), labels and facts of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["sfumato latents"])
            latents, labels = file.get_tensor("latents"), file.get_tensor("label")
    except FileNotFoundError:
        raise BadData(f"{path}: no cache of latents there: check the path, or make one by LatentCache(...)") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BadData(f"{path} is damaged or no cache of latents ({error}): delete it and encode again") from None
    return latents, labels, facts
