from functools import partial

import pytest
import torch

from sfumato.data import Batch, digits
from sfumato.diffusion import record_h
from sfumato.engine import Lab, Run, fit, load
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.method import Editor, capabilities
from sfumato.papers.diffusion import h_space_directions
from sfumato.papers.diffusion.ddpm import DDPM
from sfumato.papers.diffusion.denoising_curriculum import DenoisingCurriculum
from sfumato.papers.diffusion.h_space_directions import HSpaceDirections, directions
from sfumato.papers.restoration.cbsn import CBSN
from sfumato.probes import jacobian_directions, pca_directions


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def ddpm():
    torch.manual_seed(0)
    method = DDPM(DDPM.Config.small(image_size=8, channels=1, width=8, batch_size=32))
    return fit(method, digits()[0].x[:512], steps=40, progress=False)


def _over(ddpm, **over):
    settings = {"steps": 3, "batch_size": 8, "sample_steps": 4, "components": 5, **over}
    return HSpaceDirections.init_from(HSpaceDirections.Config.small(**settings), ddpm)


@pytest.fixture(scope="module")
def labelled():
    train = digits()[0]
    keep = train.label < 3
    return Batch(train.x[keep], torch.arange(int(keep.sum())), label=train.label[keep])


@pytest.fixture(scope="module")
def found(ddpm, labelled):
    """Directions of a tiny model, principal and of three classes."""
    return fit(_over(ddpm, classes=3), labelled, progress=False)


@pytest.mark.parametrize("per_step", [False, True])
def test_the_components_are_those_of_the_pictures_that_it_drew(ddpm, labelled, per_step):
    drawn = []
    method = _over(ddpm, per_step=per_step)
    update = method.pca.update
    method.pca.update = lambda hs: (drawn.append(hs), update(hs))[1]
    method = fit(method, labelled.x, progress=False)
    assert [len(hs) for hs in drawn] == [8, 8, 8]
    edited = record_h(method.net, method.sampler, method.start(8, _seeded()))[1]
    assert not torch.allclose(drawn[0], edited, atol=1e-2)  # an edit's seed draws others
    exact = pca_directions(torch.cat(drawn), 5, per_step=per_step)
    assert torch.allclose(method.stds, exact.stds.view(5, -1), rtol=1e-3)
    inner = (method.vectors * exact.vectors).flatten(1).sum(1) / (4 if per_step else 1)
    assert torch.allclose(inner, torch.ones(5), atol=1e-2)
    assert method.known == 5


def test_the_model_stays_as_it_was_and_the_seed_decides(ddpm, labelled):
    a, b, c = (fit(_over(ddpm), labelled.x, steps=2, progress=False, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.vectors, b.vectors)
    assert not torch.allclose(a.vectors, c.vectors, atol=1e-3)
    for name, value in ddpm.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, a.base.state_dict()[name]), name


def test_what_is_not_explained_is_told_of_fresh_pictures(ddpm, labelled, tmp_path):
    run = Run.create(tmp_path, "h-space-directions")
    run.write_config({"slug": "h-space-directions"})
    fit(_over(ddpm, steps=6, batch_size=16), labelled.x, progress=False, run=run, log_every=1)
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[0] == 1
    assert losses[-1] < 0.9
    assert {path.stem.split("-")[1] for path in run.pictures.iterdir()} == {"component 0", "component 1", "component 2"}


def test_saved_and_loaded_it_edits_the_same(ddpm, labelled, tmp_path):
    run = Run.create(tmp_path, "h-space-directions")
    run.write_config({"slug": "h-space-directions"})
    method = fit(_over(ddpm, classes=3), labelled, progress=False, run=run)
    again = load(run.path)
    assert isinstance(again, Editor)
    assert list(capabilities(again)) == ["edit"]
    for kind, name in (("pca", "1"), ("attribute", "0:1"), ("jacobian", "0")):
        a, b = (m.edit(name, [0.0, 2.0], kind=kind, n=2, generator=_seeded()) for m in (method, again))
        assert torch.equal(a, b)
        assert a.shape == (2, 2, 1, 8, 8)
        assert 0 <= a.min() <= a.max() <= 1
    over = HSpaceDirections.init_from(HSpaceDirections.Config.small(sample_steps=2), again)
    assert over.known == 0
    assert torch.equal(over.base.average.module.conv_in.weight, ddpm.average.module.conv_in.weight)


