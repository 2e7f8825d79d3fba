"""Damaged and absurd files: each ends in a result or one line, never in a traceback or a hang."""

import io
import json
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageMode
from restoring import CAR, DOUBLE, NOISE, write_network
from test_image import png_16bit

from acla.cli import run
from acla.restore import __main__ as restore

SECONDS = 120  # a case that takes longer hangs, even on a busy machine
MODES = (
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX"),
    *("RGBa", "La", "I;16", "I;16L", "I;16B", "I;16N"),
)
SUFFIXES = (".png", ".jpg", ".tif", ".bmp", ".gif", ".webp", ".ppm")
ODD_BYTES = (b"", b"\0", b"\0" * 4096, b"\xff" * 64, b"no picture\n", b"\xff\xd8", b"GIF89a", b"BM")


@pytest.fixture(autouse=True)
def limits(same_threads: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interrupt what hangs, and allow no more than pictures of 0.1 megapixels, which are quick."""
    torch.set_num_threads(1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # Pillow refuses twice as many

    def hang(number: int, frame: object) -> None:
        raise TimeoutError("a case hangs")

    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outcome(tmp_path, capfd) -> Callable[..., str]:
    """Run the command on a file: '' if it wrote a picture that can be read, else its one line."""

    def call(path: Path, network: Path, suffix: str = ".png") -> str:
        out = tmp_path / f"result{suffix}"
        out.unlink(missing_ok=True)
        signal.alarm(SECONDS)
        status = 0
        try:
            run(restore.main, [str(path), str(out), "--checkpoint", str(network)])
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.alarm(0)
        said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
        assert not list(tmp_path.glob(".*"))  # no part of a file stays
        if status:
            assert status in (1, 2)
            assert len(said) == 1
            assert not out.exists()
            return said[0]
        assert not said
        with Image.open(out) as picture:
            picture.load()
        return ""

    return call


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[Path]:
    folder, tasks = tmp_path_factory.mktemp("networks"), {"car": CAR, "noise": NOISE, "x2": DOUBLE}
    return [write_network(folder / f"{name}.safetensors", tasks[name]) for name in tasks]


def encoded(suffix: str, picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def picture_of(mode: str) -> Image.Image:
    """A 9×7 picture of random bytes in any mode."""
    width = {"1": 1, "I": 4, "F": 4}.get(mode) or (2 if mode.startswith("I;16") else 1)
    bands = 1 if width > 1 else len(ImageMode.getmode(mode).bands)
    rng = np.random.default_rng(0)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 255, (7, 9), np.uint8)).convert("1")
    data = rng.integers(0, 256, 7 * 9 * width * bands, np.uint8).tobytes()
    if mode == "F":
        data = rng.normal(0, 1e5, 63).astype(np.float32).tobytes()
    if mode in ("LA", "La", "PA"):
        return Image.merge("LA", [Image.frombytes("L", (9, 7), data[k::2]) for k in (0, 1)])
    if mode == "RGBX":
        return Image.frombytes("RGB", (9, 7), data[:189]).convert(mode)
    return Image.frombytes(mode, (9, 7), data)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow(tmp_path, outcome, networks, mode):
    picture, seen = picture_of(mode), 0
    for suffix in SUFFIXES:
        try:
            data = encoded(suffix, picture)
        except (OSError, ValueError, KeyError):  # a mode that the format cannot hold
            continue
        (tmp_path / f"in{suffix}").write_bytes(data)
        # The first format in every way, the others in one
        outs = (".png", ".jpg", ".tif", ".bmp")
        calls = [(networks[0], outs[seen % 4])]
        if not seen:
            calls = [
                *((networks[0], out) for out in outs),
                *((net, ".png") for net in networks[1:]),
            ]
        for network, out in calls:
            said = outcome(tmp_path / f"in{suffix}", network, out)
            assert mode in ("F", "I", "LAB") or not said, (suffix, network, out, said)
            seen += 1
    assert seen or mode in ("HSV", "PA", "RGBX", "RGBa", "La", "I;16L", "I;16N", "I;16B")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_and_damaged(tmp_path, outcome, networks, make_scene, suffix):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0xA002] = 24
    carried = {"exif": exif.tobytes()} if suffix in (".png", ".jpg", ".tif", ".webp") else {}
    whole = encoded(suffix, Image.fromarray(make_scene(16, 24)), **carried)
    path, rng = tmp_path / f"in{suffix}", np.random.default_rng(1)
    cases = [whole[: len(whole) * part // 12] for part in range(0, 12, 2)]
    for _ in range(25):
        damaged = bytearray(whole)
        # Most of a format's meaning lies at its beginning
        end = min(len(whole), 300) if rng.integers(3) else len(whole)
        for place in rng.integers(0, end, rng.integers(1, 6)):
            damaged[place] = rng.choice([0, 255, 127, 128, rng.integers(256)])
        cases.append(bytes(damaged))
    said = set()
    for case in cases:
        path.write_bytes(case)
        said.add(outcome(path, networks[0]))
    assert any("not a readable picture" in text for text in said)
    path.write_bytes(whole)
    assert outcome(path, networks[0]) == ""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_suffix_and_content_disagree(tmp_path, outcome, networks, make_scene, suffix):
    path = tmp_path / f"in{suffix}"
    for other in SUFFIXES:
        path.write_bytes(encoded(other, Image.fromarray(make_scene(16, 24))))
        assert outcome(path, networks[0]) == ""
    for data in ODD_BYTES:
        path.write_bytes(data)
        assert "not a readable picture" in outcome(path, networks[0])


def absurd_headers() -> dict[str, bytes]:
    """Files that promise far more than they hold."""
    png = encoded(".png", Image.new("L", (4, 4)))
    size, huge = 16, struct.pack(">II", 2**31 - 1, 2**31 - 1)
    bmp = encoded(".bmp", Image.new("RGB", (4, 4)))
    gif = encoded(".gif", Image.new("L", (4, 4)))
    jpeg = encoded(".jpg", Image.new("L", (16, 16)))
    frame = jpeg.index(b"\xff\xc0") + 5
    tif = encoded(".tif", Image.new("L", (4, 4)))
    ifd = struct.unpack_from("<I", tif, 4)[0]
    own = struct.pack("<HIIIIIIII", 1, 0x00010100, 0x00040100, 2**31, *[0] * 5)
    return {
        "png-huge": png[:size] + huge + png[size + 8 :],
        "png-zero": png[:size] + bytes(8) + png[size + 8 :],
        "png-chunk": png[:8] + b"\xff\xff\xff\xff" + png[12:],
        "bmp-huge": bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:],
        "bmp-negative": bmp[:18] + struct.pack("<ii", -4, -(2**31)) + bmp[26:],
        "bmp-depth": bmp[:28] + struct.pack("<H", 65535) + bmp[30:],
        "gif-huge": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "jpeg-huge": jpeg[:frame] + b"\xff\xff\xff\xff" + jpeg[frame + 4 :],
        "jpeg-zero": jpeg[:frame] + bytes(4) + jpeg[frame + 4 :],
        "tif-loop": tif[: ifd + 2] + own + struct.pack("<I", ifd),
        "tif-far": tif[:4] + struct.pack("<I", 2**32 - 1) + tif[8:],
        "ppm-huge": b"P6 2000000000 2000000000 255\n" + bytes(9),
        "ppm-words": b"P6 four four 255\n" + bytes(48),
        "ppm-zero": b"P6 0 0 255\n",
    }


@pytest.mark.parametrize("name", absurd_headers())
def test_absurd_headers(tmp_path, outcome, networks, name):
    path = tmp_path / f"{name}.png"
    path.write_bytes(absurd_headers()[name])
    said = outcome(path, networks[0])
    assert "not a readable picture" in said or "more pixels than Pillow accepts" in said


@pytest.mark.parametrize(("colour", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits(tmp_path, outcome, networks, monkeypatch, colour, samples):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    png_16bit(tmp_path / "deep.png", colour, samples)
    for network in networks:
        assert ("io16" in outcome(tmp_path / "deep.png", network)) == (colour != 0)


# Checkpoints


def test_damaged_checkpoints(tmp_path, outcome, networks, make_scene):
    path, file = tmp_path / "in.png", tmp_path / "damaged.safetensors"
    Image.fromarray(make_scene(8, 8)).save(path)
    whole = networks[0].read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    rng = np.random.default_rng(2)
    cases = [whole[: len(whole) * part // 8] for part in range(8)]
    cases += [*ODD_BYTES, struct.pack("<Q", 2**63) + whole[8:], struct.pack("<Q", 0) + whole[8:]]
    cases += [struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2) + b"[]"]
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(0, 8 + length, rng.integers(1, 5)):
            damaged[place] = rng.integers(256)
        cases.append(bytes(damaged))
    for case in cases:
        file.write_bytes(case)
        outcome(path, file)
    assert "not a whole safetensors file" in outcome(path, path)  # a picture, not a network


CONFIGS = {
    "not-json": "{",
    "a-list": "[1]",
    "deep": "[" * 100_000,
    "number": "1e999",
    "null": "null",
    "empty": "{}",
    "huge": {"width": 4096, "blocks": 256},
    "negative": {"width": -1},
    "text": {"width": "8"},
    "true": {"blocks": True},
    "positions": {"positions": [3, 2], "attention": "acla", "keys": 4},
    "infinite": {"residual_scale": float("inf")},
    "unknown": {"colour": 3},
    "scale": {"scale": 7},
    "other-scale": {"scale": 2},
    "many": {"backbone": "rcan", "blocks": 256, "group_blocks": 256},
    "long": {"residual_scale": 10**400, "setting": -(10**400)},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("key", ["model", "task", "info"])
def test_strange_configurations(tmp_path, outcome, networks, make_scene, key, name):
    path, file = tmp_path / "in.png", tmp_path / "strange.safetensors"
    Image.fromarray(make_scene(8, 8)).save(path)
    whole = networks[0].read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    notes = header["__metadata__"]
    given = CONFIGS[name]
    notes[key] = given if isinstance(given, str) else json.dumps(json.loads(notes[key]) | given)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    said = outcome(path, file)
    fine = (key, name) == ("model", "infinite") or key == "info"
    assert fine or said.startswith(f"error: {file}: ")
