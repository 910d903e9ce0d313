"""What a model's features are worth: simple readers on them, beside the same network with random weights.

    linear: softmax(W z + b)     nearest neighbours: votes weighed by exp(cos / T)     single places: a linear reader of tokens

Samples are parted at random, class by class, into known ones and others, several times; readers learn from the known half and are
judged on the other. A network that has learned nothing is a good random feature map, so its figure stands beside every other.

>>> import torch, sfumato
>>> label = torch.arange(90) % 3
>>> x = torch.randn(90, 4) + 4 * torch.eye(4)[label]
>>> found = sfumato.probe("representation", torch.nn.Linear(4, 3), [(x, label)], minutes=None)
>>> found.numbers["trained"]["linear"]["mean"] > 0.9  # of what its last layer is given: x itself
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sfumato.data import Batch
from sfumato.errors import BadData, BadSetting, Interrupted
from sfumato.instruments.features import FeatureReader, Features, samples_of, untrained_twin
from sfumato.instruments.findings import Findings, Pictures, Plan, Plot, Section, Table
from sfumato.instruments.kinds import Kind, Setup
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject
from sfumato.instruments.timing import samples_that_fit, seconds_a_sample, seconds_of, told_cut
from sfumato.method import Encoder, Method
from sfumato.nn.at_rest import exact_arithmetic
from sfumato.probes.evaluation import knn_probe, linear_probe, token_probe

TRAINED, UNTRAINED = "trained", "untrained"
READERS = {"linear": "linear", "neighbours": "nearest neighbours", "places": "single places"}
BUDGETS = (1, 2, 5, 10, 20, 50, 100, 200)
"""Labels a class at which the linear reader is tried."""
PLACES = 4096
"""Single places that a reader learns from, and is judged on: enough to tell models apart."""
FEWEST_A_CLASS = 4
SHOWN, NEIGHBOURS = 4, 5

Parting = tuple[Tensor, Tensor]
"""Numbers of the known samples, in random order, and of the others."""


class Settings(Setup):
    """What the representation probe can be told."""

    repeats: int = Field(5, ge=2, description="random partings into known samples and others")
    neighbours: int = Field(20, gt=0, description="nearest neighbours that vote")


def plan(subject: Subject, settings: Settings, minutes: float | None) -> Plan:
    """Time the encoder and a linear reader, and choose samples."""
    if isinstance(subject.owner, Method) and not isinstance(subject.owner, Encoder):
        raise BadSetting(f"{subject.name} gives no features: probe a method that can encode, a classifier, or a network")
    whole = samples_of(subject)
    labels = _labels(whole)
    classes = len(labels.unique())
    limit = None if minutes is None else 60 * minutes
    reader, batch = FeatureReader(subject), _batch_size(subject)
    pair = (whole.x[:batch], labels[:batch])
    sample = seconds_a_sample(lambda pairs: reader.read(x for x, _ in pairs), pair, limit, subject.device)
    width = reader.read([whole.x[:1]]).whole.shape[1]
    half = len(labels) // 2
    noise, drawn = torch.randn(half, width), torch.arange(half) % classes
    fit = seconds_of(lambda: linear_probe(noise, drawn, test=(noise, drawn), scaler="standard"), torch.device("cpu"))
    fits = 2 * settings.repeats * (3 + len(_budgets(half // classes))) * fit
    rest = None if limit is None else max(limit - fits, 0.2 * limit)
    count = min(settings.samples or samples_that_fit(len(labels), sample, 2, rest, FEWEST_A_CLASS * classes), len(labels))
    _labels(Batch(whole.x[:count], whole.index[:count], whole.label[:count]))  # type: ignore[index]
    chosen = {"samples": count, "features": width, "partings": settings.repeats}
    ticks = 2 * (math.ceil(count / batch) + settings.repeats)
    return Plan(chosen, 2 * count * sample + fits, limit, ticks, told_cut(count, len(labels)))


def measure(subject: Subject, settings: Settings, plan: Plan, *, progress: Progress, generator: torch.Generator) -> Findings:
    """Features of the model and of its untrained twin, and what readers make of them."""
    count, batch = plan.chosen["samples"], _batch_size(subject)
    whole = samples_of(subject)
    x, labels = whole.x[:count], _labels(whole)[:count]
    labels = torch.unique(labels, return_inverse=True)[1]
    draws = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
    partings = [_parted(labels, draws) for _ in range(settings.repeats)]
    found: dict[str, Any] = {}
    kept: dict[str, Features] = {}
    notes = list(subject.eval_note)
    with progress.until_stopped(), exact_arithmetic(subject.device.type):
        for name in (TRAINED, UNTRAINED):
            progress.stage(f"features, {name}")
            twin = None
            if name == UNTRAINED:
                twin, told = untrained_twin(subject, draws.initial_seed())
                notes += told
            kept[name] = FeatureReader(subject, twin).read(progress.over(x.split(batch)))
            progress.stage(f"readers, {name}")
            scores = [_scores(kept[name], labels, one, settings) for one in progress.over(partings)]
            found[name] = {reader: _spread([s[reader] for s in scores]) for reader in scores[0]}
    if not found:
        raise Interrupted("stopped before anything was measured: the features were not all read")
    found["chance"] = float(torch.bincount(labels).max()) / count
    if UNTRAINED in found:
        found["gain"] = {r: _gain(found[TRAINED][r], found[UNTRAINED][r]) for r in READERS if r in found[TRAINED]}
    return _findings(subject, found, x, kept[TRAINED].whole, notes)


def _batch_size(subject: Subject) -> int:
    return min(64, max(len(x) for x, _ in subject.batches))


def _labels(samples: Batch) -> Tensor:
    """Class numbers.

    Raises:
        BadData: there are none, or too few samples of them.
    """
    if samples.label is None:
        raise BadData("representation needs a class label with every sample: give one folder per class, or arrays with y")
    classes = len(samples.label.unique())
    if classes < 2 or len(samples) < FEWEST_A_CLASS * classes:
        raise BadData(
            f"representation parts at least two classes of at least {FEWEST_A_CLASS} samples each on average: these are "
            f"{len(samples)} samples of {classes}; --set samples=N takes more"
        )
    return samples.label


def _parted(labels: Tensor, generator: torch.Generator) -> Parting:
    """Half of each class is known, at least one sample of it; the order of the known ones is random."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # class by class, random within
    place = torch.arange(len(labels)) - torch.searchsorted(labels[order], labels[order])  # within its class
    known = 2 * place < torch.bincount(labels)[labels[order]]
    rows = order[known]
    return rows[torch.randperm(len(rows), generator=generator)], order[~known]


