"""Where rounding stops learning: collapsed softmax, loss terms that are exactly 0, and gradients that only scale the weights.

    collapse: share of samples with Σ_j exp(z_j − max z) = 1 as computed,     alignment: cos(−∇L, θ)

A sum of K terms absorbs the others when the winner leads one competitor by about 7.6 nats in float16, 16.6 in float32 and 36.7
in float64. Scaling all weights of a network that is homogeneous in them scales the logits: −∇L along θ only does that.

Source: Prieto, Barsbey, Mediano, Birdal, ICLR 2025, "Grokking at the Edge of Numerical Stability".

>>> import torch
>>> from sfumato.probes import softmax_collapse
>>> logits = torch.tensor([[0.0, -16.0], [0.0, -17.5], [0.0, -8.0], [0.0, -1.0]])
>>> [softmax_collapse(logits, dtype).item() for dtype in (torch.float16, torch.float32, torch.float64)]
[0.75, 0.25, 0.0]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.errors import BadData


@torch.no_grad()
def softmax_collapse(z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Share of samples whose softmax gives the largest class exactly 1 in some floating-point type.

    Where that class is the label, the loss of the sample is exactly 0.

    Args:
        z: logits, `[..., K]`.
        dtype: the type of the arithmetic; an autocast region does not change it.

    Returns:
        A scalar in [0, 1], float32. How the terms are summed decides cases at the very edge.

    Reference:
        Prieto et al. 2025 (softmax collapse).
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(dtype)
        total = (z - z.amax(-1, keepdim=True)).exp().sum(-1)
        return (total == 1).float().mean()


@torch.no_grad()
def zero_loss_fraction(losses: Tensor) -> Tensor:
    """Share of loss terms that are exactly 0: samples whose label no longer pulls.

    Args:
        losses: one a sample, any shape: any loss with `reduction="none"`.

    Returns:
        A scalar in [0, 1], float32.
    """
    return (losses == 0).float().mean()


@torch.no_grad()
def nlm_alignment(params: nn.Module | Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine between the negative gradient and the weights: near 1, the loss only wants the weights longer.

    NLM: naive loss minimisation. Call it after `backward`, before the gradients are cleared or projected.

    Args:
        params: a module, or parameters by name; those without a gradient are left out.

    Returns:
        The cosine, from -1 to 1, of every parameter by name, and of all together as `"all"`; 0 where either side is 0.

    Raises:
        BadData: no parameter has a gradient.

    Reference:
        Prieto et al. 2025 (naive loss minimisation).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> (-0.1 * w.square().sum()).backward()
        >>> nlm_alignment({"w": w})
        {'w': 1.0, 'all': 1.0}
    """
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    pairs = {name: (p.detach(), p.grad) for name, p in named.items() if p.grad is not None}
    if not pairs:
        raise BadData("no parameter has a gradient: call loss.backward() first")
    rows = [_products(_float64(w), _float64(g)) for w, g in pairs.values()]
    table = torch.stack([*rows, torch.stack(rows).sum(0)])
    lengths = (table[:, 1] * table[:, 2]).sqrt()
    cosines = torch.where(lengths > 0, -table[:, 0] / lengths, 0.0)
    return dict(zip([*pairs, "all"], cosines.tolist(), strict=True))


def _float64(t: Tensor) -> Tensor:
    """Gradients of a collapsed loss are so small that their squares are 0 in float32."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def _products(w: Tensor, g: Tensor) -> Tensor:
    """⟨w, g⟩, ⟨w, w⟩ and ⟨g, g⟩, `[3]`."""
    return torch.stack([(w * g).sum(), w.square().sum(), g.square().sum()]).cpu()
