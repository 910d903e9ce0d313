"""Gates on a frozen network's weights that are moved towards a reward while sampling, without any training.

    l ← AdamW(l, -∇_l r(x̂_0(x_t; W ∘ m_l)))  a few times a step, then forgotten,        m_l = 1[l + Gumbel > 0]

One logit a weight, of all pictures of a batch; every step of a sampler begins with the same ones. Early steps are left alone.

Source: Wang, Li, Yang, Wang, Zhang, Liu, Wang, Yang, "Not All Parameters Matter: Masking Diffusion Models for Enhancing
Generation Ability", CVPR 2025 (arXiv 2505.03097), its form without training.

>>> import torch
>>> from sfumato.diffusion import Schedule, beta_schedule, sample_ddim
>>> from sfumato.nn import small_unet
>>> from sfumato.sparsity import MaskedUNet, rewarded_model
>>> schedule, masked = Schedule(beta_schedule()), MaskedUNet(small_unet(8, 1, width=8, mults=(1, 2), attn_at=(1,)), by="free")
>>> model = rewarded_model(masked, lambda x: x.mean((1, 2, 3)), schedule, iters=2, early=1)
>>> sample_ddim(model, torch.randn(3, 1, 8, 8), schedule, steps=2).shape
torch.Size([3, 1, 8, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.predictions import convert
from sfumato.diffusion.samplers import Model
from sfumato.diffusion.schedules import Schedule
from sfumato.sparsity.weight_gates import MaskedUNet

Reward = Callable[[Tensor], Tensor]
"""What pictures `[B, C, H, W]` are worth, `[B]`; differentiable, higher is better."""


def optimise_masks(
    step: Callable[[], tuple[Any, Tensor]], masked: MaskedUNet, reward: Reward, *, iters: int = 10, lr: float = 1e-2
) -> Any:
    """Move gates towards a reward at one sampling step; afterwards they are what they were.

    Args:
        step: runs the network once, with new gates, and gives whatever sampling goes on with, and the guess of the clean
            pictures `[B, C, H, W]` as the reward wants them.
        masked: whose `mask_parameters` are moved, by AdamW.
        reward: its mean over the pictures rises.
        iters: calls of `step`; with 1 nothing is moved.
        lr: learning rate.

    Returns:
        What the last call of `step` gave, detached if a tensor.
    """
    parameters = masked.mask_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr)
    try:
        for _ in range(iters - 1):
            with torch.enable_grad():
                loss = -reward(step()[1]).mean()
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            optimizer.step()
        with torch.no_grad():
            return step()[0]
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
                p.grad = None


def rewarded_model(
    masked: MaskedUNet,
    reward: Reward,
    schedule: Schedule,
    *,
    iters: int = 10,
    early: int = 7,
    lr: float = 1e-2,
    predict: str = "eps",
    decode: Callable[[Tensor], Tensor] = lambda x0: (x0 + 1) / 2,
    generator: torch.Generator | None = None,
) -> Model:
    """A model for any sampler, whose gates are moved towards a reward at every late call. It counts its calls: for one run.

    Args:
        masked: with `by="free"`: one logit a weight, shared by the pictures of a batch.
        reward: of the guess of the clean pictures.
        schedule: of the sampler.
        iters: network calls at a late step.
        early: steps at the beginning that take one call; the authors' 7 of 15.
        lr: learning rate of the logits.
        predict: what the network predicts.
        decode: from the guess to what the reward takes; a latent model's decoder, or by default from [-1, 1] to [0, 1].
        generator: source of the gates.
    """
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1

        def step() -> tuple[Tensor, Tensor]:
            out: Tensor = masked(x, t, generator=generator).sample
            return out, decode(convert(out, x, t, schedule, source=predict, target="x0"))

        out: Tensor = optimise_masks(step, masked, reward, iters=iters if calls > early else 1, lr=lr)
        return out

    return model
