"""Gates on a frozen network's weights that are moved towards a reward while sampling, without any training.

    l ← AdamW(l, -∇_l r(x̂_0(x_t; W ∘ m_l)))  a few times a step, then forgotten,        m_l = 1[l + Gumbel > 0]

One logit a weight, of all pictures of a batch; every step of a sampler begins with the same ones. Early steps are left alone.
`rewarded_model` is for samplers of this library, `RewardedUNet` for pipelines of diffusers, which draw pictures of a text:

    pipe = StableDiffusionPipeline.from_pretrained(...)
    pipe.unet = RewardedUNet.open(pipe, reward, guidance=7.5)
    pictures = pipe("a lighthouse", guidance_scale=7.5, num_inference_steps=15).images

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

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from sfumato.diffusion.predictions import convert, read_schedule
from sfumato.diffusion.samplers import Model
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import BadSetting
from sfumato.nn.latent_codec import DiffusersVAE
from sfumato.nn.unet_wrapper import UNetWrapper
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
    if iters == 1:
        with torch.no_grad():
            return step()[0]
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


class RewardedUNet(UNetWrapper):
    """A gated U-Net whose gates are moved towards a reward at every late step, to be the `unet` of a pipeline of diffusers.

    It counts its calls: one at a time that is nearer to the first than to the last, and noisier than that, begins a new run.

    Args:
        masked: with `by="free"`: one logit a weight, shared by the pictures of a batch.
        reward: of the guess of the clean pictures.
        schedule: of the sampler; times between its own are rounded.
        guidance: where a call holds both halves of classifier-free guidance, the one without the condition first: its scale.
        iters: network calls at a late step.
        early: steps at the beginning that take one call; the authors' 7 of 15.
        lr: learning rate of the logits.
        predict: what the network predicts.
        decode: from the guess to what the reward takes; a latent model's decoder, or by default from [-1, 1] to [0, 1].
        generator: source of the gates.
    """

    def __init__(
        self,
        masked: MaskedUNet,
        reward: Reward,
        schedule: Schedule,
        *,
        guidance: float | None = None,
        iters: int = 10,
        early: int = 7,
        lr: float = 1e-2,
        predict: str = "eps",
        decode: Callable[[Tensor], Tensor] = lambda x0: (x0 + 1) / 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(masked)
        self.reward, self.schedule, self.guidance, self.predict, self.decode = reward, schedule, guidance, predict, decode
        self.iters, self.early, self.lr, self.generator = iters, early, lr, generator
        self.calls, self.first, self.last = 0, -math.inf, -math.inf

    @classmethod
    def open(cls, pipeline: Any, reward: Reward, **how: Any) -> Self:
        """For a pipeline, with its schedule, its prediction and its VAE.

        Args:
            pipeline: anything with `.unet`, which may be gated or rewarded already, `.scheduler` and, for latents, `.vae`.
            reward: of pictures `[B, C, H, W]`, about [0, 1].
            **how: arguments of this class.
        """
        unet, vae = pipeline.unet, getattr(pipeline, "vae", None)
        schedule, predict = read_schedule(pipeline.scheduler)
        if vae is not None:
            how = {"decode": DiffusersVAE(vae, scale=vae.config.get("scaling_factor") or 1.0).decode, **how}
        unet = unet.unet if isinstance(unet, RewardedUNet) else unet
        masked = unet if isinstance(unet, MaskedUNet) else MaskedUNet(unet, by="free")
        return cls(masked, reward, schedule, **{"predict": predict, **how})

    def forward(self, x: Tensor, t: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """What the U-Net gives once its gates have been moved; called with the same arguments.

        Raises:
            BadSetting: guidance, and a batch that has no two halves.
        """
        if self.guidance is not None and len(x) % 2:
            raise BadSetting("guidance goes with calls of two halves, without and with the condition: here it must be None")
        time = torch.as_tensor(t).round().long()
        self._count(int(time.max()))

        def step() -> tuple[Any, Tensor]:
            out = self.unet(x, t, *args, generator=self.generator, **kwargs)
            return out, self._guess(out.sample, x, time)

        def reward(x0: Tensor) -> Tensor:
            return self.reward(self.decode(x0))  # here, so that nothing is decoded where nothing is rewarded

        out = optimise_masks(step, self.unet, reward, iters=self.iters if self.calls > self.early else 1, lr=self.lr)
        return out if return_dict else (out.sample,)

    def _count(self, time: int) -> None:
        if time - self.last > self.first - time:
            self.calls, self.first = 0, time
        self.calls, self.last = self.calls + 1, time

    def _guess(self, out: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The clean pictures or latents that are expected, guided where that is done."""
        if self.guidance is not None:
            without, with_it = out.chunk(2)
            out, x = torch.lerp(without, with_it, self.guidance), x[: len(without)]
            time = time if time.ndim == 0 else time[: len(without)]
        return convert(out, x, time, self.schedule, source=self.predict, target="x0")


def rewarded_model(masked: MaskedUNet, reward: Reward, schedule: Schedule, **how: Any) -> Model:
    """A model for any sampler, whose gates are moved towards a reward at every late call.

    Args:
        masked, reward, schedule: as of `RewardedUNet`.
        **how: its other arguments, without guidance.
    """
    unet = RewardedUNet(masked, reward, schedule, **how)
    return lambda x, t: unet(x, t).sample
