from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.data import digits, photo_crops
from sfumato.engine import Options, Trainer
from sfumato.engine.lab import Lab
from sfumato.method import Batch, Context
from sfumato.nn import run_blocks
from sfumato.papers.masking import mto
from sfumato.papers.masking.mae import MAE
from sfumato.papers.masking.mto import MTO, mask_token_singularity, recalibrate_attention, relative_auc
from sfumato.papers.masking.simmim import SimMIM

VECTORS = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "mto.npz").items()}
TINY = {"image_size": 16, "dim": 16, "depth": 2, "heads": 2, "batch_size": 8, "steps": 3}
DECODER = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
NOTHING = mto.NOTHING


def build(base="simmim", **over):
    torch.manual_seed(0)
    return MTO(MTO.Config.small(**{**TINY, **DECODER, "base": base, **over}))


def images(n=4, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def masked(model, seed=0):
    x = model.normalised(images())
    return x, model.mask(x, torch.Generator().manual_seed(seed))


def test_singularity_and_its_gradient_are_the_vectors():
    layers = [z.clone().requires_grad_() for z in VECTORS["layer_tokens"]]
    loss = mask_token_singularity(layers, VECTORS["mask"], decay=VECTORS["decay"].item(), tau=VECTORS["temperature"].item())
    assert loss.item() == pytest.approx(VECTORS["loss_singularity"].item(), abs=1e-9)
    loss.backward()
    assert torch.allclose(torch.stack([z.grad for z in layers]), VECTORS["grad_singularity"], atol=1e-9)


def test_recalibrated_attention_is_the_vectors():
    logits, mask = VECTORS["attn_logits"], VECTORS["mask"]
    weights = (logits + recalibrate_attention(logits, mask, keep=VECTORS["keep_fraction"].item())).softmax(-1)
    assert torch.allclose(weights, VECTORS["attn_recalibrated"], atol=1e-9)


@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize(("keep", "kept"), [(0.0, 0), (0.3, 2), (0.5, 3), (1.0, 5)])
def test_visible_queries_keep_a_share_of_the_hidden_keys(keep, kept, at_random):
    g = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(2, 3, 12, 12, generator=g), torch.stack([torch.randperm(12, generator=g) < 5 for _ in range(2)])
    bias = recalibrate_attention(logits, mask, keep=keep, at_random=at_random, generator=g)
    seen = bias == 0
    visible = (~mask)[:, None, :, None].expand_as(bias)
    assert set(seen.sum(-1)[visible[..., 0]].tolist()) == {7 + kept}
    assert seen[~visible].all()  # hidden queries see all
    assert seen[(~mask)[:, None, None].expand_as(bias)].all()  # visible keys are seen by all
    if not at_random and kept:
        b, h, i, j = (visible & ~seen).nonzero().unbind(1) if kept < 5 else ([], [], [], [])
        for one in zip(b, h, i, j, strict=True):
            left = seen[one[:3]] & mask[one[0]]
            assert logits[one] <= logits[one[:3]][left].min()


@pytest.mark.parametrize("base", ["simmim", "mae"])
@pytest.mark.parametrize(("depth", "early"), [(2, 1), (3, 2), (4, 2)])
def test_only_the_first_half_of_the_blocks_is_recalibrated(base, depth, early):
    """Block by block: the later ones are the plain blocks; in the earlier ones visible queries see half of the hidden keys."""
    model = build(base, depth=depth, decoder_depth=depth)
    x, hidden = masked(model)
    seen = model.watched(x, hidden)
    bias = model.encoder.embed(x, hidden, mask_token=model.base.mask_token)[1] if base == "simmim" else None
    blocks = (model.encoder if base == "simmim" else model.base.decoder).blocks
    for number in range(depth):
        plain, _, _ = run_blocks(blocks[number : number + 1], seen.layers[number], bias=bias)
        assert torch.allclose(plain, seen.layers[number + 1], atol=1e-5) == (number >= early)
    assert len(seen.maps) == early
    for weights in seen.maps:
        kept = ((weights > 0) & seen.hidden[:, None, None]).sum(-1)
        n_hidden = int(hidden[0].sum())
        for queries, count in ((~seen.hidden, n_hidden // 2), (seen.hidden, n_hidden)):
            assert (kept[queries[:, None].expand_as(kept)] == count).all()


def test_random_exclusion_keeps_as_many_keys_but_others():
    """Drawn from torch's generator, anew at every step: as many keys as the weakest leave, and not always the same."""
    ours, control = build(depth=4), build(depth=4, exclusion="random")
    x, hidden = masked(ours)
    torch.manual_seed(0)
    weakest, first, again = (m.watched(x, hidden).maps[0] > 0 for m in (ours, control, control))
    torch.manual_seed(0)
    assert torch.equal(first, control.watched(x, hidden).maps[0] > 0)
    assert not torch.equal(first, again)
    assert not torch.equal(first, weakest)
    assert torch.equal(first.sum(-1), weakest.sum(-1))
    assert control.masked_loss(x, hidden) != ours.masked_loss(x, hidden)


def test_nothing_hidden_nothing_recalibrated():
    logits = torch.randn(1, 2, 4, 4)
    assert (recalibrate_attention(logits, torch.zeros(1, 4, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize(("base", "kind"), [("simmim", SimMIM), ("mae", MAE)])
def test_without_its_terms_it_is_the_base(base, kind):
    model = build(base, **NOTHING)
    torch.manual_seed(0)
    given = model.config.model_dump()
    plain = kind(kind.Config(**{name: given[name] for name in kind.Config.model_fields if name in given}))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    x, hidden = masked(model)
    assert torch.equal(hidden, plain.mask(x, torch.Generator().manual_seed(0)))
    assert torch.allclose(model.masked_loss(x, hidden), plain.masked_loss(x, hidden), atol=1e-6)
    assert torch.allclose(model.predict_image(x, hidden), plain.predict_image(x, hidden), atol=1e-5)
    assert [model.lr_factor(p) for p in (0, 0.5, 0.9)] == [plain.lr_factor(p) for p in (0, 0.5, 0.9)]


def test_each_base_has_its_own_recipe():
    simmim, mae = MTO.Config(), MTO.Config.mae()
    for ours, theirs in ((simmim, SimMIM.Config()), (mae, MAE.Config())):
        given = ours.model_dump()
        assert {k: given[k] for k in theirs.model_dump()} == theirs.model_dump()
    assert (mae.base, mae.mask_ratio, mae.base_lr, mae.clip_norm, mae.betas) == ("mae", 0.75, 1.5e-4, None, (0.9, 0.95))
    assert (mae.singularity, mae.keep, MTO.Config.mae(dim=1024).dim) == (simmim.singularity, simmim.keep, 1024)
    with torch.device("meta"):
        model = MTO(mae)
    assert model.base.config == MAE.Config()


@pytest.mark.parametrize("base", ["simmim", "mae"])
def test_the_loss_is_the_sum_of_its_terms(base):
    model = build(base, singularity=0.3, sparsity=0.2, leak=0.1)
    x, hidden = masked(model)
    seen = model.watched(x, hidden)
    terms = model.penalties(seen, hidden)
    bare = build(base, **{**NOTHING, "keep": 0.5})
    expected = bare.masked_loss(x, hidden) + 0.3 * terms["singularity"] + 0.2 * terms["sparsity"] + 0.1 * terms["leak"]
    assert torch.allclose(model.masked_loss(x, hidden), expected, atol=1e-6)
    assert all(0 <= t.item() <= 1 for t in terms.values())
    blocks = model.base.encoder.blocks if base == "simmim" else model.base.decoder.blocks
    assert len(seen.layers) == len(blocks) + 1
    assert len(seen.maps) == (len(blocks) + 1) // 2
    assert not torch.allclose(bare.masked_loss(x, hidden), build(base, **NOTHING).masked_loss(x, hidden))


@pytest.mark.parametrize("term", ["singularity", "sparsity", "leak"])
def test_a_term_without_weight_is_not_computed(term):
    """The others are as they were beside it; where nothing reads the attention no map is kept."""
    whole, without = build(), build(**{term: 0.0})
    x, hidden = masked(whole)
    terms, left = (m.penalties(m.watched(x, hidden), hidden) for m in (whole, without))
    assert left.keys() == terms.keys() - {term}
    assert all(torch.allclose(left[name], terms[name]) for name in left)
    assert len(whole.watched(x, hidden).maps) == 1
    assert build(sparsity=0.0, leak=0.0).watched(x, hidden).maps == []


@pytest.mark.parametrize("base", ["simmim", "mae"])
def test_attention_is_fused_where_nobody_reads_or_changes_it(base, monkeypatch):
    calls, fused = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))

    def count(**over):
        model = build(base, **{**NOTHING, **over})
        x, hidden = masked(model)
        calls.clear()
        model.masked_loss(x, hidden)
        return len(calls)

    blocks = count()
    assert count(singularity=0.1) == blocks
    assert count(keep=0.5) == count(sparsity=0.1) == count(leak=0.1) == blocks - 1  # of two blocks the first
    assert blocks == (2 if base == "simmim" else 4)


def test_the_singularity_reaches_mask_token_and_embedding_and_no_last_layer():
    model = build()
    x, hidden = masked(model)
    model.penalties(model.watched(x, hidden), hidden)["singularity"].backward()
    assert model.base.mask_token.grad.abs().sum() > 0
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert model.encoder.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert model.encoder.blocks[-1].mlp.fc1.weight.grad is None


@pytest.mark.parametrize("base", ["simmim", "mae"])
def test_train_save_load_and_use(base, tmp_path):
    model = build(base)
    data = photo_crops(16, 20, generator=torch.Generator().manual_seed(0))
    Trainer(model, data, Options(device="cpu", workers=0)).train(show=False)
    again = build(base)
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 30, 20)
    assert torch.equal(again.eval().encode(x), model.eval().encode(x))
    batch = Batch(images(), torch.arange(4))
    assert set(model.preview(batch, torch.Generator().manual_seed(0))) == {"picture", "masked", "reconstruction"}
    assert np.isfinite(model.evaluate([batch])["masked_loss"])
    assert [h.shape for h in model.heterogeneity_profile(*masked(model))] == [(4,)] * 3


@pytest.mark.parametrize(("base", "kind"), [("simmim", SimMIM), ("mae", MAE)])
def test_a_run_of_the_base_starts_all_of_it_and_the_other_way_round(base, kind):
    def plain(seed):
        torch.manual_seed(seed)
        fields = {k: v for k, v in {**TINY, **DECODER}.items() if k in kind.Config.model_fields}
        return kind(kind.Config.small(**fields))

    ours, theirs = build(base), plain(1)
    started = MTO.init_from(ours.config, theirs)
    assert started.base.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in started.base.state_dict().items())
    back = kind.init_from(plain(2).config, ours)
    assert all(torch.equal(v, ours.base.state_dict()[k]) for k, v in back.state_dict().items())
    again = MTO.init_from(ours.config, ours)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())


def test_another_base_gives_its_encoder():
    other = build("simmim", positions="sincos", dim=20)
    started = MTO.init_from(build("mae", dim=20).config, other)
    assert torch.equal(started.encode(images()), other.encode(images()))


def test_a_loss_may_be_asked_again():
    model = build(exclusion="random")
    batch = Batch(images(), torch.arange(4))
    ask = lambda: model.loss(batch, Context(0, 10, 0, torch.Generator().manual_seed(0))).value  # noqa: E731
    torch.manual_seed(1)
    first = ask()
    torch.manual_seed(1)
    assert torch.equal(first, ask())


def test_relative_area():
    assert relative_auc([1, 2, 3], [1, 2, 3], 0.5) == 1
    assert relative_auc([2.0, 2.0], [1.0, 1.0], 0.0, [10, 30]) == 2
    assert np.isnan(relative_auc([1.0, 1.0], [1.0, 1.0], 1.0))


def test_half_the_steps_in_small(monkeypatch):
    """A hundredth of the training cannot win; every arm must be trained, looked at and judged against SimMIM."""
    few = [Batch(d.x[:200], d.index[:200], d.label[:200]) for d in digits(seed=0)]
    monkeypatch.setattr("sfumato.data.digits", lambda seed: few)
    lab = Lab(0, budget=0.01)
    figures = mto.half_the_steps.run(lab)
    halves = {"SimMIM, half the steps", "MTO, half the steps"}
    assert set(figures) == {"untrained", *mto.ARMS, *halves}
    assert all(np.isfinite(v) for arm in figures.values() for v in arm.values())
    assert all(0 <= arm[name] <= 1 for arm in figures.values() for name in ("accuracy", "linear probe"))
    for measure in ("RAUC of the error", "RAUC of the probe"):
        assert figures["SimMIM"][measure] == 1
    assert len({figures[arm]["hidden error"] for arm in mto.ARMS}) == len(mto.ARMS)
    assert len(lab.curves) == 2 * len(mto.ARMS)
    assert all(c["x"] == [0, *mto.MARKS] and len(c["y"]) == 5 for c in lab.curves)
    assert {c["y"][0] for c in lab.curves if c["ylabel"] == "accuracy of a linear probe"} == {
        figures["untrained"]["linear probe"]
    }
    assert len(judge(mto.half_the_steps, [figures]).findings) == 2


def test_the_claims_can_be_won_and_lost():
    won = {
        "SimMIM": {"accuracy": 0.5, "RAUC of the error": 1.0},
        "MTO, half the steps": {"accuracy": 0.6},
        "MTO": {"RAUC of the error": 1.2},
    }
    lost = {
        "SimMIM": {"accuracy": 0.6, "RAUC of the error": 1.0},
        "MTO, half the steps": {"accuracy": 0.5},
        "MTO": {"RAUC of the error": 0.9},
    }
    assert judge(mto.half_the_steps, [won] * 5).verdict is Verdict.REPRODUCED
    assert judge(mto.half_the_steps, [lost] * 5).verdict is Verdict.NOT_REPRODUCED


def test_the_profile_in_small():
    """A fiftieth of the training: the arms must differ."""
    figures = mto.profile.run(Lab(0, budget=0.02))
    assert figures["SimMIM"] != figures["singularity alone"]
    assert all(0 <= v <= 1 for arm in figures.values() for v in arm.values())
