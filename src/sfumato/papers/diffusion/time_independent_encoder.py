"""TiUE: a diffusion model distilled to four steps that share one pass of the encoder, its decoders run at once.

    z_0 = A z + Σ_k B_k ε_k,   ε_k = decode(encode(z, t_1), t_k),     L = VSD(z_0) + λ Σ_k KL(ε_k ‖ N(0, 1))

From step to step the encoder's features of a diffusion U-Net hardly change, the decoder's do (`encoder_decoder_similarity`). The
student begins as the teacher, a DDPM run (`--init RUN`), and sees no picture: variational score distillation compares the
teacher's score of its pictures with that of a second network, which learns, in turn, what the student draws. The KL keeps mean
and variance of each noise map near those of noise. The parts take networks of diffusers: `sfumato.diffusion.distillation`.

Source: Li, Wang, Wang, Liu, Xie, van de Weijer, Khan, Yang, Wang, Yang, "One-Way Ticket: Time-Independent Unified Encoder for
Distilling Text-to-Image Diffusion Models", CVPR 2025 (arXiv 2505.21960).

>>> from sfumato.papers.diffusion.ddpm import DDPM
>>> from sfumato.papers.diffusion.time_independent_encoder import TiUE
>>> teacher = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8))
>>> student = TiUE.init_from(TiUE.Config.small(), teacher)
>>> student.sample(3).shape
torch.Size([3, 1, 8, 8])
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.batch import Batch
from sfumato.data.samples import digits
from sfumato.diffusion import (
    Schedule,
    beta_schedule,
    ddim_coefficients,
    fake_score_loss,
    noise_kl,
    range_t,
    sample_ddim,
    shared_encoder_sample,
    uniform_t,
    vsd_loss,
)
from sfumato.diffusion.distillation import SharedEncoderSample
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.method import Context, Loss, Method, MethodConfig, Result, Step
from sfumato.metrics import frechet_features, precision_recall
from sfumato.nn import add_lora
from sfumato.nn.at_rest import eval_mode
from sfumato.papers.diffusion.ddpm import DDPM, FromDDPM
from sfumato.probes import train_judge

TIMES = (751, 501, 251, 1)
"""The paper's, on Stable Diffusion's schedule."""


def paper_times(schedule: Schedule) -> tuple[int, ...]:
    """The times of a schedule that are as noisy as the paper's four: its numbers are of Stable Diffusion's schedule.

    On DDPM's linear schedule time 751 keeps a quarter of that signal: one step from there to the picture multiplies what the
    network errs by 17 instead of 4.

    >>> from sfumato.diffusion import Schedule, beta_schedule
    >>> paper_times(Schedule(beta_schedule("scaled_linear"))), paper_times(Schedule(beta_schedule("linear")))
    ((751, 501, 251, 1), (532, 354, 194, 8))
    """
    wanted = Schedule(beta_schedule("scaled_linear")).sigma[list(TIMES)].log()
    near = (wanted[:, None] - schedule.sigma.log()).abs().argmin(1)
    return tuple(dict.fromkeys(near.tolist()))  # a schedule of few times may have fewer than four of them


class TiUE(FromDDPM):
    """Li et al. 2025. Distils a DDPM run (`--init RUN`) to a sampler that takes about the time of one step."""

    no_model: ClassVar[str] = (
        "a student needs a trained teacher: sfumato train time-independent-encoder --data WHERE --init runs/ddpm/STAMP"
    )

    class Config(MethodConfig):
        """Defaults: the paper's, for Stable Diffusion 2.1 (3 epochs of 1.4 million prompts, 8 GPUs of 8)."""

        steps: int = Field(65_625, gt=0, description="optimizer steps of the student, and as many of the fake score")
        batch_size: int = Field(64, gt=0, description="pictures that the student draws a step")
        clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; None: no clipping")
        decoder_times: tuple[int, ...] | None = Field(
            None, min_length=1, description="times of the decoders, noisiest first; the encoder's is the first one; None: as "
            "noisy as 751, 501, 251 and 1 of Stable Diffusion",
        )  # fmt: skip
        kl_weight: float = Field(
            0.8, ge=0, description="weight of a picture's KL, summed over its noise maps; 0.8: 0.1 of the sum over a batch of 8"
        )
        vsd_range: tuple[float, float] = Field((0.02, 0.981), description="times that scores are compared at, shares of all")
        lr: float = Field(1e-6, gt=0, description="Adam's learning rate for the student")
        fake_lr: float = Field(1e-3, gt=0, description="Adam's learning rate for the fake score")
        fake_weighted: bool = Field(True, description="weigh the fake score's errors by abar_t, as released; false: all alike")
        rank: int | None = Field(64, gt=0, description="of the fake score's change of the teacher (LoRA); None: all weights")
        alpha: float = Field(108.0, gt=0, description="that change is multiplied by alpha / rank")
        ema: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights that samples are drawn with")
        ddpm: dict[str, Any] | None = Field(None, description="how the teacher is built; fills itself in")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """A small teacher on two cores, in minutes; the fake score moves all its weights, fast enough to follow."""
            small = {
                "steps": 800, "lr": 1e-4, "fake_lr": 4e-3, "fake_weighted": False, "rank": None, "kl_weight": 0.05, "ema": 0.98,
            }  # fmt: skip
            return cls(**{**small, **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        # the student is `base.net`, its average `base.average`; an encoder run once has no use for dropout
        self.base = DDPM(DDPM.Config.model_validate({**c.ddpm, "dropout": 0.0, "ema": c.ema}))
        self.teacher = copy.deepcopy(self.base.average.module)
        self.fake = copy.deepcopy(self.teacher).requires_grad_(True)
        if c.rank is not None:
            add_lora(self.fake, c.rank, alpha=c.alpha)
        count, (low, high) = len(self.base.schedule), c.vsd_range
        self.vsd_times = max(0, round(low * count)), min(count, round(high * count))
        if not self.vsd_times[0] < self.vsd_times[1]:
            raise BadSetting(f"vsd_range={c.vsd_range} holds none of {count} times: give shares such as (0.02, 0.981)")
        self.decoder_times = paper_times(self.base.schedule) if c.decoder_times is None else c.decoder_times
        ddim_coefficients(self.base.schedule, self.decoder_times)  # refuses times that no sampler takes
        self._drawn: list[Tensor] = []
        self._told: dict[str, Tensor] = {}

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """The student of a DDPM run, or one that goes on from another student, with that one's teacher."""
        base = previous.base if isinstance(previous, cls) else previous
        if not isinstance(base, DDPM):
            raise BadCheckpoint(f"a student is distilled from a ddpm run, not from one of {type(previous).__name__}")
        known = previous.config.ddpm if isinstance(previous, cls) else base.base_settings()
        method = cls(type(config).model_validate({**config.model_dump(), "ddpm": known}))
        teacher = previous.teacher if isinstance(previous, cls) else base.average.module
        method.teacher.load_state_dict(teacher.state_dict())
        for net in (method.base.net, method.base.average.module):
            net.load_state_dict(base.average.module.state_dict())
        if isinstance(previous, cls) and previous.config.rank == config.rank:
            method.fake.load_state_dict(previous.fake.state_dict())
        else:
            method._fake_as_teacher()
        method.trained = True
        return method.to(base.device)

    def _fake_as_teacher(self) -> None:
        """The weights, not the low-rank changes, which begin at nothing."""
        weights = {_original(name): value for name, value in self.fake.state_dict(keep_vars=True).items()}
        with torch.no_grad():
            for name, value in self.teacher.state_dict().items():
                weights[name].copy_(value)

    def augment(self) -> Callable[..., Any] | None:
        """As the teacher crops its pictures: they are only looked at beside the student's."""
        return self.base.augment()

    # ---- training

    def draw(self, net: nn.Module, n: int, generator: torch.Generator | None = None) -> SharedEncoderSample:
        """`n` pictures in [-1, 1], not clamped, and their noise maps; with gradients."""
        return self._decoded(net, self._start(n, generator))

    @torch.no_grad()
    def pictures(self, net: nn.Module, z: Tensor) -> Tensor:
        """What a network makes of noise `[B, C, H, W]`: pictures in [-1, 1], not clamped."""
        return self._decoded(net, z).x0

    def _start(self, n: int, generator: torch.Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        return torch.randn((n, *self.base.shape), generator=generator, device=device).to(self.device)

    def _decoded(self, net: nn.Module, z: Tensor) -> SharedEncoderSample:
        times, kind = self.decoder_times, self.base.config.predict
        return shared_encoder_sample(net, z, None, self.base.schedule, times=times, predict=kind)

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """The student, then the fake score on the same pictures; then the average follows."""
        self._drawn = []
        self._told = (yield Step("student", (self.loss,))).logs
        yield Step("fake", (self.fake_loss,))
        self.base.average.update(self.base.net)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """Score distillation and the KL of as many new pictures as the batch holds; those of the batch are not looked at."""
        c, schedule, n, generator = self.config, self.base.schedule, len(batch), ctx.generator
        x0, eps = self.draw(self.base.net, n, generator)
        t = range_t(n, *self.vsd_times, generator=generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        vsd = vsd_loss(x0, self.teacher, self.fake, schedule, t, noise, predict=self.base.config.predict)
        kl = noise_kl(eps.flatten(0, 1)) / n
        self._drawn.append(x0.detach())
        return Loss(vsd + c.kl_weight * kl if c.kl_weight else vsd, n, {"vsd": vsd.detach(), "kl": kl.detach()})

    def fake_loss(self, batch: Batch, ctx: Context) -> Loss:
        """The fake score's error on what the student has just drawn for this batch; logged with what the student's loss was."""
        x0, schedule = self._drawn.pop(0), self.base.schedule
        t = uniform_t(len(x0), len(schedule), generator=ctx.generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=ctx.generator, device=x0.device, dtype=x0.dtype)
        predict, weighted = self.base.config.predict, self.config.fake_weighted
        value = fake_score_loss(x0, self.fake, schedule, t, noise, weighted=weighted, predict=predict)
        return Loss(value, len(x0), dict(self._told))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each, as in the paper."""
        changed = [p for p in self.fake.parameters() if p.requires_grad]
        c = self.config
        return {"student": torch.optim.Adam(self.base.net.parameters(), c.lr), "fake": torch.optim.Adam(changed, c.fake_lr)}

    # ---- use

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a picture."""
        return self.base.shape

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` new pictures: `[n, C, H, W]` in [0, 1]."""
        return _shown(self.pictures(self.base.average.module, self._start(n, generator)))

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """What teacher, by its own 50 steps, and student make of the same noise."""
        base, z = self.base, self._start(len(batch), generator)
        steps, kind = min(50, len(base.schedule)), base.config.predict
        slow = sample_ddim(_plain(self.teacher), z, base.schedule, steps=steps, predict=kind, clip=True)
        return {"teacher": _shown(slow), "student": _shown(self.pictures(base.average.module, z))}


def _original(name: str) -> str:
    """A weight's name without what torch adds to it where it has a low-rank change."""
    return name.replace("parametrizations.", "").replace(".original", "")


def _shown(x: Tensor) -> Tensor:
    return (x + 1).div(2).clamp(0, 1)


def _plain(net: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: net(x, t).sample


# What the idea rests on


class Similarity(NamedTuple):
    """Mean cosine between the features of two steps that follow each other, `[S - 1]`."""

    encoder: Tensor
    decoder: Tensor


@torch.no_grad()
def encoder_decoder_similarity(unet: Any, sampler: Callable[..., Tensor], x: Tensor) -> Similarity:
    """How little a U-Net's features change from one sampling step to the next.

    Args:
        unet: diffusers' UNet2DModel or UNet2DConditionModel.
        sampler: `sampler(model, x)`, such as `sample_ddim` with its settings filled in.
        x: where it begins, `[B, C, H, W]`.

    Returns:
        The cosines, over samples and over blocks: those of the way down and the middle, and those of the way up.
    """
    encoder = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    before: dict[nn.Module, Tensor] = {}
    cosines: dict[nn.Module, list[Tensor]] = {block: [] for block in (*encoder, *unet.up_blocks)}

    def look(block: nn.Module, _: Any, out: Any) -> None:
        features = (out[0] if isinstance(out, tuple) else out).flatten(1)
        if block in before:
            cosines[block].append(F.cosine_similarity(features, before[block]).mean())
        before[block] = features

    hooks = [block.register_forward_hook(look) for block in cosines]
    try:
        with eval_mode(unet):
            sampler(_plain(unet), x)
    finally:
        for hook in hooks:
            hook.remove()
    down, up = (torch.stack([torch.stack(cosines[b]) for b in part]).mean(0) for part in (encoder, unet.up_blocks))
    return Similarity(down, up)


# The claims

WIDTH, TEACHER_STEPS, STUDENT_STEPS, STUDENT_BATCH = 16, 500, 800, 16
DRAWN, REPEATS = 500, 25


def _teacher(lab: Lab, steps: int, **settings: Any) -> tuple[DDPM, Batch, Batch]:
    """A diffusion model of digits, trained, with its data and the pictures that were held out."""
    train, test = digits(seed=lab.seed)
    config = DDPM.Config.small(channels=1, image_size=8, width=WIDTH, steps=lab.steps(steps), **settings)
    return lab.fit(DDPM(config), train, steps=lab.steps(steps)), train, test


@claim(
    "From step to step the encoder of a diffusion U-Net changes less than its decoder; and one pass of it for four decoders at "
    "once takes at most twice the time of one step for a picture, where four whole steps take 2.5 times as long or more",
    Better("similarity", "encoder", over="decoder"),
    Holds("one pass and four decoders at most twice the time of one step", lambda f: f["shared encoder"]["times one step"] <= 2),
    Holds("four whole steps at least 2.5 times that of one", lambda f: f["four steps"]["times one step"] >= 2.5),
    seeds=range(100, 105),
    note="A model of 8 x 8 digits; cosine between the features of neighbouring steps of DDIM in 10, over 256 samples and all "
    "blocks. Time: of one picture, processor time of one thread, the median of 25 runs in turn. A network this small spends it "
    "on its calls, which one batch pays once, as one picture does not fill a large accelerator; with many pictures the four "
    "decoders cost what they compute. In this network the decoder changes less, not the encoder: cosines of "
    "0.97-0.98 against 0.96-0.97. The times came out as claimed, 1.5 and 3.2 times one step.",
)
def shared_encoder(lab: Lab) -> Figures:
    """Similarities of a trained teacher, and what a picture takes."""
    ddpm, _, _ = _teacher(lab, TEACHER_STEPS)
    net, schedule = ddpm.average.module, ddpm.schedule
    x = torch.randn(256, *ddpm.shape, generator=lab.generator)
    found = encoder_decoder_similarity(net, partial(sample_ddim, schedule=schedule, steps=10), x)
    figures: Figures = {}
    for arm, values in found._asdict().items():
        figures[arm] = {"similarity": float(values.mean()), "lowest": float(values.min())}
        lab.curve(arm, list(range(2, 11)), values.tolist(), xlabel="step", ylabel="cosine with the step before")
    one = x[:1]
    with torch.no_grad():
        seconds = _in_turn(
            {
                "one step": lambda: shared_encoder_sample(net, one, None, schedule, times=TIMES[:1]).x0,
                "shared encoder": lambda: shared_encoder_sample(net, one, None, schedule, times=TIMES).x0,
                "four steps": lambda: sample_ddim(_plain(net), one, schedule, steps=4),
            },
            lab.steps(REPEATS),
        )
    for arm, taken in seconds.items():
        figures[arm] = {"ms": 1000 * taken, "times one step": taken / seconds["one step"]}
    return figures


def _in_turn(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median processor seconds of each, one run of all after the other; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


@claim(
    "Without a picture to learn from, a student with one pass of the encoder and four decoders comes to draw better pictures "
    "than it began with, and than a one-step student that trained as long; the KL of its noise maps makes them more diverse",
    Better("Fréchet distance", "shared encoder", over="shared encoder, untrained", higher=False),
    Better("Fréchet distance", "shared encoder", over="one step", higher=False),
    Better("recall", "shared encoder", over="without KL"),
    seeds=range(100, 105),
    note="8 x 8 digits, noised by Stable Diffusion's schedule, on which the paper's times are what they are there; a teacher of "
    "700 steps of 32 pictures, students of 800 steps of 16. All begin as the teacher; the one-step student's time is the "
    "first of the four. The rates, and a fake score whose errors count alike at all times, were chosen on a development "
    "seed by what both kinds of student gained. The KL's weight is the paper's by its force on true noise: the mean and "
    "variance of a map of 64 numbers stray 16 times as far from 0 and 1 as those of one of 16384. Fréchet distance and "
    "recall (third neighbour) in the features of a small classifier, 500 samples against the training pictures. Beside "
    "them: the teacher's own 4 and 20 steps, and the students before training. All have learned: the one-step student came "
    "from distances of 55 to 68 to 9 to 12, four decoders from 24 to 37 to 9 to 12, without the KL to 8 to 11, where the "
    "teacher's own 4 steps are at 11 to 14 and its 20 at 5 to 6. The KL costs recall on every "
    "seed: the moments that it holds each map to are those of large maps, and even true noise of 64 numbers strays from them.",
)
def distillation(lab: Lab) -> Figures:
    """Each student's pictures, and the teacher's, seen through a classifier."""
    ddpm, train, test = _teacher(lab, 700, mults=(1, 1), batch_size=32, schedule="scaled_linear")
    assert train.label is not None
    torch.manual_seed(lab.seed)
    features = train_judge(2 * train.x - 1, train.label, steps=lab.steps(200))[:-1]
    real = features(2 * train.x - 1)
    z = torch.randn(DRAWN, *ddpm.shape, generator=lab.generator)

    def judged(x: Tensor) -> dict[str, float]:
        seen = features(x.clamp(-1, 1))
        shares = precision_recall(seen, real)
        figures = {"Fréchet distance": float(frechet_features(seen, real))}
        return figures | {"recall": float(shares.recall), "precision": float(shares.precision)}

    figures: Figures = {"held-out pictures": judged(2 * test.x - 1)}
    for steps in (4, 20):
        drawn = sample_ddim(_plain(ddpm.average.module), z, ddpm.schedule, steps=steps, clip=True)
        figures[f"teacher, {steps} steps"] = judged(drawn)
        lab.picture(f"teacher, {steps} steps", _shown(drawn[:32]))
    arms: dict[str, dict[str, Any]] = {
        "one step": {"decoder_times": TIMES[:1], "kl_weight": 0.0},
        "shared encoder": {},
        "without KL": {"kl_weight": 0.0},
    }
    for arm, settings in arms.items():
        student = TiUE.init_from(TiUE.Config.small(batch_size=STUDENT_BATCH, **settings), ddpm)
        if arm != "without KL":  # it begins as with it
            figures[f"{arm}, untrained"] = judged(student.pictures(student.teacher, z))
        student = lab.fit(student, train, steps=lab.steps(STUDENT_STEPS))
        drawn = student.pictures(student.base.average.module, z)
        figures[arm] = judged(drawn)
        lab.picture(arm, _shown(drawn[:32]))
    return figures
