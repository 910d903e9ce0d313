"""Which layers of a model are looked at, and what is kept of them."""

import pytest
import torch
from torch import nn

from sfumato.errors import BadSetting
from sfumato.instruments import prepare_subject
from sfumato.instruments.layers import MOST, find_layers, read_layers


def subject_of(net, count=10, size=3):
    generator = torch.Generator().manual_seed(0)
    return prepare_subject(net, [(torch.randn(count, size, generator=generator), torch.arange(count) % 2)])


def titles(net, wanted=None):
    return [layer.title for layer in find_layers(subject_of(net), wanted)]


def test_layers_that_only_feed_or_change_nothing_are_left_out():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(), nn.Identity(), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)
    )
    assert titles(net) == ["1 (ReLU)", "4 (Linear)", "5 (LayerNorm)", "output"]
    assert titles(nn.Linear(3, 2)) == ["output"]
    assert titles(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh())) == ["1 (Tanh)", "output"]


def test_a_layer_that_is_called_again_is_left_out_unless_named():
    twice = nn.Tanh()
    net = nn.Sequential(nn.Linear(3, 4), twice, nn.Linear(4, 4), twice, nn.Linear(4, 2))
    assert titles(net) == ["output"]
    assert titles(net, "1, 0") == ["1 (Tanh)", "0 (Linear)", "output"]


def block(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


def test_deep_models_are_looked_at_block_by_block():
    flat = nn.Sequential(*[block(3) for _ in range(3)], nn.Linear(3, 2))
    assert titles(flat) == ["0.1 (ReLU)", "1.1 (ReLU)", "2.1 (ReLU)", "output"]
    deep = nn.Sequential(
        nn.Sequential(*[block(3) for _ in range(9)]), nn.Sequential(*[block(3) for _ in range(9)]), nn.Linear(3, 2)
    )
    assert titles(deep) == ["0 (Sequential)", "1 (Sequential)", "output"]
    long = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)], nn.Linear(3, 2))
    found = titles(long)
    assert (len(found), found[0], found[-2:]) == (MOST + 1, "0 (Linear)", ["39 (Linear)", "output"])


def test_blocks_that_end_with_an_activation_in_place_stay():
    blocks = [
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True))
        for _ in range(10)
    ]
    assert titles(nn.Sequential(*blocks, nn.Linear(3, 2))) == [*(f"{i} (Sequential)" for i in range(10)), "output"]


def test_names_that_are_no_layers():
    net = nn.Sequential(block(3), nn.Linear(3, 2))
    with pytest.raises(BadSetting, match=r"there is no layer '0.2'; did you mean 0.1 or 0.0"):
        titles(net, "0.2")
    net.spare = nn.Linear(1, 1)
    net.forward = lambda x: net[1](net[0](x))
    with pytest.raises(BadSetting, match="'spare' is not called"):
        titles(net, "spare")
    flat = nn.Sequential(nn.Linear(3, 2), nn.Flatten(0))
    loss = lambda out, _: out.square().mean()  # noqa: E731
    subject = prepare_subject(flat, [(torch.randn(4, 3), torch.arange(4) % 2)], loss=loss)
    with pytest.raises(BadSetting, match="no numbers for each sample by itself"):
        find_layers(subject)


def test_what_is_kept_is_of_its_own_moment():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.first(x)
            h += 100  # over what the hook saw
            return self.second(h)

    subject = subject_of(Adding())
    layers = find_layers(subject)
    x = subject.batches[0][0]
    found = read_layers(subject, layers, [(x[:4], None), (x[4:], None)], lambda layer, values: values)
    torch.testing.assert_close(found["first"], subject.module.first(x).detach())
    torch.testing.assert_close(found[""], subject.module(x).detach())
    some = read_layers(subject, layers, [(x, None)], lambda layer, values: values[:, :1])
    torch.testing.assert_close(some["first"], found["first"][:, :1])
    assert not any(m._forward_hooks for m in subject.module.modules())
