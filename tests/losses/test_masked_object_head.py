import pytest
import torch
from torch import nn

from sfumato.data import perspective_scenes
from sfumato.errors import BadData, BadSetting
from sfumato.losses import MaskedObjectHead

FRAMES = perspective_scenes(8, generator=torch.Generator().manual_seed(0))


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def head(**over):
    torch.manual_seed(0)
    autoencoder = {"encoder_depth": 1, "encoder_heads": 2, "decoder_depth": 1, "decoder_heads": 2}
    settings = {"dim": 16, "grid": 4, "crop": (16, 16), "hidden_dim": 8, "weighing": {"min_box": 1}, "autoencoder": autoencoder}
    return MaskedObjectHead(nn.Conv2d(3, 8, 3, 4, 1), 8, 4, **{**settings, **over})


def test_the_head_on_a_persons_own_network():
    mine, x = head(), FRAMES.x
    objects = mine(x, FRAMES.boxes, generator=g())
    count = int(FRAMES.boxes.isfinite().all(-1).sum())
    assert objects.features.shape == (count, 16)
    assert (objects.hidden.sum(1) == 8).all()
    assert len(objects.hidden.unique(dim=0)) > count // 2  # masks differ between objects
    objects.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine.parameters())
    assert mine.backbone.weight.grad.abs().sum() > 0  # the user's network learns from it
    again = mine(x, [b[b.isfinite().all(-1)] for b in FRAMES.boxes], generator=g())
    assert torch.equal(again.loss, objects.loss)
    at_rest = mine.eval()(x, FRAMES.boxes)
    assert at_rest.hidden is None
    assert at_rest.loss == 0
    assert torch.equal(at_rest.features, mine(x, FRAMES.boxes).features)


def test_a_ratio_that_hides_nothing_gives_no_loss():
    objects = head(mask_ratio=0.01)(FRAMES.x, FRAMES.boxes)
    assert not objects.hidden.any()
    assert objects.loss == 0


def test_half_of_64_tokens():
    hidden = head(grid=8).draw_mask(100, generator=g())
    assert (hidden.sum(1) == 32).all()
    assert torch.equal(hidden, head(grid=8).draw_mask(100, generator=g()))


def test_what_the_head_refuses():
    with pytest.raises(BadData, match="stride 8"):
        MaskedObjectHead(nn.Conv2d(3, 8, 3, 4, 1), 8, 8, dim=24)(FRAMES.x, FRAMES.boxes)
    with pytest.raises(BadData, match="features="):
        MaskedObjectHead(None, 8, 4, dim=24)(FRAMES.x, FRAMES.boxes)
    with pytest.raises(BadSetting, match="no multiple of the grid"):
        MaskedObjectHead(None, 8, 4, dim=24, crop=(10, 16))
