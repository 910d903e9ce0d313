"""A training step of a masked autoencoder, and what its masks cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Heat, Run, race
from sfumato.masks import NoiseBank, hard_mask, random_mask
from sfumato.papers.masking.mae import MAE

SIZES = {"image_size": 96, "patch": 8, "dim": 192, "depth": 6, "heads": 3, "decoder_dim": 128, "decoder_depth": 2}
QUICK = {"image_size": 32, "patch": 8, "dim": 48, "depth": 2, "heads": 3, "decoder_dim": 32, "decoder_depth": 1}
HEADS = 4
"""Attention heads of the decoders."""


def our_model(sizes: dict[str, int]) -> MAE:
    """The same weights every time."""
    torch.manual_seed(0)
    return MAE(MAE.Config(channels=3, decoder_heads=HEADS, **sizes))


class Lightly(nn.Module):
    """MAE as in lightly's example, from its parts."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
        from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        s, self.patch = sizes, sizes["patch"]
        vit = VisionTransformer(s["image_size"], self.patch, 3, 0, "", s["dim"], s["depth"], s["heads"])
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.backbone.mask_token.requires_grad_(False)  # MAE drops tokens, so it has no use
        self.length = self.backbone.sequence_length
        self.embed = nn.Linear(s["dim"], s["decoder_dim"])
        self.decoder = MaskedVisionTransformerDecoderTIMM(self.length - 1, s["decoder_dim"], s["decoder_depth"], HEADS)
        self.predict = nn.Linear(s["decoder_dim"], 3 * self.patch**2)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        from lightly.models import utils

        if hidden is None:
            keep, masked = utils.random_token_mask((len(x), self.length), 0.75)
        else:
            order = nn.functional.pad(hidden, (1, 0)).int().argsort(stable=True, dim=1)
            visible = self.length - int(hidden[0].sum())
            keep, masked = order[:, :visible], order[:, visible:]
        tokens = self.embed(self.backbone.encode(images=x, idx_keep=keep))
        filled = utils.repeat_token(self.decoder.mask_token, (len(x), self.length))
        filled = utils.set_at_index(filled, keep, tokens.type_as(filled))
        decoded = self.decoder.decode(self.decoder.add_pos_embed(filled))
        predicted = self.predict(utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(x, self.patch), masked - 1)
        return nn.functional.mse_loss(predicted, utils.normalize_mean_var(target))


def lightly_model(sizes: dict[str, int]) -> Lightly:
    """Lightly's parts with our weights."""
    ours, model = our_model(sizes), Lightly(sizes)
    encoder, decoder = ours.encoder.state_dict(), ours.decoder.state_dict()
    copy_into(model.backbone.vit, encoder, "pos_embed")
    copy_into(model.embed, {k[6:]: v for k, v in decoder.items() if k.startswith("embed.")})
    copy_into(model.predict, {k[5:]: v for k, v in decoder.items() if k.startswith("head.")})
    copy_into(model.decoder, {k: v for k, v in decoder.items() if k.startswith(("blocks.", "norm.", "mask_token"))}, "pos_embed")
    return model


