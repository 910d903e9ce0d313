import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import png
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps

from sfumato.data import Picture, read_header, read_image, write_image
from sfumato.errors import BadData, BadSetting

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
DEEP = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def chw(array):
    return torch.from_numpy(np.ascontiguousarray(array if array.ndim == 2 else array.transpose(2, 0, 1))).view(
        -1, *array.shape[:2]
    )


def same(tensor, array):
    return np.array_equal(tensor.numpy(), chw(array).numpy())


def png16(path, array):
    channels = array.shape[-1]
    writer = png.Writer(array.shape[1], array.shape[0], greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16)
    with open(path, "wb") as file:
        writer.write(file, array.reshape(array.shape[0], -1).tolist())


def exif(**tags):
    block = Image.Exif()
    block[0x010F] = "Maker"
    for tag, value in tags.items():
        block[int(tag[1:], 16)] = value
    return block


# What is read


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif", "webp"])
def test_eight_bit_colour_is_read_as_stored(tmp_path, suffix):
    path = tmp_path / f"ein Bild – ünïcode 写真.{suffix}"
    Image.fromarray(COLOUR).save(path, **({"lossless": True} if suffix == "webp" else {}))
    picture = read_image(path)
    assert same(picture.pixels, COLOUR)
    assert (picture.bits, picture.notes, picture.alpha) == (8, (), None)
    assert picture.float().max() <= 1
    assert picture.float().dtype == torch.float32
    assert read_header(path) == (3, 20, 30)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_keeps_every_bit_and_comes_back(tmp_path, channels):
    stored = RNG.integers(0, 65536, (20, 30, channels)).astype(np.uint16)
    png16(tmp_path / "in.png", stored)
    picture = read_image(str(tmp_path / "in.png"))
    colours = stored[..., : 1 if channels < 3 else 3]
    assert picture.pixels.dtype == torch.uint16
    assert same(picture.pixels, colours)
    assert (picture.alpha is not None) == (channels in (2, 4))
    write_image(tmp_path / "out.png", picture.float(), picture)
    again = read_image(tmp_path / "out.png")
    assert same(again.pixels, colours)
    assert picture.alpha is None or np.array_equal(again.alpha.numpy(), picture.alpha.numpy())


@pytest.mark.parametrize("array", [DEEP, DEEP[..., 0]])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_sixteen_bit_tiff_keeps_every_bit_and_comes_back(tmp_path, array, compression):
    tifffile.imwrite(tmp_path / "in.tif", array, compression=compression, photometric="rgb" if array.ndim == 3 else "minisblack")
    picture = read_image(tmp_path / "in.tif")
    assert picture.bits == 16
    assert same(picture.pixels, array)
    write_image(tmp_path / "out.tiff", picture.float(), picture)
    assert same(read_image(tmp_path / "out.tiff").pixels, array)
    assert read_header(tmp_path / "in.tif") == (3 if array.ndim == 3 else 1, 20, 30)


def test_sixteen_bit_tiff_in_a_compression_that_only_pillow_knows(tmp_path):
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    picture = read_image(tmp_path / "lzw.tif")
    assert same(picture.pixels, DEEP[..., 0])
    assert picture.notes == ()


def test_planar_tiff_and_white_is_zero(tmp_path):
    tifffile.imwrite(tmp_path / "planes.tif", DEEP.transpose(2, 0, 1), planarconfig="separate", photometric="rgb")
    assert same(read_image(tmp_path / "planes.tif").pixels, DEEP)
    tifffile.imwrite(tmp_path / "white.tif", DEEP[..., 0], photometric="miniswhite")
    assert same(read_image(tmp_path / "white.tif").pixels, 65535 - DEEP[..., 0])


@pytest.mark.parametrize(("low", "high", "kind"), [(0, 1, np.float32), (-3.5, 900, np.float64), (-200, 70_000, np.int32)])
def test_tiff_of_floats_or_wide_integers_keeps_its_values_through_a_round_trip(tmp_path, low, high, kind):
    values = RNG.uniform(low, high, (20, 30)).astype(kind)
    tifffile.imwrite(tmp_path / "in.tif", values)
    picture = read_image(tmp_path / "in.tif")
    assert picture.bits == 16
    assert any("16 bits" in note for note in picture.notes)
    write_image(tmp_path / "out.tif", picture.float(), picture)
    assert np.abs(tifffile.imread(tmp_path / "out.tif") - values).max() < 1e-4 * (high - low)
    write_image(tmp_path / "out.png", picture.float(), picture)
    assert same(read_image(tmp_path / "out.png").pixels, picture.pixels[0].numpy())


def test_tiff_with_nan_is_refused(tmp_path):
    values = RNG.random((8, 8)).astype(np.float32)
    values[3, 3] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", values)
    with pytest.raises(BadData, match=r"nan\.tif: holds NaN"):
        read_image(tmp_path / "nan.tif")


def test_colour_floats_are_read_by_tifffile_alone(tmp_path):
    tifffile.imwrite(tmp_path / "in.tif", DEEP.astype(np.float32) / 65535, photometric="rgb")
    assert same(read_image(tmp_path / "in.tif").pixels, DEEP)


