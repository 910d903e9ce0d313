"""`sfumato export`: a run's weights for other tools: a plain timm model, plain safetensors, or a page on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sfumato.cli.console import hint, say
from sfumato.engine import Run, load
from sfumato.errors import BadSetting
from sfumato.method import TimmExportable


def export(run: Path, *, timm: Path | None, weights: Path | None, hub: str | None) -> None:
    """Write what was asked for."""
    from safetensors.torch import save_file

    if timm is None and weights is None and hub is None:
        raise BadSetting("say what to export: --timm FILE, --weights FILE or --hub USER/NAME")
    method = load(run)
    if timm is not None:
        if not isinstance(method, TimmExportable):
            raise BadSetting(f"{type(method).__name__} has no timm form; --weights writes its plain state")
        arguments, state = method.timm_weights()
        timm.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, timm, {"timm": json.dumps(arguments), "format": "pt"})
        say(str(timm))
        built = "from timm.models.vision_transformer import VisionTransformer; model = VisionTransformer"
        if "model_name" in arguments:  # one of timm's registry
            built = "import timm; model = timm.create_model"
        hint(f"load it: {built}(**{arguments}); model.load_state_dict(safetensors.torch.load_file({str(timm)!r}))")
    if weights is not None:
        state = {k: v.detach().clone().contiguous() for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, weights, {"settings": method.config.model_dump_json(), "format": "pt"})
        say(str(weights))
    if hub is not None:
        from huggingface_hub import HfApi

        folder = Run.open(run)
        api = HfApi()
        api.create_repo(hub, exist_ok=True)
        last = folder.last_checkpoint
        keep = ["config.yaml", "report.html", f"checkpoints/{last.name if last else '*'}"]
        api.upload_folder(repo_id=hub, folder_path=folder.path, allow_patterns=keep)
        say(f"hf://{hub}")
