"""What differs between the arms of a comparison, from its record of plain values.

>>> from sfumato.engine.outcomes import direction
>>> [direction(name) for name in ("test_accuracy", "unexplained", "novelty")]
[True, False, None]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.claim import ENOUGH_SEEDS, Better, paired_interval

FROZEN = ("linear_probe", "knn_probe")
"""Probes that read features as they are."""
PROBES = ("few_label_accuracy", *FROZEN)
"""All probes of features."""
EARLY = 1000
"""Steps before which frozen features are not judged: masked training first makes them worse than a random network's."""
LOW = {"loss", "mse", "mae", "rmse", "error", "distance", "fid", "kid", "lpips", "nll", "seconds", "unexplained"}
HIGH = {"accuracy", "psnr", "ssim", "probe", "second"}
GIVEN = {"degraded", "training"}
"""Words in the names of figures that should be low, that should be high, and that are facts of the data, not of a method."""


def metrics_of(record: Mapping[str, Any]) -> list[str]:
    """All held-out figures, in the order in which they were met."""
    return list(dict.fromkeys(m for seed in record["figures"].values() for arm in seed.values() for m in arm))


def direction(metric: str) -> bool | None:
    """Whether a figure should be high, by the words in its name; None where nobody said, or where no method decides it."""
    words = set(metric.split("_"))
    if is_given(metric):
        return None
    return False if words & LOW else True if words & HIGH else None


def is_given(metric: str) -> bool:
    """Whether a figure is a fact of the data, the same for all arms."""
    return bool(GIVEN & set(metric.split("_")))


def is_own_loss(metric: str) -> bool:
    """Whether a figure is a method's own loss, which other methods measure otherwise."""
    return "loss" in metric.split("_")


def differences(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every arm against the first, over paired seeds: figures that both have, and images a second.

    A method's own loss is left out between different methods: they measure it with losses and masks of their own. So is a
    figure of which it is not known whether it should be high.
    """
    first, *others = record["arms"]
    early = set(FROZEN) if min(arm["steps"] for arm in record["arms"]) < EARLY else set()
    seeds = list(record["figures"])
    both = {
        s: {a: {**record["figures"][s][a], "images_per_second": record["costs"][s][a]["images_per_second"]} for a in arms}
        for s, arms in record["figures"].items()
    }
    found = []
    for metric in [*metrics_of(record), "images_per_second"]:
        higher = direction(metric)
        if higher is None:
            continue
        for arm in others:
            better = Better(metric, arm["label"], over=first["label"], higher=higher)
            if is_own_loss(metric) and arm["slug"] != first["slug"]:
                continue
            if any(metric not in both[s][a] for s in seeds for a in (arm["label"], first["label"])):
                continue
            gaps = [better.difference(both[s]) for s in seeds]
            if not all(map(math.isfinite, gaps)):
                continue
            mean, low, high = limits(gaps)
            outcome = "too early" if metric in early else _outcome(low, high, len(seeds))
            found.append({
                "metric": metric, "arm": arm["label"], "over": first["label"], "higher": better.higher,
                "mean": mean, "low": low, "high": high, "dots": gaps, "outcome": outcome,
            })  # fmt: skip
    return found


def _outcome(low: float | None, high: float | None, seeds: int) -> str:
    if seeds < ENOUGH_SEEDS or low is None or high is None:
        return "no verdict"
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def limits(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % limits; None where one value gives none."""
    mean, low, high = paired_interval(values)
    return mean, low if math.isfinite(low) else None, high if math.isfinite(high) else None
