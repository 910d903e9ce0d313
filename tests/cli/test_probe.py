"""`sfumato probe` as a person runs it: runs, timm models and factories, JSON, a page, the cost beforehand, and refusals."""

import io
import json
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

QUICK = ("--device", "cpu", "--set", "samples=16", "--set", "steps=3", "--set", "starts=2")
FACTORY = """
import torch

def net():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))

def wide():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9), torch.nn.Tanh(), torch.nn.Linear(9, 10))
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of factories in the present folder; its name is new every time, since modules are imported once."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    return name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of a tiny classifier, and one of an autoencoder."""
    from sfumato.cli import main

    root = tmp_path_factory.mktemp("trained")
    common = ["--data", "sample:digits", "--device", "cpu", "--steps", "3", "--set", "batch_size=8", "--runs", str(root)]
    tiny = ["--set", "image_size=8", "--set", "patch=2", "--set", "dim=16", "--set", "depth=1", "--set", "decoder_dim=16"]
    for words in (["classifier", *common], ["classifier", *common, "--seed", "1"], ["mae", *common, *tiny]):
        with pytest.raises(SystemExit) as stop:
            main(["train", *words])
        assert not stop.value.code
    return {"classifiers": sorted(root.glob("classifier/*")), "mae": next(root.glob("mae/*"))}


def refused(done, *words):
    """Exit code 2 and one line that holds all these words."""
    assert done.code == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("sfumato: ")]
    assert "Traceback" not in done.err
    assert all(word in line for word in words), line


def test_kinds_and_settings_are_told(sfumato):
    assert "curvature" in sfumato("probe").out
    assert set(json.loads(sfumato("probe", "--json").out)) >= {"curvature", "connectivity"}
    told = json.loads(sfumato("probe", "connectivity", "--json").out)
    assert told["models"] == 2
    assert told["settings"]["tolerance"]["default"] == 0.02
    assert "--set operator=all" in sfumato("probe", "curvature").out


def test_a_timm_model_with_json_and_page(sfumato, tmp_path):
    done = sfumato("probe", "curvature", "timm:test_resnet", "--data", "sample:digits", "--json", *QUICK)
    assert done.code == 0, done.err
    found = json.loads(done.out, parse_constant=pytest.fail)
    assert set(found) == {
        *("probe", "version", "models", "seed", "minutes", "settings", "plan", "seconds", "headline", "verdict", "notes"),
        *("interrupted", "numbers", "command", "report"),
    }
    assert set(found["numbers"]) == {"loss", "gradient_norm", "hessian", "ggn", "fisher"}
    one = found["numbers"]["hessian"]
    assert set(one) == {"trace", "negative_share", "largest", "smallest", "layers", "density", "starts"}
    assert len(one["density"]["t"]) == len(one["density"]["phi"]) == len(one["density"]["stderr"])
    assert [len(start["nodes"]) for start in one["starts"]] == [3, 3]
    assert found["models"][0]["samples"] == found["settings"]["samples"] == 16
    assert done.err.count("built anew") == 0  # with --json it stands in the notes
    assert sum("built anew with 10 outputs" in note for note in found["notes"]) == 1
    (folder,) = (tmp_path / "probed" / "curvature").iterdir()
    stored = json.loads((folder / "findings.json").read_text())
    assert stored["numbers"] == found["numbers"]
    page = (folder / "report.html").read_text()
    assert "Curvature of timm:test_resnet" in page
    assert "running statistics" in page
    assert found["command"] in page.replace("&#39;", "'")


def test_a_run_of_a_classifier_and_two_of_them(sfumato, trained):
    a, b = trained["classifiers"]
    done = sfumato("probe", "curvature", a, "--data", "sample:digits", "-o", "out", *QUICK)
    assert done.code == 0, done.err
    assert "largest eigenvalue (Hessian)" in done.out
    words = ("--data", "sample:digits", "--device", "cpu", "--set", "samples=32", "--set", "alphas=3", "--json")
    done = sfumato("probe", "connectivity", a, b, *words)
    assert done.code == 0, done.err
    found = json.loads(done.out)["numbers"]
    assert set(found) == {"as they are", "units matched"}
    assert found["as they are"]["alphas"] == [0, 0.5, 1]
    assert set(found["as they are"]["layers"]) == {"trunk.0", "trunk.1", "trunk.3", "trunk.4", "head"}


def test_a_run_of_a_method_with_its_own_loss(sfumato, trained):
    run = trained["mae"]
    done = sfumato("probe", "curvature", run, "--data", "sample:digits", "--json", *QUICK)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert set(found["numbers"]) == {"loss", "gradient_norm", "hessian"}
    assert all(not name.startswith("method.") for name in found["numbers"]["hessian"]["layers"])
    refused(sfumato("probe", "curvature", run, "--data", "sample:digits", "--set", "operator=ggn"), "hessian")
    refused(sfumato("probe", "curvature", run, "--data", "sample:digits", "--loss", "mse"), "own loss")


