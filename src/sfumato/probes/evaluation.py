"""What a representation is worth: simple readers on frozen features, and fine-tuning on a few labels.

    linear:  softmax(W z + b), L2-regularised by 1/C          nearest neighbours:  Σ_{k nearest} exp(cos(z, z_k) / T) [y_k = y]

A tiny untrained network is a good random feature map: always show its figure beside the trained one.

Sources: logistic regression as in scikit-learn; weighted neighbours: Wu et al. 2018, section 3.4; fine-tuning on few labels: as
in He et al. 2021, at small scale.

>>> import torch
>>> from sfumato.probes import knn_probe, linear_probe
>>> g = torch.Generator().manual_seed(0)
>>> label = torch.arange(60) % 3
>>> z = torch.eye(3)[label] + 0.1 * torch.randn(60, 3, generator=g)
>>> linear_probe(z[:30], label[:30], test=(z[30:], label[30:]))
1.0
>>> knn_probe(z[:30], label[:30], test=(z[30:], label[30:]), k=5)
1.0
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting

Labelled = tuple[Tensor, Tensor]
"""Features (or images) and class numbers, of equal length."""


class TokenScores(NamedTuple):
    """How well tokens tell their class: share of right tokens, and intersection over union averaged over classes."""

    accuracy: float
    miou: float


@overload
def extract_features(model: Any, data: Any, *, layers: None = ..., batch_size: int = ...) -> Tensor: ...
@overload
def extract_features(model: Any, data: Any, *, layers: Sequence[str], batch_size: int = ...) -> dict[str, Tensor]: ...
def extract_features(
    model: Any, data: Any, *, layers: Sequence[str] | None = None, batch_size: int = 256
) -> Tensor | dict[str, Tensor]:
    """Run a model over data in eval mode, without gradients.

    Args:
        model: a module or a function of images `[B, C, H, W]`. A module with `encode(x)` or `features(x)` is asked for that.
        data: images `[N, C, H, W]`, or a `Batch` (its `x`).
        layers: names of submodules, as in `named_modules()`; their outputs are returned instead. Several calls of one layer in
            a pass: the last counts.
        batch_size: images at a time.

    Returns:
        The outputs for all data, on the CPU; with `layers` a dict of them.

    Raises:
        BadSetting: a layer that the model has not.
    """
    images: Tensor = getattr(data, "x", data)
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    module = owner if isinstance(owner, nn.Module) else None
    run = reader(model)
    collected: dict[str, list[Tensor]] = {name: [] for name in layers or ("",)}
    with torch.no_grad(), _evaluating(module), _outputs(module, layers or ()) as seen:
        for x in torch.split(images, batch_size):
            out = run(x.to(_device(module, x)))
            for name, values in collected.items():
                values.append((seen[name] if layers else out).cpu())
    features = {name: torch.cat(values) for name, values in collected.items()}
    return features if layers else features[""]


def reader(model: Any) -> Callable[[Tensor], Tensor]:
    """How to get features from a model: its `encode`, its `features`, or a call."""
    for name in ("encode", "features"):
        if isinstance(model, nn.Module) and callable(getattr(model, name, None)):
            return getattr(model, name)  # type: ignore[no-any-return]
    return model  # type: ignore[no-any-return]


def linear_probe(features: Tensor, labels: Tensor, *, test: Labelled, scaler: str | None = None, C: float = 1.0) -> float:
    """Test accuracy of logistic regression.

    Args:
        features: `[N, D]`.
        labels: `[N]` class numbers.
        test: features `[M, D]` and labels `[M]`.
        scaler: "standard" (mean 0 and variance 1 of each feature on the training set), or None.
        C: inverse strength of the L2 penalty.

    Returns:
        Share of right answers, 0 to 1.

    Raises:
        BadSetting: an unknown scaler.
    """
    model = _logistic(features, labels, scaler, C)
    return float(model.score(_array(test[0]), test[1].numpy(force=True)))


def knn_probe(features: Tensor, labels: Tensor, *, test: Labelled, k: int = 20, temperature: float = 0.07) -> float:
    """Test accuracy of the vote of the nearest neighbours by cosine, each weighing `exp(cos / T)`.

    Args:
        features: `[N, D]`.
        labels: `[N]` class numbers.
        test: features `[M, D]` and labels `[M]`.
        k: neighbours that vote (all, where there are fewer).
        temperature: T.

    Returns:
        Share of right answers, 0 to 1.

    Reference:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination".
    """
    known = F.normalize(features, dim=1)
    classes = int(labels.max()) + 1
    right = 0
    for z, y in zip(torch.split(test[0], 1024), torch.split(test[1], 1024), strict=True):
        cosine, nearest = (F.normalize(z, dim=1) @ known.T).topk(min(k, len(known)), dim=1)
        votes = cosine.new_zeros(len(z), classes).scatter_add_(1, labels[nearest], ((cosine - 1) / temperature).exp())
        right += int((votes.argmax(1) == y).sum())
    return right / len(test[1])


def token_probe(
    tokens: Tensor, labels: Tensor, *, test: Labelled, scaler: str | None = "standard", C: float = 1.0
) -> TokenScores:
    """Logistic regression on single tokens: a small stand-in for segmentation.

    Args:
        tokens: `[N, L, D]`, patch tokens.
        labels: `[N, L]` class of each token.
        test: tokens `[M, L, D]` and labels `[M, L]`.
        scaler: as for `linear_probe`.
        C: as for `linear_probe`.

    Returns:
        Accuracy and mean intersection over union (over the classes that occur in the test labels or answers).
    """
    model = _logistic(tokens.flatten(0, 1), labels.flatten(), scaler, C)
    truth = test[1].flatten().cpu()
    answer = torch.from_numpy(model.predict(_array(test[0].flatten(0, 1))))
    classes = int(max(truth.max(), answer.max())) + 1
    confusion = torch.bincount(truth * classes + answer, minlength=classes**2).view(classes, classes).double()
    both = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - both
    return TokenScores(float(both.sum() / confusion.sum()), float((both[union > 0] / union[union > 0]).mean()))


def layer_probe(
    model: nn.Module, layers: Sequence[str], data: Any, *, test: Any, scaler: str | None = "standard", C: float = 1.0
) -> dict[str, float]:
    """Test accuracy of a linear probe on each layer, averaged over places or tokens; one pass for all layers.

    Args:
        model: any module on images.
        layers: names of submodules, as in `named_modules()`.
        data: a labelled `Batch`.
        test: another.
        scaler: as for `linear_probe`.
        C: as for `linear_probe`.

    Returns:
        Accuracy by layer.

    Raises:
        BadSetting: a layer that the model has not.
        BadData: no labels.
    """
    if data.label is None or test.label is None:
        raise BadData("a layer probe needs data with labels")
    known, unknown = (extract_features(model, d, layers=layers) for d in (data, test))
    return {
        name: linear_probe(_pooled(known[name]), data.label, test=(_pooled(unknown[name]), test.label), scaler=scaler, C=C)
        for name in layers
    }


def finetune_probe(
    encoder: nn.Module,
    data: Any,
    *,
    test: Any,
    labels: int = 100,
    steps: int = 150,
    batch_size: int = 50,
    lr: float = 1e-3,
    generator: torch.Generator | None = None,
) -> float:
    """Test accuracy after training a copy of the encoder and a linear head on a few labelled images.

    Args:
        encoder: a module that gives features `[B, D]`, by `encode(x)`, `features(x)` or a call; it is not changed.
        data: a labelled `Batch` to take the few from.
        test: another.
        labels: how many labelled images are used.
        steps: AdamW steps.
        batch_size: images a step, drawn without replacement from the few.
        lr: learning rate, constant.
        generator: of the choice of images, their order and the head; the same for arms that are compared.

    Returns:
        Share of right answers, 0 to 1.

    Raises:
        BadData: no labels.
    """
    if data.label is None or test.label is None:
        raise BadData("fine-tuning needs data with labels")
    device = _device(encoder, data.x)
    few = torch.randperm(len(data), generator=generator)[:labels]
    x, y = data.x[few].to(device), data.label[few].to(device)
    tuned = _WithHead(copy.deepcopy(encoder), x[:1], int(data.label.max()) + 1, generator).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr)
    for _ in range(steps):
        rows = torch.randperm(len(few), generator=generator)[:batch_size].to(device)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(tuned(x[rows]), y[rows]))
        optimizer.step()
    answer = extract_features(tuned, test).argmax(1)
    return float((answer == test.label.cpu()).float().mean())


class _WithHead(nn.Module):
    """An encoder and a linear classifier on its features."""

    def __init__(self, encoder: nn.Module, example: Tensor, classes: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(True)
        with torch.no_grad():
            dim = reader(encoder)(example).shape[1]
        self.head = nn.Linear(dim, classes).to(example.device)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.copy_(0.01 * torch.randn(classes, dim, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(reader(self.encoder)(x))
        return logits


def _logistic(features: Tensor, labels: Tensor, scaler: str | None, C: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if scaler not in (None, "standard"):
        raise BadSetting(f"scaler {scaler!r} is not known: standard or None")
    regression = LogisticRegression(C=C, max_iter=2000)
    model = make_pipeline(StandardScaler(), regression) if scaler else regression
    return model.fit(_array(features), labels.numpy(force=True))


def _array(features: Tensor) -> Any:
    return features.numpy(force=True).astype("float64")


def _pooled(features: Tensor) -> Tensor:
    """`[N, D]`: the mean over tokens `[N, L, D]` or places `[N, D, h, w]`."""
    return features.mean((2, 3)) if features.ndim == 4 else features.mean(1) if features.ndim == 3 else features


def _device(module: nn.Module | None, x: Tensor) -> torch.device:
    parameter = None if module is None else next(module.parameters(), None)
    return x.device if parameter is None else parameter.device


@contextmanager
def _evaluating(module: nn.Module | None) -> Iterator[None]:
    before = {} if module is None else {m: m.training for m in module.modules()}
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        for m, training in before.items():
            m.training = training


@contextmanager
def _outputs(module: nn.Module | None, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The last output of each named submodule, while the block runs."""
    known = dict(module.named_modules()) if module is not None else {}
    if missing := [name for name in layers if name not in known]:
        raise BadSetting(f"the model has no layer {missing[0]!r}; it has {', '.join(list(known)[1:9])}, ...")
    seen: dict[str, Tensor] = {}
    hooks = [known[n].register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out)) for n in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
