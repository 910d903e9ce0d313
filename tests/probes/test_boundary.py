import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.probes import (
    adversarial_distance,
    adversarial_strength,
    deviation_angle,
    free_tilt,
    local_geometry,
    tilt,
    tilting_plane,
)

EXACT = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(scope="module")
def vectors():
    stored = np.load(Path(__file__).parents[1] / "vectors" / "boundary-tilting.npz")
    found = {name: torch.from_numpy(stored[name]) for name in stored.files}
    found["x"] = torch.cat([found["I"], found["J"]])
    found["y"] = torch.cat([torch.zeros(len(found["I"])), torch.ones(len(found["J"]))]).long()
    return found


@pytest.fixture
def clouds():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, dtype=torch.float64, generator=g)
    y = (torch.arange(90) >= 30).long()  # one class is twice the other
    return x + 3 * y[:, None] * torch.tensor([1.0, 1.0, 0, 0, 0]), y, torch.randn(5, dtype=torch.float64, generator=g)


def test_reference_vectors(vectors):
    v = vectors
    torch.testing.assert_close(deviation_angle(v["w"], v["x"], v["y"]), v["deviation_angle_rad"], **EXACT)
    torch.testing.assert_close(adversarial_distance(v["w"], v["b"], v["x"], v["y"]), v["adversarial_distance"], **EXACT)
    torch.testing.assert_close(adversarial_strength(v["w"], v["x"], v["y"]), v["strength"], **EXACT)
    plane = tilting_plane(v["w"], v["x"], v["y"])
    torch.testing.assert_close(plane.nhat, v["tilting_plane_n"], **EXACT)
    middle = (v["I"].mean(0) + v["J"].mean(0)) / 2
    for phi, c, b, delta in zip(v["tilt_phi"], v["tilt_c"], v["tilt_b"], v["tilt_delta"]):
        weight, bias = tilt(v["w"], v["b"], v["tilt_v"], phi, through=middle)
        torch.testing.assert_close(weight, c, **EXACT)
        torch.testing.assert_close(bias, b, **EXACT)
        torch.testing.assert_close(deviation_angle(weight, v["x"], v["y"]), delta, **EXACT)


def test_distance_is_half_the_gap_times_the_cosine(clouds):
    x, y, w = clouds
    angle = deviation_angle(w, x, y)
    half_gap = (x[y == 1].mean(0) - x[y == 0].mean(0)).norm() / 2
    signed = torch.where(y == 1, 1.0, -1.0) * (x @ w + 0.7) / w.norm()
    balanced = (signed[y == 1].mean() + signed[y == 0].mean()) / 2
    distance = adversarial_distance(w, 0.7, x, y)
    torch.testing.assert_close(distance, balanced, **EXACT)
    torch.testing.assert_close(distance, half_gap * angle.cos(), **EXACT)
    torch.testing.assert_close(adversarial_distance(w, -40.0, x, y), distance, **EXACT)
    torch.testing.assert_close(deviation_angle(3 * w, x + 5, y), angle, **EXACT)


def test_pairs_of_many_classes(clouds):
    x, y, _ = clouds
    weights = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    biases = torch.arange(4.0, dtype=torch.float64)
    labels = torch.where(y == 1, 3, 1)
    for fn in (deviation_angle, adversarial_strength):
        assert fn(weights, x, labels, pair=(1, 3)) == fn(weights[3] - weights[1], x, labels)
    of_pair = adversarial_distance(weights, biases, x, labels, pair=(1, 3))
    torch.testing.assert_close(of_pair, adversarial_distance(weights[3] - weights[1], 2.0, x, labels))
    turned = deviation_angle(weights, x, labels, pair=(3, 1))  # both the normal and the line turn round
    torch.testing.assert_close(turned, deviation_angle(weights, x, labels, pair=(1, 3)))


def test_nearest_centroid_is_not_tilted(clouds):
    from sklearn.neighbors import NearestCentroid

    x, y, _ = clouds
    i, j = x[y == 0].mean(0), x[y == 1].mean(0)
    assert deviation_angle(j - i, x, y) < 1e-12
    assert adversarial_strength(j - i, x, y) == 1
    assert adversarial_strength(i - j, x, y) == math.inf
    found = (x - (i + j) / 2) @ (j - i) > 0
    assert (found.numpy() == NearestCentroid().fit(x, y).predict(x)).all()


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2, 1.5])
def test_tilt_across_everything(clouds, angle):
    x, y, w = clouds
    z = x[y == 1].mean(0) - x[y == 0].mean(0)
    basis = torch.linalg.qr(torch.stack([w, z], 1)).Q
    v = torch.ones(5, dtype=torch.float64)
    v = v - basis @ (basis.T @ v)
    point = torch.linspace(-1, 1, 5, dtype=torch.float64)
    weight, bias = tilt(w, 0.3, v, angle, through=point)
    torch.testing.assert_close(weight.norm(), torch.ones_like(bias), **EXACT)
    assert abs(weight @ point + bias) < 1e-12
    expected = math.cos(angle) * deviation_angle(w, x, y).cos()
    torch.testing.assert_close(deviation_angle(weight, x, y).cos(), expected, **EXACT)
    _, kept = tilt(w, 0.3, v, angle)
    foot = -0.3 / w.square().sum() * w
    assert abs(weight @ foot + kept) < 1e-12


