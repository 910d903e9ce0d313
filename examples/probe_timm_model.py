"""The curvature of a timm model: largest Hessian eigenvalues, trace and spectral density of its loss.

    python examples/probe_timm_model.py
    python examples/probe_timm_model.py --model resnet18 --size 64 --steps 500 --output density.png

The model is trained for a moment on handwritten digits, then probed. The Hessian is never built: all three come from products
with vectors, and the model may be any module. Probes read data from a pair of tensors, a list of batches or a DataLoader.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sfumato.data import digits
from sfumato.probes import HessianOperator, eigs, hutchinson, spectral_density
from sfumato.report import spectrum


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, probe, save a plot; returns eigenvalues `[3]`, the estimate of the trace and the density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_efficientnet_gn", help="any model of timm that takes pictures of that size")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps before the probe")
    parser.add_argument("--samples", type=int, default=32, help="digits that the curvature is measured on")
    parser.add_argument("--output", type=Path, default=Path("density.png"), help="where the plot goes")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train, _ = digits(size=options.size)
    x, y = train.x, train.label
    assert y is not None  # digits have labels
    model = timm.create_model(options.model, in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(options.steps):
        rows = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    generator = torch.Generator().manual_seed(0)
    hessian = HessianOperator(model, nn.functional.cross_entropy, (x[: options.samples], y[: options.samples]))
    largest = eigs(hessian, 3, tol=1e-3, max_iter=100, generator=generator)
    trace = hutchinson(hessian, samples=16, generator=generator)
    density = spectral_density(hessian, steps=25, sigma2=1e-4, generator=generator)

    told = ", ".join(f"{value:.4g} ± {error:.1g}" for value, error in zip(largest.values.tolist(), largest.residuals.tolist()))
    print(f"{options.model}: {hessian.shape[0]} parameters, loss {loss.item():.3f} in the last step")
    print(f"largest eigenvalues: {told}")
    print(f"trace: {float(trace.value):.3g} ± {float(trace.stderr):.2g}")
    spectrum(density, xlabel="eigenvalue of the Hessian").png(options.output)
    print(f"density of all eigenvalues: {options.output}")
    return {"largest": largest.values, "trace": trace, "density": density}


if __name__ == "__main__":
    main()
