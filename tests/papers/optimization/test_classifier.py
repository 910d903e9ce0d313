import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from sfumato.data import Batch, Facts, digits
from sfumato.engine import fit
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.losses import smooth_adversarial_comp_sum, stablemax, stablemax_cross_entropy, trades
from sfumato.method import Context, Encoder, Method, Predictor
from sfumato.nn import MaskedViTEncoder
from sfumato.optim import AdaHessian, PerpGrad
from sfumato.papers.optimization.classifier import Classifier, lr_factor

Config = Classifier.Config


def small(**over):
    return Config.small(**{"channels": 1, "classes": 10, "image_size": 8, **over})


def built(**over):
    torch.manual_seed(0)
    return Classifier(small(**over))


@pytest.mark.parametrize("model", ["conv", "mlp", "vit", "convnet", "resnet18", "vit_tiny_patch16_224"])
def test_every_kind_of_network(model):
    size = 32 if "_" in model else 8
    method = built(model=model, image_size=size, channels=3, classes=4).eval()
    assert isinstance(method, Encoder)
    assert isinstance(method, Predictor)
    for shape in ((2, 3, size, size), (1, 3, 50, 37)):
        p = method.predict(torch.rand(shape))
        assert p.shape == (shape[0], 4)
        torch.testing.assert_close(p.sum(1), torch.ones(shape[0]))
    assert method.encode(torch.rand(2, 3, 40, 40)).shape == (2, method.network.head.in_features)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adahessian", "lbfgs", "mfac", "perpgrad"])
@pytest.mark.parametrize("model", ["conv", "vit"])
def test_every_optimizer_learns_digits(model, optimizer):
    train, test = digits(train=300)
    lr = 1e-2 if optimizer in ("adamw", "adam", "perpgrad") else None
    whole = optimizer == "lbfgs"  # it wants the same loss at every step
    settings = {"optimizer": optimizer, "lr": lr, "batch_size": 300 if whole else 32, "encoder_settings": TINY}
    method, steps = built(model=model, **settings), 2 if whole else 15
    before = method.eval().evaluate([train])["loss"]
    trained = fit(method, train, steps=steps, progress=False, device="cpu")
    figures = trained.evaluate([test])
    assert trained.evaluate([train])["loss"] < before - 0.05
    assert set(figures) == {"accuracy", "loss"}


TINY = {"size": 8, "patch": 2, "channels": 1, "dim": 16, "depth": 2, "heads": 2}


def test_loss_is_cross_entropy_weighted_by_the_batch():
    method = built(label_smoothing=0.1).eval()
    x, label = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    value, weight, logs = method.loss(Batch(x, torch.arange(5), label), None)
    logits = method.network((x - 0.5) / 0.25)
    torch.testing.assert_close(value, F.cross_entropy(logits, label, label_smoothing=0.1))
    assert weight == 5
    torch.testing.assert_close(logs["accuracy"], (logits.argmax(1) == label).float().mean())
    torch.testing.assert_close(method.predict(x), logits.softmax(1))


def test_evaluate_weighs_unequal_batches():
    method = built().eval()
    train, _ = digits(train=50)
    parts = [Batch(train.x[a:b], train.index[a:b], train.label[a:b]) for a, b in ((0, 7), (7, 50))]
    assert method.evaluate(parts) == pytest.approx(method.evaluate([train]))


def test_prepare_resizes_the_shorter_side_and_cuts_the_middle():
    method = built()
    x = torch.rand(1, 1, 8, 12)
    torch.testing.assert_close(method.prepare(x), (x[..., 2:10] - 0.5) / 0.25)
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 16, 64)
    assert method.prepare(ramp).shape == (1, 1, 8, 8)
    assert (method.prepare(ramp) * 0.25 + 0.5).mean().item() == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(built(mean=(0.2,), std=(0.5,)).prepare(torch.rand(1, 1, 8, 8) * 0 + 0.7), torch.ones(1, 1, 8, 8))


