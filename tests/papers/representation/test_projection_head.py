from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.data import digits
from sfumato.engine.lab import Lab
from sfumato.losses import supervised_contrastive
from sfumato.nn import ReweightingHead
from sfumato.papers.representation import projection_head as page

V = np.load(Path(__file__).parents[2] / "vectors" / "projection-head.npz")
PHI, S = (torch.tensor(v, dtype=torch.float64) for v in (page.STRENGTH, page.NOISE))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_theory_of_the_reference():
    phi, s = torch.from_numpy(V["phi"]), torch.from_numpy(V["aug_sigma"])
    theory = page.linear_theory(phi, s)
    for found, name in ((theory.gram, "end_to_end_gram_diag"), (theory.after, "post_weight"), (theory.before, "pre_weight")):
        torch.testing.assert_close(found, torch.from_numpy(V[name]), rtol=0, atol=1e-10)
    torch.testing.assert_close(theory.before, (phi * theory.after).sqrt())
    torch.testing.assert_close(theory.after, phi**2 / (phi**2 + s**2))


def test_theory_is_the_minimiser_of_the_loss():
    layer = page.linear_theory(PHI, S).gram.pow(0.25).diag().requires_grad_()
    least = page.population_loss(layer, layer, PHI, S)
    torch.testing.assert_close(least.detach(), -(PHI**4 / (PHI**2 + S**2) ** 2).sum())
    (grad,) = torch.autograd.grad(least, layer)
    assert grad.abs().max() < 1e-12
    for seed in range(5):
        moved = layer.detach() + 0.1 * normal(6, 6, seed=seed)
        assert page.population_loss(moved, layer.detach(), PHI, S) > least


def test_descent_follows_the_gradient_of_the_loss():
    steps, draw = 3, torch.Generator().manual_seed(0)
    found = page.descend(PHI, S, width=4, steps=steps, std=0.3, generator=torch.Generator().manual_seed(0))
    layers = [0.3 * torch.randn(4, n, dtype=torch.float64, generator=draw) for n in (6, 4)]
    for _ in range(steps):
        layers = [w.requires_grad_() for w in layers]
        grads = torch.autograd.grad(page.population_loss(*layers, PHI, S), layers)
        layers = [(w - 0.03 * g).detach() for w, g in zip(layers, grads)]
    torch.testing.assert_close(list(found), layers)


def test_layers_stay_balanced_up_to_the_rate():
    def imbalance(lr):
        runs = (
            page.descend(PHI, S, steps=n, lr=lr, std=0.05, generator=torch.Generator().manual_seed(0))
            for n in (0, round(30 / lr))
        )
        before, after = (first @ first.T - second.T @ second for first, second in runs)
        return float((after - before).abs().max())

    coarse, fine = imbalance(0.02), imbalance(0.01)
    assert fine < 0.02
    assert fine == pytest.approx(coarse / 2, rel=0.2)


def test_a_narrow_network_keeps_the_heaviest_features():
    first, second = page.descend(PHI, S, width=3, steps=4000, std=0.1, generator=torch.Generator().manual_seed(0))
    after = page.feature_weights(second @ first, PHI.diag())
    theory = page.linear_theory(PHI, S).after
    heaviest = theory >= theory.topk(3).values[-1]
    torch.testing.assert_close(after, theory * heaviest, rtol=0, atol=1e-2)
    assert torch.all((page.feature_weights(first, PHI.diag()) > 0.1) == heaviest)  # both layers lose the others


def test_feature_weights_are_lengths_of_answers():
    w, d = normal(3, 4), normal(5, 4, seed=1)
    torch.testing.assert_close(page.feature_weights(w, d), torch.stack([(w @ row).norm() for row in d]))


def test_linear_claim():
    figures = page.linear(Lab(0))
    assert judge(page.linear, [figures]).verdict is Verdict.REPRODUCED
    unfinished = page.linear(Lab(0, budget=0.02))
    assert judge(page.linear, [unfinished]).verdict is Verdict.NOT_REPRODUCED


def test_training_lowers_the_loss():
    train, test = digits(train=1000)
    head = partial(ReweightingHead, page.DIM)
    torch.manual_seed(0)
    net = page.contrastive_network(head, train, 1, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    trained = page.contrastive_network(head, train, 30, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (supervised_contrastive(n(test.x), test.label) for n in (net, trained))
    assert after < before - 0.3


def test_spectrum_is_shares_of_variance():
    features = normal(50, 2) @ torch.diag(torch.tensor([3.0, 1.0]).double()) @ normal(2, 8, seed=1)
    shares = page.spectrum(features, 4)
    expected = torch.linalg.eigvalsh(features.T.cov()).flip(0)[:4]
    torch.testing.assert_close(shares, expected / expected.sum())
    assert shares[2:].max() < 1e-12


def test_claim_from_coarse_to_fine_in_small():
    figures = page.coarse_to_fine(Lab(0, budget=0.04))
    assert set(figures) == {
        "no head", *(f"{head}, {place}" for head in ("MLP head", "reweighting head") for place in ("before", "after"))
    }  # fmt: skip
    assert all(0.6 < f["coarse accuracy"] <= 1 for f in figures.values())
    assert figures["MLP head, before"]["fine accuracy"] > figures["MLP head, after"]["fine accuracy"]


def test_claim_from_coarse_to_fine_can_fail():
    def verdict(before, after, fixed, none):
        arms = ("MLP head, before", "MLP head, after", "reweighting head, before", "no head")
        values = dict(zip(arms, (before, after, fixed, none)))
        return judge(page.coarse_to_fine, [{arm: {"fine accuracy": v} for arm, v in values.items()}] * 5).verdict

    assert verdict(0.94, 0.84, 0.96, 0.93) is Verdict.REPRODUCED
    assert verdict(0.94, 0.93, 0.96, 0.93) is Verdict.NOT_REPRODUCED
    assert verdict(0.94, 0.84, 0.92, 0.93) is Verdict.NOT_REPRODUCED
