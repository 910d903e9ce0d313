import pytest
import torch

from sfumato.errors import BadData
from sfumato.nn import PixelShuffleHead, unpatchify


def test_tokens_and_maps_agree_with_channel_first_patches():
    head = PixelShuffleHead(8, 4, 3)
    tokens = torch.randn(2, 6, 8)
    pixels = head(tokens, grid=(2, 3))
    assert torch.equal(pixels, head(tokens.transpose(1, 2).view(2, 8, 2, 3)))
    rows = torch.nn.functional.linear(tokens, head.conv.weight.flatten(1), head.conv.bias)
    assert torch.allclose(pixels, unpatchify(rows, 4, (2, 3), 3, order="chw"), atol=1e-5)


def test_tokens_without_their_grid_are_refused():
    with pytest.raises(BadData, match="grid"):
        PixelShuffleHead(8, 4, 3)(torch.randn(2, 6, 8))
