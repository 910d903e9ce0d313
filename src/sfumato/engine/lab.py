"""Where claims are tried: arms, seeds in processes of one thread, paired statistics, a record.

>>> from sfumato.claim import Holds, claim
>>> from sfumato.engine import reproduce
>>> @claim("sums are sums", Holds("2 + 2 = 4", lambda f: f["sum"]["value"] == 4))
... def sums(lab):
...     return {"sum": {"value": 2 + 2}}
>>> record = reproduce("arithmetic", {"sums": sums}, seeds=[0, 1], processes=0)
>>> record["claims"][0]["verdict"]
'reproduced'
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sfumato.claim import Claim, Figures, judge
from sfumato.engine.loop import Trainer
from sfumato.engine.options import Options as TrainingOptions
from sfumato.engine.randomness import key
from sfumato.engine.signals import end_with_parent
from sfumato.engine.stream import as_data

Report = Callable[[str, int, float], None]
"""Told after every seed: claim name, seed, seconds."""


class Lab:
    """One seed's laboratory, handed to a claim.

    Args:
        seed: of data, weights and noise; equal for all arms, so arms are paired.
        budget: share of the step counts (1 for a verdict, less in tests).
    """

    def __init__(self, seed: int, budget: float = 1.0, device: str = "cpu") -> None:
        self.seed, self.budget, self.device = seed, budget, device
        self.pictures: dict[str, torch.Tensor] = {}
        self.curves: list[dict[str, Any]] = []

    @property
    def generator(self) -> torch.Generator:
        """A fresh generator at this seed: equal on every call."""
        return torch.Generator().manual_seed(key(self.seed, "lab"))

    def steps(self, count: int) -> int:
        """A step count under this budget (at least 1)."""
        return max(1, round(count * self.budget))

    def data(self, where: Any, split: str = "train") -> Any:
        """A data set, by place or from tensors."""
        if isinstance(where, str):
            from sfumato.data import open_data

            return open_data(where, split)
        return as_data(where)

    def fit(self, method: Any, data: Any, *, steps: int | None = None) -> Any:
        """Train a method with this seed; returns it in eval mode."""
        options = TrainingOptions(seed=self.seed, device=self.device, workers=0)
        return Trainer(method, data, options, steps=steps).train(show=False)

    def picture(self, name: str, images: torch.Tensor) -> None:
        """Keep pictures `[N, C, H, W]` in [0, 1] for the claim's page."""
        self.pictures[name] = images.detach().float().clamp(0, 1).cpu()

    def curve(self, arm: str, x: Sequence[float], y: Sequence[float], *, xlabel: str, ylabel: str) -> None:
        """Keep a curve for the claim's page."""
        points = [[float(v) for v in values] for values in (x, y)]
        self.curves.append({"arm": arm, "x": points[0], "y": points[1], "xlabel": xlabel, "ylabel": ylabel})


def reproduce(
    slug: str,
    claims: dict[str, Claim],
    *,
    seeds: Sequence[int] | None = None,
    processes: int = 2,
    budget: float = 1.0,
    report: Report | None = None,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Run a paper's claims and judge them.

    Args:
        slug: the paper.
        claims: by name.
        seeds: None: each claim's own (the ones of the verdict).
        processes: seeds run beside each other in processes of one thread; 0: here, one after the other.
        report: told after every seed.
        pictures: a folder for the pictures of the first seed.

    Returns:
        The record: figures per seed, intervals, verdicts, versions, seconds.
    """
    started, findings = time.monotonic(), []
    for name, claim in claims.items():
        chosen = list(claim.seeds if seeds is None else seeds)
        outcomes = _run_seeds(slug, name, claim, chosen, processes, budget, report)
        figures: list[Figures] = [outcomes[s]["figures"] for s in chosen]
        judgement = judge(claim, figures)
        first = outcomes[chosen[0]]
        if pictures is not None:
            _save_pictures(first["pictures"], pictures)
        findings.append(
            {
                "name": name,
                "statement": claim.statement,
                "verdict": judgement.verdict.value,
                "note": claim.note,
                "findings": [
                    {"condition": f.condition, "verdict": f.verdict.value}
                    | ({} if f.interval is None else {**f.interval._asdict(), "margin": f.margin})
                    for f in judgement.findings
                ],
                "figures": {str(s): outcomes[s]["figures"] for s in chosen},
                "seconds": {str(s): round(outcomes[s]["seconds"], 2) for s in chosen},
                "curves": first["curves"],
            }
        )
    return {
        "slug": slug,
        "claims": findings,
        "budget": budget,
        "machine": f"{platform.machine()}, {threads(processes)}",
        "seconds": round(time.monotonic() - started, 1),
        **provenance(),
    }


def threads(processes: int) -> str:
    """What computes: processes of one thread each, or (0) the threads of this one."""
    return f"{processes} x 1 thread" if processes else f"{torch.get_num_threads()} threads"


def provenance() -> dict[str, Any]:
    """What code made a record, and when: commit, versions, date."""
    return {
        "commit": _commit(),
        "versions": {p: version(p) for p in ("sfumato", "torch", "timm", "numpy")} | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def run_seed(claim: Claim, seed: int, budget: float) -> dict[str, Any]:
    """One seed of a claim, here."""
    lab, started = Lab(seed, budget), time.monotonic()
    torch.manual_seed(key(seed, "claim"))
    figures = {arm: {k: float(v) for k, v in metrics.items()} for arm, metrics in claim.run(lab).items()}
    pictures = {name: images.numpy() for name, images in lab.pictures.items()}
    return {"figures": figures, "pictures": pictures, "curves": lab.curves, "seconds": time.monotonic() - started}


def _run_by_name(slug: str, name: str, seed: int, budget: float) -> dict[str, Any]:
    """One seed in a process of one thread; the claim is found by name, so nothing but names travels."""
    from sfumato import catalogue

    torch.set_num_threads(1)
    return run_seed(catalogue.load_claim(slug)[name], seed, budget)


def _run_seeds(
    slug: str, name: str, claim: Claim, seeds: list[int], processes: int, budget: float, report: Report | None
) -> dict[int, dict[str, Any]]:
    outcomes: dict[int, dict[str, Any]] = {}
    tell = report or (lambda *_: None)
    if processes == 0:
        for seed in seeds:
            outcomes[seed] = run_seed(claim, seed, budget)
            tell(name, seed, outcomes[seed]["seconds"])
        return outcomes
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        running = {pool.submit(_run_by_name, slug, name, seed, budget): seed for seed in seeds}
        try:
            for future in as_completed(running):
                outcomes[running[future]] = future.result()
                tell(name, running[future], outcomes[running[future]]["seconds"])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _save_pictures(pictures: dict[str, Any], folder: Path) -> None:
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    for name, images in pictures.items():
        save_image(torch.from_numpy(images), folder / f"{name}.png", nrow=8)


def _commit() -> str | None:
    """The commit of the source tree that this runs from, or None for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
