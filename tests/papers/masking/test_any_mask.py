"""Any mask with any method of the family, where it makes sense; a refusal in one line where it does not."""

import pytest
import torch

from sfumato import catalogue
from sfumato.engine.loading import configure
from sfumato.errors import BadSetting
from sfumato.masks import NAMED_MASKS
from sfumato.method import Batch, Context

SMALL = {"channels": 3, "batch_size": 4}
TINY = {"dim": 16, "depth": 2, "heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
METHODS = {
    "mae": {**TINY, **DECODER},
    "simmim": TINY,
    "hpm": {**TINY, **DECODER},
    "dmjd": {**TINY, **DECODER},
    "mto": {**TINY, **DECODER},
    "spark": {"decoder_width": 16},
    "lmd": {**TINY, **DECODER},
}


def build(slug, **over):
    kind = catalogue.load_method(slug)
    torch.manual_seed(0)
    return kind(configure(kind.Config, "small", {**SMALL, **METHODS[slug], **over}))


def trained_once(model):
    side = model.config.image_size
    batch = Batch(torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)), torch.arange(4))
    model.survey([batch])
    loss = model.loss(batch, Context(4, 10, 0, torch.Generator().manual_seed(0)))
    loss.value.backward()
    return loss.value


@pytest.mark.parametrize("name", NAMED_MASKS)
@pytest.mark.parametrize("slug", METHODS)
def test_any_mask_trains_any_method(slug, name):
    model = build(slug, mask=name)
    if slug == "spark" and name == "semantic":
        with pytest.raises(BadSetting, match="asks for attention"):
            trained_once(model)
    else:
        assert trained_once(model).isfinite()


def test_another_mask_is_another_loss():
    assert trained_once(build("spark", mask="green")) != trained_once(build("spark"))


def test_colours_of_colormae_and_frequencies_of_mfm_are_their_own():
    with pytest.raises(BadSetting, match="mask"):
        configure(catalogue.load_method("mfm").Config, "small", {"mask": "green"})
    with pytest.raises(BadSetting, match="mask"):
        configure(catalogue.load_method("mae").Config, "small", {"mask": "frequency"})
