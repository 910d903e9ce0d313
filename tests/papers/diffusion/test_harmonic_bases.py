import pytest
import torch
import torch.nn.functional as F

from sfumato.claim import judge
from sfumato.data import Batch, Facts, c_alpha_images
from sfumato.engine import Lab, build, fit
from sfumato.errors import BadData, BadSetting
from sfumato.method import Context, Denoiser, Restorer, Sampler, capabilities
from sfumato.metrics import closest_correlation
from sfumato.nn import BFCNN
from sfumato.papers.diffusion.harmonic_bases import BlindDenoiser, _compared, one_function
from sfumato.physics import BlockMean


def _g(seed=0):
    return torch.Generator().manual_seed(seed)


def _small(**over):
    torch.manual_seed(0)
    return BlindDenoiser(BlindDenoiser.Config.small(**{"channels": 1, "image_size": 8, "width": 8, **over})).eval()


X = c_alpha_images(200, 8, 2.0, generator=_g())


def test_the_networks_are_the_papers():
    paper = BlindDenoiser.Config(channels=1)
    assert sum(p.numel() for p in BlindDenoiser(paper).parameters()) == 7_659_264
    flat = BlindDenoiser(BlindDenoiser.Config(channels=1, network="bf_cnn"))
    assert isinstance(flat.net, BFCNN)
    assert sum(p.numel() for p in flat.parameters()) == 702_784
    assert flat.net[3].weight.abs().max() <= 0.025


def test_settings_fit_the_data():
    assert build(BlindDenoiser, Facts(9, 1, (80, 80)), preset="paper").config.crop is False
    wide = build(BlindDenoiser, Facts(9, 3, (200, 300)), preset="paper").config
    assert (wide.image_size, wide.channels, wide.crop) == (80, 3, True)
    assert build(BlindDenoiser, Facts(9, 1, (25, 25)), preset="small").config.image_size == 24
    assert build(BlindDenoiser, Facts(9, 1, (2, 2)), preset="small").config.image_size == 4
    assert build(BlindDenoiser, Facts(9, 1, (25, 25)), preset="small", settings={"network": "bf_cnn"}).config.image_size == 25
    with pytest.raises(BadSetting, match="image_size=10 cannot be halved 2 times"):
        _small(image_size=10)
    with pytest.raises(BadSetting, match="sigma_low=1"):
        _small(sigma_low=1.0)
    assert _small().augment() is None
    picture = torch.rand(1, 30, 50)
    assert _small(crop=True).augment()(picture).shape == (1, 8, 8)
    patch = _small(crop=True, resize=False).augment()(picture)
    assert F.unfold(picture[None], 8)[0].T.eq(patch.flatten()).all(1).any()  # a piece of it, untouched
    assert _small(crop=True, resize=False).augment()(picture[:, :5]).shape == (1, 8, 8)


