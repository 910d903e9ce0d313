import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato import catalogue
from sfumato.claim import Verdict, judge
from sfumato.cli.apply import apply
from sfumato.data import Batch, box_rows, pad_boxes, perspective_scenes, write_image
from sfumato.engine import Options, Run, Trainer, load
from sfumato.engine.lab import Lab
from sfumato.errors import BadData, BadSetting
from sfumato.masks import mask_from_scores
from sfumato.method import Context, capabilities
from sfumato.papers.masking.masked_object_modeling import (
    MoM,
    MoMHead,
    ObjectSetAttention,
    ValueClippedAdamW,
    cover,
    masked_object,
    object_cells,
    object_pixels,
    object_weights,
    occlusion,
    reconstruction,
    whole_objects,
)

V = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[2] / "vectors" / "masked-object-modeling.npz").items()}
FRAMES = perspective_scenes(8, generator=torch.Generator().manual_seed(0))


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def build(**over):
    torch.manual_seed(0)
    return MoM(MoM.Config.small(**{"dim": 16, "decoder_dim": 16, "roi_dim": 8, "head_dim": 8, "steps": 3, **over}))


def context(step=0, total=10):
    return Context(step, total, 0, g())


# the auxiliary loss


def official():
    """Mask and predictions of all cells, as the official code drew them."""
    hidden = mask_from_scores(V["mask_noise"], ratio=V["mask_ratio"].item(), largest=False, rule="hide_floor")
    pred = torch.zeros(4, 16, 75)
    for index, values in ((V["masked_idx"], V["pred"]), (V["visible_idx"], V["pred_visible"])):
        pred.scatter_(1, index[..., None].expand(-1, -1, 75), values)
    return pred, hidden


def test_official_loss_and_mask():
    pred, hidden = official()
    assert torch.equal(hidden, torch.zeros(4, 16, dtype=torch.bool).scatter(1, V["masked_idx"], True))
    settings = {"weights": V["weights"]}
    assert masked_object(pred, V["crops"], hidden, 4, **settings).item() == pytest.approx(V["mom_loss"].item(), rel=1e-5)
    visible = 1e-3 * masked_object(pred, V["crops"], ~hidden, 4, **settings).item()
    assert visible == pytest.approx(V["mom_loss_visible"].item(), rel=1e-5)
    normed = masked_object(pred, V["crops"], hidden, 4, norm_pix=True, **settings).item()
    assert normed == pytest.approx(V["mom_loss_normpix"].item(), rel=1e-5)


def test_official_weights():
    side = torch.where(V["big_enough"], 30.0, 10.0)
    rows = torch.stack((torch.zeros(4), torch.zeros(4), torch.zeros(4), side, torch.full((4,), 40.0)), 1)
    assert torch.equal(object_weights(V["crops"], rows), V["weights"])
    softer = object_weights(V["crops"], rows, weight_dark=0.5, weight_small=0.25)
    assert softer.tolist() == [0.5, 1, 1, 0.25]
    degenerate = rows.clone()
    degenerate[1, 3] = 0.5
    assert object_weights(V["crops"], degenerate, min_box=0, min_brightness=0).tolist() == [1, 0, 1, 1]


def test_cells_are_those_of_the_crop():
    crops = torch.rand(2, 3, 8, 12, generator=g())
    cells = object_cells(crops, (4, 3))
    assert cells.shape == (2, 12, 3 * 2 * 4)
    assert torch.equal(cells[1, 2 * 3 + 1], crops[1, :, 4:6, 4:8].flatten())
    assert torch.equal(object_pixels(cells, (4, 3), (8, 12)), crops)
    with pytest.raises(BadData, match="multiples"):
        object_cells(crops, (3, 3))


