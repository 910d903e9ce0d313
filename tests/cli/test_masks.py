"""`sfumato show masks`: a page on one's own picture, by a run's own network too, and refusals."""

import pytest
import torch
from PIL import Image

from sfumato import catalogue
from sfumato.cli.masks import cropped, seen_by, shrunk
from sfumato.data import Batch
from sfumato.errors import BadData
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


SMALL = {"dim": 16, "depth": 1, "heads": 2}
RUNS = {
    "mae": ({**SMALL, "decoder_dim": 16, "decoder_heads": 2}, 4, {"hard", "semantic"}),
    "spark": ({"decoder_width": 16}, 8, {"hard"}),
    "lmd": ({**SMALL, "decoder_dim": 16, "decoder_heads": 2}, 8, {"hard", "semantic"}),
    "mfm": (SMALL, 4, {"semantic"}),
    "mfm small": ({"dim": 16, "network": "small"}, 4, set()),
    "hybrid-distill": (SMALL, 4, {"semantic"}),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("grey", [False, True])
def test_what_a_model_can_tell_is_asked_and_the_rest_is_from_the_picture(name, grey, tmp_path):
    settings, patch, known = RUNS[name]
    kind = catalogue.load_method(name.split()[0])
    torch.manual_seed(0)
    method = kind(kind.Config.small(channels=3, **settings))
    method.survey([Batch(torch.rand(8, 3, 32, 32), torch.arange(8))])
    generator = torch.Generator().manual_seed(0)
    x, found, scores = seen_by(method, torch.rand(1 if grey else 3, 50, 40, generator=generator), generator)
    assert (x.shape, found, set(scores)) == ((3, 32, 32), patch, known)
    assert all(values.shape == ((32 // patch) ** 2,) for values, _ in scores.values())
    page = write_mask_report(x, tmp_path / "m.html", patch=found, scores=scores, generator=generator).read_text()
    assert page.count("as no network is asked") == 2 - len(known)


def test_blocks_are_left_out_where_they_do_not_fill_the_grid(tmp_path):
    """Such as 7 x 7 cells of a convolutional network."""
    page = write_mask_report(torch.rand(3, 56, 56), tmp_path / "m.html", patch=8).read_text()
    assert page.count("they do not fill an odd number of patches") == 1
    with pytest.raises(BadData, match="is not filled by patches of 8: crop it"):
        write_mask_report(torch.rand(3, 60, 56), tmp_path / "m.html", patch=8)


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
