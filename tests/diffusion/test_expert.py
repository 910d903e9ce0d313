import math

import pytest
import torch

from sfumato.diffusion import ExpertDenoiser, Schedule, beta_schedule, sample_ddim, sample_heun
from sfumato.errors import BadSetting


def test_samplers_ask_the_expert_within_its_interval_alone():
    asked = {"base": [], "expert": []}

    def net(name):
        return lambda x, t: asked[name].append(int(t[0])) or 0.1 * x

    model = ExpertDenoiser(net("base"), net("expert"), low=250, high=500)
    sample_ddim(model, torch.randn(3, 2), Schedule(beta_schedule("linear")), steps=20)
    assert asked["expert"] == [450, 400, 350, 300, 250]
    assert asked["base"] == [*range(950, 450, -50), *range(200, -50, -50)]


def test_levels_and_further_arguments():
    levels = []
    model = ExpertDenoiser(lambda x, s: x, lambda x, s: levels.append(float(s)) or x / 2, high=1.0)
    sample_heun(model, torch.ones(2, 1), torch.tensor([4.0, 1.0, 0.5, 0.0]))
    assert levels == [0.5, 0.5]
    told = ExpertDenoiser(lambda x, t, label, scale: label * scale, lambda *_: None, low=5)
    assert told(torch.ones(1), torch.tensor(3), 2, scale=4) == 8


def test_times_on_both_sides_and_empty_intervals_are_refused():
    model = ExpertDenoiser(lambda x, t: x, lambda x, t: x, low=10, high=math.inf)
    with pytest.raises(BadSetting, match=r"in \[10, inf\), some are not"):
        model(torch.ones(2), torch.tensor([3, 30]))
    with pytest.raises(BadSetting, match="hold no time"):
        ExpertDenoiser(lambda x, t: x, lambda x, t: x, low=3, high=3)
