import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.data import single_index
from sfumato.engine.lab import Lab
from sfumato.errors import BadData, BadSetting
from sfumato.nn import linearise
from sfumato.papers.dynamics import lazy_to_rich as page
from sfumato.probes import ntk

STORED = {
    k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "lazy-to-rich.npz").items()
}
F64 = torch.float64


def committee(alpha=1.7, eps=0.6, dim=6, width=9):
    return page.Committee(dim, width, alpha=alpha, eps=eps, dtype=F64, generator=torch.Generator().manual_seed(0))


def stored_net():
    net = page.Committee(8, 12, alpha=float(STORED["alpha"]), eps=float(STORED["eps"]), dtype=F64)
    with torch.no_grad():
        net.weight.copy_(STORED["W0"])
    return net


def test_reference_vectors():
    net, x, y, beta = stored_net(), STORED["X"].T, STORED["y"], STORED["beta"]
    alpha, eps = STORED["alpha"], STORED["eps"]
    torch.testing.assert_close((x @ beta).square() / 2, y, rtol=1e-9, atol=0)
    torch.testing.assert_close(net(x).detach(), STORED["f0"], rtol=1e-9, atol=0)
    m = net.moments()
    torch.testing.assert_close(page.tangent_kernel(m, x, x, float(eps)), STORED["ntk0"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(page.loss_decomposition(m, beta, alpha, eps)), STORED["decomp0"], rtol=1e-9, atol=0)
    losses = []
    for _ in STORED["train_loss"]:
        m, loss = page.descend(m, lambda now: page.training_pull(now, x, y, alpha, eps), STORED["eta"] / 12)
        losses.append(loss)
    torch.testing.assert_close(torch.stack(losses), STORED["train_loss"], rtol=1e-9, atol=0)
    final = STORED["W_final"]
    torch.testing.assert_close(m.mean, final.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(m.second, final.T @ final / 12, rtol=1e-9, atol=1e-12)
    terms = torch.stack(page.loss_decomposition(m, beta, alpha, eps))
    torch.testing.assert_close(terms, STORED["decomp_final"], rtol=1e-9, atol=0)
    torch.testing.assert_close(page.tangent_kernel(m, x, x, float(eps)), STORED["ntk_final"], rtol=1e-9, atol=1e-12)


def test_descent_of_moments_is_descent_of_weights():
    net, x, y = stored_net(), STORED["X"].T, STORED["y"]
    sgd = torch.optim.SGD(net.parameters(), float(STORED["eta"]))
    for _ in range(len(STORED["train_loss"])):
        sgd.zero_grad()
        (net(x) - y).square().mean().backward()
        sgd.step()
    torch.testing.assert_close(net.weight.detach(), STORED["W_final"], rtol=1e-9, atol=1e-12)


def test_outputs_and_kernel_by_moments():
    net = committee()
    x = torch.randn(7, 6, dtype=F64, generator=torch.Generator().manual_seed(1)) / 6**0.5
    alpha, eps = (torch.tensor(v, dtype=F64) for v in (net.alpha, net.eps))
    torch.testing.assert_close(page.outputs(net.moments(), x, alpha, eps), net(x).detach(), rtol=1e-12, atol=1e-14)
    kernel = page.tangent_kernel(net.moments(), x, x[:3], net.eps) * net.alpha**2 / 9
    torch.testing.assert_close(kernel, ntk(net, x, x[:3]), rtol=1e-12, atol=1e-14)


def test_quadratic_functions_have_eigenvalue_two_eps_squared_over_d_squared():
    d, eps, count = 4, 0.5, 400_000
    x = torch.randn(count, d, dtype=F64, generator=torch.Generator().manual_seed(0)) / d**0.5
    infinite = page.Moments(torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64))  # of infinitely many units
    kernel = page.tangent_kernel(infinite, x[:5], x, eps)
    mixed = x[:, 0] * x[:, 1]
    torch.testing.assert_close(kernel @ mixed / count, 2 * eps**2 / d**2 * mixed[:5], rtol=0.15, atol=2e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_test_loss_is_the_decomposition(alpha):
    net = committee(alpha)
    x, y, beta = single_index(6, 200_000, dtype=F64, generator=torch.Generator().manual_seed(2))
    terms = page.loss_decomposition(net.moments(), beta, alpha, net.eps)
    assert min(terms) > 0
    assert float(terms.total()) == pytest.approx(float((net(x) - y).detach().square().mean()), rel=0.02)


def test_population_descent_follows_the_gradient_and_rests_at_the_minimum():
    net = committee()
    beta = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(3))
    alpha, eps = (torch.tensor(v, dtype=F64) for v in (net.alpha, net.eps))
    w = net.weight
    loss = page.loss_decomposition(page.Moments(w.mean(0), w.T @ w / 9), beta, alpha, eps).total()
    (slope,) = torch.autograd.grad(loss, w)
    pull = page.population_pull(net.moments(), beta, alpha, eps)
    torch.testing.assert_close((pull.shift + w.detach() @ pull.turn) / 9, slope)
    assert pull.loss == loss
    moved = w.detach() - 0.9 * slope
    m, _ = page.descend(net.moments(), lambda now: page.population_pull(now, beta, alpha, eps), torch.tensor(0.1, dtype=F64))
    torch.testing.assert_close(m.second, moved.T @ moved / 9)
    best = page.Moments(torch.zeros(6, dtype=F64), torch.outer(beta, beta) / (alpha * eps))
    rest = page.population_pull(best, beta, alpha, eps)
    assert max(t.abs().max() for t in rest) < 1e-12
    samples = single_index(6, 100_000, beta=beta, dtype=F64, generator=torch.Generator().manual_seed(4))
    finite = page.training_pull(net.moments(), samples.x, samples.y, alpha, eps)
    assert (finite.turn - pull.turn).norm() < 0.03 * pull.turn.norm()
    assert (finite.shift - pull.shift).norm() < 0.1 * pull.shift.norm()


def test_linearised_outputs_are_those_of_the_linearised_network():
    net = committee()
    x, y, beta = single_index(6, 15, dtype=F64, generator=torch.Generator().manual_seed(5))
    z = single_index(6, 4, beta=beta, dtype=F64, generator=torch.Generator().manual_seed(6)).x
    m, line, rate = net.moments(), linearise(net), 0.5
    sgd = torch.optim.SGD([p for p in line.parameters() if p.requires_grad], rate * 9 / net.alpha**2)
    start = [net(t).detach() for t in (x, z)]
    for _ in range(25):
        sgd.zero_grad()
        (line(x) - y).square().mean().backward()
        sgd.step()
    kernels = page.tangent_kernel(m, x, x, net.eps), page.tangent_kernel(m, z, x, net.eps)
    found = page.linearised_outputs(*kernels, *start, y, rate=rate, steps=25)
    torch.testing.assert_close(found, line(z).detach(), rtol=1e-9, atol=1e-12)


def test_grok_time():
    assert page.grok_time([1, 0.4, 0.4], [2, 2, 2], 0.5) == (1, math.inf, math.inf)
    assert page.grok_time([1, 0.4, 0.4], [2, 2, 0.1], 0.5, every=10) == (10, 20, 10)
    with pytest.raises(BadData, match="2 and 3"):
        page.grok_time([1, 1], [1, 1, 1], 0.5)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"eps": -0.1}])
