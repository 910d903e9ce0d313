import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.claim import Verdict, judge
from sfumato.engine.lab import Lab
from sfumato.papers.dynamics import mode_connectivity as page
from sfumato.probes import barrier, path_loss


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 4)
    return net, (x, (x[:, 0] > 0).long())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_copies_differ_in_the_order_of_the_data_alone():
    net, data = small()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    runs = page.spawn(net, data, at=(2, 0), epochs=2, batch_size=16, generator=seeded())
    again = page.spawn(net, data, at=(0, 2), epochs=2, batch_size=16, generator=seeded())
    other = page.spawn(net, data, at=(0, 2), epochs=2, batch_size=16, generator=seeded(1))
    assert list(runs) == [0, 2]
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(torch.equal(before[name], t) for name, t in runs[0].fork.items())
    first, second = runs[2].ends
    assert not torch.equal(first["0.weight"], second["0.weight"])
    assert torch.equal(first["0.weight"], again[2].ends[0]["0.weight"])
    assert not torch.equal(first["0.weight"], other[2].ends[0]["0.weight"])
    whole = page.spawn(net, data, at=(0, 2), epochs=2, batch_size=64, generator=seeded())
    for run in whole.values():  # with one batch an epoch the order is no difference at all
        torch.testing.assert_close(run.ends[0], run.ends[1])
    torch.testing.assert_close(whole[0].ends[0], whole[2].fork)
    longer = page.spawn(net, data, at=(0,), epochs=4, batch_size=64, generator=seeded())
    torch.testing.assert_close(whole[2].ends[0], longer[0].ends[0])  # a fork takes the momentum along


def test_training_lowers_the_loss_and_saved_ends_give_the_same_path(tmp_path):
    net, data = small()
    run = page.spawn(net, data, at=(0,), epochs=10, batch_size=16, generator=seeded())[0]
    curve = path_loss(net, *run.ends, F.cross_entropy, data, alphas=3)
    assert float(curve.loss[0]) < 0.5 * float(F.cross_entropy(net(data[0]), data[1]))
    torch.save(run.ends, tmp_path / "ends.pt")
    loaded = torch.load(tmp_path / "ends.pt", weights_only=True)
    assert torch.equal(path_loss(net, *loaded, F.cross_entropy, data, alphas=3).loss, curve.loss)


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "COPIES", 2)
        return page.measured_pairs(Lab(0, budget=0.1))


@pytest.fixture(scope="module")
def forks(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "measured_pairs", lambda lab: rows)
        return page.forks(Lab(0))


def test_claim_on_forks_in_small(forks):
    assert forks["independent"]["barrier"] > max(0.3, 10 * forks["fork at 0"]["barrier"])
    assert forks["independent, matched"]["barrier"] < 0.5 * forks["independent"]["barrier"]
    assert forks["independent"]["distance"] > 2 * forks["fork at 0"]["distance"]
    assert forks["independent"]["midpoint curvature"] > 0
    assert all(math.isfinite(v) for arm in forks.values() for v in arm.values())
    assert {f"fork at {k}" for k in page.FORKS} < set(forks)


def test_claim_on_forks_can_fail(forks):
    good = {arm: dict(values) for arm, values in forks.items()}
    good["fork epoch"] = {"rank trend of distance": -1.0, "rank trend of angle at init": -1.0}
    good["fork at 0"] |= {"barrier": 0.05, "log10 of the barrier": math.log10(0.05)}
    good["independent"] |= {"barrier": 1.4, "log10 of the barrier": math.log10(1.4)}
    good["fork at 8"] |= {"barrier": 0.0}
    good["fork at 16"] |= {"barrier": 0.0}
    assert judge(page.forks, [good] * 5).verdict is Verdict.REPRODUCED
    same = {**good, "fork at 0": good["fork at 16"] | {"log10 of the barrier": -4.0}}
    late = {**good, "fork at 8": {"barrier": 0.006}}
    far = {**good, "fork epoch": {"rank trend of distance": -0.5, "rank trend of angle at init": -1.0}}
    for changed in (same, late, far):
        assert judge(page.forks, [changed] * 5).verdict is Verdict.NOT_REPRODUCED


def test_claim_on_curvature(rows, monkeypatch):
    monkeypatch.setattr(page, "measured_pairs", lambda lab: rows)
    found = page.curvature(Lab(0))
    assert set(found) == {"midpoint curvature", "endpoint form", "distance", "chance"}
    ordered = [{**row, "midpoint curvature": row["barrier"]} for arm in rows.values() for row in arm]
    monkeypatch.setattr(page, "measured_pairs", lambda lab: {"all": ordered})
    perfect = page.curvature(Lab(0))
    assert judge(page.curvature, [perfect] * 5).verdict is Verdict.REPRODUCED
    opposite = [{**row, "midpoint curvature": -row["barrier"]} for row in ordered]
    monkeypatch.setattr(page, "measured_pairs", lambda lab: {"all": opposite})
    assert judge(page.curvature, [page.curvature(Lab(0))] * 5).verdict is Verdict.NOT_REPRODUCED


def test_ridge_claim():
    figures = [page.ridge(Lab(seed, budget=0.2)) for seed in range(5)]
    assert judge(page.ridge, figures).verdict is Verdict.REPRODUCED
    broken = [{**f, "fork at 200": f["fork at 0"]} for f in figures]
    assert judge(page.ridge, broken).verdict is Verdict.NOT_REPRODUCED


def test_ridge_barrier_is_a_quarter_of_kappa_squared():
    v = torch.tensor([0.25, 1.0, 2.0], dtype=torch.float64)
    left, right = torch.stack([-v.sqrt(), v], -1), torch.stack([v.sqrt(), v], -1)
    torch.testing.assert_close(page.ridge_barrier(left, right), v.square() / 4)
    torch.testing.assert_close(page.ridge_barrier(right, right), torch.zeros(3, dtype=torch.float64))


class Landscape(nn.Module):
    """The ridge as a network, so that the general probe can be held against it."""

    def __init__(self, point):
        super().__init__()
        self.point = nn.Parameter(torch.tensor(point, dtype=torch.float64))

    def forward(self, x):
        return page.ridge_loss(self.point[0], self.point[1]).expand(len(x))


def test_ridge_seen_by_the_general_probe():
    net, end = Landscape([-1.2, 0.9]), Landscape([0.8, 1.3])
    data = torch.zeros(2, 1), torch.zeros(2)
    curve = path_loss(net, net.state_dict(), end.state_dict(), lambda out, _: out.mean(), data, alphas=101)
    expected = page.ridge_barrier(net.point.detach(), end.point.detach())
    assert barrier(curve).height == pytest.approx(float(expected))


def test_ridge_descends_along_its_gradient():
    start = torch.tensor([[0.7, 0.4], [-0.3, -0.5]], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(page.ridge_loss(*start.unbind(-1)).sum(), start)[0]
    moved = page.ridge_run(start.detach(), 1, lr=0.05, noise=0.0)
    torch.testing.assert_close(moved, start.detach() - 0.05 * slope)
    a, b = (page.ridge_run(start.detach(), 5, generator=seeded(s)) for s in (0, 0))
    assert torch.equal(a, b)
    assert torch.autograd.gradcheck(lambda p: page.ridge_loss(*p.unbind(-1)), start)


def test_rank_correlation():
    assert page.rank_correlation([1, 2, 3], [5, 6, 9]) == pytest.approx(1)
    assert page.rank_correlation([1, 2, 3], [4, 4, 4]) == 0
