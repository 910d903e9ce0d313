"""The examples run, do what they say, and use nothing that is not public."""

import ast
import importlib
import math
import re
import runpy
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.claim import paired_interval
from sfumato.data import photos, write_image

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder, in this process: what its `main` returns, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        torch.manual_seed(1)  # an example sets its own seed
        (path,) = [path for path in EXAMPLES if path.stem == name]
        returned = runpy.run_path(str(path))["main"]([str(a) for a in arguments])
        return returned, capsys.readouterr().out

    return run


def test_a_part_in_ones_own_loop(run):
    errors, told = run("part_in_own_loop", "--steps", 60)
    assert 0 < errors["network"] < 0.9 * errors["guess"]
    assert [float(v) for v in re.findall(r"by ([\d.]+)", told)] == [round(errors[name], 4) for name in ("guess", "network")]
    untrained, _ = run("part_in_own_loop", "--steps", 0, "--color", "red")
    assert untrained["network"] > 0.9 * untrained["guess"]


def test_a_method_on_ones_own_loader(run):
    losses, told = run("method_on_own_dataloader", "--steps", 12)
    assert list(losses) == ["untrained", "by sfumato.fit", "by hand"]
    assert losses["by sfumato.fit"] < 0.8 * losses["untrained"]
    assert losses["by hand"] == pytest.approx(losses["by sfumato.fit"], rel=0.1)
    assert all(f"{loss:.3f} on hidden patches" in told for loss in losses.values())
    assert "[256, 64]" in told


def test_a_method_on_ones_own_folder(run, tmp_path):
    for i, photo in enumerate(photos("train")[:4]):
        folder = tmp_path / "mine" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"{i}.png", photo[:, :90, :70].float() / 255)
    losses, _ = run("method_on_own_dataloader", "--steps", 12, "--data", tmp_path / "mine")
    assert losses["by sfumato.fit"] < 0.9 * losses["untrained"]


def test_latents_are_cached_once_and_trained_on(run, tmp_path):
    for i, photo in enumerate(photos("train")[:3]):
        (tmp_path / "mine").mkdir(exist_ok=True)
        write_image(tmp_path / "mine" / f"{i}.png", photo[:, : 60 + i, :70].float() / 255)
    arguments = ("--data", tmp_path / "mine", "--views", 8, "--cache", "mine.safetensors")
    figures, told = run("train_on_cached_latents", *arguments, "--steps", 2)
    assert figures["latents"] == 24
    assert "24 latents 12x8x8: 8 views of 3 pictures, 0.0 MB in mine.safetensors" in told
    written = (tmp_path / "mine.safetensors").stat().st_mtime_ns
    longer, told = run("train_on_cached_latents", *arguments, "--steps", 40)
    assert (tmp_path / "mine.safetensors").stat().st_mtime_ns == written
    assert longer["hidden_psnr"] > figures["hidden_psnr"] + 1
    assert f"{longer['hidden_psnr']:.2f} dB" in told
    assert "[256, 64]" in told


def test_adahessian_in_a_timm_script(run):
    accuracies, told = run("adahessian_in_timm_script", "--epochs", 1)
    assert accuracies[0] > 0.5
    assert told.endswith(f"test accuracy {accuracies[0]:.3f}\n")


def test_optimizers_in_ones_own_loop(run):
    figures, told = run("optimizers_in_own_loop", "--steps", 60)
    assert list(figures) == ["SGD", "M-FAC", "AdamW", "perpGrad, AdamW"]
    assert figures["M-FAC"]["loss"] < 0.7 * figures["SGD"]["loss"]
    assert figures["perpGrad, AdamW"]["loss"] < 2
    assert abs(figures["perpGrad, AdamW"]["weights"] - 1) < 0.1 < figures["AdamW"]["weights"] - 1, "weights turn, and do not grow"
    assert all(f"test accuracy {one['accuracy']:.3f}" in told for one in figures.values())


