"""What a person calls a model, as a module: `timm:NAME`, `module:factory`, a run folder, or the module itself.

>>> from sfumato.instruments.model_words import named_object
>>> named_object("torch.nn.functional:mse_loss").__name__
'mse_loss'
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.engine.loading import ELSEWHERE, load, read_weights
from sfumato.engine.randomness import key
from sfumato.errors import BadCheckpoint, BadSetting, nearest

ALLOWED = "timm:NAME, module:factory (importable from here), a run folder, or diffusers:NAME (a pipeline)"
"""The kinds of model, in words for a person."""


def named_object(word: str) -> Any:
    """What `package.module:name` names; the present folder is looked in first.

    Raises:
        BadSetting: no such module or name, or a module whose import fails.
    """
    module, _, name = word.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # a person's module can fail in any way
        raise BadSetting(f"{word}: importing {module!r} failed ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            near = nearest(part, vars(found)) if hasattr(found, "__dict__") else []
            raise BadSetting(f"{word}: {module!r} has no {part!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        found = getattr(found, part)
    return found


def open_module(model: nn.Module | str | os.PathLike[str], seed: int = 0) -> nn.Module | None:
    """The module that a word names, in eval mode; None for a timm model, which is made when the data is known.

    Args:
        model: a word, or the module itself (given back as it is).
        seed: of the weights that a factory draws.

    Raises:
        BadSetting: a word of no kind, or a factory that gives no module. BadCheckpoint: a folder that is no run.
    """
    if isinstance(model, nn.Module):
        return model
    word = os.fspath(model)
    if word.startswith("timm:"):
        _check_timm(word.removeprefix("timm:"))
        return None
    if word.startswith(ELSEWHERE) or Path(word).exists():
        return load(word)
    if ":" not in word:
        import timm

        hint = f"did you mean timm:{word}? " if timm.is_model(word) else ""
        raise BadSetting(f"there is no model {word!r}: {hint}A model is one of: {ALLOWED}")
    found = named_object(word)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            with _weights_seeded(seed):
                found = found()
        except Exception as error:  # a person's function can fail in any way
            raise BadSetting(f"{word}() failed ({type(error).__name__}: {error}): give a function without arguments") from error
    if not isinstance(found, nn.Module):
        raise BadSetting(f"{word} gives {type(found).__name__}: a model is a torch.nn.Module, or a function that returns one")
    return found.eval()


def _check_timm(name: str) -> None:
    import timm

    if not timm.is_model(name):
        near = nearest(name, timm.list_models()) or ["resnet18"]
        raise BadSetting(f"timm has no model {name!r}; did you mean {', '.join(near)}?")


def timm_input(name: str) -> dict[str, Any]:
    """What a timm model eats: `channels`, `size` (pixels a side), `fixed` (no other size), `mean`, `std`."""
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(name)
    config = found.to_dict() if found is not None else {}
    channels, size = config.get("input_size", (3, 224, 224))[:2]
    standard = {"mean": config.get("mean", (0.5,) * channels), "std": config.get("std", (0.5,) * channels)}
    return {"channels": channels, "size": size, "fixed": bool(config.get("fixed_input_size")), **standard}


def make_timm(name: str, outputs: int | None, image_size: int | None, seed: int) -> nn.Module:
    """A timm model with random weights, in eval mode.

    Args:
        name: without `timm:`.
        outputs: of its last layer; None: as many as it was published with.
        image_size: pixels a side, for a model that must know; None: its own.
        seed: of the weights; torch's generator is left as it was.

    Raises:
        BadSetting: a model that takes pictures of its own size only.
    """
    import timm

    wanted: dict[str, Any] = {"num_classes": outputs, "img_size": image_size}
    try:
        with _weights_seeded(seed):
            model: nn.Module = timm.create_model(name, pretrained=False, **{k: v for k, v in wanted.items() if v is not None})
    except (TypeError, AssertionError, ValueError) as error:
        raise BadSetting(
            f"timm:{name} is not made for image_size={image_size}: leave it out, or give another ({error})"
        ) from error
    return model.eval()


@contextmanager
def _weights_seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(key(seed, "weights"))
        yield


def load_into(model: nn.Module, path: Path) -> list[str]:
    """Put a person's weights (`.safetensors`, or `.pth` without pickled objects) into a model; returns what must be said of it.

    The last layer of a timm model may have another number of outputs: it then stays fresh.

    Raises:
        BadCheckpoint: weights that are missing, damaged or of another model; the line names the first that does not fit.
    """
    state, own = read_weights(path), model.state_dict()
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    fresh = [name for name in own if name.startswith(heads) and name in state and state[name].shape != own[name].shape]
    state |= {name: own[name] for name in fresh}
    if (told := difference(own, state)) is not None:
        raise BadCheckpoint(f"{path} does not fit {type(model).__name__}: {told.format(a='the model', b='the file')}")
    model.load_state_dict(state)
    return [f"the last layer is fresh: in {path.name} it has another number of outputs"] if fresh else []


def difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first entry in which two states differ in name or shape, as a sentence with places `{a}` and `{b}`; None: none."""
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b or name not in a:
            have, lacks = ("{a}", "{b}") if name in a else ("{b}", "{a}")
            return f"{name} is in {have} and not in {lacks}"
        if getattr(a[name], "shape", None) != getattr(b[name], "shape", None):
            return f"{name} is {[*a[name].shape]} in {{a}} and {[*b[name].shape]} in {{b}}"
    return None
