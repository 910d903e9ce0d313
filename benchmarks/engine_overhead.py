"""What the engine costs over a bare loop: the same MAE, the same batches, interleaved rounds, median ratio.

python -m benchmarks.engine_overhead [--rounds 15] [--steps 40]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from sfumato.data import Batch, photo_crops
from sfumato.engine import Options, Trainer
from sfumato.method import Context
from sfumato.papers.masking.mae import MAE

RESULTS = Path(__file__).parent / "results"


def bare_loop(method: MAE, images: torch.Tensor, steps: int) -> None:
    """What a person would write by hand for this one method."""
    optimizer = method.optimizers()["net"]
    ctx = Context(0, steps, 0, torch.Generator().manual_seed(0))
    size = method.config.batch_size
    for step in range(steps):
        index = torch.randint(len(images), (size,))
        loss = method.loss(Batch(images[index], index), ctx).value
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ctx.step = step + 1


def engine_loop(method: MAE, images: torch.Tensor, steps: int) -> None:
    """The same through the engine, checks, keyed noise and logging included."""
    Trainer(method, images, Options(device="cpu", workers=0), steps=steps).train(show=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = photo_crops(512, 32, generator=torch.Generator().manual_seed(0))
    config = MAE.Config.small(channels=3)

    class Plain(MAE):
        def augment(self) -> None:  # both loops see the same crops
            return None

    seconds: dict[str, list[float]] = {"bare": [], "engine": []}
    for round_ in range(options.rounds + 1):
        for name, loop in (("bare", bare_loop), ("engine", engine_loop)):
            torch.manual_seed(0)
            method = Plain(config)
            started = time.perf_counter()
            loop(method, images, options.steps)
            if round_:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / options.steps)
    ratios = [e / b for b, e in zip(seconds["bare"], seconds["engine"])]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "what": "engine step over bare-loop step, MAE small, batch 64, 1 thread",
        "bare_ms": round(1e3 * statistics.median(seconds["bare"]), 3),
        "engine_ms": round(1e3 * statistics.median(seconds["engine"]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in quartiles],
        "rounds": options.rounds,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engine_overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
