import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from sfumato.errors import BadSetting
from sfumato.masks import random_mask
from sfumato.nn import MaskedViTEncoder, capture_qkv, regroup_heads
from sfumato.probes import attention_distance, attention_nmi


def vit(**over):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**settings, **over}).eval()


def images(n=2):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("over", [{}, {"qk_norm": True}, {"reg_tokens": 2}, {"qkv_bias": False}])
def test_it_is_what_a_timm_vit_attends_by(fused, over):
    """The captured attention, applied to the captured values, gives the block's own attention output."""
    net, seen_out = vit(**over), {}
    attn = net.blocks[1].attn
    attn.fused_attn = fused
    attn.register_forward_hook(lambda _m, _i, out: seen_out.setdefault("out", out))
    with torch.no_grad(), capture_qkv(net, [1]) as seen:
        net(images())
        found = seen[1]
        mixed = attn.proj((found.attention() @ found.v).transpose(1, 2).flatten(2))
    assert list(seen) == [1]
    assert torch.allclose(mixed, seen_out["out"], atol=1e-6)


def test_the_attention_that_our_encoder_returns():
    torch.manual_seed(0)
    encoder = MaskedViTEncoder(16, 4, 3, dim=16, depth=2, heads=2)
    hidden = random_mask(2, 4, 0.5, generator=torch.Generator().manual_seed(0))
    expected = encoder(images(), hidden, return_attention=True).attention
    with capture_qkv(encoder) as seen:
        encoder(images(), hidden)
    for i, a in enumerate(expected):
        assert torch.allclose(seen[i].attention(), a, atol=1e-6)
    relative = MaskedViTEncoder(16, 4, 3, dim=16, depth=2, heads=2, positions="relative")
    with capture_qkv(relative, [0]) as seen:
        relative(images())
    assert seen[0].q.shape == (2, 2, 17, 8)


def test_gradients_pass_and_nothing_stays_behind():
    net = vit()
    with capture_qkv(net) as seen:
        net(images())
        first = seen[2].q
        net(images() / 2)
        assert not torch.equal(seen[2].q, first)  # the last pass counts
    seen[2].q.sum().backward()
    assert net.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    seen.clear()
    net(images())
    assert seen == {}
    with pytest.raises(ZeroDivisionError), capture_qkv(net):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in net.modules())


def test_a_pass_can_stop_at_the_last_layer_that_is_wanted():
    net, ran = vit(), []
    net.blocks[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), capture_qkv(net, [1, 0]) as whole:
        net(images())
    ran.clear()
    with torch.no_grad(), capture_qkv(net, [1, 0], stop=True) as seen:
        net(images())
        ran.append("never")
    assert ran == []
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(seen[i], whole[i], strict=True))
    with capture_qkv(net, [], stop=True) as nothing:
        net(images())
    assert nothing == {}
    with pytest.raises(ZeroDivisionError), capture_qkv(net, [0], stop=True):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_attention_probes_on_timm_models_by_name(name):
    net = timm.create_model(name, img_size=64, num_classes=0).eval()
    with torch.no_grad(), capture_qkv(net) as seen:
        net(torch.rand(1, 3, 64, 64))
    assert len(seen) == len(net.blocks)
    maps = seen[0].attention()
    nmi, distance = attention_nmi(maps), attention_distance(maps, net.patch_embed.grid_size, 16)
    assert nmi.shape == distance.shape == (1, net.blocks[0].attn.num_heads)
    assert ((nmi > 0) & (nmi < 1) & (distance > 0) & (distance < 64 * 2**0.5)).all()


def test_what_is_refused():
    with pytest.raises(BadSetting, match="no layer 3: it has 3 blocks"), capture_qkv(vit(), [3]):
        pass
    with pytest.raises(BadSetting, match="no timm Attention"), capture_qkv(timm.create_model("beit_base_patch16_224", depth=1)):
        pass
    with pytest.raises(BadSetting, match="Linear has no layer 0"), capture_qkv(torch.nn.Linear(1, 1), [0]):
        pass


def test_compiled_blocks_are_refused_and_compiled_mlps_are_not():
    model = vit()
    model.blocks[0].mlp.compile(backend="eager")
    with capture_qkv(model) as seen:
        model(images())
    assert list(seen) == [0, 1, 2]
    model.blocks[1].compile(backend="eager")
    with pytest.raises(BadSetting, match="compile its mlp"), capture_qkv(model):
        pass


def test_heads_are_regrouped_channel_by_channel():
    t = torch.rand(2, 4, 5, 6)
    assert torch.equal(regroup_heads(t, 2).transpose(1, 2).flatten(2), t.transpose(1, 2).flatten(2))
    assert regroup_heads(t, 2).shape == (2, 2, 5, 12)
    assert regroup_heads(t, 4) is t
