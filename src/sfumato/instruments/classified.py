"""What a kind needs that looks at classes: a label with every sample, and perhaps as many outputs as there are classes."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting
from sfumato.instruments.subject import Subject
from sfumato.nn.at_rest import eval_mode


def count_outputs(subject: Subject, kind: str) -> int:
    """The outputs of a classifier.

    Raises:
        BadData: the data has no labels.
        BadSetting: the loss hides the outputs, or they are not one number for every class.
    """
    labels_of(subject, kind)
    x, _ = subject.batches[0]
    with eval_mode(subject.module), torch.no_grad():
        shape = list(subject.module(x[:1].to(subject.device)).shape[1:])
    classes = 1 + max(int(y.max()) for _, y in subject.batches)
    if len(shape) != 1 or shape[0] < max(2, classes):
        raise BadSetting(f"{kind} needs one output for every class: the model gives {shape} a sample, and the data has {classes}")
    return int(shape[0])


def labels_of(subject: Subject, kind: str) -> Tensor:
    """The class of every sample `[n]`.

    Raises:
        BadData: the data has no labels.
        BadSetting: the loss hides the labels.
    """
    if not subject.separable:
        raise BadSetting(
            f"{kind} looks at the classes of a classifier, and {subject.name} has one loss of its own: probe its network by "
            "module:factory"
        )
    y = torch.cat([y for _, y in subject.batches])
    if y.is_floating_point() or y.ndim != 1:
        raise BadData(f"{kind} needs a class label with every sample: give one folder per class, or arrays with y")
    return y
