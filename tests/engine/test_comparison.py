"""Arms, pairing, intervals, going on after a stop, and what is refused."""

import inspect
import json
import re

import pytest
import torch

from sfumato import catalogue
from sfumato.claim import paired_interval
from sfumato.data import Batch
from sfumato.engine import trial, trial_pool
from sfumato.engine.arms import Arm, parse_arm, resolve
from sfumato.engine.comparison import compare
from sfumato.engine.outcomes import differences, direction
from sfumato.engine.trial import split
from sfumato.errors import BadData, BadSetting, Diverged, UnknownName

HERE = {"processes": 0, "device": "cpu"}
TINY = {"image_size": 8, "patch": 2, "mask_unit": 4, "dim": 16, "depth": 1, "decoder_dim": 16, "crop_scale": None}
ADAM, SGD = "classifier:optimizer=adam,lr=1e-2", "classifier:optimizer=sgd,lr=1e-2"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- arms


def test_an_arm_is_a_slug_with_settings_and_maybe_a_label():
    assert parse_arm("mae") == Arm("mae", {}, "")
    assert parse_arm("mae:mask_ratio=0.5,betas=[0.9,0.95],lr=1e-3").settings == {
        "mask_ratio": 0.5, "betas": [0.9, 0.95], "lr": 1e-3,
    }  # fmt: skip
    assert parse_arm("half=mae:mask_ratio=0.5") == Arm("mae", {"mask_ratio": 0.5}, "half")
    assert parse_arm("first=mae") == Arm("mae", {}, "first")
    for wrong in ("", ":a=1", "a=b=c"):
        with pytest.raises(BadSetting, match="is no arm"):
            parse_arm(wrong)
    with pytest.raises(BadSetting, match="NAME=VALUE"):
        parse_arm("mae:half")


def test_labels_are_short_and_unique():
    def labels(*arms):
        return [arm.label for arm in resolve(arms, {})[0]]

    assert labels("mae", "simmim:dim=16") == ["mae", "simmim"]
    assert labels("classifier", "classifier:lr=0.1") == ["classifier", "lr=0.1"]
    assert labels("mae", "mae:dim=32", "simmim") == ["mae", "mae dim=32", "simmim"]
    assert labels("a=mae", "mae") == ["a", "mae"]


def test_settings_go_to_those_that_have_them_and_an_arms_own_come_last():
    settings = {"dim": 16, "mask_unit": 4, "mae:depth": 1, "wide:heads": 2}
    arms, notes = resolve(["mae", "simmim", "wide=mae:dim=64"], settings)
    assert [arm.settings for arm in arms] == [
        {"dim": 16, "depth": 1}, {"dim": 16, "mask_unit": 4}, {"dim": 64, "depth": 1, "heads": 2},
    ]  # fmt: skip
    assert len(notes) == 1
    assert "mask_unit went to simmim" in notes[0]


@pytest.mark.parametrize(
    ("arms", "settings", "error", "words"),
    [
        (["mae"], {}, BadSetting, "two arms"),
        (["mae", "colourmae"], {}, UnknownName, "colormae"),
        (["mae", "classifier"], {}, BadSetting, "mae eats images, classifier eats labelled"),
        (["mae", "mae"], {}, BadSetting, "two arms are called 'mae'"),
        (["mae", "simmim"], {"dimm": 3}, BadSetting, "did you mean dim"),
        (["mae", "simmim"], {"cbsn:width": 3}, BadSetting, "no arm is called 'cbsn'"),
        (["mae:steps=3", "simmim"], {}, BadSetting, "--steps N"),
        (["mae", "simmim"], {"steps": 3}, BadSetting, "--steps N"),
    ],
)
def test_what_no_comparison_can_be(arms, settings, error, words):
    with pytest.raises(error, match=words):
        compare(arms, "sample:digits", steps=2, settings=settings, **HERE)


