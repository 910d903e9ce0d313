import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.optim import SlidingInverseFisher, StaticInverseFisher, inverse_fisher

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "m-fac.npz")


def vector(name):
    return torch.from_numpy(VECTORS[name])


G, X, DAMP = vector("G"), vector("x"), float(VECTORS["damp"])


def close(a, b, rtol=1e-8):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_grads(m, d, dtype=torch.float64, seed=0):
    return torch.randn(m, d, dtype=dtype, generator=seeded(seed))


def fisher(grads, damp, divisor=None, block=None):
    """The matrix itself."""
    d = grads.shape[1]
    full = damp * torch.eye(d, dtype=grads.dtype) + grads.T @ grads / (divisor or len(grads))
    if block is not None:
        place = torch.arange(d) // block
        full = full * (place[:, None] == place)
    return full


def paper_recursion(grads, damp):
    """F⁻¹ by m Sherman-Morrison updates."""
    inverse = torch.eye(grads.shape[1], dtype=grads.dtype) / damp
    for g in grads:
        v = inverse @ g
        inverse = inverse - torch.outer(v, v) / (len(grads) + g @ v)
    return inverse


def test_static_equals_the_official_class():
    whole = StaticInverseFisher(G, damp=DAMP)
    close(whole.mul(X), vector("static_mul"))
    close(whole.diag(), vector("static_diag"))
    blocks = StaticInverseFisher(G, damp=DAMP, block=int(VECTORS["blocksize"]))
    close(blocks.mul(X), vector("block_mul"))
    close(blocks.diag(), vector("block_diag"))


@pytest.mark.parametrize("solver", ["woodbury", "sequential"])
def test_sliding_equals_the_official_class(solver):
    grads = vector("dyn_grads")
    window = SlidingInverseFisher(int(VECTORS["m"]), 40, damp=DAMP, solver=solver, dtype=torch.float64)
    for g, expected in zip(grads, vector("dyn_update_mul"), strict=True):
        close(window.update_mul(g), expected)
    close(window.mul(X), vector("dyn_mul_x_final"))


@pytest.mark.parametrize("block", [None, 1, 3, 5, 7, 12, 30, 31, 100])
@pytest.mark.parametrize("at_once", [7, 2**22])
def test_static_equals_the_dense_inverse(block, at_once, monkeypatch):
    monkeypatch.setattr(inverse_fisher, "_AT_ONCE", at_once)
    grads = random_grads(6, 31)
    ours, dense = StaticInverseFisher(grads, damp=0.01, block=block), torch.linalg.inv(fisher(grads, 0.01, block=block))
    x = random_grads(31, 4, seed=1)
    close(ours.mul(x), dense @ x)
    close(ours.mul(x[:, 0]), dense @ x[:, 0])
    close(ours.diag(), dense.diag())
    i, j = torch.meshgrid(torch.arange(31), torch.arange(31), indexing="ij")
    close(ours.entry(i, j), dense)
    assert ours.entry(3, 3) == ours.diag()[3]
    assert ours.diag().min() > 0
    assert ours.diag().max() <= 100 * (1 + 1e-12)
    stored = StaticInverseFisher(grads, damp=0.01, block=block, storage="cpu")
    close(stored.mul(x), dense @ x)


@pytest.mark.parametrize("m", [1, 5, 40])
def test_more_or_fewer_gradients_than_weights(m):
    grads, x = random_grads(m, 12), random_grads(12, 1, seed=1)[:, 0]
    ours = StaticInverseFisher(grads, damp=0.1)
    close(ours.mul(x), paper_recursion(grads, 0.1) @ x)
    close(ours.mul(fisher(grads, 0.1) @ x), x)


def test_order_and_duplicates():
    grads, x = random_grads(9, 30), random_grads(30, 1, seed=1)[:, 0]
    close(StaticInverseFisher(grads.flip(0)).mul(x), StaticInverseFisher(grads).mul(x))
    g = grads[0]
    same = StaticInverseFisher(g.expand(9, 30), damp=0.1).mul(x)
    close(same, (x - g * (g @ x) / (0.1 + g @ g)) / 0.1)


