from pathlib import Path

import numpy as np
import torch

from sfumato.nn import psd_power

PATH = Path(__file__).parents[1] / "vectors" / "deep-optimal-transport.npz"
V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(PATH).items()}


def _covariance(*shape, rank=None):
    a = torch.randn(*shape, rank or shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a @ a.mT


def test_powers_add_up():
    c = _covariance(3, 5)
    assert torch.allclose(psd_power(c) @ psd_power(c), c, atol=1e-12)
    assert torch.allclose(psd_power(c, power=-1.0), torch.linalg.inv(c), rtol=1e-8)
    assert torch.allclose(psd_power(c, power=0.3) @ psd_power(c, power=0.7), c, atol=1e-12)
    assert psd_power(c.float()).dtype == torch.float32


def test_singular_matrices_have_pseudo_inverses():
    c = _covariance(6, rank=2)
    assert torch.allclose(psd_power(c, power=-1.0), torch.linalg.pinv(c, hermitian=True), rtol=1e-8, atol=1e-12)
    assert torch.equal(psd_power(torch.zeros(2, 2), power=-0.5), torch.zeros(2, 2))
    small = torch.diag(torch.tensor([4.0, 1e-6]))
    assert torch.allclose(psd_power(small, power=-0.5, eps=1e-5), torch.diag(torch.tensor([0.5, 0.0])))


def test_the_transport_map_of_the_reference_comes_out():
    source, target = V["cov_source"], V["cov_target"]
    root, back = psd_power(source), psd_power(source, power=-0.5)
    ours = back @ psd_power(root @ target @ root) @ back
    assert torch.allclose(ours, V["T0"], rtol=0, atol=1e-6)  # the reference itself meets its equation to 2e-7
    assert torch.allclose(ours @ source @ ours, target, rtol=0, atol=1e-12)


def test_gradient():
    c = _covariance(4) + torch.diag(torch.arange(4.0, dtype=torch.float64))
    c.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: psd_power((c + c.mT) / 2, power=-0.5), c)
