"""`sfumato apply`: whatever a trained run can do, on a person's own pictures: restore, encode, predict or search."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.cli.console import hint, say
from sfumato.data.images import IMAGE_SUFFIXES, WRITABLE_SUFFIXES, Picture, read_image, write_image
from sfumato.engine import Run, load
from sfumato.errors import BadData, BadSetting
from sfumato.method import Method, capabilities


def apply(
    run: Path, inputs: list[Path], out: Path, *, verb: str | None, device: str, physics: str | None = None,
    settings: Sequence[str] = (),
) -> None:  # fmt: skip
    """Read pictures, do what the run can do, write the results under `out`."""
    method = open_run(run, device)
    can = capabilities(method)
    wanted = BY_SUFFIX.get(out.suffix)
    applicable = [v for v in can if v in APPLICABLE or v in WITHOUT_PICTURES]
    verb = verb or (wanted if wanted in can else next(iter(applicable), next(iter(can), None)))
    told = physics is not None and getattr(method, "takes_physics", False)
    if verb == "restore" and "restore" in can and (method.needs_physics or told):
        from sfumato.cli.restoration import restore_told

        return restore_told(method, Pictures(inputs), out, run, physics=physics, settings=settings)
    if physics is not None or settings:
        raise BadSetting(f"--physics and --set belong to runs that restore by what they are told, such as ddpm; {run} does not")
    if verb in WITHOUT_PICTURES and verb in can:
        return WITHOUT_PICTURES[verb](method, inputs, out)
    if verb not in APPLICABLE or verb not in can:
        able = ", ".join(v for v in can if v in (*APPLICABLE, *WITHOUT_PICTURES)) or "nothing that apply does"
        raise BadSetting(f"{run} cannot {verb or 'be applied'}; it can: {able}")
    pictures = Pictures(inputs)
    with torch.inference_mode():
        APPLICABLE[verb](method, pictures, out, run)
    pictures.tell_skipped()


def open_run(run: Path, device: str) -> Any:
    """A trained method, or what `diffusers:NAME` names: a pipeline of a person's own, or of the hub."""
    if not str(run).startswith("diffusers:"):
        return load(run, device=device)
    from sfumato.diffusion import DiffusionPrior

    return DiffusionPrior.open(str(run).removeprefix("diffusers:")).to(device)


class Pictures:
    """The pictures among the inputs, read one at a time; what cannot be read is skipped and counted."""

    def __init__(self, inputs: list[Path]) -> None:
        self.paths = list(expand(inputs))
        if not self.paths:
            raise BadData(f"no pictures in {', '.join(map(str, inputs))}; known kinds: {' '.join(sorted(IMAGE_SUFFIXES))}")
        self.skipped: list[tuple[Path, str]] = []
        self.done = 0

    def __iter__(self) -> Iterator[tuple[Path, Path, Picture]]:
        from sfumato.cli.console import progress

        for path, name in progress(self.paths, "pictures"):
            try:
                picture = read_image(path)
            except BadData as error:
                self.skipped.append((path, str(error)))
                continue
            self.done += 1
            yield path, name, picture

    def tell_skipped(self) -> None:
        """Say what could not be read; refuse where that was everything."""
        for _, reason in self.skipped:
            hint(f"skipped {reason}")
        if not self.done:
            raise BadData(f"none of the {len(self.skipped)} files could be read as a picture")


def expand(inputs: list[Path]) -> Iterator[tuple[Path, Path]]:
    """(file, name under the output folder): files by their name, folders with what lies in them."""
    taken: set[Path] = set()
    for given in inputs:
        if given.is_dir():
            found = sorted(p for p in given.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
            pairs = [(p, p.relative_to(given)) for p in found]
        elif given.is_file():
            pairs = [(given, Path(given.name))]
        else:
            raise BadData(f"there is no picture or folder {given}")
        for path, name in pairs:
            count = 2
            unique = name
            while unique in taken:  # two folders may hold files of one name
                unique, count = name.with_stem(f"{name.stem}-{count}"), count + 1
            taken.add(unique)
            yield path, unique


def restore(method: Any, pictures: Pictures, out: Path, run: Path) -> None:
    """Restored pictures under their own names."""
    for path, name, picture in pictures:
        target = target_of(path, out / name)
        x = picture.float()[None].to(method.device)
        restored = with_channels(method.restore, x, channels_of(method))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_image(target, restored[0].cpu(), like=picture)
        say(str(target))


def target_of(path: Path, target: Path) -> Path:
    """Where a restored picture goes: a kind of file that can be written, and not its own input."""
    if target.suffix.lower() not in WRITABLE_SUFFIXES:
        target = target.with_suffix(".png")
    if target.resolve() == path.resolve():
        raise BadSetting(f"{target} would overwrite its own input; give another folder with -o")
    return target


def encode(method: Any, pictures: Pictures, out: Path, run: Path) -> None:
    """`embeddings.npz`: names and features."""
    target = out if out.suffix == ".npz" else out / "embeddings.npz"
    names, features = _each(method, method.encode, pictures)
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, names=np.array(names), features=features)
    say(f"{target}  ({len(names)} x {features.shape[1]})")


