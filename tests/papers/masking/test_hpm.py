import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from sfumato.claim import Verdict, judge
from sfumato.data import photo_crops
from sfumato.engine import Options, Trainer
from sfumato.engine.lab import Lab
from sfumato.errors import BadSetting
from sfumato.losses import masked_patch_mse, pairwise_ranking
from sfumato.masks import mask_from_scores, random_mask, upsample_mask
from sfumato.method import Batch, Context, capabilities
from sfumato.nn import patchify
from sfumato.papers.masking.hpm import HPM, LossPredictor, absolute_ranking, few_labels, hard_patches, pair_accuracy
from sfumato.papers.masking.mae import MAE

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "hpm.npz").items()}
TINY = {"image_size": 16, "dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_heads": 2, "batch_size": 8, "steps": 3}


def build(kind=HPM, **over):
    torch.manual_seed(0)
    return kind(kind.Config.small(**{**TINY, **over}))


def images(n=4, channels=3, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batch(x):
    return Batch(x, torch.arange(len(x)))


def context(step=0, total=10):
    return Context(step, total, 0, torch.Generator().manual_seed(0))


def one_step(model, ctx, x):
    ctx.optimizers = ctx.optimizers or model.optimizers()
    steps = model.steps(ctx)
    next(steps)
    ctx.optimizers["net"].zero_grad()
    model.loss(batch(x), ctx).value.backward()
    ctx.optimizers["net"].step()
    with pytest.raises(StopIteration):
        steps.send(None)


# ---- settings and parts


def test_paper_defaults():
    c, mae = HPM.Config(), MAE.Config().model_dump()
    changed = {k for k, v in c.model_dump().items() if k in mae and v != mae[k]}
    assert changed == {"steps", "batch_size", "warmup"}
    assert c.steps * c.batch_size / 1_281_167 == pytest.approx(200, rel=0.01)
    assert (c.hard_share, c.ranking, c.ranking_weight) == ((0.0, 0.5), "relative", 1.0)
    assert (c.ema_decay, c.ema_ramp, c.warmup * 200) == ((0.999, 0.9999), 0.5, 40)


def test_the_second_branch_has_the_size_of_the_first():
    with torch.device("meta"):
        model = HPM(HPM.Config())
    blocks = [sum(p.numel() for p in m.blocks.parameters()) for m in (model.decoder, model.predictor)]
    assert blocks[0] == blocks[1]
    assert len(build(predictor_depth=3).predictor.blocks) == 3


def test_the_absolute_loss_is_the_official_one():
    pred = VECTORS["bce_pred"].clone().requires_grad_(True)
    loss = absolute_ranking(pred, VECTORS["bce_target"])
    assert loss.item() == pytest.approx(VECTORS["absolute_loss"].item(), abs=1e-9)
    assert torch.allclose(torch.autograd.grad(loss, pred)[0], VECTORS["absolute_grad"], atol=1e-9)


def test_pair_accuracy():
    target = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 4.0]])
    assert pair_accuracy(target, target) == 1
    assert pair_accuracy(-target, target) == 0
    assert pair_accuracy(torch.zeros(2, 3), target) == 0.5
    assert pair_accuracy(torch.tensor([[1.0, 3.0, 2.0], [0.0, 9.0, 1.0]]), target).item() == pytest.approx(3 / 5)


# ---- loss


def test_the_loss_put_together_by_hand():
    model, x = build(), images()
    hidden = random_mask(4, 4, 0.75, generator=torch.Generator().manual_seed(1))
    z = model.encoder(x, hidden)
    tokens = model.decoder.tokens(z, hidden)
    each = (model.decoder.decode(tokens) - patchify(x, 4)).square().mean(-1)
    errors, guesses = each[hidden].view(4, 12), model.predictor(tokens)[hidden].view(4, 12)
    expected = errors.mean() + pairwise_ranking(guesses, errors)
    assert torch.allclose(model.masked_loss(x, hidden), expected, atol=1e-6)
    found = model.hidden_errors(x, hidden)
    assert torch.allclose(found[0], errors, atol=1e-6)
    assert torch.allclose(found[1], guesses, atol=1e-6)


