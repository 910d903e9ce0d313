"""The page of a comparison: what differs from the first arm, curves over steps and over time, pictures, costs, settings.

A record is what `compare(...).record` holds.

>>> import pathlib, tempfile
>>> from sfumato.report import write_compare_report
>>> arms = [{"label": name, "slug": "mae", "trainable": 10, "steps": 3, "settings": {"dim": 4}} for name in "ab"]
>>> figures = {str(seed): {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.6}} for seed in range(5)}
>>> row = {"metric": "accuracy", "arm": "b", "over": "a", "mean": 0.1, "low": 0.1, "high": 0.1, "dots": [0.1] * 5,
...        "higher": True, "outcome": "better"}
>>> record = {"arms": arms, "seeds": list(range(5)), "held": "steps", "budget": 3, "figures": figures, "differences": [row]}
>>> write_compare_report(record, pathlib.Path(tempfile.mkdtemp()) / "report.html").name
'report.html'
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.claim import ENOUGH_SEEDS, paired_interval
from sfumato.engine.outcomes import EARLY, PROBES, is_given, is_own_loss, metrics_of
from sfumato.engine.trial import DRAWN, FEW
from sfumato.report.page import Page
from sfumato.report.plots import curves, interval_text, number
from sfumato.report.rows import dots, intervals
from sfumato.report.run_report import duration, flat
from sfumato.report.style import Figure

OUTCOMES = {"better": "reproduced", "worse": "not reproduced"}
"""The colours of outcomes are those of verdicts."""


def write_compare_report(record: Mapping[str, Any], path: str | Path, *, pictures: str | Path | None = None) -> Path:
    """Write the page of a comparison and return its path.

    Args:
        record: of `compare`.
        path: where the page goes.
        pictures: the folder that the record's pictures lie in.
    """
    labels = [arm["label"] for arm in record["arms"]]
    same = {arm["slug"] for arm in record["arms"]}
    title = f"{next(iter(same))}: {' or '.join(labels)}" if len(same) == 1 and len(labels) < 4 else ", ".join(labels)
    page = Page(title, subtitle=_budget(record), facts=_facts(record))
    _show_differences(page, record)
    _show_training(page, record)
    _show_features(page, record)
    _show_pictures(page, record, None if pictures is None else Path(pictures))
    _show_costs(page, record)
    _show_settings(page, record)
    page.section("How it was run")
    if record.get("command"):
        page.code(str(record["command"]), "To run it again; finished trainings are taken from the folder.")
    page.table(_run_rows(record), ["", "value"], folded="Commit, versions and machine")
    return page.write(path)


def _budget(record: Mapping[str, Any]) -> str:
    """What was held equal, in a sentence."""
    if record["held"] == "steps":
        return f"Equal steps: {record['budget']:,} for every arm. The time differs and is told."
    return f"Equal time: {duration(60 * record['budget'])} for every arm. The steps differ and are told."


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    budget = f"{record['budget']:,} steps" if record["held"] == "steps" else duration(60 * record["budget"])
    facts: dict[str, Any] = {"arms": len(record["arms"]), "seeds": len(record["seeds"]), "budget each": budget}
    if record.get("data"):
        facts["data"] = str(record["data"])
    if isinstance(record.get("seconds"), (int, float)):
        facts["time"] = duration(record["seconds"])
    return facts | ({"date": record["date"]} if record.get("date") else {})


def _words(name: str) -> str:
    return name.replace("_", " ").replace("knn", "kNN")


def _values(part: Mapping[str, Any], label: str, metric: str) -> list[float]:
    """A figure of one arm, by seed; NaN where it is missing."""
    found = (seed.get(label, {}).get(metric) for seed in part.values())
    return [math.nan if value is None else float(value) for value in found]


def _mean(values: Sequence[float]) -> str:
    """A mean with its 95 % interval."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "–"
    mean, low, high = paired_interval(finite)
    if not math.isfinite(low) or high - low < 1e-9 * abs(mean):
        return number(mean)
    return _range(*(text.lstrip("+") for text in interval_text(mean, low, high)))


def _range(mean: str, low: str, high: str) -> str:
    """A mean and its limits, which stay on one line."""
    return f"{mean}\u00a0[{low},\u00a0{high}]"


