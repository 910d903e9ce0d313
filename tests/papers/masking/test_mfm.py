import copy

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.models.vision_transformer import VisionTransformer

from sfumato.claim import Verdict, judge
from sfumato.data import digits, photo_crops
from sfumato.engine import Options, Trainer
from sfumato.engine.lab import Lab
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.losses import frequency_loss
from sfumato.masks import frequency_disc
from sfumato.method import Batch, Context, capabilities
from sfumato.papers.masking.mae import MAE
from sfumato.papers.masking.mfm import MFM, energy_split, few_labels
from sfumato.papers.optimization.classifier import Classifier

TINY = {"image_size": 16, "dim": 16, "depth": 1, "heads": 2, "batch_size": 8, "steps": 3, "radius": 3}
NETWORKS = pytest.mark.parametrize("network", ["vit", "small"])
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def build(**over):
    torch.manual_seed(0)
    return MFM(MFM.Config.small(**{**TINY, **over}))


def images(n=4, channels=3, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batch(x):
    return Batch(x, torch.arange(len(x)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def context():
    return Context(0, 10, 0, generator())


def test_paper_defaults():
    c = MFM.Config()
    assert (c.image_size, c.patch, c.dim, c.depth, c.heads, c.decoder_depth) == (224, 16, 768, 12, 12, 0)
    assert c.base_lr * c.batch_size / 256 == pytest.approx(1.2e-3)
    assert (c.weight_decay, c.betas, c.clip_norm, c.power, c.focal) == (0.05, (0.9, 0.95), 3.0, 1.0, False)
    assert c.warmup == pytest.approx(20 / 300, abs=1e-4)
    assert c.final_lr * 3e-4 == pytest.approx(2.5e-6, rel=0.01)
    with torch.device("meta"):
        vit, cnn = MFM(c), MFM(MFM.Config.resnet50())
    assert (vit.radius, vit.masked, vit.head.conv.weight.shape) == (16, True, (3 * 16**2, 768, 1, 1))
    assert cnn.head.conv.weight.shape == (3 * 32**2, 2048, 1, 1)
    assert sum(p.numel() for p in vit.encoder.parameters()) == 85_798_656
    assert sum(p.numel() for p in cnn.encoder.parameters()) == 23_508_032  # timm's resnet50 without its classifier


def test_a_share_of_patches_is_no_setting():
    with pytest.raises(ValidationError, match="mask_ratio"):
        MFM.Config(mask_ratio=0.5)
    assert "mask_ratio" not in MFM.Config.model_fields


@pytest.mark.parametrize(("size", "radius"), [(224, 16), (448, 32), (112, 8), (16, 2)])
def test_the_radius_goes_with_the_size(size, radius):
    with torch.device("meta"):
        assert MFM(MFM.Config.small(image_size=size, radius=None)).radius == pytest.approx(radius)


@NETWORKS
def test_the_training_loss_put_together_by_hand(network):
    """Pictures in [0, 1] are filtered, on the whole plane, and clamped; normalised ones are compared at what was hidden."""
    model, x = build(network=network), images()
    hidden = model.mask(x, generator())
    low = hidden[:, 0, 0]  # the corner is hidden by low-passes
    assert 0 < low.sum() < 4
    disc = frequency_disc(16, 3)
    assert all(torch.equal(h, disc if is_low else ~disc) for h, is_low in zip(hidden, low, strict=True))
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), (-2, -1)) * ~hidden[:, None]
    seen = torch.fft.ifft2(torch.fft.ifftshift(spectrum, (-2, -1))).real.clamp(0, 1)
    if network == "vit":
        pred = model.head(model.encoder((seen - MEAN) / STD)[:, 1:], grid=4)
    else:
        pred = model.head(model.encoder((seen - MEAN) / STD)[-1])
    a, b = (torch.fft.fftshift(torch.fft.fft2(t, norm="ortho"), (-2, -1)) for t in (pred, (x - MEAN) / STD))
    expected = ((a - b).abs() * hidden[:, None]).sum() / hidden.sum() / 3
    loss = model.loss(batch(x), context())
    torch.testing.assert_close(loss.value, expected, rtol=1e-4, atol=1e-5)
    assert loss.weight == hidden.sum()
    torch.testing.assert_close(model.masked_loss(model.normalised(x), hidden), expected, rtol=1e-4, atol=1e-5)


@NETWORKS
def test_micro_batches_add_up(network):
    """Low-passed and high-passed pictures hide unequally many frequencies: the weights make halves exact."""
    model, x = build(network=network), images(6)
    hidden = frequency_disc(16, 3) ^ torch.tensor([True, False, False, True, True, True])[:, None, None]
    normal = model.normalised(x)
    parts = [(model.masked_loss(normal[r], hidden[r]), hidden[r].sum()) for r in (slice(0, 2), slice(2, 6))]
    together = sum(v * w for v, w in parts) / sum(w for _, w in parts)
    torch.testing.assert_close(model.masked_loss(normal, hidden), together)


def test_share_of_low_passes():
    vit, cnn, all_low = build(), build(network="small"), build(low_pass_share=1.0)
    x = torch.zeros(2000, 1, 8, 8)
    shares = [m.mask(x, generator())[:, 0, 0].float().mean().item() for m in (vit, cnn, all_low)]
    assert shares == [pytest.approx(0.5, abs=0.045), pytest.approx(0.3, abs=0.045), 1.0]


def test_the_whole_spectrum_as_a_target():
    masked, normal, x = build(), build(target="normal"), images()
    hidden = masked.mask(x, generator())
    n = masked.normalised(x)
    expected = frequency_loss(masked.predict_image(n, hidden), n)
    loss = normal.loss(batch(x), context())
    torch.testing.assert_close(loss.value, expected, rtol=1e-4, atol=1e-5)
    assert loss.weight == 4
    assert not torch.isclose(masked.masked_loss(n, hidden), expected)


def test_hidden_frequencies_do_not_reach_the_network():
    """Unless the clamp cuts: then the kept ones change, as published."""
    model = build().eval()
    x = 0.4 + 0.2 * images()
    hidden = frequency_disc(16, 3).expand(4, -1, -1)
    noise = torch.fft.ifft2(torch.fft.fft2(images(seed=1)) * torch.fft.ifftshift(hidden, (-2, -1))[:, None]).real
    a, b = (model.predict_image(model.normalised(t), hidden) for t in (x, x + 0.1 * noise))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert not torch.allclose(a, model.predict_image(model.normalised(x + 0.1 * noise), ~hidden), atol=1e-2)


@pytest.mark.parametrize("corruption", ["super_resolution", "deblur", "denoise"])
@NETWORKS
def test_restoration_tasks_count_the_whole_spectrum(corruption, network):
    model, x = build(corruption=corruption, network=network), photo_crops(4, 16, generator=generator())
    seen, hidden = model.corrupt(x, generator())
    assert hidden is None
    assert seen.shape == x.shape
    assert 0 <= seen.min() <= seen.max() <= 1
    assert not torch.allclose(seen, x, atol=0.02)
    loss = model.loss(batch(x), context())
    torch.testing.assert_close(loss.value, frequency_loss(model.reconstruct(seen), model.normalised(x)))
    assert loss.weight == 4
    assert list(model.evaluate([batch(x)])) == ["spectrum_loss"]
    rows = model.preview(batch(x), generator())
    assert torch.equal(rows["corrupted"], seen)
    with pytest.raises(BadSetting, match=f"corruption={corruption} removes no set"):
        build(corruption=corruption, target="masked")


def test_what_each_restoration_task_takes_away():
    flat = torch.full((6, 3, 16, 16), 0.3)
    for corruption in ("super_resolution", "deblur"):
        torch.testing.assert_close(build(corruption=corruption).corrupt(flat, generator())[0], flat)
    x = photo_crops(64, 16, generator=generator())
    sharp = (x[..., 1:] - x[..., :-1]).square().mean()
    for corruption in ("super_resolution", "deblur"):
        seen, _ = build(corruption=corruption).corrupt(x, generator())
        assert (seen[..., 1:] - seen[..., :-1]).square().mean() < 0.6 * sharp
    tiny, _ = build(corruption="super_resolution", scale=16).corrupt(x, generator())
    torch.testing.assert_close(tiny, x.mean((2, 3), keepdim=True).expand_as(x), atol=0.02, rtol=0)  # one pixel is left
    noisy, _ = build(corruption="denoise").corrupt(x, generator())
    assert (noisy - x).mean().abs() < 0.01


def test_each_picture_is_blurred_by_itself():
    model, x = build(corruption="deblur"), images(3)
    both = model.corrupt(x, generator())[0]
    impulse = torch.zeros(3, 3, 31, 31)
    impulse[..., 15, 15] = 1
    kernels = model.corrupt(impulse, generator())[0][:, 0, 5:26, 5:26]
    assert not torch.allclose(kernels[0], kernels[1], atol=1e-3)
    padded = torch.nn.functional.pad(x, (10, 10, 10, 10), mode="reflect")
    patches = padded.unfold(2, 21, 1).unfold(3, 21, 1)
    by_hand = torch.einsum("bchwij,bij->bchw", patches, kernels)
    torch.testing.assert_close(both, by_hand, atol=0.02, rtol=0)  # a ringing impulse is clamped at 0


def test_a_decoder_between_vit_and_head():
    model, x = build(decoder_depth=1, decoder_dim=16, decoder_heads=2, mlp_ratio=2), images()
    assert model.decoder.blocks[0].mlp.fc1.out_features == 32
    model.loss(batch(x), context()).value.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert model.reconstruct(x).shape == x.shape
    with pytest.raises(BadSetting, match="network=vit"):
        build(network="small", decoder_depth=1)


@NETWORKS
def test_training_on_photographs_lowers_the_loss_and_the_state_travels(network):
    model = build(network=network, steps=40, batch_size=32, base_lr=2e-2)
    data, held_out = photo_crops(128, 24, generator=generator()), [batch(images(8))]
    start = model.evaluate([batch(data[:64])])["masked_loss"]
    Trainer(model, data, Options(device="cpu", workers=0)).train(show=False)
    assert model.evaluate([batch(data[:64])])["masked_loss"] < 0.8 * start
    again = MFM(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert model.evaluate(held_out) == again.evaluate(held_out)
    x = images(2, size=40)
    assert torch.equal(model.encode(x), again.encode(x))
    assert capabilities(model).keys() == {"encode"}
    assert model.evaluate([]) == {}


@NETWORKS
def test_preview_puts_predicted_frequencies_where_they_were_hidden(network):
    model, x = build(network=network), images(size=20)
    rows = model.preview(batch(x), generator())
    assert list(rows) == ["picture", "corrupted", "reconstruction"]
    assert all(r.shape == (4, 3, 16, 16) and r.min() >= 0 and r.max() <= 1 for r in rows.values())
    x = images()
    model.reconstruct = lambda seen: model.normalised(x)  # a perfect network
    torch.testing.assert_close(model.preview(batch(x), generator())["reconstruction"], x, atol=1e-5, rtol=0)
    model.reconstruct = lambda seen: model.normalised(torch.zeros_like(x))  # one that adds nothing
    rows = model.preview(batch(x), generator())
    torch.testing.assert_close(rows["reconstruction"], rows["corrupted"], atol=1e-5, rtol=0)


def test_export_to_timm():
    vit, x = build().eval(), images()
    arguments, state = vit.timm_weights()
    other = VisionTransformer(**arguments).eval()
    other.load_state_dict(state)
    assert torch.allclose(other(vit.normalised(x)), vit.encode(x), atol=1e-5)
    with pytest.raises(BadSetting, match="the small network is not timm's"):
        build(network="small").timm_weights()


@pytest.mark.parametrize("network", ["resnet18", "resnetv2_50x1_bit"])  # the second one normalises over groups
def test_export_of_a_convolutional_network_to_timm(network):
    cnn, x = build(network=network, image_size=32).eval(), images(size=32)
    arguments, state = cnn.timm_weights()
    other = timm.create_model(**arguments).eval()
    other.load_state_dict(state)
    cells = other.forward_features(cnn.normalised(x))
    if network == "resnet18":
        torch.testing.assert_close(cells.mean((2, 3)), cnn.encode(x))
    else:
        assert cells.shape == (4, 2048, 1, 1)


def test_a_timm_network_trains():
    model = build(network="resnet18", image_size=32, channels=1)
    model.loss(batch(images(2, 1, 32)), context()).value.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encode(images(2, 1, 40)).shape == (2, 512)
    with pytest.raises(BadSetting, match="multiple of resnet18's stride, 32"):
        build(network="resnet18", image_size=48)


def test_sizes_that_do_not_fit_are_refused_in_one_line():
    for network in ("vit", "small"):
        with pytest.raises(BadData, match="18 x 18 pixels"):
            build(network=network).loss(batch(images(size=18)), context())


def test_encoders_are_handed_over():
    vit, cnn = build(), build(network="small")
    for model in (vit, cnn):
        again = MFM.init_from(model.config, model)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    mae = MAE(MAE.Config.small(**{k: v for k, v in TINY.items() if k != "radius"}, decoder_dim=16, decoder_heads=2))
    started = MFM.init_from(build(positions="sincos").config, mae)
    assert torch.equal(started.encoder(images()), mae.encoder(images()))
    for method, config, run in ((MFM, vit.config, cnn), (MFM, cnn.config, vit), (MAE, mae.config, cnn)):
        with pytest.raises(BadCheckpoint, match="encoder"):
            method.init_from(config, run)
    with pytest.raises(BadCheckpoint, match="'dim': 16"):
        MFM.init_from(build(network="small", dim=32).config, cnn)


@NETWORKS
def test_a_classifier_starts_from_the_encoder(network):
    model = build(network=network, channels=1, image_size=8, patch=2).eval()
    classifier = Classifier.init_from(Classifier.Config.small(channels=1, classes=10, image_size=8), model).eval()
    x = digits()[0].x[:4]
    torch.testing.assert_close(classifier.encode(x), model.encode(x), atol=1e-5, rtol=1e-4)
    again = Classifier(classifier.config).eval()
    again.load_state_dict(classifier.state_dict())
    assert torch.equal(again.predict(x), classifier.predict(x))
    second = Classifier.init_from(Classifier.Config.small(channels=1, classes=10, image_size=8), classifier).eval()
    assert torch.equal(second.predict(x), classifier.predict(x))


def test_no_decay_for_positions():
    model = build()
    groups = model.optimizers()["net"].param_groups
    plain = {id(p) for p in groups[0]["params"]}
    assert id(model.encoder.pos_embed) in plain
    assert id(model.head.conv.weight) not in plain


def test_the_claim_of_the_labels_in_small():
    lab = Lab(0, budget=0.01)
    figures = few_labels.run(lab)
    assert set(figures) == {"MFM", "whole spectrum", "denoising", "untrained"}
    for name, arm in figures.items():
        assert set(arm) == {"CNN accuracy"} | ({"ViT accuracy"} if name in ("MFM", "untrained") else set())
        assert all(0 <= v <= 1 for v in arm.values())
    assert figures["MFM"] != figures["untrained"]
    swapped = [
        copy.deepcopy({**figures, "MFM": {k: v + 0.01 * s for k, v in figures["untrained"].items()}}) for s in range(-9, -4)
    ]
    assert judge(few_labels, swapped).verdict is Verdict.NOT_REPRODUCED


def test_the_claim_of_the_split_holds_with_development_seeds():
    figures = [energy_split.run(Lab(seed, budget=0.15)) for seed in (0, 1)]
    assert judge(energy_split, figures).verdict is Verdict.REPRODUCED
    less = [{**f, "scenes": {**f["scenes"], "inside": 0.79}} for f in figures]
    assert judge(energy_split, less).verdict is Verdict.NOT_REPRODUCED