class Transformers(nn.Module):
    """ViTMAEForPreTraining behind the call of the others."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        s = sizes
        config = ViTMAEConfig(
            hidden_size=s["dim"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"], intermediate_size=4 * s["dim"],
            image_size=s["image_size"], patch_size=s["patch"], layer_norm_eps=1e-6, norm_pix_loss=True, mask_ratio=0.75,
            decoder_hidden_size=s["decoder_dim"], decoder_num_hidden_layers=s["decoder_depth"],
            decoder_num_attention_heads=HEADS, decoder_intermediate_size=4 * s["decoder_dim"],
        )  # fmt: skip
        self.net = ViTMAEForPreTraining(config)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        loss: Tensor = self.net(x, noise=None if hidden is None else hidden.float()).loss
        return loss


def transformers_model(sizes: dict[str, int]) -> Transformers:
    """ViTMAE with our weights: other names, and one matrix each for queries, keys and values."""
    ours, model = our_model(sizes), Transformers(sizes)
    names = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    state: dict[str, Tensor] = {}
    for part, prefix in ((ours.encoder, "vit.layers"), (ours.decoder, "decoder.decoder_layers")):
        for i, block in enumerate(part.blocks):
            weights = block.state_dict()
            for kind in ("weight", "bias"):
                state |= {f"{prefix}.{i}.{theirs}.{kind}": weights[f"{name}.{kind}"] for name, theirs in names.items()}
                for name, value in zip("qkv", weights[f"attn.qkv.{kind}"].chunk(3)):
                    state[f"{prefix}.{i}.attention.{name}_proj.{kind}"] = value
    singles = {
        "vit.embeddings.patch_embeddings.projection": ours.encoder.patch_embed.proj, "vit.layernorm": ours.encoder.norm,
        "decoder.decoder_embed": ours.decoder.embed, "decoder.decoder_norm": ours.decoder.norm,
        "decoder.decoder_pred": ours.decoder.head,
    }  # fmt: skip
    state |= {f"{name}.{kind}": value for name, module in singles.items() for kind, value in module.state_dict().items()}
    state |= {"vit.embeddings.cls_token": ours.encoder.cls_token.data, "decoder.mask_token": ours.decoder.mask_token.data}
    # Tables of sines too: built without pre-trained weights, the decoder's are zero, and the encoder's are in another order.
    state |= {"vit.embeddings.position_embeddings": ours.encoder.pos_embed, "decoder.decoder_pos_embed": ours.decoder.positions}
    copy_into(model.net, state)
    return model


def copy_into(module: nn.Module, state: dict[str, Tensor], *left: str) -> None:
    """Load a state that holds everything but `left`."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or set(missing) - set(left):
        raise RuntimeError(f"weights do not fit: unexpected {unexpected}, missing {missing}")


class Ours(nn.Module):
    """Our MAE behind the call of the others."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.mae = our_model(sizes)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            hidden = random_mask(len(x), self.mae.encoder.grid, 0.75)
        return self.mae.masked_loss(x, hidden)


def training(model: Callable[[dict[str, int]], nn.Module], sizes: dict[str, int], x: Tensor, hidden: Tensor | None = None) -> Run:
    """One step of AdamW; gives the loss and the number of weights that are trained."""
    net = model(sizes).train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-3, fused=True)

    def run() -> list[Tensor]:
        loss = net(x, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach(), torch.tensor(float(sum(p.numel() for p in params)))]

    return run


def loss_and_size(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative difference of the losses; infinite for unequal numbers of weights."""
    return float((ours[0] - theirs[0]).abs() / theirs[0]) if ours[1] == theirs[1] else float("inf")