def _table(record: Mapping[str, Any], part: str, metrics: Sequence[str]) -> list[list[Any]]:
    return [[arm["label"], *(_mean(_values(record[part], arm["label"], m)) for m in metrics)] for arm in record["arms"]]


def _show_differences(page: Page, record: Mapping[str, Any]) -> None:
    """Held-out figures and their differences from the first arm."""
    metrics, seeds = metrics_of(record), len(record["seeds"])
    first = record["arms"][0]["label"]
    held_out = f"Figures on held-out data ({record['held_out']}), taken at the end." if record.get("held_out") else None
    page.section("What came out", intro=held_out)
    if not metrics:
        page.text("The methods measure nothing on this data; a restorer needs clean pictures beside the noisy ones.")
        return
    if seeds < ENOUGH_SEEDS:
        page.text(f"**No verdict is given:** {seeds} {'seeds are' if seeds > 1 else 'seed is'} fewer than {ENOUGH_SEEDS}.")
    page.table(
        _table(record, "figures", metrics), ["arm", *map(_words, metrics)],
        f"Mean over {seeds} seeds with its 95 % interval." if seeds > 1 else "One seed.",
    )  # fmt: skip
    shown = [d for d in record["differences"] if d["metric"] in metrics]
    if shown:
        page.figure(
            intervals([_row(d) for d in shown], xlabel="mean difference (right: better)"),
            f"Mean difference from {first} over paired seeds with its 95 % interval (Student's t); a dot below for every seed. "
            + ("Each interval alone errs once in twenty times, so of many some will mislead." if len(shown) > 2 else ""),
        )
        page.table([_told(d) for d in shown], ["arm", "figure", "difference", "outcome"])
    _tell_own_losses(page, record, metrics)
    _tell_samples(page, metrics)
    by_arm = {
        m: {arm["label"]: _values(record["figures"], arm["label"], m) for arm in record["arms"]}
        for m in metrics
        if not is_given(m)
    }
    if seeds > 1:
        plots = [dots(values, xlabel=_words(metric)) for metric, values in by_arm.items()]
        page.figure(plots[:6], "Every seed of every arm; the bar is the mean, thin lines join the same seed.")


def _row(difference: Mapping[str, Any]) -> dict[str, Any]:
    """A difference as a row of the plot."""
    metric = _words(difference["metric"])
    direction = "higher" if difference["higher"] else "lower"
    label = f"{difference['arm']} against {difference['over']}: {metric} ({direction} is better)"
    low, high = _limits(difference)
    verdict = OUTCOMES.get(difference["outcome"], "inconclusive")
    return {**difference, "low": low, "high": high, "label": label, "verdict": verdict}


def _limits(difference: Mapping[str, Any]) -> tuple[float, float]:
    """The limits of an interval, infinite where one seed gives none."""
    low, high = difference["low"], difference["high"]
    return -math.inf if low is None else low, math.inf if high is None else high


def _told(difference: Mapping[str, Any]) -> list[str]:
    told = _signed(difference["mean"], *_limits(difference))
    return [difference["arm"], _words(difference["metric"]), told, difference["outcome"]]


def _signed(mean: float, low: float, high: float) -> str:
    """A difference, with its interval where there is one."""
    told = interval_text(mean, low, high)
    return _range(*told) if math.isfinite(high) else told[0]


def _tell_own_losses(page: Page, record: Mapping[str, Any], metrics: Sequence[str]) -> None:
    own = [_words(m) for m in metrics if is_own_loss(m)]
    slugs = {arm["slug"] for arm in record["arms"]}
    if not own or (len(slugs) == 1 and record.get("job") != "encode"):
        return
    if len(slugs) > 1:
        text = (
            f"{' and '.join(own)[:1].upper() + ' and '.join(own)[1:]}: each method measures its own loss, and masks or targets "
            "differ, so no difference is judged between methods."
        )
    else:
        text = "A setting that changes masks or targets also changes what the loss measures; compare it only where none does."
    if record.get("job") == "encode" and not set(PROBES) & set(metrics):
        text += " Data with labels (one folder per class) lets the features themselves be judged."
    page.text(text)