def test_what_fits_neither_data_nor_each_other(tmp_path):
    def refused(error, words, *arms, data="sample:digits", **options):
        with pytest.raises(error, match=words):
            compare(arms, data, **{"steps": 2, **HERE, **options})

    refused(BadSetting, "mae is there to encode, cbsn is there to restore", "mae", "cbsn")
    refused(BadData, "a: Regressor needs a target", "a=regressor", "regressor:width=8")
    refused(BadData, "needs a label", ADAM, SGD, data=torch.rand(4, 1, 8, 8))
    refused(BadSetting, "mask_ratio=2: there is no|mask_ratio=2", "mae:mask_ratio=2", "simmim")
    refused(BadData, "not a loader", ADAM, SGD, data=torch.utils.data.DataLoader(torch.rand(4, 1, 8, 8)))
    refused(BadSetting, "not both", ADAM, SGD, minutes=1.0)
    refused(BadSetting, "positive", ADAM, SGD, steps=0)
    refused(BadSetting, "at least 1", ADAM, SGD, seeds=0)
    refused(BadSetting, "at least 1", ADAM, SGD, seeds=[1, 1])


# ---- data


def test_what_is_held_out():
    train, held_out, how = split("sample:digits")
    assert (len(train), len(held_out), how) == (1300, 497, "the test part of the data")
    images = torch.rand(25, 1, 4, 4)
    train, held_out, how = split(images)
    assert (len(train), len(held_out)) == (22, 3)
    assert how.startswith("3 of 25")
    both = torch.cat([train.tensors().x, held_out.tensors().x])
    assert torch.equal(both.flatten(1).sum(1).sort().values, images.flatten(1).sum(1).sort().values)
    assert torch.equal(split(images)[1].tensors().x, held_out.tensors().x)
    train, held_out, how = split(torch.rand(1, 1, 4, 4))
    assert train is held_out
    assert "trained on and judged on" in how


def test_pictures_of_unlike_sizes_are_cut_to_one():
    images = [torch.rand(1, 9, 12), torch.rand(1, 20, 8), torch.rand(1, 10, 10)]
    data = split((images, torch.tensor([0, 1, 0])))[0]
    middles = trial._squares(data, range(len(data)), None)
    assert middles.x.shape[-1] == middles.x.shape[-2] == min(min(s.x.shape[-2:]) for s in data)
    assert trial._few(data, 2, 6, seed=0).x.shape[-2:] == (6, 6)
    assert torch.equal(trial._few(data, 2, 6, seed=0).x, trial._few(data, 2, 6, seed=0).x)
    numbers = split((images, torch.rand(3, 2)))[0]
    assert trial._squares(numbers, [0, 1], None).target.shape == (2, 2)


# ---- trials


def test_arms_are_paired_and_differences_are_theirs():
    """Two arms with equal settings come out equal with every seed, a third one does not."""
    done = compare([f"a={ADAM}", f"b={ADAM}", f"c={SGD}"], "sample:digits", steps=6, seeds=[3, 4, 5], **HERE)
    record = done.record
    assert (record["held"], record["budget"], record["seeds"]) == ("steps", 6, [3, 4, 5])
    for seed in ("3", "4", "5"):
        figures = record["figures"][seed]
        assert figures["a"] == figures["b"] != figures["c"]
        assert record["curves"][seed]["a"]["loss"] == record["curves"][seed]["b"]["loss"]
        assert record["untrained"][seed]["a"] == record["untrained"][seed]["c"], "the weights are those of the seed"
        assert record["curves"][seed]["a"]["step"] == [1, 2, 3, 4, 5, 6]
        assert [e["step"] for e in record["evaluations"][seed]["a"]][-1] == 6
        last = record["evaluations"][seed]["a"][-1]
        assert {k: last[k] for k in figures["a"]} == figures["a"]
    assert record["figures"]["3"]["a"] != record["figures"]["4"]["a"]
    found = {(d["metric"], d["arm"]): d for d in record["differences"]}
    assert set(found) == {(m, a) for m in ("accuracy", "loss", "images_per_second") for a in "bc"}
    assert found["loss", "b"]["dots"] == [0, 0, 0]
    gaps = [record["figures"][s]["a"]["loss"] - record["figures"][s]["c"]["loss"] for s in ("3", "4", "5")]
    loss = found["loss", "c"]
    assert not loss["higher"]
    assert loss["dots"] == pytest.approx(gaps), "a lower loss is better"
    assert (loss["mean"], loss["low"], loss["high"]) == pytest.approx(tuple(paired_interval(gaps)))
    assert loss["outcome"] == "no verdict", "three seeds give none"
    rows = {row["arm"]: row for row in done.table}
    accuracy = [record["figures"][s]["c"]["accuracy"] for s in ("3", "4", "5")]
    assert rows["c"]["accuracy"] == pytest.approx(tuple(paired_interval(accuracy)))
    assert (rows["a"]["steps"], rows["a"]["memory"]) == (6, None)
    assert all(word in str(done) for word in ("images per second", "accuracy", "a ", "c "))
    json.loads(json.dumps(record, allow_nan=False))


