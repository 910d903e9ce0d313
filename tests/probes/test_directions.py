from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.probes import StreamingPCA, align_signs, attribute_direction, jacobian_directions, pca_directions, project_out, svds
from sfumato.probes.operators import InputJacobianOperator

PATH = Path(__file__).parents[1] / "vectors" / "h-space-directions.npz"
VECTORS = {k: torch.from_numpy(v) for k, v in np.load(PATH).items()}
X = VECTORS["X"]


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Principal components


def test_pca_as_the_paper_computes_it():
    found = pca_directions(X, 5)
    assert torch.allclose(found.vectors, VECTORS["pca_Ut"], rtol=0, atol=1e-8)
    assert torch.allclose(found.stds, VECTORS["pca_scaled"], rtol=0, atol=1e-8)
    assert torch.allclose(found.stds * 39**0.5, VECTORS["pca_svals"], rtol=0, atol=1e-8)
    assert torch.allclose(found.scaled(), found.stds[:, None] * found.vectors)


def test_pca_as_scikit_learn_and_without_the_null_component():
    from sklearn.decomposition import PCA

    reference = PCA(39).fit(X.numpy())
    found = pca_directions(X.view(40, 3, 4, 5), 39)
    assert found.vectors.shape == (39, 3, 4, 5)
    assert np.allclose(found.stds.numpy(), reference.explained_variance_**0.5, rtol=0, atol=1e-8)
    assert np.allclose(found.mean.flatten().numpy(), reference.mean_)
    inner = (found.vectors.flatten(1).numpy() * reference.components_).sum(1)
    assert np.allclose(abs(inner), 1, atol=1e-8)
    with pytest.raises(BadSetting, match=r"40 samples .* 1 to 39"):
        pca_directions(X, 40)


def test_pca_of_each_step_has_signs_of_the_first():
    hs = X.view(40, 3, 20)
    found = pca_directions(hs, 4, per_step=True)
    assert found.stds.shape == (4, 3)
    assert ((found.vectors * found.vectors[:, :1]).sum(-1) >= 0).all()
    for step in range(3):
        alone = pca_directions(hs[:, step], 4)
        assert torch.allclose(found.stds[:, step], alone.stds)
        assert torch.allclose((found.vectors[:, step] * alone.vectors).sum(-1).abs(), torch.ones(4).double())
    assert (found.vectors[:, 0, 0] > 0).all()
    assert torch.allclose(found.scaled()[2, 1], found.stds[2, 1] * found.vectors[2, 1])


def test_a_stream_gives_what_all_at_once_gives():
    found = pca_directions(X, 5)
    streamed = pca_directions((batch for batch in X.split(7)), 5)  # keeps 100 rows: nothing is lost
    for a, b in zip(found, streamed, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-8)


def test_a_stream_that_forgets_stays_close():
    """Three strong directions under noise, 2,000 samples, memory for 12."""
    g = _seeded()
    axes = torch.linalg.qr(torch.randn(50, 3, generator=g, dtype=torch.float64)).Q
    x = torch.randn(2000, 3, generator=g, dtype=torch.float64) * torch.tensor([6.0, 4.0, 3.0]).double() @ axes.T
    x = x + 5 + 0.5 * torch.randn(2000, 50, generator=g, dtype=torch.float64)
    found, exact = pca_directions(iter(x.split(100)), 3, keep=12), pca_directions(x, 3)
    assert torch.allclose(found.stds, exact.stds, rtol=1e-3)
    assert ((found.vectors * exact.vectors).sum(1) > 0.999).all()
    assert torch.allclose(found.mean, x.mean(0))


def test_streaming_state_is_saved_and_goes_on():
    a, b = (StreamingPCA((60,), keep=10, dtype=torch.float64) for _ in range(2))
    a.update(X[:20])
    b.load_state_dict(a.state_dict())
    for pca in (a, b):
        pca.update(X[20:])
    assert all(torch.equal(p, q) for p, q in zip(a.components(5), b.components(5), strict=True))
    assert a.state_dict()["count"] == 40


def test_bad_samples_are_refused():
    pca = StreamingPCA((3, 2))
    with pytest.raises(BadData, match=r"\[m, 3, 2\]"):
        pca.update(torch.zeros(4, 2, 3))
    with pytest.raises(BadSetting, match="0 samples"):
        pca.components(1)
    with pytest.raises(BadSetting, match="keep=0"):
        StreamingPCA((3,), keep=0)
    with pytest.raises(BadData, match="no samples"):
        pca_directions(iter(()), 1)


def test_signs():
    assert torch.equal(align_signs(VECTORS["V"]), VECTORS["V_aligned"])
    assert torch.equal(align_signs(VECTORS["V"].unflatten(-1, (5, 1))), VECTORS["V_aligned"][..., None])


# The Jacobian


def _same(a, b):
    """Rows equal up to sign."""
    a, b = a.flatten(1), b.flatten(1)
    assert torch.allclose(a * (a * b).sum(1, keepdim=True).sign(), b, rtol=0, atol=1e-8)


def test_jacobian_directions_as_the_paper_finds_them():
    a, h = VECTORS["A_jac"], VECTORS["h"]
    found = jacobian_directions(lambda h: torch.sin(a @ h), h, 3, tol=1e-10, generator=_seeded())
    assert torch.allclose(found.values, VECTORS["jac_svals"], rtol=0, atol=1e-8)
    _same(found.right, VECTORS["jac_right_in_h_space"])
    _same(found.left, VECTORS["jac_left_in_output_space"])
    assert found.residuals.max() < 1e-8


