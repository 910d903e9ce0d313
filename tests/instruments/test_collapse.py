"""Neural collapse through the whole instrument: frames that are known, batches, checkpoints of a run, and refusals."""

import pytest
import torch
from torch import nn

import sfumato
from sfumato.engine import checkpoint
from sfumato.engine.run_folder import Run
from sfumato.errors import BadData, BadSetting
from sfumato.instruments import Probe
from sfumato.papers.optimization.classifier import Classifier
from sfumato.probes import class_stats, nc1, nc2, nc3, pooled_stats, self_duality


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double()


@pytest.fixture(scope="module")
def data():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(40) % 4
    return [(x[:13], y[:13]), (x[13:], y[13:])]


def test_it_measures_what_its_parts_do(data):
    model = net()
    x, y = (torch.cat(t) for t in zip(*data))
    features, weight = model[:2](x).detach(), model[2].weight.detach()
    stats = class_stats(features, y)
    centred = stats.means - stats.mean
    for size in (7, 40):
        found = sfumato.probe("collapse", model, data, batch_size=size).numbers
        assert found["nc1"] == pytest.approx(nc1(features, y).item())
        assert found["class means"]["nc2"]["etf"] == pytest.approx(nc2(centred).item())
        assert found["class means"]["nc2"]["of"] == pytest.approx(nc2(stats.means, target="of").item())
        assert found["classifier"]["nc2"]["of"] == pytest.approx(nc2(weight, target="of").item())
        assert found["nc3"]["etf"] == pytest.approx(nc3(weight, centred).item())
        assert found["nc3"]["of"] == pytest.approx(nc3(weight, stats.means, target="of").item())
        assert found["self_duality"]["etf"] == pytest.approx(self_duality(weight, centred).item())
        assert found["accuracy"] == pytest.approx((model(x).argmax(1) == y).double().mean().item())
        within = (features - stats.means[y]).square().sum()
        assert found["spread"] == pytest.approx((within / (10 * centred.square().sum())).item())
        assert found["by class"]["samples"].tolist() == [10] * 4


@pytest.mark.parametrize(("centre", "frame"), [(True, "etf"), (False, "of")])
def test_a_collapsed_classifier_is_told_from_a_scattered_one(centre, frame):
    k = 5
    points = torch.eye(k, dtype=torch.float64) - (1 / k if centre else 0)
    model = nn.Linear(k, k, bias=False).double()
    model.weight.data = 3 * points
    y = torch.arange(50) % k
    near = points[y] + 1e-3 * torch.randn(50, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sfumato.probe("collapse", model, [(near, y)])
    assert found.numbers["nc1"] < 1e-4
    assert found.numbers["class means"]["nc2"][frame] < 5e-3
    assert found.numbers["self_duality"][frame] < 5e-3
    assert found.numbers["nearest_mean_agreement"] == 1
    assert found.verdict.startswith("Collapsed: ")
    if centre:
        torch.testing.assert_close(found.numbers["cosines"], torch.full((10,), -0.25, dtype=torch.float64), atol=1e-2, rtol=0)
        assert "near to a simplex" in found.verdict
        assert "layer point to" in found.verdict
    far = torch.randn(50, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert sfumato.probe("collapse", model, [(far, y)]).verdict.startswith("Not collapsed: ")


def test_parts_pool_to_the_whole(data):
    x, y = (torch.cat(t) for t in zip(*data))
    pooled = pooled_stats(class_stats(a, b, classes=5) for a, b in data)
    for one, other in zip(pooled, class_stats(x, y, classes=5)):
        torch.testing.assert_close(one, other)
    with pytest.raises(BadData, match="no part"):
        pooled_stats([])


def test_unequal_and_missing_classes_are_said(data):
    x, y = (torch.cat(t) for t in zip(*data))
    keep = (y != 3) & ~((y == 1) & (torch.arange(40) > 20))
    found = sfumato.probe("collapse", net(), [(x[keep], y[keep])])
    assert any("only the 3 classes" in note for note in found.notes)
    assert any("classes are unequal (5 to 10 samples)" in note and "gof_spectrum" in note for note in found.notes)
    assert len(found.numbers["cosines"]) == 3


def test_models_without_a_last_linear_layer_are_refused(data):
    with pytest.raises(BadSetting, match=r"nn.Linear of a model is given, and Sequential calls none"):
        sfumato.probe("collapse", nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 4, 1), nn.Flatten()).double(), data)
    bottleneck = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (2, 1)), nn.Conv1d(2, 4, 1), nn.Flatten()).double()
    with pytest.raises(BadSetting, match=r"the last nn.Linear, 0, reads \[3\] and gives 2 a sample"):
        sfumato.probe("collapse", bottleneck, data)
    with pytest.raises(BadData, match="at least two samples each"):
        sfumato.probe("collapse", net(), [(data[0][0][:6], data[0][1][:6])])


def test_samples_are_left_out_where_the_time_is_short(data):
    x = torch.randn(200, 3, dtype=torch.float64)
    plan = Probe("collapse", net(), [(x, torch.arange(200) % 4)], minutes=1e-9).plan
    assert plan.chosen["samples"] == 16
    assert any("only 16 samples" in note for note in plan.notes)


def test_a_run_is_followed_over_its_checkpoints(tmp_path):
    run = Run.create(tmp_path, "classifier")
    run.write_config({"slug": "classifier"})
    pictures, labels = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    methods = []
    for step in (10, 20, 30):
        torch.manual_seed(step)
        methods.append(Classifier(Classifier.Config.small(channels=3, classes=3, image_size=16)).eval())
        state = {"slug": "classifier", "step": step, "method": methods[-1].state_dict(), "ema": None}
        state["settings"] = methods[-1].config.model_dump()
        checkpoint.save(run.checkpoints / f"step-{step:08d}.safetensors", state)
    options = {"samples": 12, "device": "cpu", "minutes": None}
    found = sfumato.probe("collapse", run.path, (pictures, labels), **options)
    table = found.numbers["checkpoints"]
    assert [row["step"] for row in table] == [10, 20, 30]
    alone = [sfumato.probe("collapse", method, (pictures, labels), **options).numbers["nc1"] for method in methods]
    assert [row["nc1"] for row in table] == pytest.approx(alone)
    assert table[-1]["nc1"] == found.numbers["nc1"]
    assert "checkpoints" not in sfumato.probe("collapse", run.path, (pictures, labels), checkpoints=0, **options).numbers
    short = Probe("collapse", run.path, (pictures, labels), samples=12, device="cpu", minutes=1e-9)
    assert short.plan.chosen["checkpoints"] == 0