def test_loss_of_known_predictions():
    crops, hidden = torch.rand(3, 3, 8, 8, generator=g(), dtype=torch.float64), torch.rand(3, 16, generator=g()) < 0.5
    cells = object_cells(crops, 4)
    assert masked_object(cells, crops, hidden, 4) == 0
    means = cells.mean(-1, keepdim=True).expand_as(cells)
    expected = cells.var(-1, unbiased=False)[hidden].mean()
    torch.testing.assert_close(masked_object(means, crops, hidden, 4), expected)
    assert masked_object(means, crops, torch.zeros_like(hidden), 4) == 0  # an empty set
    assert masked_object(means, torch.ones_like(crops), hidden, 4, norm_pix=True).isfinite()


def test_objects_without_weight_have_no_loss_and_no_gradient():
    crops = torch.rand(3, 3, 8, 8, generator=g())
    pred = torch.rand(3, 16, 12, generator=g(1), requires_grad=True)
    hidden = torch.ones(3, 16, dtype=torch.bool)
    (grad,) = torch.autograd.grad(masked_object(pred, crops, hidden, 4, weights=torch.tensor([0.0, 1.0, 0.0])), pred)
    assert (grad[[0, 2]] == 0).all()
    assert (grad[1] != 0).all()
    assert masked_object(pred, crops, hidden, 4, weights=torch.zeros(3)) == 0


# the head


def head(**over):
    torch.manual_seed(0)
    autoencoder = {"encoder_depth": 1, "encoder_heads": 2, "decoder_depth": 1, "decoder_heads": 2}
    settings = {"dim": 16, "grid": 4, "crop": (16, 16), "hidden_dim": 8, "weighing": {"min_box": 1}, "autoencoder": autoencoder}
    return MoMHead(nn.Conv2d(3, 8, 3, 4, 1), 8, 4, **{**settings, **over})


def test_the_head_on_a_persons_own_network():
    mine, x = head(), FRAMES.x
    objects = mine(x, FRAMES.boxes, generator=g())
    count = int(FRAMES.boxes.isfinite().all(-1).sum())
    assert objects.features.shape == (count, 16)
    assert (objects.hidden.sum(1) == 8).all()
    assert len(objects.hidden.unique(dim=0)) > count // 2  # masks differ between objects
    objects.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine.parameters())
    assert mine.backbone.weight.grad.abs().sum() > 0  # the user's network learns from it
    again = mine(x, [b[b.isfinite().all(-1)] for b in FRAMES.boxes], generator=g())
    assert torch.equal(again.loss, objects.loss)
    at_rest = mine.eval()(x, FRAMES.boxes)
    assert at_rest.hidden is None
    assert at_rest.loss == 0
    assert torch.equal(at_rest.features, mine(x, FRAMES.boxes).features)


def test_a_ratio_that_hides_nothing_gives_no_loss():
    objects = head(mask_ratio=0.01)(FRAMES.x, FRAMES.boxes)
    assert not objects.hidden.any()
    assert objects.loss == 0


def test_half_of_64_tokens():
    hidden = head(grid=8).draw_mask(100, generator=g())
    assert (hidden.sum(1) == 32).all()
    assert torch.equal(hidden, head(grid=8).draw_mask(100, generator=g()))


def test_what_the_head_refuses():
    with pytest.raises(BadData, match="stride 8"):
        MoMHead(nn.Conv2d(3, 8, 3, 4, 1), 8, 8, dim=24)(FRAMES.x, FRAMES.boxes)
    with pytest.raises(BadData, match="features="):
        MoMHead(None, 8, 4, dim=24)(FRAMES.x, FRAMES.boxes)
    with pytest.raises(BadSetting, match="no multiple of the grid"):
        MoMHead(None, 8, 4, dim=24, crop=(10, 16))


# the attention between objects


