"""Pages of photos before and after: which belong together, what they hold, what is refused."""

import base64
import io
import os
import sys
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from restoring import DOUBLE, call, write_network

from acla.analysis import gallery
from acla.cli import run
from acla.errors import DataError, PictureError, UsageError
from acla.restore.photo import Photo

pytest.importorskip("jinja2", reason="needs the extra report")

ORIENTATION = 0x0112
ROOT = Path(__file__).parents[1]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class Reader(HTMLParser):
    """What a browser makes of a page: tags with attributes, and the text outside of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text += "" if self.inside in ("script", "style") else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make(before: Path, after: Path, *flags: str) -> Reader:
    """The page of two paths."""
    out = before.parent / "page.html"
    gallery.main([str(before), str(after), str(out), *flags])
    return Reader(out.read_text(encoding="utf-8"))


def held(image: dict[str, str | None]) -> tuple[str, bytes]:
    """The type and the bytes of what an <img> shows."""
    head, _, data = image["src"].partition(";base64,")
    return head, base64.b64decode(data, validate=True)


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


def store(path: Path, levels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path, **options)
    return path


@pytest.fixture
def two(tmp_path, make_scene) -> tuple[Path, Path]:
    """A JPEG and what it became: a PNG twice as large."""
    old = store(tmp_path / "a.jpg", make_scene(5, 7), quality=30)
    return old, store(tmp_path / "b.png", make_scene(10, 14))


# What the page holds


def test_two_photos_are_held_byte_for_byte(two, capsys):
    reader = make(*two)
    before, after = reader.all("img")
    assert held(before) == ("data:image/jpeg", two[0].read_bytes())
    assert held(after) == ("data:image/png", two[1].read_bytes())
    assert (before["width"], before["height"], before["class"]) == ("7", "5", "before enlarged")
    assert (after["width"], after["height"], after["class"]) == ("14", "10", "after")
    (pair,) = [tag for tag in reader.all("div") if tag["class"] == "pair"]
    assert pair["style"] == f"--width: 14; --height: 10; --at: {pair['data-x']}"
    assert "a.jpg, 7×5 pixels, JPEG quality 30 ·" in reader.text
    assert "b.png, 14×10 pixels ·" in reader.text
    assert "enlarged ×2 brightness " in reader.text
    assert capsys.readouterr().out.startswith(f"written: {two[0].parent}/page.html: pairs 1, ")


def test_the_divider_and_the_switch_are_ordinary_controls(two):
    reader = make(*two)
    (slider,) = reader.all("input")
    assert [slider[name] for name in ("type", "min", "max", "step")] == ["range", "0", "100", "any"]
    assert "a.jpg" in slider["aria-label"]
    (zoom,), zooms = reader.all("select"), reader.all("option")
    assert (zoom["id"], [one["value"] for one in zooms]) == ("zoom", ["fit", "1", "2", "4", "8"])
    assert [one["value"] for one in zooms if "selected" in one] == ["1"]


@pytest.mark.parametrize(
    ("change", "marks"),
    [
        ((0, 0, 0), ["unchanged"]),
        ((1, 0, 0), ["hardly changed"]),
        ((4, 4, 4), ["brightness 1.0 levels"]),
        ((12, 0, -24), ["colour 2.7 levels"]),
        ((40, 0, 0), ["brightness 3.0 levels", "colour 3.3 levels"]),
    ],
)
def test_pairs_are_marked_by_what_changed(change, marks):
    before = np.full((64, 80, 3), 100, np.uint8)
    after = before.copy()
    after[:32, 40:] = 100 + np.array(change)  # a quarter
    found, x, y = gallery.compared(Photo(before), Photo(after))
    assert found == marks
    assert (x, y) == (0.5, 0.5) if not any(change) else (x > 0.4, y < 0.6)


def test_the_region_that_changed_most_is_found(monkeypatch):
    monkeypatch.setattr(gallery, "REGION", 8)
    before = np.full((50, 80, 1), 100, np.uint8)
    after = before.copy()
    after[:20, :20] += 1
    after[28:36, 60:68] += 9
    _, x, y = gallery.compared(Photo(before), Photo(after.repeat(3, 2)))
    assert (x, y) == (64 / 80, 32 / 50)


def test_the_log_of_restoring_tells_the_model(two, capsys):
    log = two[0].parent / "log.txt"
    log.write_text(f"x: y\n{two[1]}: sr x2, net.safetensors (--task sr)\n", encoding="utf-8")
    reader = make(*two, "--log", str(log))
    assert "b.png, 14×10 pixels, sr x2, net.safetensors (--task sr) ·" in reader.text


def test_nothing_is_fetched_from_anywhere(two):
    reader = make(*two)
    assert not {tag for tag, _ in reader.tags} & {"link", "iframe", "object", "embed", "base", "a"}
    assert all(image["src"].startswith("data:image/") for image in reader.all("img"))
    assert [tag for tag, given in reader.tags if {"src", "href"} & given.keys()] == ["img"] * 2
    markup = gallery.TEMPLATE.read_text(encoding="utf-8").replace("http-equiv", "")
    for word in ("http", "://", "url(", "@import", "import(", "fetch("):
        assert word not in markup
    (policy,) = [tag["content"] for tag in reader.all("meta") if tag.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".gif", ".ppm"])
def test_what_browsers_may_not_show_becomes_png(tmp_path, make_scene, suffix):
    levels = make_scene(5, 7, 1)
    path = store(tmp_path / f"a{suffix}", levels)
    after = store(tmp_path / "b.webp", make_scene(5, 7), lossless=True)
    before, webp = make(path, after).all("img")
    kind, data = held(before)
    assert kind == "data:image/png"
    shown = np.atleast_3d(decoded(data))  # a GIF's palette became RGB
    assert np.array_equal(shown, levels[:, :, None].repeat(shown.shape[2], 2))
    assert held(webp) == ("data:image/webp", after.read_bytes())


def test_alpha_and_profile_go_into_the_png(tmp_path, make_scene):
    levels = np.dstack([make_scene(5, 7), make_scene(5, 7, 1, 3)])
    path = store(tmp_path / "a.tif", levels, icc_profile=SRGB)
    _, data = held(make(path, store(tmp_path / "b.png", levels)).all("img")[0])
    assert np.array_equal(decoded(data), levels)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.info["icc_profile"] == SRGB


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_orientation_is_applied_once(tmp_path, make_scene, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: to be shown a quarter clockwise
    path = store(tmp_path / f"a{suffix}", make_scene(5, 7), exif=exif)
    stored = decoded(path.read_bytes()) if suffix != ".tif" else make_scene(5, 7)
    before, _ = make(path, store(tmp_path / "b.png", make_scene(7, 5))).all("img")
    kind, data = held(before)
    assert (kind, before["width"], before["height"]) == ("data:image/png", "5", "7")
    assert np.array_equal(decoded(data), np.rot90(stored, -1))
    with Image.open(io.BytesIO(data)) as picture:
        assert ORIENTATION not in picture.getexif()


def test_sixteen_bits_are_rounded_to_eight(tmp_path, make_scene):
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (5, 7), np.uint16)
    deep[0, :4] = 0, 128, 129, 65535
    wanted = np.round(deep / 257)
    before, _ = make(
        store(tmp_path / "a.png", deep), store(tmp_path / "b.png", make_scene(5, 7))
    ).all("img")
    levels = decoded(held(before)[1])
    assert levels.dtype == np.uint8
    assert np.array_equal(levels, wanted)
    colour = np.dstack([deep, deep[::-1], deep[:, ::-1]])
    alpha = deep.T.reshape(5, 7)
    rgba = decoded(gallery.to_png(Photo(colour, alpha=alpha)))
    assert rgba.dtype == np.uint8
    assert np.array_equal(rgba, np.round(np.dstack([colour, alpha]) / 257))


def test_of_several_frames_the_first_is_shown(tmp_path, make_scene, capsys):
    first, second = (Image.fromarray(make_scene(5, 7, seed=seed)) for seed in (0, 1))
    path = tmp_path / "a.png"
    first.save(path, save_all=True, append_images=[second])
    kind, data = held(make(path, store(tmp_path / "b.png", make_scene(5, 7))).all("img")[0])
    assert kind == "data:image/png"
    assert np.array_equal(decoded(data), make_scene(5, 7))
    with Image.open(io.BytesIO(data)) as picture:
        assert not getattr(picture, "is_animated", False)
    assert f"{path}: several frames: the first" in capsys.readouterr().err


def test_cmyk_becomes_rgb(tmp_path, make_scene):
    path = tmp_path / "a.jpg"
    Image.fromarray(make_scene(5, 7)).convert("CMYK").save(path)
    kind, data = held(make(path, store(tmp_path / "b.png", make_scene(5, 7))).all("img")[0])
    assert (kind, decoded(data).shape) == ("data:image/png", (5, 7, 3))


@pytest.mark.parametrize(
    "name",
    [
        '"><script>alert(1)<.png',
        "'onerror='alert(1).png",
        "<!--<img src=x onerror=alert(1)>.png",
        "{{ pairs }}{% raw %}&lt;.png",
        "line\nbreak\u202e.png",
        os.fsdecode(b"no text \xff.png"),
    ],
    ids=["double", "single", "comment", "template", "control", "bytes"],
)
def test_names_are_text_whatever_they_hold(tmp_path, make_scene, name):
    try:
        old = store(tmp_path / "in" / name, make_scene(5, 7))
        store(tmp_path / "out" / name, make_scene(5, 7))
    except OSError:
        pytest.skip("this file system takes no such name")
    plain = make(*two_named(tmp_path, make_scene, "plain.png"))
    reader = make(old.parent, tmp_path / "out", "--overwrite")
    assert [(tag, at.keys()) for tag, at in reader.tags] == [
        (tag, at.keys()) for tag, at in plain.tags
    ]
    shown = name.encode("utf-8", "replace").decode()
    assert reader.all("img")[1]["alt"] == f"after: {shown}"
    assert reader.text == plain.text.replace("plain.png", shown)


def two_named(folder: Path, make_scene, name: str) -> tuple[Path, Path]:
    """Two folders with one photo each."""
    for part in ("x", "y"):
        store(folder / part / name, make_scene(5, 7))
    return folder / "x", folder / "y"


# Which belong together


def test_a_restored_tree_is_paired(tmp_path, make_scene, capsys):
    folder = tmp_path / "in"
    for name in ("b.jpg", "deep/er/a.JPG", "deep/c.tif"):
        store(folder / name, make_scene(8, 9))
    (folder / "notes.txt").write_text("hello")
    out = folder / "restored"
    network = write_network(tmp_path / "net.safetensors", DOUBLE)
    call(folder, out, "--checkpoint", network, "--suffix", ".png")
    capsys.readouterr()
    reader = make(folder, out)
    assert [at["alt"] for at in reader.all("img")] == [
        "before: b.jpg",
        "after: b.png",
        "before: deep/c.tif",
        "after: deep/c.png",
        "before: deep/er/a.JPG",
        "after: deep/er/a.png",
    ]
    assert [at["width"] for at in reader.all("img")] == ["9", "18"] * 3
    assert held(reader.all("img")[5])[1] == (out / "deep/er/a.png").read_bytes()
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{folder}: left out, 1 file of other formats"
    )


def test_what_has_no_partner_is_told(tmp_path, make_scene, capsys):
    old, new = two_named(tmp_path, make_scene, "a.png")
    store(old / "deep/b.png", make_scene(5, 7))
    store(new / "b.png", make_scene(5, 7))
    assert len(make(old, new).all("img")) == 2
    told = capsys.readouterr().err
    assert f"{old}/deep/b.png: no partner\n" in told
    assert f"{new}/b.png: no partner\n" in told


def test_a_broken_photo_is_left_out(tmp_path, make_scene, capsys):
    old, new = two_named(tmp_path, make_scene, "a.png")
    (old / "broken.png").write_bytes(b"no picture")
    assert len(make(old, new).all("img")) == 2
    (new / "broken.png").write_bytes(b"no picture")
    assert len(make(old, new, "--overwrite").all("img")) == 2
    assert f"left out: {old}/broken.png: not a readable picture" in capsys.readouterr().err
    (new / "a.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=f"(?s){new}/a.png: .*{old}/broken.png: not a"):
        make(old, new, "--overwrite")


def test_names_that_differ_in_their_suffix_alone(tmp_path, make_scene, capsys):
    old, new = two_named(tmp_path, make_scene, "a.png")
    for folder in (old, new):
        store(folder / "a.jpg", make_scene(5, 7))
    images = make(old, new).all("img")
    assert [image["alt"][-5:] for image in images] == ["a.jpg", "a.jpg", "a.png", "a.png"]
    (old / "a.jpg").unlink()  # as if damaged, and so not restored
    images = make(old, new, "--overwrite").all("img")
    assert [image["alt"][-5:] for image in images] == ["a.png", "a.png"]
    assert f"{new}/a.jpg: no partner\n" in capsys.readouterr().err
    store(old / "a.tif", make_scene(5, 7))
    images = make(old, new, "--overwrite").all("img")
    assert [image["alt"][-5:] for image in images][2:] == ["a.tif", "a.jpg"]


def test_no_pair_is_an_error(tmp_path, make_scene):
    old, new = two_named(tmp_path, make_scene, "a.png")
    (new / "a.png").rename(new / "b.png")
    with pytest.raises(DataError, match=f"no picture of {old} .* is in {new} too"):
        make(old, new)
    assert not (tmp_path / "page.html").exists()


def test_another_proportion_is_an_error_that_names_both(tmp_path, make_scene):
    old = store(tmp_path / "a.png", make_scene(5, 7))
    for height, width in ((7, 5), (10, 13), (11, 14)):
        new = store(tmp_path / "b.png", make_scene(height, width))
        told = rf"{old} is 7×5 pixels \(width × height\), {new} is {width}×{height}: "
        with pytest.raises(DataError, match=told):
            make(old, new)


# What is refused


def failure(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str]:
    """The exit status and the message of a call that must fail."""
    with pytest.raises(SystemExit) as stop:
        run(gallery.main, [str(word) for word in argv])
    return stop.value.code, capsys.readouterr().err


def test_impossible_calls_are_refused_in_one_line(tmp_path, two, capsys):
    (old, new), out = two, tmp_path / "o.html"
    for status, argv, told in (
        (1, (tmp_path / "none.png", new, out), "none.png: "),
        (2, (old, tmp_path, out), "give two photos or two folders"),
        (2, (old, new, tmp_path / "o.png"), "must end in .html"),
        (2, (old, new, tmp_path / "none/o.html"), f"there is no folder {tmp_path}/none"),
    ):
        code, err = failure(capsys, *argv)
        assert (code, err.count("\n")) == (status, 1)
        assert told in err
    assert not out.exists()


def test_a_page_is_overwritten_when_asked(tmp_path, two, capsys):
    out = tmp_path / "page.html"
    out.write_text("mine")
    status, err = failure(capsys, *two, out)
    assert (status, err) == (2, f"error: {out} is there already; --overwrite replaces it\n")
    failure(capsys, two[0], tmp_path / "none.png", out, "--overwrite")
    assert out.read_text() == "mine"
    assert len(make(*two, "--overwrite").all("img")) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.jpg", "b.png", "page.html"}


def test_a_page_has_a_bound(two, monkeypatch):
    size = sum(len(image["src"]) for image in make(*two).all("img"))
    monkeypatch.setattr(gallery, "LIMIT", size)
    make(*two, "--overwrite")
    monkeypatch.setattr(gallery, "LIMIT", size - 1)
    (two[0].parent / "page.html").unlink()
    with pytest.raises(UsageError, match=rf"{two[0]}: no pair fits on a page of .* MiB"):
        make(*two)
    assert not (two[0].parent / "page.html").exists()


def test_a_page_holds_what_fits_and_names_the_rest(tmp_path, make_scene, monkeypatch, capsys):
    old, new = two_named(tmp_path, make_scene, "b.png")
    for folder in (old, new):
        store(folder / "a.png", make_scene(50, 70))
        store(folder / "c.png", make_scene(5, 7))
    monkeypatch.setattr(gallery, "LIMIT", 2000)
    reader = make(old, new)
    assert [at["alt"] for at in reader.all("img")][::2] == ["before: b.png", "before: c.png"]
    assert "Too large for the page and left out: a.png" in reader.text
    assert "too large for the page, left out, 1: a.png" in capsys.readouterr().err


def test_without_jinja2_it_says_what_to_install(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"pip install '.\[report\]'"):
        make(*two)


def test_the_template_comes_along():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = setup["tool"]["setuptools"]["package-data"]["acla.analysis"]
    assert any(fnmatch("gallery.html", pattern) for pattern in shipped)
