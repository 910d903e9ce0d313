import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.errors import BadData, BadSetting
from sfumato.masks import random_mask, take_tokens, to_ids, upsample_mask
from sfumato.nn import MaskedDecoder, MaskedViTEncoder, sincos_2d


def encoder(size=(8, 12), **over):
    torch.manual_seed(0)
    return MaskedViTEncoder(size, 4, 3, dim=16, depth=2, heads=4, **over).double()


def images(n=2, size=(8, 12), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hide(n=2, grid=(2, 3), ratio=0.5, seed=1):
    return random_mask(n, grid, ratio, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("init_values", [None, 0.1])
def test_unmasked_it_is_timms_vit_and_exports_to_it(cls, positions, init_values):
    ours = encoder(cls=cls, positions=positions, init_values=init_values)
    arguments, state = ours.timm_weights()
    vit = VisionTransformer(**arguments).double()
    vit.load_state_dict(state)
    x = images()
    assert torch.allclose(vit.forward_features(x), ours(x), atol=1e-6)
    assert torch.allclose(vit(x), ours.features(x), atol=1e-6)


def test_from_timm_and_back():
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, init_values=0.1, class_token=True, num_classes=7
    )
    ours = MaskedViTEncoder.from_timm(vit)
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(ours(x), vit.forward_features(x), atol=1e-5)
    state = ours.timm_weights()[1]
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in state.items())
    bare = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, no_embed_class=True)
    assert torch.allclose(MaskedViTEncoder.from_timm(bare)(x), bare.forward_features(x), atol=1e-5)


@pytest.mark.parametrize(
    "odd", [{"reg_tokens": 2}, {"act_layer": "relu"}, {"qk_norm": True}, {"fc_norm": True}, {"pos_embed": ""}]
)
def test_from_timm_refuses_what_is_not_plain(odd):
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, **odd)
    with pytest.raises(BadSetting, match="not a plain ViT"):
        MaskedViTEncoder.from_timm(vit)


@pytest.mark.parametrize("mask", [None, hide()])
@pytest.mark.parametrize("cls", [True, False])
def test_blocks_by_hand_start_from_its_tokens(mask, cls):
    ours = encoder(cls=cls)
    z = ours.tokens(images(), mask)
    assert z.shape == (2, (6 if mask is None else 3) + cls, 16)
    for block in ours.blocks:
        z = block(z)
    assert torch.equal(ours.norm(z), ours(images(), mask))
    with pytest.raises(BadData, match="cannot be cut"):
        ours.tokens(images(size=(8, 13)))


def test_settings_rebuild_the_encoder():
    ours = encoder(cls=False, mlp_ratio=2.0, positions="relative")
    again = MaskedViTEncoder(**ours.settings).double()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(images()), ours(images()))


def test_shapes_and_nothing_hidden():
    ours, x = encoder(), images()
    assert ours(x, hide()).shape == (2, 4, 16)
    assert torch.equal(ours(x, hide(ratio=0.0)), ours(x))
    assert ours(x, hide(ratio=1.0)).shape == (2, 1, 16)  # the class token alone


@pytest.mark.parametrize("positions", ["sincos", "learned", "relative"])
def test_hidden_pixels_are_not_seen_at_all(positions):
    ours, mask = encoder(positions=positions), hide()
    x, other = images(), images(seed=5)
    mixed = torch.where(upsample_mask(mask, (2, 3), 4), other, x)
    assert torch.equal(ours(x, mask), ours(mixed, mask))
    token = torch.zeros(16, dtype=torch.float64)
    assert torch.equal(ours(x, mask, mask_token=token), ours(mixed, mask, mask_token=token))
    assert not torch.equal(ours(x), ours(mixed))


def test_dropped_tokens_equal_a_vit_on_the_visible_ones():
    """By hand: embed all, add positions, gather, prepend the class token, run the blocks."""
    ours, x, mask = encoder(), images(), hide()
    z = ours.patch_embed.proj(x).flatten(2).transpose(1, 2) + sincos_2d(16, (2, 3))
    z = take_tokens(z, to_ids(mask)[0])
    z = torch.cat((ours.cls_token.expand(2, -1, -1), z), 1)
    for block in ours.blocks:
        z = block(z)
    assert torch.allclose(ours(x, mask), ours.norm(z), atol=1e-6)


def test_mask_token_goes_in_before_positions():
    ours, mask = encoder(), torch.ones(2, 6, dtype=torch.bool)
    token = torch.randn(16, dtype=torch.float64)
    z = token + sincos_2d(16, (2, 3)).double()
    z = torch.cat((ours.cls_token[0], z))[None]
    for block in ours.blocks:
        z = block(z)
    assert torch.allclose(ours(images(), mask, mask_token=token)[0], ours.norm(z)[0], atol=1e-6)


