"""What a new user does: train on their own pictures, apply, export, fine-tune, look around."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import photo_crops, photos

ENCODER = [
    "--set",
    "image_size=16",
    "--set",
    "patch=4",
    "--set",
    "dim=16",
    "--set",
    "depth=2",
    "--set",
    "decoder_dim=16",
    "--set",
    "batch_size=4",
]


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture
def my_photos(tmp_path):
    for i, photo in enumerate(photos("test")):
        save(tmp_path / "my_photos" / f"photo {i}.png", photo[:, : 90 + 7 * i, :101])
    return tmp_path / "my_photos"


def run_of(tmp_path, slug):
    return max((tmp_path / "runs" / slug).iterdir())


def test_restore_a_persons_own_pictures(sfumato, tmp_path, my_photos):
    done = sfumato(
        "train",
        "cbsn",
        "--data",
        "my_photos/",
        "--device",
        "cpu",
        "--steps",
        "2",
        "--set",
        "width=4",
        "--set",
        "modules=1",
        "--set",
        "patch=30",
    )
    assert done.code == 0, done.err
    run = run_of(tmp_path, "cbsn")
    assert (run / "report.html").stat().st_size > 10_000
    rotated = Image.fromarray(photos("test")[0][:, :60, :80].permute(1, 2, 0).numpy())
    exif = rotated.getexif()
    exif[0x0112] = 6  # shown turned by a quarter
    rotated.save(tmp_path / "noisy2.jpg", exif=exif)
    deep = (np.random.default_rng(0).random((33, 47)) * 65535).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    done = sfumato("apply", run, "my_photos/photo 1.png", "noisy2.jpg", "deep.png", "-o", "out/")
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["deep.png", "noisy2.jpg", "photo 1.png"]
    with Image.open(tmp_path / "out" / "noisy2.jpg") as turned:
        assert turned.size == (60, 80)
        assert turned.getexif().get(0x0112, 1) == 1
    with Image.open(tmp_path / "out" / "deep.png") as still_deep:
        assert still_deep.mode in ("I;16", "I")
        assert still_deep.size == (47, 33)
    with Image.open(tmp_path / "out" / "photo 1.png") as restored:
        assert restored.size == (101, 97)


def test_embed_export_and_fine_tune(sfumato, tmp_path, my_photos):
    done = sfumato("train", "colormae", "--data", "my_photos/", "--device", "cpu", "--steps", "3", *ENCODER)
    assert done.code == 0, done.err
    run = run_of(tmp_path, "colormae")
    assert sfumato("apply", run, "my_photos", "-o", "out").code == 0
    with np.load(tmp_path / "out" / "embeddings.npz") as found:
        assert found["features"].shape == (3, 16)
        assert list(found["names"]) == ["photo 0.png", "photo 1.png", "photo 2.png"]

    import sfumato as package

    method = package.load(run)
    x = photo_crops(2, 16, generator=torch.Generator().manual_seed(0))
    features = method.encode(x)
    assert features.shape == (2, 16)

    assert sfumato("export", run, "--timm", "vit.safetensors", "--weights", "all.safetensors").code == 0
    from safetensors import safe_open
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    with safe_open(tmp_path / "vit.safetensors", "pt") as file:
        plain = VisionTransformer(**json.loads(file.metadata()["timm"]))
    plain.load_state_dict(load_file(tmp_path / "vit.safetensors"))
    plain.eval()

    for name, photo in zip(("cat", "coin"), photos("test")):
        for i in range(4):
            save(tmp_path / "classes" / name / f"{i}.png", photo[:, 16 * i : 16 * i + 16, :16])
    done = sfumato(
        *("train", "classifier", "--data", "classes", "--init", run, "--set", "optimizer=adahessian", "--set", "batch_size=4"),
        *("--set", "image_size=16", "--device", "cpu", "--steps", "3"),
    )
    assert done.code == 0, done.err
    fine = run_of(tmp_path, "classifier")
    assert sfumato("apply", fine, "classes", "-o", "p.csv").code == 0
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {r["class"] for r in rows} <= {"cat", "coin"}
    assert all(abs(float(r["cat"]) + float(r["coin"]) - 1) < 1e-3 for r in rows)


def test_dry_run_writes_nothing(sfumato, tmp_path):
    done = sfumato("train", "mae", "--data", "sample:digits", "--device", "cpu", "--dry-run", *ENCODER)
    assert done.code == 0, done.err
    assert "parameters" in done.out
    assert "s a step" in done.out
    assert not list(tmp_path.iterdir())


def test_the_resolved_line_trains_the_same_again(sfumato, tmp_path):
    words = ["train", "mae", "--data", "sample:digits", "--device", "cpu", "--steps", "3", "--log-every", "1", *ENCODER]
    first = sfumato(*words)
    line = next(line for line in first.out.splitlines() if line.startswith("sfumato train"))
    import shlex

    again = sfumato(*shlex.split(line)[1:])
    assert again.code == 0, again.err
    a, b = sorted((tmp_path / "runs" / "mae").iterdir())
    losses = [[json.loads(x).get("loss") for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (a, b)]
    assert losses[0] == losses[1]


def test_runs_are_listed_shown_and_removed(sfumato, tmp_path):
    assert "no runs" in sfumato("runs").err
    words = ["train", "mae", "--data", "sample:digits", "--device", "cpu", "--steps", "2", *ENCODER]
    trained = sfumato(*words)
    assert trained.code == 0
    listed = json.loads(sfumato("runs", "ls", "--json").out)
    assert [r["state"] for r in listed] == ["done"]
    assert listed[0]["step"] == 2
    shown = sfumato("runs", "show", listed[0]["run"])
    assert "mask_ratio" in shown.out
    assert "mae" in sfumato("runs").out
    again = sfumato("train", "--resume", listed[0]["run"])
    assert again.code == 0
    assert "finished" in again.err
    assert again.err.splitlines()[-1] == trained.err.splitlines()[-1]  # what to do with it, whatever it can do
    assert sfumato("runs", "rm", listed[0]["run"], "--yes").code == 0
    assert json.loads(sfumato("runs", "ls", "--json").out) == []
    assert sfumato("runs", "rm", tmp_path, "--yes").code == 2


def test_doctor(sfumato):
    done = sfumato("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == 0, found["self_test"]
    assert found["well"]
    assert found["packages"]["torch"] != "missing"


def test_every_command_has_help_with_examples(sfumato):
    for command in (
        "papers",
        "show",
        "train",
        "apply",
        "sample",
        "edit",
        "export",
        "compare",
        "probe",
        "reproduce",
        "doctor",
        "demo",
    ):
        done = sfumato(command, "--help")
        assert done.code == 0
        assert "Examples" in done.out, command


def test_draw_new_pictures(sfumato, tmp_path, my_photos):
    """Photographs of unlike sizes train it; a seed draws the same pictures again, as a grid or as files."""
    small = ("--set", "width=8", "--set", "image_size=16", "--set", "batch_size=4", "--set", "sample_steps=2")
    done = sfumato("train", "ddpm", "--data", "my_photos", "--device", "cpu", "--steps", "2", *small)
    assert done.code == 0, done.err
    run = run_of(tmp_path, "ddpm")
    assert f"sfumato sample {run.relative_to(tmp_path)}" in done.err
    for name in ("a.png", "b.png"):
        assert sfumato("sample", run, "-n", "4", "-o", name).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (2 * 18 + 2, 2 * 18 + 2)
    assert sfumato("sample", run, "-n", "3", "-o", "drawn").code == 0
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["0.png", "1.png", "2.png"]
    assert "no picture" in sfumato("sample", run, "-o", "grid.txt").err
    plain = np.asarray(Image.open(tmp_path / "a.png"))
    for words in ("--steps 4", "--eta 0.5", "--sampler ddpm", "--sampler euler --steps 4", "--sampler heun --steps 4"):
        assert sfumato("sample", run, "-n", "4", "-o", "other.png", *words.split()).code == 0
        assert (np.asarray(Image.open(tmp_path / "other.png")) != plain).any(), words
    done = sfumato("sample", run, "-n", "4", "-o", "drawn.gif", "--sampler", "heun", "--steps", "70")
    assert "35 of the steps, then the 4 pictures" in done.out  # at most 60: every second one
    with Image.open(tmp_path / "drawn.gif") as film:
        assert (film.size, film.info["duration"]) == ((38, 38), 80)
        film.seek(film.n_frames - 1)
        assert film.info["duration"] >= 2000
        seen = np.asarray(film.convert("RGB")).astype(int)
    assert sfumato("sample", run, "-n", "4", "-o", "end.png", "--sampler", "heun", "--steps", "70").code == 0
    assert np.abs(seen - np.asarray(Image.open(tmp_path / "end.png"))).mean() < 8  # a .gif has 256 colours
    done = sfumato("sample", run, "-n", "4", "-o", "kept.npz", "--keep", "0.8", "--window", "0:2")
    assert done.code == 0, done.err
    assert "drew 5, dropped the 1 whose expected end varied most over steps 0 to 2 of 2" in done.err
    assert np.load(tmp_path / "kept.npz")["x"].shape == (4, 3, 16, 16)
    for words, told in (
        (["--keep", "1.5"], "share above 0"),
        (["--window", "0:2"], "give --keep too"),
        (["--keep", "0.9", "--window", "1:2"], "two or more of the 2 steps"),
        (["--steps", "1001"], "knows 1000 noise levels"),
        (["--steps", "0"], "greater than 0"),
        (["--sampler", "plms"], "'ddim', 'ddpm', 'euler' or 'heun'"),
        (["--eta", "1.5"], "less than or equal to 1"),
        (["--eta", "0.5", "--sampler", "heun"], "leave it out"),
        (["--keep", "0.5", "-o", "drawn.gif"], "leave one of them out"),
        (["--guidance", "2"], "train it with --set conditional=true"),
        (["--label", "3"], "knows no classes"),
    ):
        done = sfumato("sample", run, "-o", "grid.png", *words)
        assert done.code == 2
        assert told in done.err


def test_draw_a_class_by_name(sfumato, tmp_path, my_photos):
    """One folder a class: what is drawn by name is not what is drawn by another, and guidance changes it."""
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for photo in sorted((tmp_path / "my_photos").iterdir())[:2]:
            (tmp_path / "pets" / name / photo.name).write_bytes(photo.read_bytes())
    small = ("--set", "width=8", "--set", "image_size=16", "--set", "batch_size=4", "--set", "sample_steps=2")
    told = ("--steps", "2", *small, "--set", "conditional=true")
    assert "one folder a class" in sfumato("train", "ddpm", "--data", "my_photos", "--device", "cpu", *told).err
    done = sfumato("train", "ddpm", "--data", "pets", "--device", "cpu", *told)
    assert done.code == 0, done.err
    run, drawn = run_of(tmp_path, "ddpm"), {}
    for words in ("--label cat", "--label 0", "--label dog", "--label dog --guidance 40", "--guidance 0"):
        done = sfumato("sample", run, "-n", "2", "-o", "pets.npz", *words.split())
        assert done.code == 0, done.err
        drawn[words] = np.load(tmp_path / "pets.npz")["x"]
    assert (drawn["--label cat"] == drawn["--label 0"]).all()
    kinds = [drawn[words] for words in ("--label cat", "--label dog", "--label dog --guidance 40", "--guidance 0")]
    assert all((a != b).any() for i, a in enumerate(kinds) for b in kinds[:i])
    done = sfumato("sample", run, "-o", "pets.png", "--label", "wolf")
    assert done.code == 2
    assert "cat, dog" in done.err


def test_a_pipeline_of_diffusers_is_drawn_with_and_goes_on_learning(sfumato, tmp_path, my_photos):
    from diffusers import DDIMScheduler, DDPMPipeline

    from sfumato.nn import small_unet

    DDPMPipeline(small_unet(16, 3, width=8, mults=(1, 2)), DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    for name in ("a.npz", "b.npz"):
        done = sfumato("sample", "diffusers:pipe", "-n", "2", "-o", name, "--steps", "2")
        assert done.code == 0, done.err
    first, again = (np.load(tmp_path / name)["x"] for name in ("a.npz", "b.npz"))
    assert (first == again).all()
    words = ("--data", "my_photos", "--device", "cpu", "--steps", "1", "--set", "batch_size=4", "--set", "ema=0")
    done = sfumato("train", "ddpm", *words, "--init", "diffusers:pipe")
    assert done.code == 0, done.err
    assert f"--init diffusers:{tmp_path.resolve()}/pipe" in done.out
    assert sfumato("sample", run_of(tmp_path, "ddpm"), "-n", "2", "-o", "b.npz", "--steps", "2").code == 0
    gap = np.abs(np.load(tmp_path / "b.npz")["x"] - first)
    assert 0 < gap.mean() < 0.2  # one step further
    done = sfumato("sample", "diffusers:nowhere", "-n", "2", "-o", "c.npz")
    assert done.code == 2
    assert "model_index.json" in done.err


def test_points_are_learned_drawn_and_probed(sfumato, tmp_path):
    np.savez(tmp_path / "line.npz", x=1 + np.arange(60).reshape(-1, 1) % 3)
    small = ("--set", "width=8", "--set", "times=20", "--set", "batch_size=16")
    done = sfumato("train", "mode-interpolation", "--data", "arrays:line.npz", "--device", "cpu", "--steps", "2", *small)
    assert done.code == 0, done.err
    run = run_of(tmp_path, "mode-interpolation")
    assert "-n 1000 -o points.npz" in done.err
    assert sfumato("sample", run, "-n", "24", "-o", "points.npz", "--keep", "0.96").code == 0
    assert np.load(tmp_path / "points.npz")["x"].shape == (24, 1)
    assert "end it in .npz" in sfumato("sample", run, "-o", "grid.png").err
    assert "a way of its own" in sfumato("sample", run, "-o", "points.npz", "--steps", "5").err
    done = sfumato("probe", "hallucination", run, "--device", "cpu", "--set", "samples=20")
    assert done.code == 0, done.err
    assert "stand out" in done.out
    (folder,) = (tmp_path / "probed" / "hallucination").iterdir()
    assert (folder / "report.html").is_file()
    assert "looks at no data" in sfumato("probe", "hallucination", run, "--data", "sample:digits").err
    assert "sample --keep" in sfumato("train", "mode-interpolation", "--data", "sample:digits", "--device", "cpu").err
