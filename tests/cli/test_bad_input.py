"""What bad input gets: one line on stderr (what, where, what to do), exit code 2, no traceback, nothing lost."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

TINY = [
    "--set",
    "image_size=8",
    "--set",
    "patch=2",
    "--set",
    "dim=16",
    "--set",
    "depth=1",
    "--set",
    "decoder_dim=16",
    "--set",
    "batch_size=4",
]
SMALL_RUN = ["train", "mae", "--data", "sample:digits", "--device", "cpu", "--steps", "3", *TINY]


def refused(done, *words):
    """Exit code 2 and one line that holds all these words."""
    assert done.code == 2, done
    lines = [line for line in done.err.splitlines() if line.startswith("sfumato: ")]
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def picture(path, size=(40, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny MAE run."""
    from sfumato.cli import main

    root = tmp_path_factory.mktemp("trained")
    with pytest.raises(SystemExit) as stop:
        main([*SMALL_RUN, "--runs", str(root)])
    assert not stop.value.code
    return next(root.glob("mae/*"))


def test_unknown_slug(sfumato):
    refused(sfumato("train", "colourmae", "--data", "sample:digits"), "colourmae", "colormae")


def test_a_paper_that_is_not_built(sfumato):
    refused(sfumato("train", "rddm", "--data", "sample:photos"), "rddm")


def test_a_study_tells_what_to_run_instead(sfumato):
    refused(sfumato("train", "adahessian", "--data", "sample:digits"), "sfumato train classifier", "optimizer=adahessian")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("mask_ration=0.5", ["mask_ration", "mask_ratio"]),
        ("mask_ratio=lots", ["mask_ratio", "lots"]),
        ("mask_ratio=1.5", ["mask_ratio", "1.5"]),
        ("batch_size=0", ["batch_size"]),
        ("nonsense", ["nonsense", "NAME=VALUE"]),
    ],
)
def test_settings(sfumato, setting, words):
    refused(sfumato("train", "mae", "--data", "sample:digits", "--set", setting), *words)


def test_other_words(sfumato):
    refused(sfumato("train", "mae"), "--data WHERE")
    refused(sfumato(*SMALL_RUN, "--minutes", "1"), "not both")
    refused(sfumato(*SMALL_RUN, "--precision", "fp16"), "bf16")
    refused(sfumato(*SMALL_RUN, "--accumulate", "3"), "multiple of 3")
    refused(sfumato(*[w if w != "cpu" else "cuda:7" for w in SMALL_RUN]), "cuda:7")
    refused(sfumato(*SMALL_RUN, "--preset", "huge"), "paper")
    refused(sfumato(*SMALL_RUN, "--track", "paper"), "tensorboard")


