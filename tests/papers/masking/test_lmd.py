import copy
import math

import pytest
import torch
from timm.optim import Adan

from sfumato.claim import Verdict, judge
from sfumato.data import LatentCache, photo_crops
from sfumato.engine import Options, Run, Trainer, load
from sfumato.engine.lab import Lab
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.losses import masked_patch_mse
from sfumato.masks import count_hidden, random_mask, ratio_schedule, upsample_mask
from sfumato.method import Batch, Context, capabilities
from sfumato.nn import DiffusersVAE, PatchPCA, patchify
from sfumato.papers.masking.lmd import LMD, growing, operations, speed
from sfumato.papers.masking.mae import MAE
from sfumato.papers.optimization.classifier import Classifier

TINY = {"image_size": 16, "reduction": 2, "patch": 2, "dim": 16, "depth": 1, "heads": 2, "batch_size": 8, "steps": 6}
TINY |= {"decoder_dim": 16, "decoder_heads": 2}
CPU = Options(device="cpu", workers=0)


def build(**over):
    torch.manual_seed(0)
    return LMD(LMD.Config.small(**{**TINY, **over}))


def crops(n=16, size=16, seed=0):
    return photo_crops(n, size, generator=torch.Generator().manual_seed(seed))


def batch(x):
    return Batch(x, torch.arange(len(x)))


def new_run(root):
    run = Run.create(root, "lmd")
    run.write_config({"slug": "lmd"})
    return run