def predict(method: Any, pictures: Pictures, out: Path, run: Path) -> None:
    """`predictions.csv`: name, most likely class, its probability, then all probabilities."""
    target = out if out.suffix == ".csv" else out / "predictions.csv"
    names, values = _each(method, method.predict, pictures)
    classes = Run(run).config.get("classes") if run.is_dir() else None
    classes = classes or [str(i) for i in range(values.shape[1])]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "class", "probability", *classes])
        for name, row in zip(names, values):
            writer.writerow([name, classes[row.argmax()], f"{row.max():.4f}", *(f"{v:.4f}" for v in row)])
    say(f"{target}  ({len(names)} pictures)")


@torch.no_grad()
def search(method: Any, inputs: list[Path], out: Path) -> None:
    """`designs.npz`: better designs than the best of those given, and what they are expected to be worth, best first."""
    from sfumato.data.arrays import open_arrays

    if len(inputs) != 1:
        raise BadSetting("a search starts from one file of designs: sfumato apply RUN designs.npz -o better.npz")
    known = open_arrays(inputs[0])
    assert known is not None  # only a test split can be empty
    start = known.tensors()
    x, wanted = start.x.to(method.device), channels_of(method)
    if x.ndim != 2 or x.shape[1] != wanted:
        raise BadData(f"{inputs[0]}: this run searches designs of {wanted} numbers, x is {list(x.shape)}")
    value = method.predict(x)[:, 0] if start.target is None else start.target[:, 0].to(x)
    found = method.search(x[value.topk(min(SEARCH_STARTS, len(x))).indices])
    expected = method.predict(found)[:, 0]
    order = expected.argsort(descending=True)
    target = out if out.suffix == ".npz" else out / "designs.npz"
    if target.resolve() == inputs[0].resolve():
        raise BadSetting(f"{target} would overwrite its own input; give another name with -o")
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, x=found[order].cpu().numpy(), expected=expected[order].cpu().numpy())
    say(f"{target}  ({len(found)} designs; expected {float(expected.max()):.4g}, best of those given {float(value.max()):.4g})")


@torch.no_grad()
def predict_objects(method: Any, inputs: list[Path], out: Path) -> None:
    """`objects.csv`: the value that a run expects for every box of the frames of a folder in KITTI's format."""
    from sfumato.data.kitti import open_kitti

    target = out if out.suffix == ".csv" else out / "objects.csv"
    rows: list[list[Any]] = []
    for folder in inputs:
        frames = open_kitti(folder, "all", channels=channels_of(method))
        assert frames is not None  # only a split can be empty
        for i, name in enumerate(frames.names):
            batch = frames.gather(torch.tensor([i])).to(method.device)
            assert batch.boxes is not None
            values = method.predict_objects(batch.x, batch.boxes)[0].tolist()
            objects = [(box, value) for box, value in zip(batch.boxes[0].tolist(), values) if value == value]  # NaN: no box
            rows += [[name, *(f"{v:.2f}" for v in box), f"{value:.4g}"] for box, value in objects]
        for bad, reason in frames.skipped:
            hint(f"skipped {bad}: {reason}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", newline="") as file:
        csv.writer(file).writerows([["name", "x1", "y1", "x2", "y2", "value"], *rows])
    say(f"{target}  ({len(rows)} objects)")


SEARCH_STARTS = 128
"""How many of the given designs a search starts from: the best ones."""


APPLICABLE: dict[str, Callable[[Method, Pictures, Path, Path], None]] = {"restore": restore, "encode": encode, "predict": predict}

WITHOUT_PICTURES: dict[str, Callable[[Method, list[Path], Path], None]] = {"search": search, "predict-objects": predict_objects}
"""What reads its input in its own way."""


BY_SUFFIX = {".npz": "encode", ".csv": "predict"}


def _each(method: Any, fn: Callable[[Tensor], Tensor], pictures: Pictures) -> tuple[list[str], np.ndarray]:
    names, rows = [], []
    for _, name, picture in pictures:
        x = picture.float()[None].to(method.device)
        channels = channels_of(method)
        x = x.expand(-1, 3, -1, -1) if channels == 3 and x.shape[1] == 1 else x
        x = x.mean(1, keepdim=True) if channels == 1 and x.shape[1] == 3 else x
        rows.append(fn(x)[0].float().cpu().numpy())
        names.append(str(name))
    return names, np.stack(rows) if rows else np.zeros((0, 0))


def channels_of(method: Any) -> int:
    """Channels that a method was trained with."""
    return getattr(getattr(method, "config", method), "channels", None) or 3


def with_channels(fn: Callable[[Tensor], Tensor], x: Tensor, channels: int) -> Tensor:
    """Apply a restorer of `channels` channels to a picture of another number: grey as three equal channels, colour one by one."""
    if x.shape[1] == channels:
        return fn(x)
    if x.shape[1] == 1:
        return fn(x.expand(-1, channels, -1, -1)).mean(1, keepdim=True)
    return torch.cat([fn(c) for c in x.split(1, dim=1)], dim=1)
