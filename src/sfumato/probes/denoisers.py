"""What a denoiser looks at, and what it leaves behind.

    blindness(f, x) = max_p | d f_p / d x_p |,            0: no pixel sees itself (a blind-spot network),
    r(d) = sum_p n_p n_{p+d} / sum_p n_p²,                 autocorrelation of a residual n; white noise: 0 but for d = 0.

Sources: blind spots, Krull et al., "Noise2Void", CVPR 2019; autocorrelation by the Wiener-Khinchin theorem.

>>> import torch
>>> from sfumato.probes import blindness, noise_autocorrelation
>>> cross = torch.tensor([[0.0, 0.25, 0.0], [0.25, 0.0, 0.25], [0.0, 0.25, 0.0]])
>>> blindness(lambda x: torch.nn.functional.conv2d(x, cross[None, None], padding=1), torch.rand(1, 1, 8, 8)).item()
0.0
>>> noise_autocorrelation(torch.randn(4, 3, 64, 64))[0, :2].abs().round(decimals=1)
tensor([1., 0.])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def blindness(net: Callable[[Tensor], Tensor], x: Tensor, *, chunk: int = 64) -> Tensor:
    """The largest influence of any input pixel on the output pixel at the same place, over all pairs of channels.

    One forward pass, then `chunk` output pixels at a time backward: meant for pictures of some dozen pixels a side.

    Args:
        net: `[B, C, H, W]` to `[B, C', H, W]`; samples must not look at each other.
        x: `[B, C, H, W]`, where to look.
        chunk: output pixels per backward pass; memory grows with it.

    Returns:
        Scalar, `max |d f_{c', p} / d x_{c, p}|`; exactly 0 for a blind-spot network.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = net(x)
        outputs = torch.arange(y[0].numel(), device=y.device)
        pixels = y.shape[-2] * y.shape[-1]
        worst = y.new_zeros(())
        for part in outputs.split(chunk):
            pick = torch.zeros(len(part), y[0].numel(), dtype=y.dtype, device=y.device).scatter_(1, part[:, None], 1)
            pick = pick.view(-1, 1, *y.shape[1:]).expand(-1, *y.shape)
            (grad,) = torch.autograd.grad(y, x, pick, retain_graph=True, is_grads_batched=True)
            here = (part % pixels).view(-1, 1, 1, 1).expand(-1, *x.shape[:2], 1)
            worst = torch.maximum(worst, grad.flatten(3).gather(3, here).abs().max())
    return worst.detach()


def noise_autocorrelation(residual: Tensor) -> Tensor:
    """The periodic autocorrelation of what was removed, averaged over samples and channels.

    Args:
        residual: `[B, C, H, W]`, noisy minus restored; its mean is removed per channel.

    Returns:
        `[H, W]`, 1 at lag (0, 0); lag (dy, dx) at `[dy, dx]`, negative lags at the far end.
    """
    centred = residual - residual.mean((-2, -1), keepdim=True)
    power = torch.fft.rfft2(centred).abs().square().mean((0, 1))
    correlation = torch.fft.irfft2(power, s=residual.shape[-2:])
    return correlation / correlation[0, 0]