@pytest.mark.parametrize("solver", ["woodbury", "sequential"])
def test_sliding_equals_the_dense_inverse_at_every_step(solver):
    m, d = 4, 11
    grads, x = random_grads(10, d), random_grads(d, 3, seed=1)
    window = SlidingInverseFisher(m, d, damp=0.05, solver=solver, dtype=torch.float64)
    close(window.mul(x), x / 0.05)
    for t, g in enumerate(grads):
        update = window.update_mul(g)
        dense = torch.linalg.inv(fisher(grads[max(0, t + 1 - m) : t + 1], 0.05, divisor=m))
        close(update, dense @ g)
        close(window.mul(x), dense @ x)
        close(window.mul(g), update)
    fresh = SlidingInverseFisher(m, d, damp=0.05, dtype=torch.float64)
    for g in grads[-m:]:
        fresh.update(g)
    close(fresh.mul(x), window.mul(x))  # what came before has no influence


def test_limits():
    g = random_grads(1, 20)[0]
    window = SlidingInverseFisher(7, 20, damp=0.01, dtype=torch.float64)
    close(window.update_mul(g), g / (0.01 + g @ g / 7))
    strong = SlidingInverseFisher(7, 20, damp=1e9, dtype=torch.float64)
    close(1e9 * strong.update_mul(g), g)


def test_going_on_and_filling_by_hand():
    grads, x = random_grads(9, 20), random_grads(20, 1, seed=1)[:, 0]
    window = SlidingInverseFisher(4, 20, damp=0.1, dtype=torch.float64)
    for g in grads[:6]:
        window.update(g)
    again = SlidingInverseFisher.over(window.grads.clone(), window.gram.clone(), window.count, damp=0.1)
    filled = SlidingInverseFisher(4, 20, damp=0.1, dtype=torch.float64)
    filled.grads.copy_(window.grads)
    filled.refresh(6)
    for g in grads[6:]:
        assert torch.equal(window.update_mul(g), again.update_mul(g))
        filled.update(g)
    close(filled.mul(x), window.mul(x))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("alike", [None, 0.0, 1e-6])
def test_float32_gradients_of_any_size(scale, alike):
    """Rounding of the Gram matrix may be far above the damping, and gradients may be copies of one another."""
    grads = scale * random_grads(40, 3000, torch.float32)
    if alike is not None:
        grads[20:] = grads[:20] + scale * alike * random_grads(20, 3000, torch.float32, seed=1)
    window = SlidingInverseFisher(32, 3000, damp=1e-5)
    for g in grads:
        update = window.update_mul(g)
    rows, weight = grads[8:].double(), 1.0
    if alike is not None and scale > 1e-3:  # what float32 cannot tell apart counts as the same
        rows, weight = torch.cat([rows[12:20], math.sqrt(0.5) * (rows[:12] + rows[20:])]), math.sqrt(0.5)
    latest = torch.zeros(len(rows), dtype=torch.float64)
    latest[-1] = 32 * weight
    exact = rows.T @ torch.linalg.solve(32e-5 * torch.eye(len(rows)) + rows @ rows.T, latest)
    assert (update - exact).norm() < 1e-4 * exact.norm()
    diag = StaticInverseFisher(grads[8:], damp=1e-5).diag()
    assert diag.dtype is torch.float32
    close(diag.double(), StaticInverseFisher(grads[8:].double(), damp=1e-5).diag(), rtol=1e-6)


def test_a_gram_matrix_with_negative_eigenvalues_is_mended():
    gram = torch.diag(torch.tensor([1.0, -1e-3], dtype=torch.float64))
    factor = inverse_fisher._factor(gram, 1e-6)
    close(factor @ factor.T, torch.diag(torch.tensor([1 + 1e-6, 1e-6], dtype=torch.float64)))


