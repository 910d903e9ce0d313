"""Hybrid distillation: one student of two teachers, a masked autoencoder for how tokens relate, a classifier for what they mean.

    L = α mean_layers [ KL(A_mim ‖ A) + KL(V_mim ‖ V) ] + β smoothL1( W z, whiten(z_cls) ),     α = β = 1
    A = softmax(q kᵀ / √d),  V = softmax(v vᵀ / √d) at the middle layers,   z the last patch tokens, W a linear projector

Teachers are frozen and see the whole picture. The student drops its most redundant tokens on the way (those most like all
others), a sixth of the patches before each third of its blocks; both losses count the tokens that are left. Afterwards it is a
plain ViT. `relation_teacher` and `feature_teacher` name models with the student's grid of patches (the first one also with its
width and depth): a run, `timm:NAME`, or `timm:NAME@FILE`. In Python, modules are given.

Source: "Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners", ICLR 2024, arXiv 2306.15876. Partly a
reconstruction, as no code was published and the formulas were not at hand. The paper's: two teachers, relations at middle
layers and not the last, features at the end, α = β = 1, redundant tokens dropped step by step, the two measures of attention.
Ours: the relations (as in TinyMIM), whitening and β of the features (as in feature distillation), which layers, the shares that
are dropped and by what score, the optimizer and its schedule.

>>> import torch
>>> from sfumato.papers.masking.hybrid_distill import HybridDistill
>>> from sfumato.papers.masking.mae import MAE
>>> mae, other = MAE(MAE.Config.small()), MAE(MAE.Config.small(dim=32, depth=1))
>>> student = HybridDistill(HybridDistill.Config.small(), relation_teacher=mae, feature_teacher=other)
>>> x = student.normalised(torch.rand(2, 3, 32, 32))
>>> relation, feature = student.distillation(x, torch.zeros(2, 64, dtype=torch.bool))
>>> relation.shape, feature.shape, student.encode(torch.rand(2, 3, 50, 70)).shape
(torch.Size([]), torch.Size([]), torch.Size([2, 64]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.claim import Better, Figures, Holds, Lab, claim
from sfumato.errors import BadSetting
from sfumato.losses import feature_distill, relation_kl, value_relation_kl
from sfumato.masks import as_views, count_hidden, fill, random_mask, redundant_tokens, take_tokens, to_ids, upsample_mask
from sfumato.method import Batch, Context, Loss, Method
from sfumato.nn import QKV, FrozenViT, MaskedViTEncoder, capture_qkv, regroup_heads
from sfumato.papers.masking.mae import MAE, SMALL_ENCODER, MaskedConfig, MaskedImageModel
from sfumato.probes import attention_distance, attention_nmi

ROLES = ("relation", "feature")


class StudentPass(NamedTuple):
    """What a pass of the student leaves behind.

    Args:
        patches: last patch tokens that were not dropped, `[B, n, D]`.
        ids: which patches these are, `[B, n]`, in raster order.
        relations: of each relation layer its queries, keys and values, and the patches that were there, `[B, n']`.
    """

    patches: Tensor
    ids: Tensor
    relations: dict[int, tuple[QKV, Tensor]]


class HybridDistill(MaskedImageModel):
    """A ViT that learns token relations from one frozen teacher and features from another.

    Args:
        relation_teacher: a model with a ViT of the same depth, width and grid, such as a trained `MAE`; None: the engine opens
            what the settings name, when it builds the method.
        feature_teacher: a model with a ViT of the same grid, such as a classifier; None: likewise.

    Raises:
        BadSetting: layers that the student has not, or a teacher that does not fit it.
    """

    class Config(MaskedConfig):
        """ViT-B from MAE and DeiT, 300 epochs of ImageNet-1k; the recipe is ours, the paper's is not known."""

        steps: int = Field(375_000, gt=0, description="optimizer steps; 300 epochs of ImageNet-1k")
        batch_size: int = Field(1024, gt=0, description="samples a step, over all micro-batches and processes")
        relation_teacher: str | None = Field(
            "timm:vit_base_patch16_224.mae", description="whose relations: a run, timm:NAME or timm:NAME@FILE"
        )
        feature_teacher: str | None = Field(
            "timm:deit_base_patch16_224.fb_in1k", description="whose features: a run, timm:NAME or timm:NAME@FILE"
        )
        relation_weight: float = Field(1.0, ge=0, description="α, weight of the relation loss; 0: that teacher is not needed")
        feature_weight: float = Field(1.0, ge=0, description="β, weight of the feature loss; 0: that teacher is not needed")
        relation_layers: tuple[int, ...] | None = Field(
            None, description="blocks whose relations are learned, from 0; None: the middle to the last but one, 5 to 10 of 12"
        )
        whiten: bool = Field(True, description="bring the teacher's features to mean 0 and variance 1")
        smooth_l1_beta: float = Field(2.0, gt=0, description="where the feature loss turns from quadratic to linear")
        drop_layers: tuple[int, ...] | None = Field(
            None, description="blocks before which redundant tokens are dropped; None: the first of each third"
        )
        drop_share: float = Field(1 / 6, ge=0, lt=1, description="share of all patches that is dropped each time")
        drop_path: float = Field(0.1, ge=0, lt=1, description="share of residual branches skipped at the last block")
        mask_ratio: float = Field(0.0, ge=0, le=1, description="share of the patches hidden from the student at random")
        betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's")
        warmup: float = Field(1 / 30, ge=0, lt=1, description="share of the steps over which the learning rate rises")
        relation_teacher_settings: dict[str, Any] | None = Field(None, description="how that teacher is built; fills itself in")
        feature_teacher_settings: dict[str, Any] | None = Field(None, description="how that teacher is built; fills itself in")

        @classmethod
        def small(cls, **over: Any) -> Self:
            """Minutes on a CPU: 32-pixel crops, 64 patches; the teachers must be named, such as runs of mae and classifier."""
            teachers = {"relation_teacher": None, "feature_teacher": None}
            return cls(**{**SMALL_ENCODER, **teachers, "drop_path": 0.0, "warmup": 0.05, **over})

    def __init__(
        self, config: Any = None, *, relation_teacher: nn.Module | None = None, feature_teacher: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        c = self.config
        self.encoder = MaskedViTEncoder(
            c.image_size, c.patch, self.channels, c.dim, c.depth, c.heads, mlp_ratio=c.mlp_ratio, drop_path=c.drop_path
        )
        middle = range(max(0, c.depth // 2 - 1), max(1, c.depth - 1))
        self.relation_layers = tuple(middle) if c.relation_layers is None else c.relation_layers
        thirds = sorted({0, c.depth // 3, 2 * c.depth // 3})
        self.drop_layers = tuple(thirds) if c.drop_layers is None else c.drop_layers
        if wrong := [i for i in (*self.relation_layers, *self.drop_layers) if not 0 <= i < c.depth]:
            raise BadSetting(
                f"there is no layer {wrong[0]} to learn relations or drop tokens at: depth={c.depth} has 0 to {c.depth - 1}"
            )
        if c.relation_weight and not self.relation_layers:
            raise BadSetting("relation_layers is empty: name a layer, or set relation_weight=0")
        self.teachers = nn.ModuleDict()
        for role, given in zip(ROLES, (relation_teacher, feature_teacher)):
            settings = getattr(c, f"{role}_teacher_settings")
            if given is not None or settings is not None:
                self.take(role, FrozenViT(settings) if given is None else FrozenViT.of(given))

    # ---- teachers

    def take(self, role: str, teacher: FrozenViT) -> None:
        """Learn from a teacher from now on, and note in the settings how it is built.

        Args:
            role: "relation" or "feature".
            teacher: see `FrozenViT.of`.

        Raises:
            BadSetting: a teacher that does not fit the student.
        """
        wanted: dict[str, Any] = {"grid": tuple(self.encoder.grid)}
        found: dict[str, Any] = {"grid": tuple(teacher.grid)}
        if role == "relation":
            wanted |= {"depth": self.config.depth, "dim": self.config.dim, "class token": True}
            found |= {"depth": len(teacher.vit.blocks), "dim": teacher.dim, "class token": teacher.prefix > 0}
        if unlike := [k for k in wanted if wanted[k] != found[k]]:
            told = ", ".join(f"{k} {found[k]}, the student {wanted[k]}" for k in unlike)
            raise BadSetting(f"the {role} teacher does not fit: it has {told}; set the student alike, or take another teacher")
        if teacher.channels != self.channels != 1:
            raise BadSetting(f"the {role} teacher takes {teacher.channels} channels, the pictures have {self.channels}")
        self.teachers[role] = teacher
        if role == "feature":
            self.projector = nn.Linear(self.config.dim, teacher.dim)
        kind = type(self.config)
        self.config = kind.model_validate({**self.config.model_dump(), f"{role}_teacher_settings": teacher.settings})

    def adopt(self, open_model: Callable[[str], nn.Module]) -> None:
        """Open the teachers that the settings name.

        Raises:
            BadSetting: a teacher that is not named and was not given, or one that does not fit.
        """
        for role in ROLES:
            word = getattr(self.config, f"{role}_teacher")
            if not getattr(self.config, f"{role}_weight"):
                continue
            if word is not None:
                self.take(role, FrozenViT.of(open_model(word)))
            elif role not in self.teachers or not self._teacher(role).trained:
                example = "MAE_RUN" if role == "relation" else "CLASSIFIER_RUN"
                raise BadSetting(
                    f"{role}_teacher is not named: say {role}_teacher={example}, the folder of a trained vision transformer's "
                    f"run, or timm:NAME; {role}_weight=0 does without"
                )

    @classmethod
    def init_from(cls, config: Any, previous: Method) -> Self:
        """Start with the encoder of another masked model; of another student, also with its teachers where none are named."""
        passed_on = []
        if isinstance(previous, HybridDistill):
            passed_on = [role for role in previous.teachers if getattr(config, f"{role}_teacher") is None]
            settings = {f"{role}_teacher_settings": previous.teachers[role].settings for role in passed_on}
            config = type(config).model_validate({**config.model_dump(), **settings})
        method = super().init_from(config, previous)
        for role in passed_on:
            method._teacher(role).trained = True
        return method

    # ---- training

    def own_mask(self, x: Tensor, generator: torch.Generator, progress: float = 1.0) -> Tensor:
        """Nothing is hidden, unless `mask_ratio` says so: then tokens that the student never sees, uniformly random."""
        return random_mask(len(x), self.encoder.grid, self.config.mask_ratio, generator=generator)

    def patch_errors(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Of no use here.

        Raises:
            BadSetting: always.
        """
        raise BadSetting("mask=hard asks for errors of pixels, and this student predicts none: take another mask")

    def student(self, x: Tensor, hidden: Tensor) -> StudentPass:
        """Run the student, dropping redundant tokens on the way.

        Args:
            x: normalised images `[B, C, H, W]`.
            hidden: patches left out from the start, `[B, L]` bool.
        """
        encoder, (ids, _) = self.encoder, to_ids(hidden)
        drop = count_hidden(hidden.shape[1], self.config.drop_share, rule="hide_floor")
        z, there = encoder.tokens(x, hidden), {}
        with capture_qkv(encoder, self.relation_layers) as seen:
            for layer, block in enumerate(encoder.blocks):
                if drop and layer in self.drop_layers:
                    kept = redundant_tokens(z, max(0, min(drop, ids.shape[1] - 1)), protect=1)
                    z, ids = take_tokens(z, kept), ids.gather(1, kept[:, 1:] - 1)
                there[layer] = ids
                z = block(z)
        return StudentPass(encoder.norm(z)[:, 1:], ids, {i: (qkv, there[i]) for i, qkv in seen.items()})

    def distillation(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Relation and feature loss, without their weights; 0 where the weight is.

        Args:
            x: normalised images `[B, C, H, W]`.
            hidden: patches left out from the start, `[B, L]` bool.

        Raises:
            BadSetting: a teacher is missing.
        """
        c, picture, student = self.config, x * self.std + self.mean, self.student(x, hidden)
        relation = feature = x.new_zeros(())
        if c.relation_weight:
            teacher = self._teacher("relation")
            theirs = teacher.relations(picture, self.relation_layers)
            losses = [self._relation(own, theirs[i], ids, teacher.prefix) for i, (own, ids) in student.relations.items()]
            relation = torch.stack(losses).mean()
        if c.feature_weight:
            target = take_tokens(self._teacher("feature")(picture), student.ids)
            feature = feature_distill(self.projector(student.patches), target, whiten=c.whiten, beta=c.smooth_l1_beta)
        return relation, feature

    def masked_loss(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Both losses, weighed."""
        relation, feature = self.distillation(x, hidden)
        return self.config.relation_weight * relation + self.config.feature_weight * feature

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Both losses on held-out pictures."""
        generator, sums, count = torch.Generator(self.device).manual_seed(0), torch.zeros(2), 0
        for batch in batches:
            x = self.normalised(self.to_size(batch.x))
            hidden = self.evaluation_mask(x, generator)
            sums += len(batch) * torch.stack(self.distillation(as_views(x, hidden), hidden)).cpu()
            count += len(batch)
        return dict(zip(("relation_loss", "feature_loss"), (sums / count).tolist())) if count else {}

    @torch.no_grad()
    def preview(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, and what the student keeps of them to its last block."""
        picture = self.to_size(batch.x)
        x = self.normalised(picture)
        hidden = self.mask(x, generator)[: len(x)]
        dropped = torch.ones_like(hidden).scatter_(1, self.student(x, hidden).ids, False)
        pixels = upsample_mask(dropped, self.encoder.grid, self.config.patch)
        return {"picture": picture, "kept": fill(picture, pixels, how="color", value=0.5)}

    def _teacher(self, role: str) -> FrozenViT:
        if role not in self.teachers:
            raise BadSetting(f"the {role} teacher is missing: give HybridDistill(config, {role}_teacher=MODULE)")
        return self.teachers[role]  # type: ignore[return-value]

    @staticmethod
    def _relation(own: QKV, theirs: QKV, ids: Tensor, prefix: int) -> Tensor:
        """KL of both relations over the class token and the patches `ids` `[B, n]`: gathered before any softmax."""
        rows = F.pad(ids + prefix, (1, 0))[:, None, :, None]  # the class token is the teacher's token 0
        q_t, k_t, v_t = (torch.take_along_dim(t, rows, 2) for t in theirs)
        q, k, v = (regroup_heads(t, q_t.shape[1]) for t in own)
        return relation_kl(q, k, q_t, k_t) + value_relation_kl(v, v_t)


# ---- the claim


class _Supervised(MaskedImageModel):
    """A ViT and a linear layer that learn the labels of digits: the claim's second teacher."""

    needs = ("x", "label")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        c = self.config
        self.encoder = MaskedViTEncoder(c.image_size, c.patch, self.channels, c.dim, c.depth, c.heads, mlp_ratio=c.mlp_ratio)
        self.head = nn.Linear(c.dim, 10)

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        """Cross-entropy."""
        assert batch.label is not None
        return Loss(F.cross_entropy(self.head(self.encode(batch.x)), batch.label), len(batch))


@claim(
    "A student of a masked autoencoder and a classifier takes the classes from one and the varied attention from the other",
    Better("probe", "hybrid", over="MAE teacher plus 3 points"),
    Better("probe", "hybrid", over="features only less 2 points"),
    Better("probe", "hybrid", over="relations only"),
    Better("NMI", "hybrid", over="1.5 times features only"),
    Holds("the MAE teacher's NMI is 1.5 times the supervised one's in a relation layer", lambda f: f["hybrid"]["layers"] >= 1),
    seeds=range(100, 105),
    note="Students see no labels. Probe: logistic regression on averaged patch tokens. NMI: of query and key, in the relation "
    "layers where the MAE teacher's is at least 1.5 times the supervised teacher's. That teacher learns at a quarter of the "
    "others' rate (5e-4): at the same rate its attention is about as varied as the MAE's.",
)
def two_teachers(lab: Lab) -> Figures:
    """Digits 8 x 8, 2-pixel patches; teachers of 300 (labels) and 600 steps (MAE), students of 300, alike but for the weights."""
    from sfumato.data import digits
    from sfumato.probes import extract_features, linear_probe

    train, test = digits(seed=lab.seed)
    assert train.label is not None and test.label is not None  # noqa: PT018
    seen, unseen = train.x[: lab.steps(1300)], test.x[: lab.steps(497)]
    labels = train.label[: len(seen)], test.label[: len(unseen)]
    shape = {"image_size": 8, "patch": 2, "channels": 1, "depth": 4, "crop_scale": None, "flip": False}
    torch.manual_seed(lab.seed)
    gently = MaskedConfig(**{**SMALL_ENCODER, **shape, "base_lr": 2e-3})  # a peak of 5e-4
    supervised = lab.fit(_Supervised(gently), train, steps=lab.steps(300))
    mae = lab.fit(MAE(MAE.Config.small(**shape, mask_ratio=0.6, norm_pix=False)), train.x, steps=lab.steps(600))

    def student(relation: float, feature: float) -> HybridDistill:
        torch.manual_seed(lab.seed)  # the same first weights
        config = HybridDistill.Config.small(**shape, relation_weight=relation, feature_weight=feature)
        return HybridDistill(config, relation_teacher=mae, feature_teacher=supervised)

    models = {"supervised teacher": supervised, "MAE teacher": mae, "untrained": student(0, 0)}
    for arm, weights in {"features only": (0.0, 1.0), "relations only": (1.0, 0.0), "hybrid": (1.0, 1.0)}.items():
        models[arm] = lab.fit(student(*weights), train.x, steps=lab.steps(300))
    looks = {arm: attention_of(model, unseen) for arm, model in models.items()}
    for arm, (_, nmi) in looks.items():
        lab.curve(arm, range(1, 5), nmi.tolist(), xlabel="layer", ylabel="NMI of query and key")
    relation_layers = list(models["hybrid"].relation_layers)
    judged = [i for i in relation_layers if looks["MAE teacher"][1][i] >= 1.5 * looks["supervised teacher"][1][i]]
    figures: Figures = {}
    for arm, model in models.items():
        distance, nmi = looks[arm]
        known, unknown = extract_features(model, seen), extract_features(model, unseen)
        figures[arm] = {
            "probe": linear_probe(known, labels[0], test=(unknown, labels[1])),
            "NMI": float(nmi[judged or relation_layers].mean()),
            "NMI of all layers": float(nmi.mean()),
            "spread of distances": float(distance.std()),
        }
    figures["hybrid"]["layers"] = len(judged)
    bounds = {
        "MAE teacher plus 3 points": {"probe": figures["MAE teacher"]["probe"] + 0.03},
        "features only less 2 points": {"probe": figures["features only"]["probe"] - 0.02},
        "1.5 times features only": {"NMI": 1.5 * figures["features only"]["NMI"]},
    }
    return figures | bounds


@torch.no_grad()
def attention_of(model: MaskedImageModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """How a model's heads look at pictures `[N, C, H, W]`: mean distance `[layers, heads]` in pixels, and mean NMI `[layers]`."""
    encoder = model.eval().encoder
    with capture_qkv(encoder) as seen:
        encoder(model.normalised(x))
    maps = [seen[i].attention() for i in range(len(encoder.blocks))]
    distances = [attention_distance(a, encoder.grid, encoder.patch).mean(0) for a in maps]
    return torch.stack(distances), torch.stack([attention_nmi(a).mean() for a in maps])
