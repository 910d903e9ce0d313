"""A convnet of timm as an encoder of pictures with holes: feature maps at several strides, from what is visible alone.

    f_1, ..., f_s = maps(x · visible),   each layer sparse;   without a mask it is the dense network

The counterpart of `MaskedViTEncoder` for convolutional networks: its weights are timm's, under timm's names.

Source: Tian et al. 2023, "Designing BERT for Convolutional Networks" (SparK), section 3.

>>> import torch
>>> from sfumato.masks import random_mask
>>> from sfumato.nn import MaskedConvEncoder
>>> encoder = MaskedConvEncoder("convnet", 32, 3)
>>> hidden = random_mask(2, encoder.grid, 0.6, rule="keep_round")
>>> [tuple(m.shape) for m in encoder(torch.rand(2, 3, 32, 32), hidden)]
[(2, 24, 16, 16), (2, 48, 8, 8), (2, 96, 4, 4)]
>>> encoder.features(torch.rand(2, 3, 40, 32)).shape
torch.Size([2, 96])
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadData, BadSetting, nearest
from sfumato.nn.at_rest import eval_mode
from sfumato.nn.sparse_conv import set_hidden, sparsify

GROUPS = 4
"""Groups of channels that are normalised together in `GroupNormStages`."""


class ConvStages(nn.Module):
    """A small residual convnet for a CPU: every stage halves the side.

    Args:
        channels: of the pictures.
        widths: channels of each stage.
        depth: residual blocks a stage.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (24, 48, 96), depth: int = 1) -> None:
        super().__init__()
        stages = []
        for before, width in zip((channels, *widths), widths):
            blocks = (_Residual(width) for _ in range(depth))
            stages.append(nn.Sequential(*_conv_norm(before, width, 2), nn.ReLU(inplace=True), *blocks))
        self.stages = nn.ModuleList(stages)
        self.widths, self.strides = list(widths), [2 ** (i + 1) for i in range(len(widths))]

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[B, C, H, W]` to maps at strides 2, 4, 8, ..."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class GroupNormStages(nn.Module):
    """A small residual network that normalises over groups of channels, so a picture's features do not depend on its batch.

    Three stages, a quarter, a half and all of `dim` wide, each but the first halving the side; the last map is given. Such a norm
    mixes positions, so there is no sparse form of it. Blocks are timm's; source: Wu and He 2018, "Group Normalization".

    Args:
        channels: of the pictures.
        dim: channels of the map, a multiple of 16.
        depth: residual blocks a stage.

    Raises:
        BadSetting: a width that cannot be divided.
    """

    def __init__(self, channels: int, dim: int = 64, depth: int = 1) -> None:
        from timm.models.resnet import BasicBlock, downsample_conv

        super().__init__()
        if dim % (4 * GROUPS):
            raise BadSetting(
                f"the small network's stages are {dim} / 4 and / 2 wide, in {GROUPS} groups: dim must be a multiple of "
                f"{4 * GROUPS}"
            )
        norm: Any = partial(nn.GroupNorm, GROUPS)
        widths = (dim // 4, dim // 2, dim)
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), norm(widths[0]), nn.ReLU()]
        before = widths[0]
        for width in widths:
            for block in range(depth):
                stride = 2 if block == 0 and width != widths[0] else 1
                shortcut = None if before == width else downsample_conv(before, width, 1, stride, norm_layer=norm)
                layers.append(BasicBlock(before, width, stride, shortcut, norm_layer=norm))
                before = width
        self.layers = nn.Sequential(*layers)
        self.widths, self.strides = [dim], [4]

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[B, C, H, W]` to one map at stride 4."""
        return [self.layers(x)]


OWN = {"convnet": ConvStages, "small": GroupNormStages}
"""Networks beside timm's."""


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv_norm(width, width), nn.ReLU(inplace=True), *_conv_norm(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def _conv_norm(before: int, after: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)


class MaskedConvEncoder(nn.Module):
    """A convnet with sparse layers.

    Args:
        model: a convolutional network of timm that gives feature maps, "convnet" (`ConvStages`) or "small" (`GroupNormStages`).
        size: side of the pictures in pixels that it is trained on; any other multiple of `patch` works too.
        channels: of the pictures.
        scales: how many of its maps are given, the coarsest ones.
        model_settings: further arguments of `timm.create_model`, or of a network of our own.
        drop_path: share of residual branches skipped in training at the last block (of timm's networks).
        sync: batch statistics over all processes.
        sparse: off leaves the layers as they are: any network goes, and it takes no mask.

    Attributes:
        patch: stride of the coarsest map: the side of what a mask hides.
        grid: rows and columns of the coarsest map.
        widths: channels of the maps, finest first.
        dim: channels of the coarsest one.
        batch_norm: whether it has batch normalisation.

    Raises:
        BadSetting: an unknown model, settings that it does not take, a size that its stride does not divide, a layer that has no
            sparse form.
    """

    def __init__(
        self,
        model: str,
        size: int,
        channels: int,
        *,
        scales: int = 4,
        model_settings: dict[str, Any] | None = None,
        drop_path: float = 0.0,
        sync: bool = False,
        sparse: bool = True,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "model": model, "size": size, "channels": channels, "scales": scales, "model_settings": dict(model_settings or {}),
            "drop_path": drop_path, "sync": sync, "sparse": sparse,
        }  # fmt: skip
        net, widths, strides = _network(model, channels, model_settings or {}, drop_path)
        if size % strides[-1]:
            raise BadSetting(f"size={size} is not a multiple of {model}'s stride, {strides[-1]}")
        self.batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
        if sync:
            net = _synchronised(net)
        self.net = sparsify(net, inplace=True) if sparse else net
        self.widths, self.strides = widths[-scales:], strides[-scales:]
        self.channels, self.dim, self.patch = channels, widths[-1], strides[-1]
        self.grid = size // self.patch, size // self.patch

    def forward(self, x: Tensor, mask: Tensor | None = None, *, packed: bool = True) -> list[Tensor]:
        """Feature maps, finest first.

        Args:
            x: `[B, C, H, W]`, H and W multiples of `patch`.
            mask: `[B, L]` bool in raster order, True = hidden; None: nothing is hidden.
            packed: compute at visible positions alone, see `visible_forward`; the same numbers.

        Returns:
            `[B, C_i, H / stride_i, W / stride_i]` each, zeros in the holes.

        Raises:
            BadData: pictures of another number of channels or of sides that `patch` does not divide.
            BadSetting: a mask, and an encoder with sparse=False.
        """
        self._cut(x)
        if mask is None:
            return self.maps(x)
        with set_hidden(self, self.cells(x, mask), packed=packed) as holes:
            return [holes.leave(m) for m in self.maps(holes.enter(x))]

    def maps(self, x: Tensor) -> list[Tensor]:
        """What the network gives for whatever it is given: pictures, or tiles within `set_hidden`."""
        if x.shape[1] != self.channels:
            raise BadData(f"pictures of {x.shape[1]} channels were given, this encoder takes {self.channels}")
        return list(self.net(x))[-len(self.widths) :]

    def cells(self, x: Tensor, mask: Tensor) -> Tensor:
        """A mask `[B, L]` of pictures as `[B, rows, columns]`."""
        return mask.view(len(x), *self._cut(x))

    def _cut(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the pictures' patches."""
        height, width = x.shape[-2:]
        if height % self.patch or width % self.patch:
            raise BadData(f"a picture of {height} x {width} pixels cannot be cut into patches of {self.patch}")
        return height // self.patch, width // self.patch

    def features(self, x: Tensor) -> Tensor:
        """One vector a picture: the coarsest map averaged over its positions, `[B, dim]`.

        Batch norm brings the statistics of what it was trained on. After masked training re-estimate them on whole pictures
        (`torch.optim.swa_utils.update_bn`), or fine-tune.
        """
        return self.maps(x)[-1].mean((2, 3))

    def timm_weights(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The same network for timm.

        Returns:
            Arguments of `timm.create_model`, and the state that its model loads strictly: what is trained here, and fresh layers
            where timm's head has any.

        Raises:
            BadSetting: a network of our own, which timm has not.
        """
        import timm

        s = self.settings
        if s["model"] in OWN:
            raise BadSetting(
                f"the {s['model']} network is not timm's: train a model of timm to export it there (--weights writes any)"
            )
        arguments = {"model_name": s["model"], "in_chans": s["channels"], "num_classes": 0, **s["model_settings"]}
        ours: Any = self.net
        trained = {name: value.detach().clone() for name, value in ours.model.state_dict().items()}
        return arguments, timm.create_model(**arguments).state_dict() | trained


def _network(model: str, channels: int, settings: dict[str, Any], drop_path: float) -> tuple[nn.Module, list[int], list[int]]:
    """A network from pictures to maps, their channels and their strides."""
    if model in OWN:
        try:
            own: Any = OWN[model](channels, **settings)
        except TypeError as error:
            raise BadSetting(f"model_settings={settings} do not suit {model}: {error}") from None
        return own, own.widths, own.strides
    import timm

    if not timm.is_model(model):
        near = nearest(model, (*OWN, *timm.list_models())) or [*OWN, "resnet50"]
        raise BadSetting(f"there is no model {model!r}; did you mean {', '.join(near)}?")
    depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        net: Any = timm.create_model(model, features_only=True, feature_cls="getter", in_chans=channels, **depth, **settings)
    except (AttributeError, AssertionError, RuntimeError, TypeError) as error:
        raise BadSetting(f"{model} with {depth | settings} gives no feature maps: {error}") from None
    widths, strides = list(net.feature_info.channels()), list(net.feature_info.reduction())
    if not _takes_any_size(net, channels, widths[-1], strides[-1]):
        raise BadSetting(f"{model} makes no feature map of a picture of any size: take a convolutional network, such as resnet50")
    return net, widths, strides


@torch.no_grad()
def _takes_any_size(net: nn.Module, channels: int, width: int, stride: int) -> bool:
    """Whether a network's last map is two by three of a picture of so many strides; it is left as it was."""
    with eval_mode(net):
        try:
            last = net(next(net.parameters()).new_zeros(1, channels, 2 * stride, 3 * stride))[-1]
        except (AssertionError, RuntimeError, TypeError, ValueError):
            return False
    return tuple(last.shape) == (1, width, 2, 3)


def _synchronised(net: nn.Module) -> nn.Module:
    from timm.layers.norm_act import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(net)
    return converted
