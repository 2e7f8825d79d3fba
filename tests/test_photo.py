"""Photos and what they carry: depth, alpha, orientation, EXIF, profile, the JPEG's own planes."""

import io
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from test_image import png_16bit

from acla.data.image import from_levels, load, to_levels, ycc_to_rgb
from acla.errors import PictureError
from acla.restore import photo

ORIENTATION, EXIF_PART, WIDTH, HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int | None = None) -> Image.Exif:
    """EXIF with a camera, a size, and an orientation if one is given."""
    data = Image.Exif()
    data[0x010F] = "Maker"
    if orientation:
        data[ORIENTATION] = orientation
    data.get_ifd(EXIF_PART).update({WIDTH: 7, HEIGHT: 5, 0x829A: 0.01})
    return data


def reopened(path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


# JPEG


@pytest.mark.parametrize("quality", [1, 10, 37, 50, 75, 95, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_quality_is_read_from_the_table(tmp_path, make_scene, quality, channels):
    path = tmp_path / "a.jpg"
    Image.fromarray(make_scene(9, 20, channels)).save(path, quality=quality)
    assert photo.jpeg_quality(path) == quality


def test_quality_of_a_foreign_table_is_the_nearest(tmp_path, make_scene):
    file = io.BytesIO()
    Image.fromarray(make_scene(16, 16)).save(file, "JPEG", quality=30)
    table = [round(v * 1.03) + k % 2 for k, v in enumerate(Image.open(file).quantization[0])]
    Image.fromarray(make_scene(16, 16)).save(tmp_path / "a.jpg", qtables=[table])
    assert 27 <= photo.jpeg_quality(tmp_path / "a.jpg") <= 30


def test_other_formats_have_no_quality(tmp_path, make_scene):
    Image.fromarray(make_scene(6, 6)).save(tmp_path / "a.png")
    assert photo.jpeg_quality(tmp_path / "a.png") is None


@pytest.mark.parametrize("subsampling", [0, 2], ids=["444", "420"])
def test_ycc_is_what_the_file_holds(tmp_path, make_scene, subsampling):
    path = tmp_path / "a.jpg"
    Image.fromarray(make_scene(41, 30)).save(path, quality=20, subsampling=subsampling)
    own = photo.read(path, ycc=True)
    with Image.open(path) as picture:
        picture.draft("YCbCr", None)
        planes = np.asarray(picture)
    assert own.ycc
    assert np.array_equal(own.levels, planes)
    rgb = to_levels(ycc_to_rgb(from_levels(own.levels.transpose(2, 0, 1))))
    libjpeg = np.asarray(reopened(path))
    assert np.array_equal(photo.read(path).levels, libjpeg)
    apart = np.abs(rgb.astype(int) - libjpeg)
    assert apart.max() <= 1  # where a half is rounded the other way
    assert apart.mean() < 1e-3


def test_a_jpeg_that_holds_rgb_is_read_as_rgb(tmp_path, make_scene):
    path = tmp_path / "a.jpg"
    Image.fromarray(make_scene(16, 16)).save(path, quality=90, keep_rgb=True)
    own = photo.read(path, ycc=True)
    assert not own.ycc
    assert np.array_equal(own.levels, np.asarray(reopened(path)))


# What is carried


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, make_scene, suffix, orientation):
    path, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    stored = Image.fromarray(make_scene(5, 7))
    stored.save(
        path, exif=exif(orientation).tobytes(), **({"quality": 95} if suffix == ".jpg" else {})
    )
    wanted = np.asarray(stored if suffix != ".jpg" else Image.open(path))
    wanted = photo.turned(wanted, orientation)
    own = photo.read(path)
    assert own.levels.shape[:2] == ((5, 7) if orientation < 5 else (7, 5))
    assert np.array_equal(own.levels, wanted)
    photo.save(own, again)
    with Image.open(again) as picture:
        assert picture.getexif().get(ORIENTATION, 1) == 1
        assert picture.getexif()[0x010F] == "Maker"
        assert picture.getexif().get_ifd(EXIF_PART)[0x829A] == pytest.approx(0.01)
    assert photo.read(again).levels.shape == own.levels.shape


def test_turning_is_pillows(make_scene):
    for orientation in range(1, 9):
        picture = Image.fromarray(make_scene(5, 7))
        picture.getexif()[ORIENTATION] = orientation
        turned = np.asarray(ImageOps.exif_transpose(picture))
        assert np.array_equal(photo.turned(make_scene(5, 7), orientation), turned)
    assert np.array_equal(photo.turned(make_scene(5, 7), 6), np.rot90(make_scene(5, 7), -1))


@pytest.mark.parametrize("source", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("target", [".png", ".jpg", ".tiff"])
def test_exif_profile_and_resolution_survive(tmp_path, make_scene, source, target):
    path, out = tmp_path / f"a{source}", tmp_path / f"b{target}"
    Image.fromarray(make_scene(8, 9)).save(
        path, exif=exif().tobytes(), icc_profile=SRGB, dpi=(300, 300)
    )
    own = photo.read(path)
    assert own.icc == SRGB
    assert own.notices == []
    photo.save(own, out)
    saved = reopened(out)
    assert saved.info["icc_profile"] == SRGB
    assert source == ".webp" or saved.info["dpi"][0] == pytest.approx(300, abs=0.1)
    assert saved.getexif()[0x010F] == "Maker"
    if ".tif" not in source + target:
        assert saved.info["exif"] == exif().tobytes()
    assert saved.size == (9, 8)


def test_broken_exif_is_dropped_and_told(tmp_path, make_scene):
    Image.fromarray(make_scene(8, 8)).save(tmp_path / "a.png", exif=b"Exif\0\0no table")
    own = photo.read(tmp_path / "a.png")
    assert own.notices == ["EXIF that cannot be read is dropped"]
    assert np.array_equal(own.levels, make_scene(8, 8))
    photo.save(own, tmp_path / "b.png")
    assert "exif" not in reopened(tmp_path / "b.png").info


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_survives(tmp_path, make_scene, mode):
    levels = make_scene(6, 7, 4)
    picture = Image.fromarray(levels, "RGBA").convert(mode)
    picture.putalpha(Image.fromarray(levels[:, :, 3]))
    picture.save(tmp_path / "a.png")
    own = photo.read(tmp_path / "a.png")
    assert np.array_equal(own.alpha, levels[:, :, 3])
    for suffix in (".png", ".tif"):
        photo.save(own, tmp_path / f"b{suffix}")
        assert reopened(tmp_path / f"b{suffix}").mode == mode
        assert np.array_equal(np.asarray(reopened(tmp_path / f"b{suffix}")), np.asarray(picture))
    for suffix in (".jpg", ".bmp"):
        photo.save(own, tmp_path / f"b{suffix}")
        assert any("no alpha" in text for text in own.notices)
        assert reopened(tmp_path / f"b{suffix}").mode in ("L", "RGB")
        own.notices.clear()


@pytest.mark.parametrize(("mode", "key"), [("L", 9), ("RGB", (1, 2, 3)), ("P", 4)])
def test_transparent_colours_become_alpha(tmp_path, mode, key):
    picture = Image.new(mode, (4, 3), 77 if mode != "RGB" else (7, 7, 7))
    if mode == "P":
        picture.putpalette(list(range(256)) * 3)
    picture.putpixel((1, 2), key)
    picture.save(tmp_path / "a.png", transparency=key)
    alpha = photo.read(tmp_path / "a.png").alpha
    assert alpha[2, 1] == 0
    assert alpha.sum() == 11 * 255


def test_16bit_gray_survives(tmp_path):
    levels = np.array([[0, 1, 257], [65535, 40000, 12345]], np.uint16)
    for suffix in (".png", ".tif"):
        Image.fromarray(levels).save(tmp_path / f"a{suffix}")
        own = photo.read(tmp_path / f"a{suffix}")
        assert np.array_equal(own.levels[:, :, 0], levels)
        photo.save(own, tmp_path / f"b{suffix}")
        assert np.array_equal(np.asarray(reopened(tmp_path / f"b{suffix}")), levels)
    photo.save(own, tmp_path / "b.bmp")
    assert np.asarray(reopened(tmp_path / "b.bmp")).tolist() == [[0, 0, 1], [255, 156, 48]]
    assert "8 bits" in own.notices[0]


def test_cmyk_becomes_rgb_without_its_profile(tmp_path, make_scene):
    picture = Image.fromarray(make_scene(8, 8)).convert("CMYK")
    picture.save(tmp_path / "a.tif", icc_profile=SRGB)
    own = photo.read(tmp_path / "a.tif")
    assert np.array_equal(own.levels, np.asarray(picture.convert("RGB")))
    assert own.icc == b""
    assert own.notices == ["CMYK becomes RGB, without its ICC profile"]


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".png"])
def test_of_several_frames_the_first_is_read(tmp_path, make_scene, suffix):
    frames = [Image.fromarray(make_scene(8, 9, 1, seed)) for seed in (0, 1)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    own = photo.read(tmp_path / f"a{suffix}")
    assert np.array_equal(own.levels[:, :, 0], np.asarray(frames[0]))
    assert own.notices == ["several frames: the first is restored"]


def test_a_damaged_png_is_refused(tmp_path, make_scene):
    path = tmp_path / "a.png"
    Image.fromarray(make_scene(41, 53)).save(path)
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(PictureError, match=r"a\.png: not a readable picture \(broken data"):
        photo.read(path)


@pytest.mark.parametrize("text", ['{"shape": [2, 4, 5, 3]}', "ImageJ=1.53t\nimages=2\n", "A cat"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_s_description_of_its_frames_is_not_that_of_the_result(tmp_path, dtype, text):
    frames = np.arange(2 * 4 * 5 * 3, dtype=dtype).reshape(2, 4, 5, 3)
    tifffile.imwrite(tmp_path / "a.tif", frames, photometric="rgb", description=text, metadata=None)
    photo.save(photo.read(tmp_path / "a.tif"), tmp_path / "b.tif")
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), frames[0])
    with Image.open(tmp_path / "b.tif") as picture:
        assert (picture.getexif().get(0x010E) == text) == (text == "A cat")


def test_a_phone_s_jpeg_of_several_frames(tmp_path, make_scene):
    path, frames = tmp_path / "a.jpg", [Image.fromarray(make_scene(16, 24, 3, s)) for s in (0, 1)]
    frames[0].save(path, "MPO", save_all=True, append_images=frames[1:], quality=30)
    own = photo.read(path, ycc=True)
    assert own.ycc
    assert own.notices == ["several frames: the first is restored"]
    assert photo.jpeg_quality(path) == 30
    assert np.array_equal(photo.read(path).levels, np.asarray(reopened(path)))


def test_bmp_tells_what_it_leaves_out(tmp_path, make_scene):
    own = photo.Photo(make_scene(4, 5), exif=exif().tobytes(), icc=SRGB)
    photo.save(own, tmp_path / "a.bmp")
    assert own.notices == ["BMP is written without EXIF and ICC profile here"]
    assert np.array_equal(np.asarray(reopened(tmp_path / "a.bmp")), make_scene(4, 5))


def test_formats_that_are_programs_are_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(PictureError, match=r"a\.png: not a readable picture"):
        photo.read(tmp_path / "a.png")


# Enlarged


def test_what_no_network_restores_is_enlarged(make_scene):
    colour, alpha = make_scene(5, 7), make_scene(5, 7, 1, 3)
    own = photo.resized(photo.Photo(colour, alpha=alpha, exif=exif().tobytes()), 3)
    wanted = Image.fromarray(alpha).resize((21, 15), Image.Resampling.BICUBIC)
    assert np.array_equal(own.alpha, np.asarray(wanted))
    assert own.levels.shape == (15, 21, 3)
    told = Image.Exif()
    told.load(own.exif)
    assert (told.get_ifd(EXIF_PART)[WIDTH], told.get_ifd(EXIF_PART)[HEIGHT]) == (21, 15)
    deep = photo.enlarged(alpha.astype(np.uint16) * 257, 3)
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - own.alpha).max() <= 1.01  # Pillow rounds 8 bits between passes


# 16 bits in colour


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (6, 4), (4, 2)], ids=["rgb", "rgba", "la"])
def test_16bit_colour_names_the_extra(tmp_path, monkeypatch, colour, samples):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    png_16bit(tmp_path / "deep.png", colour, samples)
    with pytest.raises(PictureError, match=r"deep\.png: .* io16"):
        photo.read(tmp_path / "deep.png")
    with pytest.raises(PictureError, match=r"b\.png: .* io16"):
        photo.save(photo.Photo(np.zeros((2, 2, 3), np.uint16)), tmp_path / "b.png")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (6, 4), (4, 2)], ids=["rgb", "rgba", "la"])
