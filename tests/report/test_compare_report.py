"""A comparison becomes a page: what may be judged, what may not, and what is equal in all arms once."""

import re

import pytest
import torch
from torchvision.utils import save_image

from sfumato.engine.outcomes import differences
from sfumato.report import write_compare_report


def record(metric="accuracy", slugs=("x", "x"), seeds=5, steps=40, held="steps", untrained=(), job="predict"):
    labels, names = ("a", "<b>"), (metric, *untrained)
    arms = [
        {"label": label, "slug": slug, "trainable": 10 + i, "steps": steps, "settings": {"batch_size": 4, "lr": 0.1 * (i + 1)}}
        for i, (label, slug) in enumerate(zip(labels, slugs))
    ]

    def per_seed(value):
        return {str(s): {label: value(s, i) for i, label in enumerate(labels)} for s in range(seeds)}

    found = {
        "arms": arms, "seeds": list(range(seeds)), "held": held, "budget": steps if held == "steps" else 0.5, "job": job,
        "data": "sample:digits", "held_out": "the test part of the data", "notes": ["Arms are unlike in lr."], "processes": 2,
        "device": "cpu", "kept": 1, "seconds": 75.0, "command": "sfumato compare a b", "versions": {"torch": "2"},
        "figures": per_seed(lambda s, i: dict.fromkeys(names, 0.5 + 0.1 * i + 0.01 * (s % (2 + i)))),
        "untrained": per_seed(lambda s, i: dict.fromkeys(names, 0.4)),
        "costs": per_seed(lambda s, i: {
            "seconds": 2.0 + s, "images_per_second": 90.0 - 9 * i + s, "memory": 300 * 2**20, "resting_memory": 200 * 2**20,
        }),
        "curves": per_seed(lambda s, i: {"step": [20, 40], "seconds": [1.0, 2.0 + s], "loss": [1.0, 0.5]}),
        "evaluations": per_seed(lambda s, i: [{"step": t, "seconds": 1.0, metric: 0.1 * t} for t in (20, 40)]),
        "pictures": {},
    }  # fmt: skip
    return {**found, "differences": differences(found)}


def body(tmp_path, found, **options) -> str:
    html = write_compare_report(found, tmp_path / "report.html", **options).read_text(encoding="utf-8")
    return html[html.index("<h1") :].replace("\xa0", " ")


def test_the_page_of_a_comparison(tmp_path):
    html = body(tmp_path, record())
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts == {"arms": "2", "seeds": "5", "budget each": "40 steps", "data": "sample:digits", "time": "1 min 15 s"}
    assert "Equal steps: 40 for every arm. The time differs" in html
    assert "No verdict" not in html
    assert "&lt;b&gt;" in html
    assert "<b> against" not in html
    alts = set(re.findall(r'<svg[^>]*class="plot"[^>]*aria-label="([^"]*)"', html))
    assert any("against a: accuracy (higher is better) +0.1" in alt for alt in alts)
    for curve in ("training loss over step", "training loss over seconds", "held-out accuracy over step"):
        assert any(alt.startswith(curve) for alt in alts), curve
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)]
    assert any("accuracy" in row and "better" in row and "+0.1" in row for row in rows)
    cost = next(row for row in rows if "|300|" in row)
    assert "|160|" in cost, "images seen: 40 steps of 4"
    assert "|100|" in cost, "memory without that of Python"
    assert "Arms are unlike in lr." in html
    assert "1 of them were finished earlier" in html
    assert "sfumato compare a b" in html


def test_equal_time_is_said(tmp_path):
    assert "Equal time: 30.0 s for every arm. The steps differ" in body(tmp_path, record(held="minutes"))


@pytest.mark.parametrize("seeds", [1, 4])
def test_few_seeds_give_no_verdict(tmp_path, seeds):
    html = body(tmp_path, record(seeds=seeds))
    assert "No verdict is given" in html
    outcomes = re.findall(r">(better|worse|no difference shown|no verdict)<", html)
    assert set(outcomes) == {"no verdict"}


def test_own_losses_are_shown_and_not_judged(tmp_path):
    html = body(tmp_path, record("masked_loss", slugs=("x", "y"), job="encode"))
    assert "Masked loss: each method measures its own loss" in html
    assert "Data with labels" in html
    assert "against a: masked loss" not in html
    assert "against a: images a second" in html


@pytest.mark.parametrize(("steps", "early"), [(40, True), (2000, False)])
def test_features_stand_beside_untrained_ones(tmp_path, steps, early):
    html = body(tmp_path, record("few_label_accuracy", untrained=("linear_probe",), steps=steps, job="encode"))
    assert "What the features are worth" in html
    table = html[html.index("What the features are worth</h2>") :]
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    assert any("linear probe" in row and "0.4" in row and "+0.1" in row for row in rows)
    assert ("Too early to tell from probes" in html) == early
    assert (">too early<" in html) == early


def test_pictures_that_are_equal_are_shown_once(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    found = record("psnr", job="restore")
    for k, label in enumerate(("a", "<b>")):
        rows = {"noisy": 0.1, "restored": 0.2 + 0.1 * k, "target": 0.9}
        found["pictures"][label] = {row: f"{k}-{row}.png" for row in rows}
        for row, value in rows.items():
            save_image(torch.full((3, 12, 24), value), folder / f"{k}-{row}.png")
    html = body(tmp_path, found, pictures=folder)
    shots = re.findall(r'<figure class="shot">.*?data-label="([^"]*)"', html, re.DOTALL)
    assert shots == ["noisy", "target", "a: restored", "&lt;b&gt;: restored"]
    assert re.findall(r'role="tab" [^>]*>([^<]*)<', html) == ["a", "&lt;b&gt;", "target"]
    (folder / "1-restored.png").unlink()
    assert "a: restored" in body(tmp_path, found, pictures=folder)
    assert "same held-out samples" not in body(tmp_path, found)


def test_a_restorer_without_clean_pictures_says_so(tmp_path):
    found = record()
    found["figures"] = {seed: {arm: {} for arm in arms} for seed, arms in found["figures"].items()}
    found["differences"] = differences(found)
    assert "a restorer needs clean pictures" in body(tmp_path, found)
