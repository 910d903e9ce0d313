import pytest
import torch
from torch import nn

from sfumato.data import Batch
from sfumato.errors import BadData, BadSetting
from sfumato.probes import (
    extract_features,
    finetune_probe,
    knn_probe,
    layer_probe,
    linear_probe,
    token_probe,
)


def blobs(n=120, classes=3, noise=0.1, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % classes
    return torch.eye(classes, dim)[label] + noise * torch.randn(n, dim, generator=g), label


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x).mean((2, 3))


def pictures(n=60, seed=0):
    """Two classes: bright and dark."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    return Batch(0.3 * torch.rand(n, 1, 6, 6, generator=g) + 0.6 * label.view(-1, 1, 1, 1), torch.arange(n), label)


def test_linear_and_neighbours_on_blobs_and_on_noise():
    z, y = blobs(600)
    far = blobs(600, seed=1)
    assert linear_probe(z, y, test=far) == 1.0
    assert knn_probe(z, y, test=far) == 1.0
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    for score in (linear_probe(z, shuffled, test=far), knn_probe(z, shuffled, test=far)):
        assert score < 0.6


def test_scaler_saves_a_small_feature():
    z, y = blobs()
    unknown = (blobs(seed=1)[0] * 1e-4, y)
    assert linear_probe(z * 1e-4, y, test=unknown) < linear_probe(z * 1e-4, y, test=unknown, scaler="standard")
    with pytest.raises(BadSetting):
        linear_probe(z, y, test=(z, y), scaler="max")


def test_neighbours_weigh_by_cosine():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    y = torch.tensor([0, 1, 1])
    query = torch.tensor([[5.0, 1.0]])
    assert knn_probe(z, y, test=(query, torch.tensor([0])), k=3) == 1.0  # cold: the nearest outweighs two others
    assert knn_probe(z, y, test=(query, torch.tensor([1])), k=3, temperature=100.0) == 1.0  # warm: the majority
    assert knn_probe(z, y, test=(query, torch.tensor([0])), k=50) == 1.0


def test_token_probe_scores():
    z, y = blobs(240)
    tokens, labels = z.view(20, 12, 5), y.view(20, 12)
    perfect = token_probe(tokens, labels, test=(tokens, labels))
    assert perfect == (1.0, 1.0)
    blind = token_probe(torch.zeros_like(tokens), labels.clamp(max=1), test=(torch.zeros_like(tokens), labels.clamp(max=1)))
    assert blind.accuracy == pytest.approx(2 / 3)  # always the more frequent class
    assert blind.miou == pytest.approx((2 / 3 + 0) / 2)


def test_features_are_taken_in_eval_mode_in_parts_without_gradients():
    encoder, data = Encoder().train(), pictures()
    z = extract_features(encoder, data, batch_size=25)
    assert encoder.calls == 3
    assert encoder.training
    assert encoder.body[2].training
    assert not z.requires_grad
    assert torch.equal(z, extract_features(encoder, data.x))
    assert torch.equal(z, extract_features(encoder.forward, data.x))


def test_a_module_is_asked_for_its_encoding():
    class Model(nn.Linear):
        def encode(self, x):
            return x.flatten(1)

    assert extract_features(Model(2, 2), torch.rand(3, 1, 2, 2)).shape == (3, 4)


def test_layers_by_name():
    encoder, data = Encoder(), pictures()
    out = extract_features(encoder, data, layers=["body.0", "body.1"], batch_size=32)
    assert out["body.0"].shape == (60, 4, 4, 4)
    assert torch.equal(out["body.1"], out["body.0"].relu())
    assert not encoder.body[0]._forward_hooks
    with pytest.raises(BadSetting, match=r"body\.9"):
        extract_features(encoder, data, layers=["body.9"])


def test_layer_probe():
    scores = layer_probe(Encoder(), ["body.0", "body.1"], pictures(), test=pictures(seed=1))
    assert list(scores) == ["body.0", "body.1"]
    assert scores["body.0"] == 1.0
    with pytest.raises(BadData):
        layer_probe(Encoder(), ["body.0"], Batch(torch.rand(2, 1, 6, 6), torch.arange(2)), test=pictures())


def test_finetuning_learns_from_few_labels_and_leaves_the_encoder_alone():
    encoder, train, test = Encoder(), pictures(), pictures(seed=1)
    before = [p.clone() for p in encoder.parameters()]

    def score(steps):
        g = torch.Generator().manual_seed(0)
        return finetune_probe(encoder, train, test=test, labels=20, steps=steps, batch_size=10, lr=1e-2, generator=g)

    scores = [score(steps) for steps in (1, 60, 60)]
    assert scores[0] < scores[1] == scores[2]
    assert scores[1] > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    with pytest.raises(BadData):
        finetune_probe(encoder, Batch(train.x, train.index), test=test)