@pytest.mark.parametrize("network", ["unet", "bf_cnn"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_it_is_homogeneous_and_its_own_jacobian(network, dtype, tolerance):
    method, y = _small(network=network, layers=4).to(dtype), torch.randn(2, 1, 9, 7, dtype=dtype, generator=_g())
    method.train()
    method.net(torch.randn(4, 1, 8, 8, dtype=dtype, generator=_g(1)))
    method.eval()
    assert isinstance(method, Denoiser)
    f = method.denoise
    for same in (f(2.5 * y) / 2.5, torch.func.jvp(f, (y,), (y,))[1]):
        assert (same - f(y)).norm() < tolerance * f(y).norm()


def test_the_loss_is_a_sum_over_pixels():
    method, context = _small(sigma_low=0.2, sigma_high=0.3), Context(0, 9, 0, _g())
    for p in method.parameters():
        p.data.zero_()  # r = 0: what is left is the noise
    batch = Batch(X, torch.arange(200))
    mean = method.loss(batch, context).value.item()
    root = torch.linspace(0.2**0.5, 0.3**0.5, 1001)
    assert mean == pytest.approx(64 * root.pow(4).mean().item(), rel=0.05)
    assert method.loss(batch, Context(0, 9, 0, _g(1))).value.item() != mean
    with pytest.raises(BadData, match=r"pictures are \(3, 8, 8\)"):
        method.loss(Batch(torch.rand(2, 3, 8, 8), torch.arange(2)), context)


@pytest.mark.parametrize(("decay", "end"), [("halve", 2e-3 * 0.5**9), ("cosine", 0.0)])
def test_the_learning_rate_falls(decay, end):
    method = _small(decay=decay)
    optimizers = method.optimizers()
    rates = []
    for step in (0, 99, 100, 999):
        next(method.steps(Context(step, 1000, 0, _g(), optimizers)))
        rates.append(optimizers["net"].param_groups[0]["lr"])
    assert rates[0] == 2e-3
    assert rates[3] == pytest.approx(end, abs=1e-6)
    assert (rates[1] == 2e-3 and rates[2] == 1e-3) == (decay == "halve")


@pytest.fixture(scope="module")
def trained():
    return fit(_small(), X, steps=400, progress=False).eval()


def test_it_learns_to_remove_noise_of_any_level(trained):
    before, after = _small().evaluate([Batch(X[:50], torch.arange(50))]), trained.evaluate([Batch(X[:50], torch.arange(50))])
    assert list(after) == ["psnr_0.1", "psnr_0.3"]
    assert all(after[name] > before[name] + 1 for name in after)
    assert after["psnr_0.3"] > -20 * torch.tensor(0.3).log10().item() + 1.5  # the noise itself
    assert trained.evaluate([]) == {}
    noisy = X[:20] + 0.2 * torch.randn(20, 1, 8, 8, generator=_g())
    restored = trained.restore(noisy)
    assert (restored - X[:20]).square().mean() < 0.8 * (noisy - X[:20]).square().mean()
    assert list(capabilities(trained)) == ["restore", "sample"]
    assert isinstance(trained, Restorer)
    assert isinstance(trained, Sampler)


def test_it_restores_any_size_in_tiles_that_do_not_show(trained):
    x = torch.rand(1, 1, 600, 10, generator=_g())
    whole = trained.denoise(x).clamp(0, 1)
    assert torch.allclose(trained.restore(x), whole, atol=1e-5)
    assert trained.restore(torch.rand(2, 1, 1, 3)).shape == (2, 1, 1, 3)


def test_it_draws_pictures(trained):
    drawn = trained.sample(6, _g())
    assert drawn.shape == (6, 1, 8, 8)
    assert not drawn.requires_grad
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn, trained.sample(6, _g()))
    assert not torch.equal(drawn, trained.sample(6, _g(1)))
    rows = trained.preview(Batch(X[:3], torch.arange(3)), _g())
    assert {name: tuple(x.shape) for name, x in rows.items()} == dict.fromkeys(
        ("picture", "noisy", "denoised", "samples"), (3, 1, 8, 8)
    )


def test_it_solves_what_was_measured(trained):
    """Block means of pictures: the solution agrees with them, and is far nearer to the picture than a free draw is."""
    physics, x = BlockMean(2), X[:30]
    solved = trained.restore(physics.A(x), physics)
    assert (physics.A(solved) - physics.A(x)).abs().mean() / 2 < 0.06
    assert (solved - x).square().mean() < 0.3 * (trained.sample(30, _g()) - x).square().mean()
    assert torch.equal(solved, trained.restore(physics.A(x), physics))
    assert not torch.equal(solved, trained.restore(physics.A(x), physics, generator=_g(1)))


def test_deepinvs_inpainting_is_solved_and_what_is_not_orthonormal_refused(trained):
    from deepinv.physics import Blur, Denoising, GaussianNoise, Inpainting

    mask = (torch.rand(1, 8, 8, generator=_g()) > 0.4).float()
    physics = Inpainting((1, 8, 8), mask=mask)
    solved = trained.restore(physics.A(X[:4]), physics)
    assert ((solved - X[:4]).abs() * mask).mean() < 0.06
    with pytest.raises(BadSetting, match=r"GaussianNoise: .* noise alone needs no physics"):
        trained.restore(X[:2], Denoising(GaussianNoise(0.1)))
    with pytest.raises(BadSetting, match="Blur has no orthonormal rows"):
        trained.restore(X[:2], Blur(torch.ones(1, 1, 3, 3) / 9, padding="circular"))


def test_saved_and_loaded_it_is_the_same(trained):
    other = _small()
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.restore(X[:2]), trained.restore(X[:2]))


