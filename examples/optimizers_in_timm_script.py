"""M-FAC or perpGrad in a training script as one writes it with timm: its models, its parameter groups, its schedulers.

    python examples/optimizers_in_timm_script.py
    python examples/optimizers_in_timm_script.py --optimizer mfac --gradients 128
    python examples/optimizers_in_timm_script.py --model resnet18 --epochs 20

One line differs from a script with AdamW: the one that builds the optimizer. PerpGrad goes around whatever timm's factory makes,
M-FAC stands in its place. Neither needs a closure, and gradient clipping and schedulers are timm's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay  # type: ignore[attr-defined]
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from sfumato.data import digits
from sfumato.optim import MFAC, PerpGrad

RATES = {"perpgrad": 3e-3, "mfac": 0.1}
DAMPING = 0.1  # of M-FAC: few gradients need more than the 1e-5 that goes with a thousand, and a rate that goes with it


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train on handwritten digits; returns the test accuracy after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("perpgrad", "mfac"), default="perpgrad")
    parser.add_argument("--model", default="test_efficientnet_gn", help="any model of timm that takes pictures of 32 pixels")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="default: one that suits the optimizer")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument(
        "--gradients", type=int, default=32, help="gradients that M-FAC keeps; memory is that of so many networks"
    )
    options = parser.parse_args(arguments)
    lr = options.lr or RATES[options.optimizer]

    torch.manual_seed(0)
    train, test = digits(size=32)
    assert train.label is not None  # digits have labels
    loader = DataLoader(TensorDataset(train.x, train.label), batch_size=64, shuffle=True, drop_last=True)

    model = timm.create_model(options.model, in_chans=1, num_classes=10)
    optimizer: Optimizer
    if options.optimizer == "mfac":
        groups = param_groups_weight_decay(model, options.weight_decay)  # no decay for biases and norms
        optimizer = MFAC(groups, lr=lr, momentum=0.9, ngrads=options.gradients, damp=DAMPING)
    else:
        optimizer = PerpGrad(create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=options.weight_decay))
    steps = options.epochs * len(loader)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=lr / 100, t_in_epochs=False)
    criterion = torch.nn.CrossEntropyLoss()

    accuracies, step = [], 0
    for epoch in range(options.epochs):
        model.train()
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), 5.0)
            optimizer.step()
            step += 1
            scheduler.step_update(step)
        model.eval()
        with torch.no_grad():
            accuracies.append(float((model(test.x).argmax(1) == test.label).float().mean()))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracies[-1]:.3f}")
    return accuracies


if __name__ == "__main__":
    main()
