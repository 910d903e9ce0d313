"""The training contract: resume, accumulation and processes give the same numbers for every kind of method."""

import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import kinds
import pytest
import torch

from sfumato.engine import Options, Run, Trainer, fit
from sfumato.engine.stream import as_data, epoch, stream
from sfumato.errors import BadData, BadSetting, Diverged
from sfumato.method import Batch, Loss


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_run(root: Path, name: str) -> Run:
    run = Run.create(root, name)
    run.write_config({"slug": name})
    return run


def losses(run: Run) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in run.metrics() if "loss" in m]


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda k: k.__name__)
def test_resume_is_bit_equal(kind, tmp_path):
    whole = new_run(tmp_path, kind.__name__)
    straight = fit(kind(), kinds.data(), run=whole, log_every=1, device="cpu", progress=False)
    broken = new_run(tmp_path, kind.__name__)
    first = kind()
    first.stop_at = 17
    try:
        fit(first, kinds.data(), run=broken, log_every=1, save_every=7, device="cpu", progress=False)
    except KeyboardInterrupt:
        assert broken.last_checkpoint.stem == "step-14"
    resumed = fit(kind(), kinds.data(), run=broken, log_every=1, device="cpu", progress=False)
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 20
    a, b = straight.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a if torch.is_tensor(a[k]))


@pytest.mark.parametrize("kind", [kinds.Curvature, kinds.Adversarial, kinds.Points], ids=lambda k: k.__name__)
def test_accumulation_averages_by_weight(kind, tmp_path):
    """Without masks and dropout, 4 micro-batches give the gradient of the whole batch."""
    torch.manual_seed(0)
    methods = []
    for accumulate in (1, 4):
        method = kind()
        if kind is kinds.Curvature:
            method.loss = lambda batch, ctx, m=method: Loss((m.net[0](batch.x.flatten(1)).square()).mean(), len(batch))
        if kind is kinds.Adversarial:
            method.fake = lambda batch, ctx, m=method: m.g(batch.x.flatten(1)[:, :8])
            method.d[2].p = method.g[2].p = 0.0
        methods.append(fit(method.double(), kinds.data().double(), steps=6, accumulate=accumulate, device="cpu", progress=False))
    for p, q in zip(methods[0].parameters(), methods[1].parameters()):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


