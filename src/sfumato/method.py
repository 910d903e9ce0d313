"""What a paper must provide to be trained, resumed, scaled out and used: the `Method` contract.

A method is an `nn.Module` with a frozen, documented `Config`, a `loss` that the engine may call again with the same noise,
and `optimizers`. The smallest one:

>>> import torch
>>> from sfumato.method import Loss, Method, MethodConfig
>>> class Mean(Method):
...     class Config(MethodConfig):
...         lr: float = 0.1
...     def __init__(self, config):
...         super().__init__(config)
...         self.mean = torch.nn.Parameter(torch.zeros(3, 1, 1))
...     def loss(self, batch, ctx):
...         return Loss((batch.x - self.mean).square().mean(), len(batch))
...     def optimizers(self):
...         return {"net": torch.optim.SGD(self.parameters(), self.config.lr)}
>>> Mean(Mean.Config(lr=0.5)).config.lr
0.5

Rules that make resume, accumulation and several processes exact, for every kind of method:

- `loss` draws only from `ctx.generator` and from torch's global generator; both are set from (seed, step, phase, micro-batch).
- `Loss.value` is the mean over `Loss.weight` items; the engine averages over micro-batches and processes with these weights.
  This is exact for losses that separate over samples (not for batch statistics).
- State that matters lives in `state_dict()`: tensors, numbers, strings, lists, dicts (`get_extra_state` for the latter).
- Schedules read `ctx.progress`. Once-a-step work (EMA, pruning, pacing) stands after the `yield` in `steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from sfumato.data.batch import Batch, Facts
from sfumato.errors import BadCheckpoint

__all__ = [
    "Batch", "Context", "Denoiser", "Editor", "Encoder", "Facts", "Loss", "LossFunction", "Method", "MethodConfig",
    "ObjectPredictor", "Predictor", "Restorer", "Result", "Sampler", "Searcher", "Step", "TimmExportable", "TrajectorySampler",
    "capabilities", "draws_points",
]  # fmt: skip


class Loss(NamedTuple):
    """A scalar with graph: the mean over `weight` items (samples, hidden tokens, ...), and detached scalars to log."""

    value: Tensor
    weight: float | Tensor = 1.0
    logs: dict[str, Tensor] = {}


LossFunction = Callable[[Batch, "Context"], Loss]


class Step(NamedTuple):
    """One optimizer step: which optimizer, and the loss functions its `step(*closures)` takes (nearly always one)."""

    optimizer: str
    losses: tuple[LossFunction, ...]


class Result(NamedTuple):
    """What a `yield Step(...)` returns: the loss and logs, averaged over micro-batches and processes."""

    loss: Tensor
    logs: dict[str, Tensor]


@dataclass
class Context:
    """Where training stands, and the only sources of randomness and of sums over processes.

    Args:
        step: optimizer steps done; `progress = step / total` in [0, 1) drives every schedule.
        generator: on the training device, re-seeded before every call of a loss.
        optimizers: by the names that `Method.optimizers` gave.
        sum: sums a tensor over processes.
    """

    step: int
    total: int
    seed: int
    generator: torch.Generator
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    sum: Callable[[Tensor], Tensor] = lambda t: t

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1)."""
        return self.step / max(1, self.total)

    def scale_lr(self, factor: float, optimizer: str | None = None) -> None:
        """Set every learning rate to `factor` times the one that it was built with (of one optimizer, or of all)."""
        for name, opt in self.optimizers.items():
            if optimizer in (None, name):
                for group in opt.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


class MethodConfig(BaseModel):
    """Settings of a method: frozen, strict about names, one described field each; defaults are the paper's.

    A field named like a fact of the data (`channels`, `classes`) and left at None takes it from the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    steps: int = Field(1000, gt=0, description="optimizer steps")
    batch_size: int = Field(64, gt=0, description="samples a step, over all micro-batches and processes")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; None: no clipping")

    @classmethod
    def small(cls, **over: Any) -> Self:
        """The preset for a CPU: minutes instead of days. Methods override it; the paper's defaults stay untouched."""
        return cls(**over)

    def fitted(self, facts: Facts) -> Self:
        """The same settings with the fields that were left to the data filled in."""
        known = {"channels": facts.channels, "classes": len(facts.classes) if facts.classes else None}
        fields = type(self).model_fields
        found = {k: v for k, v in known.items() if k in fields and v is not None and getattr(self, k) is None}
        return type(self).model_validate({**self.model_dump(), **found})


