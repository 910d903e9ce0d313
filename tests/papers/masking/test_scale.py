"""Every masked method at scale: micro-batches, processes, bf16, compiled halves and streams give the same numbers."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from masked_methods import SLUGS, build, pictures
from PIL import Image

from sfumato.data import open_data
from sfumato.engine import Options, Trainer
from sfumato.papers.masking.hybrid_distill import HybridDistill

SUPPORT = Path(__file__).parents[2] / "support"


def trained(method, data, steps=2, **options):
    trainer = Trainer(method, data, Options(device="cpu", workers=0, **options), steps=steps)
    batches = trainer.batches(0)
    return [float(trainer.step(next(batches), check=True).loss) for _ in range(steps)]


class Masks:
    """Keeps the masks of micro-batches, or gives kept ones as those of whole batches: chance is then the same in both."""

    def __init__(self, method, kept=None, parts=1):
        self.own, self.kept, self.parts = method.mask, kept, parts
        self.drawn = []

    def __call__(self, x, generator, progress=1.0):
        if self.kept is None:
            self.drawn.append(self.own(x, generator, progress))
            return self.drawn[-1]
        mine, self.kept = self.kept[: self.parts], self.kept[self.parts :]
        whole = sum(len(m) for m in mine)
        views = whole // len(x)  # all first views come first
        return torch.cat([m.unflatten(0, (views, -1)) for m in mine], 1).flatten(0, 1)


@pytest.mark.parametrize("slug", SLUGS)
def test_four_micro_batches_are_one_batch(slug):
    torch.manual_seed(0)
    start, results, kept = build(slug).double().state_dict(), [], None
    for accumulate in (4, 1):
        method = build(slug).double()
        method.load_state_dict(start)
        method.mask = masks = Masks(method, kept, parts=4)
        losses = trained(method, pictures(slug, torch.float64), accumulate=accumulate)
        kept = masks.drawn
        results.append((losses, dict(method.named_parameters())))
    (losses, weights), (whole, others) = results
    assert losses == pytest.approx(whole, rel=1e-9)
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], rtol=1e-6, atol=1e-10), name


def test_two_processes_are_one_that_accumulates(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import json, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from masked_methods import SLUGS, build, pictures\n"
        "from sfumato.engine import Options, Trainer\n"
        "out = {}\n"
        "for slug in SLUGS:\n"
        "    options = Options(device='cpu', workers=0, accumulate=int(sys.argv[1]))\n"
        "    trainer = Trainer(build(slug), pictures(slug), options, steps=2)\n"
        "    batches = trainer.batches(0)\n"
        "    out[slug] = [float(trainer.step(next(batches), check=True).loss) for _ in range(2)]\n"
        "if trainer.main: json.dump({'world': trainer.accelerator.num_processes, 'losses': out}, open(sys.argv[2], 'w'))\n"
    )
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    results = []
    for launcher, accumulate in ((["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 1), ([], 2)):
        out = tmp_path / f"{accumulate}.json"
        command = [sys.executable, *launcher, str(script), str(accumulate), str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    two, one = results
    assert (two["world"], one["world"]) == (2, 1)
    for slug in SLUGS:
        assert two["losses"][slug] == pytest.approx(one["losses"][slug], rel=1e-5), slug


@pytest.mark.parametrize("slug", SLUGS)
def test_bf16(slug):
    full = trained(build(slug), pictures(slug))
    method = build(slug)
    half = trained(method, pictures(slug), precision="bf16")
    assert half != full
    assert half == pytest.approx(full, rel=0.05)
    assert all(p.dtype == torch.float32 for p in method.parameters())


def halves(method):
    """Encoder and decoder; of boxed objects those of their tokens and the backbone; of a watched student its MLPs."""
    if isinstance(method, HybridDistill):
        return [block.mlp for block in method.encoder.blocks]
    head = getattr(method, "head", None)
    if hasattr(head, "autoencoder"):
        return head.backbone, head.autoencoder.encoder, head.autoencoder.decoder
    return [half for half in (method.encoder, getattr(method, "decoder", None)) if half is not None]


@pytest.mark.parametrize("slug", SLUGS)
def test_compiled_halves_give_the_same_losses(slug):
    plain = trained(build(slug), pictures(slug))
    method = build(slug)
    for half in halves(method):
        half.compile(backend="aot_eager")
    assert trained(method, pictures(slug)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_halves_compiled_by_inductor(slug):
    plain = trained(build(slug), pictures(slug))
    method = build(slug)
    for half in halves(method):
        half.compile()
    assert trained(method, pictures(slug)) == pytest.approx(plain, rel=1e-4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for s in range(2):
        with tarfile.open(folder / f"set-{s:03d}.tar", "w") as tar:
            for i in range(12):
                body = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (20, 24, 3), np.uint8)).save(body, "PNG")
                info = tarfile.TarInfo(f"{i:02d}.png")
                info.size = body.tell()
                body.seek(0)
                tar.addfile(info, body)
    return folder


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug != "masked-object-modeling"])  # boxes come from kitti:
def test_shards_are_streamed(slug, shards):
    losses = trained(build(slug, crop_scale=(0.2, 1.0)), open_data(f"wds://{shards}/set-{{000..001}}.tar"))
    assert all(np.isfinite(losses))
