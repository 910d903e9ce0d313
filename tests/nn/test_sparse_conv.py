import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn import Holes, densify, masked_batch_norm, masked_layer_norm, set_hidden, sparsify, visible_forward

VECTORS = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parents[1] / "vectors" / "spark.npz").items()}
HIDDEN = ~VECTORS["active"].squeeze(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_holes(batch=2, rows=2, columns=3, seed=1):
    """At least one visible and one hidden cell a picture, not equally many in each."""
    hidden = torch.rand(batch, rows, columns, generator=seeded(seed)) > 0.5
    hidden[:, 0, 0], hidden[:, -1, -1] = False, True
    return hidden


def pictures(batch=2, channels=3, size=(64, 96)):
    return torch.rand(batch, channels, *size, generator=seeded(), dtype=torch.float64)


def timm_net(name, **settings):
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True, **settings).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm | nn.Conv2d | nn.Linear) and m.bias is not None:
            nn.init.normal_(m.bias)  # biases are what fills holes
        if type(m).__name__ == "GlobalResponseNorm":
            nn.init.normal_(m.weight)  # at 0 it does nothing
            nn.init.normal_(m.bias)
    return net


# ---- the official layers


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_and_pool_are_the_official_ones(packed):
    stride, padding = int(VECTORS["conv_stride"]), int(VECTORS["conv_padding"])
    conv = nn.Conv2d(4, 6, 3, stride, padding)
    conv.load_state_dict({"weight": VECTORS["conv_weight"], "bias": VECTORS["conv_bias"]})
    for layer, wanted in ((conv, VECTORS["conv_out"]), (nn.MaxPool2d(3, 2, 1), VECTORS["maxpool_out"])):
        y = visible_forward(sparsify(nn.Sequential(layer)), VECTORS["x"], HIDDEN, packed=packed)
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["masked", "packed", "weighted"])
def test_batch_norm_is_the_official_one(way):
    norm = nn.BatchNorm2d(4)
    norm.load_state_dict({"weight": VECTORS["bn_weight"], "bias": VECTORS["bn_bias"]}, strict=False)
    sparse = sparsify(norm)

    def run(training):
        if way != "weighted":
            return visible_forward(sparse.train(training), VECTORS["x"], HIDDEN, packed=way == "packed")
        hidden, kept = Holes(HIDDEN).at(16, 16), (norm.running_mean, norm.running_var)
        affine = norm.weight, norm.bias
        return masked_batch_norm(VECTORS["x"], hidden, *kept, *affine, training=training, sync=lambda t: t)

    torch.testing.assert_close(run(True), VECTORS["bn_train_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.running_mean, VECTORS["bn_running_mean"], atol=1e-6, rtol=0)
    torch.testing.assert_close(norm.running_var, VECTORS["bn_running_var"], atol=1e-6, rtol=0)
    torch.testing.assert_close(run(False), VECTORS["bn_eval_out"], atol=1e-5, rtol=0)


def test_layer_norm_is_the_official_one():
    hidden = Holes(HIDDEN).at(16, 16)
    torch.testing.assert_close(masked_layer_norm(VECTORS["x"], hidden), VECTORS["ln_out"], atol=1e-5, rtol=0)
    layer = timm.layers.LayerNorm2d(4)
    for packed in (False, True):
        y = visible_forward(sparsify(layer), VECTORS["x"], HIDDEN, packed=packed)
        torch.testing.assert_close(y, VECTORS["ln_out"], atol=1e-5, rtol=0)


# ---- whole networks

NETS = {
    "resnet": ("test_resnet", {"drop_path_rate": 0.4, "zero_init_last": False}),
    "convnext": ("test_convnext", {"ls_init_value": 1.0, "drop_path_rate": 0.4}),
    "convnext, 1 x 1 convolutions": ("test_convnext2", {"ls_init_value": 1.0, "conv_mlp": True}),
    "convnext v2": ("test_convnext2", {"ls_init_value": None, "use_grn": True}),
    "squeeze and excitation": ("test_efficientnet", {"drop_path_rate": 0.4}),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_masked_and_packed_are_equal_and_holes_are_zero(net):
    """Maps, gradients and running statistics, with the same paths dropped; the maps are 0 in the holes and not elsewhere."""
    net, x, hidden = timm_net(net[0], **net[1]), pictures(), some_holes()
    found = []
    for packed in (False, True):
        sparse = sparsify(copy.deepcopy(net), inplace=True).train()
        torch.manual_seed(3)
        maps = visible_forward(sparse, x, hidden, packed=packed)
        loss = sum(m.square().mean() for m in maps)
        grads = torch.autograd.grad(loss, list(sparse.parameters()), allow_unused=True)
        statistics = [b for b in sparse.buffers() if b.is_floating_point()]
        found.append([*maps, *(g for g in grads if g is not None), *statistics])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)
    for m in maps:
        support = (m != 0).any(1)
        assert torch.equal(support, ~Holes(hidden).at(*m.shape[2:]).squeeze(1))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_without_holes_it_is_the_dense_network(name):
    net, x = timm_net(name), pictures()
    sparse, none = sparsify(net), torch.zeros(2, 2, 3, dtype=torch.bool)
    for training in (True, False):
        dense = net.train(training)(x)
        for out in (sparse.train(training)(x), *(visible_forward(sparse, x, none, packed=p) for p in (False, True))):
            for a, b in zip(out, dense, strict=True):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_pixels_reach_nothing(packed):
    net, x, hidden = sparsify(timm_net("test_resnet")).train(), pictures(), some_holes()
    other = torch.where(Holes(hidden).at(64, 96), torch.rand_like(x), x)
    for a, b in zip(*(visible_forward(net, picture, hidden, packed=packed) for picture in (x, other)), strict=True):
        assert torch.equal(a, b)


def test_there_and_back_keeps_names_values_and_classes():
    net = timm_net("test_convnext")
    sparse = sparsify(net)
    back = densify(sparse)
    assert list(sparse.state_dict()) == list(back.state_dict()) == list(net.state_dict())
    assert all(a is b is c for a, b, c in zip(net.parameters(), sparse.parameters(), back.parameters(), strict=True))
    assert all(a is b for a, b in zip(net.buffers(), sparse.buffers(), strict=True))
    assert [type(m) for m in back.modules()] == [type(m) for m in net.modules()]
    assert type(sparse.stem_0) is not type(net.stem_0)
    assert isinstance(sparse.stem_0, nn.Conv2d)
    assert sparsify(sparse, inplace=True) is sparse
    assert densify(sparse, inplace=True) is sparse
    assert type(sparse.stem_0) is nn.Conv2d


def test_torchvisions_convnext_works_too():
    torch.manual_seed(0)
    block = torchvision.models.convnext.CNBlock(8, 1.0, 0.5)
    net = sparsify(nn.Sequential(nn.Conv2d(3, 8, 4, 4), torchvision.models.convnext.LayerNorm2d(8), block)).double()
    maps = []
    for packed in (False, True):
        torch.manual_seed(1)
        maps.append(visible_forward(net, pictures(), some_holes(), packed=packed))
    torch.testing.assert_close(*maps, atol=1e-9, rtol=1e-6)


LAYERS = {
    "more padding than a cell": nn.Conv2d(3, 4, 7, padding=3),
    "depthwise": nn.Conv2d(3, 3, 7, padding=3, groups=3),
    "dilated": nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "reflected border": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "padding by name": nn.Conv2d(3, 4, 3, padding="same"),
    "uneven": nn.Conv2d(3, 4, (3, 1), padding=(1, 0)),
    "cut into patches": nn.Conv2d(3, 4, 2, 2),
    "every second": nn.Conv2d(3, 4, 1, 2),
    "overlapping pool": nn.MaxPool2d(3, 2, 1),
    "pool": nn.MaxPool2d(2),
    "pool of means": nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
    "overlapping means": nn.AvgPool2d(3, 1, 1),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_window_gives_the_same_packed(layer):
    """Cells of 2 x 4: rims reach over several neighbours, and signed values tell a hole's 0 from the border's -inf."""
    x, hidden = pictures(size=(8, 16)) - 0.6, some_holes(rows=4, columns=4)
    net = sparsify(nn.Sequential(copy.deepcopy(layer))).double()
    masked, packed = (visible_forward(net, x, hidden, packed=p) for p in (False, True))
    torch.testing.assert_close(packed, masked, atol=1e-12, rtol=0)
    with set_hidden(net, hidden) as holes:
        assert torch.equal(masked, holes.blank(layer.double()(holes.blank(x))))


def test_packing_is_exact_and_differentiable_twice():
    holes, x = Holes(some_holes()), pictures(channels=1, size=(4, 6)).requires_grad_()
    assert torch.equal(holes.unpack(holes.pack(x)), holes.blank(x))
    assert holes.pack(x).shape == (int((~holes.hidden).sum()), 1, 2, 2)
    assert torch.autograd.gradcheck(lambda x: holes.with_rim(holes.pack(x), (1, 3)), x)
    assert torch.autograd.gradgradcheck(lambda x: holes.with_rim(holes.pack(x).square(), (0, 1)), x)


# ---- batch norm


def test_weighted_moments_are_those_of_the_gathered_rows():
    x, hidden = pictures(size=(4, 6)), Holes(some_holes()).at(4, 6)
    rows = x.permute(0, 2, 3, 1)[~hidden.squeeze(1)]
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    y = masked_batch_norm(x, hidden, mean, var, training=True, momentum=1.0, sync=lambda t: t)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(var, rows.var(0))
    wanted = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(y.permute(0, 2, 3, 1)[~hidden.squeeze(1)], wanted)
    assert (y.masked_select(hidden.expand_as(y)) == 0).all()


@pytest.mark.parametrize("sync", [None, lambda t: t], ids=["gathered", "weighted"])
def test_gradients_of_the_norms(sync):
    hidden = Holes(some_holes(rows=1, columns=2)).at(2, 2)
    x, w, b = (
        pictures(size=(2, 2)).requires_grad_(),
        torch.rand(3).double().requires_grad_(),
        torch.rand(3).double().requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: masked_batch_norm(x, hidden, None, None, w, b, training=True, sync=sync), (x, w, b)
    )
    assert torch.autograd.gradcheck(lambda x, w, b: masked_layer_norm(x, hidden, w, b), (x, w, b))


def test_nothing_visible_is_no_accident():
    hidden = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    y = masked_batch_norm(torch.rand(2, 3, 4, 4, requires_grad=True), hidden, training=True, sync=lambda t: t)
    assert (y == 0).all()
    assert torch.autograd.grad(y.sum(), y)[0].isfinite().all()


def test_momentum_none_averages_all_batches():
    norm, seen = sparsify(nn.BatchNorm2d(3, momentum=None)).double().train(), []
    for seed in (1, 2, 3):
        x, hidden = torch.rand(2, 3, 4, 6, generator=seeded(seed), dtype=torch.float64), some_holes(seed=seed)
        visible_forward(norm, x, hidden, packed=False)
        seen.append(x.permute(0, 2, 3, 1)[~Holes(hidden).at(4, 6).squeeze(1)].mean(0))
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))


def test_a_synchronised_norm_alone_in_its_world_needs_no_gpu(tmp_path):
    x, hidden = pictures(size=(4, 6)).float(), some_holes()
    alone, plain = sparsify(nn.SyncBatchNorm(3)), sparsify(nn.BatchNorm2d(3))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert torch.equal(alone(x), plain(x))
        for packed in (False, True):
            ours, theirs = (visible_forward(norm, x, hidden, packed=packed) for norm in (alone, plain))
            torch.testing.assert_close(ours, theirs)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(alone.running_var, plain.running_var)
    assert alone.num_batches_tracked == 3
    assert torch.equal(alone.eval()(x), plain.eval()(x))


TWO = """
import sys, torch
import torch.distributed as dist
from sfumato.nn import Holes, sparsify, visible_forward
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
g = torch.Generator().manual_seed(0)
x = torch.rand(4, 3, 4, 4, generator=g, dtype=torch.float64)
hidden = torch.rand(4, 2, 2, generator=g) > 0.5
hidden[:, 0, 0] = False
whole, part = x.clone().requires_grad_(), x[2 * dist.get_rank():][:2].clone().requires_grad_()
rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
one = sparsify(torch.nn.BatchNorm2d(3)).double()
for packed in (False, True):
    two = sparsify(torch.nn.SyncBatchNorm(3)).double()
    expected = visible_forward(one, whole, hidden, packed=packed)
    y = visible_forward(two, part, hidden[rows], packed=packed)
    torch.testing.assert_close(y, expected[rows])
    a, = torch.autograd.grad((expected ** 3).sum(), whole)
    b, = torch.autograd.grad((y ** 3).sum(), part)
    torch.testing.assert_close(b, a[rows])
one.reset_running_stats(); visible_forward(one, whole, hidden, packed=False)
torch.testing.assert_close(two.running_var, one.running_var)
"""


@pytest.mark.slow
def test_synchronised_norms_of_two_processes_are_one_norm_of_all(tmp_path):
    """Unequally many visible positions in each; values, gradients and running statistics."""
    (tmp_path / "two.py").write_text(TWO)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    meet = f"file://{tmp_path}/meet"
    commands = [[sys.executable, str(tmp_path / "two.py"), meet, str(rank)] for rank in (0, 1)]
    runs = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors[-2000:]


# ---- where the mask lies


def test_the_mask_stays_with_its_model_and_ends_with_the_block():
    first, second = (sparsify(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1))).double() for _ in range(2))
    x, hidden = pictures(size=(4, 6)), some_holes()
    dense = second(x)
    with set_hidden(first, hidden):
        assert torch.equal(second(x), dense)
        with pytest.raises(RuntimeError, match="channels"), set_hidden(first, ~hidden):
            first(x[:, :2])
        assert (first(x)[Holes(hidden).at(4, 6).expand(-1, 2, -1, -1)] == 0).all()
    assert (first(x) != 0).all()


