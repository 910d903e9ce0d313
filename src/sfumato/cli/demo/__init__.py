"""`sfumato demo`: three methods on real pictures in a few minutes, ending in one page.

It restores a noisy photograph with C-BSN, trained on that photograph alone; trains masked autoencoders under three kinds of mask;
and compares AdamW with AdaHessian on a badly scaled problem and on digits.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from sfumato.cli.console import hint, say
from sfumato.cli.demo import masking, optimizers, restoration


def demo(photo: Path | None, out: Path, pace: float, seed: int) -> Path:
    """Run the three acts and write `report.html`.

    Args:
        photo: a person's own picture; None: one that ships with scikit-image.
        out: folder for runs, pictures and the page.
        pace: share of the usual training; 1 is about four minutes on two cores.
        seed: of noise, weights and batches.
    """
    from sfumato.report import Page

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    page = Page("sfumato", subtitle="Three methods on real pictures, trained on this machine just now")
    acts = (
        (
            "Act 1 of 3: a photograph, restored by a network that saw nothing else",
            lambda: restoration.act(page, photo, out, pace, seed),
        ),
        ("Act 2 of 3: what a masked autoencoder makes of three kinds of mask", lambda: masking.act(page, out, pace, seed)),
        ("Act 3 of 3: AdamW and AdaHessian, and where they end", lambda: optimizers.act(page, pace, seed)),
    )
    seconds = {}
    for title, act in acts:
        hint(f"\n{title}")
        began = time.monotonic()
        act()
        seconds[title.split(":")[0]] = time.monotonic() - began
    page.section("This run")
    page.table(
        [[name, f"{value:.0f} s"] for name, value in seconds.items()] + [["all", f"{time.monotonic() - started:.0f} s"]],
        columns=["what", "time"],
    )
    page.text(
        f"PyTorch {torch.__version__} with {torch.get_num_threads()} threads, {platform.machine()}, "
        f"Python {platform.python_version()}, seed {seed}. "
        "Run it on a picture of yours: `make demo PHOTO=path.jpg`, or `sfumato demo --photo path.jpg`."
    )
    path = page.write(out / "report.html")
    hint("")
    say(str(path.resolve()))
    return path
