import pytest
import timm
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer

from sfumato.errors import BadSetting
from sfumato.nn import FrozenViT, MaskedViTEncoder, capture_qkv
from sfumato.papers.masking.mae import MAE
from sfumato.papers.optimization.classifier import Classifier


def images(n=4, channels=3, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_teachers_are_copies_of_the_vit_inside_a_model():
    torch.manual_seed(1)
    source = MAE(MAE.Config.small(image_size=16, patch=4, dim=16, depth=3, heads=2, decoder_dim=16, decoder_heads=2)).eval()
    teacher = FrozenViT.of(source)
    tokens = teacher(images())
    with capture_qkv(source.encoder, [0, 1]) as theirs:
        assert torch.allclose(tokens, source.encoder(source.normalised(images()))[:, 1:], atol=1e-6)
    ran: list[int] = []
    for i, block in enumerate(teacher.vit.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    seen = teacher.relations(images(), [0, 1])
    assert all(torch.allclose(a, b, atol=1e-6) for i in (0, 1) for a, b in zip(seen[i], theirs[i], strict=True))
    assert ran == [0]  # nothing behind the last layer that is read
    with torch.no_grad():
        source.encoder.norm.weight.zero_()
    assert torch.equal(teacher(images()), tokens)
    assert not any(p.requires_grad for p in teacher.parameters())
    again = FrozenViT(teacher.settings)
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again(images()), tokens)
    with pytest.raises(BadSetting, match="Linear has no vision transformer"):
        FrozenViT.of(torch.nn.Linear(1, 1))


def test_a_classifier_teaches_by_its_own_statistics():
    torch.manual_seed(0)
    sizes = {"channels": 3, "classes": 2, "image_size": 16, "mean": 0.4, "std": 0.3}
    encoder = MaskedViTEncoder(16, 4, 3, dim=24, depth=1, heads=2).settings
    source = Classifier(Classifier.Config.small(model="vit", **sizes, encoder_settings=encoder)).eval()
    tokens = FrozenViT.of(source)(images())
    assert torch.allclose(tokens.mean(1), source.encode(images()), atol=1e-5)


def test_a_plain_vit_teaches_without_a_name():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, class_token=False, global_pool="avg")
    vit.fc_norm, vit.norm = torch.nn.Identity(), torch.nn.LayerNorm(32, eps=1e-6)
    teacher = FrozenViT.of(vit.eval())
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(teacher(images(size=64)), vit.forward_features((images(size=64) - mean) / std), atol=1e-4)
    vit.blocks[0].attn.q_norm = torch.nn.LayerNorm(16)  # no longer plain, and no name to build it by
    with pytest.raises(BadSetting, match="not a plain ViT"):
        FrozenViT.of(vit)
    named = timm.create_model("test_vit3", img_size=64)
    named.blocks[0].attn.q_norm = torch.nn.LayerNorm(32)
    with pytest.raises(BadSetting, match="changed after timm built it"):
        FrozenViT.of(named)


def test_a_timm_model_that_is_no_plain_vit_is_built_again_by_its_name():
    """CLIP's: a norm before the blocks. Its pictures have their own statistics; grey ones are taken for colour, and resized."""
    torch.manual_seed(0)
    vit = timm.create_model("test_vit3", num_classes=0).eval()
    teacher = FrozenViT.of(vit)
    assert teacher.settings["timm"] == "test_vit3"
    again = FrozenViT(yaml.safe_load(yaml.safe_dump(teacher.settings)))
    again.load_state_dict(teacher.state_dict())
    x = images(2, 1, 160)
    mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = vit.forward_features((x.expand(-1, 3, -1, -1) - mean) / std)[:, vit.num_prefix_tokens :]
    assert torch.allclose(again(x), expected, atol=1e-4)
    assert again(images(1, 3, 80)).shape == expected[:1].shape


def test_grey_statistics_are_those_of_colour_averaged():
    teacher = FrozenViT.of(MaskedViTEncoder(16, 4, 1, dim=16, depth=1, heads=2))
    assert (teacher.settings["mean"], teacher.settings["std"]) == ([0.449], [0.226])
