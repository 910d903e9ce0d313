import torch
import torch.nn.functional as F
from torch import nn

from sfumato.probes import multiply_adds


def test_products_convolutions_and_attention_by_hand():
    x, q = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 5, 6)
    assert multiply_adds(lambda: nn.Conv2d(3, 7, 3, padding=1)(x)) == 2 * 7 * 64 * 27
    assert multiply_adds(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 4 * 5 * 5 * 6)
    assert multiply_adds(lambda: x + x) == 0


def test_a_model_without_memory_counts_the_same():
    with torch.device("meta"):
        net, x = nn.Linear(1000, 10**6), torch.empty(1, 1000)
    assert multiply_adds(lambda: net(x)) == 10**9
