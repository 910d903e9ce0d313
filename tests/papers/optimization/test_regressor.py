import pytest
import torch

from sfumato.data import Batch, Facts, photo_crops
from sfumato.engine import fit
from sfumato.errors import BadData, BadSetting
from sfumato.papers.optimization.classifier import Classifier
from sfumato.papers.optimization.regressor import Regressor


def small(**over):
    torch.manual_seed(0)
    return Regressor(Regressor.Config.small(**{"channels": 3, **over}))


def noisy_photos(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    clean = photo_crops(n, 24, generator=g)
    return Batch((clean + 0.1 * torch.randn(clean.shape, generator=g)).clamp(0, 1), torch.arange(n), target=clean)


def test_learns_to_denoise_pairs():
    data = noisy_photos(64)
    method = small(lr=2e-3)
    trained = fit(method, data, steps=60, progress=False, device="cpu")
    held_out = noisy_photos(16, seed=1)
    figures = trained.evaluate([held_out])
    noisy = -10 * (held_out.x - held_out.target).square().mean().log10()
    assert figures["psnr"] > noisy + 1
    assert trained.restore(torch.rand(1, 3, 33, 21)).shape == (1, 3, 33, 21)
    assert set(trained.preview(held_out, torch.Generator())) == {"input", "prediction", "target"}
    assert trained.encode(held_out.x).shape == (16, 24)
    again = Regressor(trained.config)
    again.load_state_dict(trained.state_dict())
    assert torch.equal(again.predict(held_out.x), trained.predict(held_out.x))


def test_learns_numbers():
    x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = Batch(x, torch.arange(200), target=torch.stack([x.mean((1, 2, 3)), x[:, 0, :, 0].mean(1)], 1))
    method = small(model="mlp", channels=1, image_size=8, outputs=2, lr=3e-3)
    before = method.evaluate([data])["mse"]
    trained = fit(method, data, steps=60, progress=False, device="cpu")
    assert trained.evaluate([data])["mse"] < before / 3
    assert trained.predict(torch.rand(2, 1, 30, 20)).shape == (2, 2)
    assert set(trained.preview(data, torch.Generator())) == {"pictures"}
    with pytest.raises(BadSetting, match="ask it to predict"):
        trained.restore(x)


@pytest.mark.parametrize(("criterion", "power"), [("mse", 2), ("l1", 1)])
def test_loss_is_the_mean_difference(criterion, power):
    data = noisy_photos(3)
    method = small(criterion=criterion)
    value, weight, _ = method.loss(data, None)
    torch.testing.assert_close(value, ((method.predict(data.x) - data.target).abs() ** power).mean())
    assert weight == 3


def test_crops_keep_pairs_together():
    from torchvision.tv_tensors import Image

    config = Regressor.Config.small(augment=True).fitted(Facts(9, 3, None, None, ("x", "index", "target")))
    assert (config.image_size, config.crop) == (64, True)
    photo = torch.rand(3, 90, 120)
    a, b = Regressor(config).augment()(Image(photo), Image(photo + 1))
    assert a.shape == (3, 64, 64)
    torch.testing.assert_close(torch.Tensor(a) + 1, torch.Tensor(b))
    assert Regressor(config.model_copy(update={"augment": False, "crop": False})).augment() is None


def test_starts_from_a_classifier():
    classifier = Classifier(Classifier.Config.small(model="mlp", channels=1, classes=3, image_size=8))
    method = Regressor.init_from(Regressor.Config.small(outputs=2), classifier)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(method.encode(x), classifier.encode(x))


def test_wrong_targets_are_told():
    x = torch.rand(4, 1, 8, 8)
    vectors = Batch(x, torch.arange(4), target=torch.rand(4, 3))
    with pytest.raises(BadSetting, match="outputs=3"):
        small(channels=1).loss(vectors, None)
    with pytest.raises(BadSetting, match="outputs=2"):
        small(channels=1, image_size=8, outputs=2).loss(vectors, None)
    with pytest.raises(BadData, match="target"):
        small(channels=1).loss(Batch(x, torch.arange(4)), None)
    assert small(channels=1, image_size=8, outputs=1).loss(Batch(x, torch.arange(4), target=torch.rand(4)), None).value > 0
