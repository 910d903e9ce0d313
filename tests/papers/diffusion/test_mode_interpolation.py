"""Between the modes: the exact sampler, the gap of the scores, the filters, one's own samples, and the claims in small."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.data import Batch, Facts, GaussianMixture, gaussian_grid
from sfumato.diffusion import Schedule, X0Variance
from sfumato.engine import fit
from sfumato.engine.lab import Lab
from sfumato.errors import BadData, BadSetting
from sfumato.method import Context, Sampler, TrajectorySampler, draws_points
from sfumato.papers.diffusion import mode_interpolation as page
from sfumato.papers.diffusion.mode_interpolation import (
    NoiseSize,
    PointDiffusion,
    draw_points,
    exact_score,
    histogram_divergence,
    interpolating,
    score_gap,
    separation,
    strip,
)

PATH = Path(__file__).parents[2] / "vectors" / "mode-interpolation.npz"
V = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(PATH).items()}
LINE = GaussianMixture(torch.tensor([[1.0], [2.0], [3.0]]), 0.05)


def _tiny(**over):
    torch.manual_seed(0)
    return PointDiffusion(PointDiffusion.Config.small(**{"dim": 1, "width": 16, "times": 40, "batch_size": 200, **over}))


class Given:
    """The reference's noise, step by step, in place of a generator's draws."""

    def __init__(self, monkeypatch):
        draws = iter(V["noise"])
        monkeypatch.setattr(torch, "randn", lambda *a, **k: next(draws))


def test_the_sampler_and_the_exact_score_follow_the_reference(monkeypatch):
    schedule, modes = Schedule(V["betas"]), GaussianMixture(V["modes"], V["mode_std"])
    steady = X0Variance((90, 100))
    Given(monkeypatch)
    end = draw_points(exact_score(modes, schedule), V["x_T"], schedule, predict="score", callback=steady)
    assert torch.allclose(end, V["x_0"], rtol=0, atol=1e-8)
    assert torch.allclose(steady.variance, V["traj_variance"], rtol=0, atol=1e-8)


def test_the_paper_s_settings():
    config = PointDiffusion.Config(dim=2)
    assert (config.width, config.layers, config.times, config.batch_size, config.lr) == (128, 3, 1000, 10_000, 1e-3)
    method = PointDiffusion(config)
    assert method.schedule.betas[0].item() == pytest.approx(1e-3)
    assert method.schedule.betas[-1].item() == pytest.approx(0.2)
    assert method.trajectory_steps == 1000
    assert draws_points(method)


def test_it_learns_is_kept_and_draws_the_same():
    data = LINE.sample(600, balanced=True, generator=torch.Generator().manual_seed(0))
    method, other = _tiny(lr=5e-3), _tiny()
    before = (method.sample(200, torch.Generator().manual_seed(1)).mean() - 2).abs()
    trained = fit(method, data, steps=120, progress=False)
    drawn = trained.sample(200, torch.Generator().manual_seed(1))
    assert (drawn.mean() - 2).abs() < 0.5 * before
    assert isinstance(trained, Sampler)
    assert isinstance(trained, TrajectorySampler)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.sample(200, torch.Generator().manual_seed(1)), drawn)


def test_the_loss_repeats_and_what_are_no_points_is_refused():
    method, batch = _tiny(), Batch(torch.rand(8, 1), torch.arange(8))
    a, b = (method.loss(batch, Context(0, 10, 0, torch.Generator().manual_seed(s))).value for s in (1, 1))
    assert torch.equal(a, b)
    with pytest.raises(BadData, match="vectors of 1 coordinates"):
        method.loss(Batch(torch.rand(8, 2), torch.arange(8)), Context(0, 10, 0, torch.Generator()))
    assert PointDiffusion.Config.small().fitted(Facts(10, 3)).dim == 3
    with pytest.raises(BadData, match="sfumato train ddpm"):
        PointDiffusion.Config.small().fitted(Facts(10, 3, (8, 8)))


def test_between_neighbours_in_the_plane():
    grid = gaussian_grid()
    step, std = torch.pdist(grid.means).min(), grid.var.sqrt()[0]
    a = grid.means[7]
    aside = torch.tensor([0.0, 1.0])
    right = torch.tensor([step, 0.0])
    x = torch.stack(
        [a, a + right / 2, a + right / 2 + 5 * std * aside, a + right / 2 + 7 * std * aside, a + (right + step * aside) / 2]
    )
    assert interpolating(x, grid).tolist() == [False, True, True, False, False]
    outside = torch.tensor([[3 * step, 0.0]])  # beyond the last mode
    assert grid.off_support(outside).all()
    assert not interpolating(outside, grid).any()
    with pytest.raises(BadSetting, match="two or more round ones"):
        interpolating(x, GaussianMixture(torch.zeros(1, 2), 0.1))


def test_the_gap_is_zero_for_the_exact_score_and_sees_a_smooth_one():
    schedule = Schedule(V["betas"])
    wide = GaussianMixture(LINE.means.double(), 0.05)

    def exact_noise(x, t):
        return -exact_score(wide, schedule)(x, t) * (1 - schedule.abar[t[0]]).sqrt()

    place, exact, learned = score_gap(exact_noise, wide, schedule, 3)
    assert torch.allclose(exact, learned)
    assert (place[0], place[-1]) == (0, 1)
    assert exact[len(exact) // 4] < 0 < exact[3 * len(exact) // 4]  # to the nearer mode
    assert strip(exact, learned) == 0
    assert strip(exact, torch.zeros_like(exact)) > 0.5


def test_divergence_of_histograms():
    g = torch.Generator().manual_seed(0)
    for mixture in (LINE, gaussian_grid()):
        data, same = mixture.sample(4000, generator=g), mixture.sample(4000, generator=g)
        collapsed = data[torch.cdist(data, mixture.means).argmin(1) == 0][:50].repeat(80, 1)
        assert histogram_divergence(same, data) < 0.1  # 400 boxes, 4000 points
        assert histogram_divergence(collapsed, data) > 1
        assert histogram_divergence(data + 100, data) > 1


def test_drift_of_a_generation():
    data = LINE.sample(300, balanced=True, generator=torch.Generator().manual_seed(0))
    good, bad = page._drift(data, data, LINE), page._drift(torch.cat([data[:150], torch.full((50, 1), 1.5)]), data, LINE)
    assert good["smallest mode, %"] == good["largest mode, %"] == pytest.approx(100 / 3)
    assert (bad["off support, %"], bad["between modes, %"], bad["smallest mode, %"]) == (25, 25, 0)
    assert bad["largest mode, %"] == pytest.approx(200 / 3)
    assert bad["divergence"] > good["divergence"]
    assert good["width of the modes"] == pytest.approx(1, abs=0.1)
    twice = LINE.means[torch.arange(300) % 3] + 2 * (data - LINE.means[torch.arange(300) // 100])
    assert page._drift(twice, data, LINE)["width of the modes"] == pytest.approx(2, abs=0.2)


def test_separation_at_a_retention():
    bad = torch.arange(100) < 4
    found = separation(bad.double(), bad)
    assert found == {"AUC": 1.0, "removed": 1.0, "kept": 1.0}
    assert separation(-bad.double(), bad)["AUC"] == 0
    assert math.isnan(separation(bad.double(), torch.zeros(100, dtype=torch.bool))["AUC"])


def test_size_of_the_predicted_noise():
    method = _tiny()
    size = NoiseSize((30, 40))
    start = torch.randn(5, 1, dtype=torch.float64)
    draw_points(lambda x, t: torch.full_like(x, 3.0), start, method.schedule, callback=size)
    assert torch.allclose(size.total, torch.full((5,), 90.0, dtype=torch.float64), rtol=1e-6)


def test_the_claims_in_small_can_fail():
    lab = Lab(0, budget=0.02)
    shares, detected = page.between_modes(lab), page.detector(lab)
    assert shares["exact score"] == shares["data"] == {"off support, %": 0, "between modes, %": 0}
    assert shares["network"]["off support, %"] > 20  # hardly trained: everywhere
    assert {c["arm"] for c in lab.curves} >= {"exact, time 2", "learned, time 2", "variance, last 5 steps"}
    assert set(detected["random filter"]) == {"AUC", "removed", "kept"}
    assert judge(page.detector, [detected] * 5).verdict is Verdict.NOT_REPRODUCED
    assert judge(page.between_modes, [shares] * 5).findings[0].verdict is Verdict.REPRODUCED


def test_the_claim_on_own_samples_in_small_can_fail():
    lab = Lab(0, budget=0.01)
    drift = page.own_samples(lab)
    assert set(drift) == {"generation 1"} | {f"{name}, generation 4" for name in page.FILTERS}
    assert {c["arm"]: len(c["y"]) for c in lab.curves} == dict.fromkeys(page.FILTERS, 4)
    found = judge(page.own_samples, [drift] * 5).findings
    swapped = {**drift, "variance filter, generation 4": {**drift["no filter, generation 4"], "off support, %": 101.0}}
    assert judge(page.own_samples, [swapped] * 5).verdict is Verdict.NOT_REPRODUCED
    assert len(found) == 4
