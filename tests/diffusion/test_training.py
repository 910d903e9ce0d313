import pytest
import torch

from sfumato.diffusion import EDMPrecond, Schedule, beta_schedule, convert, denoising_loss
from sfumato.errors import BadSetting

SCHEDULE = Schedule(beta_schedule("linear"))
G = torch.Generator().manual_seed(0)
X0, EPS = torch.rand(4, 1, 3, 3, generator=G, dtype=torch.float64), torch.randn(4, 1, 3, 3, generator=G, dtype=torch.float64)
T = torch.tensor([0, 250, 500, 999])


def _loss(predict, weight, **kw):
    """The loss of a network whose clean picture is off by 0.1 everywhere."""

    def model(x_t, t):
        return convert(X0 + 0.1, x_t, t, SCHEDULE, source="x0", target=predict)

    return denoising_loss(model, X0, T, EPS, SCHEDULE, predict=predict, weight=weight, reduction="none", **kw)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_weights_count_the_clean_picture_alike(predict):
    """One error, said in three ways, has one weighted loss."""
    snr = SCHEDULE.snr[T]
    assert torch.allclose(_loss(predict, "p2"), 0.01 * snr / (1 + snr), rtol=1e-8)
    assert torch.allclose(_loss(predict, "p2", gamma=0.5), 0.01 * snr / (1 + snr).sqrt(), rtol=1e-8)
    assert torch.allclose(_loss(predict, "min_snr", gamma=3.0), 0.01 * snr.clamp(max=3), rtol=1e-8)
    edm = EDMPrecond(torch.nn.Identity(), sigma_data=0.3).weight(SCHEDULE.sigma[T])
    assert torch.allclose(_loss(predict, "edm", sigma_data=0.3), 0.01 * edm, rtol=1e-8)


def test_p2_of_the_noise_is_the_papers():
    """lambda' = 1 / (k + SNR)^gamma on the plain error of eps, k = 1; gamma = 0 is the plain error."""
    plain = _loss("eps", None)
    assert torch.allclose(_loss("eps", "p2"), plain / (1 + SCHEDULE.snr[T]), rtol=1e-10)
    assert torch.allclose(_loss("eps", "p2", gamma=0.0), plain, rtol=1e-10)


def test_unknown_weights_are_refused():
    with pytest.raises(BadSetting, match="snr5"):
        _loss("eps", "snr5")
