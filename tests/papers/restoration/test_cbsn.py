from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.tv_tensors import Image

from sfumato.data import photo_crops
from sfumato.engine import Lab, fit
from sfumato.errors import BadSetting
from sfumato.method import Batch, Context, Restorer
from sfumato.metrics import psnr
from sfumato.nn import ConditionalBlindSpotNet, random_subsample_index, reflect_pad, space_to_batch, subsample
from sfumato.papers.restoration.cbsn import (
    CBSN,
    DownsampledInvariance,
    correlated_noise_claim,
    correlated_photos,
    denoise,
    local_statistics,
    normalise,
)
from sfumato.physics import correlated_noise
from sfumato.probes import blindness

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "cbsn.npz").items()}


def _small(**over):
    torch.manual_seed(0)
    return CBSN(CBSN.Config(**{"channels": 1, "width": 4, "modules": 1, "patch": 20, "batch_size": 2, **over}))


def _recorded(x, *, blind):
    """The three stand-ins for a network's outputs that the reference loss was computed from."""
    if not blind:
        return VECTORS["out_unmasked"]
    return VECTORS["out_blind_sub"] if x.shape[-1] == 10 else space_to_batch(VECTORS["out_blind"], 5)


def test_loss_matches_the_reference():
    objective = DownsampledInvariance()  # ramp 0.4 of the training: step 50,000 of 500,000 is a quarter of the way
    total, logs = objective(_recorded, VECTORS["x"], VECTORS["step"].item() / 500_000, index=VECTORS["sub_index"])
    assert total.item() == pytest.approx(VECTORS["total"].item(), rel=1e-12)
    for name in ("blind", "self", "inv"):
        assert logs[name].item() == pytest.approx(VECTORS[f"loss_{name}"].item(), rel=1e-12)


def test_at_the_start_no_centre_tap_learns():
    net, x = _small().net, torch.randn(2, 1, 20, 20)
    taps = [branch.masked.weight for branch in net.branches]
    for progress, learns in [(0.0, False), (0.1, True)]:
        grads = torch.autograd.grad(DownsampledInvariance()(net, x, progress)[0], taps)
        assert [bool(g[..., k, k].any()) for g, k in zip(grads, (1, 2))] == [learns, learns]


def test_the_blind_side_of_the_invariance_is_a_constant():
    class Offsets(nn.Module):
        """Blind and seeing outputs with a parameter each."""

        def __init__(self):
            super().__init__()
            self.blind, self.seeing = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.7))

        def forward(self, x, *, blind):
            return x * 0 + (self.blind if blind else self.seeing)

    net, x = Offsets(), torch.full((1, 1, 20, 20), -1.0)
    total, logs = DownsampledInvariance(lmbda=2)(net, x, 1.0)
    assert logs["inv"].item() == pytest.approx(0.4)
    blind, seeing = torch.autograd.grad(total, [net.blind, net.seeing])
    assert blind.item() == pytest.approx(1)  # of the blind term alone
    assert seeing.item() == pytest.approx(1 + 2)


def test_identity_has_no_self_loss():
    _, logs = DownsampledInvariance()(lambda x, blind: x, torch.randn(1, 3, 20, 20), 1.0)
    assert logs["self"] == 0
    assert logs["inv"] == 0


def test_blind_loss_of_the_truth_is_the_mean_size_of_the_noise():
    clean = torch.zeros(1, 1, 500, 500)
    noisy = clean + correlated_noise(clean.shape, 0.1, torch.ones(1, 1), generator=torch.Generator().manual_seed(0))
    x, mean, std = normalise(noisy)
    total, _ = DownsampledInvariance()(lambda t, blind: torch.zeros_like(t) - (mean / std), x, 0.0)
    assert total.item() == pytest.approx((2 / torch.pi) ** 0.5 * 0.1 / std.item(), rel=0.01)


