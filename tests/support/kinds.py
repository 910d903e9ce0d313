"""Nine kinds of method, each as small as it can be: what the training contract must carry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sfumato.engine.randomness import key
from sfumato.method import Loss, Method, MethodConfig, Step


def data(count: int = 40) -> torch.Tensor:
    """Images [count, 1, 4, 4] in [0, 1]."""
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def net(inputs: int = 16, hidden: int = 32, outputs: int = 16, drop: float = 0.1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, outputs))


class Masked(Method):
    """Ordinary: a mask from ctx.generator, dropout from torch's generator, a mean over hidden entries, a schedule."""

    class Config(MethodConfig):
        steps: int = 20
        batch_size: int = 8
        clip_norm: float | None = 1.0

    stop_at: int | None = None

    def __init__(self, config=None):
        super().__init__(config)
        torch.manual_seed(0)
        self.net = net()

    def loss(self, batch, ctx):
        if ctx.step == self.stop_at:
            raise KeyboardInterrupt
        x = batch.x.flatten(1)
        hidden = torch.rand(x.shape, generator=ctx.generator, device=x.device) < 0.3 + 0.4 * ctx.progress
        return Loss(((self.net(x * ~hidden) - x)[hidden] ** 2).mean(), hidden.sum(), {"hidden": hidden.float().mean()})

    def optimizers(self):
        return {"net": torch.optim.AdamW(self.net.parameters(), 1e-2)}


class Scheduled(Masked):
    """The learning rate follows progress."""

    def steps(self, ctx):
        ctx.scale_lr(1 - ctx.progress)
        yield from super().steps(ctx)


class Lbfgs(Masked):
    """An optimizer that calls its closure several times."""

    def optimizers(self):
        return {"net": torch.optim.LBFGS(self.net.parameters(), 0.1, max_iter=3)}


class Curvature(Masked):
    """An optimizer that wants Hessian-vector products."""

    def optimizers(self):
        from sfumato.optim.adahessian import AdaHessian

        return {"net": AdaHessian(self.net.parameters(), lr=0.01)}


class Teacher(Masked):
    """A moving-average teacher, updated once a step."""

    def __init__(self, config=None):
        super().__init__(config)
        self.teacher = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9)).requires_grad_(False)
        self.teacher.update_parameters(self.net)

    def loss(self, batch, ctx):
        x = batch.x.flatten(1)
        with torch.no_grad():
            target = self.teacher(x)
        return Loss(F.mse_loss(self.net(x), target), len(x))

    def steps(self, ctx):
        yield from super().steps(ctx)
        self.teacher.update_parameters(self.net)


class Adversarial(Masked):
    """Two optimizers; the second joins after a warm-up."""

    def __init__(self, config=None):
        super().__init__(config)
        self.g, self.d = net(8), net(16, 32, 1)

    def fake(self, batch, ctx):
        return self.g(torch.randn(len(batch), 8, generator=ctx.generator, device=batch.x.device))

    def d_loss(self, batch, ctx):
        with torch.no_grad():
            fake = self.fake(batch, ctx)
        return Loss(F.softplus(-self.d(batch.x.flatten(1))).mean() + F.softplus(self.d(fake)).mean(), len(batch))

    def g_loss(self, batch, ctx):
        fake = self.fake(batch, ctx)
        value = (fake - batch.x.flatten(1)).square().mean()
        return Loss(value + float(ctx.step >= 3) * F.softplus(-self.d(fake)).mean(), len(batch))

    def steps(self, ctx):
        if ctx.step >= 3:
            yield Step("d", (self.d_loss,))
        yield Step("g", (self.g_loss,))

    def optimizers(self):
        return {name: torch.optim.Adam(getattr(self, name).parameters(), 1e-3) for name in ("g", "d")}


class Wrapper(torch.optim.Optimizer):
    """Shares groups and state with the optimizer inside."""

    def __init__(self, base):
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def params(self):
        return [p for group in self.param_groups for p in group["params"]]


class SharpnessAware(Wrapper):
    @torch.no_grad()
    def step(self, closure):
        loss, params = closure(), self.params()
        old = [p.clone() for p in params]
        norm = torch.stack([p.grad.norm() for p in params]).norm() + 1e-12
        for p in params:
            p.add_(p.grad * (0.05 / norm))
        closure()
        for p, o in zip(params, old):
            p.copy_(o)
        self.base.step()
        return loss


