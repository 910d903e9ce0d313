import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from sfumato.errors import BadSetting
from sfumato.nn import add_lora, small_unet


def test_it_begins_as_the_network_was_and_a_change_is_the_product_of_two_paths():
    conv = nn.Conv2d(3, 4, 3).double()
    plain, x = copy.deepcopy(conv), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    a, b = add_lora(conv, 2, alpha=6.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(conv(x), plain(x))
    nn.init.normal_(b)
    narrow = F.conv2d(x, a.view(2, 3, 3, 3))  # 3 x 3 to two channels, then 1 x 1, times 6 / 2
    assert torch.allclose(conv(x), plain(x) + 3 * F.conv2d(narrow, b.view(4, 2, 1, 1)))
    changed = conv(x)
    parametrize.remove_parametrizations(conv, "weight")
    assert torch.equal(conv(x), changed)


def test_only_the_changes_are_trained_and_a_copy_and_a_state_hold_them():
    net = small_unet(8, 1, width=8, mults=(1, 2)).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    before = net(x, t).sample
    trained = add_lora(net, 2)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimizer = torch.optim.SGD(trained, 0.1)
    net(x, t).sample.square().mean().backward()
    optimizer.step()
    after = net(x, t).sample
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(copy.deepcopy(net)(x, t).sample, after)
    again = small_unet(8, 1, width=8, mults=(1, 2)).eval()
    add_lora(again, 2)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, t).sample, after)


def test_what_it_refuses():
    with pytest.raises(BadSetting, match="needs 1 at least"):
        add_lora(nn.Linear(2, 2), 0)
    with pytest.raises(BadSetting, match="ReLU has no layers of Linear, Conv2d"):
        add_lora(nn.ReLU(), 1)
