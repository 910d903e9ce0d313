"""What tests of probes share: a stop half-way, and a run that kept several checkpoints."""

import signal

import torch

from sfumato.engine import checkpoint
from sfumato.engine.run_folder import Run
from sfumato.instruments import Progress
from sfumato.papers.optimization.classifier import Classifier

PICTURES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


def stopped(ready, ticks, monkeypatch):
    """What a probe gives that is asked to stop after so many ticks of its bar."""
    advance = Progress.advance

    def counted(self):
        if self.done == ticks:
            self._asked.append(signal.SIGINT)
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", counted)
        return ready.run()


def kept_run(folder, steps=(10, 20, 30)):
    """A run folder with a checkpoint at each of these steps, and the classifiers in them."""
    run = Run.create(folder, "classifier")
    run.write_config({"slug": "classifier"})
    methods = []
    for step in steps:
        torch.manual_seed(step)
        methods.append(Classifier(Classifier.Config.small(model="conv", channels=3, classes=3, image_size=8)).eval())
        state = {"slug": "classifier", "step": step, "method": methods[-1].state_dict(), "ema": None}
        state["settings"] = methods[-1].config.model_dump()
        checkpoint.save(run.checkpoints / f"step-{step}.safetensors", state)
    return run.path, methods
