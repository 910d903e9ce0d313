"""`sfumato runs`: list, show and remove run folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sfumato.cli.console import hint, say, say_json
from sfumato.engine.run_folder import Run
from sfumato.errors import BadSetting


def listing(root: Path, as_json: bool) -> None:
    """All runs under a root, newest last."""
    rows = [summary(Run(path.parent)) for path in sorted(root.glob("*/*/config.yaml"), key=lambda p: p.parent.name)]
    if as_json:
        return say_json(rows)
    if not rows:
        return hint(f"no runs under {root}; start one: sfumato train colormae --data sample:photos --minutes 2")
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("run", "data", "steps", "loss", "state"):
        table.add_column(name, justify="right" if name in ("steps", "loss") else "left", no_wrap=name == "run", overflow="fold")
    for row in rows:
        loss = "-" if row["loss"] is None else f"{row['loss']:.4g}"
        table.add_row(row["run"], row["data"], f"{row['step']}/{row['total']}", loss, row["state"])
    Console(highlight=False).print(table)


def show(path: Path, as_json: bool) -> None:
    """One run: its settings, where it stands, its figures."""
    run = Run.open(path)
    if as_json:
        return say_json({**summary(run), "config": run.config, "metrics": run.metrics()})
    for name, value in summary(run).items():
        say(f"{name:10} {value}")
    say("settings   " + ", ".join(f"{k}={v}" for k, v in run.config["settings"].items()))
    if (run.path / "report.html").exists():
        say(f"report     {run.path / 'report.html'}")


def remove(paths: list[Path], yes: bool) -> None:
    """Delete run folders, and nothing else."""
    import typer

    runs = [Run.open(path) for path in paths]
    for run in runs:
        if not run.checkpoints.is_dir():
            raise BadSetting(f"{run.path} does not look like a run folder; nothing was removed")
    if not yes and not typer.confirm(f"remove {', '.join(str(r.path) for r in runs)}?"):
        raise BadSetting("nothing was removed")
    for run in runs:
        with run.lock():
            shutil.rmtree(run.path)
        say(f"removed {run.path}")


def summary(run: Run) -> dict[str, Any]:
    """Where a run stands, in plain values."""
    config, metrics = run.config, run.metrics()
    logged = [m for m in metrics if "loss" in m]
    last = run.last_checkpoint
    return {
        "run": str(run.path),
        "data": config["data"],
        "step": metrics[-1]["step"] if metrics else 0,
        "total": config.get("total") or config["settings"]["steps"],
        "loss": logged[-1]["loss"] if logged else None,
        "seconds": metrics[-1].get("seconds") if metrics else None,
        "checkpoint": last.name if last else None,
        "state": "done" if any(m.get("done") for m in metrics) else "unfinished" if last else "empty",
        **next((m["eval"] for m in reversed(metrics) if "eval" in m), {}),
    }
