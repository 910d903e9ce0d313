"""`sfumato reproduce`: run papers' claims over seeds, judge them, keep records, and compare with the stored verdicts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sfumato import catalogue
from sfumato.cli.console import hint, say, say_json
from sfumato.engine.lab import reproduce as run_claims
from sfumato.errors import BadSetting

RANK = {"not reproduced": 0, "inconclusive": 1, "reproduced": 2}
RECORDS = Path(catalogue.__file__).parent / "records"


def reproduce(
    slugs: list[str], *, everything: bool, seeds: int | None, processes: int, out: Path, store: bool, as_json: bool
) -> bool:
    """Run claims; False when a verdict got worse than the stored one."""
    if everything == bool(slugs):
        raise BadSetting("name papers or give --all: sfumato reproduce colormae")
    if seeds is not None and seeds < 1:
        raise BadSetting("--seeds is at least 1 (5 for a verdict)")
    if everything:
        slugs = [row.slug for row in catalogue.load().values() if row.built and catalogue.load_claim(row.slug)]
    if store and seeds is not None:
        raise BadSetting("a stored record uses the claim's own seeds: drop --seeds or --store")
    records = [one(slug, seeds, processes, out, store, quiet=as_json) for slug in slugs]
    if as_json:
        say_json(records)
    return not any(r["worse"] for r in records)


def one(slug: str, seeds: int | None, processes: int, out: Path, store: bool, quiet: bool) -> dict[str, Any]:
    """One paper's claims: run, judge, write the record and its page."""
    claims = catalogue.load_claim(slug)
    if not claims:
        raise BadSetting(f"{slug} has no claim to run")
    stored = catalogue.record(slug)
    folder = out / slug
    folder.mkdir(parents=True, exist_ok=True)
    started, total = time.monotonic(), sum(len(c.seeds) if seeds is None else seeds for c in claims.values())
    told = [0]

    def tell(name: str, seed: int, seconds: float) -> None:
        told[0] += 1
        hint(
            f"{slug}: {name}, seed {seed} took {seconds:.0f} s ({told[0]} of {total}, {time.monotonic() - started:.0f} s so far)"
        )

    chosen = None if seeds is None else list(range(1000, 1000 + seeds))
    record = run_claims(slug, claims, seeds=chosen, processes=processes, report=tell, pictures=folder / "pictures")
    record["title"] = catalogue.find(slug).title
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    from sfumato.report.claim_report import write_claim_report

    page = write_claim_report(record, folder / "report.html", pictures=folder / "pictures")
    if store:
        (RECORDS / f"{slug}.json").write_text(json.dumps(record, indent=1) + "\n")
    worse = []
    for claim in record["claims"]:
        before = next((c["verdict"] for c in (stored or {}).get("claims", []) if c["name"] == claim["name"]), None)
        if before is not None and RANK[claim["verdict"]] < RANK[before]:
            worse.append(claim["name"])
        if not quiet:
            say(f"{slug}: {claim['statement']}\n  {claim['verdict'].upper()}" + (f" (stored: {before})" if before else ""))
            for f in claim["findings"]:
                interval = (
                    f": {f['mean']:+.4g} [{f['low']:+.4g}, {f['high']:+.4g}], margin {f['margin']:g}" if "mean" in f else ""
                )
                say(f"  - {f['condition']}{interval}: {f['verdict']}")
    if not quiet:
        say(f"  record: {folder / 'record.json'}\n  report: {page}")
    return {**record, "worse": worse}
