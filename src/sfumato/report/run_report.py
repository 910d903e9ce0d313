"""The report of a run folder: curves, pictures before and after, figures, settings and times, as `report.html` inside it.

Whatever is missing or damaged (no pictures yet, a settings file that cannot be read, a last line cut short by a kill) is left
out; the rest is shown.

>>> import json, pathlib, tempfile
>>> run = pathlib.Path(tempfile.mkdtemp()) / "cbsn" / "2024-05-01_10-00-00"
>>> run.mkdir(parents=True)
>>> lines = [json.dumps({"step": i, "loss": 1 / i, "seconds": i}) for i in range(1, 30)] + ['{"step": 30, "lo']
>>> _ = (run / "metrics.jsonl").write_text("\\n".join(lines))
>>> from sfumato.report import write_run_report
>>> write_run_report(run).name
'report.html'
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.errors import BadData, SfumatoError
from sfumato.report.page import Page
from sfumato.report.pictures import split_strips
from sfumato.report.plots import curves, number
from sfumato.report.style import Figure

NOT_CURVES = {"step", "seconds", "eval", "done", "epoch"}
FACTS = 3
"""Figures of the last evaluation that stand in the head of the page."""
BEFORE = ("noisy", "degraded", "input", "masked", "corrupted", "low", "blurred", "measurement")
REFERENCE = ("clean", "target", "picture", "original", "reference", "truth", "image")


def write_run_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Args:
        run_dir: holds `config.yaml`, `metrics.jsonl` and `pictures/<step>-<row>.png`, as far as they exist yet.

    Raises:
        BadData: no such folder.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise BadData(f"no run folder at {run}; `sfumato runs` lists what there is")
    config, lines = _config(run / "config.yaml"), _lines(run / "metrics.jsonl")
    slug = str(config.get("slug") or run.resolve().parent.name)
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if isinstance(line.get("eval"), Mapping) and line["eval"]]
    page = Page(paper_title(slug), subtitle=f"{slug}, run {run.resolve().name}", facts=_facts(config, lines, steps, evals))
    _show_evals(page, evals)
    _show_pictures(page, run / "pictures")
    _show_curves(page, steps)
    _show_settings(page, config)
    return page.write(run / "report.html")


def paper_title(slug: str) -> str:
    """A paper's title in the catalogue, or the slug."""
    from sfumato import catalogue

    try:
        return catalogue.find(slug).title
    except SfumatoError:
        return slug


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(7.25), duration(252), duration(7380)
    ('7.2 s', '4 min 12 s', '2 h 3 min')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines with a step, in order; of a step written twice (after a resume) the later one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: dict[tuple[float, bool], dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), (int, float)):
            key = (entry["step"], "eval" in entry or "done" in entry)
            found.pop(key, None)
            found[key] = entry
    return sorted(found.values(), key=lambda entry: entry["step"])


