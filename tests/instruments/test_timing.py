"""What is timed before a measurement is a small piece of it."""

import pytest
import torch

from sfumato.instruments import timing


def test_pieces_grow_while_they_are_quick(monkeypatch):
    seen = []
    batch = (torch.zeros(200, 2), torch.zeros(200))
    monkeypatch.setattr(timing, "seconds_of", lambda work, device, patience: (work(), 0.01 + 0.001 * seen[-1])[1])

    def sizes(limit, **options):
        seen.clear()
        found = timing.seconds_a_sample(lambda pairs: seen.append(len(pairs[0][0])), batch, limit, torch.device("cpu"), **options)
        return list(seen), found

    assert sizes(1e-6) == (
        [1, 4],
        pytest.approx(0.014 / 4),
    )  # nothing but the smallest piece, after a first call that is not timed
    assert sizes(600) == ([1, 4, 32, 200], pytest.approx(0.21 / 200))
    assert sizes(1e-6, cut=False) == ([200, 200], pytest.approx(0.21 / 200))


def test_a_slow_run_is_not_repeated():
    calls = []
    assert timing.seconds_of(lambda: calls.append(1), torch.device("cpu"), patience=0) > 0
    assert len(calls) == 1
    timing.seconds_of(lambda: calls.append(1), torch.device("cpu"), patience=60)
    assert len(calls) == 3
