"""Mixtures of Gaussians, where everything is known exactly: density, score at any noise, posterior under a linear measurement.

    p(x) = Σ_k w_k N(x; m_k, C_k),      ∇ log p(x) = Σ_k r_k(x) C_k⁻¹ (m_k - x),      r_k(x) ∝ w_k N(x; m_k, C_k)

A noised mixture sqrt(abar) x + sqrt(1 - abar) n, a measured one A x + sigma n, and the posterior of x given a measurement are
mixtures again.

Sources: textbook; the 25 modes: Aithal, Maini, Lipton, Kolter, "Understanding Hallucinations in Diffusion Models through Mode
Interpolation", NeurIPS 2024.

>>> import torch
>>> from sfumato.data import GaussianMixture, gaussian_grid
>>> line = GaussianMixture(torch.tensor([[1.0], [2.0], [3.0]]), 0.05)
>>> line.off_support(torch.tensor([[1.1], [1.5], [3.0]]))
tensor([False,  True, False])
>>> line.noised(0.5).score(torch.tensor([[2.0]]) * 0.5**0.5).abs() < 1e-5  # the middle
tensor([[True]])
>>> grid = gaussian_grid()
>>> grid.sample(1000, generator=torch.Generator().manual_seed(0)).std(0).round(decimals=1)
tensor([1., 1.])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.errors import BadData, BadSetting


class GaussianMixture:
    """K Gaussians in D dimensions.

    Args:
        means: `[K, D]`; their type and device are those of all results.
        std: standard deviation of round Gaussians, one for all or `[K]`.
        weights: `[K]`, positive, scaled to sum 1; None: equal.
        cov: covariances instead of `std`, `[D, D]` or `[K, D, D]`, positive definite.

    Attributes:
        means: `[K, D]`.
        weights: `[K]`, of sum 1.
        var: `[K]`, variances of round Gaussians, else None.
        cov: `[K, D, D]`, covariances of others, else None.

    Raises:
        BadSetting: widths or weights that are not positive, or both or none of `std` and `cov`.
    """

    def __init__(
        self,
        means: Tensor,
        std: float | Tensor | None = None,
        *,
        weights: Tensor | None = None,
        cov: Tensor | None = None,
    ) -> None:
        if (std is None) == (cov is None):
            raise BadSetting("a mixture takes the standard deviation of its modes or their covariances: give std, or cov")
        k, d = means.shape
        self.means = means
        weights = means.new_ones(k) if weights is None else weights.to(means)
        self.weights = weights / weights.sum()
        self.var = None if std is None else self._number(std).square().expand(k)
        self.cov = None if cov is None else cov.to(means).expand(k, d, d)
        if not (weights > 0).all() or (self.var is not None and not (self.var > 0).all()):
            raise BadSetting("weights and standard deviations of a mixture must be positive")

    def sample(self, n: int, *, balanced: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Draw points.

        Args:
            n: how many.
            balanced: every mode has its share of the points, to one more or less, mode after mode; else shares vary by chance.
            generator: source of the draws.

        Returns:
            `[n, D]`.
        """
        device = self.means.device if generator is None else generator.device
        if balanced:
            place = (torch.arange(n, device=self.means.device).to(self.means) + 0.5) / n
        else:
            place = torch.rand(n, generator=generator, device=device, dtype=self.means.dtype).to(self.means)
        which = torch.searchsorted(self.weights.cumsum(0), place).clamp(max=len(self.weights) - 1)
        z = torch.randn(n, self.means.shape[1], generator=generator, device=device, dtype=self.means.dtype).to(self.means)
        if self.var is not None:
            return self.means[which] + self.var.sqrt()[which, None] * z
        return self.means[which] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(self._full())[which], z)

    def log_prob(self, x: Tensor) -> Tensor:
        """Logarithm of the density at `x` `[N, D]`: `[N]`."""
        return self._log_joint(self._deviations(x)[1]).logsumexp(1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log-density at `x` `[N, D]`: `[N, D]`."""
        pulls, squares = self._deviations(x)
        share = self._log_joint(squares).softmax(1)
        return -torch.einsum("nk,nkd->nd", share, pulls)

    def off_support(self, x: Tensor, *, kappa: float = 6.0) -> Tensor:
        """Which points belong to no mode.

        Args:
            x: `[N, D]`.
            kappa: a mode reaches this many standard deviations from its centre.

        Returns:
            `[N]` bool.
        """
        return self._deviations(x)[1].amin(1) > kappa**2

    def noised(self, abar: float | Tensor) -> GaussianMixture:
        """The mixture of `sqrt(abar) x + sqrt(1 - abar) n`; `abar` in [0, 1], a number or scalar tensor."""
        abar = self._number(abar)
        means = abar.sqrt() * self.means
        if self.var is not None:
            return GaussianMixture(means, (abar * self.var + 1 - abar).sqrt(), weights=self.weights)
        eye = torch.eye(self.means.shape[1]).to(self.means)
        return GaussianMixture(means, weights=self.weights, cov=abar * self._full() + (1 - abar) * eye)

    def measured(self, A: Tensor, sigma: float | Tensor) -> GaussianMixture:
        """The mixture of measurements `A x + sigma n`.

        Args:
            A: `[M, D]`.
            sigma: standard deviation of the noise, positive.
        """
        A = A.to(self.means)
        noise = self._number(sigma) ** 2 * torch.eye(len(A)).to(A)
        return GaussianMixture(self.means @ A.T, weights=self.weights, cov=A @ self._full() @ A.T + noise)

    def posterior(self, y: Tensor, A: Tensor, sigma: float | Tensor) -> GaussianMixture:
        """The mixture of x given `y = A x + sigma n`.

        Args:
            y: `[M]`, one measurement.
            A: `[M, D]`.
            sigma: standard deviation of the noise, positive.

        Raises:
            BadData: a measurement of another length.
            BadSetting: no noise.
        """
        if y.shape != A.shape[:1]:
            raise BadData(f"one measurement has shape {list(A.shape[:1])}, not {list(y.shape)}")
        if not sigma > 0:
            raise BadSetting(f"sigma={float(sigma)}: a measurement without noise has no density, give a positive one")
        A, y = A.to(self.means), y.to(self.means)
        seen, cov = self.measured(A, sigma), self._full()
        gain = torch.linalg.solve(seen._full(), A @ cov).mT  # [K, D, M]
        means = self.means + torch.einsum("kdm,km->kd", gain, y - seen.means)
        rest = cov - gain @ A @ cov
        weights = seen._log_joint(seen._deviations(y[None])[1])[0].softmax(0)
        tiny = torch.finfo(weights.dtype).tiny
        return GaussianMixture(means, weights=weights.clamp(min=tiny), cov=(rest + rest.mT) / 2)

    def _number(self, value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=self.means.dtype, device=self.means.device)

    def _full(self) -> Tensor:
        """Covariances `[K, D, D]`, of round modes too."""
        if self.cov is not None:
            return self.cov
        assert self.var is not None
        return self.var[:, None, None] * torch.eye(self.means.shape[1]).to(self.means)

    def _deviations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """C_k⁻¹ (x - m_k) `[N, K, D]`, and the squared distance in standard deviations `[N, K]`."""
        gaps = x[:, None] - self.means
        if self.var is not None:
            pulls = gaps / self.var[:, None]
        else:
            pulls = torch.cholesky_solve(gaps.permute(1, 2, 0), torch.linalg.cholesky(self._full())).permute(2, 0, 1)
        return pulls, (gaps * pulls).sum(2)

    def _log_joint(self, squares: Tensor) -> Tensor:
        """log (w_k N(x; m_k, C_k)) `[N, K]` from squared distances."""
        d = self.means.shape[1]
        log_det = d * self.var.log() if self.var is not None else torch.logdet(self._full())
        return self.weights.log() - (squares + log_det + d * math.log(2 * math.pi)) / 2


def gaussian_grid(side: int = 5, *, std: float = 0.05, rotated: bool = False) -> GaussianMixture:
    """`side²` equal round modes on a square lattice.

    The lattice has spacing 2; then everything is divided by the standard deviation of a coordinate, for 5 modes by 2.829.

    Args:
        side: modes a row, at least 2.
        std: of a mode, before the division.
        rotated: the lattice stands on a corner, shrunk by sqrt(2): modes (i + j, i - j) instead of (2 i, 2 j), divided alike.

    Returns:
        A mixture in the plane, float32.

    Raises:
        BadSetting: fewer than two modes a row.
    """
    if side < 2:
        raise BadSetting(f"side={side}: a grid has two modes a row or more")
    line = torch.arange(side) - (side - 1) / 2
    i, j = torch.cartesian_prod(line, line).unbind(1)
    scale = (std**2 + (2 * line).square().mean().item()) ** 0.5
    means = torch.stack([i + j, i - j] if rotated else [2 * i, 2 * j], 1)
    return GaussianMixture(means / scale, std / scale)
