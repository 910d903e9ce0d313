from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from sfumato.claim import Verdict, judge
from sfumato.data import Facts, photo_crops
from sfumato.engine import Options, Run, Trainer, build, load
from sfumato.engine.lab import Lab
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.losses import feature_distill, relation_kl, value_relation_kl
from sfumato.masks import take_tokens, token_redundancy
from sfumato.method import Batch, Context, capabilities
from sfumato.nn import FrozenViT, MaskedViTEncoder, capture_qkv, regroup_heads
from sfumato.papers.masking.hybrid_distill import (
    HybridDistill,
    attention_of,
    two_teachers,
)
from sfumato.papers.masking.mae import MAE
from sfumato.papers.optimization.classifier import Classifier

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "hybrid-distill.npz").items()}
SHAPE = {"image_size": 16, "patch": 4, "dim": 16, "depth": 3, "heads": 2}
TINY = {**SHAPE, "batch_size": 8, "steps": 3}


def mae(seed=1, **over):
    torch.manual_seed(seed)
    return MAE(MAE.Config.small(**{**TINY, "decoder_dim": 16, "decoder_heads": 2, **over})).eval()


def build_student(relation=None, feature=None, **over):
    torch.manual_seed(0)
    config = HybridDistill.Config.small(**{**TINY, **over})
    return HybridDistill(config, relation_teacher=relation or mae(), feature_teacher=feature or mae(2, dim=24, depth=1))


def images(n=4, channels=3, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def nothing_hidden(n=4, length=16):
    return torch.zeros(n, length, dtype=torch.bool)


def train(model, data, run=None):
    return Trainer(model, data, Options(device="cpu", workers=0), run=run).train(show=False)


def test_paper_defaults():
    c = HybridDistill.Config()
    assert (c.relation_weight, c.feature_weight, c.smooth_l1_beta, c.mask_ratio) == (1, 1, 2, 0)
    with torch.device("meta"):
        model = HybridDistill(c)
    assert (model.relation_layers, model.drop_layers) == ((5, 6, 7, 8, 9, 10), (0, 4, 8))
    assert 3 * int(196 * c.drop_share) == 96  # about half of 196 patches
    model = build_student(depth=2, relation=mae(depth=2), relation_layers=(1,), drop_layers=(1,))
    assert (model.relation_layers, model.drop_layers) == ((1,), (1,))
    assert HybridDistill(HybridDistill.Config.small(depth=1)).relation_layers == (0,)
    with pytest.raises(BadSetting, match=r"no layer 3 .* 0 to 2"):
        build_student(relation_layers=(3,))


def test_without_dropping_the_student_is_the_plain_vit():
    model = build_student(drop_share=0.0).eval()
    x = model.normalised(images())
    student = model.student(x, nothing_hidden())
    assert torch.equal(student.patches, model.encoder(x)[:, 1:])
    assert student.ids.tolist() == [list(range(16))] * 4
    hidden = model.own_mask(x, torch.Generator().manual_seed(0))
    assert not hidden.any()
    half = torch.arange(16).expand(4, -1) % 2 == 0
    assert torch.allclose(model.student(x, half).patches, model.encoder(x, half)[:, 1:], atol=1e-6)


def test_tokens_are_dropped_before_each_third():
    model = build_student().eval()
    student = model.student(model.normalised(images()), nothing_hidden())
    assert [ids.shape[1] for _, ids in student.relations.values()] == [14, 12]  # layers 0 and 1; a sixth of 16 is 2
    assert student.ids.shape == (4, 10)
    earlier = [ids for _, ids in student.relations.values()]
    for before, after in ((earlier[0], earlier[1]), (earlier[1], student.ids)):
        assert (after.diff(dim=1) > 0).all()
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(after, before, strict=True))
    everything = build_student(drop_share=0.9).eval()
    assert everything.student(everything.normalised(images()), nothing_hidden()).ids.shape == (4, 1)
    hidden = torch.arange(16).expand(4, -1) != 5
    assert everything.student(everything.normalised(images()), hidden).ids.tolist() == [[5]] * 4


def test_first_dropped_are_the_most_redundant_of_what_the_blocks_start_from():
    model = build_student(drop_layers=(0,)).eval()
    x = model.normalised(images())
    score = token_redundancy(model.encoder.tokens(x)[:, 1:])
    student = model.student(x, nothing_hidden())
    for kept, s in zip(student.ids, score, strict=True):
        gone = [i for i in range(16) if i not in kept.tolist()]
        assert s[gone].min() >= s[kept].max()