@race(
    "Training step of a masked autoencoder: mask, forward, backward, AdamW",
    "The blocks are the same products: lightly's and ours are timm's, transformers has three matrices for queries, keys and "
    "values instead of one. Ours embeds the visible patches alone, the others embed all and drop three quarters of them.",
)
def mae(quick: bool) -> Iterator[Heat]:
    """With the same weights and mask the losses of the first step are equal; the timed lanes draw their own masks."""
    sizes, batch = (QUICK, 8) if quick else (SIZES, 32)
    side = sizes["image_size"]
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    hidden = random_mask(batch, side // sizes["patch"], 0.75, generator=torch.Generator().manual_seed(1))
    models = {"sfumato": Ours, "lightly": lightly_model, "transformers": transformers_model}
    weights = sum(p.numel() for p in our_model(sizes).parameters())
    yield Heat(
        f"ViT, width {sizes['dim']}, depth {sizes['depth']}, {weights / 1e6:.2g} M weights, {batch} pictures of {side} pixels",
        {name: partial(training, model, sizes, x) for name, model in models.items()},
        checks={name: partial(training, model, sizes, x, hidden) for name, model in models.items()},
        difference=loss_and_size,
    )


# ---- masks


def green(bank: NoiseBank, batch: int, grid: int) -> Run:
    generator = torch.Generator().manual_seed(0)
    return lambda: bank.sample(batch, grid, 0.75, generator=generator)


def sorted_noise(batch: int, grid: int) -> Run:
    """MAE's official masking, up to the mask."""
    generator, length = torch.Generator().manual_seed(0), grid * grid

    def run() -> Tensor:
        restore = torch.rand(batch, length, generator=generator).argsort(1).argsort(1)
        hidden = torch.ones(batch, length)
        hidden[:, : int(length * 0.25)] = 0
        return hidden.gather(1, restore) > 0

    return run


def holes(ours: Tensor, theirs: Tensor) -> float:
    """Whether equally many tokens are hidden in every row."""
    return float((ours.sum(1) - theirs.sum(1)).abs().max())


@race(
    "Green masks: windows of a bank of filtered noise, against MAE's sorted noise",
    "A window costs a dozen small operations and a partial sort, where MAE sorts twice: more for few tokens, less for many. Both "
    "are next to nothing beside a step. The masks differ by design: only the number of hidden tokens is compared.",
)
def color_masks(quick: bool) -> Iterator[Heat]:
    """The draw alone, and as a share of the step of the race `mae`."""
    sizes, batch = (QUICK, 8) if quick else (SIZES, 32)
    bank = NoiseBank("green", count=512, size=64, generator=torch.Generator().manual_seed(0))
    grid, repeat = sizes["image_size"] // sizes["patch"], 20
    yield Heat(
        f"{batch} masks of {grid} x {grid} tokens",
        {
            "sfumato": lambda: repeated(green(bank, batch, grid), repeat),
            "rand().argsort()": lambda: repeated(sorted_noise(batch, grid), repeat),
        },
        per=repeat,
        difference=holes,
        tolerance=0.0,
        memory=False,
    )
    x = torch.randn(batch, 3, sizes["image_size"], sizes["image_size"], generator=torch.Generator().manual_seed(0))
    yield Heat(
        "the draw as a share of a training step",
        {"sfumato": lambda: green(bank, batch, grid), "whole step": partial(training, Ours, sizes, x)},
        free=("whole step",),
        limit=0.01,
        memory=False,
    )


def repeated(run: Run, times: int) -> Run:
    def many() -> Any:
        for _ in range(times - 1):
            run()
        return run()

    return many


# ---- hard masks

HARD_SHARE = 0.5


def hard(scores: Tensor, share: float = HARD_SHARE) -> Run:
    generator = torch.Generator().manual_seed(0)
    return lambda: hard_mask(scores, 0.75, share, generator=generator)


def sample_by_sample(scores: Tensor, share: float = HARD_SHARE) -> Run:
    """The same rule in a loop: sort a sample's scores, take the hardest, draw the others from what is left."""
    generator, length = torch.Generator().manual_seed(0), scores.shape[1]
    n_hidden = length - int(length * 0.25)
    n_hard = int(n_hidden * share)

    def run() -> Tensor:
        hidden = torch.zeros(scores.shape, dtype=torch.bool)
        for row, mine in zip(scores, hidden):
            order = row.argsort(descending=True)
            left = order[n_hard:]
            mine[order[:n_hard]] = True
            mine[left[torch.randperm(len(left), generator=generator)[: n_hidden - n_hard]]] = True
        return hidden

    return run


@race(
    "Hard masks: one draw for the batch, against a loop over its samples",
    "HPM's rule, half of the hidden tokens by score and half by chance: two partial sorts of the whole batch against a sort, a "
    "shuffle and two scatters for each sample. What is drawn differs; the masks are compared where all is taken by score.",
)
def hard_masks(quick: bool) -> Iterator[Heat]:
    """On a CPU; a loop on an accelerator also waits for it once a sample."""
    for batch, grid in ((8, 4),) if quick else ((64, 14), (256, 14)):
        scores = torch.randn(batch, grid * grid, generator=torch.Generator().manual_seed(1))
        lanes = {"sfumato": hard, "loop over samples": sample_by_sample}
        yield Heat(
            f"{batch} masks of {grid} x {grid} tokens",
            {name: partial(lane, scores) for name, lane in lanes.items()},
            checks={name: partial(lane, scores, 1.0) for name, lane in lanes.items()},
            tolerance=0.0,
            memory=False,
        )
