"""The bar over the pixels of a batch, and the estimate before it."""

import re

import pytest
import torch
from PIL import Image
from restoring import CAR, call, tiny, write_network

from acla.errors import PictureError
from acla.restore import inference, photo, progress
from acla.restore.progress import PixelBar, announce, duration, sizes_of


@pytest.fixture
def photos(tmp_path, make_scene):
    """A JPEG, a PNG, and what cannot be read."""
    paths = [tmp_path / "in" / name for name in ("a.jpg", "b.png", "broken.jpg")]
    paths[0].parent.mkdir()
    Image.fromarray(make_scene(30, 41)).save(paths[0], quality=10)
    Image.fromarray(make_scene(70, 45)).save(paths[1])
    paths[2].write_bytes(b"no picture")
    return paths


def test_the_bar_counts_what_will_be_restored(photos):
    assert sizes_of(photos, photo.jpeg_quality) == {photos[0]: (30, 41)}
    sizes = sizes_of(photos, lambda path: True)
    assert sizes == {photos[0]: (30, 41), photos[1]: (70, 45)}
    bar = PixelBar(sizes)
    assert bar.bar.total == pytest.approx((30 * 41 + 70 * 45) / 1e6)
    bar.begin(photos[0], "1/3 a.jpg")
    bar.bar.start_t -= 60  # of reading
    bar.advance(0)
    bar.advance(0.75)
    assert "| 0.001/0.004 MP [00:00<" in str(bar.bar)
    assert bar.bar.n == pytest.approx(0.75 * 30 * 41 / 1e6)
    bar.advance(0.25)  # again, with smaller tiles
    assert bar.bar.n == pytest.approx(0.25 * 30 * 41 / 1e6)
    bar.end(restored=True)
    bar.begin(photos[1], "2/3 b.png")
    bar.advance(0.5)
    bar.end(restored=False)
    assert [bar.bar.n, bar.bar.total] == pytest.approx([30 * 41 / 1e6] * 2)


def test_a_phones_200_megapixels_are_accepted(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "small.jpg")
    small = (tmp_path / "small.jpg").read_bytes()
    header = b"\x08" + (8).to_bytes(2) + (8).to_bytes(2)  # bits, height, width
    assert small.count(header) == 1
    for height, width in ((12240, 16320), (20000, 16320)):
        large = header[:1] + height.to_bytes(2) + width.to_bytes(2)
        (tmp_path / f"{height}.jpg").write_bytes(small.replace(header, large))
    paths = [tmp_path / "12240.jpg", tmp_path / "20000.jpg"]
    assert sizes_of(paths, photo.jpeg_quality) == {paths[0]: (12240, 16320)}
    with pytest.raises(PictureError, match=r"20000.jpg: more pixels than Pillow accepts"):
        photo.jpeg_quality(paths[1])


@pytest.mark.parametrize("tile", [None, 32])
def test_every_tile_is_told_of(tile):
    shares = []
    strips = inference.strips(tiny(CAR), torch.rand(1, 70, 41), tile, False, shares.append)
    assert sum(strip.shape[1] for strip in strips) == 70
    count = 6 if tile else 1  # three rows of two
    assert shares == pytest.approx([i / count for i in range(count + 1)])


def test_an_estimate_comes_before_the_first_large_photo(tmp_path, photos, capsys, monkeypatch):
    file = write_network(tmp_path / "car.safetensors", CAR)
    flags = [photos[0].parent / "a.jpg", tmp_path / "a.png", "--checkpoint", file]
    call(*flags)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(progress.TILE, 1, 32)
    call(*flags, "--overwrite")
    told = capsys.readouterr().err
    assert re.match(r"1 picture, 0\.001 megapixels: about \d+ s, [\d.]+ s/MP\n", told)


def test_the_estimate_counts_tiles_that_overlap(tmp_path, capsys, monkeypatch):
    ticks = iter([0.0, 99.0, 100.0, 100.0 + 128 * 128 / 1e6 * 30])  # 30 s/MP after a slow start
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))
    announce(tiny(CAR), {tmp_path: (512, 768), tmp_path / "b": (200, 100)}, None, False)
    seconds = 30 * (2 * 3 * 272 * 278 + 200 * 100) / 1e6
    rate = seconds * 1e6 / (512 * 768 + 200 * 100)
    told = f"2 pictures, 0.413 megapixels: about {seconds:.0f} s, {rate:.3g} s/MP\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (150.1, "3 min"), (11_110, "3 h 05 min")]
)
def test_durations_read_easily(seconds, text):
    assert duration(seconds) == text