class Sharp(Masked):
    """Calls the same closure at two points."""

    def optimizers(self):
        return {"net": SharpnessAware(torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9))}


class PenalisedOutput(Wrapper):
    def __init__(self, base):
        super().__init__(base)
        self.strength = 0.1

    def state_dict(self):
        return {"base": self.base.state_dict(), "strength": self.strength}

    def load_state_dict(self, state):
        super().load_state_dict(state["base"])
        self.strength = state["strength"]

    @torch.no_grad()
    def step(self, loss, output):
        output()
        penalty = [p.grad.clone() for p in self.params()]
        value = loss()
        for p, g in zip(self.params(), penalty):
            p.grad.add_(g, alpha=self.strength)
        self.base.step()
        self.strength *= 1.01
        return value


class TwoFunctions(Masked):
    """An optimizer that differentiates a second function."""

    def output(self, batch, ctx):
        return Loss(self.net(batch.x.flatten(1)).mean(), len(batch))

    def steps(self, ctx):
        yield Step("net", (self.loss, self.output))

    def optimizers(self):
        return {"net": PenalisedOutput(torch.optim.Adam(self.net.parameters(), 1e-3))}


class Points(Masked):
    """Parameters and optimizer state grow while training; the topology belongs to the state."""

    def __init__(self, config=None):
        super().__init__(config)
        del self.net
        self.points = nn.Parameter(torch.rand(6, 16))
        self.register_buffer("moved", torch.zeros(6))

    def loss(self, batch, ctx):
        if ctx.step == self.stop_at:
            raise KeyboardInterrupt
        return Loss(torch.cdist(batch.x.flatten(1), self.points).min(1).values.mean(), len(batch))

    def steps(self, ctx):
        yield Step("net", (self.loss,))
        self.moved += self.points.grad.norm(dim=1)
        if ctx.step % 4 == 3 and len(self.points) < 40:
            self.split(ctx)

    def split(self, ctx):
        ctx.generator.manual_seed(key(ctx.seed, ctx.step, "split"))
        rows = torch.cat([torch.arange(len(self.points)), (self.moved >= self.moved.median()).nonzero()[:, 0]])
        noise = 0.05 * torch.randn(len(rows), 16, generator=ctx.generator)
        new = torch.arange(len(rows)) >= len(self.points)
        old, optimizer = self.points, ctx.optimizers["net"]
        self.points = nn.Parameter(old.detach()[rows] + noise * new[:, None])
        optimizer.param_groups[0]["params"] = [self.points]
        state = optimizer.state.pop(old)
        optimizer.state[self.points] = {
            k: v[rows].masked_fill(new[:, None], 0) if v.shape == old.shape else v for k, v in state.items()
        }
        self.moved = torch.zeros(len(rows))

    def optimizers(self):
        return {"net": torch.optim.Adam([self.points], 1e-2)}

    def load_state_dict(self, state, strict=True):
        self.points = nn.Parameter(torch.empty_like(state["points"]))
        self.moved = torch.empty_like(state["moved"])
        return super().load_state_dict(state, strict)


class Pacer(nn.Module):
    """State that is no tensor."""

    def __init__(self):
        super().__init__()
        self.stage, self.best, self.bad = 0, 1e9, 0

    def update(self, loss):
        self.best, self.bad = (loss, 0) if loss < self.best else (self.best, self.bad + 1)
        if self.bad > 2:
            self.stage, self.bad, self.best = self.stage + 1, 0, 1e9

    def get_extra_state(self):
        return {"stage": self.stage, "best": self.best, "bad": self.bad}

    def set_extra_state(self, state):
        self.stage, self.best, self.bad = state["stage"], state["best"], state["bad"]


class Curriculum(Masked):
    """The loss decides what comes next."""

    def __init__(self, config=None):
        super().__init__(config)
        self.pacer = Pacer()

    def loss(self, batch, ctx):
        loss = super().loss(batch, ctx)
        return loss._replace(value=loss.value * (1 + self.pacer.stage))

    def steps(self, ctx):
        result = yield Step("net", (self.loss,))
        self.pacer.update(float(result.loss))


KINDS = [Masked, Scheduled, Lbfgs, Curvature, Teacher, Adversarial, Sharp, TwoFunctions, Points, Curriculum]
