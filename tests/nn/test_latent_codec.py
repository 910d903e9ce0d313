import weakref

import pytest
import torch
from sklearn.decomposition import PCA

from sfumato.data import photo_crops
from sfumato.errors import BadCheckpoint, BadData, BadSetting
from sfumato.nn import DiffusersVAE, IdentityCodec, LatentCodec, PatchPCA, patchify


@pytest.fixture(scope="module")
def crops():
    return photo_crops(64, 32, generator=torch.Generator().manual_seed(0))


def test_components_are_sklearns(crops):
    codec = PatchPCA(4, 5, channels=3).fit(crops)
    rows = patchify(crops, 4, order="chw").flatten(0, 1)
    pca = PCA(5, svd_solver="full").fit(rows)
    assert torch.allclose(codec.variance, torch.from_numpy(pca.explained_variance_).float(), rtol=1e-3)
    theirs = torch.from_numpy(pca.components_).float()
    assert torch.allclose((codec.basis * theirs).sum(1).abs(), torch.ones(5), atol=1e-3)
    z = codec.encode(crops)
    assert z.shape == (64, 5, 8, 8)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(5), atol=1e-4)
    assert torch.allclose(z[2, :, 1, 3], codec.basis @ (patchify(crops, 4, order="chw")[2, 11] - codec.mean), atol=1e-5)


def test_batches_give_the_components_of_the_whole(crops):
    """Unequally large ones, of unlike means: none is held on to."""
    crops = crops[crops.mean((1, 2, 3)).argsort()]
    whole, seen = PatchPCA(2, 12, channels=3).fit(crops.double()), []

    def batches():
        for part in (crops[:0], crops[:5], crops[5:50], crops[50:]):
            assert all(ref() is None for ref in seen[:-1])
            part = part.clone()
            seen.append(weakref.ref(part))
            yield part
            del part

    parts = PatchPCA(2, 12, channels=3).fit(batches())
    assert torch.allclose(parts.mean, whole.mean, atol=1e-6)
    assert torch.allclose(parts.variance, whole.variance, rtol=1e-5)
    assert torch.allclose(parts.basis, whole.basis, atol=1e-4)


def test_coding_is_a_projection(crops):
    codec = PatchPCA(4, 6, channels=3).fit(crops)
    once = codec.decode(codec.encode(crops))
    assert torch.allclose(codec.decode(codec.encode(once)), once, atol=1e-5)
    errors = [(PatchPCA(4, dims, channels=3).fit(crops)) for dims in (1, 6, 24, 48)]
    errors = [(c.decode(c.encode(crops)) - crops).square().mean().item() for c in errors]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10  # all dimensions: exact
    # what is lost is orthogonal to what is kept
    lost = patchify(crops - once, 4, order="chw")
    assert (lost @ codec.basis.T).abs().max() < 1e-4


def test_a_fit_survives_its_state(crops):
    codec = PatchPCA(2, 3, channels=3).fit(crops)
    again = PatchPCA(2, 3, channels=3)
    again.load_state_dict(codec.state_dict())
    assert torch.equal(again.encode(crops), codec.encode(crops))
    assert isinstance(codec, LatentCodec)
    assert isinstance(IdentityCodec(), LatentCodec)
    assert IdentityCodec().decode(IdentityCodec().encode(crops)) is crops


def test_what_does_not_fit_is_refused(crops):
    with pytest.raises(BadSetting, match="dims=17"):
        PatchPCA(4, 17)
    with pytest.raises(BadData, match="3 channels"):
        PatchPCA(4, 2).encode(crops)
    with pytest.raises(BadData, match="two patches"):
        PatchPCA(4, 2).fit(torch.rand(1, 1, 4, 4))
    with pytest.raises(BadData, match="here are 0"):
        PatchPCA(4, 2).fit([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_vae_of_a_folder(folder, crops):
    x = crops[:2].requires_grad_()
    codec = DiffusersVAE(folder, scale=0.5).train()
    assert isinstance(codec, LatentCodec)
    assert not codec.vae.training
    z = codec.encode(x)
    assert z.shape == (2, 4, 16, 16)
    assert torch.allclose(z, 0.5 * codec.vae.encode(2 * x - 1).latent_dist.mode())
    assert torch.allclose(codec.decode(z), (codec.vae.decode(2 * z).sample + 1) / 2)
    (gradient,) = torch.autograd.grad(codec.decode(z).sum(), x)
    assert gradient.abs().max() > 0
    assert not any(p.requires_grad for p in codec.parameters())


def test_vae_samples_its_posterior(folder, crops):
    codec = DiffusersVAE(DiffusersVAE(folder).vae, mode="sample")
    x = crops[:1]
    posterior = codec.vae.encode(2 * x - 1).latent_dist
    noise = torch.randn(1, 4, 16, 16)
    assert torch.allclose(codec.encode(x, noise=noise), posterior.mean + posterior.std * noise)
    a, b, c = (codec.encode(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_bad_vaes_are_refused(folder, tmp_path, crops):
    with pytest.raises(BadSetting, match="median"):
        DiffusersVAE(folder, mode="median")
    with pytest.raises(BadCheckpoint, match="no VAE at"):
        DiffusersVAE(tmp_path)
    with pytest.raises(BadData, match="multiples of 2"):
        DiffusersVAE(folder).encode(crops[:, :, :31])
