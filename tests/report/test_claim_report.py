"""A record becomes a page and a figure; differences per seed are those that were judged."""

import json
import math
import re

import pytest

from sfumato.claim import Better, Claim, Holds, judge
from sfumato.report import plot_record, write_claim_report
from sfumato.report.claim_report import _metrics, _rows


def claim_entry(*conditions, seeds=5, name="colour", note=""):
    figures = [{"red": {"score": 2 + 0.1 * s, "loss": 1.0 - 0.05 * s}, "blue": {"score": 1.0, "loss": 1.5}} for s in range(seeds)]
    judged = judge(Claim("red beats blue", lambda lab: {}, conditions, tuple(range(seeds))), figures)
    findings = [
        {"condition": f.condition, "verdict": f.verdict.value}
        | ({} if f.interval is None else {**f.interval._asdict(), "margin": f.margin})
        for f in judged.findings
    ]
    curves = [{"arm": a, "x": [0, 1, 2], "y": [1.0, 0.5, 0.1], "xlabel": "step", "ylabel": "loss"} for a in ("red", "blue")]
    return {
        "name": name, "statement": "red <b>beats</b> blue", "verdict": judged.verdict.value, "note": note, "findings": findings,
        "figures": {str(s): f for s, f in enumerate(figures)}, "curves": curves,
    }  # fmt: skip


def record(*claims):
    return {
        "slug": "colours",
        "title": "On colours",
        "claims": list(claims),
        "commit": "abc",
        "versions": {"torch": "2"},
        "seconds": 75.0,
    }


UP, DOWN = Better("score", "red", over="blue", by=0.5), Better("loss", "red", over="blue", higher=False)


def test_differences_are_those_of_the_condition():
    up, down = _rows(claim_entry(UP, DOWN))
    assert up["dots"] == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4])
    assert down["dots"] == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])
    assert sum(up["dots"]) / 5 == pytest.approx(up["mean"])
    other = claim_entry(UP)
    other["findings"][0]["condition"] = "something else"
    assert _rows(other)[0]["dots"] == []


def test_the_page_of_a_record(tmp_path):
    entry = claim_entry(UP, DOWN, Holds("never negative", lambda f: True), note="because <i>")
    path = write_claim_report(record(entry), tmp_path / "page.html")
    html = path.read_text(encoding="utf-8")
    assert 'class="verdict good"' in html
    assert "red &lt;b&gt;beats&lt;/b&gt; blue" in html
    assert "because &lt;i&gt;" in html
    assert "never negative" in html
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts == {"reproduced": "reproduced", "seeds": "5", "time": "1 min 15 s", "commit": "abc"}
    alts = set(re.findall(r'<svg[^>]*class="plot"[^>]*aria-label="([^"]*)"', html))
    assert any("red above blue in score by at least 0.5 +1.20" in a for a in alts)
    assert "score per seed, and its mean: red 2.2; blue 1" in alts
    assert "loss over step: red, blue" in alts


def test_one_seed_and_what_json_cannot_say(tmp_path):
    entry = claim_entry(UP, seeds=1)
    finding = entry["findings"][0]
    assert finding["low"] == -math.inf
    for low, high in ((-math.inf, math.inf), (None, None)):
        finding.update(low=low, high=high)
        entry["figures"]["0"]["red"]["loss"] = None
        html = write_claim_report(json.loads(json.dumps(record(entry))), tmp_path / "page.html").read_text(encoding="utf-8")
        assert "inconclusive" in html
        assert "−∞ to ∞" in html


def test_pictures_and_missing_pieces(tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "restored.png")
    html = write_claim_report({"slug": "x", "claims": [{"statement": "s"}]}, tmp_path / "a.html", pictures=tmp_path / "pictures")
    assert 'data-label="restored"' in html.read_text(encoding="utf-8")
    assert write_claim_report({}, tmp_path / "b.html").exists()


def test_the_figure_of_a_record(tmp_path):
    assert "red above blue" in plot_record(record(claim_entry(UP), claim_entry(DOWN, name="second"))).alt
    assert plot_record(record(claim_entry(Holds("never negative", lambda f: True)))).alt.startswith("score per seed")
    assert "red <b>beats</b> blue" in plot_record(record({"statement": "red <b>beats</b> blue", "verdict": "inconclusive"})).alt
    assert plot_record(record(claim_entry(UP))).png(tmp_path / "a.png").stat().st_size > 3000


def test_figures_turned_round():
    assert _metrics(claim_entry(UP))["score"] == {"red": pytest.approx([2, 2.1, 2.2, 2.3, 2.4]), "blue": [1.0] * 5}