def test_16bit_colour_is_read_in_order(tmp_path, colour, samples):
    pytest.importorskip("imagecodecs", reason="needs the extra io16")
    png_16bit(tmp_path / "deep.png", colour, samples)
    own = photo.read(tmp_path / "deep.png")
    stored = np.tile(np.arange(2 * samples, dtype=np.uint16).reshape(1, 2, samples), (2, 1, 1))
    channels = samples - 1 + samples % 2
    assert np.array_equal(own.levels, stored[:, :, :channels])
    assert (own.alpha is None) == (colour == 2)
    if own.alpha is not None:
        assert np.array_equal(own.alpha, stored[:, :, -1])


def deep_photo(alpha: bool, orientation: int) -> photo.Photo:
    """Noise of 16 bits with all that a photo can carry."""
    levels = np.random.default_rng(0).integers(0, 65536, (5, 7, 4), np.uint16)
    own = photo.Photo(levels[:, :, :3], alpha=levels[:, :, 3] if alpha else None)
    own.exif, own.icc, own.dpi = exif(orientation).tobytes(), SRGB, (300, 72)
    return own


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16bit_colour_survives(tmp_path, suffix, alpha):
    if suffix == ".png":
        pytest.importorskip("imagecodecs", reason="needs the extra io16")
    own = deep_photo(alpha, 6 if suffix == ".png" else 1)
    photo.save(own, tmp_path / f"a{suffix}")
    assert own.notices == []
    again = photo.read(tmp_path / f"a{suffix}")
    turns = -1 if suffix == ".png" else 0
    assert np.array_equal(again.levels, np.rot90(own.levels, turns))
    assert (again.alpha is not None) == alpha
    assert not alpha or np.array_equal(again.alpha, np.rot90(own.alpha, turns))
    assert again.icc == SRGB
    assert again.dpi == pytest.approx((300, 72), abs=0.02)
    told = Image.Exif()
    told.load(again.exif)
    assert told[0x010F] == "Maker"
    assert told.get_ifd(EXIF_PART)[0x829A] == pytest.approx(0.01)
    if suffix == ".png":
        assert again.exif == exif(1).tobytes()


