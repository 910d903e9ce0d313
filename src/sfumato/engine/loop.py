"""The training loop: one for all methods, because a method says what differs and the optimizer's `step` takes the closures.

    for every step:  batches -> Method.steps yields Step(optimizer, losses) -> optimizer.step(*objectives) -> Result

>>> import torch
>>> from sfumato.engine import fit
>>> from sfumato.method import Loss, Method
>>> class Mean(Method):
...     def __init__(self, config=None):
...         super().__init__(config)
...         self.mean = torch.nn.Parameter(torch.zeros(1))
...     def loss(self, batch, ctx):
...         return Loss((batch.x - self.mean).square().mean(), len(batch))
...     def optimizers(self):
...         return {"net": torch.optim.SGD(self.parameters(), 0.1)}
>>> method = fit(Mean(), torch.full((16, 1, 2, 2), 0.25), steps=50, progress=False)
>>> round(method.mean.item(), 3)
0.25
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from typing import Any, cast

import torch
from torch import nn

from sfumato.engine import checkpoint
from sfumato.engine.evaluation import evaluate, preview
from sfumato.engine.objective import Objective
from sfumato.engine.options import Options, accelerator
from sfumato.engine.progress import Progress
from sfumato.engine.randomness import key, seed_everything
from sfumato.engine.run_folder import Run
from sfumato.engine.signals import stop_signals
from sfumato.engine.stream import Stream, as_data, epoch, stream, stream_loader
from sfumato.errors import BadCheckpoint, BadData, Diverged, Interrupted
from sfumato.method import Batch, Context, Method, Result


def fit(
    method: Method,
    data: Any,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    run: Run | None = None,
    progress: bool = True,
    held_out: Any = None,
    **options: Any,
) -> Method:
    """Train a method; returns it in eval mode.

    Args:
        method: freshly built, or as a checkpoint left it when `run` holds one.
        data: a place (`"sample:digits"`, a folder, ...), a tensor `[N, C, H, W]`, a list of images, a `Batch`, a data set, or
            your own DataLoader: it gives images in [0, 1], `(images, labels)`, `(images, targets)` or a `Batch`; its batches are
            taken as they come (no `augment`), and of several processes each must be given its share.
        steps: optimizer steps; None: the method's own number.
        minutes: a time instead: a few throw-away steps are timed, and the number of steps is fixed from them.
        run: a run folder to write to; a checkpoint in it is continued.
        progress: show a progress bar.
        held_out: data for `method.evaluate` at the end, of the same kinds.
        **options: see `Options`.

    Raises:
        Diverged: the loss or a weight is no longer finite.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    return Trainer(method, data, Options(**options), steps=steps, minutes=minutes, run=run).train(progress, held_out)


