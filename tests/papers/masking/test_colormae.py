import pytest
import torch

from sfumato.claim import Verdict, judge
from sfumato.data import photo_crops
from sfumato.engine import Options, Trainer
from sfumato.engine.lab import Lab
from sfumato.masks import color_noise_mask
from sfumato.papers.masking.colormae import ColorMAE, green_against_white, mosaics, spectra
from sfumato.papers.masking.mae import MAE

TINY = {"image_size": 16, "dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_heads": 2, "batch_size": 8, "steps": 3}


def build(kind=ColorMAE, **over):
    torch.manual_seed(0)
    return kind(kind.Config.small(**{**TINY, **({"bank_count": 64} if kind is ColorMAE else {}), **over}))


def test_paper_defaults_are_maes_with_green():
    c, mae = ColorMAE.Config().model_dump(), MAE.Config().model_dump()
    assert {k: c[k] for k in mae} == mae
    assert (c["color"], c["bank_count"]) == ("green", 3072)


def test_only_the_sampler_differs_from_mae():
    ours, mae = build(), build(MAE)
    assert ours.state_dict().keys() == mae.state_dict().keys()  # the bank is not in the checkpoint
    for a, b in zip(ours.parameters(), mae.parameters(), strict=True):
        assert torch.equal(a, b)
    x = mae.normalised(torch.rand(4, 3, 16, 16))
    hidden = mae.mask(x, torch.Generator().manual_seed(0))
    assert torch.equal(ours.masked_loss(x, hidden), mae.masked_loss(x, hidden))


def test_the_bank_comes_from_its_seed():
    a, b, c = build(), build(), build(bank_seed=1)
    g, x = lambda: torch.Generator().manual_seed(3), torch.zeros(8, 3, 16, 16)
    assert torch.equal(a.mask(x, g()), b.mask(x, g()))
    assert not torch.equal(a.mask(x, g()), c.mask(x, g()))
    assert (a.mask(x, g()).sum(1) == 12).all()


@pytest.mark.parametrize("color", ["green", "red", "blue", "purple", "white"])
def test_every_colour_trains_and_encodes(color):
    model = build(color=color)
    Trainer(model, photo_crops(16, 20, generator=torch.Generator().manual_seed(0)), Options(device="cpu", workers=0)).train(
        show=False
    )
    assert model.encode(torch.rand(2, 3, 30, 20)).isfinite().all()


def test_masks_of_the_model_have_the_colour_of_fresh_ones():
    """Green masks cluster: neighbours agree more often than under white masks, as often as under fresh green ones."""

    def agreement(mask):
        m = mask.view(-1, 8, 8)
        return (m[:, :, 1:] == m[:, :, :-1]).float().mean().item()

    g = torch.Generator().manual_seed(0)
    bank = agreement(build(image_size=32, bank_count=256).mask(torch.zeros(500, 3, 32, 32), g))
    fresh, white = (agreement(color_noise_mask(500, 8, 0.75, color=c, generator=g)) for c in ("green", "white"))
    assert bank == pytest.approx(fresh, abs=0.02)
    assert bank > white + 0.05


def test_mosaics_show_what_their_labels_say():
    x, label = mosaics(16, 32, 4, generator=torch.Generator().manual_seed(0))
    again, _ = mosaics(16, 32, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    assert x.shape == (16, 3, 32, 32)
    assert 0 <= x.min() <= x.max() <= 1
    assert label.shape == (16, 64)
    assert label.max() == 6
    assert max(len(row.unique()) for row in label) == 3
    # brick, grass and camera (3, 4, 6) are grey photographs: their patches have equal channels
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)[..., 1:3, 1:3].permute(0, 2, 3, 1, 4, 5).reshape(16, 64, 3, -1)
    grey = (patches.amax(2) - patches.amin(2)).amax(-1) == 0
    assert grey[torch.isin(label, torch.tensor([3, 4, 6]))].float().mean() > 0.9


def test_claim_of_the_spectra_holds_with_development_seeds():
    figures = [spectra.run(Lab(seed, budget=0.25)) for seed in (0, 1)]
    assert judge(spectra, figures).verdict is Verdict.REPRODUCED
    swapped = [{**f, "green": f["white"], "white": f["green"]} for f in figures]
    assert judge(spectra, swapped).verdict is Verdict.NOT_REPRODUCED


def test_claim_of_the_representation_in_small():
    lab = Lab(0, budget=0.02)
    figures = green_against_white.run(lab)
    assert set(figures) == {"untrained", "white", "green"}
    assert all(0 <= v <= 1 for arm in figures.values() for v in arm.values())
    assert figures["untrained"] != figures["green"]
    assert lab.pictures["mosaics"].shape == (8, 3, 32, 32)
    assert judge(green_against_white, [figures]).verdict is Verdict.INCONCLUSIVE