def test_views_of_an_image_share_its_target(monkeypatch):
    model = build(mask="disjoint", target="teacher")
    x, made, make = model.normalised(images()), [], HPM.targets
    masks = model.mask(x, context().generator)
    expected = model.masked_loss(x.repeat(2, 1, 1, 1), masks)
    monkeypatch.setattr(HPM, "targets", lambda self, x: made.append(len(x)) or make(self, x))
    assert model.loss(batch(images()), context()).value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert model.evaluate([batch(images())])["masked_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert made == [4, 4]


def test_without_the_ranking_it_is_mae():
    hpm, mae, x = build(ranking_weight=0.0, norm_pix=True), build(MAE), images()
    for a, b in ((hpm.encoder, mae.encoder), (hpm.decoder, mae.decoder)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    hidden = random_mask(4, 4, 0.75, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(hpm.masked_loss(x, hidden), mae.masked_loss(x, hidden), atol=1e-6)


def test_the_ranking_moves_encoder_and_predictor_but_not_the_reconstructor():
    model, x = build(), images()
    hidden = random_mask(4, 4, 0.75, generator=torch.Generator().manual_seed(1))
    errors, guesses = model.hidden_errors(x, hidden)
    pairwise_ranking(guesses, errors).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"encoder.patch_embed.proj.weight", "decoder.mask_token", "predictor.head.weight"} <= moved
    assert not any(n.startswith(("decoder.blocks", "decoder.head", "teacher")) for n in moved)


def test_hidden_pixels_reach_the_guess_only_as_a_target():
    model, x = build(), images()
    hidden = random_mask(4, 4, 0.75, generator=torch.Generator().manual_seed(1))
    other = torch.where(upsample_mask(hidden, 4, 4), images(seed=1), x)
    assert torch.equal(model.hidden_errors(x, hidden)[1], model.hidden_errors(other, hidden)[1])
    assert not torch.equal(model.predicted_errors(x), model.predicted_errors(other))  # the teacher sees all


@pytest.mark.parametrize("ranking", ["relative", "absolute"])
@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.05, 1), (1.0, 16)])
def test_any_number_of_hidden_patches_is_finite(ranking, ratio, count):
    """One hidden patch makes no pair and has no variance: only its own error is left."""
    model = build(mask_ratio=ratio, ranking=ranking)
    loss = model.loss(batch(images()), context(5)).value
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    hidden = model.mask(model.normalised(images()), context().generator, 0.5)
    assert hidden.sum(1).tolist() == [count] * 4
    assert loss.isfinite()
    if count < 2:
        errors, _ = model.hidden_errors(model.normalised(images()), hidden)
        assert loss.item() == pytest.approx(errors.mean().item() if count else 0)


def test_the_loss_repeats_with_the_same_noise():
    model, x = build(), images()
    first, again = (model.loss(batch(x), context(8)).value for _ in range(2))
    assert torch.equal(first, again)


# ---- masks


def test_at_first_the_masks_are_maes_at_last_half_are_the_hardest():
    model, mae, x = build(image_size=32), build(MAE, image_size=32), images(size=32)

    def g():
        return torch.Generator().manual_seed(2)

    assert torch.equal(model.mask(x, g(), 0.0), mae.mask(x, g(), 0.0))
    assert torch.equal(model.mask(x, g(), 0.02), mae.mask(x, g(), 0.02))  # 48 * 0.01: none
    guess = model.predicted_errors(x)
    for progress, n_hard in ((0.5, 12), (1.0, 24)):
        hidden = model.mask(x, g(), progress)
        assert (hidden.sum(1) == 48).all()
        assert hidden[mask_from_scores(guess, n_hidden=n_hard)].all()
        assert not hidden[mask_from_scores(guess, n_hidden=48)].all()
    always = build(image_size=32, hard_share=(1.0, 1.0))
    assert torch.equal(always.mask(x, g(), 0.0), mask_from_scores(always.predicted_errors(x), ratio=0.75))
    never = build(image_size=32, hard_share=(0.0, 0.0))
    assert torch.equal(never.mask(x, g(), 1.0), mae.mask(x, g(), 1.0))


def test_the_teacher_sees_no_mask_token():
    model, x = build(), images()
    before = model.predicted_errors(x)
    with torch.no_grad():
        model.teacher.module["decoder"].mask_token.fill_(7.0)
    assert torch.equal(model.predicted_errors(x), before)


