"""From a slug, facts of the data and a person's settings to a method; and from a run back to one.

The preset is the paper's on an accelerator and `Config.small()` on a CPU, unless it is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from pydantic import BaseModel, ValidationError
from torch import nn

from sfumato.data.batch import Facts
from sfumato.engine import checkpoint
from sfumato.engine.checkpoint import load_weights
from sfumato.engine.randomness import key
from sfumato.engine.run_folder import Run
from sfumato.errors import BadCheckpoint, BadData, BadSetting, nearest
from sfumato.method import Method

C = TypeVar("C", bound=BaseModel)
ELSEWHERE = ("hf:", "diffusers:")
"""How the names of models begin that are no runs here: a run on the hub (`hf://`, a Path keeps one slash), a pipeline."""


def build(
    kind: type[Method],
    facts: Facts,
    *,
    preset: str = "auto",
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    previous: Method | None = None,
) -> Method:
    """A new method whose settings suit the data.

    Args:
        kind: the method's class.
        facts: of the data that it will be trained on.
        preset: "paper", "small", or "auto" (small on a CPU).
        settings: over the preset; unknown or ill-typed ones are refused.
        seed: of the weights.
        device: decides what "auto" means.
        previous: another run's method to start from.
    """
    missing = [name for name in kind.needs if name not in facts.fields]
    if missing:
        wanted = {"label": "one folder per class", "target": "pairs:NOISY_FOLDER:CLEAN_FOLDER", "boxes": "kitti:FOLDER"}
        raise BadData(f"{kind.__name__} needs a {missing[0]} with every image, this data has none: give {wanted[missing[0]]}")
    config = configure(kind.Config, preset_for(preset, device), settings or {}).fitted(facts)
    torch.default_generator.manual_seed(key(seed, "weights"))
    method = kind(config) if previous is None else kind.init_from(config, previous)
    method.adopt(open_model)
    return method


def preset_for(preset: str, device: str) -> str:
    """`auto` resolved: "small" on a CPU, "paper" elsewhere."""
    if preset not in ("auto", "paper", "small"):
        raise BadSetting(f"preset {preset!r} is not known: auto, paper or small")
    if preset != "auto":
        return preset
    return "small" if device == "cpu" or not torch.accelerator.is_available() else "paper"


def configure(config: type[C], preset: str, settings: dict[str, Any]) -> C:
    """A preset with settings over it; a mistake is told in one line with what is allowed. ("small" is for methods only.)"""
    known = config.model_fields
    for name in settings:
        if name not in known:
            near = nearest(name, known) or sorted(known)
            raise BadSetting(f"there is no setting {name!r}; did you mean {', '.join(near)}?")
    try:
        base = cast(Any, config).small() if preset == "small" else config()
        return config.model_validate({**base.model_dump(), **settings})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"]) or "settings"
        described = (known[name].description or "") if name in known else ""
        described += "; written [1, 2]" if first["type"] == "tuple_type" else ""
        raise BadSetting(
            f"{name}={first['input']!r}: {first['msg'].lower()}" + (f" ({described})" if described else "")
        ) from None


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`["lr=1e-3", "color=red"]` as a dict; values are read as YAML, so numbers, booleans, null and lists come out typed."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise BadSetting(f"{pair!r} is no NAME=VALUE, such as batch_size=32")
        try:
            value = yaml.safe_load(text)
            found[name.strip()] = float(value) if isinstance(value, str) and _is_number(value) else value
        except yaml.YAMLError:
            found[name.strip()] = text
    return found


def _is_number(text: str) -> bool:
    """YAML 1.1 reads 1e-3 as text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def initialise(method: Method, path: Path) -> None:
    """Put a person's own weights (`.pth`, `.pt`, `.safetensors`) into a method, or into the one of its networks that they fit."""
    state = read_weights(path)
    for module in (method, *method.children()):
        if module.state_dict().keys() == state.keys():
            return load_weights(module, state, path)
    wanted, given = next(iter(method.state_dict())), next(iter(state), "nothing")
    raise BadCheckpoint(
        f"the weights in {path} fit no network of {type(method).__name__} (it has {wanted}, ..., the file {given}, ...)"
    )


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a weights file; nothing is unpickled."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise BadCheckpoint(f"there are no weights at {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise BadCheckpoint(
            f"{path} holds more than tensors, and reading that could run code: save its state_dict() instead"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise BadCheckpoint(f"{path} is damaged or no weights file ({error})") from None
    for name in ("state_dict", "model"):
        state = state[name] if isinstance(state, dict) and isinstance(state.get(name), dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise BadCheckpoint(f"{path} holds no table of tensors")
    return dict(state)


def open_model(word: str) -> nn.Module:
    """The trained model that a setting names, in eval mode.

    Args:
        word: `timm:NAME` (timm downloads its weights), `timm:NAME@FILE` (a person's own weights for it), or what `load` takes.

    Raises:
        BadSetting: a name that timm has not.
        BadCheckpoint: weights that cannot be had, or do not fit.
    """
    if not word.startswith("timm:"):
        return load(word)
    import timm

    name, _, file = word.removeprefix("timm:").partition("@")
    if not timm.is_model(name):
        near = nearest(name, timm.list_models()) or ["vit_base_patch16_224"]
        raise BadSetting(f"timm has no model {name!r}; did you mean {', '.join(near)}?")
    if file:
        model: nn.Module = timm.create_model(name, num_classes=0)
        own, state = model.state_dict(), read_weights(Path(file))
        load_weights(model, {k: v for k, v in state.items() if k in own}, file)  # without the file's last layer
        return model.eval()
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).eval()  # type: ignore[no-any-return]
    except Exception as error:  # a download can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"timm has no weights of {name} to give ({reason}): say timm:{name}@FILE to give your own") from None


def rebuild(kind: type[Method], settings: dict[str, Any], source: Path) -> Method:
    """A method with the settings that a run stored, its weights still fresh."""
    try:
        return kind(kind.Config.model_validate(settings))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise BadCheckpoint(f"{source} was written by another version of {kind.__name__} ({reason})") from None


def load(source: str | Path, *, kind: type[Method] | None = None, device: str = "cpu") -> Method:
    """A trained method, in eval mode.

    Args:
        source: a run folder, a checkpoint file, `hf://user/name` (a run folder on the Hugging Face hub), or `diffusers:NAME`
            (a pipeline of diffusers, a folder or on the hub, whose U-Net draws pixels).
        kind: the class, for a method that is not in the catalogue.
        device: where to put it.
    """
    hub, pipeline = (str(source).removeprefix(kind) if str(source).startswith(kind) else None for kind in ELSEWHERE)
    if pipeline is not None:
        from sfumato import catalogue

        base: Any = kind or catalogue.load_method(next(row.slug for row in catalogue.load().values() if "diffusers" in row.opens))
        opened: Method = base.from_pipeline(pipeline).to(device).eval()
        return opened
    if hub is not None:
        from huggingface_hub import snapshot_download

        source = snapshot_download(hub.strip("/"), allow_patterns=["config.yaml", "checkpoints/*.safetensors"])
    path = Path(source)
    if path.is_dir():
        last = Run.open(path).last_checkpoint
        if last is None:
            raise BadCheckpoint(f"{path} holds no checkpoint yet")
        path = last
    saved = checkpoint.read(path)
    if kind is None:
        from sfumato import catalogue

        kind = catalogue.load_method(saved["slug"])
    method = rebuild(kind, saved["settings"], path)
    average = {k.removeprefix("module."): v for k, v in (saved["ema"] or {}).items() if k.startswith("module.")}
    load_weights(method, average or saved["method"], path)
    return method.to(device).eval()
