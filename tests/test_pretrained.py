"""The model that a photo gets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from restoring import DOUBLE, call, failure, stored, write_network

from acla.config import Task
from acla.restore import pretrained, progress


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """A folder of models for qualities 10, 20 and 40 and for ×2."""
    tasks = {f"car-q{q}-paper": Task("car", q) for q in (10, 20, 40)}
    return provide(tmp_path / "weights", monkeypatch, tasks | {"sr-x2-paper": DOUBLE})


def provide(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tasks: dict[str, Task], **fields: object
) -> Path:
    """Add pretrained models with these names, those of the same size shifted by their setting."""
    for name, task in tasks.items():
        shift = (task.setting + task.until) / 255
        write_network(folder / f"{name}.safetensors", task, shift, **fields)
    monkeypatch.setattr(pretrained, "FOLDERS", (folder,))
    return folder


@pytest.mark.parametrize(
    ("quality", "nearest", "outside"),
    [
        (5, 10, False),
        (4, 10, True),
        (13, 10, False),
        (19, 20, False),
        (44, 40, False),
        (90, 40, True),
    ],
)
def test_the_quality_of_the_file_picks_the_network(
    tmp_path, capsys, make_scene, networks, quality, nearest, outside
):
    Image.fromarray(make_scene(16, 16, 1) // 2).save(tmp_path / "in.jpg", quality=quality)
    call(tmp_path / "in.jpg", tmp_path / "out.png", "--no-project")
    before, after = stored(tmp_path / "in.jpg"), stored(tmp_path / "out.png")
    assert np.array_equal(after, before + nearest)
    out, err = capsys.readouterr()
    assert f"car q{nearest}, car-q{nearest}-paper (JPEG quality {quality}, gray)" in out
    assert (f"JPEG quality {quality} is outside what the network was trained for" in err) == outside


@pytest.mark.parametrize(
    ("quality", "chosen", "outside"),
    [
        (4, "q5-60", True),
        (5, "q10", False),
        (13, "q10", False),
        (28, "q5-60", False),
        (60, "q5-60", False),
        (61, "q5-60", True),
        (65, "q5-60", True),
        (80, "q5-60", True),
    ],
)
def test_a_network_for_many_qualities_takes_what_no_other_serves(
    tmp_path, capsys, monkeypatch, make_scene, quality, chosen, outside
):
    tasks = {"a": Task("car", 10), "b": Task("car", 5, 60)}
    provide(tmp_path / "weights", monkeypatch, tasks)
    Image.fromarray(make_scene(16, 16, 1)).save(tmp_path / "in.jpg", quality=quality)
    call(tmp_path / "in.jpg", tmp_path / "out.png", "--no-project")
    out, err = capsys.readouterr()
    assert f"car {chosen}, " in out
    assert ("is outside what the network was trained for (car q5-60)" in err) == outside
    Image.fromarray(make_scene(16, 16, 1)).save(tmp_path / "in.png")
    call(tmp_path / "in.png", tmp_path / "of-unknown-quality.png", "--task", "car")
    assert "car q5-60, " in capsys.readouterr().out
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "no.png", "--q", "5-60")
    assert (status, "a photo has one of them" in err) == (2, True)


def test_flags_name_the_network(tmp_path, capsys, make_scene, networks):
    Image.fromarray(make_scene(16, 16, 1) // 2).save(tmp_path / "in.jpg", quality=80)
    Image.fromarray(make_scene(16, 16, 1) // 2).save(tmp_path / "in.png")
    for name in ("in.jpg", "in.png"):
        call(tmp_path / name, tmp_path / "out.png", "--q", 20, "--overwrite")
        assert np.array_equal(stored(tmp_path / "out.png"), stored(tmp_path / name) + 20)
    assert capsys.readouterr().err == ""
    call(tmp_path / "in.png", tmp_path / "large.png", "--task", "sr")
    assert stored(tmp_path / "large.png").shape == (32, 32)
    flags = ["--task", "car"]
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "no.png", *flags)
    assert (status, "in.png: not a JPEG" in err) == (1, True)
    checkpoint = networks / "sr-x2-paper.safetensors"
    flags = ["--checkpoint", checkpoint, "--q", 20]
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "no.png", *flags)
    assert (status, "was trained for sr x2, not for car q20" in err) == (2, True)


@pytest.mark.parametrize(
    ("quality", "channels", "chosen"),
    [
        (10, 3, "colour"),
        (90, 3, "colour"),
        (10, 1, "ten"),
        (40, 1, "many"),
        (63, 1, "colour"),  # no gray one reaches so far
        (80, 1, "colour"),
    ],
)
def test_photos_in_colour_get_the_network_of_colour(
    tmp_path, capsys, monkeypatch, make_scene, quality, channels, chosen
):
    folder = tmp_path / "weights"
    provide(folder, monkeypatch, {"ten": Task("car", 10), "many": Task("car", 5, 60)})
    provide(folder, monkeypatch, {"colour": Task("car", 5, 95)}, channels=3)
    Image.fromarray(make_scene(16, 16, channels)).save(tmp_path / "in.jpg", quality=quality)
    call(tmp_path / "in.jpg", tmp_path / "out.png")
    kind = "colour" if channels == 3 else "gray"
    out, err = capsys.readouterr()
    assert out.endswith(f", {chosen} (JPEG quality {quality}, {kind})\n")
    assert err == ""


def test_a_jpeg_better_than_the_networks_are_for_is_left_as_it_is(
    tmp_path, capsys, networks, make_scene
):
    photo, out = tmp_path / "in.jpg", tmp_path / "out.jpg"
    for quality, left in ((46, True), (45, False)):
        Image.fromarray(make_scene(16, 17, 1)).save(photo, quality=quality)
        call(photo, out, "--overwrite")
        assert (out.read_bytes() == photo.read_bytes()) == left
        told = f"of quality {quality}, and car-q40-paper is for car q40, so it is left as it is"
        assert (told in capsys.readouterr().err) == left


@pytest.mark.parametrize(
    ("quality", "target", "left"), [(94, "a.jpg", False), (95, "a.jpg", True), (95, "a.png", False)]
)
def test_a_jpeg_that_a_second_one_may_make_worse_is_left_as_it_is(
    tmp_path, capsys, monkeypatch, make_scene, quality, target, left
):
    provide(tmp_path / "weights", monkeypatch, {"colour": Task("car", 5, 95)}, channels=3)
    Image.fromarray(make_scene(16, 17)).save(tmp_path / "in.jpg", quality=quality)
    call(tmp_path / "in.jpg", tmp_path / target)
    out, err = capsys.readouterr()
    assert ("not restored" in out) == left
    assert ("of quality 95, and a second JPEG of it may be worse" in err) == left


def test_the_estimate_leaves_out_what_is_left_as_it_is(
    tmp_path, capsys, networks, monkeypatch, make_scene
):
    monkeypatch.setitem(progress.TILE, 1, 32)
    (tmp_path / "in").mkdir()
    for quality in (10, 46, 90):
        Image.fromarray(make_scene(40, 35, 1)).save(tmp_path / f"in/{quality}.jpg", quality=quality)
    Image.fromarray(make_scene(40, 35)).save(tmp_path / "in/rgb.jpg", keep_rgb=True)
    Image.fromarray(make_scene(40, 35)).save(tmp_path / "in/lossless.png")
    call(tmp_path / "in", tmp_path / "out")
    assert capsys.readouterr().err.startswith("1 picture, 0.001 megapixels: about ")
    call(tmp_path / "in", tmp_path / "out", "--q", 10, "--overwrite")
    assert capsys.readouterr().err.startswith("5 pictures, 0.007 megapixels: about ")


def test_of_an_animation_the_first_frame_is_left_as_it_is(tmp_path, capsys, make_scene):
    frames = [Image.fromarray(make_scene(10, 12, 1, seed)) for seed in (0, 1)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    call(tmp_path / "a.gif", tmp_path / "a.png")
    (told,) = capsys.readouterr().err.splitlines()
    assert "a.gif: not a JPEG, so its first frame is left as it is" in told
    assert np.array_equal(stored(tmp_path / "a.png")[:, :, 0], np.asarray(frames[0]))


def test_the_task_names_the_network(tmp_path, capsys, monkeypatch, make_scene):
    tasks = {f"sr-x{scale}": Task("sr", scale) for scale in (2, 3)}
    tasks |= {"blind": Task("denoise", 0, 55), "mosaic": Task("demosaic", 0)}
    provide(tmp_path / "weights", monkeypatch, tasks)
    picture = make_scene(16, 16) // 2
    Image.fromarray(picture).save(tmp_path / "in.png")
    mosaic = np.zeros_like(picture)
    for channel, y, x in ((1, 0, 0), (0, 0, 1), (2, 1, 0), (1, 1, 1)):
        mosaic[y::2, x::2, channel] = picture[y::2, x::2, channel]
    Image.fromarray(mosaic).save(tmp_path / "raw.png")
    calls = {
        ("in.png", "--task", "sr"): "sr x2, sr-x2 (--task sr)",
        ("in.png", "--task", "sr", "--scale", 3): "sr x3, sr-x3 (--task sr)",
        ("in.png", "--task", "denoise"): "denoise sigma0-55, blind (noise level unknown, colour)",
        ("in.png", "--sigma", 25): "denoise sigma0-55, blind (noise level 25, colour)",
        ("raw.png", "--task", "demosaic"): "demosaic, mosaic (--task demosaic)",
    }
    for (name, *flags), told in calls.items():
        call(tmp_path / name, tmp_path / "out.png", "--overwrite", *flags)
        out, err = capsys.readouterr()
        assert out == f"{tmp_path}/out.png: {told}\n"
        assert err == ""
    call(tmp_path / "in.png", tmp_path / "out.png", "--overwrite", "--sigma", 70)
    assert "noise level 70 is outside" in capsys.readouterr().err
    flags = ["--task", "sr", "--scale", 4]
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "no.png", *flags)
    assert status == 2
    assert "(models there: denoise sigma0-55, demosaic, sr x2, sr x3); train one" in err


def test_other_tasks_ignore_the_quality(tmp_path, capsys, make_scene):
    file = write_network(tmp_path / "net.safetensors", Task("denoise", 30))
    Image.fromarray(make_scene(16, 16)).save(tmp_path / "in.jpg", quality=80)
    call(tmp_path / "in.jpg", tmp_path / "out.png", "--checkpoint", file)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ([], "python train.py --task car --q 10"),
        (["--task", "sr", "--scale", 3], "python train.py --task sr --scale 3"),
        (["--sigma", 25], "python train.py --task denoise --sigma 25"),
        (["--task", "denoise"], "python train.py --task denoise --sigma 0-55"),
        (["--task", "demosaic"], "python train.py --task demosaic "),
    ],
)
def test_a_missing_model_names_the_command_that_trains_it(
    tmp_path, capsys, monkeypatch, flags, advice
):
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path / "none",))
    (tmp_path / "in.png").touch()
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "out.png", *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert advice in err
    assert "--checkpoint" in err
