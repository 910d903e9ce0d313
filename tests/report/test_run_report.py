"""A run folder becomes a page, whatever is missing or damaged in it."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

from sfumato.errors import BadData
from sfumato.report import write_run_report
from sfumato.report.run_report import _lines, _rank, _total_seconds, duration


def body(run) -> str:
    """The report's blocks, without style and script."""
    html = write_run_report(run).read_text(encoding="utf-8")
    return html[html.index("<main") :]


@pytest.fixture
def run(tmp_path):
    """A run that was killed at step 30, resumed from 20, and is now being written to."""
    from torchvision.utils import save_image

    folder = tmp_path / "cbsn" / "2024-05-01_10-00-00"
    (folder / "pictures").mkdir(parents=True)
    entries = [{"step": s, "loss": 1 / s, "lr": 1e-3, "blindness": 0.5**s, "seconds": s} for s in range(1, 31)]
    entries += [{"step": s, "loss": 2 / s, "lr": 1e-3, "blindness": 0.5**s, "seconds": s - 20} for s in range(21, 61)]
    entries += [{"step": 60, "seconds": 40, "done": True, "eval": {"psnr": 31.25, "ssim": 0.875}}]
    text = "".join(json.dumps(e) + "\n" for e in entries)
    (folder / "metrics.jsonl").write_text(text + '{"step": 61, "loss": 0.0')
    settings = {"lr": 1e-3, "kernels": [5, 9], "ema": None, "words": "<i>&"}
    config = {"slug": "cbsn", "seed": 12345, "data": "sample:photos", "device": "cpu", "total": 100, "settings": settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (0, 60):
        for k, name in enumerate(("noisy", "restored", "clean")):
            save_image(torch.rand(3, 3, 12, 12) * 0.2 + 0.1 + 0.3 * k, folder / "pictures" / f"{step}-{name}.png", nrow=3)
    return folder


def test_lines_of_a_killed_and_resumed_run(run):
    lines = _lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 61), 60]
    assert lines[24]["loss"] == 2 / 25
    assert _total_seconds(lines) == 20 + 40


def test_the_page_of_a_run(run):
    path = write_run_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    assert "C-BSN" in re.search(r"<h1[^>]*>(.*?)</h1>", html)[1]
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts == {
        "steps": "60 of 100", "time": "1 min 0 s", "last loss": "0.03333", "psnr": "31.25", "ssim": "0.875",
        "data": "sample:photos", "device": "cpu", "seed": "12345",
    }  # fmt: skip
    assert re.findall(r'role="tab" [^>]*>([^<]*)<', html) == ["restored", "clean"]
    assert re.findall(r'data-label="(step [^"]*)"', html) == ["step 0", "step 60"]
    assert "&lt;i&gt;&amp;" in html
    drawn = re.findall(r'<svg[^>]*class="plot"[^>]*aria-label="([^"]*)"', html)
    assert set(drawn) == {"loss over step: loss", "blindness over step: blindness"}  # the rate never changed: no curve
    assert len(drawn) == 4


def test_the_first_sample_stands_under_the_slider(run):
    import base64
    import io

    from PIL import Image

    stage = write_run_report(run).read_text(encoding="utf-8").split('class="stage"')[1].split("<input")[0]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(u)))) for u in re.findall(r'src="data:image/png;base64,([^"]*)"', stage)
    ]
    for name, picture in zip(("noisy", "restored", "clean"), shown, strict=True):
        strip = np.asarray(Image.open(run / "pictures" / f"60-{name}.png"))
        assert np.array_equal(picture, strip[2:14, 2:14])


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "pictures", "all"])
def test_missing_pieces_are_left_out(run, missing):
    import shutil

    for piece in ("config.yaml", "metrics.jsonl", "pictures"):
        if missing in (piece, "all"):
            (shutil.rmtree if piece == "pictures" else lambda p: p.unlink())(run / piece)
    html = body(run)
    assert ("<h2" not in html) == (missing == "all")
    assert ('role="tab"' in html) == (missing not in ("pictures", "all"))
    assert ("loss over step" in html) == (missing not in ("metrics.jsonl", "all"))


def test_damaged_pieces_are_left_out(run):
    (run / "config.yaml").write_text("settings: [unclosed")
    (run / "pictures" / "60-noisy.png").write_bytes(b"\x89PNG")
    (run / "pictures" / "60-restored.png").write_bytes(b"")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\nnot json\n[1]\n{"step": "x"}\n{"step": 62, "loss": NaN, "lr": null}\n{"step": 63, "loss": "text"}\n')
    html = body(run)
    assert 'role="tab"' not in html
    assert 'data-label="clean"' in html
    assert "loss over step" in html


def test_masked_pictures_are_the_before(run):
    assert [_rank(row) for row in ("masked", "reconstruction", "picture", "low-resolution input")] == [0, 1, 2, 0]


def test_several_evaluations_become_curves(run):
    with open(run / "metrics.jsonl", "w") as file:
        for step in (10, 20, 30):
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            file.write(json.dumps({"step": step, "eval": {"psnr": 20 + step / 10}}) + "\n")
    html = body(run)
    assert "psnr over step" in html
    assert "after step 30" in html


def test_no_folder(tmp_path):
    with pytest.raises(BadData, match="no run folder"):
        write_run_report(tmp_path / "none")


def test_durations():
    assert [duration(s) for s in (0.04, 59.96, 3599, float("nan"))] == ["0.0 s", "60.0 s", "59 min 59 s", "–"]