def test_palette_cmyk_one_bit_and_transparency_are_converted_and_said(tmp_path):
    def read(name, image, **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    colour = Image.fromarray(COLOUR)
    palette = colour.quantize(256)
    picture = read("palette.png", palette)
    assert same(picture.pixels, np.array(palette.convert("RGB")))
    assert picture.notes == ("palette made RGB",)
    picture = read("see-through.gif", palette, transparency=int(np.array(palette)[0, 0]))
    assert picture.alpha is not None
    assert picture.alpha[0, 0, 0] == 0
    assert picture.alpha.max() == 255
    picture = read("print.tif", colour.convert("CMYK"))
    assert picture.pixels.shape == (3, 20, 30)
    assert picture.notes == ("CMYK made RGB",)
    assert (picture.pixels.int() - chw(COLOUR).int()).abs().max() <= 2
    picture = read("fax.png", colour.convert("1"))
    assert picture.pixels.shape == (1, 20, 30)
    assert sorted(picture.pixels.unique().tolist()) == [0, 255]
    assert same(read("grey.jpg", colour.convert("L"), quality=100).pixels.float().mul(0), COLOUR[..., 0] * 0.0)
    with_alpha = np.dstack((COLOUR, COLOUR[..., :1]))
    picture = read("alpha.png", Image.fromarray(with_alpha))
    assert same(picture.pixels, COLOUR)
    assert same(picture.alpha, COLOUR[..., 0])
    assert len(picture.notes) == 1


def test_cmyk_profile_does_not_travel_to_the_rgb_picture(tmp_path):
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "print.jpg", icc_profile=SRGB)  # a profile that does not fit
    picture = read_image(tmp_path / "print.jpg")
    assert picture.icc is None
    assert picture.pixels.shape == (3, 20, 30)