def test_class_means_are_those_of_the_pictures_taken_back(ddpm, labelled):
    """Without noise while sampling a picture has one x_T, so the means can be had again by hand."""
    few = Batch(labelled.x[:8], torch.arange(8), label=labelled.label[:8])
    method = fit(_over(ddpm, classes=3, eta=0.0, steps=1), few, progress=False)
    _, hs = record_h(method.net, method.sampler, method.invert(few.x))
    for k in range(3):
        mine = few.label == k
        assert method.class_counts[k] == mine.sum()
        assert torch.allclose(method.class_sums[k], hs[mine].sum(0), rtol=1e-3, atol=1e-2)
    start = method.start(1)
    means = method.class_sums / method.class_counts.view(-1, 1, 1, 1, 1)
    assert torch.allclose(method.direction("attribute", "2:0", start), means[2] - means[0])
    assert torch.allclose(method.direction("attribute", "2", start), means[2] - (means[0] + means[1]) / 2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_picture_comes_back_when_it_is_not_moved(ddpm, eta):
    """Exactly from DDPM inversion; DDIM's is an approximation, close with many steps."""
    method, x = _over(ddpm, eta=eta, sample_steps=50), digits()[1].x[:4]
    method.look(_seeded())
    back, moved = method.edit("0", [0.0, 4.0], images=x, generator=_seeded()).unbind(1)
    assert (back - x).abs().max() < (1e-4 if eta else 0.1)
    assert (moved - x).abs().max() > 0.01
    with pytest.raises(BadData, match="resize"):
        method.edit("0", [1.0], images=x[..., 1:])


def test_a_singular_vector_is_each_pictures_own_and_keeps_to_its_mask(found):
    start = found.start(2, _seeded())
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    whole, left = (found.direction("jacobian", "0", start, mask=m) for m in (None, mask))
    assert whole.shape == (2, *found.h_shape)
    assert torch.equal(whole[:, 0], whole[:, -1])
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)
    assert (whole[0] * whole[1]).sum() >= 0
    assert (left[0, 0].norm() < whole[0, 0].norm()).item()


def test_what_is_to_stay_is_left_out_of_a_direction(found):
    """Orthogonal to every attribute at once, over all steps; of each picture's own singular vector too."""
    start, stay = found.start(2, _seeded()), ("1:0", "2:0")
    others = torch.stack([found.direction("attribute", name, start) for name in stay]).flatten(1)
    for kind in ("pca", "jacobian"):
        plain, kept = (found.direction(kind, "0", start, without=names) for names in ((), stay))
        assert kept.shape == plain.shape
        rows = kept.reshape(-1, others.shape[1])
        inner = rows @ others.T / (rows.norm(dim=1, keepdim=True) * others.norm(dim=1))
        assert inner.abs().max() < 1e-5
        assert (plain.reshape(rows.shape) @ others.T).abs().max() > 1e-3
    assert torch.equal(found.direction("pca", "0", start), found.direction("pca", "0", start, without=()))
    with pytest.raises(BadSetting, match="nothing is left of direction '2:1' without 1:0, 2:0"):
        found.direction("attribute", "2:1", start, without=stay)


def test_the_model_of_a_curriculum_has_directions_too():
    method = DenoisingCurriculum(DenoisingCurriculum.Config.small(image_size=8, channels=1, width=8))
    over = _over(method)
    assert type(over.base) is DDPM
    assert torch.equal(over.net.conv_in.weight, method.average.module.conv_in.weight)
    over.look(_seeded())
    assert over.known == 5