def _show_training(page: Page, record: Mapping[str, Any]) -> None:
    """Losses and held-out figures over steps and over seconds."""
    if not record.get("curves"):
        return
    labels, runs = [arm["label"] for arm in record["arms"]], record["curves"]
    several = len(record["seeds"]) > 1
    page.section("Training", intro=_budget(record) + (" Bands reach from the lowest to the highest seed." if several else ""))
    loss = {a: [runs[seed][a] for seed in runs] for a in labels}
    evaluations = {a: [_columns(record["evaluations"][s][a]) for s in record["evaluations"]] for a in labels}
    if len({arm["slug"] for arm in record["arms"]}) > 1:
        caption = "The training loss: each method's own, so its height says nothing between methods, only its course."
    else:
        caption = "The training loss, a mean over the steps since the last point."
    page.figure(_both(loss, "loss", "training loss"), caption)
    points = {m for run in evaluations.values() for m in run[0]} - {"step", "seconds"}
    for metric in (m for m in metrics_of(record) if m in points):
        figures = _both(evaluations, metric, f"held-out {_words(metric)}")
        if figures and len(evaluations[labels[0]][0]["step"]) > 1:
            page.figure(figures, "Taken during the training; the clock stood still meanwhile.")


def _columns(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [line[name] for line in lines] for name in lines[0]} if lines else {}


def _both(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, ylabel: str) -> list[Figure]:
    """The same curves over steps and over seconds (of the seeds' mean)."""
    values = [v for seeds in runs.values() for run in seeds for v in run.get(name, ()) if v is not None and math.isfinite(v)]
    logy = bool(values) and min(values) > 0 and max(values) / min(values) > 20
    found = []
    for x, xlabel in (("step", "step"), ("seconds", "seconds")):
        series = {
            arm: (np.mean([run[x] for run in seeds], axis=0), [run[name] for run in seeds])
            for arm, seeds in runs.items() if all(run.get(name) for run in seeds)
        }  # fmt: skip
        if series:
            found.append(curves(series, xlabel=xlabel, ylabel=ylabel, logy=logy, height=300))
    return found


def _show_features(page: Page, record: Mapping[str, Any]) -> None:
    """Probes of features beside those of the same network before any training."""
    probes = [m for m in PROBES if m in metrics_of(record)]
    if not probes:
        return
    page.section(
        "What the features are worth",
        intro=f"Few-label accuracy: the encoder fine-tuned on {FEW} labels. Linear and kNN probes read features as they are, "
        "averaged over patches. Beside each stands the same network, untrained: a random network gives usable features too.",
    )
    rows = []
    for arm in record["arms"]:
        for metric in probes:
            after, before = (_values(record[part], arm["label"], metric) for part in ("figures", "untrained"))
            gain = paired_interval([a - b for a, b in zip(after, before)])
            rows.append([arm["label"], _words(metric), statistics.fmean(before), statistics.fmean(after), _signed(*gain)])
    page.table(rows, ["arm", "probe", "untrained", "trained", "gain"])
    if min(arm["steps"] for arm in record["arms"]) < EARLY:
        page.text(
            f"**Too early to tell from probes:** after fewer than {EARLY:,} steps, linear and kNN probes of averaged patches say "
            "nothing about a method: masked pre-training first makes them worse than those of a random network."
        )


def _tell_samples(page: Page, metrics: Sequence[str]) -> None:
    """How the samples of generators were judged."""
    if "frechet_distance" in metrics:
        page.text(
            f"Fréchet distance: of {DRAWN} new pictures to held-out ones, in the features of a small classifier that learned the "
            "classes of the training pictures, the same for all arms; lower is better. Beside it stands that of as many training "
            "pictures. It is no FID, and only comparable here."
        )


def _show_pictures(page: Page, record: Mapping[str, Any], folder: Path | None) -> None:
    """The arms' pictures of the same held-out samples; a row that is equal in all arms is shown once."""
    arms = {label: files for label, files in record.get("pictures", {}).items() if files}
    if folder is None or not arms:
        return
    found: dict[str, dict[str, Path]] = {}
    for row in dict.fromkeys(row for files in arms.values() for row in files):
        paths = {label: folder / files[row] for label, files in arms.items() if row in files}
        found[row] = {label: path for label, path in paths.items() if path.is_file()}
    shared = {row: next(iter(paths.values())) for row, paths in found.items() if _alike(paths, len(arms))}
    own = {row: paths for row, paths in found.items() if row not in shared and paths}
    page.section("Pictures", intro=f"The same held-out samples for every arm, after training with seed {record['seeds'][0]}.")
    target = shared.get("target")
    before = next((row for row in shared if row != "target"), None)
    if record.get("job") == "restore" and before and own:
        page.slider(shared[before], next(iter(own.values())), (before, ""), reference=target, reference_label="target")
    columns = min(len(arms), 4)
    page.pictures(shared, cols=columns)
    page.pictures({f"{label}: {row}": path for row, paths in own.items() for label, path in paths.items()}, cols=columns)


