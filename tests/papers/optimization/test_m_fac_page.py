import pytest
import torch
from torch import nn

from sfumato.claim import Verdict, judge
from sfumato.data import digits
from sfumato.engine import Run, fit
from sfumato.engine.lab import Lab
from sfumato.nn import flatten_params
from sfumato.papers.optimization import m_fac as page
from sfumato.papers.optimization.classifier import Classifier


@pytest.fixture(scope="module")
def products():
    return [page.exact(Lab(0, budget=0.2))] * 5


def test_products_are_exact(products):
    assert judge(page.exact, products).verdict is Verdict.REPRODUCED
    for arm in products[0]:
        broken = [{**f, arm: dict.fromkeys(f[arm], 1e-6)} for f in products]
        assert judge(page.exact, broken).verdict is Verdict.NOT_REPRODUCED


@pytest.fixture(scope="module")
def pruned():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "SPARSITIES", (0.8, 0.9))
        patch.setattr(page, "NGRADS", 64)
        lab = Lab(0, budget=0.5)
        return page.pruning(lab), lab.curves


def test_pruning_with_correlations_loses_least(pruned):
    figures, curves = pruned
    at_80 = {name: arm["accuracy at 80 %"] for name, arm in figures.items() if name != "four points"}
    assert at_80["m-fac"] > at_80["diagonal fisher"] > at_80["magnitude"]
    assert at_80["m-fac"] > at_80["magnitude"] + 0.1
    assert [curve["arm"] for curve in curves] == ["magnitude", "diagonal fisher", "m-fac"]
    assert all(curve["x"] == [0.0, 0.8, 0.9] for curve in curves)
    assert len({curve["y"][0] for curve in curves}) == 1  # one dense network
    assert figures["m-fac"]["lost at 80 %"] == pytest.approx(curves[2]["y"][0] - curves[2]["y"][1])


def test_pruning_claim_can_fail(pruned):
    figures, _ = pruned
    figures = {**figures, "m-fac": figures["m-fac"] | {"lost at 80 %": 0.03}}
    assert judge(page.pruning, [figures] * 5).verdict is Verdict.REPRODUCED
    for arm in ("magnitude", "diagonal fisher"):
        assert judge(page.pruning, [{**figures, "m-fac": figures["m-fac"] | figures[arm]}] * 5).verdict is Verdict.NOT_REPRODUCED
    lossy = {**figures, "m-fac": figures["m-fac"] | {"lost at 80 %": 0.05}}
    assert judge(page.pruning, [lossy] * 5).verdict is Verdict.NOT_REPRODUCED


def test_magnitude_is_global_and_leaves_plain_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 5))
    before = torch.cat([net[0].weight.flatten(), net[2].weight.flatten()]).detach()
    page.prune_by_magnitude(net, 0.6)
    after = torch.cat([net[0].weight.flatten(), net[2].weight.flatten()]).detach()
    assert int((after == 0).sum()) == 90
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    assert set(dict(net.named_parameters())) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_accuracy_claim_trains_all_optimizers_from_the_same_weights():
    figures = page.accuracy(Lab(0, budget=0.1))
    assert set(figures) == set(page.BEST)
    assert all(0.2 < arm["accuracy"] <= 1 for arm in figures.values())
    assert len({arm["accuracy"] for arm in figures.values()}) > 1
    for name, settings in page.BEST.items():
        assert all(settings[key] in tried for key, tried in page.GRID[name].items())


class Stopping(Classifier):
    def loss(self, batch, ctx):
        if ctx.step == 8:
            raise KeyboardInterrupt
        return super().loss(batch, ctx)


def test_training_goes_on_in_the_middle_of_a_window(tmp_path):
    train, _ = digits(train=200)
    config = page.recipe("mfac", 1e-2, ngrads=6, damp=1e-2)
    kinds, ends = {"whole": (Classifier,), "broken": (Stopping, Classifier)}, {}
    for name, parts in kinds.items():
        run = Run.create(tmp_path, name)
        run.write_config({"slug": name})
        for kind in parts:
            torch.manual_seed(0)
            try:
                ends[name] = fit(kind(config), train, steps=11, run=run, save_every=7, device="cpu", progress=False)
            except KeyboardInterrupt:
                assert run.last_checkpoint.stem == "step-7"
    assert torch.equal(*(flatten_params(end) for end in ends.values()))