def context(step=0, total=12):
    return Context(step, total, 0, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An AutoencoderKL, not trained: twofold reduction, four channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_paper_defaults():
    c = LMD.Config()
    assert (c.codec, c.reduction, c.patch, c.image_size, c.norm_pix) == ("vae", 8, 4, 224, True)
    assert (c.start_ratio, c.mask_ratio, c.schedule, c.knee) == (0.15, 0.75, "cosine", 2 / 3)
    assert (c.optimizer, c.betas, c.clip_norm, c.weight_decay) == ("adan", (0.98, 0.92, 0.90), 10.0, 0.05)
    assert (c.base_lr, c.batch_size, c.min_lr) == (3e-4, 64, 1e-8)
    with torch.device("meta"):
        lmd, mae = LMD(c), MAE(MAE.Config())
    assert lmd.latent_shape == (4, 28, 28)
    assert lmd.encoder.grid == (7, 7)
    assert lmd.encoder.patch_embed.proj.weight[0].numel() == 64
    assert sum(p.numel() for p in lmd.encoder.blocks.parameters()) == sum(p.numel() for p in mae.encoder.blocks.parameters())


def test_the_ratio_is_of_the_step_alone_and_the_same_for_all():
    model = build(image_size=32, schedule="linear", start_ratio=0.25, mask_ratio=0.75, knee=0.5)
    hidden = [model.own_mask(torch.zeros(5, 12, 16, 16), torch.Generator().manual_seed(0), p).sum(1) for p in (0, 0.25, 0.5, 1)]
    assert [h.tolist() for h in hidden] == [[n] * 5 for n in (16, 32, 48, 48)]
    seen = []
    trainer = Trainer(build(), crops(), CPU)
    inner = trainer.method.loss
    trainer.method.loss = lambda b, ctx: seen.append(inner(b, ctx)) or seen[-1]
    trainer.train(show=False)
    ratios = [float(loss.logs["ratio"]) for loss in seen]
    assert ratios[0] == 3 / 16
    assert ratios == sorted(ratios)
    assert ratios[-1] == 0.75


def test_pixel_space_with_a_constant_ratio_is_mae():
    """The identity codec: the same weights, masks and numbers as MAE's."""
    small = {k: v for k, v in TINY.items() if k != "reduction"}
    model = build(codec="identity", patch=4, start_ratio=0.75, norm_pix=True)
    torch.manual_seed(0)
    mae = MAE(MAE.Config.small(**{**small, "patch": 4}))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mae.parameters(), strict=True))
    x = crops(4)
    ours, theirs = model.loss(batch(x), context(3)), mae.loss(batch(x), context(3))
    assert torch.equal(ours.value, theirs.value)
    assert torch.equal(model.encode(crops(2, 40)), mae.encode(crops(2, 40)))
    assert model.evaluate([batch(x)]) == mae.evaluate([batch(x)])
    for name, row in mae.preview(batch(x), torch.Generator().manual_seed(0)).items():
        assert torch.allclose(model.preview(batch(x), torch.Generator().manual_seed(0))[name], row, atol=1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_put_together_by_hand(norm_pix):
    model, x = build(norm_pix=norm_pix), crops(8)
    model.survey([batch(x)])
    loss = model.loss(batch(x), context(11))
    z = model.codec.encode(x) / model.codec.variance.mean().sqrt()
    assert z.square().mean() == pytest.approx(1, abs=0.05)  # mean variance 1
    hidden = random_mask(8, 4, 0.75, generator=torch.Generator().manual_seed(0))
    predicted = model.decoder(model.encoder(z, hidden), hidden)
    assert torch.allclose(loss.value, masked_patch_mse(predicted, patchify(z, 2), hidden, norm=norm_pix), atol=1e-6)
    assert loss.weight == 8


def test_hidden_latents_reach_nothing_but_the_target():
    model = build().eval()
    z, other = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    z, other = z.repeat(1, 1, 1, 1), other
    hidden = random_mask(4, 4, 0.5, generator=torch.Generator().manual_seed(0))
    changed = torch.where(upsample_mask(hidden, 4, 2), other, z)
    assert torch.equal(model.predict_image(z, hidden), model.predict_image(changed, hidden))


def test_the_pca_is_fitted_once_on_the_training_pictures():
    model, x = build(), crops(32)
    Trainer(model, x, CPU, steps=1)
    expected = PatchPCA(2, 3, channels=3).fit(x)
    assert torch.allclose(model.codec.basis, expected.basis, atol=1e-4)
    known = model.codec.basis.clone()
    model.survey([batch(crops(32, seed=1))])
    assert torch.equal(model.codec.basis, known)  # a known codec stays
    full = build(latent_channels=12)
    full.survey([batch(x)])
    assert torch.allclose(full.decoded(full.normalised(x)), x, atol=1e-5)  # all components: exact


def test_a_perfect_prediction_reconstructs_what_the_codec_keeps():
    for norm_pix in (True, False):
        model, x = build(norm_pix=norm_pix), crops(4)
        model.survey([batch(crops(32))])
        z = model.normalised(x)
        tokens = patchify(z, 2)
        if norm_pix:
            tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
        model.predict_patches = lambda z, hidden, tokens=tokens: tokens
        hidden = random_mask(4, 4, 0.75, generator=torch.Generator().manual_seed(0))
        kept = model.codec.decode(model.codec.encode(x)).clamp(0, 1)
        assert torch.allclose(model.reconstruct(x, hidden), kept, atol=1e-5)
        if not norm_pix:
            assert model.evaluate([batch(x)])["masked_loss"] < 1e-10


def test_training_lowers_the_loss_and_the_state_travels(tmp_path):
    model, data, unseen = build(steps=40, batch_size=32, base_lr=2e-2), crops(128), crops(8, 24, seed=1)
    run = new_run(tmp_path)
    trainer = Trainer(model, data, CPU, run=run)
    start = model.evaluate([batch(unseen)])
    trainer.train(show=False)
    end = model.evaluate([batch(unseen)])
    assert end["masked_loss"] < 0.9 * start["masked_loss"]
    assert end["hidden_psnr"] > start["hidden_psnr"] + 1
    again = load(run.path, kind=LMD)
    assert again.evaluate([batch(unseen)]) == end
    assert torch.equal(again.encode(unseen), model.encode(unseen))
    assert capabilities(again).keys() == {"encode"}


def test_a_run_outlives_the_folder_of_its_vae(folder, tmp_path):
    moved, settings = tmp_path / "vae", {"codec": "vae", "norm_pix": True, "latent_channels": 4}
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    model, x = build(vae=str(moved), **settings), crops(8)
    before = {k: v.clone() for k, v in DiffusersVAE(moved).vae.state_dict().items()}
    run = new_run(tmp_path)
    Trainer(model, x, CPU, steps=2, run=run).train(show=False)
    assert all(torch.equal(v, before[k]) for k, v in model.codec.vae.state_dict().items())  # frozen
    for file in moved.iterdir():
        file.unlink()
    again = load(run.path, kind=LMD)
    assert not again.codec.vae.training
    assert not any(p.requires_grad for p in again.codec.parameters())
    assert torch.equal(again.encode(x), model.encode(x))
    rows = again.preview(batch(x), torch.Generator().manual_seed(0))
    assert torch.equal(rows["decoded"], again.codec.decode(again.codec.encode(x)).clamp(0, 1))
    resumed = Trainer(build(vae=str(moved), **settings), x, CPU, steps=2, run=Run.open(run.path))
    assert torch.equal(resumed.method.encode(x), model.encode(x))
    assert LMD.init_from(model.config, again).codec.vae is not again.codec.vae


def test_latents_of_the_vae_are_its_mean_unscaled(folder):
    model, x = build(codec="vae", vae=str(folder), latent_channels=4), crops(2)
    model.survey([])
    assert torch.equal(model.normalised(x), model.codec.vae.encode(2 * x - 1).latent_dist.mode())
    pixels = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.encode(pixels).sum(), pixels)
    assert gradient.abs().max() > 0
    assert not model.normalised(x).requires_grad
    trained = {id(p) for group in model.optimizers()["net"].param_groups for p in group["params"]}
    assert trained.isdisjoint(id(p) for p in model.codec.parameters())


