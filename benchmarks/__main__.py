"""The command: `python -m benchmarks NAME... | --all | --list [--rounds N] [--quick] [--threads N] [--clock cpu]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run races; 0: all ran (missing peers are skipped), 1: one failed, 2: no such race."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Races against other libraries.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="every race")
    parser.add_argument("--list", action="store_true", help="name the races")
    parser.add_argument("--rounds", type=int, help="rounds that count, one more warms up; default 10, quick 3")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds; nothing is stored")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process; default 1")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with one thread")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # where a race inside of torchrun leaves its result
    options = parser.parse_args(argv)

    import torch

    from benchmarks import harness

    warnings.filterwarnings("ignore")
    races = harness.load_races()
    if options.list:
        width = max(map(len, races))
        print("\n".join(f"{name:{width}}  {race.title}" for name, race in sorted(races.items())))
        return 0
    names = sorted(races) if options.all else options.names
    unknown = [name for name in names if name not in races]
    if unknown or not names:
        wrong = f"no race {unknown[0]!r}" if unknown else "name a race, or say --all"
        print(f"{wrong}; there are {', '.join(sorted(races))}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    rounds, failed = options.rounds or (3 if options.quick else 10), 0
    for name in names:
        started = time.perf_counter()
        print(f"{name}: {races[name].title}", flush=True)
        try:
            result = harness.run_race(
                races[name], rounds=rounds, quick=options.quick, clock=options.clock, say=lambda s: print(s, flush=True)
            )
        except Exception as error:  # the other races still run
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        if options.out:
            if os.environ["RANK"] == "0":
                options.out.write_text(json.dumps(result))
        elif not options.quick and result["heats"]:
            harness.store(result, harness.RESULTS)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
