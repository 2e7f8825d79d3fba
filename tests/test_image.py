"""Files in, files out: every mode, every way to be broken."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from acla.data.image import (
    fit_channels,
    from_levels,
    load,
    luma,
    round_8bit,
    save,
    to_full,
    to_levels,
    to_rgb,
    to_studio,
    ycc_to_rgb,
)
from acla.errors import PictureError
from acla.restore.photo import copy


def png_16bit(path: Path, colour: int, samples: int) -> None:
    """A 2×2 PNG of 16 bits per sample, which Pillow cannot write in colour."""
    rows = b"".join(b"\0" + struct.pack(f">{2 * samples}H", *range(2 * samples)) for _ in range(2))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("mode", "channels"),
    [
        ("L", 1),
        ("LA", 1),
        ("1", 1),
        ("RGB", 3),
        ("RGBA", 3),
        ("P", 3),
        ("CMYK", 3),
        ("YCbCr", 3),
    ],
)
@pytest.mark.parametrize("size", [(7, 5), (1, 9), (9, 1), (1, 1)], ids=str)
def test_every_mode_gives_one_or_three_channels(tmp_path, make_scene, mode, channels, size):
    suffix = ".tif" if mode in ("CMYK", "YCbCr") else ".png"
    picture = Image.fromarray(make_scene(size[1], size[0])).convert(mode)
    picture.save(tmp_path / f"a{suffix}")
    image = load(tmp_path / f"a{suffix}")
    assert image.dtype == torch.float32
    assert image.shape == (channels, size[1], size[0])
    assert image.min() >= 0
    assert image.max() <= 1
    if mode in ("L", "RGB"):
        assert np.array_equal(to_levels(image), np.asarray(picture))


def test_alpha_is_dropped_not_blended(tmp_path):
    levels = np.full((2, 3, 4), 200, np.uint8)
    levels[..., 3] = 0
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert torch.equal(load(tmp_path / "a.png"), torch.full((3, 2, 3), 200 / 255))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16bit_gray_keeps_its_depth(tmp_path, suffix):
    levels = np.array([[0, 1, 257], [65535, 40000, 12345]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a{suffix}")
    image = load(tmp_path / f"a{suffix}")
    assert image.shape == (1, 2, 3)
    assert np.allclose(image[0].numpy() * 65535, levels, atol=0.01)


def test_gray_of_12_bits_or_with_zero_as_white_is_read_as_it_looks(tmp_path):
    levels = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    first, second = levels[:, ::2].ravel(), levels[:, 1::2].ravel()
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    for name, bits, zero_is_black, data in (
        ("12", 12, 1, packed.astype(np.uint8).tobytes()),
        ("16", 16, 0, (65535 - levels * 16).astype("<u2").tobytes()),
    ):
        tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: zero_is_black, 273: 0, 277: 1, 278: 8}
        table = ImageFileDirectory_v2()
        for tag, value in (tags | {279: len(data)}).items():
            table[tag] = value
        file = io.BytesIO()
        table.save(file)
        path = tmp_path / f"{name}.tif"
        path.write_bytes(file.getvalue() + data)
        exact = levels / 4095 if bits == 12 else levels * 16 / 65535
        assert np.allclose(load(path)[0].numpy(), exact, atol=1e-5)
        for target in ("again.tif", "again.png"):
            copy(path, tmp_path / target)
            with Image.open(tmp_path / target) as picture:
                assert np.allclose(np.asarray(picture) / 65535, exact, atol=1e-5)


@pytest.mark.parametrize(("bits", "first"), [(8, -32), (8, 0), (16, -32), (16, 0)])
def test_signed_values_are_refused(tmp_path, bits, first):
    levels = np.arange(first, first + 63, dtype=f"int{bits}").reshape(7, 9)
    tifffile.imwrite(tmp_path / "a.tif", levels)
    with pytest.raises(PictureError, match=rf"a\.tif: signed values of {bits} bits; convert"):
        load(tmp_path / "a.tif")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (6, 4), (4, 2)], ids=["rgb", "rgba", "la"])
def test_16bit_colour_needs_the_extra(tmp_path, monkeypatch, colour, samples):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    png_16bit(tmp_path / "deep.png", colour, samples)
    with pytest.raises(PictureError, match=r"deep\.png: .* io16"):
        load(tmp_path / "deep.png")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (6, 4), (4, 2)], ids=["rgb", "rgba", "la"])
def test_16bit_colour_is_read_with_the_extra(tmp_path, colour, samples):
    pytest.importorskip("imagecodecs", reason="needs the extra io16")
    png_16bit(tmp_path / "deep.png", colour, samples)
    channels = 1 if samples == 2 else 3
    first = torch.arange(channels) / 65535  # the first pixel's samples count from 0
    assert torch.equal(load(tmp_path / "deep.png")[:, 0, 0], first)


def test_the_handmade_png_is_sound(tmp_path):
    png_16bit(tmp_path / "gray.png", 0, 1)
    assert load(tmp_path / "gray.png").shape == (1, 2, 2)


def test_float_tiff_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(PictureError, match=r"f\.tif: gray values in floating point"):
        load(tmp_path / "f.tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_broken_files_are_named(tmp_path, make_scene, suffix):
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(make_scene(40, 40)).save(whole)
    data = whole.read_bytes()
    broken = {"half": data[: len(data) // 2], "zero": b"", "text": b"no picture", "head": data[:20]}
    for name, content in broken.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(PictureError, match=f"{name}{suffix}: not a readable picture") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(PictureError, match=r"none\.png: there is no such file"):
        load(tmp_path / "none.png")
    with pytest.raises(PictureError, match="not a readable picture"):
        load(tmp_path)


def test_bomb_is_refused(tmp_path, monkeypatch, make_scene):
    Image.fromarray(make_scene(30, 30)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match=r"big\.png: more pixels"):
        load(tmp_path / "big.png")


def test_wrong_suffix_reads_by_content(tmp_path, make_scene):
    Image.fromarray(make_scene(6, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert load(tmp_path / "a.jpg").shape == (3, 6, 4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".TIFF"])
def test_save_then_load_is_exact(tmp_path, make_picture, channels, suffix):
    image = make_picture(5, 8, channels)
    save(image, tmp_path / f"a{suffix}")
    assert torch.equal(load(tmp_path / f"a{suffix}"), image)
    assert [f.name for f in tmp_path.iterdir()] == [f"a{suffix}"]  # no temporary file stays


def test_save_rounds_and_clips(tmp_path):
    save(torch.tensor([[[-0.5, 0.4999 / 255, 0.5001 / 255, 1.7]]]), tmp_path / "a.png")
    assert to_levels(load(tmp_path / "a.png")).tolist() == [[0, 0, 1, 255]]


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch, make_picture):
    save(make_picture(4, 4), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(PictureError, match=r"a\.png: cannot be written \(No space left"):
        save(make_picture(4, 4, seed=1), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_save_refuses_unknown_suffix_and_nan(tmp_path):
    with pytest.raises(PictureError, match=r"unknown suffix '\.xyz'; known: \.png"):
        save(torch.zeros(1, 2, 2), tmp_path / "a.xyz")
    with pytest.raises(PictureError, match="not finite"):
        save(torch.full((1, 2, 2), torch.nan), tmp_path / "a.png")


def test_save_into_a_missing_folder_is_named(tmp_path):
    with pytest.raises(PictureError, match="cannot be written"):
        save(torch.zeros(1, 2, 2), tmp_path / "none" / "a.png")


def test_luma_of_known_colours():
    colours = {
        (1, 1, 1): 235,
        (0, 0, 0): 16,
        (1, 0, 0): 81.481,
        (0, 1, 0): 144.553,
        (0, 0, 1): 40.966,
    }
    rgb = torch.tensor(list(colours)).float().T[:, None]  # [3, 1, 5]
    assert torch.allclose(luma(rgb)[0, 0] * 255, torch.tensor(list(colours.values())), atol=1e-4)


def test_channels_fit_the_network(make_picture):
    gray, colour = make_picture(3, 4, 1), make_picture(3, 4, 3)
    assert torch.equal(fit_channels(gray, 1), gray)
    assert torch.equal(fit_channels(gray, 3), to_rgb(gray))
    assert torch.equal(fit_channels(colour, 1), luma(colour))
    assert torch.equal(fit_channels(colour, 3), colour)


def test_full_range_y_and_back(make_picture):
    rgb = make_picture(5, 6)
    y = to_full(luma(rgb))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of BT.601
    torch.testing.assert_close(y, (rgb * weights).sum(0, keepdim=True))
    torch.testing.assert_close(to_studio(y), luma(rgb))


def test_ycc_of_gray_and_of_a_pure_colour():
    half = torch.full((2, 1, 1), 128 / 255)
    gray = torch.cat([torch.full((1, 1, 1), 0.3), half])
    torch.testing.assert_close(ycc_to_rgb(gray), torch.full((3, 1, 1), 0.3))
    red = torch.tensor([76.245, 84.972, 255.5]).view(3, 1, 1) / 255  # JFIF's of 255, 0, 0
    torch.testing.assert_close(
        ycc_to_rgb(red)[:, 0, 0], torch.tensor([1.0, 0, 0]), atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_levels_and_back(dtype):
    levels = np.arange(60, dtype=dtype).reshape(3, 4, 5) * 4
    again = to_levels(from_levels(levels), dtype)
    assert again.dtype == dtype
    assert np.array_equal(again, levels.transpose(1, 2, 0))


def test_round_8bit_lands_on_the_grid():
    image = torch.tensor([-1.0, 0.001, 0.5, 0.9999, 3.0])
    assert torch.equal(round_8bit(image) * 255, torch.tensor([0.0, 0.0, 128.0, 255.0, 255.0]))
