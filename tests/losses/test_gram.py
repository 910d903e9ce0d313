import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import rbf_kernel

from sfumato.errors import BadData, BadSetting
from sfumato.losses import gaussian_gram, median_bandwidth, squared_distances

V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "cs-ib.npz").items()}
G = torch.Generator().manual_seed(0)
A, B = torch.randn(7, 3, generator=G, dtype=torch.float64), torch.randn(5, 3, generator=G, dtype=torch.float64)


def test_kernel_is_sklearns():
    wanted = torch.from_numpy(rbf_kernel(A, B, gamma=1 / (2 * 0.7**2)))
    assert torch.allclose(gaussian_gram(A, B, sigma=0.7), wanted, rtol=0, atol=1e-14)
    assert torch.allclose(gaussian_gram(A, B, sigma=torch.tensor(0.7), log=True), wanted.log(), rtol=1e-6)
    assert torch.equal(gaussian_gram(A), gaussian_gram(A, A))
    assert torch.allclose(gaussian_gram(A[:3], B), gaussian_gram(A, B)[:3], atol=1e-14)


def test_cauchy_schwarz_divergence_and_mmd_of_the_reference():
    pp, qq, pq = (gaussian_gram(V[a], V[b], sigma=V["sigma"]).mean() for a, b in ("pp", "qq", "pq"))
    assert torch.allclose(pp.log() + qq.log() - 2 * pq.log(), V["cs_div_pq_nat"], rtol=0, atol=1e-10)
    assert torch.allclose(pp + qq - 2 * pq, V["mmd2_pq"], rtol=0, atol=1e-10)


def test_numbers_and_pictures_are_rows():
    y = torch.tensor([0.0, 1.0, 3.0])
    assert squared_distances(y).tolist() == [[0, 1, 9], [1, 0, 4], [9, 4, 0]]
    x = torch.randn(4, 2, 3, 3)
    assert torch.allclose(squared_distances(x, x[:2]), torch.cdist(x.flatten(1), x[:2].flatten(1)) ** 2, atol=1e-4)
    with pytest.raises(BadData, match="3 and of 1"):
        squared_distances(A, A[:, :1])
    with pytest.raises(BadSetting, match="sigma=0"):
        gaussian_gram(A, sigma=0)


def test_a_common_offset_and_low_precision_cost_nothing():
    far = A.float() + 1000
    assert torch.allclose(squared_distances(far), squared_distances(A).float(), atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(gaussian_gram(A.float(), B.float()), gaussian_gram(A, B).float(), atol=1e-6)


def test_median_of_distances():
    assert median_bandwidth(A).item() == pytest.approx(np.sort(pdist(A))[10])  # 21 distances
    many = torch.randn(5000, 2, generator=torch.Generator().manual_seed(1))
    assert median_bandwidth(many).item() == pytest.approx(2 * math.log(2) ** 0.5, rel=0.03)  # of |N(0, 2 I)| in the plane
    with pytest.raises(BadData, match="two rows"):
        median_bandwidth(A[:1])


def test_gradient():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: gaussian_gram(a, b, sigma=0.8), (a, b))
    assert torch.autograd.gradcheck(lambda a: gaussian_gram(a, sigma=0.8), a)
    assert torch.autograd.gradgradcheck(lambda a, b: gaussian_gram(a, b, log=True), (a, b))
