"""A trained vision transformer as a teacher: frozen, always in eval mode, with the statistics of its own pictures.

Its settings build it again, so that a checkpoint of the student holds its teachers and needs their runs no more.

>>> import torch
>>> from sfumato.nn import FrozenViT, MaskedViTEncoder
>>> teacher = FrozenViT.of(MaskedViTEncoder(32, 8, 3, dim=64, depth=4, heads=2))
>>> x = torch.rand(2, 1, 40, 40)  # another size, and grey
>>> teacher(x).shape, teacher.relations(x, [1])[1].q.shape
(torch.Size([2, 16, 64]), torch.Size([2, 2, 17, 32]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from sfumato.errors import BadSetting
from sfumato.nn.attention_capture import QKV, capture_qkv
from sfumato.nn.masked_vit import MaskedViTEncoder


class FrozenViT(nn.Module):
    """A frozen vision transformer with the mean and deviation of the pictures it was trained on.

    Args:
        settings: how it is built, as `FrozenViT.of` records it; weights are fresh.

    Attributes:
        trained: whether it has weights that were learned.
        prefix: tokens before the patches.
        dim: width of its tokens.
        grid: rows and columns of its patches.
        channels: of its pictures.
        size: of its pictures, (height, width) in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings, self.trained = settings, False
        if "encoder" in settings:
            self.vit: Any = MaskedViTEncoder(**settings["encoder"])
            self.prefix, self.dim, self.grid = self.vit.prefix, self.vit.dim, self.vit.grid
        else:
            import timm

            arguments = {k: settings[k] for k in ("img_size", "in_chans")}
            self.vit = timm.create_model(settings["timm"], pretrained=False, num_classes=0, **arguments)
            self.prefix, self.dim, self.grid = self.vit.num_prefix_tokens, self.vit.embed_dim, self.vit.patch_embed.grid_size
        patch = self.vit.patch_embed.proj
        self.channels, self.size = patch.in_channels, [n * side for n, side in zip(self.grid, patch.kernel_size)]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(-1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """A copy of the vision transformer in a model: a timm ViT, a `MaskedViTEncoder`, or a method with either inside.

        Raises:
            BadSetting: a model without one, or with one that timm cannot build again from its name.
        """
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.models.vision_transformer import VisionTransformer

        found = (m for m in model.modules() if isinstance(m, (MaskedViTEncoder, VisionTransformer)))
        vit: Any = next(found, None)
        if vit is None:
            raise BadSetting(f"{type(model).__name__} has no vision transformer to learn from")
        published = getattr(vit, "pretrained_cfg", None) or {}
        settings: dict[str, Any] = {}
        for name, colour in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            own = getattr(model, name, None)
            usual = published.get(name) or (colour if vit.patch_embed.proj.in_channels == 3 else [round(sum(colour) / 3, 3)])
            settings[name] = own.flatten().tolist() if isinstance(own, Tensor) else list(usual)
        if not isinstance(vit, MaskedViTEncoder):
            try:
                vit = MaskedViTEncoder.from_timm(vit)
            except BadSetting:
                if not published.get("architecture"):
                    raise
        if isinstance(vit, MaskedViTEncoder):
            settings["encoder"] = dict(vit.settings)
        else:
            embed = vit.patch_embed
            settings |= {"timm": published["architecture"], "img_size": list(embed.img_size), "in_chans": embed.proj.in_channels}
        frozen, state = cls(settings), vit.state_dict()
        own = frozen.vit.state_dict()
        whole = {k for k in state if not k.startswith("head")} == own.keys()
        if not whole or any(state[k].shape != v.shape for k, v in own.items()):
            raise BadSetting(f"{settings['timm']} was changed after timm built it: a checkpoint could not build it again")
        frozen.vit.load_state_dict({k: state[k] for k in own})
        frozen.trained = True
        return frozen

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Last patch tokens `[B, L, D]` of pictures `[B, C, H, W]` in [0, 1].

        They are resized where it takes another size; grey is taken for colour.
        """
        return self._tokens(x)[:, self.prefix :]

    @torch.no_grad()
    def relations(self, x: Tensor, layers: Sequence[int]) -> dict[int, QKV]:
        """Queries, keys and values of some layers, 0 is the first, of pictures as for `forward`; blocks after them do not run."""
        with capture_qkv(self.vit, layers, stop=True) as seen:
            self._tokens(x)
        return seen

    def _tokens(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.expand(-1, self.channels, -1, -1)
        if list(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
        x = (x - self.mean) / self.std
        tokens: Tensor = self.vit(x) if isinstance(self.vit, MaskedViTEncoder) else self.vit.forward_features(x)
        return tokens