def _alike(paths: Mapping[str, Path], arms: int) -> bool:
    """Whether all arms have this picture and it is the same."""
    return len(paths) == arms and len({path.read_bytes() for path in paths.values()}) == 1


def _show_costs(page: Page, record: Mapping[str, Any]) -> None:
    """Time, throughput and memory, and the throughput against the first arm."""
    if not record.get("costs"):
        return
    rows, measured = [], False
    for arm in record["arms"]:
        seconds, rate, memory, resting = (
            _values(record["costs"], arm["label"], name) for name in ("seconds", "images_per_second", "memory", "resting_memory")
        )
        known = [m for m in memory if math.isfinite(m)]
        measured |= bool(known)
        peak = max(known) / 2**20 if known else None
        own = max(m - r for m, r in zip(memory, resting) if math.isfinite(m)) / 2**20 if known else None
        rows.append([
            arm["label"], arm["trainable"], arm["steps"], int(arm["steps"] * arm["settings"]["batch_size"]), _mean(seconds),
            statistics.median(rate), None if peak is None else round(peak), None if own is None else round(own),
        ])  # fmt: skip
    page.section("What it cost")
    columns = ["parameters", "steps", "images seen", "seconds", "images/s", "peak memory, MiB", "of training, MiB"]
    page.table(rows, ["arm", *columns])
    page.text(_how_measured(record, measured))
    shown = [d for d in record["differences"] if d["metric"] == "images_per_second"]
    if shown:
        page.figure(intervals([_row({**d, "metric": "images a second"}) for d in shown]), "Throughput against the first arm.")


def _how_measured(record: Mapping[str, Any], with_memory: bool) -> str:
    """What the columns of the costs mean, and under which load they were taken."""
    told = ["Seconds: training with its loading, mean and 95 % interval over seeds. Images a second: the median."]
    if not with_memory:
        told.append("Memory is told only of processes of their own.")
    elif record.get("device", "cpu") == "cpu":
        told.append(
            "Memory: the peak of the whole process before its first evaluation; the last column leaves out what Python and the "
            "libraries took before the method was made."
        )
    else:
        told.append("Memory: the peak of tensors on the device.")
    if record.get("processes", 0) > 1:
        told.append(f"Trainings of all arms took turns, seed by seed, {record['processes']} at once, each in a fresh process.")
        told.append("The last of them may have had the machine to itself.")
    else:
        told.append("Trainings of all arms took turns, seed by seed, one after the other.")
    if record.get("kept"):
        told.append(f"{record['kept']} of them were finished earlier, perhaps under another load.")
    return " ".join(told)


def _show_settings(page: Page, record: Mapping[str, Any]) -> None:
    arms = record["arms"]
    names = list(dict.fromkeys(name for arm in arms for name in arm["settings"]))
    unlike = [n for n in names if len({flat(arm["settings"].get(n)) for arm in arms}) > 1]
    page.section("Settings", intro="Where the arms differ." if unlike else "All arms have the same settings.")
    if record.get("notes"):
        page.text("\n".join(f"- {note}" for note in record["notes"]))
    columns = ["setting", *(arm["label"] for arm in arms)]
    page.table([_setting(n, arms) for n in unlike], columns) if unlike else None
    page.table([_setting(n, arms) for n in names], columns, folded="All settings")


def _setting(name: str, arms: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name, *(flat(arm["settings"][name]) if name in arm["settings"] else "" for arm in arms)]


def _run_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    rest = [[name, record[name]] for name in ("summary", "commit", "machine", "date") if record.get(name) is not None]
    return rest + [[f"{name} version", version] for name, version in (record.get("versions") or {}).items()]
