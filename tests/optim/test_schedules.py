import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.optim import cosine_warmup, linear_ramp, log_cosine_warmup, sigmoid_ramp

shares = st.floats(0, 1)


@given(p=shares, q=shares, start=shares, end=shares)
def test_linear_ramp_rises_between_its_ends(p, q, start, end):
    start, end = sorted((start, end))
    p, q = sorted((p, q))
    a, b = (linear_ramp(v, start=start, end=end, low=-1, high=3) for v in (p, q))
    assert -1 <= a <= b <= 3
    assert linear_ramp(end, start=start, end=end) == 1


def test_linear_ramp_values():
    assert linear_ramp(0.3, start=0.2, end=0.4, low=1, high=0) == pytest.approx(0.5)
    assert linear_ramp(0.1, start=0.2) == 0


@given(warmup=st.floats(0.01, 0.9), floor=st.floats(0, 0.5))
def test_cosine_warmup_landmarks(warmup, floor):
    f = lambda p: cosine_warmup(p, warmup=warmup, floor=floor)  # noqa: E731
    assert f(0) == 0
    assert f(warmup / 2) == pytest.approx(0.5)
    assert f(warmup) == pytest.approx(1)
    assert f((1 + warmup) / 2) == pytest.approx((1 + floor) / 2)
    assert f(1) == pytest.approx(floor)


def test_cosine_without_warmup_and_all_warmup():
    assert cosine_warmup(0, warmup=0) == 1
    assert cosine_warmup(0.5, warmup=1) == 0.5
    assert cosine_warmup(1, warmup=1) == 1


def test_log_cosine_follows_its_formula():
    f = lambda p: log_cosine_warmup(p, warmup=0.5, low=1e-7, high=3e-5)  # noqa: E731
    assert f(0) == pytest.approx(1e-7)
    assert f(0.25) == pytest.approx(math.sqrt(1e-7 * 3e-5))
    assert f(0.5) == f(1) == 3e-5
    p = 0.1
    assert math.log10(f(p)) == pytest.approx(-7 + 0.5 * math.log10(300) * (1 - math.cos(math.pi * p / 0.5)))


def test_sigmoid_ramp():
    assert sigmoid_ramp(0) == 0
    assert sigmoid_ramp(1, k=5) == pytest.approx(math.tanh(2.5))
