import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data import match3, match3_labels, modular, sparse_parity
from sfumato.errors import BadSetting


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("op", "rule"), [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul", lambda a, b: a * b)])
def test_modular_tables(op, rule):
    train, test = modular(7, op, train_fraction=0.4, generator=seeded())
    assert (len(train), len(test)) == (19, 30)
    assert sorted(torch.cat([train.index, test.index]).tolist()) == list(range(49))
    for part in (train, test):
        assert part.x.shape == (len(part), 14)
        assert (part.x.view(-1, 2, 7).sum(2) == 1).all()
        a, b = part.x.view(-1, 2, 7).argmax(2).unbind(1)
        assert torch.equal(part.index, a * 7 + b)
        assert torch.equal(part.label, rule(a, b) % 7)


def test_splits_follow_the_generator():
    first, again, other = (modular(11, generator=seeded(s))[0].index for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    one, two = (sparse_parity(generator=seeded())[1] for _ in range(2))
    assert torch.equal(one.x, two.x)


def test_parity_of_the_first_bits():
    train, test = sparse_parity(4, 10, samples=101, train_fraction=0.3, generator=seeded())
    assert (train.x.shape, test.x.shape) == ((30, 14), (71, 14))
    assert set(train.x.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(test.label, (test.x[:, :4] > 0).sum(1) % 2)
    assert torch.equal(1 - 2.0 * test.label, test.x[:, :4].prod(1))  # four bits: an even number of ones, an even number of -1
    alone, _ = sparse_parity(1, 0, samples=10, generator=seeded())
    assert torch.equal(alone.label, (alone.x[:, 0] > 0).long())


@pytest.mark.parametrize("modulus", [2, 5, 11, 12])
def test_marks_against_all_triples(modulus):
    tokens, marks = match3(5, 6, modulus, generator=seeded())
    distinct = match3_labels(tokens, modulus, distinct=True)
    assert torch.equal(distinct, match3(5, 6, modulus, distinct=True, generator=seeded())[1])
    for row, some, different in zip(tokens.tolist(), marks.tolist(), distinct.tolist(), strict=True):
        for i in range(6):
            pairs = [(j, k) for j, k in itertools.product(range(6), repeat=2) if (row[i] + row[j] + row[k]) % modulus == 0]
            assert some[i] == bool(pairs)
            assert different[i] == any(len({i, j, k}) == 3 for j, k in pairs)


def test_reference_marks():
    vectors = np.load(Path(__file__).parents[1] / "vectors" / "kronecker-attention.npz")
    tokens, modulus = torch.from_numpy(vectors["match3_tokens"]).long(), int(vectors["match3_M"])
    assert torch.equal(match3_labels(tokens, modulus), torch.from_numpy(vectors["match3_any"]).long())
    assert torch.equal(match3_labels(tokens, modulus, distinct=True), torch.from_numpy(vectors["match3_distinct"]).long())


def test_share_of_marks_and_long_sequences():
    """Modulus 11 and 8 tokens: 84.6 % of the tokens are in the larger class."""
    _, marks = match3(20_000, 8, 11, distinct=True, generator=seeded())
    assert float(marks.float().mean()) == pytest.approx(0.846, abs=0.005)
    tokens = torch.ones(1, 3000, dtype=torch.long)  # 9 million pairs, all of one sum: counts must stay exact
    assert match3_labels(tokens, 3000, distinct=True).sum() == 0
    tokens[0, 7] = 2998
    assert match3_labels(tokens, 3000, distinct=True).sum() == 3000


def test_bad_settings_are_told():
    for call, words in (
        (lambda: modular(1), "p=1"),
        (lambda: modular(5, "div"), "add, sub or mul"),
        (lambda: modular(5, train_fraction=1.0), "train_fraction=1"),
        (lambda: sparse_parity(0), "k=0"),
        (lambda: sparse_parity(train_fraction=0.0), "train_fraction=0"),
        (lambda: match3(1, 2, 1), "modulus=1"),
    ):
        with pytest.raises(BadSetting, match=words):
            call()
