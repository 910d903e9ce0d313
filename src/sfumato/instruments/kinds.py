"""The kinds of probe. A kind is a file of this room that ends in `KIND = Kind(...)`, and a line in `KINDS`.

>>> from sfumato.instruments import KINDS
>>> KINDS["connectivity"]
'whether the loss rises on the line between two trained models'
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sfumato.errors import UnknownName, nearest
from sfumato.instruments.findings import Findings, Plan

KINDS = {
    "curvature": "eigenvalues of the Hessian, the Gauss-Newton matrix and the empirical Fisher",
    "connectivity": "whether the loss rises on the line between two trained models",
    "collapse": "how far a classifier's features have collapsed onto their class means (NC1, NC2, NC3)",
    "representation": "what features are worth to simple readers, beside the same network untrained",
    "robustness": "how small a change misleads a classifier, and in which direction",
    "learning-rate": "how large a learning rate is stable, by batch size, and how to move a tuned one to another batch",
    "alignment": "whether kernels point along the targets, and how far they moved while a run was trained: lazy or rich",
    "information": "what each layer tells about its input and about the class: the information plane",
    "harmonic": "in which patterns a denoiser shrinks a picture, and whether it is a shrinkage at all",
    "difficulty": "which noise levels a diffusion model finds hard, beside what its data says",
    "precision": "whether rounding ends a classifier's learning: collapsed softmax, gradients along the weights",
    "hallucination": "which of a diffusion run's own samples it was undecided about, by the variance of their trajectories",
}
"""Every kind, and what it tells. The module is called like the kind, with `_` for `-`."""


class BareSetup(BaseModel):
    """Settings of a kind that looks at no data: none of its own yet."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class Setup(BareSetup):
    """Settings of every kind that looks at data: which samples it sees, and how much memory it may take."""

    samples: int | None = Field(
        None, gt=0, description="samples of the data, drawn by the seed; None: 512, or fewer where the time is short"
    )
    split: Literal["train", "test"] = Field("train", description="which part of the data")
    image_size: int | None = Field(None, gt=0, description="pixels a side; None: the model's where it needs one, else the data's")
    batch_size: int | None = Field(None, gt=0, description="samples worked on at once; None: what fits into the memory")
    memory: float | None = Field(None, gt=0, description="GB for vectors and activations; None: 4, on a GPU half of what is free")


@dataclass(frozen=True)
class Kind:
    """A kind of probe.

    Args:
        settings: a `Setup` with its own settings added; without data a `BareSetup`.
        plan: `(*subjects, settings, minutes) -> Plan`: times a small piece of the work and chooses what fits.
        measure: `(*subjects, settings, plan, progress, generator) -> Findings`: reads data by `progress.over(subject.batches)`,
            and gives what it has when it is stopped.
        models: how many models it takes, 1 or 2.
        data: whether it looks at data; else its subjects have no batches.
        loss: of a plain module where the person names none; None: by the data.
    """

    settings: type[BareSetup]
    plan: Callable[..., Plan]
    measure: Callable[..., Findings]
    models: int = 1
    data: bool = True
    loss: str | None = None


def load_kind(name: str) -> Kind:
    """A kind by its name; imports its module.

    Raises:
        UnknownName: there is none of that name.
    """
    if name not in KINDS:
        near = nearest(name, KINDS) or list(KINDS)
        raise UnknownName(f"there is no probe {name!r}; did you mean {' or '.join(near)}?")
    kind: Any = importlib.import_module(f"sfumato.instruments.{name.replace('-', '_')}").KIND
    assert isinstance(kind, Kind)
    return kind
