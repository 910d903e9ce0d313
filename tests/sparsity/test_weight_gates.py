import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import BadData, BadSetting
from sfumato.nn import gumbel_sigmoid, small_unet
from sfumato.sparsity import MaskAdapter, MaskedUNet, WeightMaskGenerator, gated_conv2d, gated_linear, keep_logit

VECTORS = Path(__file__).parents[1] / "vectors" / "maskunet.npz"
X, T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 500, 999])


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return small_unet(8, 1, width=8, mults=(1, 2), attn_at=(0, 1)).eval().requires_grad_(False)


def _masked(unet, **over):
    return MaskedUNet(copy.deepcopy(unet), hidden=8, **over)


def _disturb(masked, seed=0):
    """As after some training: adapters and generators that say something."""
    for p in masked.mask_parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=_seeded(seed))
    for name, p in masked.masks.named_parameters():
        if name.endswith(("in_bias", "out_bias")):
            p.data -= 4
    return masked


def test_each_sample_has_a_layer_of_its_own():
    g = _seeded()
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 3, 2, 6), (5, 6), (5,)))
    gate = (torch.rand(4, 5, 6, generator=g) > 0.5).double()
    y = gated_linear(x, w, gate, b)
    assert torch.allclose(y, torch.stack([F.linear(x[i], w * gate[i], b) for i in range(4)]), atol=1e-12)
    assert torch.allclose(gated_linear(x, w, gate[0], b), F.linear(x, w * gate[0], b))
    assert gated_linear(x[:, 0, 0], w, gate).shape == (4, 5)
    with pytest.raises(BadData, match="for each sample"):
        gated_linear(x[:3], w, gate)


def test_each_sample_has_a_convolution_of_its_own():
    g = _seeded()
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 2, 7, 6), (5, 2, 3, 3), (5,)))
    gate = (torch.rand(4, 5, 2, 3, 3, generator=g) > 0.5).double()
    how = {"stride": 2, "padding": 1}
    y = gated_conv2d(x, w, gate, b, **how)
    loop = [F.conv2d(x[i : i + 1], w * gate[i], b, **how) for i in range(4)]
    assert torch.allclose(y, torch.cat(loop), atol=1e-12)
    assert torch.allclose(gated_conv2d(x, w, gate[0], **how), F.conv2d(x, w * gate[0], **how))


