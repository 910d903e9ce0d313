"""How a model, a word or a run becomes a subject: its module, loss and batches, and what is refused."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfumato.data import Batch
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.instruments import Setup, prepare_subject
from sfumato.instruments.own_loss import OwnLoss
from sfumato.method import Loss, Method, MethodConfig
from sfumato.papers.optimization.classifier import Classifier
from sfumato.probes import HessianOperator

PICTURES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
TIMM = "timm:test_resnet"


def risk(subject):
    with torch.no_grad():
        return sum(float(subject.loss(subject.module(x), y)) * len(x) for x, y in subject.batches) / subject.count


def test_timm_model_by_name():
    subject = prepare_subject(TIMM, (PICTURES, LABELS), Setup(samples=8), seed=3)
    assert subject.count == 8
    assert subject.module.get_classifier().out_features == 5
    assert sum("built anew with 5 outputs" in note for note in subject.notes) == 1
    assert subject.batches[0][0].min() < -0.5  # standardised
    again, other = (prepare_subject(TIMM, (PICTURES, LABELS), Setup(samples=8), seed=3, draw=d) for d in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(subject.module.parameters(), again.module.parameters()))
    assert not torch.equal(next(subject.module.parameters()), next(other.module.parameters()))
    assert torch.equal(subject.batches[0][0], other.batches[0][0])
    free = prepare_subject(TIMM, PICTURES, loss=lambda out, x: out.square().mean() + x.mean())
    assert free.module.get_classifier().out_features == 1000  # the data does not say how many
    assert not any("anew" in note for note in free.notes)


def test_own_weights_in_a_timm_model(tmp_path):
    import timm

    source = timm.create_model("test_resnet", num_classes=1000)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        subject = prepare_subject(TIMM, (PICTURES, LABELS), weights=tmp_path / name)
        assert torch.equal(subject.module.conv1[0].weight, source.conv1[0].weight)
        assert any("last layer is fresh" in note for note in subject.notes)
    with pytest.raises(BadCheckpoint, match="does not fit"):
        prepare_subject("timm:resnet18", (PICTURES, LABELS), weights=tmp_path / "w.pth")


def test_module_factory(tmp_path, monkeypatch):
    (tmp_path / "my_models_here.py").write_text(
        "import torch\n"
        "def small(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5))\n"
        "def half_square(out, x): return out.square().mean() / 2\n"
        "number = 3\n"
        "def broken(): raise ValueError('no luck')\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        subject = prepare_subject("my_models_here:small", (PICTURES, LABELS))
        assert subject.loss_name == "cross_entropy"
        custom = prepare_subject("my_models_here:small", PICTURES, loss="my_models_here:half_square")
        assert risk(custom) == pytest.approx(float(custom.module(PICTURES).square().mean() / 2), rel=1e-5)
        for word, told in (("number", "gives int"), ("broken", "no luck"), ("smal", "did you mean small")):
            with pytest.raises(BadSetting, match=told):
                prepare_subject(f"my_models_here:{word}", (PICTURES, LABELS))
        with pytest.raises(BadSetting, match="importing 'no_such_module_here' failed"):
            prepare_subject("no_such_module_here:net", (PICTURES, LABELS))
        assert str(tmp_path) not in sys.path
    finally:
        sys.modules.pop("my_models_here", None)


def test_targets_take_the_squared_error():
    x, y = torch.randn(20, 4), torch.randn(20, 1)
    net = nn.Linear(4, 1)
    for targets in (y, y[:, 0]):
        subject = prepare_subject(net, [(x, targets)])
        assert subject.loss_name == "mse"
        assert risk(subject) == pytest.approx(float((net(x) - y).square().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "loss", "told"),
    [
        (PICTURES, None, "neither labels nor targets"),
        (PICTURES, "cross_entropy", "label with every sample"),
        ((PICTURES, LABELS), "mse", "target with every sample"),
        ((PICTURES, LABELS), "hinge", "cross_entropy, mse, reconstruction or module:function"),
        ((PICTURES, LABELS + 3), None, r"gives \[5\] outputs a sample, and the data has 8 classes"),
        ((PICTURES[..., :16], LABELS), None, "does not take inputs of 3x32x16"),
    ],
)
def test_data_that_does_not_suit(data, loss, told):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    with pytest.raises((BadData, BadSetting), match=told):
        prepare_subject(net, data, loss=loss)


def test_models_that_do_not_suit():
    data = torch.randn(6, 4), torch.arange(6) % 2
    with pytest.raises(BadSetting, match="no parameters"):
        prepare_subject(nn.Flatten(), data)
    with pytest.raises(BadSetting, match="no trainable"):
        prepare_subject(nn.Linear(4, 2).requires_grad_(False), data)
    with pytest.raises(BadSetting, match="did you mean timm:resnet18"):
        prepare_subject("resnet18", data)
    with pytest.raises(BadSetting, match="resnet18"):
        prepare_subject("timm:resnet19", data)
    with pytest.raises(BadSetting, match="one number"):
        prepare_subject(nn.Linear(4, 2), data, loss=lambda out, y: out)
    broken = nn.Linear(4, 2)
    nn.init.constant_(broken.weight, torch.nan)
    with pytest.raises(BadData, match="nan"):
        prepare_subject(broken, data)


def test_batches_are_as_large_as_the_memory_allows():
    net, data = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), (PICTURES, LABELS)
    assert len(prepare_subject(net, data, Setup(memory=1.0)).batches) == 1
    small = prepare_subject(net, data, Setup(memory=1e-6))
    assert [len(x) for x, _ in small.batches] == [1] * 12
    assert risk(small) == pytest.approx(risk(prepare_subject(net, data)), rel=1e-5)


def test_a_classifier_is_probed_by_its_network_and_criterion():
    method = Classifier(Classifier.Config.small(channels=3, classes=5, image_size=16, label_smoothing=0.1)).eval()
    subject = prepare_subject(method, (PICTURES, LABELS))
    assert subject.module is method.network
    expected = method.criterion(method.logits(PICTURES), LABELS)
    assert risk(subject) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(BadData, match="needs a label"):
        prepare_subject(method, PICTURES)
    with pytest.raises(BadSetting, match="own loss"):
        prepare_subject(method, (PICTURES, LABELS), loss="mse")


class Hiding(Method):
    """Its loss is a mean over as many entries as the noise hides."""

    class Config(MethodConfig):
        batch_size: int = 5

    def __init__(self, config=None):
        super().__init__(config)
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4).double()

    def loss(self, batch, ctx):
        x = batch.x.double()
        hidden = torch.rand(x.shape, generator=ctx.generator) < 0.5
        noisy = x + 0.1 * torch.randn_like(x)  # of torch's own generator
        return Loss((self.net(noisy * ~hidden) - x)[hidden].square().mean(), hidden.sum())


def test_own_loss_is_the_weighted_mean_with_the_noise_held():
    x = torch.rand(13, 4, generator=torch.Generator().manual_seed(1))
    batches = [Batch(x[i : i + 5], torch.arange(i, min(i + 5, 13))) for i in (0, 5, 10)]
    method = Hiding()
    own = OwnLoss(method, batches)
    state = torch.get_rng_state()
    values = [own(n) for n, _ in own.pairs()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, own(n)) for a, (n, _) in zip(values, own.pairs()))
    losses = [own._loss(i) for i in range(3)]
    expected = sum(one.value * one.weight for one in losses) / sum(one.weight for one in losses)
    mean = sum(v.sum() for v in values) / 13
    assert mean.item() == pytest.approx(expected.item())

    hessian = HessianOperator(own, lambda out, _: out.mean(), own.pairs()).dense()
    torch.testing.assert_close(hessian, hessian.T)
    leaves = list(method.parameters())
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(expected, leaves, create_graph=True)])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, leaves, retain_graph=True)]) for g in grads]
    torch.testing.assert_close(hessian, torch.stack(rows))


def test_a_method_without_one_loss_is_refused():
    class Several(Hiding):
        loss = Method.loss

    with pytest.raises(BadSetting, match="several losses"):
        prepare_subject(Several(), torch.rand(5, 4))


def test_a_method_is_probed_by_its_own_loss():
    subject = prepare_subject(Hiding(), torch.rand(13, 4), Setup(batch_size=4))
    assert not subject.separable
    assert [len(x) for x, _ in subject.batches] == [4, 4, 4, 1]
    assert subject.layer("method.net.weight") == "net.weight"
    less = subject.first(8)
    assert [len(x) for x, _ in less.batches] == [4, 4]
    alone = OwnLoss(subject.owner, subject.module._held.batches[:2])
    assert risk(less) == pytest.approx(sum(float(alone(n).sum()) for n, _ in alone.pairs()) / 8)
    assert subject.first(13) is subject