def _total_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Time over all stretches: the clock starts again where a run was resumed."""
    seconds = [float(line["seconds"]) for line in lines if isinstance(line.get("seconds"), (int, float))]
    return sum(a for a, b in zip(seconds, [*seconds[1:], -1.0], strict=False) if b < a)


def _facts(config: Mapping[str, Any], lines: Sequence[Any], steps: Sequence[Any], evals: Sequence[Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if lines:
        done, total = int(lines[-1]["step"]), config.get("total") or config.get("steps")
        facts["steps"] = done if not isinstance(total, int) or done >= total else f"{done:,} of {total:,}"
    seconds = _total_seconds(lines)
    if seconds:
        facts["time"] = duration(seconds)
    if steps and isinstance(steps[-1]["loss"], (int, float)):
        facts["last loss"] = float(steps[-1]["loss"])
    for name, value in list(evals[-1]["eval"].items())[:FACTS] if evals else []:
        facts[_words(name)] = value
    for name in ("data", "device", "seed"):
        if config.get(name) not in (None, "", {}):
            facts[name] = str(config[name])
    return facts


def _words(name: str) -> str:
    return name.replace("_", " ")


def _show_evals(page: Page, evals: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in evals for name in line["eval"]))
    if len(names) <= FACTS and len(evals) < 2:
        return  # the head of the page has shown them
    page.section("Figures on held-out data")
    if len(evals) > 2:
        page.figure([f for name in names if (f := _curve(name, [{"step": e["step"], name: e["eval"].get(name)} for e in evals]))])
    last = evals[-1]
    rows = [[_words(n), flat(last["eval"][n])] for n in names if n in last["eval"]]
    page.table(rows, ["figure", f"after step {int(last['step']):,}"])


def _show_curves(page: Page, steps: Sequence[Mapping[str, Any]]) -> None:
    if not steps:
        return
    names = [n for n in dict.fromkeys(n for line in steps for n in line) if n not in NOT_CURVES and n != "loss"]
    page.section("Training")
    loss = _curve("loss", steps, height=340)
    if loss:
        page.figure(loss, "The loss of every logged step (faint), and its running mean." if len(steps) > 40 else None)
    page.figure([f for name in names if (f := _curve(name, steps, height=230))])


def _curve(name: str, lines: Sequence[Mapping[str, Any]], *, height: float = 250) -> Figure | None:
    """One figure over steps; None where it is not a number or never changes."""
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    values = np.array([v for _, v in points if math.isfinite(v)], dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    x, y = zip(*points, strict=True)
    spread = values.min() > 0 and values.max() / values.min() > 20
    smooth = max(3, len(points) // 40) if len(points) > 40 and name != "lr" else 0
    return curves({name: (x, y)}, xlabel="step", ylabel=_words(name), logy=bool(spread), smooth=smooth, height=height)


def _show_pictures(page: Page, folder: Path) -> None:
    steps = _picture_files(folder)
    if not steps:
        return
    last = max(steps)
    rows = _readable(dict(sorted(steps[last].items(), key=lambda item: _rank(item[0]))))
    if not rows:
        return
    page.section("Pictures", intro=f"Samples after step {last:,}, all drawn with the same noise at every step.")
    befores = [r for r in rows if _rank(r) == 0]
    reference = next((r for r in rows if _rank(r) == 2), None)
    afters = [r for r in rows if _rank(r) == 1]
    if befores and afters:
        first = {name: parts[0].transpose(2, 0, 1) for name, parts in zip(rows, split_strips(list(rows.values())), strict=True)}
        page.slider(
            first[befores[0]], {r: first[r] for r in afters}, (befores[0], ""),
            reference=first[reference] if reference else None, reference_label=reference or "",
        )  # fmt: skip
    _show_rows(page, rows)
    _show_progress(page, steps, (afters or list(rows))[-1])


def _show_rows(page: Page, rows: Mapping[str, np.ndarray], caption: str | None = None) -> None:
    """Pictures by row, without the black frame that `save_image` draws around several."""
    framed = len(split_strips(list(rows.values()))[0]) > 1
    shown = {name: (row[2:-2, 2:-2] if framed else row).transpose(2, 0, 1) for name, row in rows.items()}
    wide = all(row.shape[1] > 2 * row.shape[0] for row in rows.values())
    page.pictures(shown, caption, cols=1 if wide else None)


def _show_progress(page: Page, steps: Mapping[int, Mapping[str, Path]], row: str) -> None:
    """The same row at up to five steps."""
    have = [step for step in sorted(steps) if row in steps[step]]
    chosen = [have[i] for i in sorted({round(k * (len(have) - 1) / 4) for k in range(5)})] if have else []
    shown = _readable({f"step {step:,}": steps[step][row] for step in chosen})
    if len(shown) > 1:
        page.section(f"How “{_words(row)}” changed")
        _show_rows(page, shown)


def _picture_files(folder: Path) -> dict[int, dict[str, Path]]:
    """`{step: {row: file}}` of `<step>-<row>.png`."""
    steps: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        match = re.fullmatch(r"(\d+)-(.+)", path.stem)
        if match:
            steps.setdefault(int(match[1]), {})[match[2]] = path
    return steps


def _readable(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """The pictures that can be read, as bytes `[H, W, 3]`."""
    from PIL import Image

    found = {}
    for name, path in files.items():
        try:
            with Image.open(path) as image:
                found[name] = np.asarray(image.convert("RGB"))
        except (OSError, Image.DecompressionBombError):
            continue
    return found


def _rank(row: str) -> int:
    """0: what goes in; 1: what comes out; 2: what should come out."""
    words = re.split(r"[\W_]+", row.lower())
    return 0 if any(w in BEFORE for w in words) else 2 if any(w in REFERENCE for w in words) else 1


def _show_settings(page: Page, config: Mapping[str, Any]) -> None:
    if not config:
        return
    settings = config.get("settings")
    page.section("Settings")
    if isinstance(settings, Mapping) and settings:
        page.table([[name, flat(value)] for name, value in settings.items()], ["setting", "value"])
    rest = [[_words(str(name)), flat(value)] for name, value in config.items() if name != "settings"]
    page.table(rest, ["run", ""], folded="The run: data, seed, device and versions")


def flat(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {flat(v)}" for k, v in value.items())
    return ", ".join(map(flat, value)) if isinstance(value, (list, tuple)) else str(value)
