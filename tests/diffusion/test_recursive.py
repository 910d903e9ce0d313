"""Learning from one's own samples: who learns from what, and what the filters keep."""

from functools import partial

import pytest
import torch

from sfumato.diffusion import SamplerStep, keep_all, keep_random, keep_steady, recursive_training
from sfumato.errors import BadSetting


class Faulty:
    """Draws numbers of [0, 1), but one in ten is 9, about which it is undecided over its last steps."""

    trajectory_steps = 20

    def sample(self, n, generator=None, *, callback=None):
        x = torch.rand(n, 1, generator=generator)
        bad = torch.arange(n) % 10 == 0
        x[bad] = 9.0
        for i in range(20):
            if callback is not None:
                callback(SamplerStep(i, x, x + bad[:, None] * (-1) ** i, torch.ones(())))
        return x


def test_each_generation_learns_from_what_the_one_before_kept():
    seen = []

    def train(samples, number):
        seen.append((number, samples))
        return Faulty()

    data = torch.rand(300, 1)
    drawn = recursive_training(
        train, data, generations=3, draw=partial(keep_steady, keep=0.85), generator=torch.Generator().manual_seed(0)
    )
    assert [number for number, _ in seen] == [0, 1, 2]
    assert seen[0][1] is data
    assert all(one.kept is samples for one, (_, samples) in zip(drawn, seen[1:]))
    assert all(len(one.kept) == 300 and len(one.all) == 353 for one in drawn)
    assert all(one.kept.max() < 1 and (one.all == 9).sum() == 36 for one in drawn)
    with pytest.raises(BadSetting, match="at least one"):
        recursive_training(train, data, generations=0)


def test_without_a_filter_and_by_chance_the_faults_stay():
    g = torch.Generator().manual_seed(0)
    plain = keep_all(Faulty(), 200, g)
    assert (len(plain.kept), len(plain.dropped), int((plain.all == 9).sum())) == (200, 0, 20)
    chance = keep_random(Faulty(), 960, g)
    assert (len(chance.kept), len(chance.dropped)) == (960, 40)
    assert 80 <= int((chance.kept == 9).sum()) <= 100
    assert int((chance.kept[:48] == 9).sum()) > 0  # not the first ones in their order
    again = keep_random(Faulty(), 50, torch.Generator().manual_seed(1))
    assert torch.equal(again.kept, keep_random(Faulty(), 50, torch.Generator().manual_seed(1)).kept)
    for keep in (0.0, 1.5):
        with pytest.raises(BadSetting, match="share above 0"):
            keep_random(Faulty(), 10, g, keep=keep)