def test_schedules():
    assert [lr_factor("step", 0.0, p) for p in (0, 0.49, 0.5, 0.74, 0.75, 0.99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [lr_factor("constant", 0.2, p) for p in (0, 0.1, 0.2, 0.9)] == pytest.approx([0, 0.5, 1, 1])
    assert lr_factor("cosine", 0.1, 0.55) == pytest.approx(0.5)
    method = built(schedule="step", warmup=0.0, lr=0.4)
    optimizers = method.optimizers()
    ctx = Context(60, 100, 0, torch.Generator(), optimizers)
    next(method.steps(ctx))
    assert optimizers["net"].param_groups[0]["lr"] == pytest.approx(0.04)


def test_settings_from_the_data_and_customary_ones():
    facts = Facts(100, 1, (8, 8), tuple("abc"), ("x", "index", "label"))
    config = Config.small().fitted(facts)
    assert (config.channels, config.classes, config.image_size, config.crop) == (1, 3, 8, False)
    photos = Config().fitted(Facts(100, 3, None, tuple("ab")))
    assert (photos.image_size, photos.crop) == (224, True)
    optimizer = built(optimizer="adahessian", lr=None, optimizer_settings={"hessian_every": 5}).optimizers()["net"]
    assert isinstance(optimizer, AdaHessian)
    assert (optimizer.defaults["lr"], optimizer.hessian_every) == (0.15, 5)
    assert built(optimizer="sgd", lr=None).optimizers()["net"].defaults["lr"] == 0.1


def test_augmentation():
    photo = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    assert built(augment=True, image_size=16, channels=3).augment()(photo).shape == (3, 16, 16)
    assert built(crop=True, image_size=16, channels=3).augment()(photo).shape == (3, 16, 16)
    assert built().augment() is None


class Pretrained(Method):
    def __init__(self):
        super().__init__()
        self.encoder = MaskedViTEncoder(**TINY)
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.3))


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_taking_over_an_encoder(kind):
    previous = Pretrained() if kind == "encoder" else built(model="vit", encoder_settings=TINY, mean=0.3, classes=4)
    method = Classifier.init_from(small(model="conv"), previous).eval()
    source = previous.encoder if kind == "encoder" else previous.network.trunk.encoder
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(method.encode(x), source.eval().features((x - 0.3) / 0.25))
    assert method.predict(x).shape == (3, 10)
    again = Classifier(Config.model_validate(method.config.model_dump())).eval()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.predict(x), method.predict(x))


def test_starting_from_the_same_network_keeps_the_head():
    previous = built()
    assert torch.equal(Classifier.init_from(small(), previous).network.head.weight, previous.network.head.weight)
    fresh = Classifier.init_from(small(classes=3), previous)
    assert torch.equal(fresh.network.trunk[0].weight, previous.network.trunk[0].weight)
    assert fresh.network.head.out_features == 3
    with pytest.raises(BadCheckpoint, match="has none"):
        Classifier.init_from(small(), Method())


@pytest.mark.parametrize("adversarial", ["none", "smooth"])
def test_save_and_load_gives_the_same_output(adversarial):
    train, _ = digits(train=100)
    method = fit(built(batch_size=32, adversarial=adversarial), train, steps=3, progress=False, device="cpu")
    state = copy.deepcopy(method.state_dict())
    again = built()
    again.load_state_dict(state)
    assert torch.equal(again.eval().predict(train.x), method.predict(train.x))
    assert isinstance(method.network.trunk[1], nn.BatchNorm2d)


def test_preview_shows_pictures_and_sensitivity():
    train, _ = digits(train=5)
    rows = built().eval().preview(train, torch.Generator())
    assert [r.shape for r in rows.values()] == [(5, 1, 8, 8)] * 2
    assert rows["sensitive to"].amax() == 1
    with torch.no_grad():
        built().eval().preview(train, torch.Generator())


def test_bad_settings_are_told():
    with pytest.raises(BadSetting, match=r"did you mean resnet"):
        built(model="resnet_18")
    with pytest.raises(BadSetting, match="classes"):
        Classifier(Config.small(channels=1))
    with pytest.raises(BadSetting, match="channels"):
        Classifier(Config.small(classes=2))
    with pytest.raises(BadSetting, match="no weight decay"):
        built(optimizer="lbfgs", weight_decay=0.1).optimizers()
    with pytest.raises(BadSetting, match="do not suit sgd"):
        built(optimizer="sgd", optimizer_settings={"hessian_every": 2}).optimizers()
    with pytest.raises(BadData, match="label"):
        built().loss(Batch(torch.rand(2, 1, 8, 8), torch.arange(2)), None)
    with pytest.raises(ValidationError):
        small(optimizer="sgdd")


def batch_of(count=6):
    train, _ = digits(train=50)
    return Batch(train.x[:count], train.index[:count], train.label[:count])


