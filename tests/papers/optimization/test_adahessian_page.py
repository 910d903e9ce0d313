import pytest

from sfumato.claim import Verdict, judge
from sfumato.engine.lab import Lab
from sfumato.papers.optimization import adahessian as page


@pytest.fixture(scope="module")
def figures():
    return [page.scaling(Lab(seed, budget=0.02)) for seed in range(5)]


def test_exact_properties_hold(figures):
    assert judge(page.scaling, figures).verdict is Verdict.REPRODUCED


def test_properties_can_fail(figures):
    like_adam = [{**f, "adahessian": {**f["adahessian"], **f["adam"]}} for f in figures]
    slow = [{**f, "adahessian": {**f["adahessian"], "after 300": 1e-6}} for f in figures]
    for changed in (like_adam, slow):
        assert judge(page.scaling, changed).verdict is Verdict.NOT_REPRODUCED


def test_accuracy_claim_trains_all_optimizers_from_the_same_weights():
    lab = Lab(0, budget=0.1)
    figures = page.accuracy(lab)
    assert set(figures) == set(page.BEST_LR)
    assert all(0.3 < arm["accuracy"] <= 1 for arm in figures.values())
    assert figures["sgd"] == {"accuracy": page.digits_accuracy(lab, "sgd", page.BEST_LR["sgd"])}
    assert len({arm["accuracy"] for arm in figures.values()}) > 1


def test_recipe_is_the_official_scripts():
    config = page.recipe("adahessian", 0.15)
    assert config.weight_decay == pytest.approx(5e-4 / 0.15)
    assert page.recipe("adam", 0.03).weight_decay == 5e-4
    assert (config.schedule, config.steps, config.batch_size, config.model) == ("step", 180, 64, "conv")
    assert all(page.BEST_LR[name] in grid for name, grid in page.GRID.items())


def test_curves_for_a_demonstration():
    curves = page.scaling_curves(steps=50)
    assert [len(c) for c in curves.values()] == [51, 51]
    assert curves["AdaHessian"][-1] < curves["AdamW"][-1] < 1
