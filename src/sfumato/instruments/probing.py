"""Any probe on any model and data: `probe(kind, model, data)`.

>>> import torch, sfumato
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
>>> data = torch.randn(50, 4), torch.arange(50) % 3
>>> found = sfumato.probe("curvature", net, data, steps=20, starts=2, minutes=None)
>>> sorted(found.numbers)
['fisher', 'ggn', 'gradient_norm', 'hessian', 'loss']
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from sfumato.engine.loading import configure
from sfumato.engine.randomness import key
from sfumato.errors import BadSetting
from sfumato.instruments.findings import Findings, Plan
from sfumato.instruments.kinds import BareSetup, Kind, Setup, load_kind
from sfumato.instruments.progress import Progress
from sfumato.instruments.subject import Subject, prepare_run, prepare_subject
from sfumato.probes.operators import LossFunction

Model = nn.Module | str | os.PathLike[str]


class Probe:
    """A probe that is ready to run: models, data and settings checked, the time estimated, nothing measured yet.

    Arguments as `probe`; `plan` says what was chosen.
    """

    def __init__(
        self, kind: str, model: Model, data: Any = None, other: Model | None = None, *, loss: str | LossFunction | None = None,
        minutes: float | None = 2.0, weights: Any = None, device: str | None = None, seed: int = 0, **settings: Any,
    ) -> None:  # fmt: skip
        self.kind, self.name, self.seed, self.minutes = load_kind(kind), kind, seed, minutes
        if minutes is not None and not minutes > 0:
            raise BadSetting(f"minutes={minutes}: give a positive number of minutes")
        if self.kind.data != (data is not None):
            wanted = f"say on what: sfumato probe {kind} MODEL --data WHERE" if self.kind.data else "leave out the data"
            raise BadSetting(f"{kind} {'measures on data' if self.kind.data else 'looks at no data'}: {wanted}")
        self.settings: BareSetup = configure(self.kind.settings, "paper", settings)
        models, files = self._models(self.kind, model, other), _files(weights)
        if len(files) > len(models):
            raise BadSetting(f"{len(files)} files of weights for {len(models)} model{'s' * (len(models) > 1)}: give one each")
        files += [None] * (len(models) - len(files))
        started = time.monotonic()
        if isinstance(self.settings, Setup):
            self.subjects: list[Subject] = [
                prepare_subject(
                    one, data, self.settings, loss=loss, usual_loss=self.kind.loss, weights=file, device=device, seed=seed, draw=i
                )
                for i, (one, file) in enumerate(zip(models, files, strict=True))
            ]
        else:
            if loss is not None or weights:
                raise BadSetting(f"{kind} takes a run as it is: leave out loss and weights")
            self.subjects = [prepare_run(one, device=device) for one in models]
        self.plan: Plan = self.kind.plan(*self.subjects, self.settings, minutes)
        self.ready = time.monotonic() - started

    def _models(self, kind: Kind, model: Model, other: Model | None) -> list[Model]:
        if (other is not None) != (kind.models == 2):
            wanted = "two models: MODEL and MODEL_B" if kind.models == 2 else "one model"
            raise BadSetting(f"{self.name} takes {wanted}")
        return [model] if other is None else [model, other]

    def run(self, progress: bool = True) -> Findings:
        """Measure; Ctrl-C gives what was measured by then.

        Raises:
            Interrupted: nothing was measured by then.
        """
        first = self.subjects[0]
        generator = torch.Generator(first.device).manual_seed(key(self.seed, "probe"))
        with Progress(self.name, self.plan.ticks, show=progress) as bar:
            found = self.kind.measure(*self.subjects, self.settings, self.plan, progress=bar, generator=generator)
            seconds, found.interrupted = bar.seconds, bar.stopped
        told = [note for subject in self.subjects for note in subject.notes]
        found.notes = list(dict.fromkeys([*told, *self.plan.notes, *found.notes]))
        if found.interrupted:
            found.notes.insert(0, "stopped early: this is what was measured by then")
        found.about = {
            "probe": self.name, "version": version("sfumato"), "models": [s.facts for s in self.subjects], "seed": self.seed,
            "minutes": self.minutes, "settings": self.settings.model_dump(), "plan": dict(self.plan.chosen),
            "seconds": {"preparing": round(self.ready, 3), "expected": self.plan.seconds, "measuring": round(seconds, 3)},
        }  # fmt: skip
        return found


def probe(
    kind: str, model: Model, data: Any = None, other: Model | None = None, *, loss: str | LossFunction | None = None,
    minutes: float | None = 2.0, weights: Any = None, device: str | None = None, seed: int = 0, progress: bool = True,
    **settings: Any,
) -> Findings:  # fmt: skip
    """Measure a model on data.

    Args:
        kind: a name in `KINDS`, such as `curvature`.
        model: a module, `timm:NAME`, `module:factory`, or a run folder.
        data: a place or images as `open_data` takes them, or pairs (inputs, targets) as the model takes them; None for a kind
            that looks at no data.
        other: the second model, where the kind compares two.
        loss: `cross_entropy`, `mse`, `reconstruction`, `module:function`, or a function `(outputs, targets) -> mean`; None: by
            the data, or a run's own.
        minutes: time to stay within, about; None: as long as it takes.
        weights: a file, or one for each model.
        device: `auto`, `cpu`, `cuda`, ...; None: where a given module is, else `auto`.
        seed: of samples, random weights, noise and random starts.
        progress: show a bar on a terminal.
        **settings: of the kind, such as `samples=1000`, `operator="hessian"`.

    Returns:
        `Findings`; `numbers` holds everything, `sfumato.report.write_probe_report` makes a page of it.

    Raises:
        UnknownName: no such kind.
        BadSetting: a setting, model or loss that is unknown or does not suit the data.
        BadData: no data, or data without what the loss needs.
        Interrupted: stopped before anything was measured.
    """
    chosen = {"loss": loss, "minutes": minutes, "weights": weights, "device": device, "seed": seed, **settings}
    return Probe(kind, model, data, other, **chosen).run(progress)


def _files(weights: Any) -> list[Any]:
    if weights is None:
        return []
    return list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else [weights]