def test_blind_only_never_looks():
    objective = DownsampledInvariance(ramp=float("inf"))
    assert objective(_recorded, VECTORS["x"], 1.0)[1].keys() == {"blind"}


def test_both_sides_of_the_invariance_use_one_index():
    seen = []

    def net(x, *, blind):
        seen.append((x, blind))
        return x

    x = torch.randn(2, 3, 20, 20)
    _, logs = DownsampledInvariance()(net, x, 1.0, generator=torch.Generator().manual_seed(5))
    index = random_subsample_index(2, (20, 20), 2, generator=torch.Generator().manual_seed(5))
    assert any(blind and torch.equal(t, subsample(x, index, 2)) for t, blind in seen)
    assert logs["inv"] == 0


def test_normalisation_per_picture_and_channel():
    x = torch.rand(2, 3, 8, 6) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    z, mean, std = normalise(x)
    assert torch.allclose(z.mean((2, 3)), torch.zeros(2, 3), atol=1e-6)
    assert torch.allclose(z.square().mean((2, 3)), torch.ones(2, 3), atol=1e-5)
    assert torch.allclose(z * std + mean, x, atol=1e-6)
    assert (normalise(torch.full((1, 1, 8, 8), 0.3))[2] == 1 / 8).all()


def test_local_statistics_are_those_of_a_gaussian_window():
    x = torch.rand(1, 2, 40, 30, dtype=torch.float64)
    mean, _ = local_statistics(x, 16)
    at = torch.arange(-12, 13, dtype=torch.float64)
    weight = torch.outer(torch.exp(-at.square() / 32), torch.exp(-at.square() / 32))
    assert mean[0, 1, 20, 14].item() == pytest.approx((x[0, 1, 8:33, 2:27] * weight / weight.sum()).sum().item())
    flat_mean, flat_std = local_statistics(torch.full((1, 1, 9, 9), 0.3), 16)
    assert torch.allclose(flat_mean, torch.tensor(0.3))
    assert flat_std.max() == 1 / 16
    noise = 0.2 * torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    assert local_statistics(noise, 60)[1][..., 50:150, 50:150].mean().item() == pytest.approx(0.2, rel=0.03)


def test_local_statistics_do_not_care_for_light():
    """A picture that is brighter and flatter on one side: each side is restored as if it were alone."""
    net, x = _small().net.double(), torch.rand(1, 1, 60, 200, dtype=torch.float64)
    step = torch.cat([torch.full((100,), 0.5), torch.full((100,), 0.25)]).double()
    shaded = denoise(net, x * step + 0.2, window=20)
    alone = denoise(net, x * 0.25 + 0.2, window=20)
    assert torch.allclose(shaded[..., 150:], alone[..., 150:], atol=1e-3)
    assert not torch.allclose(denoise(net, x * step + 0.2)[..., 150:], denoise(net, x * 0.25 + 0.2)[..., 150:], atol=1e-3)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("size", [(1, 1), (7, 40), (33, 64), (530, 50)])
def test_restores_pictures_of_any_size(size, window):
    method, x = _small(window=window), torch.rand(2, 1, *size)
    y = method.restore(x)
    assert isinstance(method, Restorer)
    assert y.shape == x.shape
    assert not y.requires_grad
    assert 0 <= y.min() <= y.max() <= 1


def test_tiles_leave_no_seam():
    net, x = _small().net.double(), torch.rand(1, 1, 500, 16, dtype=torch.float64)
    z, mean, std = normalise(x)
    tiled = denoise(net, x)  # 564 x 80 pixels with its border: more than one tile
    with torch.no_grad():
        whole = net(reflect_pad(z, (32,) * 4))[..., 32:-32, 32:-32]
    assert torch.allclose(tiled, (whole * std + mean).clamp(0, 1), atol=1e-12)


