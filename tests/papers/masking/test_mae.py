from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from sfumato.claim import judge
from sfumato.data import digits, photo_crops
from sfumato.engine import Options, Trainer
from sfumato.engine.lab import Lab
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.losses import masked_patch_mse
from sfumato.masks import NAMED_MASKS, SCORED, random_mask, upsample_mask
from sfumato.method import Batch, Context, capabilities
from sfumato.nn import patchify, unpatchify
from sfumato.papers.masking.mae import MAE, MaskedConfig, MaskedImageModel, few_labels
from sfumato.papers.masking.simmim import SimMIM

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "mae-base.npz").items()}
TINY = {"image_size": 16, "dim": 16, "depth": 1, "heads": 2, "batch_size": 8, "steps": 3}


def build(kind=MAE, **over):
    torch.manual_seed(0)
    decoder = {"decoder_dim": 16, "decoder_heads": 2} if kind is MAE else {}
    return kind(kind.Config.small(**{**TINY, **decoder, **over}))


def images(n=4, channels=3, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batch(x):
    return Batch(x, torch.arange(len(x)))


def context(step=0, total=10):
    return Context(step, total, 0, torch.Generator().manual_seed(0))


def test_paper_defaults():
    c, s = MAE.Config(), SimMIM.Config()
    assert (c.image_size, c.patch, c.dim, c.depth, c.heads) == (224, 16, 768, 12, 12)
    assert (c.decoder_dim, c.decoder_depth, c.decoder_heads) == (512, 8, 16)
    assert (c.mask_ratio, c.base_lr, c.batch_size, c.betas, c.weight_decay) == (0.75, 1.5e-4, 4096, (0.9, 0.95), 0.05)
    assert (MAE.Config.huge().dim, MAE.Config.huge().patch, MAE.Config.large().depth) == (1280, 14, 24)
    assert (s.mask_ratio, s.mask_unit, s.clip_norm, s.betas) == (0.6, 32, 5.0, (0.9, 0.999))
    assert s.base_lr * s.batch_size / 256 == pytest.approx(1e-4 * s.batch_size / 512)


def test_the_base_preset_has_the_papers_size():
    with torch.device("meta"):
        mae = MAE(MAE.Config())
    positions = 197 * 768  # not trained here; part of the usual count of a ViT-B/16 without its head
    assert sum(p.numel() for p in mae.encoder.parameters()) + positions == 85_798_656
    assert mae.encoder.grid == (14, 14)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_is_the_official_one(norm_pix):
    """Official prediction, mask and images in: the official loss out."""
    c = {"image_size": 32, "patch": 8, "norm_pix": norm_pix}
    mae = build(**c)
    hidden, pred = VECTORS["mask"].bool(), VECTORS["pred"]
    mae.predict_patches = lambda x, hidden: pred
    expected = VECTORS["loss_norm" if norm_pix else "loss_raw"].item()
    assert mae.masked_loss(VECTORS["images"], hidden).item() == pytest.approx(expected, abs=1e-9)


def test_the_training_loss_put_together_by_hand():
    mae, x = build(), images()
    loss = mae.loss(batch(x), context())
    hidden = mae.mask(x, torch.Generator().manual_seed(0))
    normal = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    pred = mae.decoder(mae.encoder(normal, hidden), hidden)
    assert torch.allclose(loss.value, masked_patch_mse(pred, patchify(normal, 4), hidden), atol=1e-6)
    assert loss.weight == 4
    assert hidden.sum(1).tolist() == [12] * 4


@pytest.mark.parametrize("shape", [(20, 20), (8, 32)], ids=["larger", "as many patches"])
def test_pictures_of_another_size_are_refused_in_one_line(shape):
    with pytest.raises(BadData, match=f"pictures are {shape[0]} x {shape[1]}, the network takes 16 x 16: set image_size"):
        build().loss(batch(torch.rand(2, 3, *shape)), context())


def test_simmim_loss_is_their_formula():
    """Σ |x - x̂| m / (Σ m + 1e-5) / C over single-channel masks."""
    model, x = build(SimMIM), images()
    hidden = model.mask(images(), torch.Generator().manual_seed(0))
    assert hidden.sum(1).tolist() == [12] * 4  # ceil(4 units * 0.6) = 3 of four tokens each
    normal = model.normalised(x)
    m = upsample_mask(hidden, 4, 4).float()
    theirs = ((normal - model.predict_image(normal, hidden)).abs() * m).sum() / (m.sum() + 1e-5) / 3
    assert torch.allclose(model.masked_loss(normal, hidden), theirs, atol=1e-5)


@pytest.mark.parametrize("kind", [MAE, SimMIM])
def test_hidden_pixels_reach_nothing_but_the_target(kind):
    model = build(kind, **({"norm_pix": False} if kind is MAE else {})).eval()
    x = model.normalised(images())
    hidden = model.mask(images(), torch.Generator().manual_seed(0))
    other = torch.where(upsample_mask(hidden, 4, 4), images(seed=1), x)
    assert torch.equal(model.predict_image(x, hidden), model.predict_image(other, hidden))


def test_views_of_an_image_share_its_pixels():
    """Masks of two views: the loss is the mean of the views' losses, however the views are told apart."""
    mae, x = build(), images()
    first, second = (mae.mask(x, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mae.own_mask = lambda *_: torch.cat((first, second))
    normal = mae.normalised(x)
    expected = (mae.masked_loss(normal, first) + mae.masked_loss(normal, second)) / 2
    loss = mae.loss(batch(x), context())
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.weight == 4
    assert mae.evaluate([batch(x)])["masked_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert mae.preview(batch(x), torch.Generator())["masked"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("kind", [MAE, SimMIM])
@pytest.mark.parametrize("name", NAMED_MASKS)
def test_any_mask_trains_any_method(kind, name):
    model = build(kind, mask=name)
    loss = model.loss(batch(images()), context())
    loss.value.backward()
    assert loss.value.isfinite()
    hidden = model.mask(model.normalised(images()), torch.Generator().manual_seed(0))
    assert len(hidden) == (8 if name == "disjoint" else 4)
    assert len(set(hidden.sum(1).tolist())) == 1


def test_the_settings_offer_every_named_mask():
    assert set(get_args(MaskedConfig.model_fields["mask"].annotation)) == {"own", *NAMED_MASKS}


def test_errors_of_patches_are_those_of_the_hidden_ones():
    """Each patch while it is hidden, in one of two halves; the network's own mistakes."""
    mae = build(norm_pix=False).eval()
    x = mae.normalised(images())
    errors = mae.patch_errors(x, torch.Generator().manual_seed(3))
    half = random_mask(4, mae.encoder.grid, 0.5, generator=torch.Generator().manual_seed(3))
    expected = masked_patch_mse(mae.predict_patches(x, half), patchify(x, 4), half, norm=False, reduction="none")
    assert torch.allclose(errors[half], expected[half], atol=1e-5)
    assert (errors > 0).all()


@pytest.mark.parametrize("positions", ["sincos", "relative"])
@pytest.mark.parametrize("depth", [1, 3])
def test_attention_is_the_class_tokens_in_the_last_block(depth, positions):
    model = build(SimMIM, depth=depth, positions=positions)
    torch.nn.init.normal_(model.encoder.cls_token)
    x = model.normalised(images())
    weights = model.attention(x, torch.Generator())
    last = model.encoder.eval()(x, return_attention=True).attention[-1]
    assert torch.allclose(weights, last[:, :, 0, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize("score", ["attention", "patch_errors"])
def test_scores_are_taken_at_rest_and_training_goes_on(score):
    """Residual branches that are skipped at random in training would make the score another one every time."""
    model = build(SimMIM, depth=3, drop_path=0.9).train()
    model.head.eval()  # a part that rests stays at rest
    x, g = model.normalised(images()), lambda: torch.Generator().manual_seed(0)
    first, again = (getattr(model, score)(x, g()) for _ in range(2))
    assert torch.equal(first, again)
    assert model.training
    assert model.encoder.blocks[2].training
    assert not model.head.training
    assert torch.equal(first, getattr(model.eval(), score)(x, g()))


def test_learning_rate_and_groups():
    mae = build(batch_size=128, base_lr=1e-3, warmup=0.2)
    ctx = context()
    ctx.optimizers = mae.optimizers()
    groups = ctx.optimizers["net"].param_groups
    assert [g["weight_decay"] for g in groups] == [0.0, 0.05]
    plain = {id(p) for p in groups[0]["params"]}
    for name, p in mae.named_parameters():
        assert (id(p) in plain) == (p.ndim == 1 or name.endswith("mask_token")), name
    rates = []
    for step in range(10):
        ctx.step = step
        next(mae.steps(ctx))
        rates.append(groups[1]["lr"])
    assert rates[0] == 0
    assert rates[2] == pytest.approx(1e-3 * 128 / 256)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_simmim_mask_units_are_whole_patches():
    with pytest.raises(BadSetting, match="mask_unit"):
        build(SimMIM, mask_unit=6)


def test_simmim_learning_rate_drops_to_a_tenth():
    model = build(SimMIM)
    assert [model.lr_factor(p) for p in (0.0, 0.5, 0.8, 0.9)] == [0, 1, 1, 0.1]


@pytest.mark.parametrize("kind", [MAE, SimMIM])
def test_training_on_photographs_lowers_the_loss_and_the_state_travels(kind):
    model = build(kind, steps=40, batch_size=32, base_lr=2e-2)
    data, held_out = photo_crops(128, 24, generator=torch.Generator().manual_seed(0)), [batch(images(8))]
    start = model.evaluate([batch(data[:64])])["masked_loss"]
    Trainer(model, data, Options(device="cpu", workers=0)).train(show=False)
    assert model.evaluate([batch(data[:64])])["masked_loss"] < 0.97 * start
    again = kind(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert model.evaluate(held_out) == again.evaluate(held_out)
    x = images(2, size=40)
    assert torch.equal(model.encode(x), again.encode(x))


def test_encode_takes_any_size_and_exports_to_timm():
    mae = build().eval()
    x = torch.rand(2, 3, 23, 50)
    assert mae.encode(x).shape == (2, 16)
    square = images()
    arguments, state = mae.timm_weights()
    vit = VisionTransformer(**arguments).eval()
    vit.load_state_dict(state)
    assert torch.allclose(vit(mae.normalised(square)), mae.encode(square), atol=1e-5)
    assert capabilities(mae).keys() == {"encode"}


@pytest.mark.parametrize(("kind", "norm_pix"), [(MAE, True), (MAE, False), (SimMIM, None)])
def test_preview_keeps_what_was_visible(kind, norm_pix):
    model = build(kind, **({} if norm_pix is None else {"norm_pix": norm_pix}))
    rows = model.preview(batch(images(size=20)), torch.Generator().manual_seed(0))
    assert list(rows) == ["picture", "masked", "reconstruction"]
    assert all(r.shape == (4, 3, 16, 16) and r.min() >= 0 and r.max() <= 1 for r in rows.values())
    pixels = upsample_mask(model.mask(images(), torch.Generator().manual_seed(0)), 4, 4).expand(-1, 3, -1, -1)
    assert torch.equal(rows["reconstruction"][~pixels], rows["picture"][~pixels])
    assert (rows["masked"][pixels] == 0.5).all()


def test_a_perfect_prediction_previews_as_the_picture():
    """Patches' own mean and deviation, then ImageNet's, are put back."""
    mae, x = build(), images()
    normal = mae.normalised(x)
    patches = patchify(normal, 4)
    mae.predict_patches = lambda x, hidden: (
        (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    )
    rows = mae.preview(batch(x), torch.Generator().manual_seed(0))
    assert torch.allclose(rows["reconstruction"], x, atol=1e-5)
    assert torch.allclose(mae.predict_image(normal, mae.mask(normal, torch.Generator())), unpatchify(patches, 4, 4, 3), atol=1e-5)


def test_evaluation_repeats_and_weighs_batches_by_their_size():
    mae, x = build(), images(6)
    assert mae.evaluate([batch(x)]) == mae.evaluate([batch(x)])
    assert mae.evaluate([]) == {}


@pytest.mark.parametrize("name", ["own", *NAMED_MASKS])
def test_evaluation_draws_masks_that_do_not_follow_the_network(name):
    """Those of the setting, but uniform ones in the place of what this network finds hard or attends to."""
    model, x = build(mask=name), images()
    masks, g = [], torch.Generator
    model.masked_loss = lambda x, hidden: masks.append(hidden) or torch.zeros(())
    model.evaluate([batch(x)])
    same = build(mask="random" if name in SCORED else name)
    assert torch.equal(masks[0], same.mask(same.normalised(x), g().manual_seed(0)))
    if name in SCORED:
        assert not torch.equal(masks[0], model.mask(model.normalised(x), g().manual_seed(0)))


def test_grey_images_and_augmentation():
    mae = build(channels=1, image_size=8, patch=2)
    assert mae.mean.flatten().tolist() == pytest.approx([0.449])
    assert mae.encode(digits()[0].x[:2]).shape == (2, 16)
    torch.manual_seed(0)
    out = build().augment()(images(1, size=40)[0] * 0.999)
    assert out.shape == (3, 16, 16)
    assert 0 <= out.min() <= out.max() <= 1
    assert build(crop_scale=None, flip=False).augment() is None
    steps = [type(t).__name__ for t in build(flip=False).augment().transforms]
    assert "RandomHorizontalFlip" not in steps


def test_starting_from_another_run():
    mae = build()
    simmim = SimMIM.init_from(SimMIM.Config.small(**TINY, positions="sincos"), mae)
    assert torch.equal(simmim.encoder(images()), mae.encoder(images()))
    copy = MAE.init_from(mae.config, mae)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), mae.parameters(), strict=True))
    with pytest.raises(BadCheckpoint, match="dim=16"):
        MAE.init_from(MAE.Config.small(**{**TINY, "dim": 32}), mae)


def test_a_variant_overrides_the_mask_alone():
    class Left(MAE):
        def own_mask(self, x, generator, progress=1.0):
            return (torch.arange(16) % 4 < 2).expand(len(x), -1)

    model = Left(build().config)
    assert isinstance(model, MaskedImageModel)
    assert torch.isfinite(model.loss(batch(images()), context()).value)


def test_the_claim_in_small():
    """A fortieth of the training cannot win; it must run, judge and leave its figures."""
    figures = [few_labels.run(Lab(seed, budget=0.02)) for seed in (0, 1)]
    for f in figures:
        assert set(f) == {"pre-trained", "from scratch"}
        assert all(0 <= v <= 1 for arm in f.values() for v in arm.values())
    assert figures[0] != figures[1]
    assert judge(few_labels, figures).findings[0].margin == 0.05
