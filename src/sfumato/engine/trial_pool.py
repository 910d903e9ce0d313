"""Many trials: each in a fresh process, several at once, and kept as files so that a stopped comparison goes on."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sfumato import catalogue
from sfumato.engine.arms import Arm
from sfumato.engine.lab import provenance
from sfumato.engine.randomness import key
from sfumato.engine.signals import end_with_parent
from sfumato.engine.trial import Job, run_trial
from sfumato.errors import SfumatoError
from sfumato.method import Method

Told = Callable[[str, int | None, float], None]
"""Told after every trial: arm, seed (None: timing), seconds."""


def in_turn(
    arms: Sequence[Arm], seeds: Sequence[int], plan: Mapping[str, Any], preset: str, device: str, processes: int
) -> list[Job]:
    """Seed by seed, each beginning with another arm, so that no arm always has the same neighbour."""
    jobs = []
    for turn, seed in enumerate(seeds):
        for i in range(len(arms)):
            arm = arms[(i + turn) % len(arms)]
            steps, marks = plan[arm.label]
            jobs.append(Job(arm, seed, preset, device, steps, marks, "" if turn == 0 else None, processes > 0))
    return jobs


class Store:
    """Finished trials as files in a folder, found again by everything that they depend on; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, place: str | None, facts: str, processes: int) -> None:
        self.folder, self.found = folder, 0
        self.keeps = folder is not None and place is not None
        code = {name: value for name, value in provenance().items() if name != "date"}
        if str(code["commit"]).endswith("-dirty"):  # such a commit names many states of the code
            code["edited"] = max(path.stat().st_mtime_ns for path in Path(catalogue.__file__).parent.rglob("*.py"))
        self.common = {"data": place, "facts": facts, "processes": processes, **code}

    def prepared(self, job: Job, config: Mapping[str, Any]) -> tuple[Job, Path | None]:
        """The job with the place of its pictures, and the file of its result."""
        if self.folder is None:
            return replace(job, pictures=None), None
        arm = {"slug": job.arm.slug, "config": {k: v for k, v in config.items() if k != "steps"}}
        told = {**self.common, **asdict(replace(job, arm=Arm("", {}, ""))), **arm}
        name = f"{job.arm.slug}-{'timing' if job.steps is None else job.seed}-{key(json.dumps(told, sort_keys=True)):014x}"
        job = job if job.pictures is None else replace(job, pictures=str(self.folder / "pictures" / name))
        return job, self.folder / "trials" / f"{name}.json" if self.keeps else None

    def read(self, path: Path | None, job: Job) -> dict[str, Any] | None:
        """A result that is there already, whole and with its pictures."""
        try:
            result: dict[str, Any] = json.loads(path.read_text()) if path else {}
        except (OSError, ValueError):
            return None
        pictures = [Path(job.pictures or "").parent / name for name in result.get("pictures", {}).values()]
        if not result or not all(picture.exists() for picture in pictures):
            return None
        self.found += job.steps is not None
        return result

    def write(self, path: Path | None, result: dict[str, Any]) -> None:
        """Keep a result, whole or not at all."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(result))
        os.replace(aside, path)


def run_trials(
    jobs: Sequence[Job], data: Any, processes: int, store: Store, methods: Mapping[str, Method], report: Told | None
) -> list[dict[str, Any]]:
    """The results of all jobs, in their order: kept ones, and new ones that run `processes` at a time."""
    tell = report or (lambda *_: None)
    results: dict[int, dict[str, Any]] = {}
    waiting: dict[int, tuple[Job, Path | None]] = {}
    for i, job in enumerate(jobs):
        job, path = store.prepared(job, methods[job.arm.label].config.model_dump(mode="json"))
        found = store.read(path, job)
        if found is None:
            waiting[i] = job, path
        else:
            results[i] = found

    def finish(i: int, result: dict[str, Any], seconds: float) -> None:
        job, path = waiting[i]
        store.write(path, result)
        results[i] = result
        tell(job.arm.label, None if job.steps is None else job.seed, seconds)

    def timed(job: Job) -> tuple[dict[str, Any], float]:
        began = time.monotonic()
        result = run_trial(job, data) if processes == 0 else _in_a_process(job, data)
        return result, time.monotonic() - began

    if processes == 0:
        for i, (job, _) in waiting.items():
            finish(i, *timed(job))
        return [results[i] for i in range(len(jobs))]
    with ThreadPoolExecutor(processes) as threads:
        running: dict[Future[Any], int] = {threads.submit(timed, job): i for i, (job, _) in waiting.items()}
        try:
            for future in as_completed(running):
                finish(running[future], *future.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[i] for i in range(len(jobs))]


def _in_a_process(job: Job, data: Any) -> dict[str, Any]:
    """One trial in a fresh process, so that its memory is its own and a crash is told."""
    with ProcessPoolExecutor(1, mp_context=_processes(), initializer=end_with_parent) as one:
        try:
            return one.submit(run_trial, job, data).result()
        except BrokenProcessPool:
            raise SfumatoError(
                f"the process of {job.arm.label}, seed {job.seed} was killed, perhaps for want of memory: "
                "try fewer processes or a smaller batch_size. (A script calls compare under if __name__ == '__main__'.)"
            ) from None


@functools.cache
def _processes() -> Any:
    """How fresh processes are made: on Linux each is a copy of one that has only imported what trials need."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(
        [run_trial.__module__, "accelerate", "torchvision.transforms.v2", "timm.optim", "sklearn.linear_model"]
    )
    return context