def context(seed=0, step=0):
    return Context(step, 100, seed, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_comp_sum_contains_cross_entropy(smoothing):
    batch = batch_of()
    plain = built(label_smoothing=smoothing).eval().loss(batch, context()).value
    same, other = (
        built(label_smoothing=smoothing, loss="comp_sum", tau=tau).eval().loss(batch, context()).value for tau in (1.0, 1.5)
    )
    torch.testing.assert_close(same, plain)
    assert other < plain


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_stablemax_takes_the_place_of_softmax(smoothing):
    batch, method = batch_of(), built(label_smoothing=smoothing, loss="stablemax").eval()
    logits = method.network(method.prepare(batch.x))
    value = method.loss(batch, context()).value
    torch.testing.assert_close(value, stablemax_cross_entropy(logits, batch.label, label_smoothing=smoothing))
    torch.testing.assert_close(method.predict(batch.x), stablemax(logits), check_dtype=False)
    figures = method.evaluate([batch])
    assert figures["loss"] == pytest.approx(stablemax_cross_entropy(logits, batch.label).item())
    value.backward()
    assert method.network.head.weight.grad.dtype == torch.float32


def test_stablemax_and_perpgrad_train_together():
    train, test = digits(train=300)
    settings = {"loss": "stablemax", "optimizer": "perpgrad", "lr": 1e-2, "optimizer_settings": {"per": "row"}}
    method = built(model="mlp", **settings)
    optimizer = method.optimizers()["net"]
    assert isinstance(optimizer, PerpGrad)
    assert optimizer.param_groups[0]["per"] == "row"
    trained = fit(method, train, steps=20, progress=False, device="cpu")
    assert trained.evaluate([test])["accuracy"] > 0.6
    with pytest.raises(BadSetting, match="per='column'"):
        built(optimizer="perpgrad", optimizer_settings={"per": "column"}).optimizers()


@pytest.mark.parametrize("kind", ["pgd", "trades", "smooth"])
def test_adversarial_losses_are_the_published_ones(kind):
    batch = batch_of()
    method = built(
        loss="comp_sum", adversarial=kind, adversarial_weight=None if kind == "trades" else 0.5, eps=0.1, rho=1.0
    ).eval()
    value, weight, logs = method.loss(batch, context())
    attacked = method.attack(batch.x, batch.label, torch.Generator().manual_seed(0))
    clean, moved = method.logits(batch.x), method.logits(attacked)
    expected = {
        "pgd": F.cross_entropy(moved, batch.label),
        "trades": trades(clean, moved, batch.label, beta=6.0),
        "smooth": smooth_adversarial_comp_sum(clean, moved, batch.label, nu=0.5),
    }[kind]
    torch.testing.assert_close(value, expected)
    assert weight == 6
    assert ("shift" in logs) == (kind != "pgd")
    assert all(not number.requires_grad for number in logs.values())
    assert 0 < (attacked - batch.x).abs().max() <= 0.1 + 1e-6
    assert 0 <= attacked.min() < attacked.max() <= 1
    if kind == "pgd":
        assert method.criterion(moved, batch.label) > method.criterion(clean, batch.label)


def test_attacks_run_at_rest_and_leave_no_trace():
    batch = batch_of()
    method = built(adversarial="trades")
    state = copy.deepcopy(method.state_dict())
    method.attack(batch.x, batch.label, torch.Generator().manual_seed(0))
    assert method.training
    assert all(torch.equal(t, state[name]) for name, t in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    method.eval()
    assert torch.equal(method.loss(batch, context()).value, method.loss(batch, context()).value)
    assert not torch.equal(method.loss(batch, context()).value, method.loss(batch, context(seed=1)).value)


def test_weight_of_the_attack_rises():
    batch = batch_of()
    method = built(adversarial="smooth", adversarial_warmup=0.2, eps=0.1).eval()
    plain = built().eval().loss(batch, context()).value
    start, middle, end = (method.loss(batch, context(step=step)) for step in (0, 10, 20))
    torch.testing.assert_close(start.value, plain)
    torch.testing.assert_close(middle.value - plain, 0.5 * middle.logs["shift"])
    torch.testing.assert_close(end.value - plain, end.logs["shift"])


@pytest.mark.parametrize("optimizer", ["sgd", "adahessian"])
def test_adversarial_training_makes_robust(optimizer):
    train, test = digits(train=300)
    common = {"model": "mlp", "optimizer": optimizer, "lr": 0.05, "eps": 0.1, "attack_steps": 3}
    figures = {}
    for kind in ("none", "smooth"):
        method = built(**common, loss="comp_sum", adversarial=kind, adversarial_weight=0.3)
        method = fit(method, train, steps=30, progress=False, device="cpu")
        method.config = method.config.model_copy(update={"adversarial": "pgd"})
        figures[kind] = method.evaluate([test])
        assert figures[kind] == method.evaluate([test]), "the same attack every time"
    assert figures["smooth"]["robust_accuracy"] > figures["none"]["robust_accuracy"] + 0.02
    assert figures["smooth"]["robust_accuracy"] < figures["smooth"]["accuracy"]
