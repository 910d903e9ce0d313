from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import BadSetting
from sfumato.masks import count_hidden, ratio_schedule

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "lmd.npz")
KINDS = ("cosine", "piecewise", "linear")


def over(total, kind, **settings):
    return np.array([ratio_schedule(s / total, kind, **settings) for s in range(total)])


@pytest.mark.parametrize(
    ("kind", "name"), [("cosine", "cosine_ratio"), ("piecewise", "piecewise_continuous"), ("linear", "linear")]
)
def test_schedules_are_the_official_ones(kind, name):
    total = int(VECTORS["total_steps"])
    expected = VECTORS[name]
    knee = (2 * total // 3) / total if kind == "cosine" else 2 / 3  # the table has a whole number of steps
    ours = np.array([ratio_schedule(s / total, kind, knee=knee) for s in range(len(expected))])
    assert np.abs(ours - expected).max() < 1e-12


def test_the_cosine_table():
    table = VECTORS["cosine_table"]
    n = len(table) - 1
    assert n == 2 * int(VECTORS["total_steps"]) // 3
    assert np.abs(np.array([ratio_schedule(s / n, knee=1.0) for s in range(n + 1)]) - table).max() < 1e-12


def test_the_published_piecewise_schedule_is_not_copied():
    assert VECTORS["piecewise_as_published"].max() > 1 > over(600, "piecewise").max()


@pytest.mark.parametrize("kind", KINDS)
def test_from_low_to_high_without_a_jump_or_a_fall(kind):
    ratios = over(3000, kind)
    assert ratios[0] == 0.15
    assert (ratios[2000:] == 0.75).all()
    assert (np.diff(ratios) >= 0).all()
    assert np.diff(ratios).max() < 3 / 3000
    assert ratio_schedule(1.0, kind) == 0.75


def test_the_means_over_a_training():
    assert over(3000, "cosine").mean() == pytest.approx(0.5515, abs=1e-3)
    assert over(3000, "linear").mean() == pytest.approx(2 / 3 * 0.45 + 0.25, abs=1e-3)
    assert over(3000, "piecewise").mean() == pytest.approx((0.275 + 0.4) / 6 + 0.575 / 3 + 0.25, abs=1e-3)


def test_tokens_that_are_kept():
    assert 49 - count_hidden(49, ratio_schedule(0.0)) == 41
    assert 49 - count_hidden(49, ratio_schedule(1.0)) == 12


@given(st.floats(0, 1), st.sampled_from(KINDS), st.floats(0, 0.5), st.floats(0.5, 1), st.floats(0, 1))
def test_any_setting_stays_between_its_ends(progress, kind, low, high, knee):
    ratio = ratio_schedule(progress, kind, low=low, high=high, knee=knee, mid=(low + high) / 2)
    assert low - 1e-12 <= ratio <= high + 1e-12
    assert progress < knee or ratio == high


def test_a_knee_at_once_and_an_unknown_kind():
    assert ratio_schedule(0.0, knee=0.0) == 0.75
    with pytest.raises(BadSetting, match="'step' is not known: cosine, piecewise, linear"):
        ratio_schedule(0.5, "step")