def test_a_tracker_that_is_not_installed(sfumato, tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.engine.options.find_spec", lambda name: None)
    refused(sfumato(*SMALL_RUN, "--track", "mlflow"), "pip install", "track")
    assert not (tmp_path / "runs").exists()


def test_places(sfumato, tmp_path):
    refused(sfumato("train", "mae", "--data", "nowhere/"), "nowhere")
    (tmp_path / "empty").mkdir()
    refused(sfumato("train", "mae", "--data", "empty"), "empty")
    refused(sfumato("train", "mae", "--data", "sample:potos"), "potos", "photos")
    picture(tmp_path / "flat" / "a.png")
    refused(sfumato("train", "classifier", "--data", "flat"), "label", "folder per class")


def test_unreadable_pictures_are_skipped_counted_and_refused_when_none_is_left(sfumato, tmp_path):
    good = picture(tmp_path / "some" / "good.png")
    whole = good.read_bytes()
    (tmp_path / "some" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "some" / "void.jpg").write_bytes(b"")
    done = sfumato("train", "mae", "--data", "some", "--device", "cpu", "--steps", "2", *TINY)
    assert done.code == 0, done.err
    assert "skipped" in done.err
    assert "1 more" in done.err
    good.unlink()
    refused(sfumato("train", "mae", "--data", "some"), "some")
    done = sfumato("apply", next((tmp_path / "runs" / "mae").iterdir()), "some/cut.png", "-o", "out")
    refused(done, "none of the 1 files")


def test_decompression_bomb(sfumato, tmp_path):
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bombs").mkdir()
    (tmp_path / "bombs" / "bomb.png").write_bytes(bomb)
    refused(sfumato("train", "mae", "--data", "bombs"), "bomb")


def test_all_kinds_of_pictures_are_converted_and_it_is_said_once(sfumato, tmp_path, trained):
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg")):
        picture(tmp_path / "kinds" / f"{mode}.{suffix}", mode=mode)
    deep = np.random.default_rng(0).integers(0, 65536, (32, 40), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "kinds" / "deep.png")
    done = sfumato("train", "mae", "--data", "kinds", "--device", "cpu", "--steps", "2", *TINY)
    assert done.code == 0, done.err
    assert len(done.err.splitlines()) < 12
    done = sfumato("apply", trained, "kinds", "-o", "e.npz")
    assert done.code == 0, done.err
    with np.load("e.npz", allow_pickle=False) as found:
        assert len(found["names"]) == 5
        assert np.isfinite(found["features"]).all()


def test_a_loss_that_is_not_finite(sfumato, tmp_path):
    words = [w if w != "3" else "40" for w in SMALL_RUN]
    line = refused(
        sfumato(*words, "--set", "base_lr=1e30", "--save-every", "1", "--log-every", "1"), "step", "is kept", "--resume"
    )
    kept = line.split("; ")[-1].split()[0]
    run = next((tmp_path / "runs" / "mae").iterdir())
    from sfumato.engine import checkpoint

    state = checkpoint.read(run / "checkpoints" / f"{kept}.safetensors")
    assert checkpoint.assert_finite(state["method"]) is None


def test_checkpoints_of_another_kind(sfumato, tmp_path, trained):
    refused(sfumato("train", "--resume", "no/such/run"), "no/such/run", "sfumato runs")
    refused(sfumato("train", "--resume", tmp_path), "config.yaml")
    refused(sfumato("train", "cbsn", "--data", "sample:photos", "--init", trained, "--device", "cpu"), "MAE")
    import shutil

    other = shutil.copytree(trained, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("slug: mae", "slug: simmim"))
    (other / "metrics.jsonl").write_text("")
    refused(sfumato("train", "--resume", other), "'mae'")
    newest = max((trained / "checkpoints").iterdir())
    broken = tmp_path / "step-9.safetensors"
    broken.write_bytes(newest.read_bytes()[:-10])
    refused(sfumato("apply", broken, tmp_path, "-o", "out"), "damaged")


def test_nothing_is_unpickled(sfumato, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/pwned",))

    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    refused(sfumato(*SMALL_RUN, "--init", "evil.pth"), "could run code")
    assert not (tmp_path / "pwned").exists()
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
    refused(sfumato(*SMALL_RUN, "--init", "other.pth"), "fit no network")


def test_a_persons_own_weights_start_a_training(sfumato, tmp_path, trained):
    from sfumato.engine import load

    torch.save(load(trained).state_dict(), tmp_path / "mine.pth")
    assert sfumato(*SMALL_RUN, "--init", "mine.pth").code == 0


def test_full_disk(tmp_path):
    """The step-0 checkpoint fits under the file limit, the ones with optimizer state do not."""
    script = "import sys; from sfumato.cli import main; main(sys.argv[1:])"
    words = ["train", "mae", "--data", "sample:digits", "--device", "cpu", "--steps", "6", "--save-every", "2", *TINY]
    words += ["--set", "dim=64"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 2, done.stderr
    assert "earlier checkpoints are intact" in done.stderr
    assert "Traceback" not in done.stderr
    from sfumato.engine import Run, load

    run = Run.open(next((tmp_path / "runs" / "mae").iterdir()))
    assert run.last_checkpoint.stem == "step-0"
    load(run.path)


def test_two_runs_into_one_folder(sfumato, trained):
    from sfumato.engine import Run

    run = Run.open(trained)
    metrics = run.metrics_file.read_text()
    run.metrics_file.write_text("")
    try:
        with run.lock():
            refused(sfumato("train", "--resume", trained), "in use by another process")
    finally:
        run.metrics_file.write_text(metrics)


def test_apply_never_overwrites_its_input(sfumato, tmp_path, trained):
    refused(sfumato("apply", trained, "none.png", "-o", "out"), "none.png")
    picture(tmp_path / "a.png")
    refused(sfumato("apply", trained, "a.png", "-o", "out", "--do", "restore"), "cannot restore", "encode")


def test_a_run_that_cannot_sample(sfumato, trained):
    refused(sfumato("sample", trained, "-o", "grid.png"), "cannot sample", "encode")
    refused(sfumato("sample", trained, "-n", "0", "-o", "grid.png"), "1 or more")
