import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.masks import frequency_disc
from sfumato.physics import FrequencyMask


def build(size=(12, 9)):
    return FrequencyMask(frequency_disc(size, 3)), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def test_deepinv_finds_its_adjoint_and_norm():
    physics, x = build()
    assert abs(physics.adjointness_test(x)) < 1e-3
    assert physics.compute_sqnorm(x, verbose=False).item() == pytest.approx(1.0, abs=1e-3)


def test_the_closed_forms_are_what_deepinv_computes_by_iteration():
    from deepinv.physics import LinearPhysics

    physics, x = build()
    slow = LinearPhysics(A=physics.A, A_adjoint=physics.A_adjoint, max_iter=100, tol=1e-6)
    y, z = physics(x), torch.rand_like(x)
    for gamma in (0.1, 2.0):
        torch.testing.assert_close(physics.prox_l2(z, y, gamma), slow.prox_l2(z, y, gamma), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(physics.prox_l2(0.5, y, 1.0), slow.prox_l2(0.5, y, 1.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(physics.A_dagger(y), slow.A_dagger(y), atol=1e-3, rtol=1e-3)


def test_a_new_mask_stays():
    physics, x = build()
    other = ~physics.hidden
    y = physics.A(x, hidden=other)
    assert torch.equal(physics.hidden, other)
    assert torch.equal(physics.A(x), y)
    assert torch.equal(physics.state_dict()["hidden"], other)


def test_a_mask_that_is_no_projection_is_refused():
    physics, x = build()
    lopsided = torch.zeros(12, 9, dtype=torch.bool)
    lopsided[2, 3] = True
    with pytest.raises(BadSetting, match="k and -k"):
        FrequencyMask(lopsided)
    with pytest.raises(BadSetting, match="k and -k"):
        physics.A(x, hidden=lopsided)
