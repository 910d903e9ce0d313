import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn import flatten_params
from sfumato.optim import MFAC, StaticInverseFisher
from sfumato.sparsity import MFACPruner, obs_prune

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "m-fac.npz")


def vector(name):
    return torch.from_numpy(VECTORS[name])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def test_equals_the_official_pruner():
    inverse = StaticInverseFisher(vector("G"), damp=float(VECTORS["damp"]))
    w, removed = obs_prune(vector("w"), inverse, int(VECTORS["ndrop"]))
    assert torch.equal(removed.nonzero().squeeze(1), vector("drop"))
    torch.testing.assert_close(w, vector("w_pruned"), rtol=1e-8, atol=1e-12)


def test_one_weight_of_a_quadratic_costs_exactly_its_saliency():
    grads, w = randn(9, 6), randn(6, seed=1)
    inverse = StaticInverseFisher(grads, damp=0.1)
    hessian = 0.1 * torch.eye(6, dtype=torch.float64) + grads.T @ grads / 9
    new, removed = obs_prune(w, inverse, 1)
    change = new - w
    saliency = w.square() / (2 * inverse.diag())
    torch.testing.assert_close(change @ hessian @ change / 2, saliency[removed].sum())
    assert saliency.argmin() == removed.nonzero().item()
    assert new[removed].tolist() == [0]


def test_a_diagonal_fisher_corrects_nothing():
    w = randn(8, seed=1)
    new, removed = obs_prune(w, StaticInverseFisher(randn(5, 8), block=1), 3)
    assert torch.equal(new, torch.where(removed, 0, w))


def test_ties_and_ends():
    same = StaticInverseFisher(torch.zeros(1, 4), damp=1.0)
    w = torch.ones(4)
    assert obs_prune(w, same, 2)[1].tolist() == [True, True, False, False]
    assert torch.equal(obs_prune(w, same, 0)[0], w)
    assert torch.equal(obs_prune(w, same, 4)[0], torch.zeros(4))
    assert torch.equal(w, torch.ones(4))
    for wrong in (-1, 5):
        with pytest.raises(BadSetting, match="from 0 to 4"):
            obs_prune(w, same, wrong)


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(24, 3)).to(dtype)
    x = torch.randn(60, 1, 8, dtype=dtype)
    return net, (x, torch.randint(3, (60,)))


def test_steps_reach_their_sparsity_and_keep_what_was_removed():
    net, data = problem()
    norms = net[1].weight.detach().clone(), net[5].bias.detach().clone(), net[1].running_mean.clone()
    pruner = MFACPruner(net, None, F.cross_entropy, data, ngrads=8, batch=10, block=5, recomputations=3, generator=seeded())
    assert list(pruner.removed) == ["0.weight", "5.weight"]  # no biases, no norms
    assert pruner.sparsity == 0
    before = None
    for target in (0.25, 0.25, 0.5, 0.75):
        removed = pruner.step(target)
        assert removed is pruner.removed
        assert pruner.sparsity == target
        flat = flatten_params(removed)
        weights = torch.cat([net[0].weight.flatten(), net[5].weight.flatten()])
        assert torch.equal(weights == 0, flat)
        assert before is None or bool(flat[before].all())
        before = flat
    assert torch.equal(net[1].weight, norms[0])
    assert torch.equal(net[5].bias, norms[1])
    assert torch.equal(net[1].running_mean, norms[2])
    assert net.training
    with pytest.raises(BadSetting, match=r"at least 0\.75"):
        pruner.step(0.5)


def test_one_step_is_obs_on_the_gradients_of_the_batches():
    net, (x, y) = problem(torch.float64)
    batches = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    net.eval()
    names = ["5.weight"]
    w = net[5].weight.detach().flatten().clone()
    rows = []
    for bx, by in [*batches, batches[0]]:
        loss = F.cross_entropy(net(bx), by)
        rows.append(torch.autograd.grad(loss, net[5].weight)[0].flatten())
    expected, removed = obs_prune(w, StaticInverseFisher(torch.stack(rows), damp=1e-3), 36)
    pruner = MFACPruner(net, names, F.cross_entropy, batches, ngrads=4, block=None, damp=1e-3, recomputations=1)
    pruner.step(0.5)
    torch.testing.assert_close(net[5].weight.detach().flatten(), expected)
    assert torch.equal(pruner.removed["5.weight"].flatten(), removed)


