"""What all races share: equal results first, then interleaved rounds, ratios with their quartiles, and peak memory.

A race yields heats. A heat has lanes, ours first; a lane is a function that builds everything and returns what is timed. Before
the clock starts, the first result of every lane is compared with ours: lanes that compute different things are not raced.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
DISTRIBUTIONS = {"curvlinops": "curvlinops-for-pytorch"}
"""Lanes whose package is not called as their module."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that passed, or that this process computed: less noisy on a busy machine, equal on an idle one with one thread."""

Run = Callable[[], Any]
Lane = Callable[[], Run]


class ResultsDiffer(Exception):
    """Two lanes of a heat do not compute the same."""


def relative_difference(ours: Any, theirs: Any) -> float:
    """The largest difference over the largest value; tensors, numbers, or sequences of them."""
    a, b = _flat(ours), _flat(theirs)
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def _flat(value: Any) -> Tensor:
    parts = value if isinstance(value, Sequence) else [value]
    return torch.cat([torch.as_tensor(p).detach().double().reshape(-1) for p in parts])


@dataclass(frozen=True)
class Heat:
    """One thing done by several lanes.

    Args:
        name: what is done, and how large it is.
        lanes: by name, ours first; peers are named like their module.
        per: how often a run does it; times are divided by it.
        tolerance: largest difference of a lane's first result from ours.
        difference: how far apart two results are.
        free: lanes whose result is another one by design; `why` of the race must say so.
        checks: lanes to compare instead of those that are timed (with a given draw, say).
        limit: a ratio that must not be exceeded, where the lanes are no rivals.
        memory: whether to measure the peak of torch's allocations.
    """

    name: str
    lanes: Mapping[str, Lane]
    per: int = 1
    tolerance: float = 1e-5
    difference: Callable[[Any, Any], float] = relative_difference
    free: tuple[str, ...] = ()
    checks: Mapping[str, Lane] = field(default_factory=dict)
    limit: float | None = None
    memory: bool = True


@dataclass(frozen=True)
class Race:
    """A title, why it comes out as it does (true whoever wins), and its heats; `processes`: run under torchrun."""

    name: str
    title: str
    why: str
    heats: Callable[[bool], Iterator[Heat]]
    processes: int = 1


RACES: dict[str, Race] = {}


def race(title: str, why: str, *, processes: int = 1) -> Callable[[Callable[[bool], Iterator[Heat]]], Callable[..., Any]]:
    """Register a function `(quick) -> heats` under its name."""

    def register(heats: Callable[[bool], Iterator[Heat]]) -> Callable[..., Any]:
        RACES[heats.__name__] = Race(heats.__name__, title, why, heats, processes)
        return heats

    return register


def load_races() -> dict[str, Race]:
    """All races of `benchmarks.races`."""
    package = importlib.import_module("benchmarks.races")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"benchmarks.races.{module.name}")
    return RACES


# ---- running