def test_bad_vaes_are_refused_before_training(folder, tmp_path):
    with pytest.raises(BadSetting, match="set vae=FOLDER"):
        Trainer(build(codec="vae"), crops(), CPU)
    with pytest.raises(BadCheckpoint, match="no VAE at"):
        Trainer(build(codec="vae", vae=str(tmp_path)), crops(), CPU)
    with pytest.raises(BadSetting, match="set reduction=2 and latent_channels=4"):
        Trainer(build(codec="vae", vae=str(folder), latent_channels=8), crops(), CPU)


@pytest.mark.parametrize("codec", ["pca", "vae"])
def test_a_cache_trains_as_its_pictures_do(codec, folder, tmp_path):
    """With whole pictures, one view and full precision, both give the same weights."""
    settings = {"codec": codec, "crop_scale": None, "flip": False}
    settings |= {"vae": str(folder), "latent_channels": 4} if codec == "vae" else {}
    model, x = build(**settings), crops(16)
    model.survey([batch(x)])
    cached = copy.deepcopy(model)
    cache = LatentCache(cached.codec, x, tmp_path / "latents.safetensors", dtype=torch.float32)
    Trainer(model, x, CPU, steps=3).train(show=False)
    Trainer(cached, cache, CPU, steps=3).train(show=False)
    for a, b in zip(model.parameters(), cached.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    rows = cached.preview(batch(cache.tensors().x[:4]), torch.Generator().manual_seed(0))
    assert torch.equal(rows["picture"], rows["decoded"])
    loss = model.evaluate([batch(x)])["masked_loss"]
    assert cached.evaluate([batch(cache.tensors().x)])["masked_loss"] == pytest.approx(loss, rel=1e-3)


def test_views_of_a_cache_are_not_augmented_again():
    model, x = build(), crops(12, 24)
    model.survey([batch(x)])
    cache = LatentCache(model.codec, x, views=2, augment=model.augment())
    assert cache.facts.size == (8, 8)
    latent = cache[3].x
    assert model.augment()(latent) is latent
    assert model.augment()(x[0]).shape == (3, 16, 16)
    Trainer(model, cache, CPU, steps=2).train(show=False)


def test_the_pca_looks_at_no_more_pictures_than_it_says(monkeypatch):
    monkeypatch.setattr("sfumato.papers.masking.latents.PCA_PICTURES", 20)
    model, x, read = build(), crops(40), []

    def batches():
        for part in x.split(8):
            read.append(len(part))
            yield batch(part)

    model.survey(batches())
    assert read == [8, 8, 8]
    assert torch.allclose(model.codec.basis, PatchPCA(2, 3, channels=3).fit(x[:24]).basis, atol=1e-4)


def test_latents_without_their_pca_are_refused():
    cache = LatentCache(PatchPCA(2, 3, channels=3), crops())
    with pytest.raises(BadData, match="of a PCA that is not known here"):
        Trainer(build(), cache, CPU)
    with pytest.raises(BadData, match="give survey"):
        build().survey([])


def test_a_new_run_keeps_the_codec_of_the_old_one():
    old = build()
    old.survey([batch(crops(32))])
    new = LMD.init_from(old.config, old)
    new.survey([batch(crops(32, seed=1))])
    assert torch.equal(new.codec.basis, old.codec.basis)
    other = LMD.init_from(LMD.Config.small(**{**TINY, "reduction": 1, "image_size": 8, "latent_channels": 3}), old)
    assert not other.surveyed
    mae = MAE(MAE.Config.small(**{k: v for k, v in TINY.items() if k != "reduction"}))
    assert not LMD.init_from(old.config, mae).surveyed


def test_a_classifier_of_pictures_does_not_start_from_an_encoder_of_latents():
    with pytest.raises(BadCheckpoint, match="sees their latents: use its features"):
        Classifier.init_from(Classifier.Config.small(classes=10), build())
    pixels = build(codec="identity", patch=4)
    assert Classifier.init_from(Classifier.Config.small(classes=10), pixels).config.image_size == 16


def test_adan_is_the_papers():
    model = build(optimizer="adan", betas=(0.98, 0.92, 0.90), batch_size=64, base_lr=3e-4, min_lr=1e-8, warmup=0.25)
    ctx = context()
    ctx.optimizers = model.optimizers()
    (adan,) = ctx.optimizers.values()
    assert isinstance(adan, Adan)
    assert [g["weight_decay"] for g in adan.param_groups] == [0.0, 0.05]
    plain = {id(p) for p in adan.param_groups[0]["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in plain) == (p.ndim == 1 or name.endswith("mask_token")), name
    rates = []
    for ctx.step in range(12):
        next(model.steps(ctx))
        rates.append(adan.param_groups[1]["lr"])
    assert rates[3] == pytest.approx(3e-4 / 4)
    assert model.lr_factor(1.0) * 3e-4 / 4 == pytest.approx(1e-8)
    Trainer(model, crops(64), CPU, steps=2).train(show=False)


def test_settings_and_pictures_that_do_not_fit():
    with pytest.raises(BadSetting, match="Adan takes three"):
        build(optimizer="adan")
    with pytest.raises(BadSetting, match="no multiple of 4, the 2 latents of 2 pixels"):
        build(image_size=18)
    with pytest.raises(BadSetting, match="leave it out"):
        build(codec="identity", latent_channels=4)
    with pytest.raises(BadData, match="pictures are 20 x 20, the network takes 16 x 16, or latents 3 x 8 x 8"):
        build().loss(batch(torch.rand(2, 3, 20, 20)), context())


def by_hand(c, tokens, kept, numbers):
    """Multiply-adds of a forward pass, from the sizes alone: 12 D² a token and 2 n² D a block, and the linear maps."""

    def blocks(depth, dim, n):
        return depth * (12 * n * dim**2 + 2 * n**2 * dim)

    encoder = kept * numbers * c.dim + blocks(c.depth, c.dim, kept + 1)
    ends = (kept + 1) * c.dim * c.decoder_dim + tokens * c.decoder_dim * numbers
    return (encoder + ends + blocks(c.decoder_depth, c.decoder_dim, tokens + 1)) / 1e9


def test_the_count_of_the_operations_can_fail(monkeypatch):
    """Counted on small networks; at the paper's size, which is slow to run, by hand."""
    published = MAE.Config(), LMD.Config()
    for kind in (MAE, LMD):
        tiny = kind.Config(dim=96, depth=2, heads=2, decoder_dim=48, decoder_depth=1, decoder_heads=2)
        monkeypatch.setattr(kind, "Config", lambda tiny=tiny: tiny)
    figures = operations.run(Lab(0, budget=0.25))
    counts = {arm: f["forward, GMAC"] for arm, f in figures.items()}
    assert counts["MAE"] == pytest.approx(by_hand(MAE.Config(), 196, 49, 768), rel=1e-9)
    kept = [49 - count_hidden(49, ratio_schedule(p)) for p in (1 / 6, 1 / 2, 5 / 6)]
    expected = [by_hand(LMD.Config(), 49, n, 64) for n in (*kept, 12)]
    assert counts["cached latents"] == pytest.approx(sum(expected[:3]) / 3, rel=1e-9)
    assert counts["cached latents, 0.75 throughout"] == pytest.approx(expected[3], rel=1e-9)
    vae = counts["VAE in every step"] - counts["cached latents"]
    assert vae == pytest.approx(104.2, abs=0.5)  # Stable Diffusion's encoder
    assert judge(operations, [figures]).verdict is Verdict.NOT_REPRODUCED  # a network this narrow saves more
    mae = by_hand(published[0], 196, 49, 768)
    lmd = sum(by_hand(published[1], 49, 49 - count_hidden(49, ratio_schedule((k + 0.5) / 300)), 64) for k in range(300)) / 300
    assert mae / lmd == pytest.approx(2.95, abs=0.1)
    told = {"MAE": mae, "cached latents": lmd, "VAE in every step": lmd + vae}
    assert judge(operations, [{k: {"forward, GMAC": v} for k, v in told.items()}]).verdict is Verdict.REPRODUCED


def test_the_claims_of_the_training_in_small():
    lab = Lab(0, budget=0.01)
    figures = speed.run(lab)
    arms, metric = ("pixels", "latents", "large patches"), "log2 of the seconds to pixel MAE's PSNR"
    assert {metric, "hidden PSNR", "accuracy", "seconds"} <= set.intersection(*(set(figures[a]) for a in arms))
    assert figures["pixels, two points less"]["accuracy"] == pytest.approx(figures["pixels"]["accuracy"] - 0.02)
    assert [figures[a]["tokens"] for a in arms] == [64, 16, 16]
    target = figures["pixels"]["hidden PSNR"]  # the first crossing, for every arm alike
    for arm, curve in zip(arms, lab.curves, strict=True):
        reached = [s for s, psnr in zip(curve["x"], curve["y"], strict=True) if psnr >= target]
        seconds = reached[0] if reached else figures["pixels"]["seconds"]
        assert figures[arm][metric] == pytest.approx(math.log2(seconds)), arm
    assert (
        figures["pixels"]["forward, MMAC"]
        > 2 * figures["latents"]["forward, MMAC"]
        > 2 * figures["large patches"]["forward, MMAC"]
    )
    assert figures["codec alone"]["hidden PSNR"] > figures["pixels"]["hidden PSNR"] + 5
    assert [c["arm"] for c in lab.curves] == list(arms)
    five = [figures] * 5
    slow = [{**figures, "latents": {**figures["latents"], metric: figures["pixels"][metric] - 0.1 * s}} for s in range(5)]
    assert judge(speed, slow).findings[0].verdict is Verdict.NOT_REPRODUCED
    assert judge(speed, five).findings[0].margin == pytest.approx(1.585, abs=1e-3)
    figures = growing.run(Lab(0, budget=0.01))
    assert figures["fixed"]["steps"] > figures["growing"]["steps"] == 6
    assert judge(growing, [figures]).verdict is Verdict.INCONCLUSIVE