# ---- the teacher


def test_the_teacher_is_an_average_and_has_no_gradient():
    model, ctx, x = build(ema_decay=(0.5, 0.75), ema_ramp=0.5), context(), images()
    mean = {n: p.clone() for n, p in model.student().named_parameters()}
    for step in range(3):
        ctx.step = step
        one_step(model, ctx, x)
        d = 0.5 + 0.25 * min(1, step / 10 / 0.5)
        mean = {n: d * mean[n] + (1 - d) * p.detach() for n, p in model.student().named_parameters()}
    for n, p in model.teacher.module.named_parameters():
        assert not p.requires_grad
        assert torch.allclose(p, mean[n], atol=1e-6), n
    held = {id(p) for g in ctx.optimizers["net"].param_groups for p in g["params"]}
    assert held == {id(p) for p in model.student().parameters()}
    assert not model.train().teacher.training


def test_a_fresh_teacher_is_the_student_also_after_another_method():
    mae = build(MAE)
    with torch.no_grad():
        mae.encoder.norm.weight.mul_(2)
    model = HPM.init_from(build().config, mae)
    for a, b in zip(model.student().parameters(), model.teacher.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.encoder.norm.weight, mae.encoder.norm.weight)
    one_step(model, context(5), images())
    again = HPM.init_from(model.config, model)
    assert torch.equal(again.difficulty(images()), model.difficulty(images()))


# ---- training and use


@pytest.mark.parametrize("over", [{}, {"ranking": "absolute"}, {"target": "teacher", "norm_pix": True}], ids=str)
def test_training_on_photographs_lowers_the_loss_and_the_state_travels(over):
    model = build(steps=30, batch_size=32, base_lr=2e-2, **over)
    data, held_out = photo_crops(128, 16, generator=torch.Generator().manual_seed(0)), [batch(images(8))]
    start = model.evaluate([batch(data[:64])])
    Trainer(model, data, Options(device="cpu", workers=0)).train(show=False)
    end = model.evaluate([batch(data[:64])])
    assert end["reconstruction_loss"] < 0.97 * start["reconstruction_loss"]
    assert set(end) == {"masked_loss", "reconstruction_loss", "pair_accuracy"}
    again = HPM(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert again.teacher.updates == 30
    assert model.evaluate(held_out) == again.evaluate(held_out)
    x = images(2, size=24)
    assert torch.equal(model.encode(x), again.encode(x))
    assert torch.equal(model.difficulty(x), again.difficulty(x))
    assert capabilities(model).keys() == {"encode"}


def test_evaluation_repeats_and_weighs_batches_by_their_size():
    model, x = build(), images(6)
    assert model.evaluate([batch(x)]) == model.evaluate([batch(x)])
    assert model.evaluate([]) == {}
    found = model.evaluate([batch(x)])
    hidden = random_mask(6, 4, 0.75, generator=torch.Generator().manual_seed(0))
    assert found["masked_loss"] == pytest.approx(model.masked_loss(model.normalised(x), hidden).item(), rel=1e-5)
    assert 0 <= found["pair_accuracy"] <= 1


@pytest.mark.parametrize("mask", ["own", "hard", "semantic", "green"])
def test_evaluation_does_not_follow_the_teacher(mask):
    """Another teacher, the same student: the same masks, the same figures."""
    model, x = build(mask=mask), images()
    normal, g = model.normalised(x), lambda: torch.Generator().manual_seed(0)
    before, hidden = model.evaluate([batch(x)]), model.mask(normal, g())
    for p in model.teacher.module.parameters():
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(model.mask(normal, g()), hidden) == (mask in ("semantic", "green"))
    assert model.evaluate([batch(x)]) == before


def test_preview_shows_what_is_thought_hard():
    model = build(channels=1)
    x = images(channels=1, size=20)
    rows = model.preview(batch(x), torch.Generator().manual_seed(0))
    assert list(rows) == ["picture", "masked", "reconstruction", "difficulty"]
    assert all(r.shape == (4, 1, 16, 16) and r.min() >= 0 and r.max() <= 1 for r in rows.values())
    shown = patchify(rows["difficulty"], 4)
    assert (shown.amax(-1) == shown.amin(-1)).all()
    assert torch.equal(shown[..., 0].argsort(1), model.difficulty(x).argsort(1))


# ---- features as targets


def test_the_teachers_tokens_as_targets():
    model, x = build(target="teacher", norm_pix=True), images()
    hidden = random_mask(4, 4, 0.75, generator=torch.Generator().manual_seed(1))
    tokens = model.teacher.module["encoder"](x)[:, 1:]
    each = masked_patch_mse(model.predict_patches(x, hidden), tokens, hidden, reduction="none")
    assert torch.allclose(model.hidden_errors(x, hidden)[0], each[hidden].view(4, 12), atol=1e-6)
    assert not model.targets(x).requires_grad
    assert list(model.preview(batch(images(size=20)), torch.Generator())) == ["picture", "masked", "difficulty"]
    with pytest.raises(BadSetting, match="target=teacher features are predicted"):
        model.predict_image(x, hidden)


@pytest.fixture
def folder(tmp_path):
    """A model folder as timm writes it: a small ViT of 8-pixel patches, with other statistics than ImageNet's."""
    torch.manual_seed(1)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    vit = VisionTransformer(**arguments, num_classes=0).eval()
    cfg = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "num_classes": 0}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    return tmp_path, vit


