"""Two knobs of any module: how lazily it learns, and the linear model that it is when it does not learn features at all.

    scaled:  α ( f(θ, x) − f(θ₀, x) )                 with learning rates divided by α²; lazy as α → ∞
    linear:  f(θ₀, x) + ∂f/∂θ(θ₀, x) · (θ − θ₀)       kernel regression with the tangent kernel at θ₀

Sources: Chizat, Oyallon, Bach, "On lazy training in differentiable programming", NeurIPS 2019; Lee et al., "Wide neural networks
of any depth evolve as linear models under gradient descent", NeurIPS 2019.

>>> import torch
>>> from sfumato.nn import linearise, scale_output
>>> net, x = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)), torch.randn(5, 3)
>>> scale_output(net, 10.0)(x).abs().max().item(), torch.equal(linearise(net)(x), net(x))
(0.0, True)
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, jvp
from typing_extensions import Self

from sfumato.errors import BadSetting


class ScaledOutput(nn.Module):
    """`module` with outputs multiplied by α, after those of `start`, a frozen copy, were subtracted; see `scale_output`."""

    def __init__(self, module: nn.Module, alpha: float, centre: bool) -> None:
        super().__init__()
        self.module, self.alpha = module, alpha
        self.start = _frozen(module) if centre else None

    def train(self, mode: bool = True) -> Self:
        """The mode of the module; the frozen copy stays in eval mode."""
        super().train(mode)
        if self.start is not None:
            self.start.eval()
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """α (f(θ, x) − f(θ₀, x))."""
        out: Tensor = self.module(*inputs, **keywords)
        return self.alpha * (out if self.start is None else out - self.start(*inputs, **keywords))


def scale_output(model: nn.Module, alpha: float, *, centre: bool = True) -> ScaledOutput:
    """The laziness knob: a model whose outputs are multiplied by α, and are 0 at first.

    Divide learning rates by α² (plain gradient descent) to compare at equal speed of a lazy model.

    Args:
        model: any module that returns a tensor; it is trained in place.
        alpha: α, positive. Large: features hardly move. Small: they move a lot.
        centre: subtract the present outputs, of a frozen copy.

    Returns:
        A module that shares the parameters of `model`.

    Raises:
        BadSetting: α not positive.
    """
    if not alpha > 0:
        raise BadSetting(f"alpha={alpha:g} must be positive")
    return ScaledOutput(model, alpha, centre)


class LinearisedModel(nn.Module):
    """A model as a linear function of its parameters; see `linearise`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.start = _frozen(model)
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not moving:
            raise BadSetting("no trainable parameter to linearise in: check requires_grad")
        self.names = list(moving)
        self.params = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in moving.values())

    def train(self, mode: bool = True) -> Self:
        """The frozen copy stays in eval mode."""
        super().train(mode)
        self.start.eval()
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """f(θ₀, x) + ∂f/∂θ(θ₀, x) · (θ − θ₀)."""
        first = {name: self.start.get_parameter(name) for name in self.names}
        moved = {name: p - first[name] for name, p in zip(self.names, self.params, strict=True)}

        def outputs(theta: dict[str, Tensor]) -> Tensor:
            result: Tensor = functional_call(self.start, theta, inputs, keywords)
            return result

        value, change = jvp(outputs, (first,), (moved,))  # type: ignore[misc]
        return value + change


def linearise(model: nn.Module) -> LinearisedModel:
    """The first-order Taylor expansion of a model in its parameters, around their present values.

    It trains like any module, and learns what the model would if its tangent kernel never moved.

    Args:
        model: any module that returns a tensor; it is copied, and taken in eval mode.

    Returns:
        A module with parameters of its own, in the order of `named_parameters`.

    Raises:
        BadSetting: a model without trainable parameters.
    """
    return LinearisedModel(model)


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()