def run_race(
    race: Race, *, rounds: int, quick: bool = False, clock: str = "wall", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run all heats; the result as it is stored. Several processes wait for each other, so they are timed by the wall's clock.

    Raises:
        ResultsDiffer: a lane's result is not ours.
    """
    if race.processes > 1 and "RANK" not in os.environ:
        return _launch(race, rounds, quick, say)
    skipped: dict[str, str] = {}
    heats = []
    for heat in race.heats(quick):
        measured = run_heat(heat, rounds, skipped, clock)
        if measured is not None:
            heats.append(measured)
            say(f"  {told(measured)}")
    for line in skipped.values():
        say(f"  skipped {line}")
    return {
        "race": race.name,
        "title": race.title,
        "why": race.why,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "processes": race.processes,
        "rounds": rounds,
        "clock": clock,
        "heats": heats,
        "skipped": skipped,
    }


def _launch(race: Race, rounds: int, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The same race inside of several processes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out, threads = Path(folder) / "result.json", str(torch.get_num_threads())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={race.processes}"]
        command += ["-m", "benchmarks", race.name, "--rounds", str(rounds), "--threads", threads]
        command += ["--out", str(out), *(["--quick"] if quick else [])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if ResultsDiffer.__name__ in line]
            raise ResultsDiffer(last[-1]) if last else RuntimeError(done.stderr[-3000:])
        result: dict[str, Any] = json.loads(out.read_text())
    for heat in result["heats"]:
        say(f"  {told(heat)}")
    return result


def run_heat(heat: Heat, rounds: int, skipped: dict[str, str], clock: str = "wall") -> dict[str, Any] | None:
    """Compare, time and weigh the lanes; None when no peer is there. What is missing is added to `skipped`."""
    runs: dict[str, Run] = {}
    for name, lane in heat.lanes.items():
        try:
            runs[name] = lane()
        except ImportError as error:
            skipped[name] = f"{name}: {error}; pip install {DISTRIBUTIONS.get(name, name)}"
    ours, *peers = runs
    if ours != next(iter(heat.lanes)):
        raise RuntimeError(f"{heat.name}: our own lane does not import: {skipped[next(iter(heat.lanes))]}")
    if not peers:
        return None
    differences = check_equal(heat, runs)
    seconds = time_lanes(runs, rounds, clock)
    lanes: dict[str, dict[str, Any]] = {}
    for name in runs:
        lanes[name] = {"ms": _digits(1e3 * statistics.median(seconds[name]) / heat.per)}
        if name != ours:
            lanes[name] |= ratio_statistics(seconds[ours], seconds[name])
            lanes[name]["outcome"] = outcome(lanes[name], heat.limit)
            lanes[name]["difference"] = differences.get(name)
    del runs
    if heat.memory:
        for name in lanes:
            lanes[name]["peak_mb"] = _digits(peak_allocation(heat.lanes[name]) / 2**20)
    return {"name": heat.name, "limit": heat.limit, "tolerance": heat.tolerance, "lanes": lanes}


def check_equal(heat: Heat, runs: Mapping[str, Run]) -> dict[str, float]:
    """How far the first result of every peer is from ours; without an entry where it is free to differ.

    Raises:
        ResultsDiffer: further than the tolerance, or not a number.
    """
    if heat.checks:
        runs = {name: heat.checks[name]() for name in runs if name in heat.checks}
    results = {name: run() for name, run in runs.items()}
    ours, *peers = results
    differences = {}
    for name in peers:
        if name in heat.free:
            continue
        differences[name] = d = heat.difference(results[ours], results[name])
        if not d <= heat.tolerance:
            raise ResultsDiffer(f"{heat.name}: {name} differs from {ours} by {d:.2e}, allowed is {heat.tolerance:.0e}")
    return differences


def time_lanes(runs: Mapping[str, Run], rounds: int, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of every run, round by round: each round runs every lane once, another one first each time; one warms up."""
    names, now = list(runs), CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()
            _meet()
            started = now()
            runs[name]()
            _meet()
            if i:
                seconds[name].append(now() - started)
    return seconds


def _meet() -> None:
    """Wait for the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def ratio_statistics(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Our time over theirs, round by round: median and quartiles."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def outcome(ratio: Mapping[str, float], limit: float | None = None) -> str:
    """In a word: `even` where the quartiles enclose 1 or the median is within 2 % of it."""
    if limit is not None:
        return "within the limit" if ratio["ratio"] <= limit else "above the limit"
    if ratio["low"] <= 1 <= ratio["high"] or abs(ratio["ratio"] - 1) <= 0.02:
        return "even"
    return "faster" if ratio["ratio"] < 1 else "slower"


def peak_allocation(lane: Lane) -> int:
    """Most bytes that torch held at once, from building a lane to the end of its second run, as torch's profiler counts them."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with _no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = lane()
        run()
        run()
    del run
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


@contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler's library writes to stderr by itself, whatever it is told."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def machine() -> dict[str, Any]:
    """Where it ran and with what."""
    peers = ("timm", "diffusers", "accelerate", "pytorch_optimizer", "curvlinops", "pyhessian", "lightly", "transformers")
    versions = {}
    for name in ("torch", *peers):
        try:
            versions[name] = importlib.metadata.version(DISTRIBUTIONS.get(name, name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _digits(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def told(heat: Mapping[str, Any]) -> str:
    """A heat in a line for the terminal."""
    (ours, mine), *peers = heat["lanes"].items()
    against = [
        f"{lane['ratio']:.3f} [{lane['low']:.3f}, {lane['high']:.3f}] of {name} ({lane['ms']:g} ms): {lane['outcome']}"
        for name, lane in peers
    ]
    return f"{heat['name']}: {ours} {mine['ms']:g} ms, " + "; ".join(against)


def store(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result where the documentation finds it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{result['race']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
