"""MTO: mask tokens that stay unlike the data, and visible tokens that do not draw on empty ones. For SimMIM and for MAE.

    L = L_base + λ_e Σ_l γ^l (1 - H^l) / Σ_l γ^l + λ_s E[entropy of A_i] + λ_r E[Σ_{j hidden} A_ij]       over visible queries i
    H^l  heterogeneity of hidden tokens at the input of block l (`token_heterogeneity`)
    A    attention of the first half of the blocks, in which a visible query sees only the share ρ of the hidden keys that it
         weighs most

For SimMIM this is the encoder, for MAE the decoder: wherever mask tokens meet others. Afterwards the network is as it was before.

Source: "Emerging Property of Masked Token for Effective Pre-training", ECCV 2024, arXiv 2404.08330. A reconstruction: the three
properties of a mask token, that heterogeneity is measured by an entropy, the purposes of the losses and the constraint
by depth are the paper's; every closed form and all weights are ours, since neither code nor formulas were at hand. A claim that
fails here refutes the reconstruction.

>>> import torch
>>> from sfumato.papers.masking.mto import MTO
>>> model = MTO(MTO.Config.small(depth=2))
>>> x = torch.rand(2, 3, 32, 32)
>>> hidden = model.mask(x, torch.Generator().manual_seed(0))
>>> [h.shape for h in model.heterogeneity_profile(x, hidden)]  # input, and after either block
[torch.Size([2]), torch.Size([2]), torch.Size([2])]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.losses import attention_entropy, attention_mass
from sfumato.method import Context, Result, Step
from sfumato.nn import run_blocks
from sfumato.papers.masking.mae import MAE, MaskedImageModel
from sfumato.papers.masking.simmim import SimMIM
from sfumato.probes import token_heterogeneity


def mask_token_singularity(layers: Sequence[Tensor], mask: Tensor, *, decay: float = 0.5, tau: float = 0.1) -> Tensor:
    """How little hidden tokens stand apart from visible ones, early layers above all: `Σ γ^l (1 - H^l) / Σ γ^l`.

    Args:
        layers: tokens `[B, N, D]` of layer 0, 1, ...
        mask: `[B, N]` bool, True = hidden.
        decay: γ, from 0 (layer 0 alone) to 1.
        tau: temperature of the likeness.

    Returns:
        A scalar from 0 (no hidden token resembles any visible one more than others) to 1.
    """
    weights = [decay**number for number in range(len(layers))]
    lost = [w * (1 - token_heterogeneity(z, mask, tau=tau).mean()) for w, z in zip(weights, layers, strict=True)]
    return torch.stack(lost).sum() / sum(weights)


def recalibrate_attention(
    logits: Tensor,
    mask: Tensor,
    *,
    keep: float = 0.5,
    count: int | None = None,
    at_random: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A bias that lets visible queries see only those hidden keys that they weigh most; hidden queries see all.

    Args:
        logits: `[B, heads, N, N]`, scores before the softmax.
        mask: `[B, N]` bool, True = hidden, equally many in each row.
        keep: ρ, the share of the hidden keys that a visible query keeps (rounded up), 0 to 1.
        count: hidden tokens of a row, for a caller who has counted them; None: counted here, which waits for the device.
        at_random: keep as many, drawn uniformly: the control that tells selection from dropout.
        generator: for `at_random`; None: the default one.

    Returns:
        `[B, heads, N, N]`, 0 or -inf, to be added to the scores (or `attn_mask` of `scaled_dot_product_attention`). No gradient.
    """
    kept = math.ceil(keep * (int(mask[0].sum()) if count is None else count))
    scores = torch.rand(logits.shape, device=logits.device, generator=generator) if at_random else logits.detach()
    keys = mask[:, None, None].expand_as(logits)
    best = scores.masked_fill(~keys, -torch.inf).topk(kept, -1, sorted=False).indices
    dropped = keys.scatter(-1, best, torch.zeros_like(best, dtype=torch.bool)) & ~mask[:, None, :, None]
    return torch.zeros_like(logits).detach().masked_fill_(dropped, -torch.inf)


class _Pass(NamedTuple):
    """What a pass through blocks with mask tokens left behind; `hidden` and all tokens include the class token.

    `maps` is empty where no term reads the attention.
    """

    tokens: Tensor
    layers: list[Tensor]
    maps: list[Tensor]
    hidden: Tensor


