import torch
from torch import nn

from sfumato.nn import ObjectSetAttention


def test_attention_keeps_frames_apart_and_does_not_mind_the_order():
    torch.manual_seed(0)
    attention, x = ObjectSetAttention(16).double(), torch.randn(6, 16, dtype=torch.float64)
    frame = torch.tensor([0, 0, 0, 2, 2, 5])
    out = attention(x, frame)
    torch.testing.assert_close(out[:3], attention(x[:3], frame[:3]))
    torch.testing.assert_close(out[5:], attention(x[5:], frame[5:]))
    order = torch.tensor([2, 4, 0, 5, 3, 1])
    torch.testing.assert_close(attention(x[order], frame[order]), out[order])
    assert not torch.allclose(out[:2], attention(x[:2], frame[:2]))  # they do look at each other
    assert attention(x[:0], frame[:0]).shape == (0, 16)


def test_the_second_sum_adds_the_input():
    torch.manual_seed(0)
    attention, x = ObjectSetAttention(16), torch.randn(3, 16)
    with torch.no_grad():
        attention.feed[2].weight.zero_()
        attention.feed[2].bias.zero_()
    torch.testing.assert_close(attention(x, torch.zeros(3)), nn.functional.layer_norm(x, (16,)))
