"""Clusters of noise levels, the pace at which they come, and the draws."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.diffusion import (
    CurriculumTimesteps,
    PatiencePacer,
    linear_stage,
    lognormal_clusters,
    uniform_clusters,
)
from sfumato.errors import BadSetting

PATH = Path(__file__).parents[1] / "vectors" / "denoising-curriculum.npz"
VECTORS = dict(np.load(PATH))


def raw(n, patience, **over):
    return PatiencePacer(n, patience=patience, **{"smoothing": 0.0, "min_delta": 0.0, **over})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Clusters


@given(T=st.integers(1, 1200), n=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_clusters_are_of_equal_length(T, n):
    if n > T:
        with pytest.raises(BadSetting, match=f"{n} clusters of {T} times"):
            uniform_clusters(T, n)
        return
    edges = uniform_clusters(T, n)
    assert (edges[0], edges[-1]) == (0, T)
    sizes = edges.diff()
    assert sizes.sum() == T
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    assert edges.tolist() == [i * T // n for i in range(n + 1)]


def test_clusters_of_levels_are_of_equal_mass_and_follow_the_reference():
    edges = lognormal_clusters(20)
    torch.testing.assert_close(edges[1:-1], torch.from_numpy(VECTORS["edm_cluster_edges_logsigma"]), rtol=0, atol=1e-10)
    mass = torch.special.ndtr((edges + 1.2) / 1.2).diff()
    torch.testing.assert_close(mass, torch.full_like(mass, 1 / 20), rtol=0, atol=1e-12)
    assert torch.equal(edges[[0, -1]], torch.tensor([-math.inf, math.inf], dtype=torch.float64))
    with pytest.raises(BadSetting, match="0 clusters"):
        lognormal_clusters(0)


# Pace


def test_stages_and_lowest_times_follow_the_reference():
    T, N = int(VECTORS["T"]), int(VECTORS["N"])
    pacer = raw(N, int(VECTORS["tau"])).double()
    draw = CurriculumTimesteps(uniform_clusters(T, N), pacer)
    g = generator()
    for loss, stage, lowest in zip(
        VECTORS["losses"].tolist(), VECTORS["stage_before_step"].tolist(), VECTORS["min_t_before_step"].tolist(), strict=True
    ):
        assert int(pacer.stage) == stage
        assert int(draw.low[:stage].min()) == lowest
        assert int(draw(200, generator=g).min()) >= lowest
        pacer.update(loss)


def test_patience_must_be_exceeded_and_a_smaller_loss_starts_anew():
    pacer = raw(3, 2)
    assert [int(pacer.update(x)) for x in (5.0, 5.0, 5.0)] == [1, 1, 1]
    assert int(pacer.update(4.9)) == 1
    assert [int(pacer.update(x)) for x in (4.9, 4.9, 4.9)] == [1, 1, 2]
    assert [int(pacer.update(x)) for x in (9.0, 8.0, 8.5, 8.5, 8.5)] == [2, 2, 2, 2, 3]  # 9 is the best of a new stage
    assert [int(pacer.update(9.0)) for _ in range(20)] == [3] * 20


def test_a_loss_that_falls_keeps_its_stage_unless_stages_have_an_end():
    falling = [1 / (1 + i) for i in range(50)]
    pacer, ended = raw(5, 0), raw(5, 0, longest=10)
    assert [int(pacer.update(x)) for x in falling][-1] == 1
    assert [int(ended.update(x)) for x in falling] == [1] * 9 + [2] * 10 + [3] * 10 + [4] * 10 + [5] * 11


def test_the_running_mean_begins_anew_and_small_gains_do_not_count():
    pacer = PatiencePacer(2, patience=100, smoothing=0.75)
    pacer.update(4.0)
    pacer.update(8.0)
    assert pacer.mean == 5.0
    assert pacer.best == 4.0
    pacer = PatiencePacer(2, patience=0, smoothing=0.5, min_delta=0.1)
    assert [int(pacer.update(x)) for x in (1.0, 0.9)] == [1, 2]  # the mean fell by 0.05 only
    pacer.update(7.0)
    assert pacer.mean == 7.0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_stages_never_fall_or_skip_and_resume_exactly(losses, patience):
    pacer = PatiencePacer(4, patience=patience, smoothing=0.5, longest=9)
    stages = [1]
    for i, loss in enumerate(losses):
        if i == len(losses) // 2:
            resumed = PatiencePacer(4, patience=patience, smoothing=0.5, longest=9)
            resumed.load_state_dict(copy.deepcopy(pacer.state_dict()))
            pacer = resumed
        stages.append(int(pacer.update(loss)))
    assert all(torch.isfinite(t).all() for t in pacer.state_dict().values())
    whole = PatiencePacer(4, patience=patience, smoothing=0.5, longest=9)
    assert stages[1:] == [int(whole.update(loss)) for loss in losses]
    assert set(np.diff(stages).tolist()) <= {0, 1}
    assert stages[-1] <= 4


def test_a_stage_comes_when_it_must():
    pacer = raw(4, 100)
    assert [int(pacer.update(1.0, at_least=k)) for k in (1, 3, 2, 9)] == [1, 3, 3, 4]
    assert pacer.age == 0
    pacer.update(7.0)
    assert pacer.best == 7


def test_linear_pace():
    stages = [linear_stage(i / 100, 5, share=0.2) for i in range(100)]
    assert stages == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 84
    with pytest.raises(BadSetting, match="share=0"):
        linear_stage(0.5, 5, share=0)


# Draws


@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy", "random"])
def test_draws_fill_the_union_evenly(order):
    edges = uniform_clusters(97, 7)  # lengths 13 and 14
    draw = CurriculumTimesteps(edges, order=order, generator=generator(3))
    known = set()
    for stage in range(1, 8):
        t = draw(20_000, stage=stage, generator=generator(stage))
        assert t.dtype == torch.int64
        counts = torch.bincount(t, minlength=97)
        there = set(counts.nonzero().flatten().tolist())
        assert known < there
        known = there
        sizes = edges.diff()[torch.bucketize(t.unique(), edges, right=True).unique() - 1]
        assert len(there) == sizes.sum()  # whole clusters, every time of them
        assert len(sizes) == stage
        wanted = 20_000 / len(there)
        assert (counts[counts > 0] - wanted).abs().max() < 6 * wanted**0.5
        assert torch.equal(t, draw(20_000, stage=torch.tensor(stage), generator=generator(stage)))
        if order == "easy_to_hard":
            assert min(there) == edges[7 - stage]
        if order == "hard_to_easy":
            assert max(there) == edges[stage] - 1
    assert known == set(range(97))


def test_levels_are_the_lognormal_cut_to_the_clusters():
    edges = lognormal_clusters(5, mean=-0.4, std=1.0)
    draw = CurriculumTimesteps(edges, mean=-0.4, std=1.0)
    for stage in range(1, 6):
        sigma = draw(50_000, stage=stage, generator=generator(stage))
        assert sigma.dtype == torch.float32
        logs = sigma.double().log()
        assert logs.min() >= edges[5 - stage] - 1e-6
        p = torch.special.ndtr((logs + 0.4) / 1.0)  # uniform on the upper stage / 5
        ranks = (p.sort().values - (1 - stage / 5)) / (stage / 5)
        assert (ranks - torch.linspace(0, 1, 50_000, dtype=torch.float64)).abs().max() < 0.01  # Kolmogorov-Smirnov
    assert logs.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert logs.std().item() == pytest.approx(1.0, abs=0.02)
    lowest = CurriculumTimesteps(edges, mean=-0.4, std=1.0, order="hard_to_easy")(1000, stage=1, generator=generator())
    assert (lowest.log() <= edges[1] + 1e-6).all()
    assert (lowest > 0).all()


def test_the_order_and_the_stage_are_part_of_the_state():
    def make(seed):
        return CurriculumTimesteps(uniform_clusters(100, 10), raw(10, 0), order="random", generator=generator(seed))

    one, other = make(1), make(2)
    for loss in (1.0, 2.0, 2.0, 2.0):
        one.pacer.update(loss)
    a = one(50, generator=generator())
    assert not torch.equal(a, other(50, generator=generator()))
    other.load_state_dict(one.state_dict())
    assert torch.equal(a, other(50, generator=generator()))
    assert int(one.pacer.stage) == 3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: PatiencePacer(0), "n_stages=0"),
        (lambda: PatiencePacer(smoothing=1.0), r"smoothing=1\.0"),
        (lambda: PatiencePacer(patience=-1), "patience=-1"),
        (lambda: PatiencePacer(longest=0), "longest=0"),
        (lambda: CurriculumTimesteps(torch.tensor([0, 3, 3])), "rising"),
        (lambda: CurriculumTimesteps(torch.tensor([0])), "at least two"),
        (lambda: CurriculumTimesteps(uniform_clusters(9, 3), PatiencePacer(4)), "pacer of 3 stages, this one has 4"),
        (lambda: CurriculumTimesteps(uniform_clusters(9, 3), order="up"), "no order 'up'"),
        (lambda: CurriculumTimesteps(uniform_clusters(9, 3))(5), "give stage"),
        (lambda: CurriculumTimesteps(uniform_clusters(9, 3))(5, stage=4), "stage=4"),
    ],
)
def test_bad_settings_are_refused(make, told):
    with pytest.raises(BadSetting, match=told):
        make()
