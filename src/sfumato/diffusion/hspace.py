"""The bottleneck of a diffusion U-Net over all sampling steps as a latent space: read it, move it.

    h_i = encode(x_{t_i}, t_i),    out_i = decode(h_i + s Δh_i),    i = 1 ... S network calls

The skips stay as they are. Directions Δh come from `sfumato.probes`: principal components, singular vectors, differences of
means. A sampler is any callable `sampler(model, x)` that calls `model(x_t, t)`: one of this room with its settings filled in, a
loop over a scheduler of diffusers, a person's own.

Sources: Kwon, Jeong, Uh, "Diffusion Models Already Have a Semantic Latent Space", ICLR 2023; Haas, Huberman-Spiegelglas,
Mulayoff, Graßhof, Brandt, Michaeli, "Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models", FG
2024.

>>> from functools import partial
>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, edit_h, record_h, sample_ddim
>>> from sfumato.nn import small_unet
>>> net, x = small_unet(8, 1, width=8, mults=(1, 2)), torch.randn(3, 1, 8, 8)
>>> sampler = partial(sample_ddim, schedule=Schedule(beta_schedule()), steps=5)
>>> plain, hs = record_h(net, sampler, x)
>>> hs.shape  # samples, steps, then the bottleneck
torch.Size([3, 5, 16, 4, 4])
>>> edited = edit_h(net, sampler, x, hs[0] - hs[1], scale=0.5)
>>> edited.shape, torch.equal(edited, plain)
(torch.Size([3, 1, 8, 8]), False)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting
from sfumato.nn.at_rest import eval_mode
from sfumato.nn.unet import unet_decode, unet_encode

Sampler = Callable[..., Tensor]
"""`sampler(model, x) -> pictures`; with `noise=` where the noise of the steps is given, `direction=` for asymmetric edits."""

Start = Tensor | tuple[Tensor, Tensor | None]
"""Where sampling begins: x_T `[B, C, H, W]`, or x_T and the noise of every step `[S, B, C, H, W]` (see `ddpm_invert`)."""


@torch.no_grad()
def record_h(
    unet: Any, sampler: Sampler, start: Start, *, cond: Tensor | None = None, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw pictures and keep the bottleneck of every network call.

    Args:
        unet: diffusers' UNet2DModel or UNet2DConditionModel; run in eval mode.
        sampler: `sampler(model, x)`; given `noise=` too where `start` holds noise.
        start: x_T, or x_T and the noise of every step. Without it a sampler that draws noise draws it for every batch anew.
        cond: class numbers or states to attend to, one a picture (see `sfumato.nn.unet_encode`).
        batch_size: pictures at once; None: all.

    Returns:
        The pictures `[B, ...]`, and the bottlenecks `[B, S, C', h, w]` for S network calls: they take S C' h w numbers a picture,
        so call it batch after batch for many (`sfumato.probes.StreamingPCA` needs no more).
    """
    pictures, found = [], []
    for x, noise, given, _ in _batches(start, cond, batch_size):
        halves = _Halves(unet, given)
        with _at_rest(unet):
            pictures.append(sampler(halves, x, **({} if noise is None else {"noise": noise})))
        found.append(torch.stack(halves.seen, 1))
    return torch.cat(pictures), torch.cat(found)


