import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from sfumato.claim import Verdict, judge
from sfumato.data import digits, photo_crops
from sfumato.engine import Options, Trainer
from sfumato.engine.lab import Lab
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.losses import masked_mean
from sfumato.masks import to_ids, upsample_mask
from sfumato.method import Batch, Context, capabilities
from sfumato.nn import hog_tokens
from sfumato.papers.masking import dmjd
from sfumato.papers.masking.dmjd import DMJD, VisibleHead, joint_errors, predicted_share_lr
from sfumato.papers.masking.mae import MAE
from sfumato.papers.optimization.classifier import Classifier

VECTORS = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "dmjd.npz").items()}
TINY = {
    "image_size": 16, "dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_heads": 2, "visible_dim": 16,
    "stem_dims": (8, 12), "batch_size": 8, "steps": 3,
}  # fmt: skip
KINDS = [("vit", "pixels"), ("vit", "hog"), ("convit", "pixels"), ("convit", "hog")]


def build(**over):
    torch.manual_seed(0)
    return DMJD(DMJD.Config.small(**{**TINY, **over}))


def images(n=4, channels=3, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batch(x):
    return Batch(x, torch.arange(len(x)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def train(model, data, steps=None):
    return Trainer(model, data, Options(device="cpu", workers=0), steps=steps).train(show=False)


# ---- settings


def test_paper_defaults():
    c, large, vit = DMJD.Config(), DMJD.Config.large(), DMJD.Config.vit()
    assert (c.encoder, c.stem_dims, c.stem_blocks, c.dim, c.depth, c.heads) == ("convit", (256, 384), (2, 2), 768, 11, 12)
    assert (c.target, c.mask_ratio, c.mask_unit, c.views, c.predict, c.theta) == ("hog", 0.6, 32, 2, 1.0, 1.0)
    assert (c.decoder_dim, c.decoder_depth, c.decoder_heads, c.visible_dim) == (512, 8, 16, 512)
    assert (c.warmup, c.betas, c.weight_decay, c.crop_scale) == (0.05, (0.9, 0.95), 0.05, (0.5, 1.0))
    assert c.steps * c.batch_size / 1_281_167 == pytest.approx(400, rel=0.01)
    assert (large.dim, large.depth, large.heads, large.stem_dims, large.clip_norm) == (1024, 23, 16, (384, 768), 3.0)
    assert (vit.encoder, vit.depth, vit.dim) == ("vit", 12, 768)


def test_the_rate_counts_images_by_the_share_that_is_predicted():
    assert predicted_share_lr(6e-4, 512, 1.0, 0.6) == pytest.approx(2e-3)

    def rate(**over):
        return build(batch_size=256, base_lr=1e-3, **over).optimizers()["net"].param_groups[0]["lr"]

    assert rate() == pytest.approx(1e-3 / 0.6)  # not 2e-3
    assert rate(views=1) == pytest.approx(1e-3)
    assert rate(predict=0.9) == pytest.approx(1.5e-3)
    assert rate(mask_ratio=0.3) == pytest.approx(2e-3)  # two views cannot reach all
    assert rate(disjoint=False) == rate()
    assert DMJD.Config.small().base_lr * 64 / 256 / 0.6 == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_unit": 6}, "mask_unit=6 must be a multiple of patch=4"),
        ({"mask_unit": 12}, "divisor of the image's side"),
        ({"predict": 0.5}, "predict=0.5 is below mask_ratio=0.6"),
        ({"mask_ratio": 0.8}, "hides all 4 units"),
        ({"target": "hog", "hog_cell": 3}, "hog_cell=3 must be a divisor of patch=4"),
        ({"encoder": "convit", "patch": 2}, "multiple of 4"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(BadSetting, match=message):
        build(**settings)


# ---- masks


def test_views_stand_one_after_the_other_and_hide_everything_together():
    model = build(image_size=32, mask_unit=4)
    masks = model.mask(torch.zeros(5, 3, 32, 32), generator())
    assert masks.shape == (10, 64)
    assert (masks.sum(1) == 39).all()
    assert (masks[:5] | masks[5:]).all()
    assert ((masks[:5] & masks[5:]).sum(1) == 2 * 39 - 64).all()
    assert torch.equal(masks, model.mask(torch.zeros(5, 3, 32, 32), generator()))


def test_independent_views_share_the_first_draw_and_leave_holes():
    x = torch.zeros(64, 3, 32, 32)
    ours, independent, single = (
        build(image_size=32, mask_unit=4, **over).mask(x, generator()) for over in ({}, {"disjoint": False}, {"views": 1})
    )
    assert ours.shape == independent.shape
    assert torch.equal(ours[:64], independent[:64])
    assert torch.equal(ours[:64], single)
    assert (independent.sum(1) == 39).all()
    coverage = (independent[:64] | independent[64:]).float().mean().item()
    assert coverage == pytest.approx(1 - (25 / 64) ** 2, abs=0.01)


def test_masks_of_the_default_are_of_32_pixel_units():
    masks = build(image_size=32).mask(torch.zeros(3, 3, 32, 32), generator())
    units = masks.view(6, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(units.all(-1), units.any(-1))


# ---- losses


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_the_official_loss_comes_out(theta):
    hidden = VECTORS["loss_mask"].bool()
    target = VECTORS["loss_target"].repeat(2, 1, 1)
    masked, visible = joint_errors(VECTORS["loss_pred_masked"], VECTORS["loss_pred_visible"], target, hidden)
    assert (masked + theta * visible).item() == pytest.approx(VECTORS[f"loss_theta{theta}"].item(), abs=1e-9)


def test_errors_of_either_branch_can_be_chosen():
    hidden = torch.tensor([[True, False, True], [False, True, True]])
    predicted, target = torch.zeros(2, 3, 1), torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 0.0]])[..., None]
    visible = torch.zeros(2, 1, 1)
    masked, seen = joint_errors(predicted, visible, target, hidden)
    assert masked.item() == pytest.approx((1 + 16 + 9 + 0) / 4)
    assert seen.item() == pytest.approx((2 - 1 + 1 / 4) / 2)  # d² / 4 at 1; |d| - 1 at 2
    masked, seen = joint_errors(predicted, visible, target, hidden, masked_error="smooth_l1", visible_error="l2")
    assert masked.item() == pytest.approx((1 / 4 + 3 + 2 + 0) / 4)
    assert seen.item() == pytest.approx((4 + 1) / 2)
    assert joint_errors(predicted, None, target, hidden)[1] == 0


def test_visible_predictions_meet_the_targets_of_their_own_places():
    """Targets that tell their place: a head that returns the place of each token makes no error, in any mask."""
    model = build()
    hidden = model.mask(images(), generator(3))
    places = torch.arange(16.0).view(1, 16, 1).expand(8, -1, -1)
    ids, _ = to_ids(hidden)
    errors = joint_errors(torch.zeros(8, 16, 1), ids[..., None].float(), places, hidden)
    assert errors[1] == 0
    encoder, x = model.encoder, model.normalised(images())
    encoder.blocks, encoder.norm = torch.nn.Sequential(), torch.nn.Identity()  # tokens are embedded patches now
    tokens, full = encoder(x, hidden[:4])[:, 1:], encoder(x)[:, 1:]
    assert torch.allclose(tokens, full.gather(1, ids[:4, :, None].expand(-1, -1, 16)), atol=1e-6)


@pytest.mark.parametrize(("encoder", "target"), KINDS)
def test_the_loss_put_together_by_hand(encoder, target):
    model, x = build(encoder=encoder, target=target, theta=0.7), images()
    loss = model.loss(batch(x), Context(0, 10, 0, generator()))
    hidden = model.mask(x, generator())
    normal = model.normalised(x).repeat(2, 1, 1, 1)
    if target == "hog":
        wanted = hog_tokens(x, 4, cell=2).repeat(2, 1, 1)
    else:  # each patch with mean 0 and biased variance 1; a patch is 4 x 4 pixels, channel last
        patches = normal.view(8, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        wanted = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = model.encoder(normal, hidden)
    predicted = model.decoder(z, hidden)
    n = 4  # of 4 units of 4 tokens, 3 are hidden
    assert hidden.sum(1).tolist() == [12] * 8
    visible = model.visible_head(z[:, -n:])
    by_hand = masked_mean((predicted - wanted).square().mean(-1), hidden)
    d = (visible - wanted[~hidden].view(8, n, -1)).abs()
    by_hand = by_hand + 0.7 * torch.where(d < 2, d.square() / 4, d - 1).mean()
    assert loss.value.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert loss.weight == 4


def test_theta_zero_is_maes_form_without_another_branch():
    model, x = build(theta=0.0), build().normalised(images())
    assert model.visible_head is None
    assert {k.split(".")[0] for k in model.state_dict()} == {"encoder", "decoder"}
    hidden = model.mask(x, generator())[:4]
    error = (model.decoder(model.encoder(x, hidden), hidden) - model.target(x)).square().mean(-1)
    assert model.masked_loss(x, hidden).item() == pytest.approx(masked_mean(error, hidden).item())
    with_head = build(theta=1.0)  # the branch is drawn last: arms with and without it start alike
    for name, value in model.state_dict().items():
        assert torch.equal(value, with_head.state_dict()[name])


@pytest.mark.parametrize(("encoder", "target"), KINDS)
def test_views_of_an_image_share_its_target(encoder, target, monkeypatch):
    """The loss of images repeated by hand, from a target that is made once an image."""
    model = build(encoder=encoder, target=target)
    x = model.normalised(images())
    masks, made, make = model.mask(x, generator()), [], DMJD.target
    expected = model.masked_loss(x.repeat(2, 1, 1, 1), masks)
    monkeypatch.setattr(DMJD, "target", lambda self, x: made.append(len(x)) or make(self, x))
    loss = model.loss(batch(images()), Context(0, 10, 0, generator()))
    assert loss.value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert model.evaluate([batch(images())])["masked_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert made == [4, 4]


def test_the_order_of_the_views_does_not_matter():
    model, x = build(), build().normalised(images())
    masks = model.mask(x, generator())
    swapped = torch.cat((masks[4:], masks[:4]))
    twice = x.repeat(2, 1, 1, 1)
    assert model.masked_loss(twice, masks).item() == pytest.approx(model.masked_loss(twice, swapped).item(), rel=1e-6)


@pytest.mark.parametrize("encoder", ["vit", "convit"])
def test_hidden_pixels_reach_nothing_but_the_target(encoder):
    model = build(encoder=encoder).eval()
    x, other = model.normalised(images()), model.normalised(images(seed=1))
    hidden = model.mask(x, generator())[:4]
    changed = torch.where(upsample_mask(hidden, 4, 4), other, x)
    z, w = model.encoder(x, hidden), model.encoder(changed, hidden)
    assert torch.equal(z, w)
    assert torch.equal(model.decoder(z, hidden), model.decoder(w, hidden))


def test_histograms_are_of_the_picture_not_of_its_normalised_form():
    """Whitening takes a factor out, but not where there is hardly any contrast: 1e-5 of the variance stays."""
    model, x = build(target="hog").double(), images().double() / 5000
    torch.testing.assert_close(model.target(model.normalised(x)), hog_tokens(x, 4, cell=2), atol=1e-3, rtol=0)
    assert (model.target(model.normalised(x)) - hog_tokens(model.normalised(x), 4, cell=2)).abs().max() > 0.05


@pytest.mark.parametrize("masked_error", ["l2", "smooth_l1"])
@pytest.mark.parametrize(("encoder", "target"), KINDS)
def test_errors_of_patches_are_of_what_is_predicted(encoder, target, masked_error):
    """A perfect decoder makes none, whatever it predicts; one that is off by 1 at a token is wrong there alone."""
    model, x = build(encoder=encoder, target=target, masked_error=masked_error), build().normalised(images())
    assert model.patch_errors(x, generator()).min() > 0
    model.decoder.forward = lambda z, hidden: model.target(x)
    assert (model.patch_errors(x, generator()) == 0).all()
    off = torch.zeros(4, 16, 1).index_fill_(1, torch.tensor([5]), 1.0)
    model.decoder.forward = lambda z, hidden: model.target(x) + off
    wanted = torch.zeros(4, 16).index_fill_(1, torch.tensor([5]), {"l2": 1.0, "smooth_l1": 0.25}[masked_error])
    torch.testing.assert_close(model.patch_errors(x, generator()), wanted)


def test_the_visible_head_sees_one_token_at_a_time():
    torch.manual_seed(0)
    head, z = VisibleHead(8, 12, 5), torch.rand(2, 6, 8)
    assert torch.allclose(head(z)[:, 3], head(z[:, 3]), atol=1e-5)
    assert [type(m).__name__ for m in head] == ["Linear", "LayerNorm", "GELU"] * 2 + ["Linear", "LayerNorm", "Linear"]
    assert head[7].weight is None
    normed = torch.nn.Sequential(*list(head)[:8])(z)
    assert torch.allclose(normed.mean(-1), torch.zeros(2, 6), atol=1e-5)


# ---- training and use


@pytest.mark.parametrize(("encoder", "target"), KINDS)
def test_training_lowers_the_loss_and_the_state_travels(encoder, target):
    model = build(encoder=encoder, target=target, batch_size=16, base_lr=4e-2)
    data = photo_crops(32, 24, generator=generator())
    start = model.evaluate([batch(data)])["masked_loss"]
    train(model, data, steps=15)
    assert model.evaluate([batch(data)])["masked_loss"] < 0.98 * start
    again = DMJD(model.config).eval()
    again.load_state_dict(model.state_dict())
    x = images(2, size=40)
    assert torch.equal(model.encode(x), again.encode(x))
    assert model.encode(x).shape == (2, 16)
    assert model.evaluate([batch(images())]) == again.evaluate([batch(images())])
    assert capabilities(model).keys() == {"encode"}


def test_grey_digits_and_more_views():
    model = build(image_size=8, patch=2, mask_unit=2, channels=1, views=4, mask_ratio=0.3, crop_scale=None, flip=False)
    train(model, digits()[0].x[:16], steps=2)
    masks = model.mask(torch.zeros(2, 1, 8, 8), generator())
    assert masks.shape == (8, 16)
    assert masks.view(4, 2, 16).any(0).all()
    assert model.encode(digits()[0].x[:2]).isfinite().all()


@pytest.mark.parametrize(("encoder", "target"), KINDS)
def test_preview_keeps_what_was_visible(encoder, target):
    model, x = build(encoder=encoder, target=target).eval(), images()
    rows = model.preview(batch(x), generator())
    pixels = upsample_mask(model.mask(x, generator())[:4], 4, 4).expand_as(x)
    assert list(rows) == ["picture", "masked", "reconstruction"]
    assert all(0 <= r.min() <= r.max() <= 1 for r in rows.values())
    assert torch.equal(rows["reconstruction"][~pixels], x[~pixels])
    assert rows["reconstruction"][pixels].std() > 0


def test_a_perfect_prediction_previews_as_the_picture():
    model, x = build(), images()
    model.decoder.forward = lambda z, hidden: model.target(model.normalised(x))
    assert torch.allclose(model.preview(batch(x), generator())["reconstruction"], x, atol=1e-4)


def test_the_plain_vit_exports_to_timm_and_the_other_says_why_not():
    model, x = build().eval(), images()
    arguments, state = model.timm_weights()
    vit = VisionTransformer(**arguments).eval()
    vit.load_state_dict(state)
    assert torch.allclose(vit(model.normalised(x)), model.encode(x), atol=1e-5)
    with pytest.raises(BadSetting, match="encoder=vit"):
        build(encoder="convit").timm_weights()


@pytest.mark.parametrize("encoder", ["vit", "convit"])
def test_a_classifier_starts_from_the_encoder_and_keeps_it(encoder):
    ours, x = build(encoder=encoder).eval(), images()
    tuned = Classifier.init_from(Classifier.Config.small(classes=10, augment=False), ours)
    assert torch.allclose(tuned.encode(x), ours.encode(x), atol=1e-6)
    reloaded = Classifier(Classifier.Config.model_validate_json(tuned.config.model_dump_json()))  # as a checkpoint would
    reloaded.load_state_dict(tuned.state_dict())
    assert torch.equal(reloaded.encode(x), tuned.encode(x))


def test_starting_from_another_run():
    mae = MAE(MAE.Config.small(**{k: v for k, v in TINY.items() if k not in ("visible_dim", "stem_dims")}))
    ours = DMJD.init_from(build().config, mae)
    x = images()
    assert torch.equal(ours.encode(x), mae.encode(x))
    assert torch.equal(ours.decoder.mask_token, mae.decoder.mask_token)
    back = MAE.init_from(mae.config, build())
    assert torch.equal(back.encode(x), build().encode(x))
    hybrid = build(encoder="convit")
    assert torch.equal(DMJD.init_from(hybrid.config, hybrid).encode(x), hybrid.encode(x))
    with pytest.raises(BadCheckpoint, match="a MaskedViTEncoder, this one is a ConvStemViT"):
        DMJD.init_from(hybrid.config, mae)
    with pytest.raises(BadCheckpoint, match="a ConvStemViT, this one is a MaskedViTEncoder"):
        MAE.init_from(mae.config, hybrid)
    with pytest.raises(BadCheckpoint, match=r"stem_dims=\(8, 12\)"):
        DMJD.init_from(build(encoder="convit", stem_dims=(4, 12)).config, hybrid)


# ---- the claims


def test_arms_start_alike_load_alike_and_peak_alike():
    lab, (known, unknown) = Lab(0), digits(seed=0)
    seen = []

    def fit(model, data, steps=None):
        model.noted = [0.0] * 4
        seen.append((copy.deepcopy(model), data, steps, model.optimizers()["net"].param_groups[0]["lr"]))
        return model

    lab.fit = fit
    for settings in (dmjd.ONE_VIEW, {}, {"disjoint": False}, {"theta": 1.0}):
        dmjd._trained(lab, known, unknown, **settings)
    first, data, *_ = seen[0]
    for model, other, steps, rate in seen:
        assert torch.equal(other, data)
        assert rate == pytest.approx(2e-3)
        assert steps == 400
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in first.state_dict().items())
        assert torch.equal(model.held_out[1], first.held_out[1])
        assert (model.held_out[1].sum(1) == 10).all()


@pytest.mark.parametrize("name", ["disjoint_views", "disjoint_against_independent", "joint_distillation"])
def test_the_claims_in_small(name):
    """A few steps: they must run, judge, and be able to fail."""
    claim = getattr(dmjd, name)
    lab = Lab(0, budget=0.01)
    figures = claim.run(lab)
    assert all(np.isfinite(v) for arm in figures.values() for v in arm.values())
    assert len(lab.curves) == 2
    assert all(len(c["x"]) == len(c["y"]) == 4 for c in lab.curves)
    assert lab.curves[0]["y"] != lab.curves[1]["y"]
    if name == "disjoint_against_independent":
        assert figures["disjoint views"]["coverage"] == 1
        assert figures["independent views"]["coverage"] == pytest.approx(0.859, abs=0.01)
        worse = {**figures, "disjoint views": {**figures["disjoint views"], "coverage": 0.99}}
        assert judge(claim, [worse] * 5).verdict is Verdict.NOT_REPRODUCED
    better = next(c for c in claim.conditions if hasattr(c, "metric"))
    assert better.difference(figures) == pytest.approx(
        (1 if better.higher else -1) * (figures[better.arm][better.metric] - figures[better.over][better.metric])
    )


def test_the_losses_are_noted_at_the_quarters_of_the_training():
    model = dmjd._Watched(dmjd._Watched.Config.small(**{**dmjd.DIGITS, "dim": 16, "depth": 1, "heads": 2, "batch_size": 8}))
    x = digits()[0].x[:16]
    hidden = (torch.arange(16) % 2 == 0).expand(16, -1)
    model.watch(x, hidden)
    trained = train(model, x, steps=7)
    assert len(trained.noted) == 4
    assert trained.noted[-1] == pytest.approx(float(trained.errors(trained.normalised(x), hidden)[0]), rel=1e-5)
    assert trained.noted[0] != trained.noted[3]
