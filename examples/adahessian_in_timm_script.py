"""AdaHessian in a training script as one writes it with timm: its models, its parameter groups, its schedulers.

    python examples/adahessian_in_timm_script.py
    python examples/adahessian_in_timm_script.py --model resnet18 --epochs 20

Two lines differ from a script with AdamW: the optimizer is built from `sfumato.optim`, and its step takes a closure that returns
the loss, without `backward()`, because AdaHessian differentiates twice. A step costs a
Hessian-vector product more than one of AdamW.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sfumato.data import digits
from sfumato.optim import AdaHessian


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train on handwritten digits; returns the test accuracy after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_efficientnet_gn", help="any model of timm that takes pictures of 32 pixels")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train, test = digits(size=32)
    assert train.label is not None  # digits have labels
    loader = DataLoader(TensorDataset(train.x, train.label), batch_size=64, shuffle=True, drop_last=True)

    model = timm.create_model(options.model, in_chans=1, num_classes=10)
    groups = param_groups_weight_decay(model, options.weight_decay)  # no decay for biases and norms
    optimizer = AdaHessian(groups, lr=options.lr)
    steps = options.epochs * len(loader)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=1e-3, t_in_epochs=False)
    criterion = torch.nn.CrossEntropyLoss()

    accuracies, step = [], 0
    for epoch in range(options.epochs):
        model.train()
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                return criterion(model(x), y)

            loss = optimizer.step(closure)
            step += 1
            scheduler.step_update(step)
        model.eval()
        with torch.no_grad():
            accuracies.append(float((model(test.x).argmax(1) == test.label).float().mean()))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracies[-1]:.3f}")
    return accuracies


if __name__ == "__main__":
    main()