@pytest.mark.parametrize("channels", [1, 3])
def test_a_named_vit_as_target(folder, channels):
    """Its own patch, size and statistics; not in the state; loaded at first use, which draws nothing."""
    path, vit = folder
    model, x = build(target=f"local-dir:{path}", norm_pix=True, channels=channels), images(channels=channels)
    assert model.decoder.head.out_features == 24
    assert not any("named" in name for name in model.state_dict())
    torch.manual_seed(7)
    targets, after = model.targets(model.normalised(x)), torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    larger = torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1), (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    normal = (larger - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / 0.2
    assert torch.allclose(targets, vit.forward_features(normal)[:, 1:], atol=1e-4)
    assert targets.shape == (4, 16, 24)
    Trainer(model, images(16, channels), Options(device="cpu", workers=0)).train(show=False)
    again = HPM(model.config)
    again.load_state_dict(model.state_dict())
    assert again.eval().evaluate([batch(x)]) == model.evaluate([batch(x)])


def test_targets_that_cannot_be():
    with pytest.raises(BadSetting, match="target=pixel: pixels, teacher, or a ViT"):
        build(target="pixel")
    with pytest.raises(BadSetting, match="resnet18 is a ResNet"):
        build(target="resnet18")
    with pytest.raises(BadSetting, match="1 or 3 channels"):
        build(target="vit_tiny_patch16_224", channels=2)


# ---- claims


def test_claim_of_the_hard_patches_in_small():
    """A tenth of the training shows the direction; an untrained predictor and random masks are not taken for it."""
    lab = Lab(0, budget=0.1)
    figures = hard_patches.run(lab)
    assert set(figures) == {
        "random masks", "hard masks", "masks by guesses at holes", "masks by contrast", "HPM", "untrained",
    }  # fmt: skip
    assert lab.pictures["difficulty"].shape == (8, 1, 8, 8)
    assert judge(hard_patches, [figures]).findings[0].verdict is Verdict.REPRODUCED
    assert figures["masks by guesses at holes"]["error"] > 1.05 * figures["random masks"]["error"]
    untrained = {**figures, "HPM": figures["untrained"]}
    assert judge(hard_patches, [untrained]).findings[0].verdict is Verdict.NOT_REPRODUCED
    swapped = {**figures, "hard masks": figures["random masks"]}
    assert judge(hard_patches, [swapped]).verdict is Verdict.NOT_REPRODUCED


def test_claim_of_few_labels_in_small():
    """A hundredth of the training cannot win; it must run, judge and leave its figures."""
    figures = few_labels.run(Lab(0, budget=0.01))
    assert set(figures) == {"untrained", "MAE", "HPM"}
    assert all(0 <= arm["accuracy"] <= 1 for arm in figures.values())
    assert judge(few_labels, [figures]).verdict is Verdict.INCONCLUSIVE


def test_the_predictor_gives_one_number_a_patch():
    predictor = LossPredictor(16, 2, 4, prefix=1)
    assert predictor(torch.randn(3, 10, 16)).shape == (3, 9)
