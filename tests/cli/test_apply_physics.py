"""`sfumato apply RUN ... --physics`: a trained diffusion run restores by what it is told of the degradation."""

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli.degradation import degradation
from sfumato.data import photos
from sfumato.errors import BadData, BadSetting

TINY = [*("--set", "width=8"), *("--set", "mults=[1,2]"), *("--set", "image_size=8"), *("--set", "batch_size=4")]
QUICK = [*("--set", "steps=2"), *("--set", "inner=2")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny DDPM run, in colour."""
    from sfumato.cli import main

    root = tmp_path_factory.mktemp("trained")
    with pytest.raises(SystemExit) as stop:
        main(["train", "ddpm", "--data", "sample:photos", "--device", "cpu", "--steps", "2", *TINY, "--runs", str(root)])
    assert not stop.value.code
    return next(root.glob("ddpm/*"))


@pytest.fixture
def inputs(tmp_path):
    photo = photos("test")[0].permute(1, 2, 0).numpy()[:17, :22]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(photo[..., 0]).save(tmp_path / "grey.png")
    mask = np.zeros((17, 22), np.uint8)
    mask[4:9, 5:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:9]).save(tmp_path / "short.png")
    return photo


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def refused(done, *words):
    assert done.code == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("sfumato: ")]
    assert all(word in line for word in words), line


def test_every_degradation_gives_pictures_and_a_page(sfumato, tmp_path, trained, inputs):
    done = sfumato("apply", trained, "photo.png", "grey.png", "--physics", "inpaint:mask.png", "-o", "out", *QUICK)
    assert done.code == 0, done.err
    assert done.err.count("padded") == 1
    assert "2 of 2 pictures were padded to multiples of 2 pixels" in done.err
    page = (tmp_path / "out" / "before-after.html").read_text()
    assert "photo.png" in page
    assert "grey.png" in page
    restored, known = pixels(tmp_path / "out" / "photo.png"), pixels(tmp_path / "mask.png") == 0
    assert restored.shape == (17, 22, 3)
    assert (restored[known] == inputs[known]).all()
    assert (restored[~known] != inputs[~known]).any()
    assert pixels(tmp_path / "out" / "grey.png").shape == (17, 22)
    for i, (physics, size) in enumerate((("sr2+noise:0.05", (34, 44)), ("blur:1", (17, 22)), ("noise:0.1", (17, 22)))):
        done = sfumato("apply", trained, "photo.png", "--physics", physics, "-o", f"o{i}", "--set", "solver=dps", *QUICK[:2])
        assert done.code == 0, done.err
        assert pixels(tmp_path / f"o{i}" / "photo.png").shape[:2] == size


def test_settings_count_and_the_seed_repeats(sfumato, tmp_path, trained, inputs):
    found = {}
    for name, words in {
        "a": ["solver=stsl"], "again": ["solver=stsl"], "seed": ["seed=1"], "dps": ["solver=dps"], "psld": ["solver=psld"],
        "eta": ["eta=0.2"], "lam": ["lam=0"],
    }.items():  # fmt: skip
        settings = [word for pair in words for word in ("--set", pair)]
        done = sfumato("apply", trained, "grey.png", "--physics", "blur", "-o", name, *settings, *QUICK)
        assert done.code == 0, done.err
        found[name] = pixels(tmp_path / name / "grey.png").astype(int)
    assert (found["a"] == found["again"]).all()
    assert all((found["a"] != found[name]).any() for name in found if name not in ("a", "again"))


def test_what_is_wrong_is_told_in_a_line(sfumato, tmp_path, trained, inputs):
    apply = ["apply", trained, "photo.png", "-o", "out"]
    refused(sfumato(*apply), "--physics", "inpaint:mask.png")
    refused(sfumato(*apply, "--physics", "blurr"), "blurr", "say blur")
    refused(sfumato(*apply, "--physics", "inpaint:short.png"), "short.png", "22x9", "22x17")
    refused(sfumato(*apply, "--physics", "inpaint:none.png"), "none.png")
    refused(sfumato(*apply, "--physics", "noise:7"), "between 0 and 1")
    refused(sfumato(*apply, "--physics", "blur", "--set", "solver=ddrm"), "dps, psld, stsl")
    refused(sfumato(*apply, "--physics", "blur", "--set", "stepz=3"), "steps")
    refused(sfumato(*apply, "--physics", "blur", "--set", "steps=many"), "steps", "integer")
    refused(sfumato(*apply, "--physics", "blur", "--set", "lam=1e38", *QUICK), "broke off", "step 1 of 2", "lam=1e+38")
    refused(sfumato("apply", trained, "photo.png", "-o", ".", "--physics", "blur"), "overwrite")
    refused(sfumato("apply", "diffusers:nowhere", "photo.png", "-o", "out", "--physics", "blur"), "no pipeline")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_diffusers_restores(sfumato, tmp_path, inputs):
    from diffusers import DDIMScheduler, DDPMPipeline

    from sfumato.nn import small_unet

    DDPMPipeline(small_unet(8, 3, width=8, mults=(1, 2)), DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    done = sfumato("apply", "diffusers:pipe", "photo.png", "--physics", "noise:0.1", "-o", "out", *QUICK)
    assert done.code == 0, done.err
    assert pixels(tmp_path / "out" / "photo.png").shape == (17, 22, 3)


def test_a_blind_denoiser_fills_in_what_is_missing(sfumato, tmp_path, inputs):
    """It needs no physics for noise, and takes one whose rows are orthonormal."""
    tiny = [f"--set={pair}" for pair in ("width=8", "levels=1", "image_size=8", "batch_size=8", "h0=0.2", "sample_steps=60")]
    assert sfumato("train", "harmonic-bases", "--data", "grey.png", "--device", "cpu", "--steps", "200", *tiny).code == 0
    run = next((tmp_path / "runs" / "harmonic-bases").iterdir())
    words = ["apply", run, "photo.png", "grey.png", "--physics", "inpaint:mask.png"]
    assert sfumato(*words, "-o", "a").code == 0
    done = sfumato(*words, "-o", "b", "--set", "seed=1")
    assert done.code == 0, done.err
    assert "photo.png" in (tmp_path / "b" / "before-after.html").read_text()
    known = pixels(tmp_path / "mask.png") == 0
    first, second = pixels(tmp_path / "a" / "grey.png").astype(int), pixels(tmp_path / "b" / "grey.png")
    given = pixels(tmp_path / "grey.png")
    assert np.abs(first - given)[known].mean() < 0.5 * np.abs(first - given)[~known].mean()
    assert not np.array_equal(first, second)
    assert pixels(tmp_path / "a" / "photo.png").shape == (17, 22, 3)
    refused(sfumato("apply", run, "photo.png", "-o", "out", "--physics", "blur"), "no orthonormal rows")
    refused(sfumato("apply", run, "photo.png", "-o", "out", "--physics", "noise:0.1"), "noise alone needs no physics")
    refused(sfumato(*words, "-o", "out", "--set", "solver=dps"), "solver")


def test_a_run_that_learned_its_degradation_takes_no_physics(sfumato, tmp_path, inputs):
    Image.fromarray(photos("test")[0].permute(1, 2, 0).numpy()[:64, :64]).save(tmp_path / "noisy.png")
    words = [*("--set", "width=4"), *("--set", "modules=1"), *("--set", "patch=30")]
    assert sfumato("train", "cbsn", "--data", "noisy.png", "--device", "cpu", "--steps", "1", *words).code == 0
    run = next((tmp_path / "runs" / "cbsn").iterdir())
    refused(sfumato("apply", run, "photo.png", "-o", "out", "--physics", "blur"), "--physics", "ddpm")


@pytest.mark.parametrize("words", ["blur", "blur:1.5", "sr2", "sr3+noise:0.1", "noise:0.2", "blur+noise"])
def test_a_word_is_a_physics_with_its_transpose(words):
    g = torch.Generator().manual_seed(0)
    y = torch.rand(2, 3, 12, 15, generator=g)
    physics = degradation(words, y)
    x = torch.rand(physics.A_adjoint(y).shape, generator=g)
    assert physics.A(x).shape == y.shape
    assert torch.allclose((physics.A(x) * y).sum(), (x * physics.A_adjoint(y)).sum(), rtol=1e-4)
    flat = torch.full_like(x, 0.5)
    assert torch.allclose(physics.A(flat), torch.full_like(y, 0.5), atol=1e-4)


def test_words_are_checked(tmp_path):
    y = torch.rand(1, 1, 12, 12)
    for words in ("", "inpaint", "sr", "sr1", "sr40", "blur:0", "blur+blur", "noise:0.1+noise:0.1", "blur:x", "noise:-1"):
        with pytest.raises(BadSetting, match="--physics"):
            degradation(words, y)
    for value in (0, 255):
        Image.fromarray(np.full((12, 12), value, np.uint8)).save(tmp_path / "m.png")
        with pytest.raises(BadData, match="hides"):
            degradation(f"inpaint:{tmp_path / 'm.png'}", y)


def test_a_tiny_picture_under_a_wide_blur():
    y = torch.rand(1, 1, 3, 4)
    assert degradation("blur:3", y).A(y).shape == y.shape
