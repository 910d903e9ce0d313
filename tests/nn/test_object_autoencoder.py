import pytest
import torch

from sfumato.errors import BadCheckpoint
from sfumato.masks import random_mask
from sfumato.nn import MaskedObjectAutoencoder


def build(**over):
    torch.manual_seed(0)
    settings = {"cell": (2, 3), "encoder_depth": 2, "encoder_heads": 2, "decoder_depth": 1, "decoder_heads": 2, **over}
    return MaskedObjectAutoencoder(16, (2, 3), **settings).double()


def case(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, 16, generator=g, dtype=torch.float64), random_mask(n, (2, 3), 0.5, generator=g)


def test_visible_tokens_are_encoded_and_all_are_predicted():
    model, (tokens, hidden) = build(), case()
    encoded, predicted = model(tokens, hidden)
    assert encoded.shape == (3, 3, 16)
    assert predicted.shape == (3, 6, 2 * 3 * 3)
    changed = torch.where(hidden[..., None], tokens + 5, tokens)
    assert torch.equal(model.encode(changed, hidden), encoded)  # hidden tokens are not seen
    nothing = torch.zeros_like(hidden)
    assert torch.equal(model.encode(tokens), model.encode(tokens, nothing))
    assert model.encode(tokens[:0], hidden[:0]).shape[0] == model.decode(encoded[:0], hidden[:0]).shape[0] == 0


def test_holes_are_told_apart_by_their_position_only():
    model, (tokens, hidden) = build(), case()
    with torch.no_grad():
        model.decoder_positions.zero_()
    predicted = model.decode(model.encode(tokens, hidden), hidden)
    holes = predicted[hidden].view(3, 3, -1)
    torch.testing.assert_close(holes, holes[:, :1].expand_as(holes))


def test_tokens_return_to_their_places():
    """Without blocks, a visible cell is predicted from its own token alone."""
    model, (tokens, hidden) = build(encoder_depth=0, decoder_depth=0), case()
    encoded = model.encode(tokens, hidden)
    predicted = model.decode(encoded, hidden)
    z = model.norm(model.embed(tokens) + model.positions)
    alone = model.head(model.decoder_norm(z + model.decoder_positions))
    torch.testing.assert_close(predicted[~hidden], alone[~hidden])


def test_first_values_and_widths():
    assert build().positions.detach().std().item() == pytest.approx(1, abs=0.2)
    assert build(token_std=0.02).mask_token.std() < 0.04
    assert isinstance(build().bridge, torch.nn.Identity)
    assert build(decoder_dim=8).decode(torch.randn(1, 3, 16).double(), case(1)[1]).shape == (1, 6, 18)


def test_weights_of_a_vit():
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2).double()
    model = build()
    model.load_vit(vit)
    ours = [*model.encoder, *model.decoder]
    for block, theirs in zip(ours, vit.blocks[1:], strict=True):
        assert torch.equal(block.attn.qkv.weight, theirs.attn.qkv.weight)
    other = build(decoder_heads=4)  # another decoder keeps its weights
    own = other.decoder[0].attn.qkv.weight.clone()
    other.load_vit(vit)
    assert torch.equal(other.encoder[1].attn.qkv.weight, vit.blocks[3].attn.qkv.weight)
    assert torch.equal(other.decoder[0].attn.qkv.weight, own)
    with pytest.raises(BadCheckpoint, match="4 blocks, 6"):
        build(encoder_depth=5).load_vit(vit)
    with pytest.raises(BadCheckpoint, match="another shape"):
        model.load_vit(VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=4, num_heads=2))