@pytest.mark.slow
def test_two_pictures_are_remembered():
    """Trained on two pictures it denoises these far better than others."""
    method = fit(_small(), X[:2], steps=800, progress=False).eval()
    own, others = X[:2].repeat(20, 1, 1, 1), X[100:140]
    z = 0.3 * torch.randn(40, 1, 8, 8, generator=_g())
    errors = [(method.denoise(x + z).detach() - x).square().mean() for x in (own, others)]
    assert errors[0] < 0.4 * errors[1]


def test_pairs_that_diverge_are_left_out():
    """Denoisers that make some pictures larger and larger; the figures are those of the other pairs alone."""
    method = BlindDenoiser(BlindDenoiser.Config.small(channels=1, image_size=16, width=8, sample_steps=1))

    def denoise(y):
        uneven = (y[..., :8] - y[..., 8:]).mean((1, 2, 3), keepdim=True)
        return torch.where(uneven > 0, 0.5 * y, -2 * y)

    class Kept(BlindDenoiser):
        def climb(self, denoiser, start, generator, **given):
            starts.append(start)
            drawn.append(super().climb(denoiser, start, generator, **given))
            return drawn[-1]

    pair, starts, drawn = [], [], []
    for _ in range(2):
        pair.append(Kept(method.config))
        pair[-1].denoise = denoise
    test = torch.rand(20, 1, 16, 16, generator=_g())
    with pytest.warns(UserWarning, match="diverged"):
        found = _compared(Lab(0, budget=0.01), "4 pictures", pair, (test[:4], test[4:8]), test)
    lost = (starts[0] - denoise(starts[0])).flatten(1).square().mean(1).sqrt() > 2
    assert 0 < found["pairs left out"] == int(lost.sum()) < 24
    kept = torch.cat([closest_correlation(d[~lost], t) for d, t in zip(drawn, (test[:4], test[4:8]))])
    assert found["closest-training correlation"] == pytest.approx(float(kept.mean()), abs=1e-5)


def test_claim_shrunk():
    """Every figure is there, what is exact holds, and a run this short reproduces nothing."""
    lab = Lab(0, budget=0.01)
    figures = one_function.run(lab)
    assert set(figures) == {"limit", "Wiener filter", "new pictures", "4 pictures", "4,000 pictures"}
    assert figures["Wiener filter"]["PSNR (dB)"] > -20 * torch.tensor(0.3).log10().item() + 5  # of the noise
    assert figures["new pictures"]["closest-training correlation"] < 0.95  # no near doubles
    for arm in ("4 pictures", "4,000 pictures"):
        assert figures[arm]["homogeneity error"] < 1e-4
        assert 0 < figures[arm]["symmetric share"] <= 1
        assert -1 <= figures[arm]["pair correlation"] <= 1
    assert len(lab.curves) == 2
    assert all(x.shape == (24, 1, 16, 16) for x in lab.pictures.values())
    good = {
        "4 pictures": {
            "log2 disagreement": -0.5, "pair correlation": 0.1, "closest-training correlation": 0.99, "train-test gap (dB)": 9.0,
            "homogeneity error": 1e-6, "symmetric share": 0.7,
        },
        "4,000 pictures": {
            "log2 disagreement": -2.0, "pair correlation": 0.8, "closest-training correlation": 0.9, "train-test gap (dB)": 0.1,
            "homogeneity error": 1e-6, "symmetric share": 0.95,
        },
        "limit": {"train-test gap (dB)": 0.3},
    }  # fmt: skip
    assert judge(one_function, [good] * 5).verdict == "reproduced"
    for name, value in (
        ("log2 disagreement", -0.6),
        ("pair correlation", 0.0),
        ("symmetric share", 0.8),
        ("homogeneity error", 1.0),
    ):
        bad = {**good, "4,000 pictures": {**good["4,000 pictures"], name: value}}
        assert judge(one_function, [bad] * 5).verdict == "not reproduced"
