from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.probes import kernel_alignment, kernel_regression, kernel_similarity, kernel_velocity

STORED = np.load(Path(__file__).parents[1] / "vectors" / "lazy-to-rich.npz")


def kernel(n=9, rank=5):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(n, rank, dtype=torch.float64, generator=generator)
    return half @ half.T, torch.randn(n, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("centre", "name"), [("both", "twosided"), ("rows", "onesided"), ("none", "uncentred")])
def test_reference_vectors(centre, name):
    k, y = torch.from_numpy(STORED["ntk0"]), torch.from_numpy(STORED["y"])
    found = kernel_alignment(k, y, centre=centre)
    torch.testing.assert_close(found, torch.tensor(float(STORED[f"cka0_{name}"]), dtype=torch.float64), rtol=1e-9, atol=0)


def test_alignment_of_a_kernel():
    k, y = kernel()
    c = y - y.mean()
    assert float(kernel_alignment(torch.outer(c, c), y)) == pytest.approx(1)
    assert float(kernel_alignment(-torch.outer(c, c), y)) == pytest.approx(-1)
    found = kernel_alignment(k, y)
    assert 0 < found < 1
    torch.testing.assert_close(kernel_alignment(7 * k + 3, 5 * y - 2), found)  # scales and offsets do not count
    torch.testing.assert_close(kernel_alignment(k, y[:, None]), found)
    one_hot = torch.eye(3, dtype=torch.float64)[torch.arange(9) % 3]
    h = torch.eye(9, dtype=torch.float64) - 1 / 9
    a, b = h @ k @ h, h @ one_hot @ one_hot.T @ h
    torch.testing.assert_close(kernel_alignment(k, one_hot), (a * b).sum() / (a.norm() * b.norm()))


def test_velocity():
    k, _ = kernel()
    assert kernel_velocity(k, k) == 0
    torch.testing.assert_close(kernel_velocity(1.5 * k, k), torch.tensor(0.5, dtype=torch.float64))


def test_regression_is_linear_regression_on_features():
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (10, 6))
    y = torch.randn(10, 2, dtype=torch.float64, generator=generator)
    ridge = x.T @ x + 0.3 * torch.eye(4, dtype=torch.float64)
    expected = z @ torch.linalg.solve(ridge, x.T @ y)
    torch.testing.assert_close(kernel_regression(x @ x.T, y, z @ x.T, ridge=0.3), expected)
    least = z @ torch.linalg.lstsq(x, y).solution  # the kernel has rank 4 of 10
    torch.testing.assert_close(kernel_regression(x @ x.T, y, z @ x.T), least)
    torch.testing.assert_close(kernel_regression(x @ x.T, y[:, 0], z @ x.T), least[:, 0])
    full, y = kernel(6, 8)[0], torch.randn(6, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(kernel_regression(full, y, full), y)  # interpolates


def test_refusals():
    k, y = kernel()
    with pytest.raises(BadSetting, match="centre='left'"):
        kernel_alignment(k, y, centre="left")
    with pytest.raises(BadData, match="n labels"):
        kernel_alignment(k, y[:3])
    with pytest.raises(BadSetting, match="at least 0"):
        kernel_regression(k, y, k, ridge=-1.0)
    with pytest.raises(BadData, match="for 9 labels"):
        kernel_regression(k, y, k[:, :3])


def test_similarity_is_a_cosine_of_centred_kernels():
    k, y = kernel()
    other, _ = kernel(rank=3)
    assert float(kernel_similarity(3 * k + 7, k)) == pytest.approx(1)
    assert float(kernel_similarity(k, other)) == pytest.approx(float(kernel_similarity(other, k)))
    centre = torch.eye(9, dtype=torch.float64) - 1 / 9
    a, b = centre @ k @ centre, centre @ other @ centre
    torch.testing.assert_close(kernel_similarity(k, other), (a * b).sum() / (a.norm() * b.norm()))
    torch.testing.assert_close(kernel_similarity(k, torch.outer(y, y)), kernel_alignment(k, y))
    with pytest.raises(BadData, match="both"):
        kernel_similarity(k, other[:3, :3])
