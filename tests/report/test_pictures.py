"""Pictures come back as they went in; grids put every picture in its place."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.errors import BadData
from sfumato.report.pictures import as_array, data_uri, encode, grid, save_grid, split_strips


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 5, 7), (5, 7), (1, 3, 5, 7), (4, 5, 7)])
def test_png_keeps_every_level(shape):
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    back = decoded(data_uri(levels / 255))
    expected = levels.reshape(-1, 5, 7) if len(shape) > 2 else levels[None]
    expected = expected[0] if len(expected) == 1 else expected.permute(1, 2, 0)
    assert np.array_equal(back, expected.numpy())


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1), (torch.float64, 1), (torch.uint8, 255), (torch.bool, 1)])
def test_kinds_of_numbers(dtype, scale):
    image = (torch.eye(4) * scale).to(dtype)
    assert np.array_equal(as_array(image), np.eye(4, dtype=np.uint8) * 255)


def test_values_outside_are_cut_off():
    assert as_array(torch.tensor([[-1.0, 2.0, float("nan"), 0.5]])).tolist() == [[0, 255, 0, 128]]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 4), (3, 0, 4)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(BadData, match="picture"):
        encode(torch.zeros(shape))


def test_a_large_photo_becomes_webp_without_visible_loss():
    y, x = torch.meshgrid(torch.linspace(0, 9, 300), torch.linspace(0, 9, 400), indexing="ij")
    photo = torch.stack([x.sin(), (x * y).sin(), y.cos()]) * 0.4 + 0.5
    png, webp = encode(photo), encode(photo, limit=10_000)
    assert png.uri.startswith("data:image/png;")
    assert webp.uri.startswith("data:image/webp;")
    assert len(webp.uri) < len(png.uri)
    assert (webp.width, webp.height) == (400, 300)
    error = decoded(webp.uri).astype(float) - as_array(photo)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35


def test_files_are_taken_as_they_are(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    assert base64.b64decode(data_uri(path).split(",")[1]) == path.read_bytes()
    path.write_bytes(b"\x89PNG broken")
    with pytest.raises(BadData, match=r"a\.png"):
        data_uri(path)
    with pytest.raises(BadData, match="none"):
        data_uri(tmp_path / "none.png")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.none() | st.integers(1, 10)
)
def test_every_picture_is_in_its_place(count, channels, height, width, pad, cols):
    images = torch.rand(count, channels, height, width)
    whole = grid(images, cols=cols, pad=pad, fill=0.5)
    used = min(cols or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // used)
    assert whole.shape == (channels, rows * (height + pad) - pad, used * (width + pad) - pad)
    found = torch.zeros_like(whole, dtype=torch.bool)
    for i, image in enumerate(images):
        place = ..., slice(i // used * (height + pad), None), slice(i % used * (width + pad), None)
        assert torch.equal(whole[place][:, :height, :width], image)
        found[place][:, :height, :width] = True
    assert (whole[~found] == 0.5).all()


def test_grid_refuses_nothing():
    with pytest.raises(BadData, match="N, C, H, W"):
        grid(torch.zeros(0, 3, 4, 4))
    with pytest.raises(BadData, match="N, C, H, W"):
        grid(torch.zeros(3, 4, 4))


def test_save_grid_makes_its_folder(tmp_path):
    path = save_grid(torch.rand(4, 3, 5, 5), tmp_path / "new" / "grid.png")
    with Image.open(path) as image:
        assert image.size == (12, 12)


def test_strips_are_parted_where_save_image_joined_them(tmp_path):
    from torchvision.utils import save_image

    images = torch.rand(4, 3, 6, 9) * 0.5 + 0.4
    save_image(images, tmp_path / "four.png", nrow=4)
    save_image(images[:1], tmp_path / "one.png", nrow=1)
    strip, single = (np.asarray(Image.open(tmp_path / name)) for name in ("four.png", "one.png"))
    black = np.zeros_like(strip)
    for parts in split_strips([black, strip]):
        assert [p.shape for p in parts] == [(6, 9, 3)] * 4
    parts = split_strips([strip])[0]
    assert all(np.abs(p.astype(int) - as_array(i)).max() <= 1 for p, i in zip(parts, images, strict=True))
    assert len(split_strips([single])[0]) == 1