@pytest.mark.parametrize("alpha", [False, True])
def test_a_16bit_tiff_is_what_others_read(tmp_path, alpha):
    own = deep_photo(alpha, 1)
    photo.save(own, tmp_path / "a.tif")
    assert own.notices == []
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        (page,) = file.pages
        planes = own.levels if not alpha else np.dstack([own.levels, own.alpha])
        assert np.array_equal(page.asarray(), planes)
        assert page.photometric.name == "RGB"
        assert [one.name for one in page.extrasamples] == ["UNASSALPHA"] * alpha
        assert page.get_resolution("INCH") == (300, 72)
        assert page.tags["InterColorProfile"].value == SRGB
        assert page.tags["Make"].value == "Maker"
    with Image.open(tmp_path / "a.tif") as picture:
        assert (picture.size, picture.mode) == ((7, 5), "RGBA" if alpha else "RGB")
        assert picture.info["icc_profile"] == SRGB
        assert picture.info["dpi"] == (300, 72)
        assert picture.getexif().get_ifd(EXIF_PART)[0x829A] == pytest.approx(0.01)


def test_16bit_gray_with_alpha_becomes_rgb_in_a_tiff(tmp_path):
    own = deep_photo(True, 1)
    own.levels = own.levels[:, :, :1]
    photo.save(own, tmp_path / "a.tif")
    read = tifffile.imread(tmp_path / "a.tif")
    assert np.array_equal(read, np.dstack([*[own.levels[:, :, 0]] * 3, own.alpha]))