def test_recomputation_works_on_what_is_left():
    """Two steps by hand: new gradients, of the remaining weights alone, density by equal factors."""
    net, (x, y) = problem(torch.float64)
    net.eval()
    w = net[5].weight.detach().flatten().clone()
    kept = torch.arange(72)
    with torch.no_grad():
        for size in (round(72 * math.sqrt(0.5)), 36):
            net[5].weight.copy_(w.view(3, 24))
            with torch.enable_grad():
                g = torch.autograd.grad(F.cross_entropy(net(x), y), net[5].weight)[0].flatten()[kept]
            left, gone = obs_prune(w[kept], StaticInverseFisher(torch.stack([g, g]), damp=1e-2), len(kept) - size)
            w[kept] = left
            kept = kept[~gone]
    torch.manual_seed(0)
    net, _ = problem(torch.float64)
    net.eval()
    pruner = MFACPruner(net, ["5.weight"], F.cross_entropy, [(x, y)], ngrads=2, block=None, damp=1e-2, recomputations=2)
    pruner.step(0.5)
    torch.testing.assert_close(net[5].weight.detach().flatten(), w)


@pytest.mark.parametrize("way", ["enforce", "sparse"])
def test_training_between_steps_keeps_the_zeros(way):
    net, (x, y) = problem()
    pruner = MFACPruner(net, None, F.cross_entropy, (x, y), ngrads=8, batch=10, recomputations=2, generator=seeded())
    pruner.step(0.5)
    opt = MFAC(net.parameters(), ngrads=4, damp=1e-2, sparse=True) if way == "sparse" else torch.optim.SGD(net.parameters(), 0.1)
    before = net[5].weight.detach().clone()
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
        if way == "enforce":
            pruner.enforce()
    assert not torch.equal(net[5].weight, before)
    assert torch.equal(net[5].weight == 0, pruner.removed["5.weight"])


def test_a_share_that_is_no_whole_number_of_weights_is_reached_for_good():
    net = nn.Linear(3, 1, bias=False)
    pruner = MFACPruner(net, None, F.mse_loss, (torch.randn(8, 3), torch.randn(8, 1)), ngrads=2, batch=4)
    first = pruner.step(0.5)["weight"]
    assert pruner.sparsity in (1 / 3, 2 / 3)
    assert torch.equal(pruner.step(0.5)["weight"], first)


def test_draws_follow_the_generator():
    ends = []
    for seed in (0, 0, 1):
        net, data = problem()
        MFACPruner(net, None, F.cross_entropy, data, ngrads=3, batch=7, recomputations=2, generator=seeded(seed)).step(0.5)
        ends.append(flatten_params(net))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_tied_weights_count_once():
    layer = nn.Linear(4, 4, bias=False)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    pruner = MFACPruner(net, None, F.cross_entropy, (torch.randn(8, 4), torch.randint(4, (8,))), ngrads=2, batch=4)
    assert list(pruner.removed) == ["0.weight"]
    pruner.step(0.5)
    assert int((layer.weight == 0).sum()) == 8


def test_bad_settings():
    net, data = problem()
    for settings in ({"ngrads": 0}, {"batch": 0}, {"recomputations": 0}):
        with pytest.raises(BadSetting, match="at least 1"):
            MFACPruner(net, None, F.cross_entropy, data, **settings)
    with pytest.raises(BadSetting, match=r"'5\.wight'; nearest: 5\.weight"):
        MFACPruner(net, ["5.wight"], F.cross_entropy, data)
    with pytest.raises(BadSetting, match="no parameter"):
        MFACPruner(net, [], F.cross_entropy, data)
    with pytest.raises(BadSetting, match="no linear or convolution"):
        MFACPruner(nn.PReLU(), None, F.cross_entropy, data)
    with pytest.raises(BadSetting, match="below 1"):
        MFACPruner(net, None, F.cross_entropy, data).step(1.0)
    for empty in ([], iter([(data[0], data[1])]), (data[0][:0], data[1][:0])):
        with pytest.raises(BadData, match="no batch"):
            MFACPruner(net, None, F.cross_entropy, empty, ngrads=3).step(0.5)
    wrong = torch.full_like(data[0], math.nan)
    with pytest.raises(BadData, match="not finite"):
        MFACPruner(net, None, F.cross_entropy, (wrong, data[1]), ngrads=3).step(0.5)
