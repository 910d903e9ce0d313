"""Blind bias-free denoisers: what they learn of a prior, when they stop memorising, and the bases in which they shrink.

    y = x + σ z,  √σ ~ U(0, 1),     L = Σ_pixels (r(y) - σ z)²,     f(y) = y - r(y)

One network r for all noise levels, none of which it is told, without a constant anywhere: f(c y) = c f(y), hence f(y) = ∇f(y) y.
Two of them, trained on disjoint halves of a large set, are nearly one function and draw nearly the same pictures from the same
noise. Locally f shrinks in the eigenvectors of its Jacobian, patterns that oscillate along the contours of the picture
(`sfumato probe harmonic`).

Source: Zahra Kadkhodaie, Florentin Guth, Eero P. Simoncelli, Stéphane Mallat, "Generalization in diffusion models arises from
geometry-adaptive harmonic representations", ICLR 2024 (arXiv 2310.02557), and the settings of the released code.

>>> import torch
>>> from sfumato.papers.diffusion.harmonic_bases import BlindDenoiser
>>> method = BlindDenoiser(BlindDenoiser.Config.small(channels=1, image_size=8, width=8)).eval()
>>> y = torch.rand(1, 1, 11, 9)
>>> method.restore(y).shape, method.sample(2).shape
(torch.Size([1, 1, 11, 9]), torch.Size([2, 1, 8, 8]))
>>> torch.allclose(method.denoise(3 * y), 3 * method.denoise(y), atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.data.batch import Batch, Facts
from sfumato.diffusion import SamplerStep, memoriser, sample_blind, sqrt_uniform_sigma, wiener_filter
from sfumato.errors import BadData, BadSetting
from sfumato.method import Context, Loss, Method, MethodConfig, Result, Step
from sfumato.metrics import closest_correlation, distinct, psnr
from sfumato.nn import BFCNN, PlainUNet, pad_to_multiple, tiled_apply
from sfumato.optim import cosine_warmup

EVALUATED = (0.1, 0.3)
"""Noise levels of `evaluate`."""


class BlindDenoiser(Method):
    """Kadkhodaie et al. 2023. Trains on clean pictures; removes noise of any level, draws pictures, solves linear problems."""

    takes_physics: ClassVar[bool] = True

    class Config(MethodConfig):
        """Defaults: the paper's, for faces of 80 x 80 grey pixels."""

        steps: int = Field(488_281, gt=0, description="optimizer steps: 1000 epochs of 250,000 pictures, however many there are")
        batch_size: int = Field(512, gt=0, description="pictures a step")
        channels: int | None = Field(None, gt=0, description="channels of a picture (the paper: 1); None: those of the data")
        image_size: int | None = Field(
            None, gt=0, description="side of a training picture in pixels; None: that of the data, at most size_limit"
        )
        size_limit: int = Field(80, gt=0, description="largest image_size that is taken from the data, pixels")
        crop: bool | None = Field(None, description="cut pictures to image_size while loading; None: where they differ")
        resize: bool = Field(
            True, description="before that, resize them to it; false: patches at full resolution, to restore photographs"
        )
        network: Literal["unet", "bf_cnn"] = Field("unet", description="U-Net, or a stack of convolutions")
        width: int = Field(64, gt=0, description="channels at full resolution; the U-Net doubles them at every level")
        levels: int = Field(3, gt=0, description="times the U-Net halves the picture")
        layers: int = Field(21, gt=1, description="convolutions of bf_cnn")
        receptive_field: int | None = Field(None, gt=0, description="side in pixels that bf_cnn sees, odd; None: 2 layers + 1")
        gain: Literal["tiny", "one"] = Field("tiny", description="how normalisation starts: tiny as released, one for short runs")
        sigma_low: float = Field(0.0, ge=0, description="smallest noise level, of pixels in [0, 1]")
        sigma_high: float = Field(1.0, gt=0, description="largest noise level")
        lr: float = Field(1e-3, gt=0, description="Adam's learning rate at the start")
        decay: Literal["halve", "cosine"] = Field("halve", description="how the learning rate falls")
        halve_every: float = Field(0.1, gt=0, description="share of the training between two halvings")
        mean: float = Field(0.5, description="grey level that samples start from, plus noise of deviation 1")
        h0: float = Field(0.01, gt=0, le=1, description="first step size while sampling")
        beta: float = Field(0.01, ge=0, le=1, description="share of a step that reduces noise; 1: none is injected")
        sigma_end: float = Field(0.01, gt=0, description="noise level at which sampling ends")
        sample_steps: int = Field(1000, gt=0, description="most network calls of a sample")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Pictures of up to 32 pixels a side on two cores in minutes."""
            small = {
                "steps": 1500, "batch_size": 32, "size_limit": 32, "width": 16, "levels": 2, "layers": 8, "gain": "one",
                "lr": 2e-3, "decay": "cosine", "h0": 0.05, "beta": 0.1, "sample_steps": 250,
            }  # fmt: skip
            return cls(**{**small, **over})

        def fitted(self, facts: Facts) -> Self:
            """Channels and size from the data."""
            config = super().fitted(facts)
            stride = 2**self.levels if self.network == "unet" else 1
            known = min(self.size_limit, *(facts.size or (self.size_limit,)))
            side = config.image_size or max(stride, known // stride * stride)
            crop = facts.size != (side, side) if config.crop is None else config.crop
            return type(config).model_validate({**config.model_dump(), "image_size": side, "crop": crop})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        c = self.config
        if not c.sigma_low < c.sigma_high:
            raise BadSetting(f"sigma_low={c.sigma_low} is not below sigma_high={c.sigma_high}")
        channels, side = c.channels or 3, c.image_size or c.size_limit
        self.shape = (channels, side, side)
        self.net: nn.Module
        if c.network == "unet":
            widths = [c.width * 2**i for i in range(c.levels + 1)]
            self.net = PlainUNet(channels, channels, widths, norm="bias_free", up="transposed", gain=c.gain)
            self.stride = self.net.stride
        else:
            self.net = BFCNN(channels, layers=c.layers, width=c.width, receptive_field=c.receptive_field, gain=c.gain)
            self.stride = 1
        self.reach: int = self.net.reach
        if side % self.stride:
            raise BadSetting(f"image_size={side} cannot be halved {c.levels} times: give a multiple of {self.stride}")

    def augment(self) -> Callable[..., Any] | None:
        """A random square of the picture, resized first or not; nothing where pictures have the right size."""
        from torchvision.transforms import v2

        size = self.shape[1]
        if not self.config.crop:
            return None
        cut = v2.RandomCrop(size, pad_if_needed=True, padding_mode="reflect")
        return v2.Compose([v2.Resize(size, antialias=True), cut]) if self.config.resize else cut

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """Squared error of the noise, summed over a picture.

        Raises:
            BadData: pictures of another size or number of channels.
        """
        x, c = batch.x, self.config
        if x.shape[1] != self.shape[0] or any(side % self.stride for side in x.shape[-2:]):
            raise BadData(f"pictures are {tuple(x.shape[1:])}, the network takes {self.shape}: set image_size and channels")
        sigma = sqrt_uniform_sigma(len(x), low=c.sigma_low, high=c.sigma_high, generator=ctx.generator).to(x)
        noise = sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=ctx.generator, device=x.device, dtype=x.dtype)
        return Loss((self.net(x + noise) - noise).square().flatten(1).sum(1).mean(), len(batch))

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """Adam, its learning rate halved every so often, or on half a cosine."""
        c = self.config
        halvings = int(ctx.progress / c.halve_every + 1e-9)  # 0.3 / 0.1 is a little less than 3
        ctx.scale_lr(0.5**halvings if c.decay == "halve" else cosine_warmup(ctx.progress, warmup=0.0))
        yield Step("net", (self.loss,))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam, as in the paper."""
        return {"net": torch.optim.Adam(self.net.parameters(), self.config.lr)}

    # ---- use

    def denoise(self, y: Tensor, sigma: float | None = None) -> Tensor:
        """f(y), not clamped and differentiable.

        Args:
            y: `[B, C, H, W]`, pictures in [0, 1] plus noise of any level; any height and width.
            sigma: not used: the network is blind.

        Returns:
            Like `y`.
        """
        padded, crop = pad_to_multiple(y, self.stride)
        clean: Tensor = y - self.net(padded)[crop]
        return clean

    @torch.no_grad()
    def restore(self, inputs: Tensor, physics: Any = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Remove noise of whatever level; or, given physics, draw a picture that agrees with a measurement.

        Args:
            inputs: noisy pictures `[B, C, H, W]`, any height and width; or what `physics` measured.
            physics: linear, with `.A` and `.A_adjoint` such as deepinv's, without noise and of orthonormal rows: `Inpainting`,
                `Downsampling` without a filter, `sfumato.physics.BlockMean`, `FrequencyMask`.
            generator: source of the draws of a solution; None: seed 0.

        Returns:
            `[B, C, H, W]` in [0, 1].

        Raises:
            BadSetting: physics whose rows are not orthonormal, or with noise.
        """
        if physics is None:
            overlap = -(-self.reach // self.stride) * self.stride
            return tiled_apply(self.denoise, inputs, tile=max(512, 4 * overlap), overlap=overlap).clamp(0, 1)
        noise = type(getattr(physics, "noise_model", None)).__name__
        if noise not in ("NoneType", "ZeroNoise"):
            raise BadSetting(f"{noise}: this solver meets a measurement exactly, its noise too; noise alone needs no physics")
        back = physics.A_adjoint(inputs)
        if not torch.allclose(physics.A_adjoint(physics.A(back)), back, atol=1e-4):
            raise BadSetting(f"{type(physics).__name__} has no orthonormal rows (A Aᵀ = I), which this solver takes: scale it")
        return self._drawn(tuple(back.shape), generator or torch.Generator(self.device).manual_seed(0), physics, inputs)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` new pictures: `[n, C, H, W]` in [0, 1]."""
        return self._drawn((n, *self.shape), generator)

    def _drawn(
        self, shape: tuple[int, ...], generator: torch.Generator | None, physics: Any = None, measured: Tensor | None = None
    ) -> Tensor:
        device = generator.device if generator is not None else self.device
        start = self.config.mean + torch.randn(shape, generator=generator, device=device).to(self.device)
        return self.climb(self.denoise, start, generator, physics=physics, measured=measured).clamp(0, 1)

    def climb(
        self, denoiser: Callable[[Tensor], Tensor], start: Tensor, generator: torch.Generator | None, **given: Any
    ) -> Tensor:
        """`sample_blind` with the settings of this method."""
        c = self.config
        return sample_blind(
            denoiser, start, steps=c.sample_steps, h0=c.h0, beta=c.beta, sigma_end=c.sigma_end, generator=generator, **given
        )

    @torch.no_grad()
    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, with noise of deviation 0.3, without it again, and as many new ones."""
        noisy = batch.x + 0.3 * torch.randn(batch.x.shape, generator=generator, device=batch.x.device)
        rows = {"picture": batch.x, "noisy": noisy.clamp(0, 1), "denoised": self.denoise(noisy).clamp(0, 1)}
        return {**rows, "samples": self.sample(len(batch), generator)}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean PSNR in dB after removing noise of deviation 0.1 and 0.3, the same noise at every call."""
        generator, values = torch.Generator().manual_seed(0), []
        for batch in batches:
            z = torch.randn(batch.x.shape, generator=generator).to(batch.x)
            values.append(torch.stack([psnr(self.denoise(batch.x + s * z).clamp(0, 1), batch.x) for s in EVALUATED]))
        means = torch.cat(values, 1).mean(1).tolist() if values else ()
        return {f"psnr_{sigma:g}": mean for sigma, mean in zip(EVALUATED, means)}


# ---- the claim

_TINY: dict[str, Any] = {"channels": 1, "image_size": 16, "width": 16, "levels": 2, "batch_size": 16, "lr": 4e-3}
FEW, MANY, SIGMA = "4 pictures", "4,000 pictures", 0.3
PAIRS, DIVERGED = 24, 2.0
"""Pictures that both networks of a pair draw, and the noise level beyond which one is lost."""


@claim(
    "From 4 to 4,000 training pictures, two denoisers trained on disjoint sets become one function: they disagree by less than "
    "half as much beside their error, draw pairs that correlate, and copy less",
    Better("log2 disagreement", MANY, over=FEW, by=1.0, higher=False),
    Better("pair correlation", MANY, over=FEW, by=0.2),
    Better("closest-training correlation", MANY, over=FEW, higher=False),
    Better("train-test gap (dB)", MANY, over="limit", higher=False),
    Holds("f(c y) = c f(y) to 1e-4", lambda f: max(f[arm]["homogeneity error"] for arm in (FEW, MANY)) < 1e-4),
    Holds("with 4,000 pictures the symmetric part holds 90 % of the Jacobian", lambda f: f[MANY]["symmetric share"] >= 0.9),
    seeds=range(100, 105),
    note="Pictures of 16 x 16 pixels with a smooth contour between two smooth regions (C², a formula), near doubles taken out; "
    "U-Nets of width 16, 2,500 steps of 16 pictures; noise 0.3. Both networks of a pair start from other weights and see the "
    "same noise in the same order. Of 24 pairs of samples those are left out of which one diverges. The limit of the gap is "
    "0.3 dB. Pictures this small resemble each other, so the correlation with the closest of 4,000 stays high without copying: "
    "that of new pictures stands beside it. The symmetry of the Jacobian comes with training: 1,000 steps of 32 pictures at half "
    "the learning rate end at 87 to 90 %. Batch and rate were chosen by it on development seed 0. The networks come close to the "
    "best linear denoiser, the Wiener filter of the 4,000 pictures, and do not pass it.",
)
def one_function(lab: Lab) -> Figures:
    """Two networks on 4 pictures each, two on 4,000 each, compared on 1,000 others, none of which has a near double."""
    from sfumato.data import c_alpha_images

    drawn = c_alpha_images(10_000, 16, 2.0, generator=lab.generator)
    halves = drawn[distinct(drawn)][:9000].split([4000, 4000, 1000])
    test, figures = halves[2], Figures(limit={"train-test gap (dB)": 0.3})
    linear = wiener_filter(halves[0])(test + SIGMA * torch.randn(test.shape, generator=lab.generator), SIGMA)
    figures["Wiener filter"] = {"PSNR (dB)": float(-10 * (linear - test).square().mean().log10())}
    figures["new pictures"] = {"closest-training correlation": float(closest_correlation(test, halves[0]).mean())}
    for arm, count in ((FEW, 4), (MANY, 4000)):
        train, pair = (halves[0][:count], halves[1][:count]), []
        for i, own in enumerate(train):
            torch.manual_seed(2 * lab.seed + i)
            config = BlindDenoiser.Config.small(**_TINY, sample_steps=lab.steps(250))
            method = BlindDenoiser(config).to(memory_format=torch.channels_last)  # faster convolutions on a CPU
            pair.append(lab.fit(method, own, steps=lab.steps(2500)))
        figures[arm] = _compared(lab, arm, pair, train, test)
    return figures


def _compared(lab: Lab, arm: str, pair: list[BlindDenoiser], train: tuple[Tensor, Tensor], test: Tensor) -> dict[str, float]:
    """Agreement of two denoisers, what they remember, and how symmetric one's Jacobian is."""
    from sfumato.probes import agreement, denoiser_basis

    a, b = (method.denoise for method in pair)
    lost = torch.zeros(PAIRS, dtype=torch.bool)

    def draw(denoiser: Callable[[Tensor], Tensor], start: Tensor, generator: torch.Generator) -> Tensor:
        def watch(step: SamplerStep) -> None:
            lost.logical_or_(step.sigma > DIVERGED)

        return pair[0].climb(denoiser, start, generator, sigma_max=DIVERGED, callback=watch)

    found = agreement(a, b, test, SIGMA, samples=PAIRS, train=train, draw=draw, generator=lab.generator)
    z = torch.randn(test.shape, generator=lab.generator)
    with torch.no_grad():
        seen = train[0][torch.arange(len(test)) % len(train[0])]
        errors = [(a(x + SIGMA * z) - x).square().mean() for x in (seen, test)]
        y = test + SIGMA * z
        clean = a(y)
        homogeneity = (a(3 * y) - 3 * clean).norm() / (3 * clean).norm()
        copied = (clean - memoriser(train[0])(y, SIGMA)).square().mean() / (clean - test).square().mean()
    bases = [denoiser_basis(a, one) for one in y[: lab.steps(16)].split(1)]
    patterns = bases[0].vectors[:8]
    lab.picture(f"{arm}: drawn by A, by B, eigenvectors of A", torch.cat([*found.drawn[:, :8], _grey(patterns)]))
    lab.curve(arm, list(range(1, 257)), bases[0].values.tolist(), xlabel="rank", ylabel="eigenvalue of the Jacobian")
    return {
        "disagreement": float(found.disagreement), "log2 disagreement": float(found.disagreement.log2()),
        "pair correlation": float(found.pairs[~lost].mean()), "pairs left out": int(lost.sum()),
        "closest-training correlation": float(found.closest[:, ~lost].mean()),
        "train-test gap (dB)": float(10 * (errors[1] / errors[0]).log10()), "PSNR (dB)": float(-10 * errors[1].log10()),
        "homogeneity error": float(homogeneity), "distance to the memoriser": float(copied),
        "symmetric share": float(torch.stack([basis.symmetric_share for basis in bases]).mean()),
        "effective rank": float(torch.stack([basis.trace for basis in bases]).mean()),
    }  # fmt: skip


def _grey(patterns: Tensor) -> Tensor:
    """Patterns around mid grey, each over the whole range."""
    return 0.5 + patterns / (2 * patterns.flatten(1).abs().amax(1).view(-1, 1, 1, 1))
