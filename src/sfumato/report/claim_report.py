"""The report of a paper's claims: verdicts, intervals, every seed of every arm, curves, and how it was run.

A record is what `reproduce` returns and `records/<slug>.json` holds.

>>> import pathlib, tempfile
>>> from sfumato.report import plot_record, write_claim_report
>>> figures = {str(s): {"red": {"score": 2 + 0.1 * s}, "blue": {"score": 1.0}} for s in range(5)}
>>> finding = {"condition": "red above blue in score by at least 0.5", "verdict": "reproduced",
...            "mean": 1.2, "low": 1.0, "high": 1.4, "margin": 0.5}
>>> record = {"slug": "colours", "claims": [{"name": "colour", "statement": "red beats blue", "verdict": "reproduced",
...           "findings": [finding], "figures": figures}]}
>>> write_claim_report(record, pathlib.Path(tempfile.mkdtemp()) / "colours.html").name
'colours.html'
>>> plot_record(record).alt
'mean difference and interval: red above blue in score by at least 0.5 +1.20 [+1.00, +1.40]'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.report.page import Page
from sfumato.report.plots import curves
from sfumato.report.rows import dots, intervals
from sfumato.report.run_report import duration, paper_title
from sfumato.report.style import Figure


def write_claim_report(record: Mapping[str, Any], path: str | Path, *, pictures: str | Path | None = None) -> Path:
    """Write the page of a record and return its path.

    Args:
        record: as `reproduce` returns it.
        path: where the page goes.
        pictures: a folder of `<name>.png`, as the claims left them.
    """
    slug = str(record.get("slug", "claim"))
    page = Page(str(record.get("title") or paper_title(slug)), subtitle=f"{slug}: its claims, tested", facts=_facts(record))
    for claim in record.get("claims", ()):
        _show_claim(page, claim, alone=len(record["claims"]) == 1)
    files = sorted(Path(pictures).glob("*.png")) if pictures and Path(pictures).is_dir() else []
    if files:
        page.section("Pictures", intro="Of the first seed.").pictures({file.stem: file for file in files}, cols=1)
    page.section("How it was run").code(f"sfumato reproduce {slug}", "To run it again.")
    page.table(_run_rows(record), ["", "value"], folded="Commit, versions and machine")
    return page.write(path)


def plot_record(record: Mapping[str, Any]) -> Figure:
    """One figure of a record: the intervals of all claims; the arms of the first metric where a claim has none."""
    rows = [row for claim in record.get("claims", ()) for row in _rows(claim)]
    if rows:
        return intervals(rows)
    for claim in record.get("claims", ()):
        for metric, arms in _metrics(claim).items():
            return dots(arms, xlabel=metric)
    told = "; ".join(f"{c.get('statement', '')}: {c.get('verdict', '')}" for c in record.get("claims", ())) or "no claims"
    return Figure(lambda canvas, theme: canvas.text(0.02, 0.5, told, va="center", wrap=True), told, 80)


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    claims = list(record.get("claims", ()))
    verdicts = [str(claim.get("verdict")) for claim in claims]
    seeds = {len(claim.get("figures") or {}) for claim in claims}
    facts: dict[str, Any] = {}
    if claims:
        facts["reproduced"] = f"{verdicts.count('reproduced')} of {len(claims)}" if len(claims) > 1 else verdicts[0]
    if seeds:
        facts["seeds"] = max(seeds)
    if isinstance(record.get("seconds"), (int, float)):
        facts["time"] = duration(record["seconds"])
    for name in ("date", "commit"):
        if record.get(name):
            facts[name] = record[name]
    return facts


def _show_claim(page: Page, claim: Mapping[str, Any], *, alone: bool) -> None:
    """Verdict, intervals, arms with their seeds, curves and the table of one claim."""
    name = str(claim.get("name") or "claim").replace("_", " ")
    page.section("The claim" if alone else name[:1].upper() + name[1:])
    findings = list(claim.get("findings") or ())
    only = _interval(findings[0]) if len(findings) == 1 else None
    page.verdict(
        str(claim.get("verdict", "inconclusive")), str(claim.get("statement", "")), interval=only,
        margin=findings[0].get("margin") if only else None, note=str(claim.get("note") or ""),
    )  # fmt: skip
    rows = _rows(claim)
    if rows:
        page.figure(
            intervals(rows),
            "Mean differences over paired seeds with their 95 % intervals (Student's t); a dot below for every seed. "
            "Dashed: the margin that was asked of the mean.",
        )
    exact = [[f.get("condition", ""), f.get("verdict", "")] for f in findings if _interval(f) is None]
    if exact:
        page.table(exact, ["must hold with every seed", "came out"])
    metrics = _metrics(claim)
    plots = [dots(arms, xlabel=metric.replace("_", " ")) for metric, arms in metrics.items()]
    page.figure(plots[:6], "Every seed of every arm; the bar is the mean, thin lines join the same seed.")
    _show_curves(page, claim)
    table = [
        [metric.replace("_", " "), arm, float(np.mean(values)), min(values), max(values), len(values)]
        for metric, arms in metrics.items()
        for arm, values in arms.items()
    ]
    if table:
        page.table(table, ["metric", "arm", "mean", "lowest", "highest", "seeds"], folded="All figures")


def _interval(finding: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Mean and limits of a finding (limits infinite where they are missing), or None for an exact property."""
    mean = finding.get("mean")
    if mean is None:
        return None
    low, high = finding.get("low"), finding.get("high")
    return mean, -math.inf if low is None else low, math.inf if high is None else high


