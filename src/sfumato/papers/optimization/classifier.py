"""A classifier on labelled pictures: the base on which optimizers, losses and pre-trained encoders are tried.

L(θ) = mean cross-entropy of softmax(f_θ(x)) against labels smoothed by s: (1 − s)·onehot(y) + s / K. Not a paper. Optimizers with
a second derivative work for every network: they run attention through a kernel that has one.

`loss=comp_sum` takes another loss of cross-entropy's family, `loss=stablemax` another softmax (for predictions too). With
`adversarial` the classifier learns from attacked pictures x′:
pgd: L(x′);  trades: L(x) + β KL(p(x) ‖ p(x′));  smooth: L(x) + ν ‖Δ̄(x′) − Δ̄(x)‖₂, with Δ̄ the margins of the label.

Batch normalisation: micro-batches and processes then normalise by their own statistics, so accumulating or distributing is not
exactly the same as one large batch (it is for networks without it). Attacks are made with its running statistics, which every
call of the loss moves on.

>>> import torch
>>> from sfumato.data import Batch
>>> from sfumato.papers.optimization.classifier import Classifier
>>> method = Classifier(Classifier.Config.small(channels=1, classes=3, image_size=8))
>>> loss = method.loss(Batch(torch.rand(4, 1, 8, 8), torch.arange(4), torch.tensor([0, 1, 2, 0])), None)
>>> loss.value.shape, loss.weight, method.predict(torch.rand(2, 1, 20, 13)).shape
(torch.Size([]), 4, torch.Size([2, 3]))
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from sfumato.attacks.gradient_attacks import pgd
from sfumato.attacks.objectives import Objective, kl_shift, margin_shift
from sfumato.data.batch import Batch, Facts
from sfumato.errors import BadCheckpoint, BadData, BadSetting, nearest
from sfumato.losses.comp_sum_family import comp_sum
from sfumato.losses.stable_softmax import symlog, widened
from sfumato.method import Context, Loss, Method, MethodConfig, Result, Step
from sfumato.nn.at_rest import eval_mode
from sfumato.nn.conv_stem_vit import ConvStemViT
from sfumato.nn.masked_convnet import MaskedConvEncoder
from sfumato.nn.masked_vit import MaskedViTEncoder
from sfumato.optim.adahessian import AdaHessian
from sfumato.optim.mfac import MFAC
from sfumato.optim.perp_grad import PerpGrad
from sfumato.optim.schedules import cosine_warmup, linear_ramp

ENCODERS: dict[str, Any] = {"vit": MaskedViTEncoder, "convnet": MaskedConvEncoder, "convit": ConvStemViT}
"""Networks that other methods pre-train; `encoder_settings` make them again."""
OWN_MODELS = ("conv", "mlp", *ENCODERS)
CUSTOMARY = {  # (learning rate, weight decay)
    "sgd": (0.1, 5e-4),
    "adam": (1e-3, 0.0),
    "adamw": (1e-3, 0.01),
    "adahessian": (0.15, 5e-4 / 0.15),  # the official script divides its 5e-4 by the learning rate
    "lbfgs": (1.0, 0.0),
    "mfac": (1e-3, 0.0),
    "perpgrad": (1e-3, 0.0),
}
SHIFTS: dict[str, tuple[Callable[[Tensor], Objective], float]] = {"trades": (kl_shift, 6.0), "smooth": (margin_shift, 1.0)}
"""What an attack changes, added to the loss of the clean pictures, and its customary weight."""


OptimizerName = Literal["sgd", "adam", "adamw", "adahessian", "lbfgs", "mfac", "perpgrad"]


class SupervisedConfig(MethodConfig):
    """What a network, its optimizer and its pictures need; shared by classifier and regressor."""

    model: str = Field("resnet18", description="conv, mlp, vit, convnet, convit, or a timm model (without its weights)")
    channels: int | None = Field(None, gt=0, description="image channels; None: those of the data")
    image_size: int | None = Field(None, gt=0, description="pixels a side; None: as the data, at most 224 (own models: 32)")
    crop: bool | None = Field(None, description="cut pictures to image_size while loading; None: when their sizes differ")
    augment: bool = Field(True, description="random crops and flips while training")
    mean: float | tuple[float, ...] = Field(0.5, description="pixel mean that is subtracted (one number or one a channel)")
    std: float | tuple[float, ...] = Field(0.25, description="pixel deviation that is divided by (one number or one a channel)")
    optimizer: OptimizerName = Field(
        "sgd", description="what trains the weights; perpgrad: AdamW on gradients at right angles to them"
    )
    lr: float | None = Field(None, gt=0, description="learning rate; None: customary for the optimizer")
    weight_decay: float | None = Field(None, ge=0, description="weight decay; None: customary for the optimizer")
    optimizer_settings: dict[str, Any] = Field({}, description="further arguments of the optimizer, such as hessian_every")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="of the rate; step: times 0.1 at 1/2 and 3/4")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises from 0")
    encoder_settings: dict[str, Any] | None = Field(
        None, description="of a vit, convnet or convit, as its encoder records them; None: a small one"
    )

    def largest_size(self) -> int:
        """The side of a picture that the network is made for when the data does not say."""
        return 32 if self.model in OWN_MODELS else 224

    def fitted(self, facts: Facts) -> Self:
        """Channels, classes and size from the data."""
        config = super().fitted(facts)
        largest = self.largest_size()
        size = min(largest, *facts.size) if facts.size else largest
        update = {
            "image_size": config.image_size or size,
            "crop": config.crop if config.crop is not None else facts.size is None,
        }
        return type(config).model_validate({**config.model_dump(), **update})


class Network(nn.Module):
    """A trunk that turns normalised pictures into features `[B, D]`, and a linear head."""

    def __init__(self, trunk: nn.Module, dim: int, outputs: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(dim, outputs)

    def features(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, D]`."""
        features: Tensor = self.trunk(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, outputs]`."""
        outputs: Tensor = self.head(self.features(x))
        return outputs


class Pooled(nn.Module):
    """An encoder with its tokens, or the places of its last map, averaged."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, D]`."""
        features: Tensor = self.encoder.features(x)
        return features


def build_network(config: SupervisedConfig, outputs: int) -> Network:
    """The network that a config names, with fresh weights.

    Raises:
        BadSetting: an unknown model name, or channels that neither the settings nor the data gave.
    """
    size, channels = config.image_size or 224, config.channels
    if channels is None:
        raise BadSetting("channels is not set, and there is no data to take it from: say channels=3 (colour) or 1 (grey)")
    if config.model == "conv":
        return Network(_conv_trunk(channels), 16 * ((size + 1) // 2) ** 2, outputs)
    if config.model == "mlp":
        layers = nn.Linear(channels * size**2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
        return Network(nn.Sequential(nn.Flatten(), *layers), 256, outputs)
    if config.model in ENCODERS:
        encoder = ENCODERS[config.model](**(config.encoder_settings or _small_encoder(config.model, size, channels)))
        return Network(Pooled(encoder), encoder.dim, outputs)
    return _timm_network(config.model, size, channels, outputs)


def _conv_trunk(channels: int) -> nn.Sequential:
    """Two convolutions of 16 channels, the second with stride 2: enough for 8 x 8 digits."""
    first = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    second = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Flatten())


def _small_encoder(kind: str, size: int, channels: int) -> dict[str, Any]:
    """Settings of an encoder of a few layers."""
    if kind == "convnet":
        return {"model": "convnet", "size": size, "channels": channels}
    patch = next(p for p in (16, 8, 4, 2, 1) if size % p == 0 and size // p >= min(6, size))
    vit = {"size": size, "patch": patch, "channels": channels, "dim": 96, "depth": 4, "heads": 3}
    return vit if kind == "vit" else vit | {"patch": max(4, patch), "stem_dims": (32, 48), "stem_blocks": (1, 1)}


def _timm_network(name: str, size: int, channels: int, outputs: int) -> Network:
    import timm

    if not timm.is_model(name):
        near = nearest(name, (*OWN_MODELS, *timm.list_models())) or list(OWN_MODELS)
        raise BadSetting(f"there is no model {name!r}; did you mean {', '.join(near)}?")
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        trunk: Any = timm.create_model(name, img_size=size, **settings)  # transformers must know it,
    except TypeError:
        trunk = timm.create_model(name, **settings)  # convolutions do not take it
    return Network(trunk, getattr(trunk, "head_hidden_size", None) or trunk.num_features, outputs)


class Supervised(Method):
    """What classifier and regressor share: the network, the optimizer and its schedule, and the way pictures are brought in."""

    network: nn.Module
    mean: Tensor
    std: Tensor
    carried: ClassVar[tuple[str, ...]] = ("model", "channels", "image_size", "mean", "std", "encoder_settings")
    """Settings that make the network, and therefore come from the run that a new one starts from."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.network = self.build()
        shape = (-1, 1, 1)
        self.register_buffer("mean", torch.tensor(self.config.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(self.config.std).view(shape), persistent=False)

    def build(self) -> nn.Module:
        """The network that the settings name."""
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the network takes."""
        size = (self.config.encoder_settings or {}).get("size") or self.config.image_size or 224
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def prepare(self, x: Tensor) -> Tensor:
        """Any picture in [0, 1] as the network takes it: shorter side resized, middle cut out, normalised."""
        height, width = self.size
        scale = max(height / x.shape[-2], width / x.shape[-1])
        if scale != 1:
            resized = (max(height, round(x.shape[-2] * scale)), max(width, round(x.shape[-1] * scale)))
            x = F.interpolate(x, resized, mode="bilinear", antialias=True)
        top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
        return (x[..., top : top + height, left : left + width] - self.mean) / self.std

    def encode(self, x: Tensor) -> Tensor:
        """Features `[B, D]`, what the last layer reads, of pictures `[B, C, H, W]` in [0, 1]."""
        features: Tensor = self.network.features(self.prepare(x))  # type: ignore[operator]
        return features

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """One step at the scheduled learning rate."""
        ctx.scale_lr(lr_factor(self.config.schedule, self.config.warmup, ctx.progress))
        yield Step("net", (self.loss,))

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizer that was asked for, over all weights alike."""
        return {"net": make_optimizer(self.config, [p for p in self.parameters() if p.requires_grad])}

    def augment(self) -> Callable[..., Any] | None:
        """Random crops and flips, or only what gives the pictures one size."""
        from torchvision.transforms import v2

        chosen: list[nn.Module] = []
        if self.config.augment:
            chosen = [v2.RandomResizedCrop(self.size, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        elif self.config.crop:
            chosen = [v2.Resize(min(self.size), antialias=True), v2.CenterCrop(self.size)]
        transform: Callable[..., Any] | None = v2.Compose(chosen) if chosen else None
        return transform

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Start from another run's network: a classifier or regressor, or any method with an `encoder` of `ENCODERS`.

        What makes the network is written into the new config, so a checkpoint needs nothing of the earlier run. A head of
        another width starts fresh.

        Raises:
            BadCheckpoint: a run without such an encoder.
        """
        if isinstance(previous, Supervised):
            known = [name for name in cls.carried if hasattr(previous.config, name)]
            update = {name: getattr(previous.config, name) for name in known}
            source: nn.Module = previous.network
        elif kind := next((k for k, made in ENCODERS.items() if isinstance(getattr(previous, "encoder", None), made)), None):
            encoder: Any = previous.encoder
            seen = getattr(previous.config, "image_size", None)
            size = encoder.settings.get("size", seen or 224)
            side = size if isinstance(size, int) else min(size)
            if side != (seen or side):
                raise BadCheckpoint(
                    f"{cls.__name__} starts from an encoder of pictures, that of {type(previous).__name__} sees their latents: "
                    "use its features instead, sfumato apply RUN PICTURES -o FEATURES.npz"
                )
            update = {"model": kind, "encoder_settings": dict(encoder.settings), "channels": encoder.channels, "image_size": side}
            statistics = {name: getattr(previous, name, None) for name in ("mean", "std")}
            update |= {name: tuple(t.flatten().tolist()) for name, t in statistics.items() if isinstance(t, Tensor)}
            source = encoder
        else:
            raise BadCheckpoint(f"{cls.__name__} starts from a run with an encoder; {type(previous).__name__} has none")
        method = cls(type(config).model_validate({**config.model_dump(), **update}))
        target = method.network if isinstance(previous, Supervised) else method.network.trunk.encoder  # type: ignore[union-attr]
        _copy_weights(source, target)  # type: ignore[arg-type]
        return method


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    wanted, state = target.state_dict(), source.state_dict()
    fits = {name: t for name, t in state.items() if name in wanted and wanted[name].shape == t.shape}
    if any(name not in fits and not name.startswith("head.") for name in wanted):
        raise BadCheckpoint("the weights do not fit the network: start from a run of the same model")
    target.load_state_dict(fits, strict=False)


def lr_factor(schedule: str, warmup: float, progress: float) -> float:
    """The learning rate at a point of the training, as a share of the one that was set."""
    if schedule == "cosine":
        return cosine_warmup(progress, warmup=warmup)
    rise = linear_ramp(progress, end=warmup) if warmup else 1.0
    falls = (progress >= 0.5) + (progress >= 0.75) if schedule == "step" else 0
    return float(rise * 0.1**falls)


def make_optimizer(config: SupervisedConfig, params: list[nn.Parameter]) -> Optimizer:
    """The optimizer that a config names.

    Raises:
        BadSetting: arguments that it does not take.
    """
    usual_lr, usual_decay = CUSTOMARY[config.optimizer]
    lr = usual_lr if config.lr is None else config.lr
    decay = usual_decay if config.weight_decay is None else config.weight_decay
    settings: dict[str, Any] = {"lr": lr, "weight_decay": decay}
    if config.optimizer == "sgd":
        settings["momentum"] = 0.9
    if config.optimizer == "lbfgs":
        if decay:
            raise BadSetting("lbfgs has no weight decay: leave weight_decay at none")
        settings = {"lr": lr, "line_search_fn": "strong_wolfe"}
    kinds: dict[str, Callable[..., Optimizer]] = {
        "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
        "adahessian": AdaHessian, "lbfgs": torch.optim.LBFGS, "mfac": MFAC, "perpgrad": _perp_adamw,
    }  # fmt: skip
    try:
        return kinds[config.optimizer](params, **{**settings, **config.optimizer_settings})
    except (TypeError, ValueError) as error:
        raise BadSetting(f"optimizer_settings={config.optimizer_settings} do not suit {config.optimizer}: {error}") from None


def _perp_adamw(params: list[nn.Parameter], per: Any = "tensor", **settings: Any) -> PerpGrad:
    return PerpGrad(torch.optim.AdamW(params, **settings), per=per)


class Classifier(Supervised):
    """Pictures to class probabilities, with any network, optimizer and loss of the family."""

    class Config(SupervisedConfig):
        classes: int | None = Field(None, gt=1, description="number of classes; None: those of the data")
        label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
        loss: Literal["cross_entropy", "comp_sum", "stablemax"] = Field(
            "cross_entropy", description="comp_sum: its family, see tau; stablemax: cross-entropy of StableMax, not softmax"
        )
        tau: float = Field(1.0, ge=0, description="of comp_sum: 0 sum-exponential, 1 cross-entropy, 2 mean absolute error")
        rho: float = Field(1.0, gt=0, description="of comp_sum: the margin that counts as large")
        adversarial: Literal["none", "pgd", "trades", "smooth"] = Field(
            "none", description="how attacked pictures are learnt from"
        )
        eps: float = Field(8 / 255, ge=0, le=1, description="largest change of a pixel by an attack; pixels are 0 to 1")
        attack_steps: int = Field(10, gt=0, description="gradient steps of an attack while training (evaluation: 40)")
        adversarial_weight: float | None = Field(None, ge=0, description="of the change by an attack; None: trades 6, smooth 1")
        adversarial_warmup: float = Field(0.0, ge=0, le=1, description="share of the steps over which that weight rises from 0")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Two convolutions, 300 steps of AdamW: a minute on a CPU."""
            preset: dict[str, Any] = {"model": "conv", "optimizer": "adamw", "lr": 1e-2, "steps": 300, "augment": False}
            return cls(**{**preset, **over})

    needs: ClassVar[tuple[str, ...]] = ("x", "label")

    def build(self) -> nn.Module:
        """The network, with one output a class."""
        if self.config.classes is None:
            raise BadSetting("classes is not set, and there is no labelled data to count them in: say classes=10")
        return build_network(self.config, self.config.classes)

    def logits(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of pictures `[B, C, H, W]` in [0, 1]; for StableMax those whose softmax it is."""
        logits: Tensor = self.network(self.prepare(x))
        return symlog(widened(logits)) if self.config.loss == "stablemax" else logits

    def criterion(self, logits: Tensor, label: Tensor) -> Tensor:
        """The mean loss that the settings name, of logits `[B, K]` and labels `[B]`."""
        smoothing = self.config.label_smoothing
        if self.config.loss != "comp_sum":
            return F.cross_entropy(logits, label, label_smoothing=smoothing)
        if smoothing:
            label = F.one_hot(label, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
        return comp_sum(logits, label, tau=self.config.tau, rho=self.config.rho)

    def attack(self, x: Tensor, label: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures as the training attacks them, like `x`: the network at rest, each pixel changed by at most eps."""
        objective: str | Objective = "ce"
        with eval_mode(self):
            if self.config.adversarial in SHIFTS:
                with torch.no_grad():
                    objective = SHIFTS[self.config.adversarial][0](self.logits(x))
            start: Literal["uniform", "tiny"] = "uniform" if objective == "ce" else "tiny"  # a shift has no slope at x
            settings: dict[str, Any] = {"eps": self.config.eps, "steps": self.config.attack_steps, "init": start}
            return pgd(self.logits, x, label, objective=objective, generator=generator, **settings)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The mean loss, of clean or attacked pictures, with the accuracy on them logged."""
        x, label, kind = batch.x, _label(batch), self.config.adversarial
        attacked = x if kind == "none" else self.attack(x, label, ctx.generator)
        logits = self.logits(attacked if kind == "pgd" else x)
        value = self.criterion(logits, label)
        logs = {"accuracy": (logits.argmax(1) == label).float().mean()}
        if kind in SHIFTS:
            shift, customary = SHIFTS[kind]
            chosen = self.config.adversarial_weight
            weight = linear_ramp(ctx.progress, end=self.config.adversarial_warmup) * (customary if chosen is None else chosen)
            logs["shift"] = moved = shift(logits)(self.logits(attacked), label).mean()
            value = value + weight * moved
        return Loss(value, len(batch), {name: number.detach() for name, number in logs.items()})

    def predict(self, x: Tensor) -> Tensor:
        """Class probabilities `[B, K]` of pictures `[B, C, H, W]` in [0, 1], any height and width."""
        return self.logits(x).softmax(1)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Accuracy and mean cross-entropy on held-out data; after adversarial training also the accuracy under attack.

        That attack (PGD on the margin, 40 steps of eps / 4 from a random start) draws the same start every time.
        """
        robust = self.config.adversarial != "none"
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        generator, count = torch.Generator(self.device).manual_seed(0), 0
        for batch in batches:
            x, label = batch.x, _label(batch)
            logits = self.logits(x)
            sums[0] += (logits.argmax(1) == label).sum()
            sums[1] += F.cross_entropy(logits, label, reduction="sum")
            if robust:
                x = pgd(self.logits, x, label, eps=self.config.eps, steps=40, objective="margin", generator=generator)
                sums[2] += (self.logits(x).argmax(1) == label).sum()
            count += len(batch)
        figures = dict(zip(("accuracy", "loss", "robust_accuracy"), (sums / max(1, count)).tolist()))
        return figures if robust else {name: figures[name] for name in ("accuracy", "loss")}

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The pictures, and where the winning class is most sensitive to them."""
        with torch.enable_grad():
            x = batch.x.detach().clone().requires_grad_()
            slope = torch.autograd.grad(self.logits(x).amax(1).sum(), x)[0]
        heat = slope.abs().amax(1, keepdim=True)
        return {"pictures": batch.x, "sensitive to": heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-12)}


def _label(batch: Batch) -> Tensor:
    if batch.label is None:
        raise BadData("a classifier needs a label with every picture: give one folder per class")
    return batch.label
