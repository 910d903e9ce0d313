"""A run is a folder `runs/<slug>/<stamp>/`: settings, metrics, checkpoints and pictures, locked while it is written to.

config.yaml   metrics.jsonl   checkpoints/step-N.safetensors   pictures/   report.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from sfumato.engine import checkpoint
from sfumato.errors import BadCheckpoint, Busy


class Run:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"

    @classmethod
    def create(cls, root: str | Path, slug: str) -> Run:
        """A new folder under `root/slug`, named by the time; never an existing one."""
        run = cls(fresh_folder(Path(root) / slug))
        run.checkpoints.mkdir()
        run.pictures.mkdir()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run folder."""
        run = cls(path)
        if not run.path.is_dir():
            raise BadCheckpoint(f"no run at {run.path}; `sfumato runs` lists what there is")
        if not (run.path / "config.yaml").is_file():
            raise BadCheckpoint(f"{run.path} is no run folder: it holds no config.yaml")
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; a second process is refused. The system frees it when the process dies, however it dies."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise Busy(f"{self.path} is in use by another process; wait for it or start a new run") from None
        try:
            yield
        finally:
            lock.release()

    @property
    def config(self) -> dict[str, Any]:
        """What `config.yaml` says."""
        try:
            found = yaml.safe_load((self.path / "config.yaml").read_text())
            return dict(found)
        except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
            raise BadCheckpoint(f"{self.path / 'config.yaml'} cannot be read ({error})") from None

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.yaml` in one move."""
        aside = self.path / ".config.yaml.writing"
        aside.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        os.replace(aside, self.path / "config.yaml")

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, or None."""
        return next(reversed(checkpoint.listing(self.checkpoints)), None)

    def log(self, /, **figures: Any) -> None:
        """Append a line to `metrics.jsonl`."""
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(figures) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of `metrics.jsonl` (a kill may cut the last one short)."""
        lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def rewind(self, step: int) -> None:
        """Forget the metrics after `step`: a resumed run writes them again."""
        kept = [m for m in self.metrics() if m.get("step", 0) <= step]
        aside = self.path / ".metrics.jsonl.writing"
        aside.write_text("".join(json.dumps(m) + "\n" for m in kept))
        os.replace(aside, self.metrics_file)


def fresh_folder(root: Path) -> Path:
    """A new folder under `root`, named by the time; never an existing one."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
        path = root / (stamp + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise Busy(f"cannot find a free name under {root}")