def record_of(figures, slugs, steps):
    arms = [{"label": label, "slug": slug, "steps": steps} for label, slug in zip("ab", slugs)]
    costs = {s: {a: {"images_per_second": 1.0} for a in "ab"} for s in figures}
    return {"arms": arms, "figures": figures, "costs": costs}


def outcomes(gap, seeds=5, metric="psnr", slugs=("x", "x"), steps=10):
    figures = {str(s): {"a": {metric: 30.0 + s}, "b": {metric: 30.0 + s + gap + 0.1 * (s % 2)}} for s in range(seeds)}
    return {d["metric"]: d["outcome"] for d in differences(record_of(figures, slugs, steps))}


def test_outcomes_follow_the_interval_and_its_direction():
    assert outcomes(1.0)["psnr"] == "better"
    assert outcomes(-1.0)["psnr"] == "worse"
    assert outcomes(-0.04)["psnr"] == "no difference shown"
    assert outcomes(1.0, metric="mse")["mse"] == "worse"
    assert outcomes(1.0, seeds=4)["psnr"] == "no verdict"
    assert outcomes(1.0, seeds=1)["psnr"] == "no verdict"


def test_probes_of_features_are_not_judged_after_a_few_steps():
    assert outcomes(1.0, metric="linear_probe")["linear_probe"] == "too early"
    assert outcomes(1.0, metric="linear_probe", steps=1000)["linear_probe"] == "better"
    assert outcomes(1.0, metric="few_label_accuracy")["few_label_accuracy"] == "better"


def test_own_losses_of_different_methods_are_not_judged():
    assert outcomes(1.0, metric="masked_loss")["masked_loss"] == "worse"
    assert set(outcomes(1.0, metric="masked_loss", slugs=("x", "y"))) == {"images_per_second"}


def test_features_are_judged_beside_those_of_the_untrained_network(monkeypatch):
    monkeypatch.setattr(trial, "PROBE_TRAIN", 60)
    monkeypatch.setattr(trial, "PROBE_TEST", 40)
    done = compare(["mae", "simmim"], "sample:digits", steps=2, seeds=1, settings=TINY, **HERE).record
    names = {"masked_loss", "few_label_accuracy", "linear_probe", "knn_probe"}
    for part in ("figures", "untrained"):
        assert all(set(done[part]["0"][arm]) == names for arm in ("mae", "simmim"))
        assert all(0 <= v <= 1 for arm in done[part]["0"].values() for m, v in arm.items() if m != "masked_loss")
    judged = {d["metric"] for d in done["differences"]}
    assert judged == names - {"masked_loss"} | {"images_per_second"}
    assert any("parameters" in note for note in done["notes"])


