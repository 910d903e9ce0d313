"""What follows from the curvature of batches: how rates go with the batch, by measurement and by theory, as figures and words.

    SGD    2 (1 + μ) / (λ₁ + v / (B λ₁))        Adam    1 / √(1 + B_noise / B)

The measurements are those of `learning_rate`; sources stand there.

>>> from sfumato.instruments.rate_findings import power_of, sgd_limit
>>> limits = [sgd_limit(b, ceiling=0.5, top=4.0, noise=1e6) for b in (1, 2, 4)]  # far below the turning batch: linear
>>> round(power_of([1, 2, 4], limits), 3)
1.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sfumato import catalogue
from sfumato.instruments.findings import Findings, Plot, Section, Table
from sfumato.instruments.subject import Subject
from sfumato.optim.lr_scaling import lr_for_batch

if TYPE_CHECKING:
    from sfumato.instruments.learning_rate import Settings

REACHES = {4**k for k in range(7)}
"""Batch sizes that rates are moved to."""


def laws(numbers: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What follows from the spectrum: the noise by both ways, the curves, and the powers of the batch."""
    top, rows = numbers["largest"]["value"], numbers["batches"]
    if top <= 0 or not rows:
        return {}
    ceiling = 2 * (1 + settings.momentum) / top
    random = sum(row["noise"]["value"] * row["effective"] for row in rows) / len(rows)
    rises = sorted(max(0.0, top * (row["largest"]["value"] - top)) * row["effective"] for row in rows)
    risen = (rises[len(rises) // 2] + rises[(len(rises) - 1) // 2]) / 2  # the median: small batches follow no law
    for row in rows:
        row["sgd"] = 2 * (1 + settings.momentum) / row["largest"]["value"]
        row["theory"] = sgd_limit(row["effective"], ceiling, top, random)
    sizes = [row["effective"] for row in rows]
    power = {"sgd, by curvature": power_of(sizes, [row["sgd"] for row in rows])}
    for name, found in numbers.get("trials", {}).items():
        inside = [t for t in found if t["bound"] == ""] if isinstance(found, list) else []
        power[f"{name}, by trials"] = power_of([t["batch"] for t in inside], [t["rate"] for t in inside])
    return {
        "ceiling": ceiling,
        "noise": {"along_random_directions": random, "by_the_rise": risen},
        "explained": random / risen if risen > 0 else math.nan,
        "turning_batch": risen / top**2,
        "power": {name: value for name, value in power.items() if math.isfinite(value)},
    }


def sgd_limit(batch: float, ceiling: float, top: float, noise: float) -> float:
    """2 (1 + μ) / (λ₁ + v / (B λ₁))."""
    return ceiling / (1 + noise / (batch * top**2))


def power_of(batches: Sequence[float], rates: Sequence[float]) -> float:
    """The power of the batch with which rates grow, by least squares of logarithms; NaN of fewer than two."""
    if len(batches) < 2:
        return math.nan
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (batches, rates))
    return float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())


# Figures


def rate_findings(subject: Subject, settings: Settings, numbers: dict[str, Any]) -> Findings:
    """Headline, plots and words of what was measured; `numbers` gains the rates that were moved to other batches."""
    top = numbers["largest"]["value"]
    headline: dict[str, Any] = {"largest eigenvalue, all samples": top}
    notes = [
        *subject.eval_note,
        "these are the weights as they are: curvature changes while a model trains, and often rises until 2 / λ₁ meets the rate",
        "batches are drawn without replacement from these samples; the axis counts a batch as one of an endless data set",
        *_record(),
    ]
    if "trials" in numbers:
        notes.append(
            "a trial can stand more than 2 / λ₁, since a step that overshoots may end where weights are flatter, and less, since "
            "small steps too far add up"
        )
    if subject.norms:
        notes.append("a training that normalises each batch by its own statistics has another curvature than is measured here")
    if "ceiling" not in numbers:
        why = "no batch was measured" if top > 0 else "the largest eigenvalue is not above zero"
        return Findings(numbers, headline, f"No direction that limits the rate was found: {why}.", [], notes)
    numbers["moved"] = _moved(settings, numbers)
    scale = numbers["gradient_noise"]["scale"]
    headline |= {
        f"largest rate of SGD{_with(settings)}, all samples": numbers["ceiling"],
        "half of it is left at a batch of": f"{max(1.0, numbers['turning_batch']):,.0f}",
        "gradient noise scale": f"{scale:,.0f} samples" if math.isfinite(scale) else "above what can be seen",
        "share of the rise of λ₁ that random directions explain": f"{numbers['explained']:.2g}",
    }
    sections = [_curves(settings, numbers), _measured(numbers), _table(settings, numbers)]
    return Findings(numbers, headline, _words(settings, numbers), sections, notes)