@pytest.mark.parametrize("optimizer", ["perpgrad", "mfac"])
def test_optimizers_in_a_timm_script(run, optimizer):
    accuracies, told = run("optimizers_in_timm_script", "--epochs", 1, "--optimizer", optimizer)
    assert accuracies[0] > 0.5
    assert told.endswith(f"test accuracy {accuracies[0]:.3f}\n")


@pytest.mark.parametrize(("physics", "steps"), [("blur", 120), ("inpaint", 60)])
def test_restoring_through_physics_of_deepinv(run, physics, steps, tmp_path):
    write_image(tmp_path / "photo.png", photos("test")[1][:, 100:164, 100:196].float() / 255)
    psnr, told = run("restore_with_deepinv_physics", "--steps", steps, "--physics", physics, "--data", "photo.png")
    assert psnr["plug-and-play"] > psnr["denoiser alone"] + 0.5
    assert psnr["plug-and-play"] > psnr["measured"] + 0.5
    assert [float(v) for v in re.findall(r"([\d.]+) dB", told)] == [round(v, 2) for v in psnr.values()]


def test_two_masks_compared(run):
    (figures, interval), _ = run("compare_two_masks", "--steps", 10, "--seeds", 3, "--color", "blue")
    assert [sorted(f) for f in figures] == [["blue", "random"]] * 3
    assert len({value for f in figures for value in f.values()}) == 6, "seeds and masks differ"
    assert interval == paired_interval([f["blue"] - f["random"] for f in figures])
    (again, _), _ = run("compare_two_masks", "--steps", 10, "--seeds", 1, "--color", "blue")
    assert again == figures[:1]


def test_two_masks_that_are_the_same_make_no_difference(run, monkeypatch):
    monkeypatch.setattr(sfumato.masks, "color_noise_mask", lambda *a, color, **k: sfumato.masks.random_mask(*a, **k))
    (figures, interval), _ = run("compare_two_masks", "--steps", 3, "--seeds", 2)
    assert all(f["green"] == f["random"] for f in figures), "both arms see the same weights, batches and noise"
    assert interval.mean == 0


def test_curvature_of_a_timm_model(run, tmp_path):
    found, told = run("probe_timm_model", "--steps", 10, "--samples", 8)
    largest, trace, density = found["largest"], found["trace"], found["density"]
    assert largest[0] > largest[1] > largest[2] > 0
    assert density.nodes.max() == pytest.approx(largest[0].item(), rel=0.05), "Lanczos finds the same end of the spectrum"
    assert math.isclose(float(torch.trapezoid(density.phi, density.t)), 1, rel_tol=1e-3)
    assert f"trace: {float(trace.value):.3g}" in told
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_says_how_to_run_it_and_uses_the_public_interface(path, capsys):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    assert f"\n    python examples/{path.name}\n" in docstring
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sfumato":
            module = importlib.import_module(str(node.module))
            public = module.__all__ if node.module.count(".") == 1 and hasattr(module, "__path__") else dir(module)
            assert {alias.name for alias in node.names} <= {name for name in public if not name.startswith("_")}
        assert not (isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)), "private"
    main = runpy.run_path(str(path))["main"]
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert docstring.partition("\n")[0] in capsys.readouterr().out


def test_windows_are_judged_by_pictures_that_could_not_be(run):
    told, printed = run("window_for_pictures", "--steps", 2, "--samples", 6, "--sample-steps", 10)
    assert len([name for name in told if name.startswith("steps")]) == 10
    assert "of 6 pictures could not be" in printed
    space = runpy.run_path(str(next(path for path in EXAMPLES if path.stem == "window_for_pictures")))
    bad = torch.arange(40) < 8  # the first tenth of the chain tells, the others do not, and no picture is white
    variance = torch.stack([torch.where(bad, 2.0, 1.0), torch.ones(40)])
    told = space["judge"](space["ScannedWindows"](torch.zeros(40, 1, 4, 4), [(0, 1), (9, 10)], variance), bad)
    assert told == {"steps 0 to 1 of 10": 1, "steps 9 to 10 of 10": 0.5, "chosen, steps 0 to 1": 1, "white pixels": 0.5}
