from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.probes import token_heterogeneity

VECTORS = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "mto.npz").items()}


def test_reference_vectors():
    for z, expected in zip(VECTORS["layer_tokens"], VECTORS["heterogeneity"], strict=True):
        assert token_heterogeneity(z, VECTORS["mask"]).mean().item() == pytest.approx(expected.item(), abs=1e-9)


def test_limits():
    hidden = torch.tensor([[True, False, False, False]])
    assert token_heterogeneity(torch.eye(4)[None], hidden).item() == pytest.approx(1)
    alike = torch.eye(4)
    alike[1] = alike[0]
    assert token_heterogeneity(alike[None], hidden, tau=1e-3).item() == pytest.approx(0, abs=1e-6)
    for mask in ([False] * 4, [True] * 4, [True, True, True, False]):  # nobody asks, nobody answers, one answers
        z = torch.randn(1, 4, 5, requires_grad=True)
        h = token_heterogeneity(z, torch.tensor([mask]))
        assert h.item() == 1
        h.sum().backward()
        assert z.grad.isfinite().all()


def test_lengths_order_and_other_hidden_tokens_do_not_matter():
    g = torch.Generator().manual_seed(0)
    z, mask = torch.randn(2, 9, 6, generator=g, dtype=torch.float64), torch.arange(9).expand(2, -1) % 3 == 0
    h = token_heterogeneity(z, mask)
    assert ((h > 0) & (h < 1)).all()
    assert torch.allclose(token_heterogeneity(z * torch.rand(2, 9, 1, generator=g).add(0.1), mask), h)
    order = torch.randperm(9, generator=g)
    assert torch.allclose(token_heterogeneity(z[:, order], mask[:, order]), h)
    one, rest = z[:, :1], z[:, 3:4]  # two hidden ones: each counts by itself
    both = token_heterogeneity(torch.cat((one, rest, z[:, 1:3]), 1), torch.tensor([[True, True, False, False]] * 2))
    apart = [token_heterogeneity(torch.cat((t, z[:, 1:3]), 1), torch.tensor([[True, False, False]] * 2)) for t in (one, rest)]
    assert torch.allclose(both, sum(apart) / 2)


def test_gradients():
    z = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, True, False, False, False]] * 2)
    assert torch.autograd.gradcheck(lambda z: token_heterogeneity(z, mask, tau=0.5), z)