@pytest.mark.parametrize("masked", [False, True])
def test_jacobian_directions_are_the_svd(masked):
    g = _seeded(1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 40), torch.nn.Tanh(), torch.nn.Linear(40, 60)).double()
    mask = (torch.rand(1, 60, generator=g) < 0.3) if masked else None
    h = torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64)
    dense = torch.autograd.functional.jacobian(net, h).view(60, 48)
    if masked:
        dense = dense * mask.view(60, 1)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    found = jacobian_directions(net, h, 4, mask=mask, tol=1e-11, generator=_seeded())
    assert found.right.shape == (4, 1, 3, 4, 4)
    assert found.left.shape == (4, 1, 60)
    assert torch.allclose(found.values, s[:4], rtol=0, atol=1e-8)
    _same(found.right, vt[:4])
    _same(found.left, u[:, :4].T)
    left, values, _ = svds(InputJacobianOperator(lambda x: net(x) if mask is None else net(x) * mask, h), 4, generator=_seeded())
    assert torch.allclose(values, found.values, atol=1e-7)
    assert torch.allclose((left.T * found.left.flatten(1)).sum(1).abs(), torch.ones(4).double(), atol=1e-6)


def test_jacobian_of_low_rank_and_full_rank_ends():
    a = torch.randn(5, 1, generator=_seeded(), dtype=torch.float64) @ torch.randn(1, 6, generator=_seeded(1), dtype=torch.float64)
    found = jacobian_directions(lambda h: a @ h, torch.zeros(6).double(), 3, generator=_seeded())
    assert found.values[0].item() == pytest.approx(torch.linalg.matrix_norm(a, 2).item())
    assert found.values[1:].abs().max() < 1e-10
    assert torch.allclose(found.right @ found.right.T, torch.eye(3).double())
    whole = torch.randn(4, 4, generator=_seeded(2), dtype=torch.float64)
    found = jacobian_directions(lambda h: whole @ h, torch.zeros(4).double(), 4, generator=_seeded())
    assert torch.allclose(found.values, torch.linalg.svdvals(whole))


def test_few_steps_leave_a_residual_that_is_told():
    a = torch.randn(80, 80, generator=_seeded(), dtype=torch.float64)
    short, longer = (jacobian_directions(lambda h: a @ h, a[0], 2, iters=i, generator=_seeded()) for i in (2, 12))
    assert short.residuals.max() > 10 * longer.residuals.max()
    assert (short.values <= longer.values).all()


def test_jacobian_of_a_unet_with_attention():
    """Attention kernels without forward derivatives are replaced by the one that has them."""
    from sfumato.diffusion import h_function
    from sfumato.nn import small_unet

    torch.manual_seed(0)
    net = small_unet(8, 1, width=8, mults=(1, 2), attn_at=(1,)).eval()
    f, h = h_function(net, torch.randn(1, 1, 8, 8), torch.tensor(300))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    with torch.no_grad():
        found = jacobian_directions(f, h, 2, mask=mask, tol=1e-4, generator=_seeded())
    assert found.right.shape == (2, *h.shape)
    assert found.left[..., 4:].abs().max() < 1e-6
    dense = torch.autograd.functional.jacobian(lambda h: f(h)[..., :4], h).view(32, -1)
    assert torch.allclose(found.values, torch.linalg.svdvals(dense)[:2], rtol=1e-3)


def test_bad_questions_are_refused():
    for k, iters in ((0, 5), (4, 5), (1, 0)):
        with pytest.raises(BadSetting, match=f"k={k}, iters={iters}"):
            jacobian_directions(lambda h: h[:3], torch.zeros(5), k, iters=iters)
    with pytest.raises(BadData, match="hides every output"):
        jacobian_directions(lambda h: h, torch.zeros(5), mask=torch.zeros(5))


# Attributes


def test_projection_as_the_paper_has_it_twice():
    n, others = VECTORS["dir"], VECTORS["cond"]
    joint, one_by_one = project_out(n, others), project_out(n, others, joint=False)
    assert torch.allclose(joint, VECTORS["cond_joint"], rtol=0, atol=1e-8)
    assert torch.allclose(one_by_one, VECTORS["cond_sequential"], rtol=0, atol=1e-8)
    assert (others @ joint).abs().max() < 1e-10
    left = (others @ one_by_one).abs()
    assert left[-1] < 1e-10
    assert left[:-1].max() > 1e-3


def test_projection_with_directions_that_say_the_same():
    n, c = VECTORS["dir"].view(4, 5), VECTORS["cond"][0].view(4, 5)
    twice = torch.stack([c, 2 * c, torch.zeros_like(c)])
    assert torch.allclose(project_out(n, twice), project_out(n, c[None]), atol=1e-10)
    with pytest.raises(BadData, match=r"\[m, 4, 5\]"):
        project_out(n, c)


def test_difference_of_means():
    a, b = torch.randn(4, 3, 2, generator=_seeded()), torch.randn(6, 3, 2, generator=_seeded(1))
    assert torch.allclose(attribute_direction(a, b), a.mean(0) - b.mean(0))
    assert torch.allclose(attribute_direction(b, a), -attribute_direction(a, b))
    with pytest.raises(BadData, match="one shape on both sides"):
        attribute_direction(a, b[:0])
