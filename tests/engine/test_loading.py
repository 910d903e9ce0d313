"""Models that settings name: timm's, a person's weights for them, runs; taken in once, when a method is new."""

import kinds
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sfumato.data import Facts
from sfumato.engine import Options, Run, Trainer, build, load
from sfumato.engine.loading import open_model
from sfumato.errors import BadCheckpoint, BadSetting
from sfumato.method import Loss, Method, MethodConfig
from sfumato.papers.masking.mae import MAE


def test_weights_of_ones_own_for_a_timm_model(tmp_path):
    torch.manual_seed(0)
    model, file = timm.create_model("test_vit", num_classes=7).eval(), tmp_path / "vit.safetensors"
    save_file(model.state_dict(), file)
    opened = open_model(f"timm:test_vit@{file}")
    x = torch.rand(1, 3, 160, 160)
    assert not opened.training
    assert torch.equal(opened.forward_features(x), model.forward_features(x))
    with pytest.raises(BadCheckpoint, match=r"vit.safetensors does not fit"):
        open_model(f"timm:test_vit2@{file}")
    with pytest.raises(BadCheckpoint, match="no weights at"):
        open_model(f"timm:test_vit@{tmp_path / 'other.pth'}")


def test_weights_that_timm_downloads(monkeypatch):
    asked = {}

    def create_model(name, **settings):
        asked[name] = settings
        if name == "test_vit2":
            raise OSError("no\nnetwork")
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", create_model)
    assert isinstance(open_model("timm:test_vit"), nn.Identity)
    assert asked["test_vit"] == {"pretrained": True, "num_classes": 0}
    with pytest.raises(BadCheckpoint, match=r"\(no network\): say timm:test_vit2@FILE"):
        open_model("timm:test_vit2")
    with pytest.raises(BadSetting, match=r"did you mean .*test_vit"):
        open_model("timm:test_vitt")


def test_a_run(tmp_path):
    torch.manual_seed(0)
    config = MAE.Config.small(image_size=16, dim=16, depth=1, heads=2, decoder_dim=16, decoder_heads=2, batch_size=4, steps=1)
    run = Run.create(tmp_path, "mae")
    run.write_config({"slug": "mae"})
    mae = Trainer(MAE(config), torch.rand(8, 3, 16, 16), Options(device="cpu", workers=0), run=run).train(show=False)
    opened = open_model(str(run.path))
    assert isinstance(opened, MAE)
    assert torch.equal(opened.encode(torch.ones(1, 3, 16, 16)), mae.encode(torch.ones(1, 3, 16, 16)))
    with pytest.raises(BadCheckpoint):
        open_model(str(tmp_path / "nothing"))


class Pupil(Method):
    """Learns the output of a model that is named."""

    class Config(MethodConfig):
        teacher: str = "timm:test_vit"

    def __init__(self, config=None):
        super().__init__(config)
        self.teacher = nn.Linear(1, 1)
        self.weight = nn.Parameter(torch.zeros(()))

    def adopt(self, open_model):
        self.teacher.load_state_dict(open_model(self.config.teacher).state_dict())

    def loss(self, batch, ctx):
        return Loss((self.weight - self.teacher.weight.detach()).square().sum(), len(batch))

    def optimizers(self):
        return {"net": torch.optim.SGD([self.weight], 0.1)}


def test_a_new_method_adopts_and_a_stored_one_does_not(tmp_path, monkeypatch):
    teacher, asked = nn.Linear(1, 1), []
    monkeypatch.setattr("sfumato.engine.loading.open_model", lambda word: asked.append(word) or teacher)
    method = build(Pupil, Facts(8, 3), settings={"steps": 2, "batch_size": 4})
    assert asked == ["timm:test_vit"]
    run = Run.create(tmp_path, "pupil")
    run.write_config({"slug": "pupil"})
    Trainer(method, kinds.data(), Options(device="cpu", workers=0), run=run).train(show=False)
    again = load(run.path, kind=Pupil)
    assert asked == ["timm:test_vit"]
    assert torch.equal(again.teacher.weight, teacher.weight)
