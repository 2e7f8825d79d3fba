"""XMP, IPTC, comments, long EXIF, and JPEGs that end early."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from restoring import CAR, call, failure, stored, write_network

from acla.restore import metadata, photo

XMP = b"<x:xmpmeta tiff:Orientation='6' xmp:Rating='5'/>"
IPTC = metadata.PHOTOSHOP + b"8BIM\x04\x04\0\0\0\0\0\x0d\x1c\x02\x78\0\x05A cat\0"


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2) + data


def jpeg(levels: np.ndarray, *segments: bytes, **options: object) -> bytes:
    """A JPEG with segments of its own behind the first two bytes."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", **options)
    return b"\xff\xd8" + b"".join(segments) + file.getvalue()[2:]


def described(text: str, maker_note: bytes = b"") -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x010E] = "Maker", text
    if maker_note:
        exif.get_ifd(0x8769).update({0x927C: maker_note, 0x829A: 0.01})
    return exif


def carrying(tmp_path: Path, make_scene) -> Path:
    """A JPEG with XMP in two parts, IPTC and a comment, to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    own = [
        segment(0xE1, metadata.XMP + XMP),
        segment(0xE1, metadata.LONG_XMP + b"more"),
        segment(0xED, IPTC),
        segment(0xFE, b"a comment"),
        segment(0xEB, b"a signature of the old pixels"),
    ]
    (tmp_path / "a.jpg").write_bytes(jpeg(make_scene(20, 31), *own, quality=10, exif=exif))
    return tmp_path / "a.jpg"


def test_a_jpeg_keeps_xmp_iptc_and_comment(tmp_path, capsys, make_scene):
    file, path = write_network(tmp_path / "car.safetensors", CAR), carrying(tmp_path, make_scene)
    call(path, tmp_path / "b.jpg", "--checkpoint", file)
    assert capsys.readouterr().err == ""
    with Image.open(tmp_path / "b.jpg") as picture:
        kept = {data for name, data in picture.applist if name in ("APP1", "APP13", "COM")}
        upright = metadata.XMP + XMP.replace(b"6", b"1")
        wanted = {upright, metadata.LONG_XMP + b"more", IPTC, b"a comment"}
        assert wanted < kept
        assert "APP11" not in dict(picture.applist)


@pytest.mark.parametrize(
    ("suffix", "lost"), [(".png", "IPTC, XMP"), (".tif", "IPTC, XMP, comment"), (".bmp", "XMP")]
)
def test_other_formats_tell_what_they_lose(tmp_path, capsys, make_scene, suffix, lost):
    file, path = write_network(tmp_path / "car.safetensors", CAR), carrying(tmp_path, make_scene)
    call(path, tmp_path / f"b{suffix}", "--checkpoint", file)
    assert lost in capsys.readouterr().err
    with Image.open(tmp_path / f"b{suffix}") as picture:
        if suffix == ".png":
            assert picture.text["Comment"] == "a comment"
            assert picture.info["xmp"] == XMP.replace(b"6", b"1")


def test_texts_of_a_png_survive_in_a_png(tmp_path, capsys, make_scene):
    file, info = write_network(tmp_path / "car.safetensors", CAR), PngInfo()
    info.add_text("Author", "Anna")
    info.add_itxt("Title", "Größe 猫")
    info.add_itxt(metadata.PNG_XMP, XMP.decode())
    Image.fromarray(make_scene(9, 14)).save(tmp_path / "a.png", pnginfo=info)
    call(tmp_path / "a.png", tmp_path / "b.png", "--checkpoint", file)
    with Image.open(tmp_path / "b.png") as picture:
        assert (picture.text["Author"], picture.text["Title"]) == ("Anna", "Größe 猫")
        assert metadata.PNG_XMP in picture.text
    assert capsys.readouterr().err == ""
    call(tmp_path / "a.png", tmp_path / "b.jpg", "--checkpoint", file)
    assert "not kept in this JPEG: text" in capsys.readouterr().err
    with Image.open(tmp_path / "b.jpg") as picture:
        assert picture.info["xmp"] == XMP.replace(b"6", b"1")


@pytest.mark.parametrize("length", [100, 60_000, 70_000])
def test_exif_in_two_segments_is_kept_as_far_as_it_fits(tmp_path, capsys, make_scene, length):
    file = write_network(tmp_path / "car.safetensors", CAR)
    exif = described("x" * length, bytes(40_000) if length > 100 else b"").tobytes()
    parts = [exif[:60_000], *([b"Exif\0\0" + exif[60_000:]] if len(exif) > 60_000 else [])]
    segments = [segment(0xE1, part) for part in parts]
    (tmp_path / "a.jpg").write_bytes(jpeg(make_scene(20, 31), *segments, quality=10))
    call(tmp_path / "a.jpg", tmp_path / "b.jpg", "--checkpoint", file)
    told = capsys.readouterr().err
    assert ("bytes of EXIF are too long for a JPEG" in told) == (length > 100)
    with Image.open(tmp_path / "b.jpg") as picture:
        kept = picture.getexif()
        assert kept[0x010F] == "Maker"
        assert (0x010E in kept) == (length == 100)
        if length > 100:
            assert kept.get_ifd(0x8769)[0x829A] == pytest.approx(0.01)
    call(tmp_path / "a.jpg", tmp_path / "b.png", "--checkpoint", file)
    with Image.open(tmp_path / "b.png") as picture:
        assert len(picture.getexif()[0x010E]) == length


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("missing", [2, 1, 200])
def test_a_jpeg_that_ends_early_is_read_as_far_as_it_goes(
    tmp_path, capsys, make_scene, channels, missing
):
    file = write_network(tmp_path / "car.safetensors", CAR)
    whole = jpeg(make_scene(45, 61, channels), quality=60)
    (tmp_path / "whole.jpg").write_bytes(whole)
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[:-missing])
    call(path, tmp_path / "b.png", "--checkpoint", file)
    assert "a.jpg: the file ends early" in capsys.readouterr().err
    before, after = (
        photo.read(tmp_path / name).levels.astype(int) for name in ("whole.jpg", "b.png")
    )
    assert np.abs(after[:8] - before[:8]).mean() < 6
    assert missing < 3 or np.ptp(after[-5:, -8:]) < np.ptp(before[-5:, -8:])  # as good as flat
    assert missing > 2 or np.abs(after - before).mean() < 6
    path.write_bytes(whole[:100])  # not even the tables
    status, err = failure(capsys, path, tmp_path / "no.png", "--checkpoint", file)
    assert (status, "a.jpg: not a readable picture" in err) == (1, True)


@pytest.mark.parametrize("order", [(0, 1), (2, 3), (3, 1)], ids=str)
def test_the_quality_is_that_of_the_table_in_use(tmp_path, make_scene, order):
    """Tables may have any numbers, and a file may hold some that no component uses."""
    data = jpeg(make_scene(20, 31), quality=10)
    unused = jpeg(make_scene(8, 8, 1), quality=95)
    at = unused.index(b"\xff\xdb")
    spare = unused[at : at + 69] if 0 not in order else b""
    for old, new in enumerate(order):
        place = -1
        for _ in range(old + 1):
            place = data.index(b"\xff\xdb", place + 1)
        data = data[: place + 4] + bytes([new]) + data[place + 5 :]
    frame = data.index(b"\xff\xc0")
    for component, table in enumerate((order[0], order[1], order[1])):
        place = frame + 12 + 3 * component
        data = data[:place] + bytes([table]) + data[place + 1 :]
    (tmp_path / "a.jpg").write_bytes(data[:2] + spare + data[2:])
    (tmp_path / "plain.jpg").write_bytes(jpeg(make_scene(20, 31), quality=10))
    assert np.array_equal(stored(tmp_path / "a.jpg"), stored(tmp_path / "plain.jpg"))
    assert photo.jpeg_quality(tmp_path / "a.jpg") == 10
    assert photo.read_cells(tmp_path / "a.jpg").planes[0].steps[0, 0] == 80
