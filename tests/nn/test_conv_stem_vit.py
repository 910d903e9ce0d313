import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadData, BadSetting
from sfumato.masks import random_mask, take_tokens, to_ids, upsample_mask
from sfumato.nn import ConvStemViT, MaskedConvBlock


def encoder(size=(16, 24), **over):
    torch.manual_seed(0)
    settings = {"stem_dims": (8, 12), "stem_blocks": (1, 2), **over}
    return ConvStemViT(size, 8, 3, dim=16, depth=2, heads=4, **settings).double()


def images(n=2, size=(16, 24), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hide(n=2, grid=(2, 3), ratio=0.5, seed=1):
    return random_mask(n, grid, ratio, generator=torch.Generator().manual_seed(seed))


def test_a_masked_block_never_reads_hidden_places():
    torch.manual_seed(0)
    block = MaskedConvBlock(6).double()
    x, other = (torch.rand(2, 6, 12, 16, dtype=torch.float64) for _ in range(2))
    hidden = upsample_mask(hide(grid=(3, 4)), (3, 4), 4)
    changed = torch.where(hidden, other, x)
    seen = ~hidden.expand_as(x)
    assert torch.equal(block(x, hidden)[seen], block(changed, hidden)[seen])
    assert not torch.allclose(block(x)[seen], block(changed)[seen]), "without the mask it does"
    changed[hidden.expand_as(x)] = torch.nan
    assert block(changed, hidden)[seen].isfinite().all()


def test_a_masked_block_put_together_by_hand():
    torch.manual_seed(0)
    block = MaskedConvBlock(6, kernel=3, mlp_ratio=2).double()
    x, hidden = torch.rand(2, 6, 4, 4, dtype=torch.float64), torch.rand(2, 1, 4, 4) < 0.5

    def norm(t, layer):  # over the channels, with the layer's own numbers
        mean, var = t.mean(1, keepdim=True), t.var(1, keepdim=True, correction=0)
        return (t - mean) / (var + 1e-6).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    def mix(t, layer):
        return F.conv2d(t, layer.weight[:, :, None, None], layer.bias)

    y = mix(norm(x, block.norm1), block.before) * ~hidden
    y = x + mix(F.conv2d(y, block.depthwise.weight, block.depthwise.bias, padding=1, groups=6), block.after)
    z = y + mix(F.gelu(mix(norm(y, block.norm2), block.mlp.fc1)), block.mlp.fc2)
    torch.testing.assert_close(block(x, hidden), z)
    assert block.mlp.fc1.out_features == 12


def test_visible_tokens_do_not_depend_on_hidden_pixels():
    net, x, hidden = encoder(), images(), hide()
    pixels = upsample_mask(hidden, (2, 3), 8)
    assert torch.equal(net(x, hidden), net(torch.where(pixels, images(seed=5), x), hidden))
    assert not torch.allclose(net(x, hidden), net(torch.where(pixels, x, images(seed=5)), hidden))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, hidden).square().sum(), x)
    assert (gradient.masked_select(pixels) == 0).all()
    assert (gradient.masked_select(~pixels) != 0).all()


def test_tokens_stand_in_raster_order():
    """With the transformer cut out and one visible token's own stages, each token is that of its own patch."""
    net, x, hidden = encoder(stem_blocks=(0, 0)), images(), hide()
    net.blocks = torch.nn.Sequential()  # now every token is a function of its own patch and place
    full = net(x)
    assert full.shape == (2, 6, 16)
    assert torch.allclose(net(x, hidden), take_tokens(full, to_ids(hidden)[0]))


def test_the_maps_of_both_stages_reach_the_tokens_before_the_last_norm():
    net, x = encoder(), images()
    net.norm = torch.nn.Identity()
    before = net(x)
    fused = []
    for fusion in net.fusions:
        fusion.register_forward_hook(lambda m, i, out: fused.append(out))
    net(x)
    for fusion in net.fusions:
        torch.nn.init.zeros_(fusion.proj.weight)
        torch.nn.init.zeros_(fusion.proj.bias)
    assert torch.allclose(before, net(x) + fused[0] + fused[1])


def test_other_sizes_and_features():
    net = encoder()
    x = images(size=(32, 16))
    assert net(x).shape == (2, 8, 16)
    assert torch.allclose(net.features(x), net(x).mean(1))
    assert ConvStemViT(**net.settings).grid == net.grid == (2, 3)


def test_channels_last_and_first_agree():
    net, x = encoder(), images()
    assert torch.allclose(net(x), net(x.contiguous(memory_format=torch.channels_last)))


def test_the_papers_size():
    with torch.device("meta"):
        net = ConvStemViT(224, 16, 3, 768, 11, 12)
    blocks = 11 * (12 * 768**2 + 13 * 768)
    stages = sum(2 * (d * d * 2 + d * (25 + 3) + 16 * d * d + 9 * d + 4 * d) for d in (256, 384))
    embeds = 48 * 256 + 3 * 256 + 4 * 256 * 384 + 3 * 384 + 4 * 384 * 768 + 768
    rest = 16 * 256 * 768 + 4 * 384 * 768 + 2 * 768 + (2 * 768 + 768**2 + 768) + 2 * 768
    assert sum(p.numel() for p in net.parameters()) == blocks + stages + embeds + rest
    assert net.grid == (14, 14)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadSetting, match="multiple of 4"):
        ConvStemViT(12, 6, 3, 16, 1, 4)
    with pytest.raises(BadSetting, match="divisor of the size"):
        ConvStemViT(20, 8, 3, 16, 1, 4)
    with pytest.raises(BadSetting, match="odd"):
        MaskedConvBlock(4, kernel=4)
    with pytest.raises(BadData, match="channels"):
        encoder()(torch.rand(1, 1, 16, 24, dtype=torch.float64))
    with pytest.raises(BadData, match="cannot be cut"):
        encoder()(images(size=(12, 24)))


def test_views_of_an_image_share_its_first_embedding():
    net, masks, seen = encoder(), torch.cat([hide(seed=seed) for seed in (1, 2, 3)]), []
    expected = net(images().repeat(3, 1, 1, 1), masks)
    net.embeds[0].register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    torch.testing.assert_close(net(images(), masks), expected)
    assert seen == [2]