def test_losses_put_together_by_hand():
    """Dropping after the relation layers: whole relations; features of what is left."""
    relation, feature = mae(heads=4), mae(2, dim=24, depth=1)
    model = build_student(relation, feature, relation_layers=(1,), drop_layers=(2,)).eval()
    x = model.normalised(images())
    found = model.distillation(x, nothing_hidden())
    with capture_qkv(model.encoder, [1]) as own, capture_qkv(relation.encoder, [1]) as theirs:
        model.encoder(x)
        relation.encoder(x)
    q, k, v = (regroup_heads(t, 4) for t in own[1])
    expected = relation_kl(q, k, theirs[1].q, theirs[1].k) + value_relation_kl(v, theirs[1].v)
    assert torch.allclose(found[0], expected, atol=1e-5)
    student = model.student(x, nothing_hidden())
    target = take_tokens(feature.encoder(x)[:, 1:], student.ids)
    assert torch.allclose(found[1], feature_distill(model.projector(student.patches), target), atol=1e-5)
    loss = model.loss(Batch(images(), torch.arange(4)), Context(0, 10, 0, torch.Generator().manual_seed(0)))
    assert torch.allclose(loss.value, found[0] + found[1], atol=1e-6)
    assert loss.weight == 4


def test_dropped_tokens_leave_the_teachers_relations_before_the_softmax():
    """A student with the teacher's own weights: where both lose the same tokens in the first layer, they relate alike there."""
    teacher = mae()
    model = build_student(teacher, relation_layers=(0,), drop_layers=(0,), feature_weight=0.0).eval()
    model.encoder.load_state_dict(teacher.encoder.state_dict())
    relation, feature = model.distillation(model.normalised(images()), nothing_hidden())
    assert relation.item() == pytest.approx(0, abs=1e-6)
    assert feature == 0
    other = build_student(mae(5), relation_layers=(0,), drop_layers=(0,), feature_weight=0.0).eval()
    assert other.distillation(other.normalised(images()), nothing_hidden())[0] > 1e-4


def test_only_the_student_learns():
    model = build_student().train()
    assert not any(m.training for m in model.teachers.modules() if m is not model.teachers)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, photo_crops(16, 20, generator=torch.Generator().manual_seed(0)))
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("teachers."))
    assert not torch.equal(after["projector.weight"], before["projector.weight"])
    assert not torch.equal(after["encoder.blocks.1.attn.qkv.weight"], before["encoder.blocks.1.attn.qkv.weight"])


def test_training_brings_both_losses_down():
    model = build_student(steps=30, batch_size=16, base_lr=4e-2)
    data = photo_crops(128, 16, generator=torch.Generator().manual_seed(0))
    held_out = Batch(data[:64], torch.arange(64))
    start = model.eval().evaluate([held_out])
    train(model, data)
    end = model.evaluate([held_out])
    assert end["relation_loss"] < 0.9 * start["relation_loss"]
    assert end["feature_loss"] < 0.9 * start["feature_loss"]
    assert model.evaluate([held_out]) == end
    assert model.evaluate([]) == {}


def test_preview_greys_what_is_dropped():
    rows = build_student().preview(Batch(images(size=20), torch.arange(4)), torch.Generator().manual_seed(0))
    assert list(rows) == ["picture", "kept"]
    grey = (rows["kept"] == 0.5).all(1)
    assert (grey.float().mean((1, 2)) == 6 / 16).all()
    assert torch.equal(rows["kept"].movedim(1, -1)[~grey], rows["picture"].movedim(1, -1)[~grey])


def test_encode_and_export():
    model = build_student().eval()
    assert model.encode(images(size=23)).shape == (4, 16)
    arguments, state = model.timm_weights()
    vit = VisionTransformer(**arguments).eval()
    vit.load_state_dict(state)
    assert torch.allclose(vit(model.normalised(images())), model.encode(images()), atol=1e-5)
    assert capabilities(model).keys() == {"encode"}


# ---- teachers


def test_teachers_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(BadSetting, match=r"relation teacher does not fit: it has depth 1, the student 3, dim 24, the student 16"):
        build_student(mae(dim=24, depth=1))
    with pytest.raises(BadSetting, match=r"feature teacher does not fit: it has grid \(2, 2\), the student \(4, 4\)"):
        build_student(feature=mae(patch=8))
    with pytest.raises(BadSetting, match="class token False, the student True"):
        build_student(MaskedViTEncoder(16, 4, 3, dim=16, depth=3, heads=2, cls=False))
    with pytest.raises(BadSetting, match="takes 1 channels, the pictures have 3"):
        build_student(feature=mae(channels=1))
    grey = build_student(channels=1)  # a colour teacher of grey pictures
    assert grey.distillation(grey.normalised(images(channels=1)), nothing_hidden())[1] > 0
    with pytest.raises(BadSetting, match="relation_layers is empty: name a layer, or set relation_weight=0"):
        build_student(relation_layers=())
    assert build_student(relation_layers=(), relation_weight=0.0).relation_layers == ()
    alone = HybridDistill(HybridDistill.Config.small(**TINY))
    with pytest.raises(BadSetting, match="relation_teacher=MODULE"):
        alone.distillation(images(), nothing_hidden())


def test_it_has_no_errors_of_pixels_to_mask_by():
    with pytest.raises(BadSetting, match="mask=hard asks for errors of pixels"):
        build_student(mask="hard", mask_ratio=0.5).mask(images(), torch.Generator())


