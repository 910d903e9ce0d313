import pytest
import torch
from torch import nn

from sfumato.claim import Verdict, judge
from sfumato.data import modular
from sfumato.engine.lab import Lab
from sfumato.papers.dynamics import stablemax_perpgrad as page

TINY = {"p": 13, "train_fraction": 0.7, "width": 64}


def test_network_and_settings_are_the_papers():
    net = page.network(113)
    assert [tuple(p.shape) for p in net.parameters()] == [(200, 226), (200, 200), (113, 200)]
    x = torch.rand(3, 226)
    torch.testing.assert_close(net(2 * x), 2 * net(x), msg="no bias: homogeneous")
    made = []

    class Spy(torch.optim.AdamW):
        def __init__(self, params, **settings):
            made.append(settings)
            super().__init__(params, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "AdamW", Spy)
        for loss in ("float32", "stablemax"):
            page.run(loss=loss, steps=1, **TINY)
    assert made[0] == {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-25, "weight_decay": 0.0}
    assert made[1]["betas"] == (0.9, 0.999)


def test_runs_are_paired_and_repeatable():
    plain, perp, again, other = (
        page.run(perp=perp, seed=seed, steps=2, every=1, **TINY) for perp, seed in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    assert plain[0] == perp[0]
    assert perp == again
    assert perp != other
    assert plain[1]["loss"] != perp[1]["loss"]
    assert [row["step"] for row in page.run(steps=5, every=3, **TINY)] == [0, 3, 5]


def test_what_is_measured():
    train, test = modular(7, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(14, 7, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (row,) = page.learn(model, optimizer, page.LOSSES["float64"], train, test, steps=0)
    assert row["loss"] == pytest.approx(torch.tensor(7.0).log().item())
    assert row["train"] == pytest.approx(float((train.label == 0).float().mean()))
    assert (row["collapsed"], row["zero"], row["norm"], row["alignment"]) == (0, 0, 0, 0)
    with torch.no_grad():
        model.weight[3] = 50.0
    (row,) = page.learn(model, optimizer, page.LOSSES["float32"], train, test, steps=0)
    assert row["collapsed"] == 1
    assert row["zero"] == row["train"] == pytest.approx(float((train.label == 3).float().mean()))
    assert row["norm"] == pytest.approx(50 * 14**0.5)


@pytest.mark.parametrize("loss", ["float16", "float32", "float64", "stablemax"])
def test_every_loss_fits(loss):
    rows = page.run(loss=loss, steps=80, **TINY)
    assert rows[-1]["train"] > 0.99
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_perpgrad_generalises_in_small_and_adamw_does_not():
    perp, plain = (page.run(**page.SMALL, perp=perp, steps=120, every=40) for perp in (True, False))
    assert perp[-1]["test"] > 0.8
    assert plain[-1]["test"] < 0.05
    assert plain[-1]["train"] == perp[-1]["train"] == 1
    assert plain[-1]["alignment"] > 0.4


def test_claim_on_perpgrad_can_fail():
    good = {"AdamW": {"train": 1.0, "test": 0.001}, "perpGrad": {"train": 1.0, "test": 0.999}}
    assert judge(page.perpgrad, [good] * 5).verdict is Verdict.REPRODUCED
    both = {**good, "AdamW": {"train": 1.0, "test": 0.9}}
    neither = {**good, "perpGrad": {"train": 1.0, "test": 0.5}}
    unfitted = {**good, "AdamW": {"train": 0.9, "test": 0.001}}
    for changed in (both, neither, unfitted):
        assert judge(page.perpgrad, [changed] * 5).verdict is Verdict.NOT_REPRODUCED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            page, "run", lambda **kw: [{"step": 0, **dict.fromkeys(("train", "test", "loss", "alignment", "norm"), kw["perp"])}]
        )
        lab = Lab(0)
        assert page.perpgrad(lab)["perpGrad"]["test"] is True
        assert [c["arm"] for c in lab.curves] == ["AdamW", "perpGrad"]


def test_claim_on_delay():
    assert page.BEST_DECAY in page.DECAYS
    figures = page.delay(Lab(0, budget=0.15))
    assert set(figures) == {"perpGrad", "weight decay"}
    assert figures["perpGrad"]["test"] > figures["weight decay"]["test"] + 0.2
    sooner = {"perpGrad": {"steps to 95 %": 140.0}, "weight decay": {"steps to 95 %": 400.0}}
    assert judge(page.delay, [sooner] * 5).verdict is Verdict.REPRODUCED
    later = {"perpGrad": {"steps to 95 %": 400.0}, "weight decay": {"steps to 95 %": 140.0}}
    assert judge(page.delay, [later] * 5).verdict is Verdict.NOT_REPRODUCED
    assert page.steps_to([{"step": 0, "test": 0.1}, {"step": 10, "test": 0.2}]) == 10


def test_change_of_the_loss_late_in_a_run():
    falling = [{"step": float(s), "loss": 2.0 ** (-s / 20)} for s in range(0, 201, 20)]
    assert page.late_change(falling) == pytest.approx(2.0**-4)
    flat = [{"step": row["step"], "loss": 1.0} for row in falling]
    assert page.late_change(flat) == 1


def test_claim_on_collapse_in_small():
    figures = page.collapse(Lab(0, budget=0.1))
    assert all(arm["train"] == 1 for arm in figures.values())
    assert figures["stablemax"]["collapsed"] > 0.99
    assert figures["stablemax"]["zero"] == 0
    assert figures["stablemax"]["late change"] < 1
    assert judge(page.collapse, [figures] * 5).verdict is Verdict.NOT_REPRODUCED, "float32 has not collapsed yet"
    good = {**figures, "float32": {**figures["float32"], "zero": 0.5, "late change": 3.0}}
    assert judge(page.collapse, [good] * 5).verdict is Verdict.REPRODUCED
    for arm, changed in (("stablemax", {"zero": 0.1}), ("stablemax", {"late change": 1.1}), ("float64", {"late change": 1.0})):
        assert judge(page.collapse, [{**good, arm: {**good[arm], **changed}}] * 5).verdict is Verdict.NOT_REPRODUCED


@pytest.mark.slow
def test_float32_collapses():
    rows = page.run(**page.SMALL, steps=1700)
    assert rows[-1]["zero"] > 0.3
    assert rows[-1]["test"] < 0.05
