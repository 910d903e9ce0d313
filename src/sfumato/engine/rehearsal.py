"""What a training will cost, measured: a few steps are taken and thrown away.

>>> import torch
>>> from sfumato.engine import Options, Trainer
>>> from sfumato.engine.rehearsal import rehearse
>>> from sfumato.papers.masking.mae import MAE
>>> mae = MAE(MAE.Config.small(batch_size=4, channels=1, dim=16, depth=1))
>>> cost = rehearse(Trainer(mae, torch.rand(8, 1, 32, 32), Options(device="cpu")), at_least=0)
>>> cost.batch, cost.steps_in(minutes=1) > 0
('[4x1x32x32]', True)
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from sfumato.engine.loop import Trainer


class Rehearsal(NamedTuple):
    """What a training costs.

    Args:
        parameters: of the whole method, teachers and averages included.
        trainable: those that are trained.
        batch: the shape of a micro-batch, in words.
        step_seconds: median time of a step with its loading.
        memory: bytes at the peak, of the accelerator or else of the whole process.
    """

    parameters: int
    trainable: int
    batch: str
    step_seconds: float
    memory: int

    def steps_in(self, minutes: float) -> int:
        """Steps that fit into a time, at least 1."""
        return max(1, int(60 * minutes / self.step_seconds))


def rehearse(trainer: Trainer, *, at_least: float = 1.0) -> Rehearsal:
    """Time a trainer's steps, for `at_least` so many seconds; it is left as it was."""
    sizes = [(p.numel(), p.requires_grad) for p in trainer.method.parameters()]
    shape = "x".join(map(str, next(trainer.batches(0))[0].x.shape))
    seconds = trainer.seconds_a_step(at_least=at_least)
    total, trainable = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    return Rehearsal(total, trainable, f"[{shape}]", seconds, peak_memory(trainer.device))


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: what tensors took on a GPU, else the resident memory of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Bytes of memory that this process holds now (0 where the system does not say)."""
    return _status("VmRSS")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes. Unlike `ru_maxrss`, its peak does not begin at that of the parent process."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found[1]) if found else 0