def test_generators_are_judged_by_what_they_draw(monkeypatch):
    """Arms and seeds are told apart, and a generator of the data itself is closer than one of noise."""
    monkeypatch.setattr(trial, "DRAWN", 80)
    small = {"width": 8, "sample_steps": 2, "batch_size": 8}
    done = compare(["ddpm", "multiplicative-diffusion"], "sample:digits", steps=1, seeds=1, settings=small, **HERE).record
    first, second = (done["figures"]["0"][arm]["frechet_distance"] for arm in ("ddpm", "multiplicative-diffusion"))
    assert first > 0
    assert second > 0
    assert first != second
    assert {d["metric"] for d in done["differences"]} == {"frechet_distance", "images_per_second"}

    train, held_out, _ = trial.split("sample:digits")

    class Generator:
        device = torch.device("cpu")

        def __init__(self, spread):
            self.spread = spread

        def sample(self, n, generator):
            x = torch.stack([train[i].x for i in range(n)]).float()
            return (x + self.spread * torch.randn(x.shape, generator=generator)).clamp(0, 1)

    monkeypatch.setattr(trial, "DRAWN", 400)
    spreads = (0.0, 0.5, 0.0)
    near, far, again = (trial.judge(Generator(s), train, held_out, 0) for s in spreads)
    assert near == again
    assert near["frechet_distance"] < 0.3 * far["frechet_distance"]
    assert near["frechet_of_training_pictures"] == far["frechet_of_training_pictures"] < 2 * near["frechet_distance"]


def test_arms_of_unlike_size_are_told():
    settings = {name: value for name, value in TINY.items() if name != "mask_unit"}
    done = compare(["mae:dim=32", "mae"], "sample:digits", steps=1, seeds=1, settings=settings, dry_run=True, **HERE).record
    assert any("unlike in dim (dim=32 32, mae 16)" in note for note in done["notes"])
    assert done["figures"] == {}
    assert done["estimate"]["seconds"] > 0


def test_minutes_fix_the_steps_of_an_arm_for_all_seeds(monkeypatch):
    timed = {"optimizer=adam, lr=0.01": 0.1, "optimizer=sgd, lr=0.01": 0.05}
    true = trial.run_trial

    def instead(job, data):
        result = true(job, data)
        return result if job.steps else {**result, "step_seconds": timed[job.arm.label]}

    monkeypatch.setattr(trial_pool, "run_trial", instead)
    done = compare([ADAM, SGD], "sample:digits", minutes=0.0105, seeds=2, **HERE).record
    assert done["held"] == "minutes"
    assert [arm["steps"] for arm in done["arms"]] == [6, 12]
    assert all(run["optimizer=sgd, lr=0.01"]["step"][-1] == 12 for run in done["curves"].values())
    assert any("Of 0.63 s that each arm was given" in note for note in done["notes"])


def test_a_loss_that_is_not_finite_names_its_arm():
    with pytest.raises(Diverged, match="high, while it was timed: the loss is nan"):
        compare([ADAM, "high=classifier:optimizer=sgd,lr=1e30"], "sample:digits", steps=20, seeds=1, **HERE)
    job = trial.Job(Arm("classifier", {"optimizer": "sgd", "lr": 1e30}, "high"), 3, "small", "cpu", steps=20, alone=False)
    with pytest.raises(Diverged, match="high, seed 3: the loss is nan"):
        trial.run_trial(job, "sample:digits")


# ---- going on