@pytest.mark.parametrize(("samples", "kind"), [(4, "separated"), (5, "separated"), (6, "rgb")])
def test_a_16bit_tiff_of_other_channels_is_refused_in_one_line(tmp_path, capfd, samples, kind):
    levels = np.zeros((9, 7, samples), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric=kind, planarconfig="contig")
    with pytest.raises(PictureError, match=r"a\.tif: ") as error:
        photo.read(tmp_path / "a.tif")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_what_no_tiff_holds_is_told_of(tmp_path):
    own = photo.Photo(np.zeros((2, 2, 3), np.uint16), exif=b"Exif\0\0no table")
    with pytest.raises(PictureError, match=r"a\.tif: cannot be written"):
        photo.save(own, tmp_path / "a.tif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_16bit_tiff_is_applied_once(tmp_path, orientation, order):
    path, planes = tmp_path / "a.tif", deep_photo(True, 1).levels
    tag = [(ORIENTATION, "H", 1, orientation, True)]
    tifffile.imwrite(path, planes, byteorder=order, photometric="rgb", extratags=tag)
    own = photo.read(path)
    turned = [photo.turned(planes[:, :, k], orientation) for k in range(3)]
    assert np.array_equal(own.levels, np.dstack(turned))
    assert np.array_equal(load(path), from_levels(planes.transpose(2, 0, 1)))  # as it is stored
    photo.save(own, tmp_path / "b.tif")
    assert np.array_equal(photo.read(tmp_path / "b.tif").levels, own.levels)
    assert reopened(tmp_path / "b.tif").getexif().get(ORIENTATION, 1) == 1