def test_attention_keeps_frames_apart_and_does_not_mind_the_order():
    torch.manual_seed(0)
    attention, x = ObjectSetAttention(16).double(), torch.randn(6, 16, dtype=torch.float64)
    frame = torch.tensor([0, 0, 0, 2, 2, 5])
    out = attention(x, frame)
    torch.testing.assert_close(out[:3], attention(x[:3], frame[:3]))
    torch.testing.assert_close(out[5:], attention(x[5:], frame[5:]))
    order = torch.tensor([2, 4, 0, 5, 3, 1])
    torch.testing.assert_close(attention(x[order], frame[order]), out[order])
    assert not torch.allclose(out[:2], attention(x[:2], frame[:2]))  # they do look at each other
    assert attention(x[:0], frame[:0]).shape == (0, 16)


def test_the_second_sum_adds_the_input():
    torch.manual_seed(0)
    attention, x = ObjectSetAttention(16), torch.randn(3, 16)
    with torch.no_grad():
        attention.feed[2].weight.zero_()
        attention.feed[2].bias.zero_()
    torch.testing.assert_close(attention(x, torch.zeros(3)), nn.functional.layer_norm(x, (16,)))


# the method


def test_paper_defaults():
    c = MoM.Config()
    assert (c.backbone, c.lr, c.weight_decay, c.alpha, c.crop, c.min_box) == ("convnext_base", 5e-5, 2e-5, 20, (120, 120), 25)
    assert (c.grid, c.dim, c.encoder_depth, c.mask_ratio, c.clip_value, c.use_centers) == (8, 768, 6, 0.5, 1.0, True)
    assert (MoM.Config.motsynth().crop, MoM.Config.motsynth().clip_value) == ((128, 64), 2.0)
    assert MoM.Config.nuscenes().distance_loss == "gaussian"


def test_schedules():
    paper = MoM.__new__(MoM)
    nn.Module.__init__(paper)
    paper.config = MoM.Config(restarts=4)
    assert [paper.lr_factor(k / 4) for k in range(4)] == [1] * 4
    assert paper.lr_factor(1 / 8) == pytest.approx((1 + 0.02) / 2)
    assert paper.lr_factor(0.2499) == pytest.approx(0.02, abs=1e-4)  # 1e-6 / 5e-5
    model, batch = build(distance_warmup=(0.2, 0.4), alpha=0.0, mask_ratio=0.0), FRAMES
    full = model.loss(batch, context(9)).value
    for step, share in ((0, 0), (2, 0), (3, 0.5), (4, 1)):
        torch.testing.assert_close(model.loss(batch, context(step)).value, share * full)


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"distance_loss": "gaussian", "output": "linear"},
        {"distance_loss": "laplace", "alpha": 0.0},
        {"use_centers": True, "flip": True, "jitter": "iou", "norm_pix": True, "visible_weight": 0.1},
        {"mask_ratio": 0.0, "attention_heads": 0, "box_geometry": False, "jitter": "scale"},
    ],
)
def test_it_trains_and_predicts(over):
    model = Trainer(build(**over), FRAMES, Options(device="cpu", workers=0)).train(show=False)
    metres = model.predict_objects(FRAMES.x, FRAMES.boxes)
    assert torch.equal(metres.isfinite(), FRAMES.boxes.isfinite().all(-1))
    figures = model.evaluate([FRAMES])
    assert all(math.isfinite(v) for v in figures.values())
    assert ("reconstruction_error" in figures) == bool(model.config.alpha and model.config.mask_ratio)
    shown = model.preview(FRAMES, g())
    assert all(v.min() >= 0 and v.max() <= 1 for v in shown.values())


def test_prediction_is_deterministic_and_leaves_the_decoder_alone():
    model = build(alpha=0.0)
    value, _, logs = model.loss(FRAMES, context())
    value.backward()
    decoder = [p for n, p in model.named_parameters() if ".decoder" in n or "mask_token" in n or "autoencoder.head" in n]
    assert decoder
    assert all(p.grad is None for p in decoder)
    assert logs["reconstruction"] == 0
    model.eval()
    with torch.no_grad():
        first, again = (model.predict_objects(FRAMES.x, FRAMES.boxes).nan_to_num(0) for _ in range(2))
        assert torch.equal(first, again)