def test_animations_and_stacks_give_their_first_frame(tmp_path):
    frames = [Image.fromarray(f) for f in (COLOUR, 255 - COLOUR)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    picture = read_image(tmp_path / "a.tif")
    assert same(picture.pixels, COLOUR)
    assert "several frames" in picture.notes[0]


def test_sixteen_bit_pgm(tmp_path):
    body = DEEP[..., 0].astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 30 20 65535\n" + body)
    picture = read_image(tmp_path / "a.pgm")
    assert picture.bits == 16
    assert same(picture.pixels, DEEP[..., 0])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_pillow_does_and_stay_so(tmp_path, orientation, suffix):
    smooth = np.asarray(Image.fromarray(COLOUR[:5, :7]).resize((30, 20)))
    Image.fromarray(smooth).save(tmp_path / f"in.{suffix}", exif=exif(t0112=orientation))
    picture = read_image(tmp_path / f"in.{suffix}")
    with Image.open(tmp_path / f"in.{suffix}") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert same(picture.pixels, upright)
    assert read_header(tmp_path / f"in.{suffix}") == (3, *upright.shape[:2])
    write_image(tmp_path / "out.png", picture.float(), picture)
    assert same(read_image(tmp_path / "out.png").pixels, upright)
    with Image.open(tmp_path / "out.png") as image:
        assert image.getexif()[0x0112] == 1
        assert image.getexif()[0x010F] == "Maker"


def test_sixteen_bit_tiff_is_turned_upright_and_layout_tags_do_not_travel(tmp_path):
    tifffile.imwrite(
        tmp_path / "in.tif", DEEP, photometric="rgb", software="S", extratags=[(274, "H", 1, 6), (271, "s", 0, "Maker")]
    )
    picture = read_image(tmp_path / "in.tif")
    assert same(picture.pixels, np.rot90(DEEP, -1))
    assert read_header(tmp_path / "in.tif") == (3, 30, 20)
    write_image(tmp_path / "out.jpg", picture.float(), picture)
    with Image.open(tmp_path / "out.jpg") as image:
        assert dict(image.getexif()) == {0x010F: "Maker", 0x0112: 1, 0x0131: "S"}


# What is written


@pytest.mark.parametrize(
    ("suffix", "deep"), [("png", False), ("png", True), ("jpg", False), ("tif", False), ("tif", True), ("webp", False)]
)
def test_profile_and_camera_travel_with_the_pixels(tmp_path, suffix, deep):
    if deep:
        like = Picture(chw(DEEP), icc=SRGB, exif=exif().tobytes())
    else:
        like = Picture(chw(COLOUR), icc=SRGB, exif=exif().tobytes())
    write_image(tmp_path / f"out.{suffix}", like.float(), like)
    again = read_image(tmp_path / f"out.{suffix}")
    assert again.icc == SRGB
    assert again.bits == (16 if deep and suffix in ("png", "tif") else 8)
    if not (deep and suffix == "tif"):
        assert Image.open(tmp_path / f"out.{suffix}").getexif()[0x010F] == "Maker"
    write_image(tmp_path / f"grey.{suffix}", like.float()[:1], like)
    assert read_image(tmp_path / f"grey.{suffix}").icc is None or suffix == "webp"  # an RGB profile on grey would be a lie


def test_jpeg_is_written_without_colour_subsampling_and_drops_alpha(tmp_path):
    like = Picture(chw(COLOUR), alpha=chw(COLOUR[..., 0]))
    write_image(tmp_path / "a.jpg", like.float(), like)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "RGB"
        assert [(part[1], part[2]) for part in image.layer] == [(1, 1)] * 3
    assert (read_image(tmp_path / "a.jpg").pixels.int() - like.pixels.int()).abs().float().mean() < 6


def test_alpha_follows_an_enlarged_picture(tmp_path):
    alpha = torch.zeros(1, 20, 30, dtype=torch.uint8)
    alpha[:, :, 15:] = 255
    like = Picture(chw(COLOUR), alpha=alpha)
    write_image(tmp_path / "a.png", torch.rand(3, 40, 60), like)
    again = read_image(tmp_path / "a.png")
    assert again.alpha.shape == (1, 40, 60)
    assert again.alpha[..., :29].max() == 0
    assert again.alpha[..., 31:].min() == 255


def test_writing_clips_makes_folders_and_takes_stored_levels(tmp_path):
    write_image(tmp_path / "new" / "folder" / "a.PNG", torch.tensor([[[-1.0, 2.0]]]))
    assert read_image(tmp_path / "new" / "folder" / "a.PNG").pixels.tolist() == [[[0, 255]]]
    write_image(tmp_path / "b.png", chw(COLOUR))
    assert same(read_image(tmp_path / "b.png").pixels, COLOUR)


def test_what_cannot_be_written_is_said_and_leaves_the_old_file(tmp_path):
    write_image(tmp_path / "a.png", chw(COLOUR))
    with pytest.raises(BadData, match="NaN"):
        write_image(tmp_path / "a.png", torch.full((1, 2, 2), float("nan")))
    assert same(read_image(tmp_path / "a.png").pixels, COLOUR)
    with pytest.raises(BadData, match=r"cannot write \.xyz: say .*\.png"):
        write_image(tmp_path / "a.xyz", torch.zeros(1, 2, 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadData, match="choose another place"):
        write_image(tmp_path / "file" / "a.png", torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="1 or 3"):
        write_image(tmp_path / "a.png", torch.zeros(2, 2, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "file"]


# What is refused


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(path, width=50_000, height=50_000, bits=8):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [8, 16])
def test_decompression_bomb_is_refused_by_its_header(tmp_path, bits, monkeypatch):
    bomb(tmp_path / "bomb.png", bits=bits)
    for read in (read_image, read_header):
        with pytest.raises(BadData, match=r"bomb\.png: 50000 x 50000 is 2500 million .* limit is 200.*SFUMATO_MAX_PIXELS"):
            read(tmp_path / "bomb.png")
    before = Image.MAX_IMAGE_PIXELS
    bomb(tmp_path / "honest.png", 20_000, 15_000)  # 300 million: more than Pillow allows
    assert read_header(tmp_path / "honest.png", max_pixels=300_000_000) == (3, 15_000, 20_000)
    monkeypatch.setenv("SFUMATO_MAX_PIXELS", "300000000")
    assert read_header(tmp_path / "honest.png").width == 20_000
    assert before == Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv("SFUMATO_MAX_PIXELS", "many")
    with pytest.raises(BadSetting, match="'many'"):
        read_header(tmp_path / "honest.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp", "ppm", "png16", "tif16", "jp2", "avif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused_in_one_line(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix.removesuffix('16')}"
    if suffix == "png16":
        png16(path, DEEP)
    elif suffix == "tif16":
        tifffile.imwrite(path, DEEP, photometric="rgb")
    else:
        Image.fromarray(np.kron(COLOUR, np.ones((4, 4, 1), np.uint8))).save(path)
    body = path.read_bytes()
    path.write_bytes(body[: int(share * len(body))])
    with pytest.raises(BadData) as error:
        read_image(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_things_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, I am a text\n" * 5)
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "print.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, words in {
        "empty.png": "empty file", "text.png": "not an image", "phone.heic": "HEIC", "print.eps": "not an image",
        "missing.png": "no such file",
    }.items():  # fmt: skip
        for read in (read_image, read_header):
            with pytest.raises(BadData, match=words) as error:
                read(tmp_path / name)
            assert str(error.value).startswith(f"{tmp_path / name}: ")
    with pytest.raises(BadData, match="directory"):
        read_image(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path):
    write_image(tmp_path / "a.png", torch.zeros(1, 2, 2))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(BadData, match="Permission denied"):
        read_image(tmp_path / "a.png")


def test_damaged_exif_does_not_cost_the_pixels(tmp_path):
    body = io.BytesIO()
    Image.fromarray(COLOUR).save(body, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    (tmp_path / "a.jpg").write_bytes(body.getvalue())
    assert read_image(tmp_path / "a.jpg").pixels.shape == (3, 20, 30)


def test_reading_from_many_threads(tmp_path):
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    wrong: list[Path] = []

    def work():
        for i in range(8):
            path = tmp_path / f"{i}.png"
            if not bool((read_image(path).pixels == i).all()):
                wrong.append(path)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