def _with(settings: Settings) -> str:
    return f" with momentum {settings.momentum:g}" if settings.momentum else ""


def _record() -> list[str]:
    """How the theory came out where its claims were run."""
    stored = catalogue.record("batch-size-scaling") or {"claims": []}
    told = [f"“{c['statement']}”: {c['verdict']}" for c in stored["claims"] if c["name"] in ("magnitude", "laws")]
    where = "how the theory came out in the claims of this package, on a small network (sfumato show batch-size-scaling)"
    return [f"{where}: {'; '.join(told)}"] if told else []


def _moved(settings: Settings, numbers: Mapping[str, Any]) -> list[dict[str, float]]:
    """Rates at many batch sizes: the limit by curvature, and a rate moved there from the tuned batch by each rule."""
    ceiling, top = numbers["ceiling"], numbers["largest"]["value"]
    risen, start = numbers["noise"]["by_the_rise"], settings.tuned_batch
    sgd = settings.tuned_lr or sgd_limit(start, ceiling, top, risen)
    adam = settings.tuned_lr or _adam(numbers, start) or 1.0
    rows = []
    for batch in sorted(REACHES | {start}):
        rows.append(
            {
                "batch": batch,
                "limit": sgd_limit(batch, ceiling, top, risen),
                "sgd": lr_for_batch(sgd, start, batch, lam1=top, v0=risen / start),
                "sgd_linear": lr_for_batch(sgd, start, batch),
                "adam": adam * _saturation(numbers, batch) / _saturation(numbers, start),
                "adam_root": lr_for_batch(adam, start, batch, kind="adam"),
            }
        )
    return rows


def _saturation(numbers: Mapping[str, Any], batch: float) -> float:
    """1 / √(1 + B_noise / B), or √B where the scale is infinite."""
    scale = numbers["gradient_noise"]["scale"]
    return 1 / math.sqrt(1 + scale / batch) if math.isfinite(scale) else math.sqrt(batch)


def _adam(numbers: Mapping[str, Any], batch: float) -> float | None:
    """Adam's law through the middle of the trials; None without trials."""
    trials = [t for t in numbers.get("trials", {}).get("adam", []) if not t["bound"]]
    if not trials:
        return None
    logs = [math.log(t["rate"] / _saturation(numbers, t["batch"])) for t in trials]
    return math.exp(sum(logs) / len(logs)) * _saturation(numbers, batch)


def _curves(settings: Settings, numbers: Mapping[str, Any]) -> Section:
    """Rates over batches: measured, by the theory, and by the simple rule."""
    rows, moved, trials = numbers["batches"], numbers["moved"], numbers.get("trials", {})
    top, ceiling, start = numbers["largest"]["value"], numbers["ceiling"], settings.tuned_batch
    grid = [2 ** (k / 2) for k in range(25)]
    noise = numbers["noise"]
    anchor = sgd_limit(start, ceiling, top, numbers["noise"]["by_the_rise"])
    sgd: dict[str, Any] = {
        "curvature of batches": ([r["effective"] for r in rows], [r["sgd"] for r in rows]),
        "formula, noise from the rise": (grid, [sgd_limit(b, ceiling, top, noise["by_the_rise"]) for b in grid]),
        "theory, random directions": (
            grid,
            [sgd_limit(b, ceiling, top, noise["along_random_directions"]) for b in grid],
        ),
        "linear rule": (grid, [lr_for_batch(anchor, start, b) for b in grid if b]),  # type: ignore[arg-type]
    }
    adam: dict[str, Any] = {
        "root rule": ([m["batch"] for m in moved], [m["adam_root"] for m in moved]),
    }
    if math.isfinite(numbers["gradient_noise"]["scale"]):
        adam = {"root until the noise scale": ([m["batch"] for m in moved], [m["adam"] for m in moved]), **adam}
    for name, lines in (("sgd", sgd), ("adam", adam)):
        if trials.get(name):
            lines["trials"] = ([t["batch"] for t in trials[name]], [t["rate"] for t in trials[name]])
    relative = settings.tuned_lr is None and not any(not t["bound"] for t in trials.get("adam", []))
    axes = {"xlabel": "batch size", "logx": True, "logy": True, "height": 320}
    plots = [
        Plot("curves", sgd, {**axes, "ylabel": f"largest learning rate of SGD{_with(settings)}"}),
        Plot("curves", adam, {**axes, "ylabel": f"learning rate of Adam{f', times that at {start:,}' if relative else ''}"}),
    ]
    text = (
        "Where the linear rule and the curve part, a larger batch no longer bears a larger rate. The theory takes noise that is "
        "alike in all directions; where its line is flat and that of the measured batches is not, the noise sits in few "
        "directions, and the measured curve is the one to trust."
    )
    return Section("Rate by batch size", text, [plots])