def test_batches_do_not_change_predictions():
    model = build().eval()
    with torch.no_grad():
        together = model.predict_objects(FRAMES.x, FRAMES.boxes)
        for i in range(4):
            boxes = FRAMES.boxes[i][FRAMES.boxes[i].isfinite().all(-1)]
            alone = model.predict_objects(FRAMES.x[i : i + 1], [boxes])[0]
            torch.testing.assert_close(alone, together[i][together[i].isfinite()], atol=1e-5, rtol=1e-5)
            turned = model.predict_objects(FRAMES.x[i : i + 1], [boxes.flip(0)])[0]
            torch.testing.assert_close(turned.flip(0), alone, atol=1e-5, rtol=1e-5)
        assert model.predict_objects(FRAMES.x[:1], [torch.empty(0, 4)]).shape == (1, 0)


def test_flipping_moves_boxes_with_the_frame():
    model = build(flip=True)
    x, boxes, target = model._moved(FRAMES, g())
    moved = (x != FRAMES.x).flatten(1).any(1)
    assert moved.sum() in range(1, 8)
    torch.testing.assert_close(boxes[~moved], FRAMES.boxes[~moved], equal_nan=True)
    from sfumato.data import resized_crops

    before, after = (resized_crops(v, b, (8, 8)) for v, b in ((FRAMES.x, FRAMES.boxes), (x, boxes)))
    turned = moved[box_rows(boxes)[:, 0].long()]
    torch.testing.assert_close(after[turned], before[turned].flip(-1), atol=1e-4, rtol=0)
    assert target is FRAMES.target


def test_objects_of_unknown_distance_are_still_reconstructed():
    unknown = Batch(FRAMES.x, FRAMES.index, target=torch.full_like(FRAMES.target, torch.nan), boxes=FRAMES.boxes)
    value, _, logs = build().loss(unknown, context())
    assert logs["distance"] == 0
    assert value == 10 * logs["reconstruction"]
    assert value > 0
    value.backward()
    assert list(build().evaluate([unknown])) == ["reconstruction_error", "mean_color_error"]


def test_frames_without_objects():
    none = Batch(FRAMES.x, FRAMES.index, target=torch.full((8, 0, 2), torch.nan), boxes=torch.empty(8, 0, 4))
    value, weight, _ = build().loss(none, context())
    value.backward()
    assert (value, weight) == (0, 1)


def test_gaussian_is_best_at_the_squared_error():
    model, y = build(distance_loss="gaussian"), torch.tensor([10.0])
    s = torch.linspace(0, 4, 4001)
    values = torch.stack([model.distance_criterion(torch.tensor([[7.0, v]]), y) for v in s])
    assert s[values.argmin()].exp().item() == pytest.approx(9, rel=5e-3)
    assert model.distance_criterion(torch.tensor([[7.0, 1e4]]), y).isfinite()  # the log-variance is clamped


def test_gradients_are_clipped_by_value_inside_the_closure():
    p = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = ValueClippedAdamW([p], clip=0.5, lr=0.1, weight_decay=0.0)

    def closure():
        p.grad = torch.tensor([3.0, -0.25])
        return torch.tensor(1.0)

    assert optimizer.step(closure) == 1
    assert p.grad.tolist() == [0.5, -0.25]


def test_what_is_refused():
    with pytest.raises(BadData, match=r"kitti:FOLDER"):
        build().loss(Batch(FRAMES.x, FRAMES.index, target=FRAMES.target), context())
    with pytest.raises(BadData, match="target with every box"):
        build().loss(Batch(FRAMES.x, FRAMES.index, boxes=FRAMES.boxes), context())
    from sfumato.data import Facts
    from sfumato.engine.loading import build as build_method

    with pytest.raises(BadData, match="kitti:FOLDER"):
        build_method(MoM, Facts(3, 3, fields=("x", "index", "target")), preset="small")