def test_a_weight_of_nought_needs_no_teacher():
    model = build(HybridDistill, Facts(8, 3), preset="small", settings={**TINY, "relation_weight": 0, "feature_weight": 0})
    assert not model.teachers
    assert [float(v) for v in model.distillation(images(), nothing_hidden())] == [0, 0]


# ---- runs


def run_of(tmp_path, slug, method, data):
    run = Run.create(tmp_path, slug)
    run.write_config({"slug": slug, "settings": method.config.model_dump(mode="json")})
    train(method, data, run)
    return run


def test_teachers_named_by_runs_travel_in_the_checkpoint(tmp_path):
    data = photo_crops(16, 16, generator=torch.Generator().manual_seed(0))
    teachers = {
        name: run_of(tmp_path, "mae", mae(seed), data) for seed, name in enumerate(("relation_teacher", "feature_teacher"))
    }
    named = {name: str(run.path) for name, run in teachers.items()}
    model = build(HybridDistill, Facts(16, 3), preset="small", settings={**TINY, **named})
    assert torch.equal(model.teachers["feature"](images()), FrozenViT.of(load(named["feature_teacher"]))(images()))
    run = run_of(tmp_path, "hybrid-distill", model, data)
    for teacher in teachers.values():
        teacher.path.rename(teacher.path.with_name(f"moved-{teacher.path.name}"))
    again = load(run.path)
    assert torch.equal(again.encode(images()), model.encode(images()))
    held_out = [Batch(images(), torch.arange(4))]
    assert again.evaluate(held_out) == model.evaluate(held_out)
    resumed = Trainer(again, data, Options(device="cpu", workers=0), steps=5, run=run)
    assert resumed.ctx.step == 3


def test_a_new_run_needs_teachers_with_weights():
    for settings in ({}, {"relation_teacher_settings": FrozenViT.of(mae()).settings}):
        with pytest.raises(BadSetting, match="relation_teacher is not named: say relation_teacher=MAE_RUN"):
            build(HybridDistill, Facts(8, 3), preset="small", settings={**TINY, **settings})


def test_starting_from_another_run():
    first = HybridDistill.Config.small(**TINY)
    from_mae = HybridDistill.init_from(first, mae())
    assert torch.equal(from_mae.encoder(images()), mae().encoder(images()))
    with pytest.raises(BadSetting, match="not named"):
        from_mae.adopt(None)
    old = build_student()
    new = HybridDistill.init_from(first, old)
    new.adopt(None)  # the old run's teachers
    assert new.state_dict().keys() == old.state_dict().keys()
    assert all(torch.equal(v, old.state_dict()[k]) for k, v in new.state_dict().items())
    tuned = Classifier.init_from(Classifier.Config.small(classes=3, channels=3), old).eval()
    assert torch.allclose(tuned.encode(images()), old.eval().encode(images()), atol=1e-5)
    with pytest.raises(BadCheckpoint, match="dim=16"):
        HybridDistill.init_from(HybridDistill.Config.small(**{**TINY, "dim": 32}), mae())


# ---- the claim


def test_attention_of_a_model_is_measured_head_by_head():
    model = mae()
    distance, nmi = attention_of(model, images())
    assert distance.shape == (3, 2)
    assert nmi.shape == (3,)
    assert ((nmi > 0) & (nmi < 1)).all()
    with torch.no_grad():
        model.encoder.blocks[1].attn.qkv.weight[:16].zero_()  # no query asks for anything: all attend alike
        model.encoder.blocks[1].attn.qkv.bias[:16].zero_()
    assert attention_of(model, images())[1][1].item() == pytest.approx(0, abs=1e-3)


def test_the_claim_in_small():
    """A hundredth of the training decides nothing; it must run, judge and leave its figures."""
    lab = Lab(0, budget=0.01)
    figures = two_teachers.run(lab)
    assert {"hybrid", "features only", "relations only", "MAE teacher", "supervised teacher", "untrained"} < set(figures)
    assert all(-0.02 <= f["probe"] <= 1.03 for f in figures.values() if "probe" in f)
    assert figures["hybrid"]["NMI"] != figures["untrained"]["NMI"]
    assert figures["1.5 times features only"]["NMI"] == pytest.approx(1.5 * figures["features only"]["NMI"])
    assert [c["arm"] for c in lab.curves] == [
        "supervised teacher", "MAE teacher", "untrained", "features only", "relations only", "hybrid",
    ]  # fmt: skip
    assert len(judge(two_teachers, [figures]).findings) == 5
    good = {**figures, "hybrid": {**figures["hybrid"], "probe": 2.0, "NMI": 2.0, "layers": 1}}
    assert judge(two_teachers, [good] * 5).verdict is Verdict.REPRODUCED
    bad = {**good, "hybrid": {**good["hybrid"], "NMI": figures["features only"]["NMI"]}}
    assert judge(two_teachers, [bad] * 5).verdict is Verdict.NOT_REPRODUCED
