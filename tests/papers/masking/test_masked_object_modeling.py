import math

import pytest
import torch
from torch import nn

from sfumato import catalogue
from sfumato.claim import Verdict, judge
from sfumato.cli.apply import apply
from sfumato.data import Batch, perspective_scenes, write_image
from sfumato.engine import Options, Run, Trainer, load
from sfumato.engine.lab import Lab
from sfumato.errors import BadData, BadSetting
from sfumato.method import Context, capabilities
from sfumato.nn import box_rows, pad_boxes, resized_crops
from sfumato.papers.masking.masked_object_modeling import (
    MoM,
    occlusion,
    reconstruction,
    whole_objects,
)

FRAMES = perspective_scenes(8, generator=torch.Generator().manual_seed(0))


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def build(**over):
    torch.manual_seed(0)
    return MoM(MoM.Config.small(**{"dim": 16, "decoder_dim": 16, "roi_dim": 8, "head_dim": 8, "steps": 3, **over}))


def context(step=0, total=10):
    return Context(step, total, 0, g())


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
        {"error": "focal", "visible_weight": 0.1},
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
