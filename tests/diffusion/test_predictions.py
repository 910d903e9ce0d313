import pytest
import torch

from sfumato.diffusion import Schedule, as_denoiser, beta_schedule, convert, sample_heun
from sfumato.errors import BadSetting
from sfumato.nn import small_unet

SCHEDULE = Schedule(beta_schedule("linear"))
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0, 400, 999])


def _exact(kind):
    """Exact for data ~ N(0, 1/4 I), said as `kind`."""

    def model(x_t, t):
        abar = SCHEDULE.abar[t].view(-1, 1, 1, 1)
        x0 = 0.25 * abar.sqrt() * x_t / (0.25 * abar + 1 - abar)
        return convert(x0, x_t, t, SCHEDULE, source="x0", target=kind)

    return (lambda x, sigma: 0.25 * x / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)) if kind == "D" else model


@pytest.mark.parametrize("source", ["eps", "x0", "v", "score", "D"])
@pytest.mark.parametrize("face", ["eps", "x0", "v", "score", "D"])
def test_every_face_of_one_denoiser_agrees(source, face):
    again = as_denoiser(_exact(source), SCHEDULE, predict=source, face=face)
    if face == "D":
        sigma, abar = SCHEDULE.sigma[T], SCHEDULE.abar[T].view(-1, 1, 1, 1)
        assert torch.allclose(again(X / abar.sqrt(), sigma), _exact("D")(X / abar.sqrt(), sigma), atol=1e-9)
    else:
        wanted = _exact(face)(X, T)
        assert torch.allclose(again(X, T), wanted, rtol=1e-9, atol=1e-9)
        assert torch.allclose(again(X[1:2], 400), wanted[1:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("said", "kind"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_a_pair_of_diffusers(said, kind):
    net = small_unet(8, 1, width=8, mults=(1, 2)).eval()
    x, sigma = X.float(), torch.tensor(0.7)
    with torch.no_grad():
        ours = as_denoiser(lambda x, t: net(x, t).sample, SCHEDULE, predict=kind)(x, sigma)
        theirs = as_denoiser(net, SCHEDULE.to_ddim(prediction_type=said))
        assert torch.allclose(theirs(x, sigma), ours, atol=1e-5)
        assert sample_heun(theirs, x, torch.tensor([0.7, 0.0])).shape == x.shape


def test_unknown_kinds_are_refused():
    with pytest.raises(BadSetting, match="noise"):
        as_denoiser(_exact("eps"), SCHEDULE, predict="noise")
    with pytest.raises(BadSetting, match="F"):
        as_denoiser(_exact("eps"), SCHEDULE, face="F")
    scheduler = SCHEDULE.to_ddim()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(BadSetting, match="flow"):
        as_denoiser(_exact("eps"), scheduler)
