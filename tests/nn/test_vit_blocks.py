import pytest
import torch
from torch import nn

from sfumato.errors import BadSetting
from sfumato.nn import MaskedViTEncoder, run_blocks, vit_block


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return nn.Sequential(*(vit_block(16, 2, 2.0) for _ in range(3)))


def test_looking_changes_nothing(blocks):
    z = torch.randn(2, 5, 16)
    last, layers, maps = run_blocks(blocks, z, layers=True, attention=True)
    assert torch.allclose(last, blocks(z), atol=1e-5)
    assert torch.allclose(layers[0], blocks[0](z), atol=1e-5)
    assert torch.equal(layers[-1], last)
    assert all(torch.allclose(a.sum(-1), torch.ones(2, 2, 5), atol=1e-5) for a in maps)
    assert run_blocks(blocks, z)[1:] == ([], [])


def test_scores_can_be_changed_block_by_block(blocks):
    z, seen = torch.randn(2, 5, 16), []

    def alone(number, scores):
        seen.append((number, tuple(scores.shape)))
        return scores.masked_fill(~torch.eye(5, dtype=torch.bool), -torch.inf) if number == 1 else scores

    last, _, maps = run_blocks(blocks, z, adjust=alone, attention=True)
    assert seen == [(i, (2, 2, 5, 5)) for i in range(3)]
    assert torch.equal(maps[1], torch.eye(5).expand(2, 2, 5, 5))
    assert not torch.allclose(last, blocks(z), atol=1e-3)
    bias = torch.zeros(5, 5).masked_fill(~torch.eye(5, dtype=torch.bool), -torch.inf)
    everywhere = run_blocks(blocks, z, adjust=lambda _, s: s.masked_fill(~torch.eye(5, dtype=torch.bool), -torch.inf))[0]
    assert torch.allclose(run_blocks(blocks, z, bias=bias)[0], everywhere, atol=1e-5)


def test_an_encoder_is_its_embedding_and_its_blocks():
    torch.manual_seed(0)
    encoder = MaskedViTEncoder(16, 4, 3, 16, 2, 2, positions="relative")
    x, hidden = torch.randn(2, 3, 16, 16), torch.arange(16).expand(2, -1) % 3 == 0
    z, bias = encoder.embed(x, hidden, mask_token=torch.ones(16))
    assert torch.equal(encoder.norm(run_blocks(encoder.blocks, z, bias=bias)[0]), encoder(x, hidden, mask_token=torch.ones(16)))


def test_a_width_that_heads_cannot_share():
    with pytest.raises(BadSetting, match="5 attention heads"):
        vit_block(16, 5)