@torch.no_grad()
def edit_h(
    unet: Any,
    sampler: Sampler,
    start: Start,
    delta: Tensor,
    *,
    scale: float | Tensor = 1.0,
    asymmetric: bool = False,
    cond: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Draw pictures with the bottleneck moved: h + scale · delta at every network call.

    Args:
        unet, sampler, start, cond, batch_size: as for `record_h`.
        delta: the direction: `[C', h, w]` for all steps, `[S, C', h, w]` one a step, or `[B, S, C', h, w]` for each picture.
        scale: how far, one number or `[B]`; 0 gives the unedited pictures, bit for bit.
        asymmetric: only x̂_0 follows the edited network, the direction back to x_t the plain one (two decodings a step; the
            sampler must take `direction=`, as `sample_ddim` does).

    Returns:
        The pictures, `[B, ...]`.

    Raises:
        BadSetting: another number of steps than network calls, or a sampler without `direction=` for an asymmetric edit.
        BadData: a direction or scale of another shape.
    """
    if delta.ndim not in (3, 4, 5):
        raise BadData(f"a direction is [C, h, w], [S, C, h, w] or [B, S, C, h, w], not {list(delta.shape)}")
    if asymmetric and not _takes(sampler, "direction"):
        raise BadSetting("an asymmetric edit needs a sampler that takes direction=..., such as sample_ddim")
    count = len(start if isinstance(start, Tensor) else start[0])
    scales = torch.as_tensor(scale, device=delta.device, dtype=delta.dtype)
    for name, tensor, single in (("scale", scales, 0), ("delta", delta, 4)):
        if tensor.ndim > single and len(tensor) != count:
            raise BadData(f"{name} is for {len(tensor)} pictures, there are {count}")
    scales = scales.expand(count)
    pictures = []
    for x, noise, given, rows in _batches(start, cond, batch_size):
        halves = _Halves(unet, given, delta[rows] if delta.ndim == 5 else delta, scales[rows])
        extra: dict[str, Any] = {} if noise is None else {"noise": noise}
        if asymmetric:
            extra["direction"] = halves.plain
        with _at_rest(unet):
            pictures.append(sampler(halves, x, **extra))
        if delta.ndim > 3 and len(halves.seen) != delta.shape[-4]:
            raise BadSetting(f"the direction is for {delta.shape[-4]} steps, the sampler took {len(halves.seen)}")
    return torch.cat(pictures)


def h_function(unet: Any, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The output as a function of the bottleneck alone, and the bottleneck where it stands.

    Args:
        unet: diffusers' UNet2DModel or UNet2DConditionModel, in eval mode.
        x: `[B, C, H, W]`.
        t: `[B]` or a scalar.
        cond: as for `record_h`.

    Returns:
        f from `[B, C', h, w]` to `[B, C_out, H, W]`, skips and time embedding as at (x, t); and h `[B, C', h, w]`, so that f(h)
        is what the network gives: the two that `sfumato.probes.jacobian_directions` takes.
    """
    with torch.no_grad():
        h, skips, temb = unet_encode(unet, x, t, cond=cond)
    return lambda moved: unet_decode(unet, moved, skips, temb, cond=cond), h


@torch.no_grad()
def input_at(unet: Any, sampler: Sampler, start: Start, step: int, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the network is given at one call of the sampler: where `h_function` is taken along a sample's own way.

    Args:
        unet, sampler, start, cond: as for `record_h`.
        step: number of the call, 0: the first.

    Returns:
        x_t like x_T, and t `[B]`.

    Raises:
        BadSetting: a call that the sampler does not make.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    ((x, noise, given, _),) = _batches(start, cond, None)
    halves = _Halves(unet, given)

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x, torch.as_tensor(t, device=x.device).expand(len(x))))
        return halves(x, t)

    with _at_rest(unet):
        sampler(model, x, **({} if noise is None else {"noise": noise}))
    if not 0 <= step < len(calls):
        raise BadSetting(f"step={step}: the sampler calls the network {len(calls)} times, the first is 0")
    return calls[step]


class _Halves:
    """A U-Net as a sampler calls it: what passes its middle is kept in `seen`, and moved."""

    def __init__(self, unet: Any, cond: Tensor | None, delta: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.unet, self.cond, self.seen = unet, cond, list[Tensor]()
        self.delta, self.scale = delta, scale
        self._last: tuple[Tensor, tuple[Tensor, ...], Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        h, skips, temb = self._last = unet_encode(self.unet, x, t, cond=self.cond)
        self.seen.append(h)
        return unet_decode(self.unet, h if self.delta is None else h + self._move(h), skips, temb, cond=self.cond)

    def plain(self, x: Tensor, t: Tensor) -> Tensor:
        """The unmoved network where it was called last: the way down is not gone again."""
        assert self._last is not None
        return unet_decode(self.unet, *self._last, cond=self.cond)

    def _move(self, h: Tensor) -> Tensor:
        assert self.delta is not None
        assert self.scale is not None
        step, delta = len(self.seen) - 1, self.delta
        if delta.ndim > 3:
            if step >= delta.shape[-4]:
                raise BadSetting(f"the direction is for {delta.shape[-4]} steps, the sampler takes more")
            delta = delta[..., step, :, :, :]
        if delta.shape[-3:] != h.shape[1:]:
            raise BadData(f"the direction is {list(delta.shape[-3:])} a step, the bottleneck {list(h.shape[1:])}")
        return self.scale.to(h).view(-1, 1, 1, 1) * delta.to(h)


def _batches(
    start: Start, cond: Tensor | None, batch_size: int | None
) -> Sequence[tuple[Tensor, Tensor | None, Tensor | None, slice]]:
    """(x_T, noise, cond, rows) for every batch."""
    x, noise = (start, None) if isinstance(start, Tensor) else start
    if noise is not None and noise.shape[1:] != x.shape:
        raise BadData(f"the noise of the steps is [S, {', '.join(map(str, x.shape))}], not {list(noise.shape)}")
    if cond is not None and len(cond) != len(x):
        raise BadData(f"{len(x)} pictures need a condition each, not {len(cond)}")
    size = len(x) if batch_size is None else batch_size
    if size < 1:
        raise BadSetting(f"batch_size={size} for {len(x)} pictures: there must be one at least")
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    return [(x[p], None if noise is None else noise[:, p], None if cond is None else cond[p], p) for p in parts]


def _at_rest(unet: Any) -> AbstractContextManager[None]:
    return eval_mode(unet) if isinstance(unet, nn.Module) else nullcontext()


def _takes(fn: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(fn).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
