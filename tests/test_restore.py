"""Photos through the command: what a network changes, and what it must leave."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from restoring import CAR, DOUBLE, EXACT, MOSAIC, NOISE, call, failure, stored, write_network

from acla.data.degradations import mosaic
from acla.data.image import from_levels, luma
from acla.models.backbones import Backbone
from acla.models.serialization import load_model
from acla.restore import __main__ as command
from acla.restore import colour, inference, photo
from acla.restore.colour import NetworkInput
from acla.restore.inference import restore

ROOT = Path(__file__).parents[1]
ORIENTATION = 0x0112


@pytest.fixture
def jpeg(tmp_path, make_scene):
    """A colour JPEG of quality 12 with odd sides and halved chroma."""
    path = tmp_path / "in.jpg"
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    options = {"exif": exif.tobytes(), "icc_profile": b"profile"}
    Image.fromarray(make_scene(45, 61)).save(path, quality=12, **options)
    return path


def ycc(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        picture.draft("YCbCr", None)
        return np.asarray(picture)


def restored(path: Path, file: Path, jpeg: bool) -> np.ndarray:
    """Levels before they are encoded."""
    network = load_model(file)
    source = photo.read(path, ycc=True)
    return colour.restore_photo(source, network, jpeg=jpeg).levels


def test_identity_changes_nothing(tmp_path, jpeg):
    file = write_network(tmp_path / "car.safetensors", CAR)
    assert np.array_equal(restored(jpeg, file, jpeg=True), ycc(jpeg))
    call(jpeg, tmp_path / "out.png", "--checkpoint", file)
    apart = np.abs(stored(tmp_path / "out.png").astype(int) - stored(jpeg))
    assert apart.max() <= 1
    assert apart.mean() < 1e-3
    with Image.open(tmp_path / "out.png") as written, Image.open(jpeg) as source:
        assert written.info["exif"] == source.info["exif"]
        assert written.info["icc_profile"] == b"profile"


def test_car_moves_y_and_keeps_cb_and_cr(tmp_path, jpeg):
    file = write_network(tmp_path / "car.safetensors", CAR, shift=20 / 255)
    before, after = ycc(jpeg), restored(jpeg, file, jpeg=True)
    assert np.array_equal(after[:, :, 1:], before[:, :, 1:])
    assert np.array_equal(after[:, :, 0], np.minimum(before[:, :, 0].astype(int) + 20, 255))
    call(jpeg, tmp_path / "out.jpg", "--checkpoint", file, "--no-project")
    written = ycc(tmp_path / "out.jpg").astype(int)
    assert np.abs(written - after).mean() < 1  # quality 95, full chroma
    with Image.open(tmp_path / "out.jpg") as picture:
        assert photo.jpeg_quality(tmp_path / "out.jpg") == 95
        assert {layer[1:3] for layer in picture.layer} == {(1, 1)}


def test_car_on_other_formats_moves_all_colours_alike(tmp_path, make_scene):
    file = write_network(tmp_path / "car.safetensors", CAR, shift=9 / 255)
    levels = make_scene(33, 20)
    Image.fromarray(levels).save(tmp_path / "in.png")
    call(tmp_path / "in.png", tmp_path / "out.bmp", "--checkpoint", file)
    assert np.array_equal(stored(tmp_path / "out.bmp"), np.minimum(levels.astype(int) + 9, 255))


@pytest.mark.parametrize("source", [".png", ".tif", ".bmp", ".webp"])
@pytest.mark.parametrize("target", [".png", ".tif"])
def test_what_is_no_jpeg_is_left_as_it_is(tmp_path, capsys, make_scene, source, target):
    path, out = tmp_path / f"in{source}", tmp_path / f"out{target}"
    levels = make_scene(20, 31)
    levels[:16, :16] = 255
    Image.fromarray(levels).save(path, **({"lossless": True} if source == ".webp" else {}))
    call(path, out)
    assert np.array_equal(stored(out), levels)
    assert source != target or out.read_bytes() == path.read_bytes()
    said, told = capsys.readouterr()
    assert said == f"{out}: not restored\n"
    assert re.search(rf"in{source}: not a JPEG.*--task, --q or --checkpoint", told)
    path.write_bytes(b"no picture")
    status, err = failure(capsys, path, tmp_path / "no.png")
    assert (status, "not a readable picture" in err) == (1, True)
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_without_y_is_left_as_it_is(tmp_path, capsys, make_scene, mode):
    options = {"quality": 30, **({"keep_rgb": True} if mode == "RGB" else {})}
    Image.fromarray(make_scene(20, 31)).convert(mode).save(tmp_path / "in.jpg", **options)
    call(tmp_path / "in.jpg", tmp_path / "out.jpg")
    assert (tmp_path / "out.jpg").read_bytes() == (tmp_path / "in.jpg").read_bytes()
    assert "not a JPEG with Y" in capsys.readouterr().err


@pytest.mark.parametrize(("quality", "written"), [(12, 95), (85, 95), (88, 98), (96, 100)])
def test_a_good_jpeg_is_written_as_a_better_one(tmp_path, make_scene, quality, written):
    file = write_network(tmp_path / "car.safetensors", CAR)
    Image.fromarray(make_scene(20, 31)).save(tmp_path / "in.jpg", quality=quality)
    call(tmp_path / "in.jpg", tmp_path / "out.jpg", "--checkpoint", file)
    assert photo.jpeg_quality(tmp_path / "out.jpg") == written


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_other_gray_networks_see_the_y_they_were_trained_on(tmp_path, make_scene, suffix):
    file = write_network(tmp_path / "net.safetensors", NOISE, shift=2.19 / 255, channels=1)
    path = tmp_path / f"in{suffix}"
    Image.fromarray(make_scene(20, 31) // 2 + 30).save(path)
    source = photo.read(path, ycc=True)
    seen = NetworkInput(source, NOISE, 1)[:, :, :]
    torch.testing.assert_close(
        seen, luma(from_levels(stored(path).transpose(2, 0, 1))), atol=3e-3, rtol=0
    )
    after = colour.restore_photo(source, load_model(file)).levels.astype(int)
    # Of 219 levels, 2.19 are what 2.55 are of 255
    assert np.abs(after - stored(path) - 2.55).max() < 1.6
    assert np.abs((after - stored(path)).mean() - 2.55) < 0.5


@pytest.mark.parametrize("task", [CAR, NOISE], ids=str)
def test_of_a_large_photo_one_tile_at_a_time_is_made_float(tmp_path, make_scene, monkeypatch, task):
    path, made = tmp_path / "in.jpg", []
    Image.fromarray(make_scene(130, 101)).save(path, quality=60)
    network = load_model(write_network(tmp_path / "net.safetensors", task))
    source, whole = photo.read(path, ycc=task == CAR), NetworkInput.__getitem__
    expected = colour.restore_photo(source, network).levels

    def recorded(self, part):
        made.append(whole(self, part))
        return made[-1]

    monkeypatch.setattr(NetworkInput, "__getitem__", recorded)
    levels = colour.restore_photo(source, network, tile=48).levels
    assert max(part.shape[1] * part.shape[2] for part in made) <= 48 * 48
    np.testing.assert_allclose(levels, expected, atol=1)


def test_a_photo_is_turned_once(tmp_path, make_scene):
    file = write_network(tmp_path / "car.safetensors", CAR)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    levels = make_scene(20, 31)
    Image.fromarray(levels).save(tmp_path / "in.png", exif=exif)
    call(tmp_path / "in.png", tmp_path / "out.png", "--checkpoint", file)
    assert np.array_equal(stored(tmp_path / "out.png"), np.rot90(levels, -1))
    with Image.open(tmp_path / "out.png") as written:
        assert written.getexif()[ORIENTATION] == 1


@pytest.mark.parametrize("task", [CAR, NOISE], ids=str)
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_mode_depth_and_alpha_survive(tmp_path, make_scene, task, mode):
    file = write_network(tmp_path / "net.safetensors", task, shift=5 / 255)
    levels = make_scene(12, 17, 4)
    picture = Image.fromarray(levels[:, :, 0].astype(np.uint16) * 250)
    if mode != "I;16":
        picture = Image.fromarray(levels).convert(mode)
    if mode.endswith("A"):
        picture.putalpha(Image.fromarray(levels[:, :, 3]))
    picture.save(tmp_path / "in.png")
    call(tmp_path / "in.png", tmp_path / "out.png", "--checkpoint", file)
    before, after = stored(tmp_path / "in.png"), stored(tmp_path / "out.png")
    assert before.dtype == after.dtype
    top = np.iinfo(before.dtype).max
    wanted = np.minimum(before.astype(int) + 5 * top // 255, top)
    if mode.endswith("A"):
        wanted[:, :, -1] = before[:, :, -1]
    assert np.array_equal(after, wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_sr_enlarges_colour_and_alpha(tmp_path, make_scene, channels):
    file = write_network(tmp_path / "net.safetensors", DOUBLE, channels=channels)
    levels = make_scene(12, 17, 4)
    Image.fromarray(levels).save(tmp_path / "in.png")
    call(tmp_path / "in.png", tmp_path / "out.png", "--checkpoint", file)
    after = stored(tmp_path / "out.png")
    alpha = Image.fromarray(levels[:, :, 3]).resize((34, 24), Image.Resampling.BICUBIC)
    assert after.shape == (24, 34, 4)
    assert np.array_equal(after[:, :, 3], np.asarray(alpha))
    if channels == 3:
        seen = torch.from_numpy(levels[:, :, :3].copy()).permute(2, 0, 1) / 255
        answer = restore(load_model(file).model, seen)
        wanted = (answer * 255).round().clamp(0, 255).permute(1, 2, 0).numpy()
        assert np.array_equal(after[:, :, :3], wanted)


def test_a_mosaic_is_restored_and_a_photo_refused(tmp_path, capsys, make_scene):
    file = write_network(tmp_path / "net.safetensors", MOSAIC, shift=3 / 255)
    levels = torch.from_numpy(make_scene(9, 12)).permute(2, 0, 1)
    pattern = mosaic(levels).permute(1, 2, 0).numpy()
    Image.fromarray(pattern).save(tmp_path / "mosaic.png")
    call(tmp_path / "mosaic.png", tmp_path / "out.png", "--checkpoint", file)
    wanted = np.minimum(pattern.astype(int) + 3, 255)
    assert np.array_equal(stored(tmp_path / "out.png"), wanted)
    Image.fromarray(make_scene(9, 12)).save(tmp_path / "photo.png")
    status, err = failure(capsys, tmp_path / "photo.png", tmp_path / "no.png", "--checkpoint", file)
    assert status == 1
    assert "photo.png: an ordinary photo; a demosaicing network wants" in err
    assert not (tmp_path / "no.png").exists()
    flags = ["--checkpoint", file, "--ensemble"]
    status, err = failure(capsys, tmp_path / "mosaic.png", tmp_path / "no.png", *flags)
    assert (status, err.count("\n")) == (2, 1)


def test_ensemble_and_tiles_are_flags(tmp_path, capsys, make_scene):
    file = write_network(tmp_path / "net.safetensors", DOUBLE)
    Image.fromarray(make_scene(90, 100)).save(tmp_path / "in.png")
    flags = [tmp_path / "in.png", tmp_path / "out.png", "--checkpoint", file, "--overwrite"]
    written = []
    for more in ([], ["--ensemble"], ["--tile", 80, "--compare"]):
        call(*flags, *more)
        written.append(stored(tmp_path / "out.png").astype(int))
    assert (written[0] != written[1]).any()
    assert np.abs(written[0] - written[2]).max() <= 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert re.search(r"tiles move [01] of 255 levels at most", out[2])


def test_what_cannot_be_compared_is_said(tmp_path, capsys, monkeypatch, make_scene):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    Image.fromarray(make_scene(90, 100)).save(tmp_path / "in.png")
    forward = Backbone.forward

    def short(self, pictures):
        if pictures[0, 0].numel() > 8000:
            raise MemoryError
        return forward(self, pictures)

    monkeypatch.setattr(Backbone, "forward", short)
    flags = ["--checkpoint", file, "--tile", 80, "--compare"]
    call(tmp_path / "in.png", tmp_path / "out.png", *flags)
    out, err = capsys.readouterr()
    assert out.endswith(", too little memory to take it whole and compare\n")
    assert "out of memory" not in err  # it is not tried with smaller tiles
    assert np.array_equal(stored(tmp_path / "out.png"), stored(tmp_path / "in.png"))


def test_16_bits_in_colour_survive(tmp_path):
    codecs = pytest.importorskip("imagecodecs", reason="needs the extra io16")
    file = write_network(tmp_path / "car.safetensors", CAR, shift=1 / 65535)
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 65535, (9, 14, 4)).astype(np.uint16)
    (tmp_path / "in.png").write_bytes(codecs.png_encode(levels))
    call(tmp_path / "in.png", tmp_path / "out.png", "--checkpoint", file)
    after = codecs.png_decode((tmp_path / "out.png").read_bytes())
    assert np.array_equal(after[:, :, 3], levels[:, :, 3])
    assert np.array_equal(after[:, :, :3], levels[:, :, :3] + 1)


def test_large_photos_are_tiled_by_default():
    assert inference.default_tile(1, 384, 384) is None
    assert inference.default_tile(1, 385, 384) == 384
    assert inference.default_tile(2, 4000, 6000) == 192


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_6_megapixels_fit_into_little_memory(tmp_path, make_scene):
    """The photo may be held, as bytes and as the network's input, but no feature map of it all."""
    code = (
        "import resource, sys; from acla.restore import __main__ as command\n"
        "for name in ('small', 'large'):\n"
        "    command.main([f'{name}.jpg', f'{name}.out.jpg', *sys.argv[1:]])\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    file = write_network(tmp_path / "car.safetensors", CAR)
    for name, times in (("small", 1), ("large", 5)):
        picture = Image.fromarray(np.tile(make_scene(400, 600), (times, times, 1)))
        picture.save(tmp_path / f"{name}.jpg", quality=10)
    command = [sys.executable, "-c", code, "--checkpoint", str(file), "--device", "cpu"]
    options = {"capture_output": True, "text": True, "check": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    peaks = [1024 * int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert len(peaks) == 2
    assert peaks[1] - peaks[0] < 32 * 6e6  # a feature map of 8 channels has 32 bytes a pixel
    assert peaks[1] < 2 * 2**30


def test_no_more_than_a_row_of_tiles_lies_in_float(tmp_path, make_scene, monkeypatch):
    network = load_model(write_network(tmp_path / "net.safetensors", CAR, channels=3))
    Image.fromarray(make_scene(190, 60)).save(tmp_path / "in.jpg", quality=20)
    pixels, original = [], colour.image.from_levels

    def count(levels: np.ndarray) -> torch.Tensor:
        pixels.append(levels[0].size)
        return original(levels)

    monkeypatch.setattr(colour.image, "from_levels", count)
    source = photo.read(tmp_path / "in.jpg", ycc=True)
    colour.restore_photo(source, network, 32, cells=photo.read_cells(tmp_path / "in.jpg"))
    assert 0 < max(pixels) <= 60 * 32


def test_an_answer_that_is_not_finite_is_refused(tmp_path, capsys, jpeg):
    file = write_network(tmp_path / "net.safetensors", CAR, shift=torch.nan)
    status, err = failure(capsys, jpeg, tmp_path / "out.png", "--checkpoint", file)
    assert status == 1
    assert err.endswith("in.jpg: the network's output is not finite\n")
    assert not (tmp_path / "out.png").exists()


# As the README says


def test_the_readme_commands_are_understood():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("python -m acla.restore ")]
    assert lines
    for line in lines:
        command.parse(shlex.split(line, comments=True)[3:])


def test_a_short_format_is_near_and_named(tmp_path, capsys, jpeg):
    file = write_network(
        tmp_path / "car.safetensors", CAR, attention="acla", keys=2, positions=(1,)
    )
    call(jpeg, tmp_path / "long.png", "--checkpoint", file, "--no-project")
    capsys.readouterr()
    short = ["--checkpoint", file, "--no-project", "--precision", "bf16"]
    call(jpeg, tmp_path / "short.png", *short)
    assert capsys.readouterr().out.endswith("car.safetensors, bf16\n")
    apart = stored(tmp_path / "long.png").astype(int) - stored(tmp_path / "short.png")
    assert np.abs(apart).max() <= 1


def test_it_is_a_module_to_run(tmp_path, jpeg):
    file = write_network(tmp_path / "car.safetensors", CAR)
    command = [sys.executable, "-m", "acla.restore", jpeg, tmp_path / "o.png", "--checkpoint", file]
    done = subprocess.run(
        [*map(str, command), *EXACT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/o.png: car q10, {file}\n"
    assert done.stderr == ""
