import copy
import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sfumato.claim import Verdict, judge
from sfumato.cli.export import export
from sfumato.data import digits, photo_crops
from sfumato.engine import Options, Run, Trainer
from sfumato.engine.lab import Lab
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.masks import upsample_mask
from sfumato.method import Batch, Context, capabilities
from sfumato.nn import densify, patchify
from sfumato.papers.masking.mae import MAE
from sfumato.papers.masking.spark import LightUNetDecoder, MaskFill, SparK, holes, sparse_against_dense
from sfumato.papers.optimization.classifier import Classifier

TINY = {"batch_size": 8, "steps": 3, "decoder_width": 16, "model_settings": {"widths": (4, 6, 8)}}


def build(**over):
    torch.manual_seed(0)
    return SparK(SparK.Config.small(**{**TINY, **over}))


def images(n=4, channels=3, size=32, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batch(x):
    return Batch(x, torch.arange(len(x)))


def generator():
    return torch.Generator().manual_seed(0)


def test_paper_defaults():
    c = SparK.Config()
    assert (c.model, c.mask_ratio, c.batch_size, c.betas, c.clip_norm) == ("resnet50", 0.6, 4096, (0.9, 0.95), 5.0)
    assert (c.weight_decay, c.weight_decay_end, c.drop_path, c.crop_scale) == (0.04, 0.2, 0.05, (0.67, 1.0))
    assert c.base_lr * c.batch_size / 256 == pytest.approx(3.2e-3)
    assert c.warmup * 1600 == pytest.approx(40)
    convnext = SparK.Config.convnext()
    assert (convnext.model, convnext.betas, convnext.drop_path) == ("convnext_small", (0.9, 0.999), 0.2)


def test_the_papers_networks():
    with torch.device("meta"):
        resnet, convnext = SparK(SparK.Config()), SparK(SparK.Config.convnext())
    assert resnet.encoder.widths == [256, 512, 1024, 2048]
    assert resnet.encoder.grid == convnext.encoder.grid == (7, 7)
    assert resnet.decoder.widths == [768, 384, 192, 96, 48, 24]
    assert [tuple(b.project.weight.shape) for b in resnet.bridges] == [
        (768, 2048, 1, 1), (384, 1024, 3, 3), (192, 512, 3, 3), (96, 256, 3, 3),
    ]  # fmt: skip
    assert isinstance(convnext.bridges[0].project, torch.nn.Identity)  # 768 channels already
    assert isinstance(convnext.bridges[0].norm, torch.nn.LayerNorm)
    assert resnet.packed
    assert convnext.packed


def test_the_mask_keeps_20_of_49_cells():
    model = build(image_size=56)
    hidden = model.mask(torch.zeros(3, 3, 56, 56), generator())
    assert hidden.shape == (3, 49)
    assert (~hidden).sum(1).tolist() == [20, 20, 20]
    assert not torch.equal(hidden[0], hidden[1])


def test_something_must_be_visible():
    with pytest.raises(BadSetting, match="hides all 1 cells of 32 pixels: make image_size larger than 32"):
        build(model="test_resnet", model_settings={})


@pytest.mark.parametrize("sparse", [True, False])
def test_the_loss_put_together_by_hand(sparse):
    """Normalised patches with the unbiased variance, hidden ones alone; maps filled, projected and added scale by scale."""
    model = build(sparse=sparse).double()
    x = model.normalised(images().double())
    hidden = model.mask(x, generator())
    visible = ~upsample_mask(hidden, (4, 4), 8)
    d = model.decoder
    if sparse:
        maps = model.encoder(x, hidden, packed=False)
    else:
        maps = densify(model.encoder.net)(x * visible)
    y = 0
    for bridge, m, block in zip(model.bridges, reversed(maps), d.blocks, strict=True):
        at = ~upsample_mask(hidden, (4, 4), m.shape[-1] // 4)
        rows = m.movedim(1, -1)[at.squeeze(1)] if sparse else m.movedim(1, -1)
        mean, var = rows.flatten(0, -2).mean(0), rows.flatten(0, -2).var(0, correction=0)
        norm = (m - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        y = block(y + bridge.project(torch.where(at, norm, bridge.fill.mask_token)))
    pred = patchify(d.project(y), 8)
    t = patchify(x, 8)
    t = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (pred - t).square().mean(-1)
    wanted = (error * hidden).sum() / hidden.sum()
    torch.testing.assert_close(model.masked_loss(x, hidden), wanted)


def test_packed_is_the_same_training():
    a, b = build(packed=False).double(), build(packed=True).double()
    x = a.normalised(images().double())
    hidden = a.mask(x, generator())
    losses = [m.masked_loss(x, hidden) for m in (a, b)]
    torch.testing.assert_close(*losses)
    for g, h in zip(*(torch.autograd.grad(v, list(m.parameters())) for v, m in zip(losses, (a, b))), strict=True):
        torch.testing.assert_close(g, h)
    assert (build().packed, build(image_size=64).packed, build(image_size=64, mask_ratio=0.1).packed) == (False, True, False)


@pytest.mark.parametrize("sparse", [True, False])
def test_hidden_pixels_reach_nothing_but_the_target(sparse):
    model = build(norm_pix=False, sparse=sparse)
    x = model.normalised(images())
    hidden = model.mask(x, generator())
    other = torch.where(upsample_mask(hidden, 4, 8), images(seed=1), x)
    assert torch.equal(model.predict_image(x, hidden), model.predict_image(other, hidden))


def test_the_loss_ignores_visible_patches_and_brightness():
    model, x = build().eval(), images()
    hidden = model.mask(x, generator())
    pred = torch.rand(4, 16, 192)
    model.predict_patches = lambda *_: pred
    wanted = model.masked_loss(x, hidden)
    shown = torch.where(upsample_mask(hidden, 4, 8), 3 * x - 1, torch.rand_like(x))  # a t + b where hidden
    assert model.masked_loss(shown, hidden).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_dense_network_smears_what_a_sparse_one_keeps_apart():
    model, x = build(), images()
    hidden = model.mask(x, generator())
    at = upsample_mask(hidden, 4, 1)
    assert (model.encoder(x, hidden)[-1].masked_select(at) == 0).all()
    assert (model.encoder(x * ~upsample_mask(hidden, 4, 8))[-1].masked_select(at) != 0).any()


def test_decoder_and_fill():
    decoder = LightUNetDecoder(8, 32, 2).eval()
    maps = [torch.rand(1, 32, 2, 2), torch.rand(1, 16, 4, 4)]
    x = decoder.blocks[1](decoder.blocks[0](maps[0]) + maps[1])
    torch.testing.assert_close(decoder(maps), decoder.project(decoder.blocks[2](x)))
    assert decoder(maps[:1]).shape == (1, 2, 16, 16)
    assert decoder.blocks[0][0].bias.abs().max() == 0
    with pytest.raises(BadSetting, match="GroupNorm, which has no sparse form"):
        SparK(SparK.Config.small(model="small"))
    with pytest.raises(BadSetting, match="a decoder of width 20 cannot be halved over a stride of 8"):
        LightUNetDecoder(8, 20)
    fill = MaskFill(100)
    assert 0.01 < fill.mask_token.std() < 0.02
    assert fill.mask_token.abs().max() <= 0.02
    hidden = torch.tensor([[[[True, False]]]])
    filled = fill(torch.ones(1, 100, 1, 2), hidden)
    assert torch.equal(filled[..., 0], fill.mask_token[..., 0])
    assert (filled[..., 1] == 1).all()


def test_schedules_and_groups():
    model = build(base_lr=1e-2, batch_size=256, warmup=0.2)
    ctx = Context(0, 10, 0, generator(), model.optimizers())
    groups, rates, decays = ctx.optimizers["net"].param_groups, [], []
    assert groups[0]["weight_decay"] == 0
    plain = {id(p) for p in groups[0]["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in plain) == (p.ndim == 1 or name.endswith("mask_token")), name
    for step in range(10):
        ctx.step = step
        next(model.steps(ctx))
        rates.append(groups[1]["lr"])
        decays.append(groups[1]["weight_decay"])
    assert rates[:3] == pytest.approx([5e-5, 1e-2 * (0.005 + 0.995 / 2), 1e-2])
    assert model.lr_factor(1.0) == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert decays[0] == pytest.approx(0.04)
    assert decays[5] == pytest.approx(0.12)
    assert model.weight_decay(1.0) == pytest.approx(0.2)
    assert groups[0]["weight_decay"] == 0


def test_training_lowers_the_loss_resumes_and_travels(tmp_path):
    data = photo_crops(32, 40, generator=generator())
    settings = {"steps": 12, "batch_size": 16, "base_lr": 0.4}

    def train(run, steps):
        model = build(**settings)
        start = model.evaluate([batch(data)])["masked_loss"]
        Trainer(model, data, Options(device="cpu", workers=0, save_every=6), steps=steps, run=run).train(show=False)
        return start, model

    run = Run.create(tmp_path, "spark")
    run.write_config({"slug": "spark"})
    start, model = train(run, 12)
    assert model.evaluate([batch(data)])["masked_loss"] < 0.97 * start
    (run.checkpoints / "step-12.safetensors").unlink()
    _, again = train(run, 12)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name
    x = images(2, size=50)
    assert torch.equal(model.encode(x), again.encode(x))
    assert model.encode(x).shape == (2, 8)
    assert capabilities(model).keys() == {"encode"}


def test_preview_keeps_what_was_visible():
    model = build().eval()
    rows = model.preview(batch(images(size=40)), generator())
    pixels = upsample_mask(model.mask(images(), generator()), 4, 8).expand(-1, 3, -1, -1)
    assert list(rows) == ["picture", "masked", "reconstruction"]
    assert torch.equal(rows["reconstruction"][~pixels], rows["picture"][~pixels])
    assert (rows["masked"][pixels] == 0.5).all()


def test_a_classifier_takes_the_backbone_and_timm_its_weights(tmp_path, monkeypatch):
    model = build(model="test_resnet", model_settings={}, image_size=64, decoder_width=32).eval()
    fine = Classifier.init_from(Classifier.Config.small(classes=3, optimizer="adamw"), model).eval()
    x = images(2, size=64)
    torch.testing.assert_close(fine.encode(x), model.encode(x))
    again = Classifier(Classifier.Config.model_validate(json.loads(fine.config.model_dump_json()))).eval()
    again.load_state_dict(fine.state_dict())
    assert torch.equal(again.predict(x), fine.predict(x))

    monkeypatch.setattr("sfumato.cli.export.load", lambda run: model)
    export(tmp_path, timm=tmp_path / "net.safetensors", weights=None, hub=None)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        theirs = timm.create_model(**json.loads(file.metadata()["timm"])).eval()
    theirs.load_state_dict(load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(theirs(model.normalised(x)), model.encode(x))


def test_starting_from_another_run():
    first = build()
    copied = SparK.init_from(SparK.Config.small(**TINY, scales=1), first)
    assert torch.equal(copied.encoder.eval().features(images()), first.encoder.eval().features(images()))
    with pytest.raises(BadCheckpoint, match="model_settings="):
        SparK.init_from(SparK.Config.small(), first)
    mae = MAE(MAE.Config.small(image_size=16, dim=16, depth=1, heads=2))
    with pytest.raises(BadCheckpoint, match="the run's encoder is a MaskedViTEncoder, this one is a MaskedConvEncoder"):
        SparK.init_from(first.config, mae)


# ---- claims


def test_claim_of_the_holes_holds_and_can_fail():
    lab = Lab(0)
    figures = holes.run(lab)
    assert judge(holes, [figures]).verdict is Verdict.REPRODUCED
    dense = {**figures["dense"], "share off 20/49": 1.0}
    assert judge(holes, [{**figures, "sparse": dense}]).verdict is Verdict.NOT_REPRODUCED
    tidy = {**copy.deepcopy(figures["dense"]), "mean off 0": 0.0, "variance off 1": 0.0}
    assert judge(holes, [{**figures, "dense": tidy}]).verdict is Verdict.NOT_REPRODUCED
    assert [c["arm"] for c in lab.curves] == ["dense", "sparse"]


def test_claim_of_the_representation_in_small(monkeypatch):
    train, test = digits(200, size=32)
    few = lambda size, seed: (train, Batch(test.x[:60], test.index[:60], test.label[:60]))  # noqa: E731
    monkeypatch.setattr("sfumato.data.digits", few)
    lab = Lab(0, budget=0.01)
    figures = sparse_against_dense.run(lab)
    assert set(figures) == {"untrained", "sparse", "dense", "single scale"}
    assert all(0.1 < v <= 1 for arm in figures.values() for v in arm.values())
    assert len({arm["linear probe"] for arm in figures.values()}) > 1
    assert lab.pictures["reconstruction"].shape == (8, 1, 32, 32)
    assert judge(sparse_against_dense, [figures]).verdict is Verdict.INCONCLUSIVE
    swapped = [{"sparse": {"linear probe": 0.5 + 0.01 * i}, "dense": {"linear probe": 0.9}} for i in range(5)]
    assert judge(sparse_against_dense, swapped).verdict is Verdict.NOT_REPRODUCED
