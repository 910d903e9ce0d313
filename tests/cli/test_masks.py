"""`sfumato show masks`: a page on one's own picture, by a run's own network too, and refusals."""

import torch
from PIL import Image

from sfumato.cli.masks import cropped, shrunk
from sfumato.masks import NAMED_MASKS
from sfumato.report import write_mask_report


def picture(path, size=(90, 70)):
    Image.effect_noise(size, 60).convert("RGB").save(path)
    return path


def test_every_mask_stands_on_the_page(sfumato, tmp_path):
    photo = picture(tmp_path / "photo.jpg")
    done = sfumato("show", "masks", "--image", photo, "-o", "page.html")
    assert done.code == 0, done.err
    html = (tmp_path / "page.html").read_text()
    for name in (*NAMED_MASKS, "frequency"):
        assert f">{name}</" in html
    assert "64 x 64 pixels" in html
    assert sfumato("show", "masks", "--image", photo, "-o", "again.html").code == 0
    assert (tmp_path / "again.html").read_text().replace("again.html", "page.html") == html


def test_a_run_says_what_is_hard(sfumato, tmp_path):
    tiny = [w for s in ("dim=16", "depth=1", "heads=2", "decoder_dim=16", "decoder_heads=2") for w in ("--set", s)]
    assert sfumato("train", "mae", "--data", "sample:photos", "--steps", "2", "--device", "cpu", *tiny).code == 0
    run = next((tmp_path / "runs" / "mae").iterdir())
    done = sfumato("show", "masks", "--run", run, "-o", "page.html")
    assert done.code == 0, done.err
    assert "the attention of the run" in (tmp_path / "page.html").read_text().replace("&#39;", "'")


def test_bad_calls_are_told(sfumato, tmp_path):
    done = sfumato("show", "mae", "--image", picture(tmp_path / "photo.jpg"))
    assert done.code == 2
    assert "belong to `sfumato show masks`" in done.err
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert sfumato("show", "masks", "--image", "broken.jpg").code == 2
    assert sfumato("show", "masks", "--image", "missing.jpg").code == 2


def test_any_size_is_brought_to_whole_patches():
    assert shrunk(torch.rand(3, 1000, 500), 448).shape == (3, 448, 224)
    assert cropped(torch.rand(3, 10, 50), 32).shape == (3, 32, 160)


def test_scores_of_ones_own(tmp_path):
    torch.manual_seed(0)
    scores = {name: (torch.arange(16.0), "one after the other") for name in ("hard", "semantic")}
    page = write_mask_report(torch.rand(3, 64, 64), tmp_path / "m.html", scores=scores)
    assert page.read_text().count("one after the other") == 2