class MTO(MaskedImageModel):
    """SimMIM or MAE, with mask tokens kept singular and attention recalibrated."""

    class Config(SimMIM.Config):
        """SimMIM's recipe; MAE's is `Config.mae()`."""

        base: Literal["simmim", "mae"] = Field(
            "simmim", description="what it is added to: SimMIM's encoder, or MAE's decoder (its recipe: MTO.Config.mae())"
        )
        singularity: float = Field(0.1, ge=0, description="λ_e, weight of the singularity of mask tokens")
        sparsity: float = Field(0.01, ge=0, description="λ_s, weight of the entropy of visible tokens' attention")
        leak: float = Field(0.01, ge=0, description="λ_r, weight of the attention that visible tokens give to hidden ones")
        decay: float = Field(0.5, ge=0, le=1, description="γ, how fast the singularity's weight falls with depth")
        tau: float = Field(0.1, gt=0, description="temperature of the likeness of tokens")
        keep: float = Field(0.5, ge=0, le=1, description="ρ, share of the hidden keys that visible queries keep; 1: all")
        exclusion: Literal["weakest", "random"] = Field(
            "weakest", description="which hidden keys are left out; random: a control"
        )
        decoder_dim: int = Field(512, gt=0, description="width of MAE's decoder")
        decoder_depth: int = Field(8, gt=0, description="blocks of MAE's decoder")
        decoder_heads: int = Field(16, gt=0, description="attention heads of MAE's decoder")
        norm_pix: bool = Field(True, description="predict pixels normalised within each patch (MAE)")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """The CPU preset of both bases."""
            return super().small(**{"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 4, **over})

        @classmethod
        def mae(cls, **over: Any) -> Self:
            """MAE's recipe: 800 epochs of ImageNet-1k at its ratio, rate and crop. What MAE has not is as by default, unused."""
            return cls(**{**MAE.Config().model_dump(), "base": "mae", **over})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        kind: Any = {"simmim": SimMIM, "mae": MAE}[self.config.base]
        given = self.config.model_dump()
        self.base: Any = kind(kind.Config(**{name: given[name] for name in kind.Config.model_fields if name in given}))

    @property
    def encoder(self) -> Any:  # type: ignore[override]
        """The base's encoder."""
        return self.base.encoder

    @property
    def core(self) -> nn.Module:
        """The base: a run of SimMIM or MAE starts all of it, and is started by it."""
        return self.base

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """The base's."""
        mask: Tensor = self.base.own_mask(x, generator, progress)
        return mask

    def lr_factor(self, progress: float) -> float:
        """The base's."""
        factor: float = self.base.lr_factor(progress)
        return factor

    # ---- the pass that is watched

    def watched(self, x: Tensor, hidden: Tensor) -> _Pass:
        """Through the blocks in which mask tokens stand, from normalised images `[B, C, H, W]`."""
        base, bias = self.base, None
        if self.config.base == "simmim":
            z, bias = base.encoder.embed(x, hidden, mask_token=base.mask_token)
            blocks = base.encoder.blocks
        else:
            z, blocks = base.decoder.tokens(base.encoder(x, hidden), hidden), base.decoder.blocks
        everywhere = F.pad(hidden, (z.shape[1] - hidden.shape[1], 0))
        c, half = self.config, math.ceil(len(blocks) / 2)
        change = self._recalibration(everywhere) if c.keep < 1 else None
        reads = bool(c.sparsity or c.leak)  # if not, attention without recalibration stays fused
        first, early, maps = run_blocks(blocks[:half], z, bias=bias, adjust=change, layers=True, attention=reads)
        last, late, _ = run_blocks(blocks[half:], first, bias=bias, layers=True)
        return _Pass(last, [z, *early, *late], maps, everywhere)

    def _recalibration(self, hidden: Tensor) -> Any:
        c, count = self.config, int(hidden[0].sum())  # once a step, for all blocks

        def change(_number: int, scores: Tensor) -> Tensor:
            return scores + recalibrate_attention(scores, hidden, keep=c.keep, count=count, at_random=c.exclusion == "random")

        return change

    def penalties(self, seen: _Pass, hidden: Tensor) -> dict[str, Tensor]:
        """Those of `singularity`, `sparsity` and `leak` that have a weight, before it."""
        c, visible = self.config, ~seen.hidden
        terms: dict[str, Tensor] = {}
        if c.singularity:
            patches = [z[:, z.shape[1] - hidden.shape[1] :] for z in seen.layers[:-1]]
            terms["singularity"] = mask_token_singularity(patches, hidden, decay=c.decay, tau=c.tau)
        if c.sparsity:
            terms["sparsity"] = torch.stack([attention_entropy(a, rows=visible, normalize=True) for a in seen.maps]).mean()
        if c.leak:
            terms["leak"] = torch.stack([attention_mass(a, seen.hidden, rows=visible) for a in seen.maps]).mean()
        return terms

    @torch.no_grad()
    def heterogeneity_profile(self, x: Tensor, hidden: Tensor) -> list[Tensor]:
        """H of normalised images at the input and after each block, `[B]` each."""
        layers = self.watched(x, hidden).layers
        return [token_heterogeneity(z[:, z.shape[1] - hidden.shape[1] :], hidden, tau=self.config.tau) for z in layers]

    # ---- losses and predictions

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The base's loss, and the three terms by their weights."""
        seen = self.watched(x, hidden)
        loss: Tensor = self.base.loss_of_prediction(self._read(seen), x, hidden)
        for name, term in self.penalties(seen, hidden).items():
            loss = loss + getattr(self.config, name) * term
        return loss

    def predict_image(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The base's reading of the same pass."""
        image: Tensor = self.base.image_of_prediction(self._read(self.watched(x, hidden)), x)
        return image

    def _read(self, seen: _Pass) -> Tensor:
        """What the base predicts from the last tokens: an image (SimMIM), or numbers of every patch (MAE)."""
        base, patches = self.base, seen.tokens[:, -math.prod(self.base.encoder.grid) :]
        if self.config.base == "simmim":
            return base.head(base.encoder.norm(patches), grid=base.encoder.grid)  # type: ignore[no-any-return]
        return base.decoder.head(base.decoder.norm(patches))  # type: ignore[no-any-return]


def relative_auc(curve: Sequence[float], baseline: Sequence[float], floor: float, x: Sequence[float] | None = None) -> float:
    """RAUC: the area of a learning curve above where it began (or above chance), over that of a baseline's (our definition).

    Args:
        curve: figures of the method, the larger the better.
        baseline: figures of the baseline, at the same places.
        floor: the figure before training, or that of a guess.
        x: places; None: evenly spaced.

    Returns:
        Above 1: faster than the baseline; NaN where the baseline's area is 0.

    >>> relative_auc([0.5, 1.0], [0.25, 0.5], 0.0)
    2.0
    """
    places = torch.arange(len(curve), dtype=torch.float64) if x is None else torch.tensor(list(x), dtype=torch.float64)
    area = [float(torch.trapezoid(torch.tensor(list(c), dtype=torch.float64) - floor, places)) for c in (curve, baseline)]
    return area[0] / area[1] if area[1] else math.nan


# ---- the claims

MARKS = (50, 100, 200, 400)
CHANCE = 0.1
"""Accuracy of a guess among ten digits."""
SETTINGS: dict[str, Any] = {
    "image_size": 8, "patch": 2, "mask_unit": 2, "channels": 1, "depth": 4, "mask_ratio": 0.6, "positions": "sincos",
    "crop_scale": None, "flip": False,
}  # fmt: skip
NOTHING: dict[str, Any] = {"singularity": 0.0, "sparsity": 0.0, "leak": 0.0, "keep": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "SimMIM": NOTHING,
    "singularity alone": {**NOTHING, "singularity": 0.1},
    "recalibration alone": {**NOTHING, "keep": 0.5},
    "MTO": {},
    "random exclusion": {"exclusion": "random"},
}


class _Marked(MTO):
    """Keeps its weights after the steps of `marks`."""

    marks: tuple[int, ...] = ()

    def steps(self, ctx: Context) -> Generator[Step, Result, None]:
        """MTO's step, then a copy at a mark."""
        yield from super().steps(ctx)
        if ctx.step + 1 in self.marks:
            self.__dict__.setdefault("kept", {})[ctx.step + 1] = copy.deepcopy(self.state_dict())


def _trained(lab: Lab, arm: str, x: Tensor) -> dict[int, MTO]:
    """The models of an arm at the marks, and untrained at 0; all arms start alike."""
    steps = [lab.steps(mark) for mark in MARKS]
    torch.manual_seed(lab.seed)
    model = _Marked(MTO.Config.small(**{**SETTINGS, **ARMS[arm]}))
    model.marks = tuple(steps)
    start = copy.deepcopy(model.state_dict())
    lab.fit(model, x, steps=steps[-1])
    found: dict[int, MTO] = {}
    for mark, state in zip((0, *MARKS), (start, *(model.__dict__["kept"][s] for s in steps)), strict=True):
        found[mark] = MTO(model.config).eval()
        found[mark].load_state_dict(state)
    return found


@claim(
    "With masked-token optimisation half the steps make as good an encoder as all of SimMIM's",
    Better("accuracy", "MTO, half the steps", over="SimMIM"),
    Better("RAUC of the error", "MTO", over="SimMIM"),
    seeds=range(100, 105),
    note="A reconstruction: a failure refutes our formulas, not the paper. Accuracy: 100 labels, 150 steps of fine-tuning. "
    "RAUC: an area over the steps, over SimMIM's (1 for itself): of how far the error of hidden pixels has fallen, and of a "
    "linear probe's accuracy above chance. The latter is shown, not judged: at first training lowers it. A step of MTO takes "
    "longer: equal steps favour it.",
)
def half_the_steps(lab: Lab) -> Figures:
    """400 steps on digits 8 x 8, 2-pixel patches, 60 % hidden; looked at after 50, 100, 200 and 400."""
    from sfumato.data import digits
    from sfumato.probes import extract_features, finetune_probe, linear_probe

    train, test = digits(seed=lab.seed)
    assert train.label is not None and test.label is not None  # noqa: PT018
    plain = SimMIM(SimMIM.Config.small(**SETTINGS)).eval()
    x = plain.normalised(test.x)
    hidden = plain.mask(x, torch.Generator().manual_seed(lab.seed))
    figures: Figures = {}
    errors: dict[str, list[float]] = {}
    probes: dict[str, list[float]] = {}
    for arm in ARMS:
        models = _trained(lab, arm, train.x)
        with torch.no_grad():
            errors[arm] = [float(m.base.loss_of_prediction(m._read(m.watched(x, hidden)), x, hidden)) for m in models.values()]
        features = [[extract_features(m, data) for data in (train, test)] for m in models.values()]
        probes[arm] = [linear_probe(known, train.label, test=(unknown, test.label)) for known, unknown in features]
        looked_at = {0: "untrained", 400: arm}
        if arm in ("SimMIM", "MTO"):
            looked_at[200] = f"{arm}, half the steps"
        for (mark, model), probe in zip(models.items(), probes[arm], strict=True):
            name = looked_at.get(mark, "")
            if name and name not in figures:
                tuned = finetune_probe(model, train, test=test, steps=lab.steps(150), generator=lab.generator)
                figures[name] = {"accuracy": tuned, "linear probe": probe}
        fall, base_fall = ([-e for e in errors[a][1:]] for a in (arm, "SimMIM"))
        figures[arm] |= {
            "hidden error": errors[arm][-1],
            "RAUC of the error": relative_auc(fall, base_fall, -errors["SimMIM"][0], MARKS),
            "RAUC of the probe": relative_auc(probes[arm][1:], probes["SimMIM"][1:], CHANCE, MARKS),
        }
        lab.curve(arm, [0, *MARKS], errors[arm], xlabel="steps", ylabel="error of hidden pixels")
        lab.curve(arm, [0, *MARKS], probes[arm], xlabel="steps", ylabel="accuracy of a linear probe")
    return figures


@claim(
    "In a trained SimMIM mask tokens come to resemble visible ones in the middle layers; the singularity loss keeps them apart",
    Holds(
        "without it, heterogeneity is lower after some block than at the input",
        lambda f: min(value for name, value in f["SimMIM"].items() if name != "H0") < f["SimMIM"]["H0"],
    ),
    Holds(
        "with it, heterogeneity is higher at the input and after the first block",
        lambda f: all(f["singularity alone"][h] > f["SimMIM"][h] for h in ("H0", "H1")),
    ),
    seeds=range(100, 105),
    note="A reconstruction of what the paper shows by a figure: its measure is an entropy, the formula is ours.",
)
def profile(lab: Lab) -> Figures:
    """The two networks after 400 steps on digits; held-out digits under masks that are the same for both."""
    from sfumato.data import digits

    train, test = digits(seed=lab.seed)
    figures: Figures = {}
    for arm in ("SimMIM", "singularity alone"):
        model = _trained(lab, arm, train.x)[MARKS[-1]]
        x = model.normalised(test.x)
        layers = model.heterogeneity_profile(x, model.mask(x, torch.Generator().manual_seed(lab.seed)))
        figures[arm] = {f"H{number}": float(h.mean()) for number, h in enumerate(layers)}
        lab.curve(arm, range(len(layers)), list(figures[arm].values()), xlabel="block", ylabel="heterogeneity")
    return figures