class Method(nn.Module):
    """A published method, put together from parts. Subclasses set `Config`, `needs`, and the three functions below."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    needs: ClassVar[tuple[str, ...]] = ("x",)
    """The `Batch` fields that the losses read (`"x"`, `"label"`, `"target"`)."""
    needs_physics: ClassVar[bool] = False
    """Whether `restore` must be told what degraded the pictures, as nothing was learned of it."""
    takes_physics: ClassVar[bool] = False
    """Whether it may be told: with physics it restores in another way than without."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config: Any = self.Config() if config is None else config

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """The training loss of a micro-batch; may be called again with the same noise."""
        raise NotImplementedError(f"{type(self).__name__} must define loss() or override steps()")

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """The optimizer steps of one training step; code after a `yield` runs once, after that step."""
        yield Step("net", (self.loss,))

    def optimizers(self) -> dict[str, Optimizer]:
        """Fresh optimizers by name; called after weights are loaded."""
        raise NotImplementedError(f"{type(self).__name__} must define optimizers()")

    def survey(self, batches: Iterable[Batch]) -> None:
        """Look at the training data once before the first step: statistics, a basis, kept as buffers.

        Not called when a run is resumed. `batches` is read lazily and goes through the data once, unaugmented and in a random
        order of the run's seed: the first few are a fair sample, also of folders sorted by class.
        """

    def adopt(self, open_model: Callable[[str], nn.Module]) -> None:
        """Take in trained models that the settings name by a word, such as teachers, and keep them as submodules.

        Called once, when the engine has built a new method; never for a stored run: its settings must tell how the models are
        built, its checkpoint holds their weights.

        Args:
            open_model: the module that a word names: `timm:NAME`, `timm:NAME@FILE`, a run folder or a checkpoint.
        """

    def augment(self) -> Callable[..., Any] | None:
        """A torchvision v2 transform of one sample (uint8 or float image `[C, H, W]`, and its target), or None.

        It runs in the loading workers; its randomness is set from (seed, epoch, index).
        """
        return None

    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures of a few samples for a person: rows `{name: [B, C, H, W] in [0, 1]}`; empty: nothing to see."""
        return {}

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures on held-out data, such as `{"accuracy": 0.97}`; empty: nothing to measure."""
        return {}

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """A new method that starts where another run ended (`--init RUN`). Default: the same class, its weights."""
        if not isinstance(previous, cls):
            raise BadCheckpoint(f"{cls.__name__} cannot start from a {type(previous).__name__} run")
        method = cls(config)
        method.load_state_dict(previous.state_dict())
        return method

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


# What a trained method can do. Commands ask a checkpoint for these, never for a class.


@runtime_checkable
class Restorer(Protocol):
    """Turns degraded images into clean ones, `[B, C, H, W]` in [0, 1], any height and width."""

    def restore(self, inputs: Tensor, physics: Any = None) -> Tensor: ...


@runtime_checkable
class Denoiser(Protocol):
    """Gives the clean picture x of `y = x + sigma z`, `[B, C, H, W]`, x in [0, 1]; differentiable in y, and not clamped.

    No verb of a command, but what probes ask for; a blind one does not look at `sigma`.
    """

    def denoise(self, y: Tensor, sigma: float) -> Tensor: ...


@runtime_checkable
class Encoder(Protocol):
    """Turns images `[B, C, H, W]` in [0, 1] into features `[B, D]`."""

    def encode(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Predictor(Protocol):
    """Turns images `[B, C, H, W]` in [0, 1] into class probabilities `[B, K]`, or values."""

    def predict(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class ObjectPredictor(Protocol):
    """Turns images `[B, C, H, W]` in [0, 1] and boxes `[B, n, 4]` (xyxy in pixels, NaN: none) into values `[B, n]`."""

    def predict_objects(self, x: Tensor, boxes: Tensor) -> Tensor: ...


@runtime_checkable
class Sampler(Protocol):
    """Draws `n` new images `[n, C, H, W]` in [0, 1]."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...


@runtime_checkable
class TrajectorySampler(Protocol):
    """Draws samples in steps that can be watched: `callback` is told of each (a `diffusion.SamplerStep`) before its update.

    The x0 of a step is in the units of the points, or, of pictures, in [-1, 1].
    """

    @property
    def trajectory_steps(self) -> int:
        """Steps of a sample."""
        ...

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, callback: Callable[[Any], None] | None = None
    ) -> Tensor: ...


@runtime_checkable
class Editor(Protocol):
    """Moves pictures `[B, C, H, W]` in [0, 1] (None: `n` new ones) along a direction: `[B, len(strengths), C, H, W]`.

    `kind` says what sort of direction, `mask` (broadcastable to a picture) where it is to act, in methods that have several;
    `without` names what is to stay as it is.
    """

    @property
    def picture_shape(self) -> tuple[int, int, int]: ...

    def edit(
        self,
        direction: str,
        strengths: Sequence[float],
        *,
        kind: str = ...,
        images: Tensor | None = None,
        n: int = 1,
        mask: Tensor | None = None,
        without: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


@runtime_checkable
class Searcher(Protocol):
    """Improves designs `[N, D]` by what it has learned of their values: `steps` steps from `start`; None: as configured."""

    def search(self, start: Tensor, steps: int | None = None) -> Tensor: ...


@runtime_checkable
class TimmExportable(Protocol):
    """Gives weights that a plain timm model loads: `(arguments, state_dict)`.

    The arguments are those of `timm.create_model` if `model_name` is among them, else of timm's `VisionTransformer`.
    """

    def timm_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]: ...


def draws_points(method: Any) -> bool:
    """Whether a sampler's samples are vectors `[n, D]`: its attribute `shape`, of one sample, says so; else they are pictures."""
    return len(getattr(method, "shape", ())) == 1


def capabilities(method: Method) -> dict[str, type]:
    """What a method can do, by the verb a person would use; what it is there for comes first."""
    verbs: dict[str, type] = {
        "restore": Restorer, "search": Searcher, "predict": Predictor, "predict-objects": ObjectPredictor, "sample": Sampler,
        "edit": Editor, "encode": Encoder,
    }  # fmt: skip
    able: dict[str, type] = {verb: kind for verb, kind in verbs.items() if isinstance(method, kind)}
    if "restore" in able and method.needs_physics:
        able["restore"] = able.pop("restore")  # what it can do besides
    return able
