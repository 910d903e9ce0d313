"""`sfumato train`: any method on a person's own pictures, resumable, on one process or many."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from sfumato import catalogue
from sfumato.cli.console import hint, say, tell_data
from sfumato.data import Facts, open_data
from sfumato.engine import Options, Run, Trainer, build, initialise, load, rebuild
from sfumato.engine.checkpoint import peek
from sfumato.engine.loading import ELSEWHERE, parse_settings
from sfumato.engine.rehearsal import rehearse
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.method import Method, capabilities, draws_points
from sfumato.report.run_report import duration


def train(
    slug: str,
    where: str,
    *,
    steps: int | None,
    minutes: float | None,
    settings: list[str],
    init: Path | None,
    preset: str,
    runs: Path,
    dry_run: bool,
    **options: Any,
) -> Path | None:
    """Start a new run; returns its folder (None for a dry run or another process than the first)."""
    if steps is not None and minutes is not None:
        raise BadSetting("give --steps or --minutes, not both")
    if (steps is not None and steps < 1) or (minutes is not None and minutes <= 0):
        raise BadSetting("--steps and --minutes are positive")
    kind, checked = catalogue.load_method(slug), Options(**options)
    chosen = parse_settings(settings)
    if steps is not None:
        chosen["steps"] = steps
    images = tell_data(open_data(where, "train"))
    method = new_method(kind, images.facts, init, preset=preset, settings=chosen, seed=options["seed"], device=options["device"])
    config = {
        "slug": slug,
        "data": absolute(where),
        "settings": method.config.model_dump(mode="json"),
        "minutes": minutes,
        "init": None if init is None else _absolute(init),
        "options": options,
        "classes": images.facts.classes and list(images.facts.classes),
        "threads": torch.get_num_threads(),
        "version": version("sfumato"),
    }
    if dry_run:
        tell_cost(method, images, checked, minutes)
        return None
    say(resolved_line(config))
    with several_processes(options["device"]) as (main, share):
        run = Run.create(runs, slug) if main else None
        run = Run(share(None if run is None else str(run.path)))
        if main:
            run.write_config(config)
        return work(run, method, images, config, main)


def resume(path: Path) -> Path | None:
    """Continue a run that was stopped, killed or moved; every setting comes from its folder."""
    run = Run.open(path)
    config = run.config
    torch.set_num_threads(config.get("threads", torch.get_num_threads()))
    kind = catalogue.load_method(config["slug"])
    if any(m.get("done") for m in run.metrics()):
        hint(f"{path} is finished")
        tell_next(path, load(path))
        return path
    images = tell_data(open_data(config["data"], "train"))
    last = run.last_checkpoint
    if last is None:  # killed before the first checkpoint: begin as `train` did
        previous = load(config["init"]) if config["init"] else None
        seed, device = config["options"]["seed"], config["options"]["device"]
        method = build(
            kind, images.facts, preset="paper", settings=config["settings"], seed=seed, device=device, previous=previous
        )
    else:
        if (found := peek(last).get("slug", config["slug"])) != config["slug"]:
            raise BadCheckpoint(f"{last} is a checkpoint of {found!r}, but {path / 'config.yaml'} says {config['slug']!r}")
        method = rebuild(kind, config["settings"], last)
    with several_processes(config["options"]["device"]) as (main, _):
        return work(run, method, images, config, main)


def _absolute(init: Path) -> str:
    """A run or file from anywhere; a name that is of no file here stays as it is."""
    kind = next((k for k in ELSEWHERE if str(init).startswith(k)), "")
    place = Path(str(init).removeprefix(kind))
    return f"{kind}{place.resolve() if not kind or place.exists() else place}"


def new_method(kind: type[Method], facts: Facts, init: Path | None, **build_options: Any) -> Method:
    """A method as it starts: fresh, from another run, or with a person's own weights in it."""
    if init is None or init.is_dir() or str(init).startswith(ELSEWHERE) or peek(init):
        return build(kind, facts, **build_options, previous=None if init is None else load(init))
    method = build(kind, facts, **build_options)
    initialise(method, init)
    return method


def work(run: Run, method: Method, images: Any, config: dict[str, Any], main: bool) -> Path | None:
    """Train in a run folder, then write its page."""
    options = Options(**config["options"])
    if not main:
        Trainer(method, images, options, minutes=config["minutes"], run=run).train(show=False)
        return None
    with run.lock():
        trainer = Trainer(method, images, options, minutes=config["minutes"], run=run)
        run.write_config(config | {"total": trainer.ctx.total})
        if config["minutes"]:
            say(f"{config['minutes']:g} minutes are about {trainer.ctx.total} steps of {method.config.batch_size}")
        trainer.train(held_out=open_data(config["data"], "test"))
        from sfumato.report.run_report import write_run_report

        page = write_run_report(run.path)
    last = run.metrics()[-1]
    for name, value in last.get("eval", {}).items():
        say(f"{name}: {value:.4g}")
    say(f"{run.path}  ({last['step']} steps, {last['seconds']:.0f} s)\nreport: {page}")
    tell_next(run.path, method)
    return run.path


def tell_next(path: Path, method: Method) -> None:
    """What a trained run is good for, as a command."""
    drawn = "-n 1000 -o points.npz" if draws_points(method) else "-n 64 -o grid.png"
    following = {
        "sample": f"sample {{}} {drawn}", "search": "apply {} designs.npz -o better.npz",
        "edit": "edit {} --direction 0 --strength -3,0,3 -o strip.png",
    }  # fmt: skip
    verb = next(iter(capabilities(method)), "")
    hint(f"next: sfumato {following.get(verb, 'apply {} PICTURE... -o OUT').format(path)}")


def tell_cost(method: Method, images: Any, options: Options, minutes: float | None) -> None:
    """What a training would cost: parameters, batch shape, seconds a step, memory; nothing is written."""
    trainer = Trainer(method, images, options)
    cost = rehearse(trainer)
    total = cost.steps_in(minutes) if minutes else method.config.steps
    say(
        f"{type(method).__name__}: {cost.trainable:,} parameters\n"
        f"batch: {options.accumulate} x {cost.batch} on {trainer.device}\n"
        f"time: {cost.step_seconds:.3g} s a step, {total} steps, about {duration(cost.step_seconds * total)} in all\n"
        f"memory: {cost.memory / 2**30:.2f} GiB at the peak{'' if trainer.device.type == 'cuda' else ' (whole process)'}"
    )


def resolved_line(config: dict[str, Any]) -> str:
    """One line that says everything and can be pasted into a shell or a report of a problem."""
    parts = ["sfumato", "train", config["slug"], "--data", config["data"], "--preset", "paper"]
    for name, value in config["settings"].items():
        parts += [
            "--set",
            f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix('...').strip()}",
        ]
    if config["minutes"]:
        parts += ["--minutes", str(config["minutes"])]
    if config["init"]:
        parts += ["--init", config["init"]]
    defaults = Options()
    for name, value in config["options"].items():
        if value != getattr(defaults, name):
            parts += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(parts)


def absolute(where: str) -> str:
    """A place that still holds when the run is resumed from another folder."""
    return str(Path(where).resolve()) if Path(where).exists() else where


@contextmanager
def several_processes(device: str) -> Iterator[Any]:
    """(is this the first process, a function that hands the first process's value to all)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True, lambda value: value
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one voice is enough; lives as long as the process)

    def share(value: Any) -> Any:
        (value,) = broadcast_object_list([value])
        return value

    try:
        yield state.is_main_process, share
    finally:
        state.destroy_process_group()
