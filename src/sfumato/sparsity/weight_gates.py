"""Gates of 0 and 1 on the weights of a frozen diffusion U-Net, of each picture and time their own.

    y_b = x_b (W ∘ m_b)ᵀ + bias,    m_b = 1[l_b + Gumbel > 0],    l_b = A_in (A_out r_b)ᵀ + 5
    r_b = ReLU(conv(ReLU(conv(u_b)))),    u_b = mean over pixels of (features, skip) + V e_t

One generator a block of the U-Net makes r [C_out / 4, C_in / 4] of what enters the block and of the time's embedding e; one
adapter a layer stretches it to that layer's weights W. Adapters begin at l = 5, where no gate is ever 0: the U-Net begins as it
was trained. The weights never change. Memory: a gate and a gated weight for every weight and picture, layer after layer.

Source: Wang, Li, Yang, Wang, Zhang, Liu, Wang, Yang, "Not All Parameters Matter: Masking Diffusion Models for Enhancing
Generation Ability", CVPR 2025 (arXiv 2505.03097).

>>> import torch
>>> from sfumato.nn import small_unet
>>> from sfumato.sparsity import MaskedUNet
>>> unet = small_unet(8, 1, width=8, mults=(1, 2), attn_at=(1,))
>>> masked, x, t = MaskedUNet(unet), torch.rand(2, 1, 8, 8), torch.tensor([3, 500])
>>> torch.allclose(masked(x, t).sample, unet(x, t).sample, atol=1e-6)
True
>>> len(masked.layers), masked.layers[0]
(8, 'up_blocks.0.attentions.0.to_q')
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn.discrete_gradients import gumbel_sigmoid
from sfumato.nn.unet_wrapper import UNetWrapper

ATTENTION = ("to_q", "to_k", "to_v", "to_out")
"""The layers that the paper masks: the projections of self- and cross-attention."""

PLACES = ("up_blocks", "mid_block", "down_blocks")
BY = ("sample", "time", "static", "free")


def gated_linear(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with gated weights.

    Args:
        x: `[B, ..., in]`.
        weight: `[out, in]`.
        gate: `[out, in]` for all samples, or `[B, out, in]` for each its own; 1 = kept.
        bias: `[out]`, not gated.

    Returns:
        `[B, ..., out]`.

    Raises:
        BadData: gates of another shape.
    """
    _check_gate(gate, weight, x)
    gated = weight * gate.to(weight.dtype)
    if gate.ndim == weight.ndim:
        return F.linear(x, gated, bias)
    y = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), gated.transpose(1, 2))
    return (y if bias is None else y + bias.to(y.dtype)).view(*x.shape[:-1], len(weight))


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
) -> Tensor:
    """A convolution with gated weights: one call of B groups where each sample has its own.

    Args:
        x: `[B, in, H, W]`.
        weight: `[out, in, k, k]`.
        gate: `[out, in, k, k]` for all samples, or `[B, out, in, k, k]`; 1 = kept.
        bias: `[out]`, not gated.
        stride, padding, dilation: as of `torch.nn.functional.conv2d`.

    Returns:
        `[B, out, H', W']`.

    Raises:
        BadData: gates of another shape.
    """
    _check_gate(gate, weight, x)
    gated, how = weight * gate.to(weight.dtype), dict[str, Any](stride=stride, padding=padding, dilation=dilation)
    if gate.ndim == weight.ndim:
        return F.conv2d(x, gated, bias, **how)
    y = F.conv2d(x.flatten(0, 1)[None], gated.flatten(0, 1), groups=len(x), **how)
    y = y.view(len(x), len(weight), *y.shape[2:])
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


def _check_gate(gate: Tensor, weight: Tensor, x: Tensor) -> None:
    if gate.shape not in (weight.shape, (len(x), *weight.shape)):
        each = [len(x), *weight.shape]
        raise BadData(f"gates are {list(weight.shape)} like the weights, or {each} for each sample, not {list(gate.shape)}")


