"""How to train, apart from a method's own settings, and accelerate's object for it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch

from sfumato.engine.run_folder import Run
from sfumato.errors import BadSetting, MissingExtra, SfumatoError


@dataclass(frozen=True)
class Options:
    """How to train, apart from the method's own settings.

    Args:
        seed: of weights, order, augmentation and noise.
        accumulate: micro-batches a step; the step's batch size stays what the method says.
        device: "auto", "cpu", "cuda", ...
        precision: "fp32" or "bf16" (autocast).
        ema: decay of a moving average of all weights, used by `apply`; None: none.
        workers: loading processes; None: chosen from the data and the machine.
        log_every: steps between lines of metrics.jsonl; None: about a thousand lines in all.
        save_every: steps between checkpoints; None: one a minute.
        keep: checkpoints kept.
        track: a tracker of accelerate: "tensorboard", "mlflow", "wandb"; None: none.
    """

    seed: int = 0
    accumulate: int = 1
    device: str = "auto"
    precision: str = "fp32"
    ema: float | None = None
    workers: int | None = None
    log_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    track: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BadSetting(f"precision {self.precision!r} is not known: fp32 or bf16 (fp16's scaler refuses closures)")
        if self.track is None:
            return
        if self.track not in TRACKERS:
            raise BadSetting(f"tracker {self.track!r} is not known: {', '.join(TRACKERS)}")
        if find_spec(self.track) is None:
            raise MissingExtra(f"{self.track} is not installed: pip install {TRACKERS[self.track]}")


PRECISIONS = {"fp32": "no", "bf16": "bf16"}
TRACKERS = {"tensorboard": "'sfumato[track]'", "mlflow": "'sfumato[track]'", "wandb": "wandb"}
"""What can be logged to, and what brings it."""


def accelerator(options: Options, run: Run | None = None) -> Any:
    """accelerate's Accelerator for these options: device, precision, processes, tracker."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    cpu = options.device == "cpu"
    if AcceleratorState._shared_state and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    if options.device not in ("auto", "cpu"):
        available = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        if not available or torch.device(options.device).type != available.type:
            raise SfumatoError(f"device {options.device!r} is not available here; `sfumato doctor` says what is")
    logger = {"log_with": options.track, "project_dir": str(run.path)} if options.track and run else {}
    acc = Accelerator(cpu=cpu, mixed_precision=PRECISIONS[options.precision], **logger)
    assert PartialState._shared_state
    if options.track:
        acc.init_trackers("sfumato", config={k: str(v) for k, v in asdict(options).items()})
    return acc
