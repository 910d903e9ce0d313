"""`sfumato doctor`: what this machine is, what is installed, and a self-test of the parts that a training stands on."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sfumato.cli.console import say, say_json

PACKAGES = ("sfumato", "torch", "torchvision", "timm", "diffusers", "deepinv", "accelerate", "safetensors", "numpy")
EXTRAS = {
    "web": ("gradio",),
    "ray": ("ray",),
    "data": ("datasets", "webdataset", "av"),
    "track": ("mlflow", "tensorboard"),
    "bench": ("pytorch_optimizer", "curvlinops", "lightly", "transformers"),
}


def doctor(as_json: bool) -> bool:
    """Print it all; True when the self-test passed."""
    import torch

    report: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
        "accelerators": accelerators(),
        "packages": {name: installed(name) for name in PACKAGES},
        "extras": {name: all(importlib.util.find_spec(m) is not None for m in modules) for name, modules in EXTRAS.items()},
        "self_test": {name: run_check(check) for name, check in CHECKS.items()},
    }
    well = all(outcome["ok"] for outcome in report["self_test"].values())
    if as_json:
        say_json({**report, "well": well})
        return well
    for name in ("python", "system", "cores", "threads", "memory", "disk"):
        say(f"{name:13}{report[name]}")
    say(f"{'accelerators':13}{', '.join(report['accelerators']) or 'none: the small presets are made for this'}")
    say(f"{'packages':13}{', '.join(f'{k} {v}' for k, v in report['packages'].items())}")
    for name, there in report["extras"].items():
        say(f"{'extra ' + name:13}{'installed' if there else f'not installed (pip install sfumato[{name}])'}")
    for name, outcome in report["self_test"].items():
        say(
            f"{'self-test':13}{'ok  ' if outcome['ok'] else 'FAIL'} {name} ({outcome['seconds']:.1f} s) {outcome['why']}".rstrip()
        )
    return well


def installed(name: str) -> str:
    """The version of a package, or "missing"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def memory() -> str:
    """Memory of the machine, where the system tells."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def accelerators() -> list[str]:
    """Names of the accelerators that torch can use."""
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [str(found)] if found else []


def run_check(check: Callable[[], None]) -> dict[str, Any]:
    """Whether a check passed, how long it took, and why not."""
    started = time.perf_counter()
    try:
        check()
    except Exception as error:  # a self-test reports whatever breaks
        return {"ok": False, "seconds": time.perf_counter() - started, "why": f"{type(error).__name__}: {error}"}
    return {"ok": True, "seconds": time.perf_counter() - started, "why": ""}


def _train_and_resume() -> None:
    """Train a tiny MAE, resume it from the middle, and get the same weights."""
    import torch

    from sfumato.data import digits
    from sfumato.engine import Run, Trainer, load
    from sfumato.engine.options import Options
    from sfumato.papers.masking.mae import MAE

    config = MAE.Config.small(image_size=8, patch=2, channels=1, steps=4, batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        ends = []
        for stop in (4, 2):
            torch.manual_seed(0)
            run = Run.create(folder, "mae")
            run.write_config({"slug": "mae"})
            trainer = Trainer(MAE(config), digits()[0], Options(device="cpu", save_every=1, workers=0), run=run)
            batches = trainer.batches(0)
            for _ in range(stop):
                trainer.step(next(batches), check=True)
            trainer._save()
            torch.manual_seed(1)
            ends.append(Trainer(MAE(config), digits()[0], Options(device="cpu", workers=0), run=run).train(show=False))
            load(run.path)
        a, b = (dict(m.named_parameters()) for m in ends)
        if not all(torch.equal(a[k], b[k]) for k in a):
            raise AssertionError("a resumed training ended in other weights")


def _pictures() -> None:
    """Write and read back a picture."""
    import torch

    from sfumato.data.images import read_image, write_image

    with tempfile.TemporaryDirectory() as folder:
        x = torch.rand(3, 8, 9).mul(255).round() / 255
        write_image(Path(folder) / "x.png", x)
        if not torch.allclose(read_image(Path(folder) / "x.png").float(), x, atol=1e-6):
            raise AssertionError("a picture came back changed")


CHECKS = {"train, kill, resume: equal weights": _train_and_resume, "write and read a picture": _pictures}

if __name__ == "__main__":
    sys.exit(0 if doctor(as_json=False) else 1)
