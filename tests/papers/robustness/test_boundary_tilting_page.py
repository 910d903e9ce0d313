from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.engine.lab import Lab
from sfumato.errors import BadSetting
from sfumato.papers.robustness import boundary_tilting as page
from sfumato.probes import deviation_angle, matched_temperature


def test_images_of_the_reference():
    v = np.load(Path(__file__).parents[2] / "vectors" / "boundary-tilting.npz")
    w, b, x = (torch.from_numpy(np.asarray(v[name])) for name in ("w", "b", "I"))
    behind, on = page.mirror(w, b, x), page.project_to_boundary(w, b, x)
    torch.testing.assert_close(behind, torch.from_numpy(v["mirror_I"]), rtol=0, atol=1e-10)
    torch.testing.assert_close(on, torch.from_numpy(v["projected_I"]), rtol=0, atol=1e-10)
    torch.testing.assert_close(page.mirror(w, b, behind), x)
    torch.testing.assert_close(behind @ w + b, -(x @ w + b))
    assert (on @ w + b).abs().max() < 1e-12
    torch.testing.assert_close((behind - x).norm(dim=1), 2 * ((x @ w + b) / w.norm()).abs())


def test_strong_penalty_takes_the_tilt_away():
    task = page.two_digits((3, 8), 0, flipped=0.0)
    balanced = torch.cat([(task.clean == label).nonzero()[:40, 0] for label in (-1, 1)])
    weight, _ = page.fit_logistic(task.x[balanced], task.clean[balanced], 1e-8)
    assert deviation_angle(weight, task.x[balanced], task.clean[balanced]).rad2deg() < 0.1


def test_tasks_are_apart_and_noisy():
    task = page.two_digits((4, 9), 1)
    assert (task.noisy != task.clean).sum() == 12
    assert set(task.y_test.tolist()) == {-1, 1}
    assert not (task.x_val[:, None] == task.x[None]).all(-1).any()
    assert torch.equal(task.x, page.two_digits((4, 9), 1).x)
    assert not torch.equal(task.x, page.two_digits((4, 9), 2).x)


def test_temperature_and_confident_target():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    x = torch.rand(20, 8)
    temperature = matched_temperature(net(x))
    assert (net(x) / temperature).softmax(1).amax(1).median().item() == pytest.approx(0.95, abs=1e-4)
    target = (net(x).argmax(1) + 1) % 3
    moved = page.confident_target(net, x, target, p=0.6, step=0.05, temperature=temperature, clip=(-5.0, 5.0))
    reached = (net(moved) / temperature).softmax(1).gather(1, target[:, None])
    assert (reached >= 0.6).float().mean() > 0.9
    assert torch.equal(page.confident_target(net, x, net(x).argmax(1), p=0.01), x)
    with pytest.raises(BadSetting, match="confidence"):
        matched_temperature(net(x), 0.2)


def test_free_tilt_claim_holds_and_can_fail(monkeypatch):
    figures = [page.free(Lab(seed)) for seed in range(5)]
    assert judge(page.free, figures).verdict is Verdict.REPRODUCED
    leaning = page.tilt
    monkeypatch.setattr(page, "tilt", lambda w, b, v, angle: leaning(w, b, torch.ones_like(v), angle))
    assert page.free(Lab(0))["tilted"]["changed predictions"] > 0


def test_noise_claim_in_small(monkeypatch):
    monkeypatch.setattr(page, "PAIRS", ((3, 8), (4, 9)))
    monkeypatch.setattr(page, "STRENGTHS", (1e-2, 1e-1, 1.0, 1e6))
    figures = page.noise(Lab(0))
    assert figures["path"]["share of rising steps"] == 1
    best, weak = figures["best C"], figures["C = 1e6"]
    assert best["test accuracy"] > weak["test accuracy"] + 0.05
    assert weak["log of the strength"] > best["log of the strength"] + 1
    monkeypatch.setattr(page, "two_digits", lambda pair, seed, of=page.two_digits: of(pair, seed, flipped=0.0))
    clean = page.noise(Lab(0))
    assert clean["C = 1e6"]["log of the strength"] < 0.5  # a strong tilt needs noise to fit