def _budgets(most: int) -> list[int]:
    return [n for n in BUDGETS if n < most]


# Readers


def _scores(read: Features, labels: Tensor, parting: Parting, settings: Settings) -> dict[str, float]:
    """Accuracy of every reader, and of the linear one by labels a class (`linear, 5`)."""
    known, others = parting
    z, y = read.whole, labels
    test = (z[others], y[others])
    scores = {
        "linear": linear_probe(z[known], y[known], test=test, scaler="standard"),
        "neighbours": knn_probe(z[known], y[known], test=test, k=settings.neighbours),
    }
    if read.places is not None:
        scores["places"] = _place_score(read.places, labels, parting)
    rank = _rank_in_class(y[known])
    for budget in _budgets(int(torch.bincount(y[known]).max())):
        few = known[rank < budget]
        scores[f"linear, {budget}"] = linear_probe(z[few], y[few], test=test, scaler="standard")
    return scores


def _place_score(places: Tensor, labels: Tensor, parting: Parting) -> float:
    """How well single places tell the class of their sample: places spread evenly over all samples."""
    sides = []
    for rows in parting:
        each = max(1, min(places.shape[1], PLACES // len(rows)))
        step = torch.linspace(0, places.shape[1] - 1, each).round().long()
        few = rows[: max(1, PLACES // each)]
        sides.append((places[few][:, step], labels[few, None].expand(-1, each)))
    return token_probe(*sides[0], test=sides[1]).accuracy


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many samples of the same class come before each."""
    same = F.one_hot(labels).cumsum(0)
    return same.gather(1, labels[:, None])[:, 0] - 1


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean over partings, and its standard error; the partings share samples, so it says how stable the figure is, no more."""
    t = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(t.mean()), "error": float(t.std() / math.sqrt(len(t))), "each": values}


def _gain(trained: Mapping[str, Any], untrained: Mapping[str, Any]) -> dict[str, Any]:
    return _spread([a - b for a, b in zip(trained["each"], untrained["each"], strict=True)])


# Figures


def _findings(subject: Subject, found: dict[str, Any], x: Tensor, features: Tensor, notes: list[str]) -> Findings:
    trained = found[TRAINED]
    headline: dict[str, Any] = {}
    for reader, told in READERS.items():
        if reader in trained:
            headline[told] = (trained[reader]["mean"], trained[reader]["error"])
            if UNTRAINED in found:
                other = found[UNTRAINED][reader]
                headline[f"{told}, untrained"] = (other["mean"], other["error"])
    headline["most frequent class"] = found["chance"]
    names = [name for name in (TRAINED, UNTRAINED) if name in found]
    curves = {name: _by_labels(found[name]) for name in names}
    rows = [
        {"reader": told, **{name: found[name][reader]["mean"] for name in names}}
        | ({"difference": found["gain"][reader]["mean"], "±": found["gain"][reader]["error"]} if "gain" in found else {})
        for reader, told in READERS.items()
        if reader in trained
    ]
    sections = [Section("Readers", "Accuracy on samples that a reader has not seen, mean over the partings.", [Table(rows)])]
    if all(len(line[0]) > 1 for line in curves.values()):
        axes = {"xlabel": "labels a class", "ylabel": "accuracy", "logx": True, "height": 280}
        text = "A linear reader that knows only so many samples of each class."
        sections.append(Section("With few labels", text, [Plot("curves", curves, axes)]))
    if (pictures := _neighbours(x, features)) is not None:
        sections.append(pictures)
    notes.append("± is the standard error over partings of the same samples: how stable a figure is, not how it would repeat")
    return Findings(found, headline, _words(found), sections, notes)


def _by_labels(scores: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    budgets = [int(name.partition(", ")[2]) for name in scores if name.startswith("linear, ")]
    return budgets, [scores[f"linear, {n}"]["mean"] for n in budgets]


def _neighbours(x: Tensor, features: Tensor) -> Section | None:
    """A few pictures, each with those that the features hold nearest."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    low, high = float(x.min()), float(x.max())
    shown = ((x - low) / ((high - low) or 1.0)).float()
    z = F.normalize(features - features.mean(0), dim=1)
    near = (z[:SHOWN] @ z.T).topk(min(NEIGHBOURS + 1, len(z)), 1).indices
    rows = [torch.tensor([k, *(j for j in found if j != k)][: near.shape[1]]) for k, found in enumerate(near.tolist())]
    gap = max(1, x.shape[-1] // 16)
    framed = F.pad(shown[torch.stack(rows)], (gap, gap, gap, gap), value=1.0)  # [rows, columns, C, H, W]
    sheet = framed.permute(2, 0, 3, 1, 4).reshape(x.shape[1], len(rows) * framed.shape[-2], -1)
    text = "On the left a picture, then those that the features hold nearest, by their cosine with the mean taken out."
    return Section("Nearest pictures", text, [Pictures({f"{len(rows)} pictures": sheet})])


def _words(found: Mapping[str, Any]) -> str:
    """Whether training has made the features better, and by how much."""
    trained = found[TRAINED]
    words = f"A linear reader of the features is right on {trained['linear']['mean']:.1%} of the samples it has not seen"
    if "gain" not in found:
        return f"{words}."
    gain = found["gain"]["linear"]
    words += f", of those of the same network untrained on {found[UNTRAINED]['linear']['mean']:.1%}"
    if abs(gain["mean"]) <= 2 * gain["error"]:
        return f"{words}: for this reader the training has changed little."
    return f"{words}: training has made them {'better' if gain['mean'] > 0 else 'worse'} by {abs(gain['mean']):.1%}."


KIND = Kind(Settings, plan, measure)