def test_saved_loaded_and_applied(tmp_path):
    run = Run.create(tmp_path, "masked-object-modeling")
    run.write_config({"slug": "masked-object-modeling"})
    model = Trainer(build(), FRAMES, Options(device="cpu", workers=0), run=run).train(show=False)
    again = load(run.path)
    with torch.no_grad():
        expected = model.predict_objects(FRAMES.x, FRAMES.boxes)
        assert torch.equal(again.predict_objects(FRAMES.x, FRAMES.boxes).nan_to_num(0), expected.nan_to_num(0))
    assert list(capabilities(again)) == ["predict-objects"]
    frames = tmp_path / "frames"
    for part in ("image_2", "label_2"):
        (frames / part).mkdir(parents=True)
    write_image(frames / "image_2" / "a.png", FRAMES.x[0])
    boxes = pad_boxes([FRAMES.boxes[0][FRAMES.boxes[0].isfinite().all(-1)]])[0]
    lines = ["Car 0 0 0 {} {} {} {} 0 0 0 0 0 -1000 0".format(*b.tolist()) for b in boxes]
    (frames / "label_2" / "a.txt").write_text("\n".join(lines))
    apply(run.path, [frames], tmp_path / "o.csv", verb=None, device="cpu")
    table = (tmp_path / "o.csv").read_text().splitlines()
    assert table[0] == "name,x1,y1,x2,y2,value"
    assert len(table) == 1 + len(boxes)
    assert float(table[1].split(",")[-1]) == pytest.approx(expected[0][expected[0].isfinite()][0].item(), rel=2e-2)
    with pytest.raises(BadSetting, match="predict-objects"):
        apply(run.path, [frames], tmp_path / "o.csv", verb="restore", device="cpu")


def test_the_catalogue_knows_it():
    assert catalogue.load_method("masked-object-modeling") is MoM
    assert set(catalogue.load_claim("masked-object-modeling")) == {"occlusion", "reconstruction", "whole_objects"}


# the claims


def test_covering_hides_a_share_of_every_box():
    x = torch.zeros(4, 3, 64, 64)
    boxes = torch.tensor([10.0, 20.0, 30.0, 50.0]).expand(4, 6, 4).contiguous()
    boxes[:, 1:] = torch.nan
    covered = cover(x, boxes, 0.4, generator=g())
    inside = covered[:, 0, 20:50, 10:30] == 0.5
    assert (inside.float().mean((1, 2)) - 0.4).abs().max() < 1e-6
    assert torch.equal(covered[:, 0].sum((1, 2)), inside.sum((1, 2)) * 0.5)


def test_counting_whole_objects():
    figures = [whole_objects.run(Lab(seed, budget=0.25)) for seed in (0, 1)]
    assert judge(whole_objects, figures).verdict is Verdict.REPRODUCED
    swapped = [{"frame masks": f["object masks"], "object masks": f["frame masks"]} for f in figures]
    assert judge(whole_objects, swapped).verdict is Verdict.NOT_REPRODUCED


def test_claims_in_small():
    figures = occlusion.run(Lab(0, budget=0.005))
    assert set(figures) == {"base", "mask only", "MoM"}
    assert figures["base"]["occluded AbsRel, base = 1"] == 1
    assert figures["MoM"] != figures["mask only"] != figures["base"]
    assert judge(occlusion, [figures]).verdict is Verdict.INCONCLUSIVE
    early, lab = reconstruction.run(Lab(0, budget=0.005)), Lab(0, budget=0.1)
    assert early["MoM"]["squared error"] > early["mean colour"]["squared error"]  # hardly trained: it can fail
    assert reconstruction.run(lab)["MoM"]["squared error"] < early["MoM"]["squared error"] / 2
    assert lab.pictures["reconstruction"].shape[1:] == (3, 16, 16)
