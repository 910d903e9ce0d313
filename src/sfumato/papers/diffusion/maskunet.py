"""MaskUNet: a frozen diffusion model draws better with some of its weights masked, of each time and picture others.

    min over the generators G and adapters A of   E |f(x_t, t; W ∘ m) - eps|²,    m = 1[A(G(features, t)) + Gumbel > 0]

The U-Net stays as it was trained; a small generator a block of the way up chooses its gates (`sfumato.sparsity.MaskedUNet`).
Without training: one logit a weight, moved at every late sampling step towards what a reward makes of the guess of the clean
picture, then forgotten (`sfumato.sparsity.rewarded_model`). The parts take any UNet2DModel or UNet2DConditionModel of diffusers,
and its place in a pipeline of a text too (`sfumato.sparsity.RewardedUNet`); the method here masks a DDPM run.

Source: Lei Wang, Senmao Li, Fei Yang, Jianye Wang, Ziheng Zhang, Yuhan Liu, Yaxing Wang, Jian Yang, "Not All Parameters Matter:
Masking Diffusion Models for Enhancing Generation Ability", CVPR 2025 (arXiv 2505.03097).

>>> import torch
>>> from sfumato.papers.diffusion.ddpm import DDPM
>>> from sfumato.papers.diffusion.maskunet import MaskUNet
>>> ddpm = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8, attn_at=(1,)))
>>> method = MaskUNet.init_from(MaskUNet.Config.small(sample_steps=2), ddpm)
>>> method.sample(3).shape
torch.Size([3, 1, 8, 8])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.batch import Batch
from sfumato.data.samples import digits
from sfumato.diffusion import Schedule, denoising_loss, sample_ddim, uniform_t
from sfumato.diffusion.samplers import Callback, Model
from sfumato.errors import BadCheckpoint, BadData
from sfumato.method import Context, Loss, Method, MethodConfig, Result, Step
from sfumato.metrics import frechet_features
from sfumato.optim import cosine_warmup
from sfumato.papers.diffusion.ddpm import DDPM, FromDDPM
from sfumato.probes import train_judge
from sfumato.sparsity import MaskedUNet, keep_logit, rewarded_model
from sfumato.sparsity.weight_gates import ATTENTION


class MaskUNet(FromDDPM):
    """Wang et al. 2025. Learns masks on the weights of a trained diffusion model (`--init RUN`), draws pictures with them."""

    no_model: ClassVar[str] = "masks are learned for a trained model: sfumato train maskunet --data WHERE --init runs/ddpm/STAMP"

    class Config(MethodConfig):
        """Defaults: those of the authors' scripts for Stable Diffusion 1.5."""

        steps: int = Field(9000, gt=0, description="optimizer steps")
        batch_size: int = Field(32, gt=0, description="pictures a step")
        clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; None: no clipping")
        where: Literal["up_blocks", "mid_block", "down_blocks"] = Field(
            "up_blocks", description="part of the U-Net whose weights are masked"
        )
        include: tuple[str, ...] = Field(
            ATTENTION, description="layers that are masked there, by a name in their path; [conv1,conv2]: the convolutions"
        )
        by: Literal["sample", "time", "static"] = Field(
            "sample", description="what masks depend on: features and time (sample), time alone, or nothing (static)"
        )
        hidden: int = Field(64, gt=0, description="channels inside a generator")
        factor: int = Field(4, gt=0, description="how much coarser than the weights a generator's masks are")
        tau: float = Field(1.0, gt=0, description="temperature of the gates")
        draw_masks: bool = Field(True, description="draw masks while sampling too; false: keep what is likelier kept than 63 %")
        lr: float = Field(1e-5, gt=0, description="AdamW's learning rate")
        weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay")
        decay: Literal["none", "cosine"] = Field("none", description="of the learning rate over the training; cosine: to 0")
        sample_steps: int = Field(50, gt=0, description="network calls for a sample")
        eta: float = Field(0.0, ge=0, le=1, description="noise while sampling; 0: DDIM, 1: ancestral")
        ddpm: dict[str, Any] | None = Field(None, description="how the diffusion model is built; fills itself in")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """For a small model on two cores: a minute."""
            return cls(**{"steps": 600, "batch_size": 64, "lr": 1e-3, "decay": "cosine", **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        base = DDPM(DDPM.Config.model_validate(c.ddpm))
        self.schedule, self.shape, self.predicts = base.schedule, base.shape, base.config.predict
        self._augment = base.augment()
        self.masked = MaskedUNet(
            base.average.module, where=c.where, include=c.include, by=c.by, hidden=c.hidden, factor=c.factor, tau=c.tau,
            sample=c.draw_masks,
        )  # fmt: skip

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Mask the model of a DDPM run, or go on with the masks of another run of this kind."""
        if not isinstance(previous, (cls, DDPM)):
            raise BadCheckpoint(f"masks are learned for a ddpm run, not for one of {type(previous).__name__}")
        ddpm = previous.base_settings() if isinstance(previous, DDPM) else previous.config.ddpm
        method = cls(type(config).model_validate({**config.model_dump(), "ddpm": ddpm}))
        if isinstance(previous, DDPM):
            method.masked.unet.load_state_dict(previous.average.module.state_dict())
        else:
            layout = ("where", "include", "by", "hidden", "factor")
            changed = [name for name in layout if getattr(config, name) != getattr(previous.config, name)]
            if changed:
                raise BadCheckpoint(f"that run's masks have another {', '.join(changed)}: set it alike, or begin at its ddpm run")
            method.load_state_dict(previous.state_dict())
        method.trained = True
        return method.to(previous.device)

    def augment(self) -> Callable[..., Any] | None:
        """As the diffusion model crops its pictures."""
        return self._augment

    def train(self, mode: bool = True) -> Self:
        """The frozen model stays in eval mode; masks are drawn while training, then as the settings say."""
        super().train(mode)
        self.masked.unet.eval()
        self.masked.sample = mode or self.config.draw_masks
        return self

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """One step, at the rate of its time."""
        if self.config.decay == "cosine":
            ctx.scale_lr(cosine_warmup(ctx.progress, warmup=0.0))
        yield Step("net", (self.loss,))

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The error of the masked model at one random time a picture.

        Raises:
            BadData: pictures of another size.
        """
        x0 = self._pictures(batch)
        t = uniform_t(len(batch), len(self.schedule), generator=ctx.generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=ctx.generator, device=x0.device, dtype=x0.dtype)
        return Loss(self._error(self.model(ctx.generator), x0, t, noise), len(batch))

    def _pictures(self, batch: Batch) -> Tensor:
        if batch.x.shape[1:] != self.shape:
            raise BadData(f"pictures are {tuple(batch.x.shape[1:])}, the model draws {self.shape}: resize them")
        return 2 * batch.x - 1

    def _error(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return denoising_loss(model, x0, t, noise, self.schedule, predict=self.predicts)

    def model(self, generator: torch.Generator | None = None, *, masks: bool = True) -> Model:
        """`f(x_t, t)` with masks drawn from `generator`, or as it was trained."""
        if masks:
            return lambda x, t: self.masked(x, t, generator=generator).sample
        return lambda x, t: self.masked.unet(x, t).sample

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """AdamW on generators and adapters alone."""
        c = self.config
        return {"net": torch.optim.AdamW(self.masked.mask_parameters(), c.lr, weight_decay=c.weight_decay)}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Errors on held-out pictures with and without masks at the same times and noise, and the share of weights kept."""
        generator = torch.Generator(self.device).manual_seed(0)
        errors, count, kept = torch.zeros(2, dtype=torch.float64), 0, 1.0
        for batch in batches:
            x0 = self._pictures(batch).to(self.device)
            t = uniform_t(len(x0), len(self.schedule), generator=generator).to(x0.device)
            noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            both = [self._error(self.model(generator, masks=masks), x0, t, noise) for masks in (True, False)]
            errors += len(x0) * torch.stack(both).cpu().double()
            if not count:
                kept = _kept(self.masked, self.masked.density(self.schedule.q_sample(x0, t, noise), t, generator=generator))
            count += len(x0)
        if not count:
            return {}
        with_masks, without = (errors / count).tolist()
        return {"error with masks": with_masks, "error without": without, "weights kept": kept}

    @property
    def trajectory_steps(self) -> int:
        """Network calls for a sample."""
        return min(int(self.config.sample_steps), len(self.schedule))

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        callback: Callback | None = None,
        masks: bool = True,
    ) -> Tensor:
        """Draw `n` new pictures: `[n, C, H, W]` in [0, 1].

        Args:
            n: how many.
            generator: of the noise that they begin at, and of the masks.
            callback: sees every step, with pictures in [-1, 1].
            masks: false: with the model as it was trained, from the same noise.
        """
        device = generator.device if generator is not None else self.device
        x = torch.randn((n, *self.shape), generator=generator, device=device).to(self.device)
        drawn = sample_ddim(
            self.model(generator, masks=masks), x, self.schedule, steps=self.trajectory_steps, eta=self.config.eta,
            predict=self.predicts, clip=True, callback=callback, generator=generator,
        )  # fmt: skip
        return (drawn + 1).div(2).clamp(0, 1)

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures from the same noise with masks and without."""
        state, n = generator.get_state(), len(batch.x)
        masked = self.sample(n, generator)
        return {"with masks": masked, "without": self.sample(n, generator.set_state(state), masks=False)}


def _kept(masked: MaskedUNet, shares: dict[str, float]) -> float:
    """Of all masked weights together, from the shares of the layers."""
    sizes = {name: weight.numel() for name, weight in masked.gated_weights.items()}
    return sum(share * sizes[name] for name, share in shares.items()) / sum(sizes.values())


# Claims

BASE = {"channels": 1, "image_size": 8, "width": 16, "attn_at": (0, 1), "batch_size": 32}
BASE_STEPS, MASK_STEPS, BATCH = 500, 300, 32
TIMES, DRAWN = 10, 200
"""Times that held-out errors are taken at; samples drawn to see how far they are from digits."""

DIGITS, PER_DIGIT = 10, 5
"""Digits that are asked for, one after the other, and samples of each."""


def _base(lab: Lab) -> tuple[Batch, Batch, DDPM]:
    """Digits, and a small model of them with attention on the way up."""
    train, test = digits(seed=lab.seed)
    return train, test, lab.fit(DDPM(DDPM.Config.small(**BASE)), train, steps=lab.steps(BASE_STEPS))


@claim(
    "Masks on a frozen diffusion model's weights that follow time and sample lower its error on held-out pictures, more than a "
    "static learned mask, and than random masks that keep as many weights",
    Better("noise error", "masks", over="frozen", higher=False),
    Better("noise error", "masks", over="static mask", higher=False),
    Better("noise error", "static mask", over="frozen", higher=False),
    Better("noise error", "masks", over="random masks", higher=False),
    seeds=range(100, 105),
    note="Digits of 8 x 8 pixels; 500 steps of 32 pictures for the model, 300 for the masks of its attention layers on the way "
    "up; errors at 10 times on one noise a held-out picture, with masks drawn as in sampling. The static mask has the same "
    "generators and adapters, told nothing; random masks keep as many weights in every layer. Beside them: masks by time "
    "alone, and the same layers fine-tuned by the masks' optimizer, which have a third as many parameters (LoRA of equal "
    "size would be of more than full rank here). The rate falls to 0 for both, as the frozen weights are an average over "
    "training. Masks close 1 to 2 % of the weights and raise the error from 0.1658 to 0.1661, random masks as many to 0.1660; at "
    "a fifth of the rate none closes (a development seed). The same layers fine-tuned stay within 0.0003 of where they were: 300 "
    "steps gain nothing in these layers of a network this small.",
)
def learned_masks(lab: Lab) -> Figures:
    """Mean squared error of the predicted noise on held-out digits, and the Fréchet distance of samples by a small classifier."""
    train, test, ddpm = _base(lab)
    unet, schedule, steps = ddpm.average.module, ddpm.schedule, lab.steps(MASK_STEPS)
    arms: dict[str, nn.Module] = {"frozen": unet}
    for arm, by in {"masks": "sample", "static mask": "static", "masks by time": "time"}.items():
        method = MaskUNet.init_from(MaskUNet.Config.small(by=by, batch_size=BATCH), ddpm)
        arms[arm] = lab.fit(method, train, steps=steps).masked
    x0, generator, masked, random = 2 * test.x - 1, lab.generator, arms["masks"], MaskedUNet(unet, by="free")
    assert isinstance(masked, MaskedUNet)
    t = uniform_t(len(x0), len(schedule), generator=generator)
    kept = masked.density(schedule.q_sample(x0, t, torch.randn(x0.shape, generator=generator)), t, generator=generator)
    for logits, share in zip(random.mask_parameters(), kept.values(), strict=True):
        logits.data.fill_(float(keep_logit(share)))
    arms |= {"random masks": random, "fine-tuned layers": _fine_tuned(ddpm, train, lab)}
    features, figures = _judge(train, lab)[:-1], {}
    for arm, net in arms.items():
        generator = lab.generator  # all arms begin at the same noise; masks are drawn after it
        start = torch.randn(DRAWN, *ddpm.shape, generator=generator)
        drawn = sample_ddim(_model(net, generator), start, schedule, steps=10, clip=True).add(1).div(2)
        distance = frechet_features(features(drawn), features(test.x))
        figures[arm] = {"noise error": _held_out(net, x0, schedule, lab.generator), "frechet_small": float(distance)}
        lab.picture(arm, drawn[:16])
    figures["masks"] |= {"weights kept": _kept(masked, kept), "parameters": _count(masked.mask_parameters())}
    figures["fine-tuned layers"]["parameters"] = _count(masked.gated_weights.values())
    return figures


def _model(net: nn.Module, generator: torch.Generator) -> Model:
    """With masks drawn from `generator` where there are masks."""
    if isinstance(net, MaskedUNet):
        return lambda x, t: net(x, t, generator=generator).sample
    return lambda x, t: net(x, t).sample


def _count(tensors: Iterable[Tensor]) -> float:
    return float(sum(p.numel() for p in tensors))


@torch.no_grad()
def _held_out(net: nn.Module, x0: Tensor, schedule: Schedule, generator: torch.Generator) -> float:
    """Over times from low noise to high, at noise that all arms share; masks are drawn after it."""
    noise, model = torch.randn(x0.shape, generator=generator), _model(net, generator)
    times = torch.linspace(0, len(schedule) - 1, TIMES).long()
    return float(torch.stack([denoising_loss(model, x0, t.expand(len(x0)), noise, schedule) for t in times]).mean())


def _fine_tuned(ddpm: DDPM, train: Batch, lab: Lab) -> nn.Module:
    """A copy in which the weights that masks would act on have learned instead, as masks do."""
    masked, generator = MaskedUNet(copy.deepcopy(ddpm.average.module)), lab.generator
    config: Any = MaskUNet.Config.small()
    net, weights, steps = masked.unet, [w.requires_grad_() for w in masked.gated_weights.values()], lab.steps(MASK_STEPS)
    optimizer = torch.optim.AdamW(weights, config.lr, weight_decay=config.weight_decay)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_warmup(step / steps, warmup=0.0))
    for _ in range(steps):
        x0 = 2 * train.x[torch.randint(len(train), (BATCH,), generator=generator)] - 1
        t = uniform_t(len(x0), len(ddpm.schedule), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        denoising_loss(_model(net, generator), x0, t, noise, ddpm.schedule).backward()
        nn.utils.clip_grad_norm_(weights, config.clip_norm)
        optimizer.step()
        falling.step()
    return net


@claim(
    "Masks moved towards a reward while sampling, without training, raise it above sampling with all weights and above random "
    "masks of the same density",
    Better("reward", "moved masks", over="all weights"),
    Better("reward", "moved masks", over="random masks"),
    Holds("higher than with all weights for 80 % of the samples", lambda f: f["moved masks"]["samples raised, %"] >= 80),
    Holds("more than 85 % of the weights are kept", lambda f: f["moved masks"]["weights kept"] > 0.85),
    seeds=range(100, 105),
    note="The reward is a small classifier's log-probability of a digit, of each digit for 5 samples that share their masks; 15 "
    "steps of DDIM, the last 8 of ten network calls each. All arms begin at the same noise. Random masks are those that the "
    "moved ones begin with at every step: 93 % of the attention weights of the way up, kept by chance. The mean reward rose on "
    "every seed, for 54 to 82 % of the samples where 80 % were asked.",
)
def rewarded_masks(lab: Lab) -> Figures:
    """Mean log-probability of the digit asked for, at the end of sampling."""
    train, _, ddpm = _base(lab)
    judge, schedule = _judge(train, lab), ddpm.schedule
    masked, generator = MaskedUNet(ddpm.average.module, by="free"), lab.generator
    starts = torch.randn(DIGITS, PER_DIGIT, *ddpm.shape, generator=generator)
    rewards, shown, kept = dict[str, list[Tensor]](), dict[str, list[Tensor]](), list[Tensor]()

    def decode(x0: Tensor) -> Tensor:
        logits = torch.cat([p.detach().flatten() for p in masked.mask_parameters()])
        kept.append(1 - torch.exp(-logits.exp()).mean())
        return (x0 + 1) / 2

    for digit, start in enumerate(starts):

        def reward(pictures: Tensor, digit: int = digit) -> Tensor:
            return F.log_softmax(judge(pictures), 1)[:, digit]

        arms: dict[str, Model] = {
            "all weights": _model(masked.unet, generator),
            "random masks": _model(masked, generator),
            "moved masks": rewarded_model(masked, reward, schedule, decode=decode, generator=generator),
        }
        for arm, model in arms.items():
            drawn = sample_ddim(model, start, schedule, steps=15).add(1).div(2)
            rewards.setdefault(arm, []).append(reward(drawn))
            shown.setdefault(arm, []).append(drawn[:1])
    found = {arm: torch.cat(values) for arm, values in rewards.items()}
    for arm, pictures in shown.items():
        lab.picture(arm, torch.cat(pictures))
    figures = {arm: {"reward": float(values.mean())} for arm, values in found.items()}
    for arm in ("random masks", "moved masks"):
        figures[arm]["samples raised, %"] = 100 * float((found[arm] > found["all weights"]).double().mean())
    figures["moved masks"]["weights kept"] = float(torch.stack(kept).min())
    return figures


def _judge(train: Batch, lab: Lab) -> nn.Sequential:
    assert train.label is not None
    return train_judge(train.x, train.label, steps=lab.steps(200))