def _rows(claim: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for `intervals`, with the difference of every seed where the condition can be recognised."""
    return [
        {**finding, "label": finding.get("condition", ""), "dots": _differences(claim, finding)}
        for finding in claim.get("findings") or ()
        if _interval(finding) is not None
    ]


def _differences(claim: Mapping[str, Any], finding: Mapping[str, Any]) -> list[float]:
    """The condition's difference with every seed: of all possible conditions, the one that reads like this one."""
    from sfumato.claim import Better

    figures = list((claim.get("figures") or {}).values())
    arms = list(figures[0]) if figures else []
    possible = (
        Better(metric, arm, over=over, by=finding.get("margin") or 0.0, higher=higher)
        for arm in arms for over in arms if arm != over
        for metric in figures[0][arm] for higher in (True, False)
    )  # fmt: skip
    condition = next((better for better in possible if str(better) == finding.get("condition")), None)
    try:
        return [condition.difference(seed) for seed in figures] if condition else []
    except (KeyError, TypeError):
        return []


def _metrics(claim: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Figures turned round: `{metric: {arm: [value per seed]}}`."""
    turned: dict[str, dict[str, list[float]]] = {}
    for seed in (claim.get("figures") or {}).values():
        for arm, metrics in seed.items():
            for metric, value in metrics.items():
                turned.setdefault(metric, {}).setdefault(arm, []).append(math.nan if value is None else float(value))
    return turned


def _show_curves(page: Page, claim: Mapping[str, Any]) -> None:
    """Curves with the same axes share a figure."""
    figures: dict[tuple[str, str], dict[str, Any]] = {}
    for curve in claim.get("curves") or ():
        axes = (str(curve.get("xlabel", "")), str(curve.get("ylabel", "")))
        figures.setdefault(axes, {})[str(curve.get("arm", ""))] = (curve["x"], curve["y"])
    for (xlabel, ylabel), series in figures.items():
        every = [v for _, y in series.values() for v in y if v is not None and math.isfinite(v)]
        logy = bool(every) and min(every) > 0 and max(every) / min(every) > 50
        page.figure(curves(series, xlabel=xlabel, ylabel=ylabel, logy=logy), "Curves of the first seed.")


def _run_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    versions = record.get("versions") or {}
    rest = [[name, record[name]] for name in ("commit", "machine", "budget", "date") if record.get(name) is not None]
    return rest + [[f"{name} version", version] for name, version in versions.items()]