def test_read_out_on_phases_undoes_its_padding():
    x = torch.rand(1, 1, 22, 31)

    class Identity(ConditionalBlindSpotNet):
        def forward(self, x, *, blind=False):
            assert blind
            return x

    assert torch.allclose(denoise(Identity(1, width=1, modules=0), x, blind=True, stride=5), x, atol=1e-6)


def test_patches_come_in_eight_orientations_and_small_pictures_are_mirrored():
    augment = _small().augment()
    x = torch.arange(400.0).view(1, 20, 20)
    torch.manual_seed(0)
    corners = {tuple(augment(x)[0, [0, 0], [0, -1]].tolist()) for _ in range(200)}
    assert len(corners) == 8
    assert augment(torch.zeros(1, 3, 50, dtype=torch.uint8)).shape == (1, 20, 20)
    noisy, clean = augment(Image(x[:, :15]), Image(x[:, :15] + 1))
    assert torch.equal(noisy + 1, clean)


def test_learning_rate_halves_every_fifth():
    method = _small(lr=0.1)
    context = Context(0, 100, 0, torch.Generator(), method.optimizers())
    rates = []
    for context.step in range(100):
        next(method.steps(context))
        rates.append(context.optimizers["net"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * 0.5 ** (s // 20) for s in range(100)])


def test_a_patch_without_whole_cells_is_refused():
    with pytest.raises(BadSetting, match="patch=64"):
        CBSN.Config(patch=64)


def test_channels_come_from_the_data():
    from sfumato.engine import build
    from sfumato.method import Facts

    assert build(CBSN, Facts(1, 1), settings={"width": 4}, preset="small").net.head.in_channels == 1


def test_evaluates_against_clean_pictures_only():
    method, x = _small(), torch.rand(2, 1, 20, 20)
    assert method.evaluate([Batch(x, torch.arange(2))]) == {}
    expected = psnr(method.restore(x), x.flip(0)).mean().item()
    assert method.evaluate([Batch(x, torch.arange(2), target=x.flip(0))])["psnr"] == pytest.approx(expected)
    assert method.preview(Batch(x, torch.arange(2)), torch.Generator())["restored"].shape == x.shape


def test_trains_on_noisy_pictures_and_makes_them_cleaner():
    clean = 0.3 + 0.4 * photo_crops(4, 80, gray=True, generator=torch.Generator().manual_seed(1))
    line = torch.tensor([1.0, 2.0, 1.0])
    noise = correlated_noise(clean.shape, 0.06, torch.outer(line, line), generator=torch.Generator().manual_seed(2))
    noisy = clean + noise
    method = _small(width=8, patch=40, batch_size=4, lr=5e-3)
    before = psnr(method.restore(noisy), clean).mean()
    method = fit(method, noisy, steps=60, progress=False)
    after = psnr(method.restore(noisy), clean).mean()
    assert after > before
    assert after > psnr(noisy, clean).mean() + 0.5
    assert blindness(lambda t: method.net(t, blind=True), noisy[:1, :, :8, :8]) == 0


def test_photographs_of_the_claim():
    line = torch.tensor([1.0, 2.0, 1.0])
    clean, noisy = correlated_photos(0.15, torch.outer(line, line), torch.Generator().manual_seed(0))
    assert [tuple(c.shape) for c in clean] == [(1, 250, 250), (1, 250, 250), (1, 200, 300), (1, 150, 220)]
    assert np.mean([psnr(n[None], c[None]).item() for n, c in zip(noisy, clean)]) == pytest.approx(16.5, abs=0.1)


def test_the_claim_runs_and_reports_every_read_out():
    figures = correlated_noise_claim(Lab(0, budget=1 / 700))
    assert {"noisy", "BSN", "C-BSN", "best blind read-out", "PD, blind, stride 2"} <= figures.keys()
    read_outs = [m["PSNR"] for name, m in figures.items() if ", blind, " in name]
    assert len(read_outs) == 6
    assert figures["best blind read-out"]["PSNR"] == max(read_outs)
