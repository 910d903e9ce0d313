import numpy as np
import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.data import Batch
from sfumato.engine import fit
from sfumato.engine.lab import Lab
from sfumato.errors import BadData, BadSetting
from sfumato.papers.optimization import ignite as page
from sfumato.papers.optimization.ignite import IGNITE


@pytest.fixture(scope="module")
def task():
    return page.rippled_bowl(torch.Generator().manual_seed(0), count=400)


def data_of(task):
    return Batch(task.x, torch.arange(len(task.x)), target=task.y)


def trained(task, **settings):
    torch.manual_seed(0)
    method = IGNITE(IGNITE.Config.small(channels=8, hidden=32, criterion="mse", **settings))
    return fit(method, data_of(task), steps=60, device="cpu", workers=0, progress=False)


def test_designs_are_standardised_by_the_data(task):
    method = trained(task)
    z = method.standardised(task.x)
    assert z.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(z.std(0, unbiased=False), torch.ones(8), rtol=1e-4, atol=1e-4)
    assert method.evaluate([data_of(task)])["unexplained"] < 0.95  # 1: the mean
    torch.testing.assert_close(method.value_mean, task.y.mean(0), rtol=1e-4, atol=1e-4)


def test_known_designs_are_the_worse_half(task):
    assert len(task.x) == 200
    assert task.oracle(task.x).equal(task.y)
    assert task.y.max() < task.oracle(4 * torch.rand(2000, 8) - 2).quantile(0.7)


def test_the_penalty_makes_the_output_less_sharp(task):
    sharp = {}
    for name, settings in {"plain": {"penalty": "none"}, "strong": {"penalty": "constant", "lam": 20.0}}.items():
        method = trained(task, **settings)
        weights = list(method.surrogate.parameters())
        sharp[name] = page.output_sharpness(method.surrogate.mean, weights, method.standardised(task.x))
    assert sharp["strong"] < 0.9 * sharp["plain"]


def test_search_climbs(task):
    method = trained(task)
    start = task.x[:16]
    found = method.search(start)
    assert method.predict(found).mean() > method.predict(start).mean()
    assert torch.equal(method.search(start, steps=0).round(decimals=4), start.round(decimals=4))
    surrogate = lambda x: -(x - 1).square().sum(1, keepdim=True)  # noqa: E731
    near = page.gradient_ascent_search(surrogate, torch.zeros(3, 4), steps=500, lr=0.01)
    torch.testing.assert_close(near, torch.ones(3, 4), rtol=0, atol=1e-3)


def test_deviation_stays_within_its_bounds():
    net = page.GaussianMLP(3, 16)
    _, log_std = net(100 * torch.randn(200, 3))
    assert log_std.exp().min() >= 0.1 - 1e-6
    assert log_std.exp().max() < 0.4  # soft: low + softplus(high - low)


def test_a_likelihood_is_trained_too(task):
    method = trained(task, batch_size=64)
    nll = IGNITE(IGNITE.Config.small(channels=8, hidden=32, noise=0.1))
    nll = fit(nll, data_of(task), steps=60, device="cpu", workers=0, progress=False)
    assert nll.evaluate([data_of(task)])["unexplained"] < 1
    assert method.predict(task.x).shape == nll.predict(task.x).shape == (200, 1)


def test_claim_in_small(monkeypatch):
    monkeypatch.setattr(page, "ARMS", {k: page.ARMS[k] for k in ("plain", "ignite")})
    figures = page.ascent(Lab(0, budget=0.4))
    assert set(figures) == {"plain", "ignite"}
    assert all(f["best value"] >= f["median value"] > 1 for f in figures.values())
    assert figures["ignite"]["gradient norm"] < 0.95 * figures["plain"]["gradient norm"]


def test_claim_can_fail():
    good = {"plain": {"gradient norm": 5.0, "median value": 4.5}, "ignite": {"gradient norm": 3.5, "median value": 4.6}}
    assert judge(page.ascent, [good] * 10).verdict is Verdict.REPRODUCED
    for broken in ({"gradient norm": 4.5}, {"median value": 4.4}):
        figures = {**good, "ignite": good["ignite"] | broken}
        assert judge(page.ascent, [figures] * 10).verdict is Verdict.NOT_REPRODUCED


def test_what_is_no_design_is_refused():
    method = IGNITE(IGNITE.Config.small(channels=8))
    with pytest.raises(BadData, match="value of every design"):
        method.survey([Batch(torch.rand(4, 8), torch.arange(4))])
    with pytest.raises(BadData, match="one number"):
        method.survey([Batch(torch.rand(4, 8), torch.arange(4), target=torch.rand(4, 2))])
    with pytest.raises(BadSetting, match="channels"):
        IGNITE()


def test_commands(task, tmp_path, monkeypatch, capfd):
    from sfumato.cli import main

    monkeypatch.chdir(tmp_path)
    np.savez("designs.npz", x=task.x.numpy(), target=task.y[:, 0].numpy())
    settings = ["--set", "hidden=16", "--set", "ascent_steps=5"]
    for words in (
        ["train", "ignite", "--data", "arrays:designs.npz", "--steps", "20", "--device", "cpu", *settings],
        ["train", "--resume", "RUN"],
        ["apply", "RUN", "designs.npz", "-o", "better.npz"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(next((tmp_path / "runs" / "ignite").iterdir())) if w == "RUN" else w for w in words])
        assert not stop.value.code, capfd.readouterr().err
    found = np.load("better.npz")
    assert found["x"].shape == (128, 8)
    assert (np.diff(found["expected"][:, 0] if found["expected"].ndim > 1 else found["expected"]) <= 0).all()
    np.savez("other.npz", x=task.x[:, :3].numpy())
    run = str(next((tmp_path / "runs" / "ignite").iterdir()))
    with pytest.raises(SystemExit) as stop:
        main(["apply", run, "other.npz", "-o", "better.npz"])
    assert stop.value.code == 2
    assert "designs of 8 numbers" in capfd.readouterr().err