def keep_logit(share: float | Tensor) -> Tensor:
    """The logit at which `gumbel_sigmoid` keeps a share of the weights: log(-log(1 - share)).

    >>> round(float(keep_logit(0.5)), 4), round(float(keep_logit(1.0)), 2)
    (-0.3665, 3.6)

    Args:
        share: above 0 to 1, of any shape; from 1 - 1e-16 on all are kept.
    """
    return torch.log(-torch.log1p(-torch.as_tensor(share, dtype=torch.float64).clamp(max=1 - 1e-16)))


class WeightMaskGenerator(nn.Module):
    """Coarse gates of a block's weights from what enters the block.

    Args:
        in_channels: of the features and the skip together; of the block's first convolution.
        out_channels: of that convolution.
        temb_dim: length of the time's embedding.
        hidden: channels inside.
        factor: how much coarser than the weights; channels are divided by it and rounded down.
        kernel: side of the kernels that are gated; 1 for linear layers.
        zero_last: begin with a last convolution of 0, as the authors' code does. Behind its ReLU, and in front of adapters that
            begin at 0 too, no gradient ever reaches either: gates then follow neither time nor sample.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_dim: int,
        *,
        hidden: int = 64,
        factor: int = 4,
        kernel: int = 1,
        zero_last: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.cols, self.kernel = max(1, out_channels // factor), max(1, in_channels // factor), kernel
        self.embed = nn.Linear(temb_dim, in_channels, bias=False)
        self.enter = nn.Conv2d(in_channels, hidden, 1)
        self.leave = nn.Conv2d(hidden, self.rows * self.cols, 1)
        nn.init.kaiming_normal_(self.enter.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.leave.weight, nonlinearity="relu")
        if zero_last:
            nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, temb: Tensor) -> Tensor:
        """Coarse gates, at least 0.

        Args:
            features: `[B, in_channels, H, W]`: what enters the block, and the last skip.
            temb: `[B, temb_dim]`.

        Returns:
            `[B, out_channels // factor, in_channels // factor]`, with `k x k` behind where the kernel is larger than 1.
        """
        seen = F.adaptive_avg_pool2d(features, self.kernel) + self.embed(temb)[..., None, None]
        coarse = F.relu(self.leave(F.relu(self.enter(seen)))).unflatten(1, (self.rows, self.cols))
        return coarse.flatten(2) if self.kernel == 1 else coarse


class MaskAdapter(nn.Module):
    """Stretches coarse gates to the weights of one layer: along the outputs, then along the inputs.

    Args:
        rows, cols: of the coarse gates.
        out_features, in_features: of the layer.
        logit: bias of both ways; the weights begin at 0, so that all logits are this.
    """

    def __init__(self, rows: int, cols: int, out_features: int, in_features: int, *, logit: float = 5.0) -> None:
        super().__init__()
        self.out_weight, self.out_bias = nn.Parameter(torch.zeros(out_features, rows)), _constant(logit, out_features)
        self.in_weight, self.in_bias = nn.Parameter(torch.zeros(in_features, cols)), _constant(logit, in_features)

    def forward(self, coarse: Tensor) -> Tensor:
        """Logits `[B, out, in, ...]` from coarse gates `[B, rows, cols, ...]`; `...` are the sides of a kernel, or nothing."""
        beside = [1] * (coarse.ndim - 2)
        tall = torch.einsum("or,br...->bo...", self.out_weight, coarse) + self.out_bias.view(-1, *beside)
        return torch.einsum("ic,boc...->boi...", self.in_weight, tall) + self.in_bias.view(-1, *beside[1:])


def _constant(value: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value))


class _BlockGates(nn.Module):
    """Where the logits of one block's layers come from."""

    def __init__(self, block: Any, layers: Sequence[Any], by: str, hidden: int, factor: int, logit: float) -> None:
        super().__init__()
        self.by, self.generators = by, nn.ModuleDict()
        if by == "free":
            self.logits = nn.ParameterList(_constant(logit, *layer.weight.shape) for layer in layers)
            return
        first, adapters = block.resnets[0], []
        for layer in layers:
            kernel = _kernel(layer)
            if str(kernel) not in self.generators:
                self.generators[str(kernel)] = WeightMaskGenerator(
                    first.conv1.in_channels, first.conv1.out_channels, first.time_emb_proj.in_features,
                    hidden=hidden, factor=factor, kernel=kernel,
                )  # fmt: skip
            coarse: Any = self.generators[str(kernel)]
            adapters.append(MaskAdapter(coarse.rows, coarse.cols, *layer.weight.shape[:2], logit=logit))
        self.adapters = nn.ModuleList(adapters)

    def look(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Coarse gates by kernel, from the arguments of the block."""
        features, temb = inputs["hidden_states"], inputs["temb"]
        skips = inputs.get("res_hidden_states_tuple", ())
        features = torch.cat([features, *skips[-1:]], 1)
        if self.by != "sample":
            features = torch.zeros_like(features)
        if self.by == "static":
            temb = torch.zeros_like(temb)
        dtype = next(self.parameters()).dtype
        return {kernel: make(features.to(dtype), temb.to(dtype)) for kernel, make in self.generators.items()}

    def logits_of(self, index: int, layer: nn.Module, coarse: dict[str, Tensor]) -> Tensor:
        """Of one layer: `[B, ...]` in front of the shape of its weights, or without the B where they are free."""
        if self.by == "free":
            return self.logits[index]
        logits: Tensor = self.adapters[index](coarse[str(_kernel(layer))])
        return logits


class MaskedUNet(UNetWrapper):
    """A U-Net of diffusers with gated weights. It is frozen, not edited: called by itself it is what it was.

    It can be the `unet` of a pipeline of diffusers. The gates are made in float32 where the U-Net is.

    Args:
        unet: UNet2DModel or UNet2DConditionModel; its parameters are frozen. Put it in eval mode if it has dropout.
        where: "up_blocks", "mid_block" or "down_blocks".
        include: layers that are gated there, linear or convolutions: those with one of these names in their path.
        by: what gates depend on: "sample" (features and time), "time", "static" (a generator that is told nothing), or "free"
            (no generator: one logit a weight).
        hidden, factor: of the generators.
        logit: where logits begin; None: 5, and free ones at 1.
        tau: temperature.
        sample: draw the gates at every call; else a gate is 1 where its logit is above 0.

    Attributes:
        masks: all that is trained. `masks.state_dict()` is what to save beside the U-Net.
        layers: names of the gated layers.

    Raises:
        BadSetting: unknown words, no such layer, or no U-Net.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        where: str = "up_blocks",
        include: Sequence[str] = ATTENTION,
        by: str = "sample",
        hidden: int = 64,
        factor: int = 4,
        logit: float | None = None,
        tau: float = 1.0,
        sample: bool = True,
    ) -> None:
        super().__init__(unet)
        for word, known in ((where, PLACES), (by, BY)):
            if word not in known:
                raise BadSetting(f"there is no {word!r}: use {', '.join(known)}")
        found = getattr(unet, where, None)
        if found is None:
            raise BadSetting(f"this {type(unet).__name__} has no {where}: give a U-Net of diffusers, and a part that it has")
        unet.requires_grad_(False)
        self.tau, self.sample = tau, sample
        blocks = list(found.named_children()) if isinstance(found, nn.ModuleList) else [("", found)]
        self._gated: list[tuple[nn.Module, list[tuple[str, nn.Module]]]] = []
        for number, block in blocks:
            prefix = f"{where}.{number}".rstrip(".")
            layers = [(f"{prefix}.{name}", m) for name, m in block.named_modules() if _is_layer(m) and _named(name, include)]
            if layers:
                self._gated.append((block, layers))
        self.layers = tuple(name for _, layers in self._gated for name, _ in layers)
        if not self.layers:
            paths = ".".join(name for _, block in blocks for name, m in block.named_modules() if _is_layer(m))
            there = ",".join(sorted({part for part in paths.split(".") if not part.isdigit()}))
            raise BadSetting(f"the {where} of this U-Net have no layer {', '.join(include)}: include some of {there}")
        start = (1.0 if by == "free" else 5.0) if logit is None else logit
        self.masks = nn.ModuleList(
            _BlockGates(block, [m for _, m in layers], by, hidden, factor, start) for block, layers in self._gated
        ).to(next(unet.parameters()).device)

    def forward(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """What the U-Net gives, called with the same arguments.

        Args:
            *args: the U-Net's own: x `[B, C, H, W]`, t, ...
            generator: source of the gates.
            **kwargs: the U-Net's own.

        Raises:
            BadSetting: gradient checkpointing is on: it would run the layers again without their gates.
        """
        with self._gating(generator):
            return self.unet(*args, **kwargs)

    def mask_parameters(self) -> list[nn.Parameter]:
        """What is trained: generators and adapters, or the free logits."""
        return list(self.masks.parameters())

    @torch.no_grad()
    def density(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> dict[str, float]:
        """Share of the weights that one call keeps, by layer; arguments as of a call."""
        kept: dict[str, Tensor] = {}
        with self._gating(generator, kept):
            self.unet(*args, **kwargs)
        return {name: float(share) for name, share in kept.items()}

    @property
    def gated_weights(self) -> dict[str, Tensor]:
        """The weights that gates act on, by layer."""
        return {name: layer.weight for _, layers in self._gated for name, layer in layers}  # type: ignore[misc]

    @contextmanager
    def _gating(self, generator: torch.Generator | None, kept: dict[str, Tensor] | None = None) -> Iterator[None]:
        """The gates are in place within; hooks and forwards of others are left alone."""
        handles, replaced = [], []
        try:
            for (block, layers), gates in zip(self._gated, self.masks, strict=True):
                if getattr(block, "gradient_checkpointing", False) and torch.is_grad_enabled():
                    raise BadSetting("gates and gradient checkpointing do not go together: unet.disable_gradient_checkpointing()")
                coarse: dict[str, Tensor] = {}
                if gates.generators:
                    handles.append(block.register_forward_pre_hook(partial(_look, gates, coarse), with_kwargs=True))
                for index, (name, layer) in enumerate(layers):
                    replaced.append((layer, layer.__dict__.get("forward")))
                    layer.forward = partial(self._run, gates, index, name, layer, coarse, generator, kept)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, before in replaced:
                if before is None:
                    del layer.forward
                else:
                    layer.forward = before

    def _run(
        self,
        gates: Any,
        index: int,
        name: str,
        layer: Any,
        coarse: dict[str, Tensor],
        generator: torch.Generator | None,
        kept: dict[str, Tensor] | None,
        x: Tensor,
    ) -> Tensor:
        """One layer in place of its own forward."""
        logits = gates.logits_of(index, layer, coarse)
        noise = None if self.sample else logits.new_zeros(())
        gate = gumbel_sigmoid(logits, tau=self.tau, noise=noise, generator=generator)
        if kept is not None:
            kept[name] = gate.float().mean()
        if isinstance(layer, nn.Linear):
            return gated_linear(x, layer.weight, gate, layer.bias)
        how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        return gated_conv2d(x, layer.weight, gate, layer.bias, **how)


def _look(gates: Any, coarse: dict[str, Tensor], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook in front of a block: what enters it decides on its gates."""
    coarse.update(gates.look(inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments))


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        square = len(set(module.kernel_size)) == 1
        return square and module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _named(path: str, include: Sequence[str]) -> bool:
    return not set(path.split(".")).isdisjoint(include)


def _kernel(layer: nn.Module) -> int:
    return int(layer.kernel_size[0]) if isinstance(layer, nn.Conv2d) else 1