def test_a_factory_with_weights_and_its_cost(sfumato, tmp_path, nets):
    done = sfumato("probe", "curvature", f"{nets}:net", "--data", "sample:digits", "--dry-run", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["plan"]["steps"] >= 1
    assert told["seconds"] > 0
    assert not (tmp_path / "probed").exists()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    words = ("--data", "sample:digits", "--set", "samples=8", "--set", "alphas=3", "--set", "layers=0", "--json")
    one, two = ("--weights", "a.pth"), ("--weights", "a.pth", "--weights", "a.pth")
    same = sfumato("probe", "connectivity", f"{nets}:net", f"{nets}:net", *words, *two)
    assert json.loads(same.out)["numbers"]["as they are"]["distance"] == 0
    other = sfumato("probe", "connectivity", f"{nets}:net", f"{nets}:net", *words, *one)
    assert json.loads(other.out)["numbers"]["as they are"]["distance"] > 1
    refused(sfumato("probe", "curvature", f"{nets}:wide", "--data", "sample:digits", *one), "1.weight", "[8, 64]")
    refused(sfumato("probe", "curvature", f"{nets}:net", "--data", "sample:digits", *two), "2 files", "1 model")
    refused(sfumato("probe", "connectivity", f"{nets}:net", f"{nets}:wide", "--data", "sample:digits"), "1.weight", "[9, 64]")


def test_words_that_are_refused(sfumato, tmp_path, nets, trained):
    data = ("--data", "sample:digits")
    net = f"{nets}:net"
    refused(sfumato("probe", "curvatur", net, *data), "curvature")
    refused(sfumato("probe", "curvature", net), "--data WHERE")
    refused(sfumato("probe", "curvature", net, net, *data), "one model")
    refused(sfumato("probe", "connectivity", net, *data), "MODEL_B")
    refused(sfumato("probe", "curvature", net, *data, "--set", "operatr=hessian"), "operator")
    refused(sfumato("probe", "curvature", net, *data, "--set", "operator=jacobian"), "fisher")
    refused(sfumato("probe", "curvature", net, *data, "--set", "loss=mse"), "--loss")
    refused(sfumato("probe", "curvature", net, *data, "--minutes", "0"), "positive")
    refused(sfumato("probe", "curvature", net, *data, "--loss", "hinge"), "module:function")
    refused(sfumato("probe", "curvature", net, *data, "--weights", "no.pth"), "no.pth")
    refused(sfumato("probe", "curvature", net, *data, "--device", "cuda:7"), "cuda:7")
    refused(sfumato("probe", "curvature", "timm:resnet19", *data), "resnet18")
    refused(sfumato("probe", "curvature", "timm:test_resnet", "--data", "sample:photos"), "neither labels nor targets")
    refused(sfumato("probe", "curvature", "no/such/run", *data), "module:factory", "run folder")
    refused(sfumato("probe", "curvature", trained["classifiers"][0], "--data", "sample:photos"), "label", "folder per class")
    np.savez(tmp_path / "pairs.npz", x=np.zeros((6, 64), np.float32), target=np.zeros((6, 3), np.float32))
    refused(sfumato("probe", "curvature", net, "--data", "arrays:pairs.npz"), "[10]", "[3]")
    assert not (tmp_path / "probed").exists()


def test_ctrl_c_leaves_what_was_measured(sfumato, tmp_path, nets):
    with open(tmp_path / f"{nets}.py", "a") as file:
        file.write(
            "\ncalls = [0]\ndef loss(out, y):\n    calls[0] += 1\n"
            f"    if calls[0] == 20: __import__('signal').raise_signal({int(signal.SIGINT)})\n"
            "    return torch.nn.functional.cross_entropy(out, y)\n"
        )
    words = ("--set", "steps=3", "--set", "starts=30", "--set", "operator=hessian", "--set", "samples=8")
    done = sfumato("probe", "curvature", f"{nets}:net", "--data", "sample:digits", "--loss", f"{nets}:loss", *words)
    assert done.code == 130, done.err
    (folder,) = (tmp_path / "probed" / "curvature").iterdir()
    assert str(folder.relative_to(tmp_path)) in done.err
    found = json.loads((folder / "findings.json").read_text())
    assert found["interrupted"]
    assert 1 <= len(found["numbers"]["hessian"]["starts"]) < 30


def test_the_difficulty_of_a_run_that_was_trained_on_shards(sfumato, tmp_path):
    draw = np.random.default_rng(0)
    with tarfile.open(tmp_path / "set-000.tar", "w") as tar:
        for i in range(24):
            body = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(body, "PNG")
            info = tarfile.TarInfo(f"{i:02d}.png")
            info.size = body.tell()
            body.seek(0)
            tar.addfile(info, body)
    where = f"wds://{tmp_path}/set-{{000..000}}.tar"
    quick = ["--set", "width=8", "--set", "batch_size=8", "--set", "sample_steps=2"]
    done = sfumato("train", "denoising-curriculum", "--data", where, "--steps", 2, "--device", "cpu", "--workers", 0, *quick)
    assert done.code == 0, done.err
    (run,) = (tmp_path / "runs" / "denoising-curriculum").glob("*/")
    study = [word for pair in ("samples=16", "intervals=2", "draws=1", "train_steps=2", "drawn=8") for word in ("--set", pair)]
    found = json.loads(sfumato("probe", "difficulty", run, "--data", where, "--device", "cpu", *study, "--json").out)
    told = found["numbers"]["trained alone"]
    assert [part["times"] for part in found["numbers"]["parts"]] == [[0, 499], [500, 999]]
    assert [sorted(far) for far in told["distances"]] == [["patches", "whole"]] * 2
    assert "Samples suffer most from a network of 2 steps" in found["verdict"]
