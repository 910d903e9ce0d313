"""Directions in the bottleneck of a trained diffusion model, and pictures moved along them.

    h_t ← h_t + s Δh_t at every sampling step t,    Δh: a principal component, a singular vector, a difference of means

The model stays as it was trained. Each step of `train` draws pictures, looks at their bottlenecks at all sampling steps and
betters the principal components; labelled pictures are taken back to their noise, and give the mean bottleneck of every class.
Singular vectors belong to one picture, so they are found where it is edited.

Source: René Haas, Inbar Huberman-Spiegelglas, Rotem Mulayoff, Stella Graßhof, Sami Brandt, Tomer Michaeli, "Discovering
Interpretable Directions in the Semantic Latent Space of Diffusion Models", FG 2024 (arXiv 2303.11073).

>>> import torch
>>> from sfumato.papers.diffusion.ddpm import DDPM
>>> from sfumato.papers.diffusion.h_space_directions import HSpaceDirections
>>> ddpm = DDPM(DDPM.Config.small(channels=1, image_size=8, width=8))
>>> method = HSpaceDirections.init_from(HSpaceDirections.Config.small(sample_steps=3, components=4), ddpm)
>>> method.look(torch.Generator().manual_seed(0))
>>> method.edit("0", [-3.0, 0.0, 3.0], n=2).shape
torch.Size([2, 3, 1, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Lab, claim
from sfumato.data.batch import Batch
from sfumato.data.samples import digits
from sfumato.diffusion import ddim_invert, ddpm_invert, edit_h, h_function, input_at, record_h, sample_ddim
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.method import Context, Loss, Method, MethodConfig, Result, Step
from sfumato.papers.diffusion.ddpm import DDPM, FromDDPM
from sfumato.probes import StreamingPCA, align_signs, attribute_direction, jacobian_directions, pca_directions, project_out
from sfumato.probes.judge import train_judge

Start = tuple[Tensor, Tensor | None]
"""x_T `[B, C, H, W]` and, with noise while sampling, that of every step `[S, B, C, H, W]`."""


class HSpaceDirections(FromDDPM):
    """Haas et al. 2024. Finds directions in a trained diffusion model (`--init RUN`), edits pictures along them."""

    no_model: ClassVar[str] = (
        "directions are found in a trained model: sfumato train h-space-directions --data WHERE --init runs/ddpm/STAMP"
    )

    class Config(MethodConfig):
        """Defaults: the authors' for PCA on CelebA-HQ: 500 samples, 50 steps of DDIM with eta = 1."""

        steps: int = Field(50, gt=0, description="batches of drawn pictures")
        batch_size: int = Field(10, gt=0, description="pictures a batch, drawn and (where the data has labels) given")
        classes: int | None = Field(None, gt=0, description="classes that directions lead to; None: as many as the data has")
        sample_steps: int = Field(50, gt=0, description="network calls for a picture (S)")
        eta: float = Field(1.0, ge=0, le=1, description="noise while sampling; 0: DDIM, 1: as DDPM")
        components: int = Field(25, gt=0, description="principal components kept as directions")
        keep: int = Field(100, gt=0, description="components kept between batches, to stay accurate")
        per_step: bool = Field(False, description="principal components of each step alone instead of all steps together")
        asymmetric: bool = Field(False, description="edit only the guess of the clean picture, not the way back to x_t (Asyrp)")
        jacobian_step: int | None = Field(
            None, ge=0, description="sampling step whose Jacobian is taken, 0: the first; None: the middle one"
        )
        jacobian_iterations: int = Field(50, gt=0, description="block Krylov steps for the singular vectors, at most")
        ddpm: dict[str, Any] | None = Field(None, description="how the diffusion model is built; fills itself in")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """512 pictures of 10 steps: a minute on two cores for a small model."""
            small = {"steps": 8, "batch_size": 64, "sample_steps": 10}
            return cls(**{**small, **over})

    vectors: nn.Parameter
    stds: Tensor
    class_sums: Tensor
    class_counts: Tensor

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        base = DDPM(DDPM.Config.model_validate(c.ddpm))
        self.base = base.requires_grad_(False)
        steps = min(c.sample_steps, len(base.schedule))
        self.sampler = partial(sample_ddim, schedule=base.schedule, steps=steps, eta=c.eta, predict=base.config.predict)
        self.h_shape = (steps, *base.bottleneck)
        self.pca = StreamingPCA(self.h_shape, keep=max(c.keep, c.components), apart=c.per_step)
        self.vectors = nn.Parameter(torch.zeros(c.components, *self.h_shape))
        self.register_buffer("stds", torch.zeros(c.components, steps if c.per_step else 1))
        self.register_buffer("class_sums", torch.zeros(c.classes or 0, *self.h_shape))
        self.register_buffer("class_counts", torch.zeros(c.classes or 0))
        if (c.jacobian_step or 0) >= steps:
            raise BadSetting(f"jacobian_step={c.jacobian_step} must be below the {steps} sampling steps")

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Look into a DDPM run, or anew into the model of another run of this kind."""
        base = previous.base if isinstance(previous, cls) else previous
        if not isinstance(base, DDPM):
            raise BadCheckpoint(f"directions are found in a ddpm run, not in one of {type(previous).__name__}")
        method = cls(type(config).model_validate({**config.model_dump(), "ddpm": base.base_settings()}))
        for mine, theirs in ((method.base.net, base.net), (method.base.average, base.average)):
            mine.load_state_dict(theirs.state_dict())
        method.trained = True
        return method.to(base.device)

    @property
    def net(self) -> nn.Module:
        """The U-Net that pictures are drawn with: the averaged one."""
        return self.base.average.module

    def augment(self) -> Callable[..., Any] | None:
        """As the diffusion model crops its pictures."""
        return self.base.augment()

    # ---- finding

    @torch.no_grad()
    def look(self, generator: torch.Generator) -> None:
        """Draw a batch and better the principal components by its bottlenecks."""
        _, hs = record_h(self.net, self.sampler, self.start(self.config.batch_size, generator))
        self._learn(hs)

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """Draw, tell how much of it the directions explain, then learn from it; every process draws the same pictures."""
        far = 2**30  # from the small seeds of edits: they are to move other pictures than those that were looked at
        generator = torch.Generator(self.device).manual_seed((ctx.seed * 1_000_003 + ctx.step + far) % 2**31)
        _, self._fresh = record_h(self.net, self.sampler, self.start(self.config.batch_size, generator))
        self._sums, self._counts = torch.zeros_like(self.class_sums), torch.zeros_like(self.class_counts)
        yield Step("net", (self.loss,))
        self._learn(self._fresh)
        self.class_sums += ctx.sum(self._sums)
        self.class_counts += ctx.sum(self._counts)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The share of the variance of fresh pictures that the directions do not explain; 1 before there are any.

        Raises:
            BadData: labels of more classes than were set.
        """
        if len(self.class_counts) and batch.label is not None:
            if int(batch.label.max()) >= len(self.class_counts):
                raise BadData(f"class {int(batch.label.max())} is not below classes={len(self.class_counts)}: leave classes out")
            _, hs = record_h(self.net, self.sampler, self.invert(batch.x, ctx.generator))
            self._sums.index_add_(0, batch.label, hs.to(self._sums))
            self._counts.index_add_(0, batch.label, torch.ones_like(batch.label, dtype=self._counts.dtype))
        groups = len(self.pca.mean)
        centred = self._fresh.reshape(len(self._fresh), groups, -1) - self.pca.mean
        found = self.vectors.view(len(self.vectors), groups, -1)
        explained = torch.einsum("bgd,kgd->bgk", centred, found).square().sum()
        return Loss(1 - explained / centred.square().sum(), len(batch))

    @torch.no_grad()
    def _learn(self, hs: Tensor) -> None:
        self.pca.update(hs)
        known = min(self.config.components, int(self.pca.count) - 1)
        if known:
            vectors, variances = self.pca.components(known)
            self.vectors[:known] = align_signs(vectors) if self.config.per_step else vectors
            self.stds[:known] = variances.sqrt().view(known, -1)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """None moves the directions: they are found in closed form, the loss only watches."""
        return {"net": torch.optim.SGD([self.vectors], lr=0.0)}

    # ---- editing

    def start(self, n: int, generator: torch.Generator | None = None) -> Start:
        """The noise that `n` new pictures are drawn from; `z` is drawn after x_T, so that they never share a seed."""
        device = self.device if generator is None else generator.device
        shape = (n, *self.base.shape)
        x = torch.randn(shape, generator=generator, device=device).to(self.device)
        if not self.config.eta:
            return x, None
        return x, torch.randn((self.h_shape[0], *shape), generator=generator, device=device).to(self.device)

    def invert(self, images: Tensor, generator: torch.Generator | None = None) -> Start:
        """The noise that pictures `[B, C, H, W]` in [0, 1] are drawn from.

        Raises:
            BadData: pictures of another size.
        """
        if images.shape[1:] != self.base.shape:
            raise BadData(f"pictures are {tuple(images.shape[1:])}, the model draws {self.base.shape}: resize them")
        x0, eta, how = 2 * images - 1, self.config.eta, {"steps": self.h_shape[0], "predict": self.base.config.predict}
        if not eta:
            return ddim_invert(self._model, x0, self.base.schedule, corrections=CORRECTIONS, **how), None
        return ddpm_invert(self._model, x0, self.base.schedule, eta=eta, generator=generator, **how)

    def _model(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(x, t).sample
        return out

    def direction(self, kind: str, name: str, start: Start, *, mask: Tensor | None = None, without: Sequence[str] = ()) -> Tensor:
        """A direction by its name, one unit long.

        Args:
            kind: "pca": one standard deviation along a component; "jacobian": a singular vector times its singular value, of each
                picture its own; "attribute": from one class to another.
            name: the number of a component or singular vector, from 0; for "attribute" the number of a class (away from all
                others) or `A:B` (towards A, away from B).
            start: the pictures that are to be edited.
            mask: for "jacobian", broadcastable to a picture: where it is to change.
            without: attributes, named as for that kind, that are to stay as they are: the direction is made orthogonal to all of
                them, over all steps together.

        Returns:
            `[S, C', h, w]`, or for "jacobian" `[B, S, C', h, w]`.

        Raises:
            BadSetting: an unknown kind, a direction that was not found, or one that lies within those it is to leave alone.
        """
        delta = self._found(kind, name, start, mask)
        if not without:
            return delta
        others = torch.stack([self._between_classes(other) for other in without])
        kept = torch.stack([project_out(each, others) for each in delta]) if delta.ndim == 5 else project_out(delta, others)
        if kept.norm() <= 1e-4 * delta.norm():  # what a projection leaves of it is rounding
            raise BadSetting(f"nothing is left of direction {name!r} without {', '.join(without)}: name fewer attributes")
        return kept

    def _found(self, kind: str, name: str, start: Start, mask: Tensor | None) -> Tensor:
        if kind not in KINDS:
            raise BadSetting(f"there is no kind {kind!r} of direction: use {', '.join(KINDS)}")
        if mask is not None and kind != "jacobian":
            raise BadSetting(f"a mask is for kind jacobian only, not for {kind}: it says which pixels the Jacobian counts")
        if kind == "attribute":
            return self._between_classes(name)
        found = self.known if kind == "pca" else min(math.prod(self.h_shape[1:]), math.prod(self.base.shape))
        if not found:
            raise BadSetting("this run has found no directions yet: it was stopped before its first step")
        if not name.isdecimal() or int(name) >= found:
            raise BadSetting(f"there is no direction {name!r} of kind {kind}: there are 0 to {found - 1}")
        if kind == "jacobian":
            return self._jacobian(int(name), start, mask)
        return self.vectors[int(name)].detach() * self.stds[int(name)].view(-1, 1, 1, 1)

    def _between_classes(self, name: str) -> Tensor:
        known = self.class_counts.nonzero().flatten().tolist()
        if len(known) < 2:
            raise BadSetting("attributes need labelled pictures: sfumato train h-space-directions --data LABELLED --init RUN")
        ends = name.split(":")
        if len(ends) > 2 or not all(end.isdecimal() and int(end) in known for end in ends) or len(set(ends)) < len(ends):
            raise BadSetting(f"there is no attribute {name!r}: give A or A:B with numbers of classes among {known}")
        means = {k: self.class_sums[k] / self.class_counts[k] for k in known}
        towards = int(ends[0])
        away = [int(ends[1])] if len(ends) == 2 else [k for k in known if k != towards]
        return attribute_direction(means[towards][None], torch.stack([means[k] for k in away]))

    def _jacobian(self, index: int, start: Start, mask: Tensor | None) -> Tensor:
        """σ u of each picture at one step, the same for all steps; signs agree with those of the first picture."""
        at = self.config.jacobian_step
        at = self.h_shape[0] // 2 if at is None else at
        found = []
        for x, t in zip(*(part.split(1) for part in input_at(self.net, self.sampler, start, at)), strict=True):
            f, h = h_function(self.net, x, t)  # one Jacobian a picture
            triplets = jacobian_directions(
                f, h, index + 1, mask=mask, iters=self.config.jacobian_iterations, generator=torch.Generator().manual_seed(0)
            )  # fmt: skip
            found.append(triplets.values[index] * triplets.right[index, 0])
        each = align_signs(torch.stack(found)[None])[0]
        return each[:, None].expand(-1, self.h_shape[0], -1, -1, -1)

    @torch.no_grad()
    def edit(
        self,
        direction: str,
        strengths: Sequence[float],
        *,
        kind: str = "pca",
        images: Tensor | None = None,
        n: int = 1,
        mask: Tensor | None = None,
        without: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Move pictures along a direction.

        Args:
            direction, kind, mask, without: see `direction`.
            strengths: how far, in units of the direction, one a column; 0: not at all.
            images: pictures to edit, `[B, C, H, W]` in [0, 1]; None: `n` new ones.
            n: how many new ones.
            generator: of their noise, or of the noise that `images` are taken back to.

        Returns:
            `[B, len(strengths), C, H, W]` in [0, 1].
        """
        start = self.start(n, generator) if images is None else self.invert(images.to(self.device), generator)
        delta = self.direction(kind, direction, start, mask=mask, without=without)
        columns = [
            edit_h(self.net, self.sampler, start, delta, scale=float(s), asymmetric=self.config.asymmetric, batch_size=BATCH)
            for s in strengths
        ]
        return torch.stack(columns, 1).add(1).div(2).clamp(0, 1)

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One picture along the first components, from -3 to 3 standard deviations."""
        state, strengths, first = generator.get_state(), (-3.0, -1.5, 0.0, 1.5, 3.0), range(min(3, self.known))
        return {f"component {k}": self.edit(str(k), strengths, generator=generator.set_state(state))[0] for k in first}

    @property
    def known(self) -> int:
        """Principal components found so far."""
        return int((self.stds.sum(1) > 0).sum())

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pictures it draws and edits."""
        return self.base.shape


KINDS = ("pca", "jacobian", "attribute")
CORRECTIONS = 3
"""Fixed-point iterations a step when a picture is taken back without noise."""

BATCH = 64
"""Pictures drawn at once while editing."""

# The claim
PAIRS = ((4, 3), (8, 6), (1, 0))
"""Digits that a direction leads to, and away from."""
SHIFTS = [f"shift, {a} from {b}" for a, b in PAIRS]

DRAWN, EXTREME, HELD_OUT, RANDOM = 512, 40, 100, 4
"""Samples that directions are found in, those with the highest and lowest score, starts to edit, random directions."""

RATIO = 5.0
"""How many times as far as random directions an attribute's direction must lead."""


class _Bench:
    """A model of digits, bottlenecks of new samples, other samples to edit."""

    def __init__(self, lab: Lab) -> None:
        self.train, _ = digits(seed=lab.seed)
        settings = DDPM.Config.small(channels=1, image_size=8, width=16, steps=lab.steps(800))
        ddpm = lab.fit(DDPM(settings), self.train, steps=lab.steps(800))
        self.net, self.generator = ddpm.average.module, lab.generator
        self.sampler = partial(sample_ddim, schedule=ddpm.schedule, steps=10)
        self.noise_of_samples = self.noise(DRAWN)
        self.samples, self.hs = record_h(self.net, self.sampler, self.noise_of_samples)
        self.starts = self.noise(HELD_OUT)
        self.plain, _ = record_h(self.net, self.sampler, self.starts)

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, 1, 8, 8, generator=self.generator)

    def edited(self, delta: Tensor, scale: float = 1.0, *, asymmetric: bool = False) -> Tensor:
        return edit_h(self.net, self.sampler, self.starts, delta, scale=scale, asymmetric=asymmetric)

    def random(self, like: Tensor) -> list[Tensor]:
        """Random directions of the same length."""
        draws = torch.randn(RANDOM, *like.shape, generator=self.generator)
        return [like.norm() * draw / draw.norm() for draw in draws]


@claim(
    "In the bottleneck of a diffusion model a difference of means moves samples towards a class, and principal components change "
    "them more, and more alike; random directions of the same length do neither",
    Better("pairs won", "difference of means", over="no edit", by=2),
    Better("logit shift", "difference of means", over="random directions", by=1.0),
    Better("logit shift", "negated difference", over="no edit", higher=False),
    Better("pixel change", "principal components", over="random directions", by=0.5),
    Better("consistency", "principal components", over="random directions"),
    seeds=range(100, 105),
    note="A model of 8 x 8 digits, DDIM in 10 steps. Means: of the 40 samples with the highest and the lowest difference of two "
    "logits of a small classifier, for three pairs of digits. A pair is won when the difference of the logits rises, by five "
    "times what a random direction changes it in size at least, and falls with the negated direction. Components: moves of two "
    "standard deviations along the first three; pixel change: Euclidean, pictures in [-1, 1]; consistency: mean cosine between "
    "the changes of two samples. Beside them: the asymmetric edit; the difference of means of the noise that the same samples "
    "were drawn from, added to the noise, which with digits so small leads further than the bottleneck; and the first singular "
    "vectors of the Jacobians of three other samples, as long as the components.",
)
def directions(lab: Lab) -> Figures:
    """What a classifier sees of an edit, then size and common direction of what it changes."""
    bench = _Bench(lab)
    figures = _attributes(bench, lab)
    for arm, values in _components(bench, lab).items():
        figures.setdefault(arm, {}).update(values)
    return figures


def _attributes(bench: _Bench, lab: Lab) -> Figures:
    assert bench.train.label is not None
    judge = train_judge(2 * bench.train.x - 1, bench.train.label, steps=lab.steps(200))
    scores, before = judge(bench.samples), judge(bench.plain)
    shifts: dict[str, list[float]] = {}
    chances = []
    for a, b in PAIRS:
        order = (scores[:, a] - scores[:, b]).argsort(descending=True)
        high, low = order[:EXTREME], order[-EXTREME:]
        delta = attribute_direction(bench.hs[high], bench.hs[low])
        from_noise = bench.starts + attribute_direction(bench.noise_of_samples[high], bench.noise_of_samples[low])
        edits = {
            "difference of means": [bench.edited(delta)],
            "negated difference": [bench.edited(delta, -1.0)],
            "random directions": [bench.edited(move) for move in bench.random(delta)],
            "asymmetric": [bench.edited(delta, asymmetric=True)],
            "difference in the noise": [record_h(bench.net, bench.sampler, from_noise)[0]],
        }
        for arm, pictures in edits.items():
            rise = judge(torch.cat(pictures)) - before.repeat(len(pictures), 1)
            each = (rise[:, a] - rise[:, b]).view(len(pictures), -1).mean(1)
            shifts.setdefault(arm, []).append(float(each.mean()))
            if arm == "random directions":
                chances.append(float(each.abs().mean()))  # with signs they would cancel
        shown = [bench.edited(delta, s)[:4] for s in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)]
        lab.picture(f"{a} from {b}", torch.stack(shown, 1).flatten(0, 1).add(1).div(2))
    figures = {arm: {"logit shift": sum(v) / len(v), **dict(zip(SHIFTS, v, strict=True))} for arm, v in shifts.items()}
    trio = zip(shifts["difference of means"], shifts["negated difference"], chances, strict=True)
    won = [there > 0 > back and there >= RATIO * chance for there, back, chance in trio]
    figures["random directions"]["size of a shift"] = sum(chances) / len(chances)
    figures["difference of means"]["pairs won"] = float(sum(won))
    figures["no edit"] = {"logit shift": 0.0, "pairs won": 0.0}
    return figures


def _components(bench: _Bench, lab: Lab) -> Figures:
    moves = list(2 * pca_directions(bench.hs, 3).scaled())
    singular, middle = [], len(moves[0]) // 2
    for x, move in zip(bench.noise(3).split(1), moves, strict=True):
        f, h = h_function(bench.net, *input_at(bench.net, bench.sampler, x, middle))
        u = jacobian_directions(f, h, 1, generator=bench.generator).right[0, 0]
        singular.append(move.norm() * u / len(move) ** 0.5)
    arms = {
        "principal components": moves,
        "random directions": [r for move in moves for r in bench.random(move)],
        "singular vectors": singular,
    }
    figures = {}
    for arm, deltas in arms.items():
        changes = torch.stack([bench.edited(delta) - bench.plain for delta in deltas]).flatten(2)
        unit, n = F.normalize(changes, dim=-1), changes.shape[1]
        cosine = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (n * (n - 1))
        figures[arm] = {"pixel change": float(changes.norm(dim=-1).mean()), "consistency": float(cosine.mean())}
    columns = [bench.edited(moves[0], s)[:4] for s in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)]
    lab.picture("first component", torch.stack(columns, 1).flatten(0, 1).add(1).div(2))
    return figures