def test_a_stopped_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    arms, options = [ADAM, SGD], {"steps": 4, "seeds": 2, "out": tmp_path, **HERE}
    true, asked = trial.run_trial, []

    def instead(job, data):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append((job.arm.label, job.seed if job.steps else None))
        return true(job, data)

    monkeypatch.setattr(trial_pool, "run_trial", instead)
    with pytest.raises(KeyboardInterrupt):
        compare(arms, "sample:digits", **options)
    assert len(asked) == 4, "two timings, two trainings"
    monkeypatch.setattr(trial_pool, "run_trial", lambda job, data: asked.append((job.arm.label, job.seed)) or true(job, data))
    asked.clear()
    resumed = compare(arms, "sample:digits", **options).record
    assert [seed for _, seed in asked] == [1, 1]
    assert resumed["kept"] == 2
    straight = compare(arms, "sample:digits", **{**options, "out": None}).record
    assert resumed["figures"] == straight["figures"]
    asked.clear()
    assert compare(arms, "sample:digits", **options).record["kept"] == 4
    assert asked == []
    compare([*arms, "classifier:optimizer=adamw"], "sample:digits", **options)
    assert {label for label, _ in asked} == {"optimizer=adamw"}, "what is finished stands beside a new arm"
    asked.clear()
    compare(arms, "sample:digits", **options, settings={"label_smoothing": 0.1})
    assert len(asked) == 6, "another setting is another trial"
    assert all((tmp_path / "pictures" / name).exists() for arm in resumed["pictures"].values() for name in arm.values())


def test_damaged_results_and_lost_pictures_are_made_again(tmp_path):
    options = {"steps": 2, "seeds": 1, "out": tmp_path, **HERE}
    first = compare([ADAM, SGD], "sample:digits", **options).record
    trained = sorted((tmp_path / "trials").glob("classifier-0-*.json"))
    trained[0].write_text(trained[0].read_text()[:-9])
    assert compare([ADAM, SGD], "sample:digits", **options).record["kept"] == 1
    next((tmp_path / "pictures").iterdir()).unlink()
    again = compare([ADAM, SGD], "sample:digits", **options).record
    assert again["kept"] == 1
    assert again["figures"] == first["figures"]


def test_data_from_python_is_not_kept(tmp_path):
    data = (torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
    for _ in range(2):
        done = compare([ADAM, SGD], data, steps=2, seeds=1, out=tmp_path, settings={"batch_size": 4}, **HERE)
        assert done.record["kept"] == 0
        assert done.record["data"] == "given from Python"


def test_pairs_are_judged_against_their_targets():
    clean = torch.rand(12, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    settings = {"width": 4, "modules": 1, "patch": 10, "batch_size": 2}
    data = ((clean + 0.1).clamp(0, 1), clean)
    done = compare(["cbsn", "cbsn:stride_blind=1"], data, steps=2, seeds=1, settings=settings, **HERE).record
    assert set(done["figures"]["0"]["cbsn"]) == {"psnr"}
    assert done["job"] == "restore"


# ---- directions


def test_every_figure_of_a_method_has_a_direction():
    assert [direction(name) for name in ("accuracy", "knn_probe", "images_per_second", "psnr")] == [True] * 4
    assert [direction(name) for name in ("loss", "mse", "unexplained")] == [False] * 3
    assert direction("psnr_degraded") is None  # a fact of the data
    assert direction("frechet_of_training_pictures") is None
    assert direction("novelty") is None
    names = set()
    for row in catalogue.load().values():
        if row.built and row.kind in ("method", "base"):
            source = inspect.getsource(catalogue.load_method(row.slug).evaluate)
            names |= set(re.findall(r'"([a-z_]+)":', source)) - {"psnr_degraded"}
    assert names >= {"accuracy", "psnr", "unexplained"}
    assert not [name for name in names if direction(name) is None]


def test_unexplained_should_be_low_and_the_untrained_have_seen_the_data():
    g = torch.Generator().manual_seed(0)
    x = 100 * torch.rand(64, 4, generator=g)
    designs = Batch(x, torch.arange(64), target=x.sum(1, keepdim=True))
    settings = {"hidden": 16, "batch_size": 32}
    arms = ["fast=ignite:lr=1e-2", "slow=ignite:lr=1e-5"]
    done = compare(arms, designs, steps=60, seeds=5, settings=settings, **HERE).record
    assert all(seed["slow"]["unexplained"] < 10 for seed in done["untrained"].values())
    (found,) = (d for d in done["differences"] if d["metric"] == "unexplained")
    assert not found["higher"]
    assert found["outcome"] == "worse"
