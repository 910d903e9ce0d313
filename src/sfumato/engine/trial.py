"""One trial of a comparison: an arm trained with a seed, or only timed, in this process; what comes back is plain."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sfumato import catalogue
from sfumato.data import Batch, ImageSet, open_data
from sfumato.data.image_set import as_unit
from sfumato.engine.arms import Arm
from sfumato.engine.evaluation import evaluate, preview
from sfumato.engine.loading import build
from sfumato.engine.loop import Trainer
from sfumato.engine.options import Options
from sfumato.engine.randomness import key
from sfumato.engine.rehearsal import peak_memory, rehearse, resident_memory
from sfumato.engine.stream import as_data
from sfumato.errors import BadData, Diverged
from sfumato.method import Method, Result, capabilities, draws_points

CURVE_POINTS, SHOWN = 200, 4
"""Points of a loss curve; pictures that are shown."""
PROBE_TRAIN, PROBE_TEST, FEW = 2000, 1000, 100
"""Samples that probes of features read and are judged on; labels of the few-label fine-tuning."""
DRAWN = 400
"""Pictures that a generator draws to be judged."""


@dataclass(frozen=True)
class Job:
    """What a process is asked to do, for one arm and one seed.

    Args:
        steps: of the training; None: only to time it.
        marks: steps after which the held-out figures are taken.
        pictures: where pictures go, `<pictures>-<row>.png`; None: none are wanted.
        alone: whether a process of its own is spent on it, whose memory can be told.
    """

    arm: Arm
    seed: int
    preset: str
    device: str
    steps: int | None = None
    marks: tuple[int, ...] = ()
    pictures: str | None = None
    alone: bool = True


def split(data: Any) -> tuple[ImageSet, ImageSet, str]:
    """What is trained on, what is held out, and how: the data's own test part, else a tenth, else (of one) the same."""
    train = open_data(data) if isinstance(data, (str, os.PathLike)) else as_data(data)
    if not isinstance(train, ImageSet):
        raise BadData("a comparison needs data that can be indexed: a place, tensors or a data set, not a loader")
    test = open_data(data, "test")
    if test is not None:
        return train, test, "the test part of the data"
    if len(train) == 1:
        return train, train, "nothing: the one sample is trained on and judged on"
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(key("held out"))).tolist()
    count = -(-len(train) // 10)
    kept, given = sorted(order[count:]), sorted(order[:count])
    return train.select(kept), train.select(given), f"{count} of {len(train)}, drawn once for all"


def _few(data: ImageSet, count: int, side: int, seed: int) -> Batch:
    """Some samples of a set, chosen by the seed, as one batch; images of unlike sizes are cut to squares of `side` pixels."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(key(seed, "probe samples")))[:count]
    return _squares(data, rows.tolist(), None if data.facts.size else side)


def _squares(data: ImageSet, rows: Sequence[int], resize: int | None) -> Batch:
    """Samples as one batch: as they are where sizes are equal, else their middles; resized first if asked."""
    from torchvision.transforms import v2

    samples = [data[i] for i in rows]
    side = min(min(s.x.shape[-2:]) for s in samples)
    steps = [v2.Resize(resize, antialias=True), v2.CenterCrop(resize)] if resize else [v2.CenterCrop(min(side, 256))]
    to_square: Any = v2.Compose(steps)

    def cut(image: Any) -> Any:
        return to_square(image) if (resize or not data.facts.size) and image.ndim > 2 else image  # a target may be numbers

    x = torch.stack([as_unit(cut(s.x)) for s in samples])
    target = torch.stack([as_unit(cut(s.target)) for s in samples]) if data.items.paired else None  # type: ignore[arg-type]
    label = torch.tensor([s.label for s in samples]) if data.items.labelled else None
    return Batch(x, torch.tensor(rows), label, target)


class Watched(Trainer):
    """A trainer that keeps its losses, its clock without the evaluations, and held-out figures at the marks."""

    def __init__(self, method: Method, data: Any, options: Options, held_out: ImageSet, marks: Sequence[int], steps: int) -> None:
        super().__init__(method, data, options, steps=steps)
        self.held_out, self.marks = held_out, set(marks)
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}
        self.evaluations: list[dict[str, float]] = []
        self.memory = 0
        self._sum_of_losses, self._since = torch.zeros((), device=self.device), 0

    def batches(self, start: int) -> Any:
        """The micro-batches; the clock starts here."""
        self.clock = time.perf_counter()
        return super().batches(start)

    def step(self, batches: list[Batch], *, check: bool) -> Result:
        """One step; the mean loss since the last point is kept, and figures are taken where it is time."""
        result = super().step(batches, check=check)
        self._sum_of_losses += result.loss.detach()
        self._since += 1
        done = self.ctx.step
        if done % self.log_every and done not in self.marks and done != self.ctx.total:
            return result
        loss = float(self._sum_of_losses) / self._since  # waits for a GPU
        now = time.perf_counter()
        for name, value in (("step", done), ("seconds", now - self.clock), ("loss", loss)):
            self.curve[name].append(value)
        self._sum_of_losses.zero_()
        self._since = 0
        if done in self.marks:
            self.memory = self.memory or peak_memory(self.device)  # of training alone: before anything was evaluated
            figures = evaluate(self.method, self.held_out)
            self.evaluations.append({"step": done, "seconds": now - self.clock, **figures})
            self.method.train()
        self.clock += time.perf_counter() - now
        return result


def run_trial(job: Job, data: Any) -> dict[str, Any]:
    """Time one arm, or train it with one seed and take its figures; what comes back is plain.

    Raises:
        Diverged: a loss is no longer finite; the line says of which arm.
    """
    try:
        return _timed(job, data) if job.steps is None else _trained(job, data, job.steps)
    except Diverged as error:
        when = "while it was timed" if job.steps is None else f"seed {job.seed}"
        raise Diverged(f"{job.arm.label}, {when}: {error}") from None


class Desk:
    """What a trial works with: its data, options, and methods as they start.

    Args:
        resting: bytes of this process before a method was made: Python and the libraries.
    """

    def __init__(self, job: Job, data: Any) -> None:
        here = on_cpu(job.device)
        if job.alone and here:
            torch.set_num_threads(1)
        self.job, self.kind = job, catalogue.load_method(job.arm.slug)
        self.resting = resident_memory() if here else 0
        self.train, self.held_out, _ = split(data)
        self.options = Options(seed=job.seed, device=job.device, workers=0 if here else None)

    def method(self) -> Method:
        """The method at its first weights."""
        job, settings = self.job, dict(self.job.arm.settings)
        if job.steps:
            settings["steps"] = job.steps
        return build(self.kind, self.train.facts, preset=job.preset, settings=settings, seed=job.seed, device=job.device)


def _timed(job: Job, data: Any) -> dict[str, Any]:
    """What a step, an evaluation and the way to them take."""
    began = time.perf_counter()
    desk = Desk(job, data)
    trainer = Trainer(desk.method(), desk.train, desk.options)
    cost = rehearse(trainer, at_least=2.0 if job.alone else 0.0)
    ready = time.perf_counter()
    evaluate(trainer.method, desk.held_out)
    seconds = {"evaluate_seconds": time.perf_counter() - ready, "setup_seconds": ready - began}
    return {**cost._asdict(), "memory": cost.memory if job.alone else None, **seconds}


def _trained(job: Job, data: Any, steps: int) -> dict[str, Any]:
    """Figures, curves, costs and pictures of one training."""
    desk = Desk(job, data)
    method, train, held_out = desk.method(), desk.train, desk.held_out
    options = replace(desk.options, log_every=max(1, steps // CURVE_POINTS))
    trainer = Watched(method, train, options, held_out, job.marks, steps)
    trainer.train(show=False)
    seconds = trainer.curve["seconds"][-1]
    figures = {k: v for k, v in trainer.evaluations[-1].items() if k not in ("step", "seconds")}
    pictures = _save_pictures(job, method, held_out)
    before = Trainer(desk.method(), train, desk.options, steps=steps).method  # a trainer shows a method its data
    untrained = evaluate(before, held_out)
    if train.items.labelled and next(iter(capabilities(method)), "") == "encode":
        figures |= probe(method, train, held_out, job.seed)
        untrained |= probe(before, train, held_out, job.seed)
    if train.items.labelled and next(iter(capabilities(method)), "") == "sample" and not draws_points(method):
        figures |= judge(method, train, held_out, job.seed)
    memory = {"memory": trainer.memory, "resting_memory": desk.resting} if job.alone else {"memory": None, "resting_memory": None}
    return {
        "figures": figures, "untrained": untrained, "curves": trainer.curve, "evaluations": trainer.evaluations,
        "costs": {"seconds": seconds, "images_per_second": steps * method.config.batch_size / seconds, **memory},
        "pictures": pictures,
    }  # fmt: skip


def on_cpu(device: str) -> bool:
    """Whether this device is, or comes to, the processor."""
    return device == "cpu" or not torch.accelerator.is_available()


def probe(method: Any, train: ImageSet, held_out: ImageSet, seed: int) -> dict[str, float]:
    """What the features are worth: fine-tuned on a few labels, and read as they are by a line and by neighbours."""
    from sfumato.probes import extract_features, finetune_probe, knn_probe, linear_probe

    side = getattr(method.config, "image_size", None) or 64
    known, unknown = _few(train, PROBE_TRAIN, side, seed), _few(held_out, PROBE_TEST, side, seed)
    assert known.label is not None and unknown.label is not None  # noqa: PT018
    z, test = extract_features(method, known), (extract_features(method, unknown), unknown.label)
    generator = torch.Generator().manual_seed(key(seed, "probe"))
    return {
        "few_label_accuracy": finetune_probe(method, known, test=unknown, labels=FEW, generator=generator),
        "linear_probe": linear_probe(z, known.label, test=test, scaler="standard"),
        "knn_probe": knn_probe(z, known.label, test=test),
    }


@torch.no_grad()
def judge(method: Any, train: ImageSet, held_out: ImageSet, seed: int) -> dict[str, float]:
    """How far new pictures are from held-out ones: the Fréchet distance in the features of a small classifier of the data.

    Beside it stands that of as many training pictures, which no generator need pass.
    """
    from torch.nn.functional import interpolate

    from sfumato.metrics import frechet_features
    from sfumato.probes import train_judge

    generator = torch.Generator(method.device).manual_seed(key(seed, "drawn"))
    drawn = method.sample(DRAWN, generator).float().cpu()
    side = drawn.shape[-1]
    known, unknown = _few(train, PROBE_TRAIN, side, seed), _few(held_out, PROBE_TEST, side, seed)
    assert known.label is not None
    seen, x = (b.x if b.x.shape[-1] == side else interpolate(b.x, side, mode="area") for b in (known, unknown))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(key(seed, "judge"))  # the same one for every arm
        features = train_judge(seen, known.label)[:-1]
    given, real = features(seen[:DRAWN]), features(x)
    return {
        "frechet_distance": frechet_features(features(drawn), real).item(),
        "frechet_of_training_pictures": frechet_features(given, real).item(),
    }


def _save_pictures(job: Job, method: Method, held_out: ImageSet) -> dict[str, str]:
    """The method's pictures of a few held-out samples; the names of their files by row."""
    if job.pictures is None:
        return {}
    from torchvision.utils import make_grid, save_image

    batch, files = _squares(held_out, range(min(SHOWN, len(held_out))), None), {}
    Path(job.pictures).parent.mkdir(parents=True, exist_ok=True)
    rows = preview(method, batch, 0)
    if batch.target is not None and batch.target.ndim == 4:
        rows.setdefault("target", batch.target)
    for row, images in rows.items():
        path = Path(f"{job.pictures}-{re.sub(r'[^a-z0-9]+', '-', row.lower())}.png")
        strip = make_grid(images, nrow=len(images), padding=2, pad_value=1)
        save_image(strip[:, 2:-2, 2:-2] if len(images) > 1 else strip, path)
        files[row] = path.name
    return files