def test_two_processes_equal_one_that_accumulates_two(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import json, sys, torch, kinds\n"
        "from accelerate import Accelerator\n"
        "torch.set_num_threads(1)\n"
        "from sfumato.engine import Trainer, Options\n"
        "out = {}\n"
        "for kind in kinds.KINDS:\n"
        "    trainer = Trainer(kind(), kinds.data(), Options(device='cpu', accumulate=int(sys.argv[1])), steps=10)\n"
        "    world = trainer.accelerator.num_processes\n"
        "    batches = trainer.batches(0)\n"
        "    out[kind.__name__] = [float(trainer.step(next(batches), check=True).loss) for _ in range(10)]\n"
        "if trainer.main: json.dump({'world': world, 'losses': out}, open(sys.argv[2], 'w'))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    results = []
    for launcher, accumulate in ((["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 1), ([], 2)):
        out = tmp_path / f"{accumulate}.json"
        command = [sys.executable, *launcher, str(script), str(accumulate), str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    two, one = results
    assert two["world"] == 2
    assert one["world"] == 1
    for kind, values in one["losses"].items():
        assert values == pytest.approx(two["losses"][kind], rel=1e-6), kind


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Bad(kinds.Masked):
        def loss(self, batch, ctx):
            return Loss(super().loss(batch, ctx).value * (math.nan if ctx.step == 5 else 1.0))

    run = new_run(tmp_path, "bad")
    with pytest.raises(Diverged, match=r"nan at step 5 \(samples .*step-4 is kept"):
        fit(Bad(), kinds.data(), run=run, save_every=2, device="cpu", progress=False)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Bad(kinds.Masked):
        def steps(self, ctx):
            yield from super().steps(ctx)
            if ctx.step == 3:
                self.net[0].weight.data[0, 0] = math.inf

    run = new_run(tmp_path, "bad")
    with pytest.raises(Diverged, match=r"net\.0\.weight"):
        fit(Bad(), kinds.data(), run=run, save_every=4, device="cpu", progress=False)
    assert run.last_checkpoint.stem == "step-0"


def test_minutes_fix_a_number_of_steps_and_leave_the_start_untouched():
    torch.manual_seed(3)
    method = kinds.Teacher()
    before = method.net[0].weight.clone()
    from sfumato.engine import Options, Trainer

    trainer = Trainer(method, kinds.data(), Options(device="cpu"), minutes=0.005)
    assert trainer.ctx.total > 1
    assert trainer.ctx.step == 0
    assert torch.equal(method.net[0].weight, before)
    assert not trainer.ctx.optimizers["net"].state


def test_a_moving_average_is_kept_and_resumed(tmp_path):
    run = new_run(tmp_path, "ema")
    method = fit(kinds.Masked(), kinds.data(), run=run, ema=0.5, device="cpu", progress=False)
    from sfumato.engine import load

    averaged = load(run.path, kind=kinds.Masked)
    gap = (averaged.net[0].weight - method.net[0].weight).abs().max()
    assert 0 < gap < 0.1


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(BadSetting, match="multiple of 3"):
        fit(kinds.Masked(), kinds.data(), accumulate=3, device="cpu", progress=False)


def loader(*tensors, **settings):
    data = tensors[0] if len(tensors) == 1 else torch.utils.data.TensorDataset(*tensors)
    return torch.utils.data.DataLoader(data, batch_size=8, **settings)


class Seeing(kinds.Masked):
    """Keeps the batches that its loss was given."""

    def loss(self, batch, ctx):
        self.__dict__.setdefault("seen", []).append(batch)
        return super().loss(batch, ctx)


@pytest.mark.parametrize(
    ("field", "given"), [("label", torch.arange(36)), ("target", kinds.data(36).flip(0))], ids=["labels", "targets"]
)
def test_a_persons_own_loader(field, given):
    """One whose last batch is smaller, and which ends before the training does."""
    x = kinds.data(36)
    method = fit(Seeing(), loader(x, given), steps=7, device="cpu", progress=False)
    assert not method.training
    for name, value in {"x": x, "index": torch.arange(52), field: given}.items():
        whole = value if name == "index" else torch.cat((value, value[:16]))
        assert torch.equal(torch.cat([getattr(b, name) for b in method.seen]), whole)
    assert all(getattr(b, {"label": "target", "target": "label"}[field]) is None for b in method.seen)


def test_a_loader_of_tuples_of_one_and_of_batches_is_the_same():
    x = kinds.data()
    data = [loader(x), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 8)]
    data.append([Batch(part, torch.arange(len(part))) for part in x.split(8)].__iter__())
    weights = [fit(kinds.Masked(), d, steps=5, device="cpu", progress=False).net[0].weight for d in data]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_held_out_data_may_be_a_loader(tmp_path):
    class Counting(kinds.Masked):
        def evaluate(self, batches):
            return {"count": sum(len(b) for b in batches)}

    run = new_run(tmp_path, "held-out")
    fit(Counting(), loader(kinds.data()), steps=1, held_out=loader(kinds.data(36)), run=run, device="cpu", progress=False)
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["eval"] == {"count": 36}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (loader([{"image": x} for x in kinds.data()]), "gives dict: let it give images"),
        (loader([(x, "a name") for x in kinds.data()]), "gives Tensor, .*: let it give images"),
        (loader(255 * kinds.data()), "divide by 255"),
        (loader(kinds.data() - 0.5), r"bring them to \[0, 1\]"),
        (iter(kinds.data().split(8)), "cannot be read twice"),
        (iter([]), "the loader is empty"),
    ],
    ids=["dicts", "names", "255", "standardised", "iterator", "empty"],
)
def test_a_loader_that_gives_something_else_is_refused_in_one_line(data, told):
    with pytest.raises(BadData, match=told):
        fit(kinds.Masked(), data, steps=7, device="cpu", progress=False)


def test_bf16_trains():
    method = fit(kinds.Masked(), kinds.data(), steps=3, precision="bf16", device="cpu", progress=False)
    assert method.net[0].weight.dtype == torch.float32


def test_a_method_sees_its_data_once_before_it_trains(tmp_path):
    class Surveying(kinds.Masked):
        seen = 0

        def survey(self, batches):
            self.order = torch.cat([b.index for b in batches]).tolist()
            type(self).seen += len(self.order)

    run = new_run(tmp_path, "surveying")
    fit(Surveying(), kinds.data(), run=run, steps=3, device="cpu", progress=False)
    count = len(as_data(kinds.data()))
    assert Surveying.seen == count
    fit(Surveying(), kinds.data(), run=run, steps=3, device="cpu", progress=False)  # goes on from a checkpoint
    assert Surveying.seen == count
    orders = [fit(Surveying(), kinds.data(), steps=1, seed=s, device="cpu", progress=False).order for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]  # a folder sorted by class: the first few are a fair sample
    assert all(sorted(order) == list(range(count)) for order in orders)
    with pytest.raises(BadData, match="can be indexed"):
        fit(Surveying(), iter([]), steps=3, device="cpu", progress=False)


def test_an_epoch_of_unlike_sizes_cuts_its_batches():
    """Held-out photographs of any size are seen once each, in order."""
    sizes = [(4, 4), (4, 4), (4, 4), (5, 4), (5, 4), (4, 4)]
    data = as_data([torch.rand(1, *size) for size in sizes])
    batches = list(epoch(data, 2))
    assert [tuple(b.x.shape) for b in batches] == [(2, 1, 4, 4), (1, 1, 4, 4), (2, 1, 5, 4), (1, 1, 4, 4)]
    assert torch.cat([b.index for b in batches]).tolist() == list(range(6))


def test_timing_leaves_the_trainer_as_it_was():
    straight = fit(kinds.Scheduled(), kinds.data(), steps=6, device="cpu", progress=False)
    trainer = Trainer(kinds.Scheduled(), kinds.data(), Options(device="cpu"), steps=6)
    assert trainer.seconds_a_step(at_least=0) > 0
    timed = trainer.train(show=False)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), timed.parameters()))


def test_a_preview_that_breaks_off_warns_and_training_goes_on(tmp_path):
    class Previewed(kinds.Masked):
        def preview(self, batch, generator):
            raise Diverged("2 of 4 samples broke off")

    run = new_run(tmp_path, "previewed")
    with pytest.warns(UserWarning, match="no pictures: 2 of 4 samples broke off"):
        fit(Previewed(), kinds.data(), steps=3, run=run, progress=False, device="cpu", workers=0)
    assert run.last_checkpoint.stem == "step-3"
    assert not list(run.pictures.iterdir())


def test_vectors_are_gathered_as_pictures_are():
    """One look-up a batch gives what loading one by one gives."""
    points = torch.arange(40.0).view(20, 2) / 40
    together = as_data(points)
    one_by_one = as_data(list(points.view(20, 1, 1, 2).unbind()))  # a list of pictures is not in one tensor
    pick = {"batch_size": 6, "start": 2, "seed": 3}
    for a, b in zip(islice(stream(together, None, **pick), 5), islice(stream(one_by_one, None, **pick), 5)):
        assert torch.equal(a[0].x, b[0].x.view(-1, 2))
        assert torch.equal(a[0].index, b[0].index)
