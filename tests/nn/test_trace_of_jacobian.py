from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import GaussianMixture
from sfumato.errors import BadData, BadSetting
from sfumato.nn import divergence, draw_probes, small_unet

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "stsl.npz").items()}
SCORE = GaussianMixture(V["mu"], V["std"], weights=V["weights"]).noised(V["abar"]).score
EXACT = 6**0.5 * torch.eye(6, dtype=torch.float64)[:, None].expand(6, 10, 6)  # the mean of zᵀJz over these is the trace


@pytest.mark.parametrize("method", ["jvp", "vjp", "fd"])
def test_trace_and_its_gradient_of_the_reference(method):
    atol = 1e-5 if method == "fd" else 1e-8
    z = V["z"].clone().requires_grad_()
    trace = divergence(SCORE, z, method=method, noise=EXACT)
    assert torch.allclose(trace, V["hessian_trace"], rtol=atol, atol=atol)
    (gradient,) = torch.autograd.grad(trace.sum(), z)
    assert torch.allclose(gradient, V["grad_hessian_trace"], rtol=100 * atol, atol=100 * atol)


def test_one_finite_difference_of_the_reference():
    for h in (V["fd_h"].item(), V["fd_h"].expand(10)):
        trace = divergence(SCORE, V["z"], method="fd", h=h, noise=V["probe"][None])
        assert torch.allclose(trace, V["trace_fd_one_probe"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probes_are_unbiased(probe):
    g = torch.Generator().manual_seed(0)
    draws = divergence(SCORE, V["z"].repeat(2000, 1), probe=probe, generator=g).view(2000, 10)
    error = draws.mean(0) - V["hessian_trace"]
    assert (error.abs() <= 4 * draws.std(0) / 2000**0.5 + 1e-12).all()
    noise = draw_probes((3, 10, 6), probe, like=V["z"])
    singly = torch.stack([divergence(SCORE, V["z"], noise=z[None]) for z in noise])
    assert torch.allclose(divergence(SCORE, V["z"], noise=noise), singly.mean(0))
    assert divergence(SCORE, V["z"], probes=3, probe=probe).shape == (10,)


def test_a_gaussian_has_a_constant_trace():
    """N(m, c I), noised: -n / (abar c + 1 - abar), with no error and no gradient."""
    score = GaussianMixture(V["mu"][:1], 0.5).noised(0.6).score
    z = V["z"].clone().requires_grad_()
    trace = divergence(score, z)
    assert torch.allclose(trace, torch.tensor(-6 / (0.6 * 0.25 + 0.4), dtype=torch.float64), rtol=1e-12)
    assert torch.autograd.grad(trace.sum(), z)[0].abs().max() < 1e-12


def test_a_network_in_three_ways():
    torch.manual_seed(0)
    net = small_unet(8, 1, width=8, mults=(1, 2)).double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    noise = draw_probes((3, 2, 1, 8, 8), like=x)
    with torch.no_grad():
        jvp, vjp, fd = (divergence(lambda x: net(x, 5).sample, x, method=m, noise=noise) for m in ("jvp", "vjp", "fd"))
    assert jvp.shape == (2,)
    assert torch.allclose(jvp, vjp, rtol=1e-8)
    assert torch.allclose(jvp, fd, rtol=1e-3, atol=1e-4)


def test_draws_and_bad_settings():
    x = torch.zeros(2, 3)
    a, b = (draw_probes((4, 2, 3), like=x, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.abs().unique().tolist() == [1]
    with pytest.raises(BadSetting, match="hutch"):
        divergence(SCORE, V["z"], method="hutch")
    with pytest.raises(BadSetting, match="uniform"):
        divergence(SCORE, V["z"], probe="uniform")
    with pytest.raises(BadSetting, match="0 probes"):
        divergence(SCORE, V["z"], probes=0)
    with pytest.raises(BadData, match="do not fit"):
        divergence(SCORE, V["z"], noise=V["probe"])
