"""Masks by name: exact counts, equal draws to the parts, scores, refusals."""

import pytest
import torch

from sfumato.errors import BadSetting
from sfumato.masks import NAMED_MASKS, SCORED, color_noise_mask, count_hidden, named_mask, random_mask


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(batch=6, length=96):
    return torch.rand(batch, length, generator=g(9))


@pytest.mark.parametrize("name", NAMED_MASKS)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 0.75, 1.0])
def test_every_mask_hides_equally_many_in_each_row(name, ratio):
    hidden = named_mask(name, 6, (8, 12), ratio, scores=scores() if name in SCORED else None, generator=g())
    assert hidden.dtype == torch.bool
    assert hidden.shape == (12 if name == "disjoint" else 6, 96)
    expected = 4 * count_hidden(24, ratio, rule="hide_ceil") if name == "block" else count_hidden(96, ratio)
    assert set(hidden.sum(1).tolist()) == {expected}


@pytest.mark.parametrize("name", NAMED_MASKS)
def test_a_generator_gives_the_same_mask_again(name):
    given = scores() if name in SCORED else None
    one, same, other = (named_mask(name, 6, (8, 12), 0.6, scores=given, generator=g(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_they_are_the_masks_of_the_parts():
    assert torch.equal(named_mask("random", 4, 8, 0.6, generator=g()), random_mask(4, 8, 0.6, generator=g()))
    assert torch.equal(named_mask("red", 4, 8, 0.6, generator=g()), color_noise_mask(4, 8, 0.6, color="red", generator=g()))
    assert torch.equal(named_mask("hard", 6, (8, 12), 0.6, scores=scores(), progress=0.0, generator=g()),
                       random_mask(6, (8, 12), 0.6, generator=g()))  # fmt: skip


def test_training_makes_two_of_them_harder():
    few, many = (named_mask("progressive", 4, 10, 0.75, progress=p, generator=g()).float().mean().item() for p in (0.0, 1.0))
    assert few == pytest.approx(0.15, abs=0.011)
    assert many == pytest.approx(0.75)
    hidden = named_mask("hard", 6, (8, 12), 0.5, scores=scores(), progress=1.0, generator=g())
    hardest = scores().topk(24, 1).indices
    assert hidden.gather(1, hardest).all()


def test_semantic_masks_follow_their_weights():
    weights = torch.where(torch.arange(96) < 48, 9.0, 1.0).expand(400, -1)
    hidden = named_mask("semantic", 400, (8, 12), 0.25, scores=weights, generator=g())
    assert hidden[:, :48].float().mean() > 2 * hidden[:, 48:].float().mean()


def test_two_views_cover_the_picture():
    first, second = named_mask("disjoint", 5, 8, 0.6, generator=g()).view(2, 5, 64)
    assert (first | second).all()


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("grene", None, "did you mean green"),
        ("frequency", None, "train mfm"),
        ("hard", None, "needs scores"),
        ("semantic", torch.rand(6, 95), r"scores \[6, 96\]"),
    ],
)
def test_bad_names_and_scores_are_told(name, given, told):
    with pytest.raises(BadSetting, match=told):
        named_mask(name, 6, (8, 12), 0.5, scores=given)