def test_plane_holds_the_normal(clouds):
    x, y, w = clouds
    plane = tilting_plane(w, x, y)
    assert abs(plane.zhat @ plane.nhat) < 1e-12
    inside = (w @ plane.zhat) * plane.zhat + (w @ plane.nhat) * plane.nhat
    torch.testing.assert_close(inside, w, **EXACT)
    assert plane.coords.shape == (90, 2)
    assert (tilting_plane(plane.zhat, x, y).nhat == 0).all()


def test_free_tilt_tells_the_two_types_apart():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 4, dtype=torch.float64, generator=g), torch.arange(4000) % 2
    sign = 2.0 * y - 1
    x[:, 3] *= 1e-3  # quiet and useless
    x[:, 1] = sign + 2 * x[:, 1]  # the classes differ along 0 and 1 in mean ...
    x[:, 0] = 2 * sign + 0.3 * x[:, 0] + (x[:, 1] - sign)  # ... but noise is shared: a tilt by it pays
    fisher = torch.tensor([1.0, -1.0, 0, 0], dtype=torch.float64)
    tilted = fisher + torch.tensor([0, 0, 0, 5.0], dtype=torch.float64)
    split = free_tilt(tilted, 0.0, x[:2000], y[:2000], x[2000:], y[2000:])
    assert split.dropped >= 1
    torch.testing.assert_close(split.angles[0], split.type1 + split.type2)
    torch.testing.assert_close(split.angles[0], deviation_angle(tilted, x[:2000], y[:2000]))
    assert split.type1 > 0.7  # against the shared noise: dropping it would cost accuracy
    assert split.type2 > 0.2  # the quiet direction
    assert split.weight[3].abs() < 1e-3
    assert split.accuracy[-1] < split.accuracy[0] - 0.02
    torch.testing.assert_close(deviation_angle(split.weight, x[:2000], y[:2000]), split.type1)
    right = ((x[2000:] @ split.weight + split.bias > 0).long() == y[2000:]).double().mean()
    torch.testing.assert_close(right, split.accuracy[split.dropped])


def test_free_tilt_with_fewer_samples_than_pixels():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 50, dtype=torch.float64, generator=g), torch.arange(20) % 2
    w = torch.randn(50, dtype=torch.float64, generator=g)
    split = free_tilt(w, 0.1, x, y, x, y)
    assert len(split.angles) <= 20  # what the samples vary along, and what they do not
    assert (split.angles.diff() <= 1e-12).all()
    assert split.angles[-1] < 1e-12
    torch.testing.assert_close(split.accuracy[1], split.accuracy[0])  # first goes what no sample varies along


def test_local_geometry_of_a_linear_model(clouds):
    x, y, w = clouds

    def logits(t):
        return torch.stack([torch.zeros(len(t), dtype=t.dtype), t @ w + 0.2], 1)

    local = local_geometry(logits, x, y)
    torch.testing.assert_close(local.distance, torch.where(y == 1, 1.0, -1.0) * (x @ w + 0.2) / w.norm())
    torch.testing.assert_close(local.angle, deviation_angle(w, x, y).expand(90))
    torch.testing.assert_close(local.grad_norm, w.norm().expand(90))
    given = local_geometry(logits, x[:3], y[:3], centroids=torch.stack([x[y == 0].mean(0), x[y == 1].mean(0)]))
    torch.testing.assert_close(given.angle, local.angle[:3])


def test_refusals(clouds):
    x, y, w = clouds
    with pytest.raises(BadData, match="two classes"):
        deviation_angle(w, x, torch.zeros(90))
    with pytest.raises(BadSetting, match="5 numbers"):
        deviation_angle(w[:3], x, y)
    with pytest.raises(BadData, match="no sample of class 2"):
        deviation_angle(torch.zeros(3, 5), x, y, pair=(0, 2))
    with pytest.raises(BadSetting, match="one row"):
        deviation_angle(w, x, y, pair=(0, 1))
    with pytest.raises(BadSetting, match="parallel"):
        tilt(w, 0.0, 2 * w, 0.1)
    with pytest.raises(BadData, match="one class"):
        local_geometry(lambda t: t, x, torch.zeros(90).long())