@pytest.mark.parametrize("positions", ["sincos", "relative"])
def test_layers_and_attention(positions):
    ours, x, mask = encoder(positions=positions), images(), hide()
    out = ours(x, mask, return_layers=True, return_attention=True)
    assert torch.allclose(out.tokens, ours(x, mask), atol=1e-12)
    assert torch.allclose(ours.norm(out.layers[-1]), out.tokens)
    assert [a.shape for a in out.attention] == [(2, 4, 4, 4)] * 2
    assert torch.allclose(out.attention[1].sum(-1), torch.ones(2, 4, 4).double())
    assert ours(x, mask, return_layers=True).attention == []


@pytest.mark.parametrize("positions", ["sincos", "learned", "relative"])
def test_other_image_sizes(positions):
    ours = encoder(positions=positions)
    x = images(size=(16, 8))
    assert ours(x).shape == (2, 9, 16)
    assert ours(x, hide(grid=(4, 2), ratio=0.75)).shape == (2, 3, 16)
    assert ours.features(x).shape == (2, 16)


def test_sincos_positions_of_another_size_are_those_of_an_encoder_built_for_it():
    ours, other = encoder(), encoder(size=(16, 8))
    other.load_state_dict(ours.state_dict())
    x = images(size=(16, 8))
    assert torch.allclose(ours(x), other(x), atol=1e-6)  # built in single precision, then widened


def test_gradients_reach_every_parameter_with_relative_bias():
    ours = encoder(positions="relative", cls=False)
    ours(images(), hide()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_second_derivatives_under_the_math_kernel():
    ours, x = encoder(), images()
    with sdpa_kernel(SDPBackend.MATH):
        loss = ours(x, hide()).sin().sum()
    grads = torch.autograd.grad(loss, list(ours.parameters()), create_graph=True)
    products = torch.autograd.grad(grads, list(ours.parameters()), [torch.ones_like(g) for g in grads])
    assert all(p.isfinite().all() for p in products)


def test_autocast_and_float32():
    ours = encoder().float()
    with torch.autocast("cpu", torch.bfloat16):
        z = ours(images().float(), hide())
        assert MaskedDecoder(16, 8, 1, 2, 48, (2, 3))(z, hide()).shape == (2, 6, 48)
    assert (z - ours(images().float(), hide())).abs().max() < 0.2


def test_refusals():
    with pytest.raises(BadSetting, match="multiple of patch"):
        MaskedViTEncoder(30, 4, 3, 16, 1, 2)
    with pytest.raises(BadSetting, match="heads"):
        MaskedViTEncoder(32, 4, 3, 16, 1, 3)
    with pytest.raises(BadData, match="patches of 4"):
        encoder()(images(size=(9, 12)))
    with pytest.raises(BadData, match="channels"):
        encoder()(images()[:, :1])
    with pytest.raises(BadSetting, match="pool"):
        encoder(cls=False).features(images(), pool="cls")
    with pytest.raises(BadSetting, match="relative"):
        encoder(positions="relative").timm_weights()


# ---- the decoder


def decoder(cls=True):
    torch.manual_seed(0)
    return MaskedDecoder(16, 8, 1, 2, 5, (2, 3), cls=cls).double()


@pytest.mark.parametrize("cls", [True, False])
def test_decoder_tokens_stand_in_their_places(cls):
    d, mask = decoder(cls), hide()
    z = torch.randn(2, 3 + cls, 16, dtype=torch.float64)
    tokens = d.tokens(z, mask) - d.positions
    visible = d.embed(z)[:, int(cls) :]
    assert torch.allclose(tokens[:, int(cls) :][~mask], visible.flatten(0, 1))
    assert torch.allclose(tokens[:, int(cls) :][mask], d.mask_token[0].expand(6, -1))
    assert d(z, mask).shape == (2, 6, 5)
    assert torch.equal(d(z, mask), d.decode(d.tokens(z, mask)))


def test_decoder_adds_positions_to_the_class_token_too():
    d = decoder()
    assert d.positions.shape == (1, 7, 8)
    assert torch.allclose(d.positions[0], sincos_2d(8, (2, 3), cls=True).double())


def test_decoder_with_nothing_and_everything_hidden():
    d = decoder()
    assert d(torch.randn(2, 7, 16).double(), hide(ratio=0.0)).shape == (2, 6, 5)
    assert d(torch.randn(2, 1, 16).double(), hide(ratio=1.0)).shape == (2, 6, 5)


@pytest.mark.parametrize("positions", ["sincos", "learned", "relative"])
@pytest.mark.parametrize("token", [None, torch.ones(16, dtype=torch.float64)])
def test_views_of_an_image_are_images_of_their_own(positions, token):
    ours, masks = encoder(positions=positions), torch.cat([hide(seed=seed) for seed in (1, 2, 3)])
    again = ours(images().repeat(3, 1, 1, 1), masks, mask_token=token)
    assert torch.allclose(ours(images(), masks, mask_token=token), again, atol=1e-12)
