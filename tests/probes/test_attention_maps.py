import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import BadData
from sfumato.probes import attention_distance, attention_nmi

V = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "hybrid-distill.npz").items()}


def maps(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_reference_values():
    grid = tuple(V["grid"].flatten().tolist())
    distance = attention_distance(V["attention"], grid if len(grid) > 1 else grid[0], float(V["patch"]))
    torch.testing.assert_close(distance, V["attention_distance"], rtol=0, atol=1e-9)
    torch.testing.assert_close(attention_nmi(V["attention"]), V["nmi"], rtol=0, atol=1e-9)


def test_extremes_of_information():
    n = 9
    uniform, own = torch.full((n, n), 1 / n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    assert attention_nmi(uniform).item() == pytest.approx(0, abs=1e-7)
    assert attention_nmi(own).item() == pytest.approx(1)
    assert attention_nmi(own[torch.randperm(n)]).item() == pytest.approx(1)  # which key does not matter
    one_key = torch.zeros(n, n).index_fill_(1, torch.tensor(3), 1.0)
    assert attention_nmi(one_key) == 0
    assert attention_nmi(torch.ones(1, 1)) == 0
    assert attention_nmi(torch.cat((own, own))[:, :n]).item() == pytest.approx(math.sqrt(math.log(n) / math.log(2 * n)))


def test_information_is_of_each_head():
    """Two heads that differ from query to query in opposite ways: their average is blind."""
    a = torch.eye(2, dtype=torch.float64)
    heads = torch.stack((a, a.flip(0)))
    assert attention_nmi(heads).tolist() == pytest.approx([1, 1])
    assert attention_nmi(heads.mean(0)).item() == pytest.approx(0, abs=1e-7)
    assert ((attention_nmi(maps(5, 4, 6, 6)) > 0) & (attention_nmi(maps(5, 4, 6, 6)) < 1)).all()


def test_extremes_of_distance():
    assert attention_distance(torch.eye(12), (3, 4), 16) == 0
    n = torch.arange(12)
    places = torch.stack((n // 4, n % 4), 1).double()
    expected = 16 * (places[:, None] - places).norm(dim=-1).mean()
    uniform = torch.full((2, 3, 12, 12), 1 / 12, dtype=torch.float64)
    torch.testing.assert_close(attention_distance(uniform, (3, 4), 16), expected.expand(2, 3))
    right = torch.eye(12)[(n + 1) % 4 + n // 4 * 4]  # everyone looks at the right neighbour, the last of a row at the first
    assert attention_distance(right, (3, 4), 2).item() == pytest.approx(2 * (1 + 1 + 1 + 3) / 4)


def test_tokens_without_a_place_are_left_out():
    a = maps(2, 9, 9)
    padded = torch.zeros(2, 11, 11, dtype=torch.float64)
    padded[:, :2, 0] = 1
    padded[:, 2:, :2], padded[:, 2:, 2:] = 0.25, 0.5 * a
    torch.testing.assert_close(attention_distance(padded, 3, 8), attention_distance(a, 3, 8))
    padded[:, 2:, 0], padded[:, 2:, 1:] = 1, 0  # only the class token is looked at
    assert attention_distance(padded, 3, 8).tolist() == [0, 0]


def test_what_is_refused():
    with pytest.raises(BadData, match="8 x 8 tokens does not fit a grid of 3 x 3"):
        attention_distance(maps(8, 8), 3, 16)
    with pytest.raises(BadData, match="8 x 9"):
        attention_distance(maps(8, 9), 3, 16)
