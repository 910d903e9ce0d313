"""Real kills: SIGKILL at random moments of training and of checkpoint writes, then --resume gives the same losses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [
    *(sys.executable, "-m", "sfumato", "train", "mae", "--data", "sample:digits", "--device", "cpu", "--save-every", "1"),
    *("--log-every", "1", "--steps", "60", "--set", "image_size=8", "--set", "patch=2", "--set", "batch_size=16"),
    *("--set", "dim=16", "--set", "depth=1", "--set", "decoder_dim=16"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def folder(root: Path) -> Path:
    return next(root.glob("mae/*"))


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def kill_after(process: subprocess.Popen, root: Path, more_steps: int, rng: random.Random) -> None:
    """SIGKILL once so many steps were written, at a random moment of the steps and writes that follow."""
    until, first = time.monotonic() + 120, None
    while time.monotonic() < until and process.poll() is None:
        found = list(root.glob("mae/*/metrics.jsonl"))
        lines = found[0].read_bytes().count(b"\n") if found else 0
        if found and process.poll() is None:
            first = lines if first is None else first
            if lines >= first + more_steps:
                break
        time.sleep(0.002)
    time.sleep(rng.random() * 0.03)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_gives_the_same_losses(seed, tmp_path):
    rng = random.Random(seed)
    whole = start(*COMMAND, "--runs", str(tmp_path / "whole"))
    broken_root = tmp_path / "broken"
    kill_after(start(*COMMAND, "--runs", str(broken_root)), broken_root, rng.randrange(3, 15), rng)
    run = folder(broken_root)
    assert max(losses(run), default=0) < 60
    resume = [sys.executable, "-m", "sfumato", "train", "--resume", str(run)]
    kill_after(start(*resume), broken_root, rng.randrange(3, 15), rng)
    assert max(losses(run), default=0) < 60
    last = start(*resume)
    _, errors = last.communicate(timeout=180)
    assert last.returncode == 0, errors
    whole.communicate(timeout=180)
    assert whole.returncode == 0
    expected = losses(folder(tmp_path / "whole"))
    assert len(expected) == 60
    assert losses(run) == expected


def test_sigterm_ends_cleanly_with_a_checkpoint(tmp_path):
    process = start(*COMMAND, "--runs", str(tmp_path), "--set", "steps=100000")
    until = time.monotonic() + 120
    while time.monotonic() < until and not any(
        b.count(b"\n") > 3 for b in (p.read_bytes() for p in tmp_path.glob("mae/*/metrics.jsonl"))
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    newest = max(int(p.stem[5:]) for p in folder(tmp_path).glob("checkpoints/*.safetensors"))
    assert f"stopped at step {newest} " in errors
