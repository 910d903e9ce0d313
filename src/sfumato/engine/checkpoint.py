"""One file a checkpoint: tensors and, as JSON in the safetensors header, everything else. Written aside, synced, renamed.

A state is a tree of tensors, numbers, strings, None, lists, tuples and dicts; anything else is refused at step 0, by name.
Nothing is ever unpickled, and a kill at any moment leaves the previous checkpoint whole.

>>> import tempfile, torch
>>> from pathlib import Path
>>> from sfumato.engine import checkpoint
>>> path = Path(tempfile.mkdtemp()) / "step-3.safetensors"
>>> checkpoint.save(path, {"step": 3, "method": {"w": torch.eye(2)}})
>>> checkpoint.read(path)["method"]["w"]
tensor([[1., 0.],
        [0., 1.]])
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadCheckpoint, SfumatoError

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.safetensors")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state in one atomic move; on a full disk the previous checkpoints stay as they were."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    header = json.dumps({"format": FORMAT, "state": _flatten(state, "state", tensors)})
    aside = path.with_name(f".{path.name}.writing")
    try:
        save_file(tensors, aside, {"sfumato": header})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except Exception as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) or "No space" in str(error) or "I/O error" in str(error):
            raise SfumatoError(
                f"cannot write {path}: {error}; earlier checkpoints are intact, free some space and --resume"
            ) from None
        raise
    _sync_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, tensors on the CPU."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadCheckpoint(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("sfumato", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is damaged or no safetensors file ({error})") from None
    if header is None:
        raise BadCheckpoint(f"{path} holds plain weights, not a sfumato checkpoint")
    if header["format"] != FORMAT:
        raise BadCheckpoint(f"{path} has checkpoint format {header['format']}, this sfumato reads {FORMAT}: upgrade sfumato")
    state: dict[str, Any] = _build(header["state"], tensors)
    return state


def peek(path: Path) -> dict[str, Any]:
    """The plain values at the top of a checkpoint (slug, step, ...), without reading a tensor; {}: it is none of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("sfumato", "null"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return {k: node["v"] for k, node in header["state"]["d"] if "v" in node} if header else {}


def listing(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step-*.safetensors") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a kill left half written."""
    for path in listing(folder)[:-keep]:
        path.unlink(missing_ok=True)
    for path in folder.glob(".*.writing"):
        path.unlink(missing_ok=True)


def _flatten(tree: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON; tensors are put aside as contiguous clones (tied weights and views share no storage then)."""
    if isinstance(tree, Tensor):
        tensors[at] = tree.detach().to("cpu", copy=True).contiguous()
        return {"$": at}
    if isinstance(tree, dict):
        return {"d": [[_flatten_key(k, at), _flatten(v, f"{at}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "t" if isinstance(tree, tuple) else "l"
        return {kind: [_flatten(v, f"{at}.{i}", tensors) for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"v": tree}
    raise TypeError(f"{at} is a {type(tree).__name__}: a state may hold tensors, numbers, strings, None, lists, tuples and dicts")


def _flatten_key(name: Any, at: str) -> Any:
    if isinstance(name, (str, int)):
        return name
    raise TypeError(f"{at} has the key {name!r}: keys of a state are strings or whole numbers")


def _build(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "$" in node:
        return tensors[node["$"]].clone()  # fresh and aligned: memory-mapped tensors change the bits of BLAS sums
    if "d" in node:
        return {k: _build(v, tensors) for k, v in node["d"]}
    if "l" in node:
        return [_build(v, tensors) for v in node["l"]]
    if "t" in node:
        return tuple(_build(v, tensors) for v in node["t"])
    return node["v"]


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def assert_finite(state: Any, at: str = "") -> str | None:
    """The name of the first tensor that holds a NaN or infinity, or None."""
    if isinstance(state, Tensor):
        return None if not state.is_floating_point() or bool(torch.isfinite(state).all()) else at
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return next((found for k, v in items if (found := assert_finite(v, f"{at}.{k}".lstrip(".")))), None)


def load_weights(module: nn.Module, state: dict[str, Any], source: Any) -> None:
    """Load a state, saying in one line what does not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadCheckpoint(f"{source} does not fit {type(module).__name__} ({reason})") from None