def test_reference_vectors():
    v = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(VECTORS).items()}
    make = WeightMaskGenerator(16, 8, 1280, hidden=16, factor=int(v["factor"])).double()
    official = {"embed.weight": "proj_temb_weight"} | {
        f"{ours}.{kind}": f"conv_kernel_mask_{theirs}_{kind}"
        for ours, theirs in (("enter", 0), ("leave", 2))
        for kind in ("weight", "bias")
    }
    make.load_state_dict({ours: v[f"gen_{theirs}"] for ours, theirs in official.items()})
    coarse = make(torch.cat([v["sample"], v["res"]], 1), v["temb"])
    assert torch.allclose(coarse, v["raw_mask"], atol=1e-10, rtol=0)
    adapt = MaskAdapter(2, 4, 10, 6).double()
    pairs = {"out": "conv_in", "in": "conv_out"}  # the official names tell the order, not the axis
    weights = {f"{ours}_weight": v[f"ad_{theirs}_weight"][..., 0, 0] for ours, theirs in pairs.items()}
    adapt.load_state_dict(weights | {f"{ours}_bias": v[f"ad_{theirs}_bias"] for ours, theirs in pairs.items()})
    gate = gumbel_sigmoid(adapt(coarse), noise=-v["adapter_expo"].view(2, 10, 6).log())
    assert torch.equal(gate, v["mask"])
    y = gated_linear(v["x"], v["lin_w"], gate, v["lin_b"])
    assert torch.allclose(y, v["y_masked"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("by", ["sample", "time", "static"])
def test_it_begins_as_it_was_trained_and_leaves_the_unet_alone(unet, by):
    masked, plain = _masked(unet, by=by), unet(X, T).sample
    assert torch.allclose(masked(X, T).sample, plain, atol=1e-6)
    assert set(masked.density(X, T).values()) == {1.0}
    assert len(masked.layers) == 16
    changed = _disturb(masked)(X, T, generator=_seeded()).sample
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.allclose(masked.unet(X, T).sample, plain, atol=1e-6)
    again = _masked(unet, by=by)
    again.load_state_dict(masked.state_dict())
    assert torch.equal(again(X, T, generator=_seeded()).sample, changed)
    assert all(0 < share < 1 for share in masked.density(X, T).values())


@pytest.mark.parametrize(("by", "told"), [("sample", True), ("time", False)])
def test_what_the_gates_of_a_sample_depend_on(unet, by, told):
    masked, seen = _disturb(_masked(unet, by=by, sample=False)), []
    look = masked.masks[0].look
    masked.masks[0].look = lambda inputs: seen.append(look(inputs)) or seen[-1]
    other = torch.cat([X[:1], X[1:] + 1])
    for x, t in ((X, T), (other, T), (X, T.flip(0))):
        masked(x, t)
    a, b, c = (coarse["1"] for coarse in seen)
    assert torch.allclose(a[0], b[0], atol=1e-6)
    assert torch.allclose(a[1], b[1], atol=1e-6) != told
    assert not torch.allclose(a[0], c[0], atol=1e-6)


def _learn(masked, steps):
    """Whether a gradient reached the generators, step by step."""
    optimizer, reached = torch.optim.Adam(masked.mask_parameters(), 1e-2), []
    for step in range(steps):
        optimizer.zero_grad()
        masked(X, T, generator=_seeded(step)).sample.square().mean().backward()
        made = [g.leave.weight.grad for block in masked.masks for g in block.generators.values()]
        reached.append(any(bool(g.any()) for g in made))
        optimizer.step()
    return reached


def test_only_the_masks_learn_first_the_adapters_then_the_generators(unet):
    masked = _masked(unet)
    assert _learn(masked, 4) == [False, False, True, True]
    assert all(p.grad is None for p in masked.unet.parameters())


def test_generators_that_begin_at_zero_never_learn(unet):
    masked = _masked(unet)
    for block in masked.masks:
        for name, made in block.generators.items():
            block.generators[name] = WeightMaskGenerator(
                made.enter.in_channels, 4 * made.rows, made.embed.in_features, hidden=8, zero_last=True
            )
    assert not any(_learn(masked, 6))


@pytest.mark.parametrize("where", ["mid_block", "down_blocks"])
def test_other_places_and_convolutions(unet, where):
    masked = _masked(unet, where=where, include=("conv1", "to_q"))
    assert {name.split(".")[-1] for name in masked.layers} == {"conv1", "to_q"}
    assert all(name.startswith(where) for name in masked.layers)
    plain = unet(X, T).sample
    assert torch.allclose(masked(X, T).sample, plain, atol=1e-5)
    assert not torch.allclose(_disturb(masked)(X, T, generator=_seeded()).sample, plain, atol=1e-3)


def test_a_unet_that_attends_to_a_text():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2,
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    plain, masked = unet(x, T[:2], text).sample, MaskedUNet(unet)
    assert torch.allclose(masked(x, T[:2], encoder_hidden_states=text).sample, plain, atol=1e-5)
    assert len(masked.masks) == 1
    assert len(masked.layers) == 16
    assert not any(word in name for name in masked.layers for word in ("ff", "proj_in", "time_emb_proj"))
    changed = _disturb(masked)(x, T[:2], encoder_hidden_states=text, generator=_seeded()).sample
    assert changed.isfinite().all()
    assert not torch.allclose(changed, plain, atol=1e-3)


def test_free_gates_keep_the_share_they_are_set_to(unet):
    masked = _masked(unet, by="free")
    assert [tuple(p.shape) for p in masked.mask_parameters()] == [tuple(w.shape) for w in masked.gated_weights.values()]
    for p in masked.mask_parameters():
        p.data.fill_(float(keep_logit(0.7)))
    shares = torch.tensor([list(masked.density(X, T, generator=_seeded(i)).values()) for i in range(20)])
    assert abs(float(shares.mean()) - 0.7) < 0.02
    shares = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    assert torch.allclose(1 - torch.exp(-keep_logit(shares).exp()), shares, atol=1e-12)


def test_words_are_refused_in_one_line(unet):
    with pytest.raises(BadSetting, match="up_blocks, mid_block"):
        MaskedUNet(unet, where="middle")
    with pytest.raises(BadSetting, match="sample, time, static, free"):
        MaskedUNet(unet, by="text")
    with pytest.raises(BadSetting, match=r"include some of .*conv1"):
        MaskedUNet(small_unet(8, 1, width=8, mults=(1, 2)))
    with pytest.raises(BadSetting, match="Linear has no up_blocks"):
        MaskedUNet(torch.nn.Linear(2, 2))
    masked = _masked(unet)
    masked.unet.enable_gradient_checkpointing()
    with pytest.raises(BadSetting, match="disable_gradient_checkpointing"):
        masked(X, T)
    masked.unet.disable_gradient_checkpointing()
    assert masked(X, T).sample.shape == X.shape
    assert all("forward" not in m.__dict__ for m in masked.unet.modules())