def _measured(numbers: Mapping[str, Any]) -> Section:
    trials = numbers.get("trials", {})
    rows = []
    for row in numbers["batches"]:
        told = {
            "batch": row["batch"], "batches": row["draws"],
            "λ₁": f"{row['largest']['value']:.3g} ± {float(format(row['largest']['stderr'], '.1g')):g}",
            "SGD, by curvature": row["sgd"], "SGD, theory": row["theory"],
        }  # fmt: skip
        for name, title in (("sgd", "SGD, trials"), ("adam", "Adam, trials")):
            if trials.get(name):
                found = next((t for t in trials[name] if t["batch"] == row["batch"]), None)
                told[title] = f"{found['bound']} {found['rate']:.3g}".strip() if found else "–"
        rows.append(told)
    text = (
        f"λ₁ is the largest eigenvalue of a batch's Hessian, the mean over batches ± its standard error; on all samples it is "
        f"{numbers['largest']['value']:.3g}. SGD is then stable up to 2 (1 + momentum) / λ₁."
    )
    if "share" in trials:
        text += (
            f" Trials: {trials['steps']} steps from these weights, in eval mode; a rate is stable where the loss on all samples "
            f"then is below {trials['share']:g} times the first, {trials['first']:.4g}."
        )
    return Section("What was measured", text, [Table(rows)])


def _table(settings: Settings, numbers: Mapping[str, Any]) -> Section:
    start, tuned = settings.tuned_batch, settings.tuned_lr
    rows = [
        {
            "batch": f"{m['batch']:,}", "SGD, limit": m["limit"],
            **({"SGD, moved": m["sgd"]} if tuned else {}),
            "SGD, linear rule": m["sgd_linear"], "Adam, moved": m["adam"], "Adam, root rule": m["adam_root"],
        }
        for m in numbers["moved"]
    ]  # fmt: skip
    if tuned:
        told = f"From {tuned:g} at a batch of {start:,}."
    else:
        through = "through the trials" if _adam(numbers, start) else f"as a factor to the rate at {start:,}"
        told = (
            f"The linear rule from the limit at a batch of {start:,}; Adam {through}. --set tuned_lr=RATE --set "
            "tuned_batch=N moves a rate of yours."
        )
    text = (
        f"{told} Moved: in proportion to the batch (SGD) or its root (Adam) while noise rules, and no longer where it does not, "
        "by the measured curve and by the gradient noise scale. A limit is no advice: good rates are a few times smaller."
    )
    return Section("From batch to batch", text, [Table(rows)])


def _words(settings: Settings, numbers: Mapping[str, Any]) -> str:
    """The limit, where it stops growing, and what the theory is worth here."""
    rows, turning, scale = numbers["batches"], numbers["turning_batch"], numbers["gradient_noise"]["scale"]
    words = [
        f"At these weights SGD{_with(settings)} is stable up to a rate of about {rows[0]['sgd']:.2g} with batches of "
        f"{rows[0]['batch']} and {numbers['ceiling']:.2g} with large ones"
    ]
    words[0] += f"; the limit grows up to batches of about {turning:,.0f}." if turning >= 1 else "; the batch hardly matters."
    power = numbers["power"].get("sgd, by curvature", math.nan)
    if len(rows) > 1:
        words.append(
            f"From {rows[0]['batch']} to {rows[-1]['batch']} it grows with the power {power:.2f} of the batch, where the "
            "linear rule says 1."
        )
    explained = numbers["explained"]
    if math.isfinite(explained) and explained < 0.5:
        words.append(
            f"The theory does not hold here: noise along random directions explains {100 * explained:.2g} % of the rise of the "
            "largest eigenvalue, so rely on what was measured."
        )
    elif explained > 2:
        words.append(
            f"Noise along random directions would raise the largest eigenvalue {explained:.2g} times as much as was seen."
        )
    elif math.isfinite(explained):
        words.append(
            f"Noise along random directions explains {explained:.0%} of the rise of the largest eigenvalue, as theory has it."
        )
    if math.isfinite(scale):
        words.append(
            f"Gradient noise is as large as the gradient at a batch of {scale:,.0f}: Adam's law follows the root up to there."
        )
    else:
        words.append(
            "The gradient is lost in its noise with these samples, so Adam's law follows the root as far as can be seen."
        )
    if trials := [t for t in numbers.get("trials", {}).get("sgd", []) if not t["bound"]]:
        one = trials[-1]
        near = min(rows, key=lambda row: abs(math.log(row["batch"] / one["batch"])))
        words.append(
            f"In trials with batches of {one['batch']} SGD stood {one['rate']:.2g}, "
            f"{one['rate'] / near['sgd']:.2g} times what curvature says."
        )
    return " ".join(words)
