"""Many photos: trees, links, names, and files that are there already."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from restoring import NOISE, call, failure, stored, write_network

from acla.restore import photo


@pytest.fixture
def tree(tmp_path, make_scene):
    """A folder with pictures in it and below it, of which one is broken, and other things."""
    folder = tmp_path / "in"
    for name in ("a.png", "deep/er/b.jpg", "deep/c.tif", ".hidden/d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_scene(10, 12)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("hello")
    return folder


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_tree_is_kept_and_broken_files_come_last(tmp_path, capsys, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    status, err = failure(capsys, tree, tmp_path / "out", "--checkpoint", file)
    assert status == 1
    assert files(tmp_path / "out") == {"a.png", "deep/er/b.jpg", "deep/c.tif"}
    assert np.array_equal(stored(tmp_path / "out/a.png"), stored(tree / "a.png"))
    lines = err.splitlines()
    assert lines[0] == f"{tree}: left out, 1 file of other formats"
    assert lines[-2] == "error: 1 picture could not be restored:"
    assert lines[-1].startswith(f"  {tree}/broken.png: not a readable picture (")


def test_nothing_is_overwritten_unasked(tmp_path, capsys, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tree / "broken.png").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_text("mine")
    flags = [tree, tmp_path / "out", "--checkpoint", file]
    status, err = failure(capsys, *flags)
    assert status == 1
    assert f"{tree}/a.png: {tmp_path}/out/a.png is there already; --overwrite replaces it" in err
    assert (tmp_path / "out/a.png").read_text() == "mine"
    assert (tmp_path / "out/deep/c.tif").is_file()
    call(*flags, "--overwrite")
    assert np.array_equal(stored(tmp_path / "out/a.png"), stored(tree / "a.png"))


def test_a_stopped_folder_goes_on_where_it_was(tmp_path, capsys, tree, monkeypatch):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tree / "broken.png").unlink()
    flags = [tree, tmp_path / "out", "--checkpoint", file]
    with monkeypatch.context() as patch:
        original = photo.save

        def interrupted(restored: photo.Photo, target: Path) -> None:
            if target.name == "c.tif":
                raise KeyboardInterrupt
            original(restored, target)

        patch.setattr(photo, "save", interrupted)
        status, err = failure(capsys, *flags)
    assert status == 130
    assert err.endswith("stopped, 1 of 3 done; --skip-existing goes on from there\n")
    assert files(tmp_path / "out") == {"a.png"}
    written = (tmp_path / "out/a.png").stat().st_mtime_ns
    call(*flags, "--skip-existing")
    assert f"{tmp_path}/out: skipped what is there already, 1 of 3" in capsys.readouterr().err
    assert files(tmp_path / "out") == {"a.png", "deep/er/b.jpg", "deep/c.tif"}
    assert (tmp_path / "out/a.png").stat().st_mtime_ns == written


def test_every_format_in_a_folder_is_restored_or_named(tmp_path, capsys, make_scene):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tmp_path / "in").mkdir()
    frames = [Image.fromarray(make_scene(10, 12, 1, seed)) for seed in (0, 1)]
    frames[0].save(tmp_path / "in/a.gif", save_all=True, append_images=frames[1:])
    for name in ("b.jfif", "c.webp", "d.jpe", "e.ppm", "f.WEBP"):
        frames[0].save(tmp_path / "in" / name)
    flags = [tmp_path / "in", tmp_path / "out", "--checkpoint", file]
    call(*flags)
    assert files(tmp_path / "out") == {"b.jfif", "d.jpe"}
    told = capsys.readouterr().err
    for name in ("a.gif", "c.webp", "e.ppm", "f.WEBP"):
        assert f"in/{name}: left out, no {Path(name).suffix} is written: try --suffix .png" in told
    call(*flags, "--suffix", ".png", "--overwrite")
    assert {"a.png", "b.png", "c.png", "d.png", "e.png", "f.png"} < files(tmp_path / "out")
    assert "a.gif: several frames: the first is restored" in capsys.readouterr().err


def test_pictures_that_are_not_read_are_named(tmp_path, capsys, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tree / "broken.png").unlink()
    for name in ("a.heic", "deep/b.AVIF", "raw.bin"):
        (tree / name).write_bytes(b"no matter what")
    call(tree, tmp_path / "out", "--checkpoint", file)
    assert capsys.readouterr().err.splitlines() == [
        f"{tree}/a.heic: left out, no .heic is read: convert it to PNG or TIFF",
        f"{tree}/deep/b.AVIF: left out, no .AVIF is read: convert it to PNG or TIFF",
        f"{tree}: left out, 2 files of other formats",
    ]


def test_out_inside_in_is_no_input(tmp_path, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tree / "broken.png").unlink()
    for _ in range(2):
        call(tree, tree / "deep/out", "--checkpoint", file, "--overwrite")
    assert files(tree / "deep/out") == {"a.png", "deep/er/b.jpg", "deep/c.tif"}


def test_links_that_leave_the_tree_are_not_followed(tmp_path, capsys, tree, make_scene):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tree / "broken.png").unlink()
    (tmp_path / "secret").mkdir()
    Image.fromarray(make_scene(8, 8)).save(tmp_path / "secret/s.png")
    (tree / "leaves.png").symlink_to(tmp_path / "secret/s.png")
    (tree / "stays.png").symlink_to(tree / "a.png")
    (tree / "folder").symlink_to(tmp_path / "secret")
    (tree / "loop").symlink_to(tree)
    (tree / "self.png").symlink_to(tree / "self.png")
    status, err = failure(capsys, tree, tmp_path / "out", "--checkpoint", file)
    assert status == 1
    assert files(tmp_path / "out") == {"a.png", "stays.png", "deep/er/b.jpg", "deep/c.tif"}
    assert f"{tree}/leaves.png: a link that leaves {tree}, not followed" in err
    assert f"{tree}/folder: a link, not followed" in err
    assert f"{tree}/self.png: no ordinary file" in err


def test_a_pipe_does_not_hang(tmp_path, capsys, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    os.mkfifo(tree / "pipe.png")
    status, err = failure(capsys, tree, tmp_path / "out", "--checkpoint", file)
    assert (status, f"{tree}/pipe.png: no ordinary file" in err) == (1, True)
    status, err = failure(capsys, tree / "pipe.png", tmp_path / "o.png", "--checkpoint", file)
    assert (status, "there is no such file or folder" in err) == (2, True)


def test_two_photos_for_one_file_are_refused(tmp_path, capsys, tree, make_scene):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tree / "broken.png").unlink()
    Image.fromarray(make_scene(10, 12)).save(tree / "a.jpg")
    flags = ["--checkpoint", file, "--suffix", ".png"]
    status, err = failure(capsys, tree, tmp_path / "out", *flags)
    assert status == 1
    assert files(tmp_path / "out") == {"deep/er/b.png", "deep/c.png"}
    for name in ("a.jpg", "a.png"):
        assert f"{tree}/{name}: another picture would be written to {tmp_path}/out/a.png" in err


def test_a_photo_that_is_read_is_never_replaced(tmp_path, capsys, make_scene):
    file = write_network(tmp_path / "net.safetensors", NOISE, shift=0.1)
    folder = tmp_path / "x/x"
    (folder / "x").mkdir(parents=True)
    for path in (folder / "a.png", folder / "x/a.png"):
        Image.fromarray(make_scene(8, 8)).save(path)
    before = (folder / "a.png").read_bytes()
    flags = ["--checkpoint", file, "--overwrite"]
    status, err = failure(capsys, folder, tmp_path / "x", *flags)
    assert (status, "is a picture that is read" in err) == (1, True)
    assert (folder / "a.png").read_bytes() == before
    for same in (folder, f"{folder}/../x"):
        status, err = failure(capsys, folder, same, *flags)
        assert (status, "are the same" in err) == (2, True)
    status, err = failure(capsys, folder / "a.png", folder / "a.png", *flags)
    assert (status, "are the same" in err) == (2, True)


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("none.png", "o.png", "there is no such file or folder"),
        ("in/a.png", "o.xyz", "unknown suffix '.xyz'; known: .png"),
        ("in/a.png", "o", "unknown suffix ''; known: .png"),
        ("in", "file.png", "is a folder, but"),
    ],
)
def test_impossible_paths_are_refused(tmp_path, capsys, tree, source, out, message):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tmp_path / "file.png").touch()
    status, err = failure(capsys, tmp_path / source, tmp_path / out, "--checkpoint", file)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_one_photo_into_a_folder(tmp_path, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    call(tree / "a.png", f"{tmp_path}/new/", "--checkpoint", file)
    call(tree / "deep/c.tif", tmp_path / "new", "--checkpoint", file, "--suffix", ".png")
    assert files(tmp_path / "new") == {"a.png", "c.png"}


def test_an_empty_folder_is_an_error(tmp_path, capsys):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tmp_path / "in").mkdir()
    status, err = failure(capsys, tmp_path / "in", tmp_path / "out", "--checkpoint", file)
    assert (status, "no picture in this folder" in err) == (1, True)


def test_a_bomb_is_refused(tmp_path, capsys, monkeypatch, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    status, err = failure(capsys, tree / "a.png", tmp_path / "o.png", "--checkpoint", file)
    assert (status, "a.png: more pixels than Pillow accepts" in err) == (1, True)


def test_strange_names_stay_in_one_line(tmp_path, capsys, tree):
    file = write_network(tmp_path / "net.safetensors", NOISE)
    (tree / "broken.png").rename(tree / os.fsdecode(b"bro\nken\x1b[2J\xff.png"))
    status, err = failure(capsys, tree, tmp_path / "out", "--checkpoint", file)
    assert status == 1
    assert "bro ken?[2J?.png: not a readable picture" in err.splitlines()[-1]
