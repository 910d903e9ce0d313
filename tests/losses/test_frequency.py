from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.losses import focal_frequency_loss, frequency_loss, spectrum_l1
from sfumato.masks import frequency_disc, random_frequency_mask

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "mfm.npz").items()}
SIZES = [(8, 8), (6, 9), (5, 4), (7, 3)]


def pair(size=(8, 8), batch=3, channels=2, seed=0):
    return torch.rand(2, batch, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()


def error(pred, target):
    """|ΔF| over the whole plane, centred."""
    a, b = (torch.fft.fftshift(torch.fft.fft2(t, norm="ortho"), (-2, -1)) for t in (pred, target))
    return (a - b).abs()


def test_the_official_loss_and_its_gradient():
    """The official code computes in single precision."""
    target, hidden = VECTORS["target"], ~VECTORS["mask"].bool()
    pred = VECTORS["pred"].clone().requires_grad_()
    loss = frequency_loss(pred, target, hidden)
    loss.backward()
    assert loss.item() == pytest.approx(VECTORS["loss_masked"].item(), rel=1e-5)
    torch.testing.assert_close(pred.grad.float(), VECTORS["grad_masked"], rtol=1e-4, atol=1e-7)
    assert frequency_loss(pred, target).item() == pytest.approx(VECTORS["loss_mean"].item(), rel=1e-5)
    focal = frequency_loss(pred, target, weight="focal")
    assert focal.item() == pytest.approx(VECTORS["loss_focal_mean"].item(), rel=1e-5)
    everywhere = frequency_loss(pred, target, reduction="none")
    torch.testing.assert_close(everywhere.float(), VECTORS["loss_map"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_half_of_the_plane_counts_like_the_whole(size, power):
    pred, target = pair(size)
    d = error(pred, target) ** power
    assert frequency_loss(pred, target, power=power).item() == pytest.approx(d.mean().item(), abs=1e-9)
    hidden = random_frequency_mask(3, size, 2, generator=torch.Generator().manual_seed(1))
    assert hidden[0].sum() != hidden[1].sum() or hidden[0].sum() != hidden[2].sum()
    expected = (d * hidden[:, None]).sum() / hidden.sum() / 2
    assert frequency_loss(pred, target, hidden, power=power).item() == pytest.approx(expected.item(), abs=1e-9)
    lopsided = torch.rand(size, generator=torch.Generator().manual_seed(2)) > 0.6  # k without -k, too
    expected = d[..., lopsided].mean()
    assert frequency_loss(pred, target, lopsided, power=power).item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_parseval(size):
    pred, target = pair(size)
    mse = (pred - target).square().mean().item()
    assert frequency_loss(pred, target, power=2).item() == pytest.approx(mse, rel=1e-12)


def focal_weight(d, alpha=1.0, log=False, batch_max=False):
    w = d**alpha
    w = (w + 1).log() if log else w
    return w / (w.max() if batch_max else w.amax((-2, -1), keepdim=True))


@pytest.mark.parametrize("settings", [{}, {"alpha": 2.0}, {"log": True}, {"batch_max": True}, {"alpha": 0.0}])
def test_focal_losses_are_their_formulas(settings):
    """The same weight multiplies the square in the focal frequency loss, and the modulus in MFM's option."""
    pred, target = pair((6, 5))
    d = error(pred, target)
    w = focal_weight(d, **settings)
    assert focal_frequency_loss(pred, target, **settings).item() == pytest.approx((w * d**2).mean().item(), rel=1e-9)
    once = frequency_loss(pred, target, weight="focal", **settings)
    assert once.item() == pytest.approx((w * d).mean().item(), rel=1e-6)
    maps = focal_frequency_loss(pred, target, reduction="none", **settings)
    torch.testing.assert_close(maps[:, 0], w * d**2)


def test_the_focal_weight_is_a_constant_for_the_gradient():
    pred, target = pair((6, 5))
    w = focal_weight(error(pred, target))
    gradients = []
    for loss in (focal_frequency_loss, lambda p, t: (w * error(p, t) ** 2).mean()):
        p = pred.clone().requires_grad_()
        loss(p, target).backward()
        gradients.append(p.grad)
    torch.testing.assert_close(*gradients)


def test_tiles_have_spectra_of_their_own():
    pred, target = pair((8, 12))
    tiles = [(pred[..., 4 * i : 4 * i + 4, 6 * j : 6 * j + 6], target[..., 4 * i : 4 * i + 4, 6 * j : 6 * j + 6])
             for i in range(2) for j in range(2)]  # fmt: skip
    d = torch.stack([error(p, t) for p, t in tiles], 1)
    torch.testing.assert_close(frequency_loss(pred, target, patch_factor=2, reduction="none"), d, atol=1e-6, rtol=1e-6)
    hidden = frequency_disc((4, 6), 2)
    expected = d[..., hidden].mean().item()
    assert frequency_loss(pred, target, hidden, patch_factor=2).item() == pytest.approx(expected, abs=1e-9)


def test_average_spectrum():
    pred, target = pair((6, 6))
    a, b = (torch.fft.fft2(t, norm="ortho").mean(0) for t in (pred, target))
    assert frequency_loss(pred, target, average=True).item() == pytest.approx((a - b).abs().mean().item(), abs=1e-9)


def test_spectrum_l1():
    for size in SIZES:
        pred, target = pair(size)
        d = torch.fft.fft2(pred, norm="ortho") - torch.fft.fft2(target, norm="ortho")
        expected = (d.real.abs() + d.imag.abs()).mean() / 2
        assert spectrum_l1(pred, target).item() == pytest.approx(expected.item(), rel=1e-9)


def test_only_hidden_frequencies_count():
    pred, target = pair((16, 16))
    hidden = frequency_disc(16, 4)
    changed = torch.fft.fft2(pred)
    changed = changed + torch.fft.ifftshift(~hidden) * torch.fft.fft2(pair((16, 16), seed=1)[0])
    other = torch.fft.ifft2(changed).real
    assert (other - pred).abs().max() > 0.1
    assert frequency_loss(other, target, hidden).item() == pytest.approx(frequency_loss(pred, target, hidden).item(), abs=1e-12)
    assert frequency_loss(other, pred, hidden).item() == pytest.approx(0, abs=1.1e-6)  # the floor under the root
    assert frequency_loss(other, pred, reduction="none")[..., ~hidden].max() > 0.1
    assert not frequency_loss(other, pred, hidden, reduction="none")[..., ~hidden].any()


def test_nothing_hidden_is_zero_with_a_gradient_of_zero():
    pred, target = pair()
    pred.requires_grad_()
    loss = frequency_loss(pred, target, frequency_disc(8, 99))
    loss.backward()
    assert loss.item() == 0
    assert not pred.grad.any()


@pytest.mark.parametrize("settings", [{}, {"weight": "focal"}, {"power": 2.0, "weight": "focal"}, {"power": 1.5}])
def test_gradients_are_finite_where_spectra_agree(settings):
    pred = pair()[0].requires_grad_()
    loss = frequency_loss(pred, pred.detach().clone(), **settings)
    loss.backward()
    assert loss.item() <= 1.1e-6
    assert pred.grad.isfinite().all()


def test_gradcheck():
    pred, target = pair((5, 4), batch=1, channels=1)
    pred.requires_grad_()
    hidden = frequency_disc((5, 4), 1.5)
    for power in (1.0, 2.0):
        assert torch.autograd.gradcheck(lambda p, power=power: frequency_loss(p, target, hidden, power=power), pred)
    assert torch.autograd.gradcheck(lambda p: spectrum_l1(p, target), pred)


def test_half_precision_is_counted_in_single():
    pred, target = (t.bfloat16() for t in pair((12, 12)))
    expected = frequency_loss(pred.double(), target.double()).item()
    assert frequency_loss(pred, target).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert frequency_loss(pred, target).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    pred, target = pair()
    with pytest.raises(BadSetting, match="weight='hard'"):
        frequency_loss(pred, target, weight="hard")
    with pytest.raises(BadSetting, match="reduction='sum'"):
        frequency_loss(pred, target, reduction="sum")
    with pytest.raises(BadSetting, match="power=0"):
        frequency_loss(pred, target, power=0)
    with pytest.raises(BadData, match="one shape"):
        frequency_loss(pred, target[:1])
    with pytest.raises(BadData, match="patch_factor must divide"):
        frequency_loss(pred, target, patch_factor=3)
    with pytest.raises(BadData, match="spectra of 4 x 4"):
        frequency_loss(pred, target, frequency_disc(8, 2), patch_factor=2)