def test_a_pooled_vector_is_left_alone():
    """The 1 x 1 maps inside of squeeze and excitation have no holes, and its mean is over what is visible."""
    gate = timm.layers.SEModule(4, rd_channels=2).double()
    x, hidden = pictures(channels=4, size=(4, 6)), some_holes()
    visible = ~Holes(hidden).at(4, 6)
    mean = (x * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
    wanted = x * visible * gate.gate(gate.fc2(gate.act(gate.fc1(mean))))
    for packed in (False, True):
        torch.testing.assert_close(visible_forward(sparsify(gate), x, hidden, packed=packed), wanted)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_bias_of_a_response_norm_does_not_fill_holes(packed, last):
    norm = timm.layers.grn.GlobalResponseNorm(3, channels_last=last).double()
    torch.nn.init.ones_(norm.bias)
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    x, holes = pictures(size=(4, 6)), Holes(some_holes(), packed=packed)
    sparse = sparsify(norm)
    with set_hidden(sparse, holes.hidden, packed=packed):
        y = sparse(holes.enter(x).permute(order)).permute([order.index(i) for i in range(4)])
    torch.testing.assert_close(
        holes.leave(y), holes.blank(norm(holes.blank(x).permute(order)).permute([order.index(i) for i in range(4)]))
    )


def test_half_precision_keeps_its_type():
    net, hidden = sparsify(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))), some_holes()
    with torch.autocast("cpu", torch.bfloat16):
        for packed in (False, True):
            assert visible_forward(net, pictures().float(), hidden, packed=packed).dtype == torch.bfloat16


def test_what_does_not_fit_is_told():
    with pytest.raises(BadSetting, match=r"1 is a GroupNorm, which has no sparse form"):
        sparsify(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)))
    with pytest.raises(BadSetting, match=r"model.layer1.0.se is a EcaModule, which has no sparse form"):
        sparsify(timm.create_model("ecaresnet26t", features_only=True, feature_cls="getter"))
    with pytest.raises(BadSetting, match="call sparsify on it first"), set_hidden(nn.Conv2d(3, 4, 1), some_holes()):
        pass
    net = sparsify(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1)))
    for packed in (False, True):
        with pytest.raises(BadData, match="does not divide into the mask's 2 x 3 cells"):
            visible_forward(net, torch.rand(2, 3, 6, 6), some_holes(), packed=packed)
    with pytest.raises(BadData, match=r"bool of shape \[B, rows, columns\]"):
        Holes(torch.zeros(2, 4))
