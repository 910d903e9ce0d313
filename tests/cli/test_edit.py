"""`sfumato edit`: pictures moved along directions of a run, and everything it refuses."""

import numpy as np
import pytest
from PIL import Image

SMALL = [
    f"--set={pair}" for pair in ("width=8", "image_size=8", "batch_size=8", "ema=0.5", "sample_steps=4", "mults=[1, 2]")
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny ddpm run and the directions found in it with labelled pictures."""
    from sfumato.cli import main

    root = tmp_path_factory.mktemp("edit")
    rng = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (root / "labelled" / name).mkdir(parents=True)
        for i in range(6):
            picture = rng.integers(low, low + 90, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(root / "labelled" / name / f"{i}.png")

    def train(*words):
        with pytest.raises(SystemExit) as stop:
            main(["train", *words, "--device", "cpu", "--runs", str(root / "runs")])
        assert not stop.value.code
        return next((root / "runs" / words[0]).iterdir())

    ddpm = train("ddpm", "--data", str(root / "labelled"), "--steps", "12", *SMALL)
    mine = ["--set=batch_size=8", "--set=sample_steps=4", "--set=components=4"]
    found = train(
        "h-space-directions", "--data", str(root / "labelled"), "--init", str(ddpm), "--steps", "3", *mine
    )  # fmt: skip
    return ddpm, found


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def test_a_strip_of_a_ddpm_run(sfumato, runs):
    """Rows are pictures, columns strengths; the middle one is not moved; the seed decides."""
    words = ["edit", runs[0], "--direction", "1", "--strength", "-3,0,3", "-n", "2", "--samples", "20"]
    for name in ("a.png", "b.png"):
        done = sfumato(*words, "-o", name)
        assert done.code == 0, done.err
    assert "2 x 3 pictures: pca 1, -3, 0, 3" in done.out
    assert "sfumato train h-space-directions" in done.err
    strip = pixels("a.png")
    assert strip.shape == (2 * 8 + 2, 3 * 8 + 4)
    assert np.array_equal(strip, pixels("b.png"))
    assert sfumato(*words, "-o", "c.png", "--seed", "1").code == 0
    assert not np.array_equal(strip, pixels("c.png"))
    assert sfumato("edit", runs[0], "--direction", "0", "--strength", "0,0", "--samples", "9", "-o", "still.png").code == 0
    still = pixels("still.png")
    assert np.array_equal(still[:, :8], still[:, 10:])


def test_a_strip_of_stored_directions_from_a_photograph(sfumato, runs, tmp_path):
    """DDPM inversion gives the picture back where it is not moved."""
    picture = np.random.default_rng(1).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "mine.png")
    done = sfumato("edit", runs[1], "--image", "mine.png", "--strength", "0,2", "-o", "deep/strip.png")
    assert done.code == 0, done.err
    strip = pixels("deep/strip.png")
    assert np.abs(strip[:, :8].astype(int) - picture).max() <= 1
    assert not np.array_equal(strip[:, 10:], strip[:, :8])
    wide = np.random.default_rng(2).integers(0, 255, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    done = sfumato("edit", runs[1], "--image", "wide.png", "-o", "strip.png")
    assert done.code == 0, done.err
    assert "resized to 8 x 8" in done.err


def test_attributes_by_the_names_of_the_classes(sfumato, runs):
    done = sfumato("edit", runs[1], "--kind", "attribute", "--direction", "bright:dark", "--strength", "-2,0,2", "-o", "a.png")
    assert done.code == 0, done.err
    assert sfumato("edit", runs[1], "--kind", "attribute", "--direction", "0:1", "--strength", "-2,0,2", "-o", "b.png").code == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_a_direction_without_an_attribute(sfumato, runs):
    words = ["edit", runs[1], "--direction", "0", "--strength", "0,9"]
    done = sfumato(*words, "--without", "bright:dark", "-o", "a.png")
    assert done.code == 0, done.err
    assert "pca 0 without bright:dark, 0, 9" in done.out
    assert sfumato(*words, "-o", "b.png").code == 0
    a, b = pixels("a.png"), pixels("b.png")
    assert np.array_equal(a[:, :8], b[:, :8])
    assert not np.array_equal(a, b)


def test_singular_vectors_with_a_mask(sfumato, runs, tmp_path):
    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    Image.fromarray(half).save(tmp_path / "top.png")
    done = sfumato("edit", runs[0], "--kind", "jacobian", "--mask", "top.png", "-o", "top_only.png")
    assert done.code == 0, done.err
    assert "jacobian 0, -50, 0, 50" in done.out
    assert sfumato("edit", runs[0], "--kind", "jacobian", "-o", "all.png").code == 0
    assert not np.array_equal(pixels("top_only.png"), pixels("all.png"))


def test_what_is_refused_in_one_line(sfumato, runs, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    ddpm, found = runs
    for words, match in (
        ([found, "--direction", "9"], "0 to 3"),
        ([found, "--direction", "left"], "'left'"),
        ([found, "--strength", "a,b"], "-3,0,3"),
        ([found, "--strength", "1,nan"], "-3,0,3"),
        ([found, "--kind", "clip"], "pca, jacobian, attribute"),
        ([found, "--kind", "attribute", "--direction", "bright:blue"], "no class 'blue' in 'bright:blue': bright, dark"),
        ([found, "--without", "blue"], "no class 'blue'"),
        ([found, "--kind", "attribute", "--direction", "dark:bright", "--without", "bright:dark"], "nothing is left"),
        ([ddpm, "--kind", "attribute"], "labelled pictures"),
        ([found, "-n", "0"], "at least 1"),
        ([ddpm, "--samples", "1"], "at least 1 and 2"),
        ([found, "--image", "none.png"], "none.png"),
        ([found, "--mask", "black.png"], "jacobian only"),
        ([found, "--mask", "black.png", "--kind", "jacobian"], "hides every output"),
        (["nowhere"], "nowhere"),
    ):
        done = sfumato("edit", *words, "-o", "strip.png")
        lines = [line for line in done.err.splitlines() if line.startswith("sfumato: ")]
        assert done.code == 2, (words, done)
        assert len(lines) == 1, done.err
        assert match in lines[0], lines[0]
    assert "no picture" in sfumato("edit", found, "-o", "strip.txt").err
    assert "overwrite" in sfumato("edit", found, "--image", "black.png", "-o", "black.png").err
    for words in ([], ["--set", "ddpm={channels: 1, image_size: 8, width: 8}"]):
        done = sfumato("train", "h-space-directions", "--data", "sample:digits", "--device", "cpu", *words)
        assert done.code == 2
        assert "--init runs/ddpm/STAMP" in done.err


def test_classes_are_counted_before_they_are_summed(sfumato, runs, tmp_path):
    words = ["--data", "sample:digits", "--init", runs[0], "--device", "cpu", "--steps", "1", "--set", "sample_steps=2"]
    done = sfumato("train", "h-space-directions", *words, "--set", "classes=3")
    assert done.code == 2
    assert "is not below classes=3" in done.err


def test_a_run_that_cannot_be_edited(sfumato, tmp_path):
    tiny = [f"--set={pair}" for pair in ("image_size=8", "patch=2", "dim=16", "depth=1", "decoder_dim=16", "batch_size=4")]
    assert sfumato("train", "mae", "--data", "sample:digits", "--device", "cpu", "--steps", "1", *tiny).code == 0
    done = sfumato("edit", next((tmp_path / "runs" / "mae").iterdir()), "-o", "strip.png")
    assert done.code == 2
    assert "cannot be edited" in done.err