class Trainer:
    """A method, its data and where the training stands."""

    def __init__(
        self,
        method: Method,
        data: Any,
        options: Options,
        *,
        steps: int | None = None,
        minutes: float | None = None,
        run: Run | None = None,
    ) -> None:
        self.options, self.run, self.data = options, run, as_data(data)
        self.accelerator = accelerator(options, run)
        self.device = self.accelerator.device
        self.alone = self.accelerator.num_processes == 1
        self.main = self.accelerator.is_main_process
        self.method = method.to(self.device).train()
        generator = torch.Generator(self.device)
        self.ctx = Context(0, steps or method.config.steps, options.seed, generator, sum=self._sum)
        saved = self._load()
        if not saved:
            self._survey()
        self.ctx.optimizers = method.optimizers()
        self.ema = self._ema(saved)
        for name, state in saved.get("optimizers", {}).items():
            self.ctx.optimizers[name].load_state_dict(state)
        if minutes is not None and not saved:
            self.ctx.total = self._steps_in(minutes)
        self.log_every = options.log_every or max(1, self.ctx.total // 1000)

    # ---- one step

    def step(self, batches: list[Batch], *, check: bool) -> Result:
        """One step of the method on its micro-batches."""
        ctx, phase = self.ctx, -1
        steps, result = self.method.steps(ctx), cast(Result, None)
        while True:
            try:
                wanted = steps.send(result)
            except StopIteration:
                break
            phase += 1
            optimizer = ctx.optimizers[wanted.optimizer]
            params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            closures = [
                Objective(
                    loss, batches, ctx, params, self.accelerator, phase=phase, clip_norm=self.method.config.clip_norm, check=check
                )
                for loss in wanted.losses
            ]
            value = cast(Any, optimizer.step)(*closures)
            result = Result(value, closures[0].logs)
        if self.ema is not None:
            self.ema.update(self.method)
        if not self.alone:
            self._share_batch_statistics()
        ctx.step += 1
        return result

    def batches(self, start: int) -> Stream:
        """The micro-batches from step `start` on."""
        options, acc = self.options, self.accelerator
        if not hasattr(self.data, "__getitem__"):
            return stream_loader(self.data, start=start, accumulate=options.accumulate)
        workers = options.workers
        if workers is None:
            idle = getattr(self.data, "in_memory", True) and self.device.type == "cpu"
            workers = 0 if idle else min(8, os.cpu_count() or 1)
        return stream(
            self.data,
            self.method.augment(),
            batch_size=self.method.config.batch_size,
            start=start,
            seed=options.seed,
            accumulate=options.accumulate,
            rank=acc.process_index,
            world=acc.num_processes,
            workers=workers,
            pin=self.device.type == "cuda",
        )

    # ---- the whole of it

    def train(self, show: bool = True, held_out: Any = None) -> Method:
        """Train to the end; a failure or a signal leaves the last good checkpoint."""
        ctx, run = self.ctx, self.run
        batches = self.batches(ctx.step)
        started = saved_at = time.monotonic()
        on_cpu = self.device.type == "cpu"
        if run is not None and self.main:
            run.rewind(ctx.step)
            self._save()  # step 0 too: a state that cannot be saved is refused before the hours are spent
        with stop_signals() as asked, Progress(show and self.main, type(self.method).__name__, ctx) as bar:
            while ctx.step < ctx.total:
                logs_now = (ctx.step + 1) % self.log_every == 0 or ctx.step + 1 == ctx.total
                try:
                    micro = [b.to(self.device) for b in next(batches)]
                    result = self.step(micro, check=on_cpu or logs_now)
                except Diverged as error:
                    raise Diverged(f"{error}{self._where_to_go_on()}") from None
                if logs_now:
                    self._log(result, time.monotonic() - started)
                bar.update(result)
                stop = self._agree(bool(asked)) if self.alone or logs_now else False
                if run is not None and (stop or self._due(saved_at)):
                    self._save()
                    saved_at = time.monotonic()
                if stop:
                    raise Interrupted(f"stopped at step {ctx.step} of {ctx.total}{self._where_to_go_on()}")
        self._finish(held_out, time.monotonic() - started)
        return self.method.eval()

    def _log(self, result: Result, seconds: float) -> None:
        lr = next(iter(self.ctx.optimizers.values())).param_groups[0]["lr"]
        figures = {"loss": float(result.loss), "lr": float(lr), **{k: float(v) for k, v in result.logs.items()}}
        if self.run is not None and self.main:
            self.run.log(step=self.ctx.step, seconds=round(seconds, 3), **figures)
        if self.options.track:
            self.accelerator.log(figures, step=self.ctx.step)

    def _due(self, saved_at: float) -> bool:
        if self.options.save_every:
            return self.ctx.step % self.options.save_every == 0
        return (self.alone and time.monotonic() - saved_at > 60) or (not self.alone and self.ctx.step % 500 == 0)

    def _finish(self, held_out: Any, seconds: float) -> None:
        figures: dict[str, float] = {}
        if self.main and held_out is not None:
            figures = evaluate(self.method, as_data(held_out))
        if self.run is not None:
            self._save()
            if self.main:
                self.run.log(step=self.ctx.step, seconds=round(seconds, 3), done=True, **({"eval": figures} if figures else {}))
        if self.options.track:
            self.accelerator.log(figures, step=self.ctx.step)
            self.accelerator.end_training()

    def _where_to_go_on(self) -> str:
        last = self.run.last_checkpoint if self.run else None
        return f"; {last.stem} is kept: sfumato train --resume {self.run.path}" if self.run and last else ""

    # ---- state

    def _save(self) -> None:
        """Write a checkpoint and pictures of a few samples; refuses weights that are not finite."""
        if not self.main or self.run is None:
            return
        ctx, state = self.ctx, dict(self.method.state_dict())
        if (bad := checkpoint.assert_finite(state)) is not None:
            raise Diverged(f"{bad} is no longer finite at step {ctx.step}{self._where_to_go_on()}")
        whole = {
            "slug": self.run.config.get("slug"),
            "settings": self.method.config.model_dump(mode="json"),
            "step": ctx.step,
            "total": ctx.total,
            "threads": torch.get_num_threads(),
            "method": state,
            "optimizers": {name: o.state_dict() for name, o in ctx.optimizers.items()},
            "ema": None if self.ema is None else dict(self.ema.state_dict()),
        }
        checkpoint.save(self.run.checkpoints / f"step-{ctx.step}.safetensors", whole)
        checkpoint.prune(self.run.checkpoints, self.options.keep)
        self._picture()

    def _picture(self) -> None:
        if self.run is None or not hasattr(self.data, "__getitem__"):
            return
        from torchvision.utils import save_image

        augment, seed = self.method.augment(), self.options.seed
        batch = next(epoch(self.data, min(4, len(self.data)), augment=augment, seed=seed)).to(self.device)
        for name, images in preview(self.method, batch, seed).items():
            save_image(images, self.run.pictures / f"{self.ctx.step}-{name}.png", nrow=len(images))
        self.method.train()

    def _load(self) -> dict[str, Any]:
        """Load the run's last checkpoint into the method (its weights first: they may change shapes)."""
        last = self.run.last_checkpoint if self.run else None
        if last is None:
            return {}
        saved = checkpoint.read(last)
        if saved["slug"] != (self.run.config.get("slug") if self.run else None):
            raise BadCheckpoint(f"{last} is a checkpoint of {saved['slug']!r}")
        checkpoint.load_weights(self.method, saved["method"], last)
        self.ctx.step, self.ctx.total = saved["step"], saved["total"]
        return saved

    def _survey(self) -> None:
        """Show a fresh method its data, where it wants to see it."""
        if type(self.method).survey is Method.survey:
            return
        if not hasattr(self.data, "__getitem__"):
            raise BadData(f"{type(self.method).__name__} looks at its data before it trains: give data that can be indexed")
        with torch.no_grad():
            generator = torch.Generator().manual_seed(key(self.options.seed, "survey"))
            order = torch.randperm(len(self.data), generator=generator).tolist()
            batches = epoch(self.data, self.method.config.batch_size, order=order)
            self.method.survey(b.to(self.device) for b in batches)

    def _ema(self, saved: dict[str, Any]) -> Any:
        if self.options.ema is None:
            return None
        from sfumato.optim.ema import EMA

        ema = EMA(self.method, decay=self.options.ema)
        if saved.get("ema") is not None:
            ema.load_state_dict(saved["ema"])
        return ema

    def seconds_a_step(self, warm: int = 2, timed: int = 5, at_least: float = 1.0) -> float:
        """The median time of a step with its loading, in the middle of the schedules.

        A few steps are taken (for a second at least) and thrown away: weights, optimizers and position are as before.
        """
        before, seed, total = copy.deepcopy(self.method.state_dict()), self.options.seed, self.ctx.total
        seconds: list[float] = []
        self.ctx.step, self.ctx.total = 500, 1000
        batches, started = self.batches(0), time.perf_counter()
        while not self._agree(len(seconds) >= warm + timed and sum(seconds) >= at_least):
            self.step([b.to(self.device) for b in next(batches)], check=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
        self.method.load_state_dict(before)
        self.ctx.optimizers, self.ctx.step, self.ctx.total = self.method.optimizers(), 0, total
        self.ema = self._ema({})
        seed_everything(key(seed, "after timing"), self.device)
        return statistics.median(seconds[warm:])

    def _steps_in(self, minutes: float) -> int:
        """How many steps fit, on average over the processes."""
        total = torch.tensor(float(max(1, int(60 * minutes / self.seconds_a_step()))), device=self.device)
        return int(self._sum(total) / self.accelerator.num_processes)

    # ---- several processes

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.alone else cast(torch.Tensor, self.accelerator.reduce(tensor, "sum"))

    def _agree(self, asked: bool) -> bool:
        return asked if self.alone else bool(self._sum(torch.tensor(float(asked), device=self.device)) > 0)

    def _share_batch_statistics(self) -> None:
        from accelerate.utils import broadcast

        for module in self.method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    buffer.copy_(broadcast(buffer))