@pytest.mark.parametrize("at_once", [50, 2**22])
def test_bfloat16_storage_sums_in_float32(at_once, monkeypatch):
    monkeypatch.setattr(inverse_fisher, "_AT_ONCE", at_once)
    grads = random_grads(12, 500, torch.float32)
    window = SlidingInverseFisher(8, 500, damp=0.01, dtype=torch.bfloat16)
    for g in grads:
        update = window.update_mul(g)
    stored = grads.bfloat16().double()
    dense = torch.linalg.inv(fisher(stored[4:], 0.01))
    assert update.dtype is torch.float32
    close(update.double(), dense @ stored[-1], rtol=1e-4)
    x = random_grads(500, 2, torch.float32, seed=1)
    close(window.mul(x).double(), dense @ x.double(), rtol=1e-4)
    assert StaticInverseFisher(grads.bfloat16(), damp=0.01).mul(x).dtype is torch.float32


def test_autocast_changes_nothing():
    grads, x = random_grads(8, 60, torch.float32), random_grads(60, 1, torch.float32, seed=1)[:, 0]

    def products():
        window = SlidingInverseFisher(8, 60, damp=1e-3)
        for g in grads:
            update = window.update_mul(g)
        return update, window.mul(x), StaticInverseFisher(grads, damp=1e-3).mul(x)

    plain = products()
    with torch.autocast("cpu", torch.bfloat16):
        cast = products()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_a_window_larger_than_memory_says_its_bytes():
    with pytest.raises(BadSetting, match=r"1,024 gradients of 100,000,000,000 weights takes 409,600,000,000,000 bytes"):
        SlidingInverseFisher(1024, 10**11, damp=1e-5)
    with pytest.raises(BadSetting, match="204,800,000,000,000 bytes as bfloat16"):
        SlidingInverseFisher(1024, 10**11, damp=1e-5, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "bad",
    [{"damp": 0}, {"damp": math.nan}, {"solver": "lu"}, {"dtype": torch.float16}, {"m": 0}, {"d": 0}],
)  # fmt: skip
def test_bad_windows(bad):
    with pytest.raises(BadSetting, match=next(iter(bad.values())).__str__().removeprefix("torch.")):
        SlidingInverseFisher(**{"m": 2, "d": 3, "damp": 0.1, **bad})


def test_bad_static_input():
    grads = random_grads(2, 3)
    for settings in ({"damp": -1.0}, {"block": 0}, {"storage": "disk"}):
        with pytest.raises(BadSetting, match=next(iter(settings))):
            StaticInverseFisher(grads, **settings)
    for wrong in (grads[0], grads[:0], grads.to(torch.complex64), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(BadData, match="real matrix"):
            StaticInverseFisher(wrong)
    for block in (None, 1):
        with pytest.raises(BadData, match="not finite"):
            StaticInverseFisher(torch.full((2, 3), math.nan), block=block)
    ours = StaticInverseFisher(grads)
    with pytest.raises(BadData, match=r"takes \[3\] or \[3, k\]"):
        ours.mul(torch.ones(4))
    for index in ((3, 0), (0, -1)):
        with pytest.raises(BadData, match="from 0 to 2"):
            ours.entry(*index)


def test_a_refused_gradient_leaves_the_window_as_it_was():
    window = SlidingInverseFisher(2, 3, damp=0.1)
    window.update(torch.ones(3))
    before = window.grads.clone(), window.gram.clone(), window.count
    for wrong in (torch.tensor([1, math.inf, 0]), torch.tensor([math.nan, 0, 0]), torch.full((3,), 1e30)):
        with pytest.raises(BadData, match="not finite"):
            window.update(wrong)
    with pytest.raises(BadData, match="gradients of 3 weights"):
        window.update(torch.ones(4))
    assert torch.equal(window.grads, before[0])
    assert torch.equal(window.gram, before[1])
    assert window.count == before[2]