def test_words_are_refused_in_one_line(ddpm, found):
    with pytest.raises(BadSetting, match="--init runs/ddpm"):
        HSpaceDirections(HSpaceDirections.Config.small())
    with pytest.raises(BadCheckpoint, match="not in one of CBSN"):
        HSpaceDirections.init_from(HSpaceDirections.Config.small(), CBSN(CBSN.Config.small(channels=1)))
    with pytest.raises(BadSetting, match="below the 4 sampling steps"):
        _over(ddpm, jacobian_step=4)
    with pytest.raises(BadSetting, match="no directions yet"):
        _over(ddpm).edit("0", [1.0])
    with pytest.raises(BadSetting, match="labelled pictures"):
        _over(ddpm).edit("0", [1.0], kind="attribute")
    with pytest.raises(BadData, match="is not below classes=2"):
        fit(_over(ddpm, classes=2), digits()[0], steps=1, progress=False)
    for kind, name, match in (
        ("pca", "5", "0 to 4"),
        ("pca", "first", "0 to 4"),
        ("jacobian", "64", "0 to 63"),
        ("attribute", "7", r"\[0, 1, 2\]"),
        ("attribute", "1:1", "A:B"),
        ("clip", "0", "pca, jacobian, attribute"),
    ):
        with pytest.raises(BadSetting, match=match):
            found.edit(name, [1.0], kind=kind)
    with pytest.raises(BadSetting, match="kind jacobian only"):
        found.edit("0", [1.0], mask=torch.ones(1, 1, 8, 8))


# The claim


class _Linear(h_space_directions._Bench):
    """A model whose bottleneck holds the pixels of its samples, which are digits: what an edit does is known."""

    def __init__(self, lab):
        super().__init__(Lab(lab.seed, budget=0.01))
        train, test = digits()
        self.samples, self.plain = 2 * train.x[: len(self.samples)] - 1, 2 * test.x[: len(self.plain)] - 1
        self.hs = 0.01 * torch.randn(self.hs.shape, generator=_seeded())
        self.hs[:, 0, :4] = self.samples.view(-1, 4, 4, 4)

    def edited(self, delta, scale=1.0, *, asymmetric=False):
        return self.plain + scale * (delta[0] if delta.ndim == 4 else delta)[:4].reshape(1, 8, 8)


def _judged(figures):
    return [condition.difference(figures) - condition.by for condition in directions.conditions]


@pytest.fixture
def few(monkeypatch):
    for name, value in {"DRAWN": 150, "EXTREME": 15, "HELD_OUT": 10, "RANDOM": 2}.items():
        monkeypatch.setattr(h_space_directions, name, value)
    monkeypatch.setattr(h_space_directions, "jacobian_directions", partial(jacobian_directions, iters=4))


@pytest.mark.usefixtures("few")
def test_the_claim_where_the_effect_of_an_edit_is_known(monkeypatch):
    bench, lab = _Linear(Lab(0)), Lab(0)
    monkeypatch.setattr(h_space_directions, "_Bench", lambda lab: bench)
    figures = directions(lab)
    assert figures["difference of means"]["pairs won"] == 3
    assert figures["principal components"]["consistency"] == pytest.approx(1, abs=1e-4)
    assert all(gap >= 0 for gap in _judged(figures)[:4])
    assert set(lab.pictures) == {"first component", "4 from 3", "8 from 6", "1 from 0"}
    monkeypatch.setattr(bench, "edited", lambda *_, **__: bench.plain)
    figures = directions(lab)
    assert figures["difference of means"]["logit shift"] == figures["difference of means"]["pairs won"] == 0
    assert all(gap <= 0 for gap in _judged(figures))


@pytest.mark.usefixtures("few")
def test_the_claim_in_small():
    """A model that has hardly learned: every arm is measured."""
    figures = directions(Lab(0, budget=0.01))
    both = {"logit shift", "pixel change", "consistency"}
    assert both < figures["random directions"].keys()
    assert {"asymmetric", "difference in the noise", "no edit", "singular vectors"} < figures.keys()
    assert figures["singular vectors"]["pixel change"] > figures["random directions"]["pixel change"] > 0
    assert len(_judged(figures)) == 5
