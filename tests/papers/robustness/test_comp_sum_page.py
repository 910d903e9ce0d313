import math

import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.engine.lab import Lab
from sfumato.losses import comp_sum
from sfumato.papers.robustness import comp_sum as page


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.8, 2.0, 2.5])
def test_least_loss_is_least(tau):
    p, scores = page.hard_cases(200, 4, torch.Generator().manual_seed(0))
    assert (page.excess_loss(scores, p, tau=tau) > -1e-12).all()
    best = p.log() / (2 - tau) if tau < 2 else 1e3 * (p == p.amax(-1, keepdim=True)).double()
    torch.testing.assert_close(comp_sum(best, p, tau=tau, reduction="none"), page.least_loss(p, tau=tau))


def test_excess_error_counts_a_tie_as_the_worst():
    p = torch.tensor([[0.5, 0.3, 0.2]]).expand(3, 3)
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    torch.testing.assert_close(page.excess_error(scores, p), torch.tensor([0.0, 0.2, 0.3]))


def test_half_of_the_cases_are_ties_of_the_likeliest():
    p, scores = page.hard_cases(100, 5, torch.Generator().manual_seed(0))
    top = scores[:50].topk(2)
    assert (top.values[:, 0] == top.values[:, 1]).all()
    assert torch.equal(top.indices.sort(1).values, p[:50].topk(2).indices.sort(1).values)
    torch.testing.assert_close(scores[:50].exp().sum(1), torch.ones(50, dtype=torch.float64))
    assert torch.equal(p, page.hard_cases(100, 5, torch.Generator().manual_seed(0))[0])


def test_bounds_hold_and_can_fail(monkeypatch):
    figures = [page.bounds(Lab(seed)) for seed in range(5)]
    assert judge(page.bounds, figures).verdict is Verdict.REPRODUCED
    bound = page.comp_sum_bound
    monkeypatch.setattr(page, "comp_sum_bound", lambda beta, **kw: 1.01 * bound(beta, **kw))
    assert page.bounds(Lab(0))["bound"]["worst violation"] > 1e-6
    monkeypatch.setattr(page, "comp_sum_bound", lambda beta, **kw: 0.5 * bound(beta, **kw))
    weak = judge(page.bounds, [page.bounds(Lab(seed)) for seed in range(5)])
    assert weak.verdict is Verdict.NOT_REPRODUCED


def test_many_classes_are_harder_for_mean_absolute_error():
    figures = page.many_classes(Lab(0, budget=0.5))
    assert figures["cross-entropy"]["accuracy, 10 classes"] > 0.9
    assert figures["10 classes"]["lost to cross-entropy"] > 0.1
    assert figures["40 classes"]["lost to cross-entropy"] > figures["10 classes"]["lost to cross-entropy"]


def test_robustness_claim_in_small():
    figures = page.robustness(Lab(0, budget=0.2))
    assert set(figures) == set(page.ARMS)
    plain = figures.pop("cross-entropy")
    for arm in figures.values():
        assert arm["robust_accuracy"] > plain["robust_accuracy"] + 0.02
        assert arm["robust_accuracy"] < arm["accuracy"]
        assert arm["accuracy"] > 0.7
    assert figures["pgd"] == page.robust_figures(Lab(0, budget=0.2), adversarial="pgd")


def test_robustness_is_judged_on_both_accuracies():
    def arms(robust, clean):
        smooth = {"robust_accuracy": robust, "accuracy": clean}
        return {"trades": {"robust_accuracy": 0.8, "accuracy": 0.9}, "smooth comp-sum": smooth}

    better = [arms(0.82 + seed / 1000, 0.9) for seed in range(5)]
    assert judge(page.robustness, better).verdict is Verdict.REPRODUCED
    less_clean = [arms(0.82 + seed / 1000, 0.88) for seed in range(5)]
    worse = [arms(0.78 + seed / 1000, 0.9) for seed in range(5)]
    for figures in (less_clean, worse):
        assert judge(page.robustness, figures).verdict is Verdict.NOT_REPRODUCED


def test_recipe_is_the_one_for_digits():
    config = page.recipe()
    assert config.steps == math.floor(25 * 1300 / 128 + 0.5)
    assert (config.model, config.optimizer, config.lr, config.weight_decay) == ("mlp", "sgd", 0.05, 5e-4)
    assert all(page.ARMS[name]["adversarial_weight"] in grid for name, grid in page.GRID.items())
