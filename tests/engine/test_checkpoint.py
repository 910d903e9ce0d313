"""One-file checkpoints: what they hold, what they refuse, what survives."""

import errno
import os

import pytest
import torch

from sfumato.engine import Run, checkpoint
from sfumato.errors import BadCheckpoint, Busy, SfumatoError


def test_a_tree_comes_back_as_it_was(tmp_path):
    weight = torch.randn(3, 4)
    state = {
        "tied": [weight, weight],
        "view": weight[:2, 1:],
        "transposed": weight.t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0),
        "bool": torch.tensor([True, False]),
        "plain": {"a": (1, 2.5, None, "x", True), 3: []},
    }
    path = tmp_path / "step-1.safetensors"
    checkpoint.save(path, state)
    back = checkpoint.read(path)
    assert back["plain"] == state["plain"]
    assert list(back) == list(state)
    for name in ("view", "transposed", "expanded", "last", "scalar", "bool"):
        assert torch.equal(back[name], state[name])
        assert back[name].is_contiguous()


@pytest.mark.parametrize("bad", [{"f": print}, {"a": {1, 2}}, {(1, 2): 3}, {"n": torch.nn.Linear(1, 1)}])
def test_what_cannot_be_read_back_safely_is_refused(bad, tmp_path):
    with pytest.raises(TypeError, match="state"):
        checkpoint.save(tmp_path / "step-1.safetensors", bad)
    assert not list(tmp_path.iterdir())


def test_damage_is_told(tmp_path):
    path = tmp_path / "step-1.safetensors"
    checkpoint.save(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadCheckpoint, match="damaged"):
        checkpoint.read(path)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, path)
    with pytest.raises(BadCheckpoint, match="plain weights"):
        checkpoint.read(path)
    with pytest.raises(BadCheckpoint, match="no checkpoint at"):
        checkpoint.read(tmp_path / "none")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "step-1.safetensors", {"w": torch.ones(2)})

    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SfumatoError, match=r"No space left.*earlier checkpoints are intact"):
        checkpoint.save(tmp_path / "step-2.safetensors", {"w": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-1.safetensors"]
    assert checkpoint.read(tmp_path / "step-1.safetensors")["w"].sum() == 2


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 10, 9):
        checkpoint.save(tmp_path / f"step-{step}.safetensors", {"s": step})
    (tmp_path / ".step-11.safetensors.writing").write_bytes(b"half")
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.listing(tmp_path)] == ["step-9.safetensors", "step-10.safetensors"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_folder_is_held_by_one(tmp_path):
    run = Run.create(tmp_path, "x")
    with run.lock(), pytest.raises(Busy, match="in use"), Run(run.path).lock():
        pass
    with run.lock():
        pass
    assert Run.create(tmp_path, "x").path != Run.create(tmp_path, "x").path


def test_metrics_survive_a_cut_line_and_rewind(tmp_path):
    run = Run.create(tmp_path, "x")
    for step in range(5):
        run.log(step=step, loss=float(step))
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 5, "lo')
    run.rewind(2)
    assert [m["step"] for m in run.metrics()] == [0, 1, 2]
