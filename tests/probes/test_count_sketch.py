import pytest
import torch

from sfumato.errors import BadData, BadSetting
from sfumato.probes import CountSketch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_sketch_is_linear_and_repeats():
    a, b = torch.randn(2, 5, 100, dtype=torch.float64, generator=seeded())
    sketch = CountSketch(100, 7, generator=seeded(1))
    torch.testing.assert_close(sketch(2 * a - b), 2 * sketch(a) - sketch(b))
    torch.testing.assert_close(CountSketch(100, 7, generator=seeded(1))(a), sketch(a))
    assert not torch.allclose(CountSketch(100, 7, generator=seeded(2))(a), sketch(a))
    assert sketch(a.float()).dtype == torch.float32


def test_every_number_goes_to_one_bucket_with_one_sign():
    found = CountSketch(23, 5, generator=seeded())(torch.eye(23))
    assert (found.abs().sum(1) == 1).all()
    torch.testing.assert_close(found.abs().argmax(1), torch.arange(23) % 5)
    assert 0 < (found.sum(1) > 0).sum() < 23


def test_parts_are_the_whole():
    parts = {"a": torch.randn(2, 3, 4, 5, generator=seeded()), "b": torch.randn(2, 3, 7, generator=seeded(1))}
    whole = torch.cat([p.flatten(2) for p in parts.values()], 2)
    sketch = CountSketch(27, 4, generator=seeded(2))
    torch.testing.assert_close(sketch.of_parts(parts, lead=2), sketch(whole))


def test_inner_products_are_right_on_average_with_the_known_variance():
    a, b = torch.randn(2, 60, dtype=torch.float64, generator=seeded())
    generator, width = seeded(1), 15
    found = torch.stack([(lambda s: s(a) @ s(b))(CountSketch(60, width, generator=generator)) for _ in range(2000)])
    close = torch.arange(60)[:, None] % width == torch.arange(60) % width
    apart = close & ~torch.eye(60, dtype=torch.bool)
    variance = (apart * (torch.outer(a.square(), b.square()) + torch.outer(a * b, a * b))).sum()
    assert abs(found.mean() - a @ b) < 4 * (variance / 2000).sqrt()
    assert found.var().item() == pytest.approx(variance.item(), rel=0.15)


def test_refusals():
    with pytest.raises(BadSetting, match="at least 1"):
        CountSketch(3, 0)
    with pytest.raises(BadData, match="of 3 numbers, and 4 were given"):
        CountSketch(3, 2)(torch.zeros(4))