def test_refusals(wrong):
    with pytest.raises(BadSetting, match="must be positive"):
        page.Committee(3, 4, **wrong)


def test_a_sweep_trains_each_setting_as_if_alone():
    both = page.sweep(Lab(0), (0.25, 1.0), (0.25, 0.5), 60)
    alone = page.sweep(Lab(0), (1.0,), (0.5,), 60)
    torch.testing.assert_close(both.train_loss[1], alone.train_loss[0])
    torch.testing.assert_close(both.at(1, 60), alone.at(0, 60))
    assert sorted(alone.kept) == [0, 10, 20, 30, 40, 50, 60]


def test_claims_in_small():
    rich = page.sweep(Lab(0), (1 / 16, 1 / 4), (0.25, 0.25), 800)
    first, second = (page.arm_figures(rich, arm) for arm in range(2))
    assert first["steps to fit"] < first["steps to generalise"] < 500
    assert first["delay"] < second["delay"]
    assert first["kernel movement"] > second["kernel movement"]
    assert first["test loss"] < 0.05 < 0.3 < page.controls(rich, 0)["kernel regression"]["test loss"]
    assert first["weight norm, times the first"] > 1
    assert page.mechanism(Lab(0, budget=0.05))["test loss and alignment"]["rank correlation"] < -0.9
    aligned = page.alignment(Lab(0, budget=0.3))
    assert all(condition.fn(aligned) for condition in page.alignment.conditions)


def test_claims_are_judged_on_the_order():
    def arms(delays):
        rows = zip(page.LAZY, delays, (4.0, 3.0, 2.0, 1.0), (0.001, 0.002, 0.01, 0.1))
        found = {
            name: {
                "delay": delay, "log10 of the delay": math.log10(delay), "kernel movement": move, "test loss": loss,
                "log10 of the test loss": math.log10(loss), "weight norm, times the first": 2.0,
            }
            for name, delay, move, loss in rows
        }  # fmt: skip
        return found | {c: {"log10 of the test loss": -0.1} for c in ("kernel regression", "linearised network")}

    good = [arms((200 + i, 600, 3000, 15_000)) for i in range(5)]
    assert judge(page.laziness, good).verdict is Verdict.REPRODUCED
    swapped = [arms((200 + i, 3000, 600, 15_000)) for i in range(5)]
    assert judge(page.laziness, swapped).verdict is Verdict.NOT_REPRODUCED
