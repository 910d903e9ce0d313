"""Over which steps does the variance of a sampler's guess tell bad samples? All windows of one run at once.

    M²(W) = Σ_s M²_s + 1/N Σ_{s<t} n_s n_t |m_s - m_t|²,    N = Σ_s n_s        s, t: the slices that the window W is made of

A running mean m and sum of squared deviations M² of every slice give the variance over every window that is made of them (Chan,
Golub, LeVeque 1983), so nothing but a mean a slice is kept of the guesses.

Source of the detector: Aithal, Maini, Lipton, Kolter, "Understanding Hallucinations in Diffusion Models through Mode
Interpolation", NeurIPS 2024, which takes the last steps for points and chooses another window for pictures.

>>> import torch
>>> from sfumato.diffusion import SamplerStep, scan_windows
>>> def draw(n, generator=None, *, callback):  # every second sample swings, but only in the first half of the chain
...     bad = torch.arange(n) % 2
...     for i in range(8):
...         callback(SamplerStep(i, bad, (bad * (-1.0) ** i * (i < 4))[:, None], torch.ones(())))
...     return bad
>>> scan = scan_windows(draw, 10, steps=8, slices=4)
>>> scan.best(scan.samples == 1), len(scan.windows)
((0, 2), 10)
>>> scan.auc(scan.samples == 1)[[0, -1]]  # steps 0 to 2, steps 6 to 8
tensor([1.0000, 0.5000], dtype=torch.float64)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.samplers import SamplerStep
from sfumato.diffusion.trajectory import DrawWithCallback
from sfumato.errors import BadData, BadSetting


class WindowScan:
    """A callback of the samplers that knows the variance of x̂_0 over every window between given edges.

    It keeps one picture a sample and slice, and begins anew at the first edge, so one serves batch after batch.

    Args:
        edges: steps at which windows may begin and end, rising, counted from 0 in the order of sampling.

    Raises:
        BadSetting: fewer than two edges, or edges that do not rise.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        if len(edges) < 2 or edges[0] < 0 or any(a >= b for a, b in pairwise(edges)):
            raise BadSetting(f"edges={list(edges)}: windows lie between two or more rising steps from 0 on, such as 0, 10, 20")
        self.edges = list(edges)
        self._clear()

    def _clear(self) -> None:
        self._counts = [0] * (len(self.edges) - 1)
        self._means: list[Tensor] = []
        self._squares: list[Tensor] = []  # [B] each: the mean over the coordinates

    @torch.no_grad()
    def __call__(self, step: SamplerStep) -> None:
        """See one step."""
        if not self.edges[0] <= step.step < self.edges[-1]:
            return
        x = step.x0.flatten(1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # small variances drown in half precision
        if step.step == self.edges[0]:
            self._clear()
        here = bisect_right(self.edges, step.step) - 1
        if not self._counts[here]:
            self._means.append(torch.zeros_like(x))
            self._squares.append(x.new_zeros(len(x)))
        self._counts[here] += 1
        change = x - self._means[-1]  # Welford's update within a slice
        self._means[-1] = self._means[-1] + change / self._counts[here]
        self._squares[-1] = self._squares[-1] + (change * (x - self._means[-1])).mean(1)

    @property
    def windows(self) -> list[tuple[int, int]]:
        """All of them, first step and the one after the last, by their beginning."""
        return [(a, b) for i, a in enumerate(self.edges) for b in self.edges[i + 1 :]]

    @property
    def variance(self) -> Tensor:
        """`[windows, B]`: population variance over the steps of each window, mean over the coordinates.

        Raises:
            BadData: the sampler took no step in one of the slices.
        """
        if not all(self._counts):
            raise BadData(f"the sampler took no step in a slice of {self.edges}: the edges must lie within its steps")
        slices = len(self._counts)
        means = torch.stack(self._means, 1)  # [B, S, D]
        apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square() / means.shape[2]
        n = apart.new_tensor(self._counts)
        between = (n * n[:, None] * apart).triu(1)
        within = torch.diag_embed(torch.stack(self._squares, 1))
        first, last = torch.triu_indices(slices, slices, device=n.device)
        total = n.cumsum(0)
        size = (total[last] - total[first] + n[first])[:, None]
        within, between = (_sums(pairs)[:, first, last].T for pairs in (within, between))
        return (within + between / size) / size


def _sums(pairs: Tensor) -> Tensor:
    """`[..., a, b]`: what pairs s <= t of slices a to b add up to, of an upper triangle `[..., s, t]`."""
    return pairs.flip(-2).cumsum(-2).flip(-2).cumsum(-1)


@dataclass(frozen=True)
class ScannedWindows:
    """Samples `[n, ...]`, windows, and the variance of every sample over every window: `[windows, n]`."""

    samples: Tensor
    windows: list[tuple[int, int]]
    variance: Tensor

    def auc(self, bad: Tensor) -> Tensor:
        """How well the variance over each window tells samples that a person, or a rule, found to be bad.

        Args:
            bad: `[n]` bool.

        Returns:
            `[windows]`, float64: the chance that a bad sample varied more than a good one; 1/2 is guessing, NaN
            without both kinds.

        Raises:
            BadData: another number of samples.
        """
        from scipy.stats import rankdata

        if bad.shape != self.variance.shape[1:]:
            raise BadData(f"{self.variance.shape[1]} samples were drawn: say of each whether it is bad, not {list(bad.shape)}")
        bad = bad.cpu().bool()
        count, others = int(bad.sum()), int((~bad).sum())
        ranks = torch.from_numpy(rankdata(self.variance.double().cpu().numpy(), axis=1))
        return (ranks[:, bad].sum(1) - count * (count + 1) / 2) / (count * others if count * others else torch.nan)

    def best(self, bad: Tensor) -> tuple[int, int]:
        """The window of the largest AUC. Judge it on samples that it was not chosen by.

        Raises:
            BadData: without a bad or a good sample.
        """
        auc = self.auc(bad)
        if auc.isnan().any():
            raise BadData("all samples are good, or all bad: draw more, no window can be chosen by these")
        return self.windows[int(auc.argmax())]


def scan_windows(
    draw: DrawWithCallback,
    n: int,
    *,
    steps: int,
    slices: int = 20,
    batch: int = 256,
    generator: torch.Generator | None = None,
) -> ScannedWindows:
    """Draw samples, and know their variance over all windows of the chain.

    Args:
        draw: the sampler, such as a method's `sample`.
        n: samples, 1 or more.
        steps: of the sampler, such as a method's `trajectory_steps`.
        slices: windows begin and end at so many equal parts of the chain: there are `slices * (slices + 1) / 2`.
        batch: samples that are drawn at once; a slice keeps a mean of each.
        generator: source of the draws.

    Raises:
        BadSetting: no samples, or more slices than steps.
        BadData: the sampler takes fewer steps.
    """
    if n < 1 or not 1 <= slices <= steps:
        raise BadSetting(f"n={n}, slices={slices}: draw one sample or more, and cut the {steps} steps into 1 to {steps} slices")
    scan = WindowScan([round(i * steps / slices) for i in range(slices + 1)])
    samples, variances = [], []
    for first in range(0, n, batch):
        samples.append(draw(min(batch, n - first), generator, callback=scan))
        variances.append(scan.variance)
    return ScannedWindows(torch.cat(samples), scan.windows, torch.cat(variances, 1))
